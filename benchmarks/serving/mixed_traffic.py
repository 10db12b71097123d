"""Good and bad requests together, for minutes, to `tuna serve` and to `tuna proxy` in front of it.

    python -m benchmarks.serving.mixed_traffic --root STORES --store flickr8k --images DIR [--minutes 10]

Store, server and proxy are processes of their own. Callers send good requests (with and without pictures,
streamed and not), others bad ones (broken JSON, broken pictures, wrong types, too much, half a body, a caller
who leaves). It ends with 1 unless every good request was answered whole, no bad one got a status of 500 or
more, and both servers still answer.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import free_port, private_mib, running_server
from benchmarks.report import arguments_parser, table, write
from benchmarks.serving.proxy import process, request

GOOD_CALLERS, BAD_CALLERS = 3, 2
"""Callers of each kind at each server."""
WARM_SECONDS = 30.0
"""Seconds of traffic before memory is noted as that of the start: models and caches are filled by then."""
SAMPLE_SECONDS = 1.0
"""Seconds between two looks at memory."""
SETTLE_SECONDS = 5.0
"""Seconds between the last request and the last look at memory."""
BAD_PAUSE = 0.02
"""Seconds between the bad requests of a caller, so that good ones get a share of two cores."""
HOPELESS_CHARS = 400_000
"""Characters of a prompt that no context holds."""


class Traffic:
    """Callers at one server; counts good requests, what became of them, and bad ones by status."""

    def __init__(self, name: str, url: str, model: str, images: list[bytes], end: float) -> None:
        self.name, self.url, self.model, self.images, self.end = name, url, model, images, end
        self.good: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.trouble: list[str] = []
        self._lock = threading.Lock()

    def start(self) -> list[threading.Thread]:
        kinds = [self._send_good] * GOOD_CALLERS + [self._send_bad] * BAD_CALLERS
        threads = [threading.Thread(target=kind, args=(seed,)) for seed, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        return threads

    def _send_good(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=120, trust_env=False) as client:
            while time.monotonic() < self.end:
                stream, image = rng.random() < 0.3, rng.choice(self.images)
                body = request(rng.choice([None, image, image]), stream=stream) | {
                    "max_tokens": 8,
                    "model": self.model,
                }
                try:
                    reply = client.post(f"{self.url}/chat/completions", json=body)
                except httpx.HTTPError as error:
                    self._count(self.good, f"no reply ({type(error).__name__})", repr(error))
                    continue
                whole = reply.status_code == 200 and (
                    reply.text.endswith("data: [DONE]\n\n") if stream else "choices" in reply.json()
                )
                outcome = "whole" if whole else f"{reply.status_code}"
                self._count(self.good, outcome, "" if whole else f"a good request: {reply.text[:200]}")

    def _send_bad(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=120, trust_env=False) as client:
            while time.monotonic() < self.end:
                name, attack = rng.choice(list(ATTACKS.items()))
                try:
                    status = attack(client, self.url, rng)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                wrong = status.startswith("5")
                self._count(self.bad, status, f"a bad request ({name}) got {status}" if wrong else "")
                time.sleep(BAD_PAUSE)

    def _count(self, counts: Counter[str], outcome: str, trouble: str) -> None:
        with self._lock:
            counts[outcome] += 1
            if trouble:
                self.trouble.append(f"{self.name}: {trouble}")


def _post(
    data: bytes | Callable[[random.Random], bytes],
) -> Callable[[httpx.Client, str, random.Random], str]:
    """An attack that posts a body and gives the status."""

    def attack(client: httpx.Client, url: str, rng: random.Random) -> str:
        content = data if isinstance(data, bytes) else data(rng)
        headers = {"content-type": "application/json"}
        return str(client.post(f"{url}/chat/completions", content=content, headers=headers).status_code)

    return attack


def _chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()


def _half(client: httpx.Client, url: str, rng: random.Random) -> str:
    """Send half a request and leave."""
    return _leave(url, _chat(max_tokens=64), 0.5)


def _gone(client: httpx.Client, url: str, rng: random.Random) -> str:
    """Ask for a long answer and leave before it comes."""
    return _leave(url, _chat(max_tokens=64, stream=True), 1.0)


def _leave(url: str, body: bytes, share: float) -> str:
    address = httpx.URL(url)
    head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: int(len(body) * share)]
    with (
        suppress(OSError),
        socket.create_connection((address.host, address.port or 80), timeout=10) as caller,
    ):
        caller.sendall(data)
    return "the caller left"


def _garbage(client: httpx.Client, url: str, rng: random.Random) -> str:
    address = httpx.URL(url)
    with (
        suppress(OSError),
        socket.create_connection((address.host, address.port or 80), timeout=10) as caller,
    ):
        caller.sendall(rng.randbytes(2000))
        caller.settimeout(1.0)
        reply = caller.recv(100).split()
        return reply[1].decode() if len(reply) > 1 else "closed"
    return "closed"


ATTACKS: dict[str, Callable[[httpx.Client, str, random.Random], str]] = {
    "random bytes as a body": _post(lambda rng: rng.randbytes(rng.choice([1, 100, 100_000]))),
    "cut-off JSON": _post(lambda rng: _chat()[: rng.randrange(1, 50)]),
    "deep JSON": _post(b'{"messages":' + b"[" * 20_000),
    "no messages": _post(b"{}"),
    "a lone surrogate": _post(b'{"messages":[{"role":"user","content":"\\ud800"}]}'),
    "wrong types": _post(_chat(stream="false")),
    "a huge number": _post(b'{"max_tokens":1' + b"0" * 5000 + b',"messages":[]}'),
    "a broken picture": _post(_chat(messages=request(b"\xff\xd8\xff broken")["messages"])),
    "an address as a picture": _post(
        _chat(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.jpg"}}],
                }
            ]
        )
    ),
    "what no context holds": _post(
        _chat(messages=[{"role": "user", "content": "w " * (HOPELESS_CHARS // 2)}])
    ),
    "tools": _post(_chat(tools=[{"type": "function", "function": {"name": "f"}}])),
    "half a body": _half,
    "a caller who leaves": _gone,
    "random bytes over TCP": _garbage,
}


class Memory:
    """Private MiB of processes while traffic runs."""

    def __init__(self, processes: dict[str, int]) -> None:
        self.processes = processes
        self.start: dict[str, float] = {}
        self.middle: dict[str, float] = {}
        self.peak = dict.fromkeys(processes, 0.0)

    def watch(self, until: float) -> None:
        begin = time.monotonic()
        while time.monotonic() < until:
            now = self.now()
            self.peak = {name: max(self.peak[name], mib) for name, mib in now.items()}
            if not self.start and time.monotonic() > begin + WARM_SECONDS:
                self.start = now
            if not self.middle and time.monotonic() > (begin + until) / 2:
                self.middle = now
            time.sleep(SAMPLE_SECONDS)

    def now(self) -> dict[str, float]:
        return {name: private_mib(pid) for name, pid in self.processes.items()}

    def lines(self) -> list[list[str]]:
        after = self.now()
        start = self.start or after
        return [
            [name, *(f"{stage.get(name, 0):.0f}" for stage in (start, self.middle, after, self.peak))]
            for name in self.processes
        ]


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of stores")
    parser.add_argument("--store", default="flickr8k")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--model", default="smol", help="preset or directory that `tuna serve` answers with")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--keep", action="store_true", help="write the report to benchmarks/results")
    options = parser.parse_args()
    images = [file.read_bytes() for file in sorted(options.images.glob("*.jpg"))[:500]]
    with ExitStack() as stack:
        address, store = stack.enter_context(running_server(options.root))
        at_store = ["--store", f"grpc://{address}/{options.store}"]
        bare, front = (f"http://127.0.0.1:{free_port()}/v1" for _ in range(2))
        tuna = [sys.executable, "-m", "tuna_model.cli"]
        serve = [*tuna, "serve", "--model", options.model, *at_store, "--port", str(httpx.URL(bare).port)]
        proxy = [*tuna, "proxy", "--upstream", bare, *at_store, "--port", str(httpx.URL(front).port)]
        pids = {"tuna serve": stack.enter_context(process(serve, f"{bare}/models"))}
        pids["tuna proxy"] = stack.enter_context(process(proxy, f"{front}/models"))
        memory = Memory(pids | {"tagstore serve": store})
        end = time.monotonic() + 60 * options.minutes
        callers = [
            Traffic("tuna serve", bare, options.model, images, end),
            Traffic("tuna proxy", front, options.model, images, end),
        ]
        threads = [thread for caller in callers for thread in caller.start()]
        memory.watch(end)
        for thread in threads:
            thread.join()
        time.sleep(SETTLE_SECONDS)
        remembered = memory.lines()
        for url in (bare, front):
            last = request(images[0]) | {"max_tokens": 2, "model": options.model}
            reply = httpx.post(f"{url}/chat/completions", json=last, timeout=120, trust_env=False)
            reply.raise_for_status()
    report(options, callers, remembered)
    sys.exit(any(caller.trouble for caller in callers))


def report(options: argparse.Namespace, callers: list[Traffic], memory: list[list[str]]) -> None:
    def told(counts: Counter[str]) -> str:
        return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items())) or "none"

    lines = [
        [caller.name, caller.good.total(), caller.good.total() - caller.good["whole"],
         sum(n for outcome, n in caller.good.items() if outcome.startswith("5")), caller.bad.total(),
         told(caller.bad)]
        for caller in callers
    ]  # fmt: skip
    trouble = [line for caller in callers for line in caller.trouble][:20]
    parts = [
        f"{options.minutes:g} minutes, {GOOD_CALLERS} good and {BAD_CALLERS} bad callers at each; "
        f"`tuna serve --model {options.model}` is the proxy's upstream.",
        table(
            ["at", "good requests", "not answered whole", "of these 5xx", "bad requests", "by status"], lines
        ),
        "Private MiB of each process:",
        table(["process", f"after {WARM_SECONDS:.0f} s", "in the middle", "after all", "maximum"], memory),
        "Trouble: " + ("none." if not trouble else "\n\n" + "\n".join(f"- {line}" for line in trouble)),
    ]
    write("mixed-traffic", "Good and bad traffic together", *parts,
          packages=("starlette", "uvicorn", "httpx"), keep=options.keep)  # fmt: skip


if __name__ == "__main__":
    main()
