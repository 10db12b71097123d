"""`tuna proxy` before `tuna serve` and the servers of llama.cpp and transformers, and inside LiteLLM's proxy.

    TUNA_PEERS=/path/to/python pytest -m matrix tests/test_proxy_upstreams.py

TUNA_PEERS is a Python with the packages llama-cpp-python[server], litellm[proxy], transformers[serving], and
this one. All of them answer with SmolLM2-135M, on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from test_proxy import chat, served, url_of
from tuna_model.presets import smollm
from tuna_model.proxy.server import app
from tuna_model.proxy.settings import ProxySettings

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif("TUNA_PEERS" not in os.environ, reason="TUNA_PEERS names no Python with the servers"),
]
UPSTREAMS = ("tuna serve", "llama.cpp", "transformers serve")
QUESTION = {"temperature": 0, "max_tokens": 12}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[str]:
    """A server as a process; its URL once it answers."""
    url, log = f"http://127.0.0.1:{port}/v1", folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_PROXY": "*", **environment},
        )
        try:
            deadline = time.monotonic() + 180
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    httpx.get(f"{url}/models", timeout=30, trust_env=False)
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def command(name: str, port: int) -> list[str]:
    peers = os.environ["TUNA_PEERS"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if name == "tuna serve":
        return [sys.executable, "-m", "tuna_model.cli", "serve", "--model", "smol", *where]
    if name == "llama.cpp":
        return [peers, "-m", "llama_cpp.server", "--model", str(smollm.gguf_file()), *where]
    # tuna_model makes transformers run beside a torchvision that does not fit its torch
    code = "import tuna_model; from transformers.cli.transformers import main; main()"
    return [peers, "-c", code, "serve", str(smollm.directory()), *where]


@pytest.fixture(scope="module", params=UPSTREAMS)
def upstream(request, tmp_path_factory) -> Iterator[str]:
    port = free_port()
    with running(command(request.param, port), port, tmp_path_factory.mktemp("upstream")) as url:
        yield url


@pytest.fixture
def proxied(upstream: str, server_address: str) -> Iterator[Any]:
    with ExitStack() as stack:

        def start(store: str = server_address, **tags: Any) -> str:
            values = {
                "upstreams": [{"url": upstream}], "stores": {"shapes": f"grpc://{store}/shapes"},
                "neighbours": 3, "deadline": 30.0, "tags": tags,
            }  # fmt: skip
            return stack.enter_context(served(app(ProxySettings.of(values, "test"))))

        yield start


def model_of(url: str) -> str:
    answer = httpx.get(f"{url}/models", timeout=30, trust_env=False)
    if answer.is_error:  # transformers lists what it once downloaded, and has not
        return str(smollm.directory())
    return str(answer.json()["data"][0]["id"])


def said(response: httpx.Response) -> Any:
    """What differs from request to request is left out: ids, times."""
    if "event-stream" not in response.headers.get("content-type", ""):
        return response.status_code, [choice["message"] for choice in response.json().get("choices", [])]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    deltas = [choice.get("delta") for line in lines for choice in json.loads(line).get("choices", [])]
    return response.status_code, deltas


def test_a_stock_client_through_the_proxy(upstream: str, proxied):
    url = proxied(style="candidates", text_only=True)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    body = chat(url_of(), **QUESTION) | {"model": model_of(upstream)}
    raw = client.chat.completions.with_raw_response.create(**body)
    answer, tags = raw.parse().choices[0].message.content, json.loads(raw.headers["x-tuna-tags"])
    assert answer
    assert "red circle" in tags
    stream = client.chat.completions.create(**body, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    assert text.strip() == answer.strip()
    # the same words without a proxy give the same answer
    words = f"The answer is likely one of these, the likeliest first: {', '.join(tags)}."
    direct = {**body, "messages": [{"role": "user", "content": f"{words}\nWhat is it?"}]}
    alone = httpx.post(f"{upstream}/chat/completions", json=direct, timeout=120, trust_env=False).json()
    assert alone["choices"][0]["message"]["content"] == answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_store_that_is_down_leaves_the_upstreams_answer(upstream: str, proxied, stream: bool):
    url = proxied(store="127.0.0.1:9")
    for body in (chat(url_of(), **QUESTION), chat(**QUESTION)):
        body |= {"model": model_of(upstream), "stream": stream}
        with httpx.Client(timeout=120, trust_env=False) as client:
            through = client.post(f"{url}/chat/completions", json=body)
            direct = client.post(f"{upstream}/chat/completions", json=body)
        assert said(through) == said(direct)


def test_inside_litellm(tmp_path: Path, server_address: str):
    """LiteLLM's own proxy calls the hook before it asks llama.cpp."""
    peers, port, front = os.environ["TUNA_PEERS"], free_port(), free_port()
    (tmp_path / "upstream").mkdir()
    with running(command("llama.cpp", port), port, tmp_path / "upstream") as url:
        (tmp_path / "litellm.yaml").write_text(
            "model_list:\n"
            "  - model_name: small\n"
            f"    litellm_params: {{model: openai/{model_of(url)}, api_base: {url}, api_key: none}}\n"
            "litellm_settings:\n"
            "  callbacks: tuna_model.proxy.litellm_hook.hook\n"
        )
        (tmp_path / "proxy.toml").write_text(
            f'upstreams = [{{url = "{url}"}}]\ndeadline = 30.0\n'
            f'[stores]\nshapes = "grpc://{server_address}/shapes"\n'
            '[tags]\nstyle = "candidates"\ntext_only = true\n'
        )
        serve = [peers, "-m", "litellm.proxy.proxy_cli", "--config", str(tmp_path / "litellm.yaml")]
        environment = {
            "TUNA_PROXY_CONFIG": str(tmp_path / "proxy.toml"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # on this machine alone
        arguments = [*serve, "--host", "127.0.0.1", "--port", str(front)]
        with running(arguments, front, tmp_path, **environment) as litellm:
            body = chat(url_of(), **QUESTION) | {"model": "small"}
            with httpx.Client(timeout=120, trust_env=False) as client:
                answer = client.post(f"{litellm}/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                counted = answer.json()["usage"]["prompt_tokens"]
                bare = client.post(
                    f"{litellm}/chat/completions",
                    json=body | {"messages": [{"role": "user", "content": "What is it?"}]},
                )
            # the tags' words are in the prompt, and no picture
            assert counted > bare.json()["usage"]["prompt_tokens"] + 10
