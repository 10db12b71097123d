"""What `tuna proxy` adds to a request over the bare upstream.

    python -m benchmarks.serving.proxy --root STORES --store flickr8k --images DIR [--requests 300] [--keep]

The upstream answers at once, from a process of its own, so that all of the time is the proxy's. Store and
proxy are processes too. Then 64 streams at once, and the store is killed while they run: all have to end
whole.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.processes import free_port, private_mib, start_server
from benchmarks.report import arguments_parser, table, write

STREAMS, EVENTS = 64, 50
"""Streams at once, and events of each."""
PAUSE = 0.05
"""Seconds between the events of a stream."""


def upstream(port: int) -> None:
    """Answer every request at once; to a stream, `EVENTS` events."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    answer = {"id": "1", "object": "chat.completion", "choices": [{"message": {"content": "Yes."}}]}

    async def events() -> Any:
        for number in range(EVENTS):
            yield f'data: {{"choices":[{{"delta":{{"content":"{number} "}}}}]}}\n\n'
            await asyncio.sleep(PAUSE)
        yield "data: [DONE]\n\n"

    async def reply(request: Request) -> Response:
        body = await request.body()
        stream = bool(body) and json.loads(body).get("stream")
        return StreamingResponse(events(), media_type="text/event-stream") if stream else JSONResponse(answer)

    application = Starlette(routes=[Route("/{path:path}", reply, methods=["GET", "POST"])])
    uvicorn.run(application, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def process(command: list[str], url: str) -> Iterator[int]:
    """A server until its URL answers; gives its process id."""
    running = subprocess.Popen(command)
    try:
        while True:
            try:
                httpx.get(url, timeout=5, trust_env=False)
                break
            except httpx.TransportError:
                if running.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {running.returncode}") from None
                time.sleep(0.1)
        yield running.pid
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(60)


def request(image: bytes | None, *, stream: bool = False) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is it?"}]
    if image is not None:
        url = "data:image/jpeg;base64," + base64.b64encode(image).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": "any", "messages": [{"role": "user", "content": content}], "stream": stream}


def milliseconds(client: httpx.Client, url: str, bodies: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Milliseconds of each request, one after the other."""
    spent = []
    for body in bodies:
        start = time.perf_counter()
        client.post(f"{url}/chat/completions", json=body).raise_for_status()
        spent.append(1000 * (time.perf_counter() - start))
    return np.array(spent)


async def streams(url: str, images: Iterator[bytes], kill: int) -> list[str]:
    """The texts of `STREAMS` streams at once; process `kill` is killed while they run."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:

        async def one() -> str:
            body = request(next(images), stream=True)
            async with client.stream("POST", f"{url}/chat/completions", json=body) as answer:
                return (await answer.aread()).decode()

        running = [asyncio.create_task(one()) for _ in range(STREAMS)]
        await asyncio.sleep(EVENTS * PAUSE / 2)
        os.kill(kill, signal.SIGKILL)
        first = await asyncio.gather(*running)
        return [*first, *await asyncio.gather(*(one() for _ in range(STREAMS)))]  # and without the store


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--root", type=Path, help="folder of stores")
    parser.add_argument("--store", default="flickr8k")
    parser.add_argument("--images", type=Path, help="folder of JPEGs that the store need not hold")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--keep", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        upstream(options.upstream)
        return
    if options.root is None or options.images is None:
        parser.error("--root and --images are needed")
    files = sorted(options.images.glob("*.jpg"))[: 2 * options.requests]
    images = [file.read_bytes() for file in files]
    store = start_server(options.root)
    assert store.stdout is not None
    address = store.stdout.readline().strip()
    bare, front = (f"http://127.0.0.1:{free_port()}/v1" for _ in range(2))
    port = bare.split(":")[2].split("/")[0]
    serve = [sys.executable, "-m", "benchmarks.serving.proxy", "--upstream", port]
    proxy = [
        sys.executable, "-m", "tuna_model.cli", "proxy", "--upstream", bare, "--port",
        front.split(":")[2].split("/")[0], "--store", f"grpc://{address}/{options.store}", "--cache-seconds",
        "600",
    ]  # fmt: skip
    try:
        with process(serve, bare), process(proxy, f"{front}/models") as pid:
            lines, memory = measured(options, bare, front, images, pid)
            texts = asyncio.run(streams(front, itertools.cycle(images), store.pid))
    finally:
        store.kill()
        store.wait()
    whole = sum(text.count("data: {") == EVENTS and text.endswith("[DONE]\n\n") for text in texts)
    parts = [
        f"{options.requests} requests a line, one after the other; milliseconds.",
        table(["request", "p50", "p50 over the bare upstream", "p95"], lines),
        f"{STREAMS} streams at once, the store killed while they ran, then {STREAMS} more without it: "
        f"{whole} of {2 * STREAMS} ended whole. Private memory of the proxy before them: {memory:.0f} MiB.",
    ]
    write("proxy", "What the proxy adds", *parts, packages=("httpx", "starlette"), keep=options.keep)


def measured(
    options: argparse.Namespace, bare: str, front: str, images: list[bytes], pid: int
) -> tuple[list[list[str]], float]:
    """Lines of the table, and MiB of the proxy."""
    count = options.requests
    plain, new = [request(None)] * count, [request(image) for image in images]
    with httpx.Client(timeout=60, trust_env=False) as client:
        for url in (bare, front):
            milliseconds(client, url, plain[:20] + new[-5:])
        base, sized = milliseconds(client, bare, plain), milliseconds(client, bare, new[:count])
        lines = []
        for name, bodies, reference in (
            ("no picture", plain, base),
            ("a new picture", new[:count], sized),
            ("a picture that it knows", new[:count], sized),
        ):
            spent = milliseconds(client, front, bodies)
            p50, added = np.median(spent), np.median(spent) - np.median(reference)
            lines.append([name, f"{p50:.2f}", f"{added:.2f}", f"{np.percentile(spent, 95):.2f}"])
    from tagstore.encoding.encoder import load_encoder

    encoder, spent = load_encoder("mini", device="cpu"), []
    from tagstore.encoding.images import decode

    for image in images[:50]:
        start = time.perf_counter()
        encoder.encode_images([decode(image)])
        spent.append(1000 * (time.perf_counter() - start))
    lines.append(["(decoding and encoder alone, in a process)", f"{np.median(spent):.2f}", "", ""])
    return lines, private_mib(pid)


if __name__ == "__main__":
    main()
