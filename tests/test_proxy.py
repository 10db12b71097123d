"""`tuna proxy` in front of a real HTTP server, with real stores over gRPC and from disk."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from pictures import picture
from tagstore.errors import InvalidInput
from tagstore.serving.server import Server
from tuna_model.proxy.server import app
from tuna_model.proxy.settings import ProxySettings

ANSWER = (
    b'{"id": "1",  "object": "chat.completion", "model": "eye", "choices": [{"index": 0, "finish_reason": \
"stop", "message": {"role": "assistant", "content": "A red circle."}}]}'
)
"""With two blanks in a row, which whoever parses and writes it again would lose."""
EVENTS = [
    b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"A "}}]}\n\n',
    b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"circle."},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]


@dataclass
class Upstream:
    """What an upstream was sent; it answers with `ANSWER`, or `EVENTS` to a stream."""

    url: str = ""
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    hold: threading.Event | None = None
    """If there is one, a stream pauses after its first event until it is set."""
    cut: threading.Event = field(default_factory=threading.Event)
    """Set when a stream ends before its last event."""

    @property
    def last(self) -> dict[str, Any]:
        return json.loads(self.requests[-1][3])

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        self.requests.append((request.method, path, dict(request.headers), body))
        if body.startswith(b"{") and json.loads(body).get("stream"):
            return StreamingResponse(self._events(), media_type="text/event-stream")
        return Response(ANSWER, headers={"x-request-id": "7", "content-type": "application/json"})

    async def _events(self):
        sent = 0
        try:
            for event in EVENTS:
                yield event
                sent += 1
                while self.hold is not None and not self.hold.is_set():
                    await asyncio.sleep(0.01)
        finally:
            if sent < len(EVENTS):
                self.cut.set()


@contextmanager
def served(application: Any) -> Iterator[str]:
    """An ASGI application on a free port, in a thread."""
    started = threading.Event()

    class Web(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            started.set()

    server = Web(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def upstream(monkeypatch) -> Iterator[Upstream]:
    monkeypatch.setenv("NO_PROXY", "*")
    recorder = Upstream()
    every = Route("/{path:path}", recorder.answer, methods=["GET", "POST", "DELETE"])
    with served(Starlette(routes=[every])) as recorder.url:
        yield recorder


@pytest.fixture
def proxied(upstream: Upstream, server_address: str):
    """Starts proxies of a store over gRPC: call it with settings for a client of one."""
    with ExitStack() as stack:

        def start(**settings: Any) -> httpx.Client:
            values = {
                "upstreams": [{"url": upstream.url}],
                "stores": {"shapes": f"grpc://{server_address}/shapes"},
                "deadline": 30.0,
                "neighbours": 3,
                **settings,
            }
            url = stack.enter_context(served(app(ProxySettings.of(values, "test"))))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60, trust_env=False))

        yield start


def url_of(colour: str = "red", shape: str = "circle") -> str:
    return "data:image/png;base64," + base64.b64encode(picture(colour, shape)).decode()


def chat(*urls: str, **more: Any) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*pictures, {"type": "text", "text": "What is it?"}]
    return {"model": "eye", "messages": [{"role": "user", "content": content}], **more}


def test_a_picture_gets_the_tags_of_the_store(upstream: Upstream, proxied):
    response = proxied().post("/chat/completions", json=chat(url_of(), temperature=0.5))
    assert response.content == ANSWER
    assert response.headers["x-request-id"] == "7"
    [turn] = upstream.last["messages"]
    shown, tags, question = turn["content"]
    assert shown == {"type": "image_url", "image_url": {"url": url_of()}}
    assert tags["text"].startswith("Similar images carry these tags: ")
    assert "red circle" in tags["text"]
    assert question == {"type": "text", "text": "What is it?"}
    assert upstream.last["temperature"] == 0.5
    assert "red circle" in json.loads(response.headers["x-tuna-tags"])
    assert response.headers["x-tuna-store"] == "shapes@1"
    assert "x-tuna-degraded" not in response.headers


def test_responses_and_messages_get_tags_too(upstream: Upstream, proxied):
    client = proxied(tags={"style": "candidates", "max_tags": 2})
    part = {"type": "input_image", "image_url": url_of()}
    words = {"type": "input_text", "text": "What is it?"}
    client.post("/responses", json={"model": "eye", "input": [{"role": "user", "content": [part, words]}]})
    _, tags, question = upstream.last["input"][0]["content"]
    assert tags["type"] == "input_text"
    assert tags["text"].startswith("The answer is likely one of these")
    assert question == words
    source = {"type": "base64", "media_type": "image/png", "data": url_of().partition(",")[2]}
    turn = {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}
    client.post("/messages", json={"model": "eye", "max_tokens": 9, "messages": [turn]})
    _, tags, question = upstream.last["messages"][0]["content"]
    assert tags["text"].startswith("The answer is likely one of these")
    assert question["text"] == "?"


@pytest.mark.parametrize(
    ("body", "system"),
    [
        (chat(url_of()), lambda b: (b["messages"][0]["role"], b["messages"][0]["content"])),
        (
            chat(url_of())
            | {"messages": [{"role": "developer", "content": "Be brief."}, *chat(url_of())["messages"]]},
            lambda b: (b["messages"][0]["role"], b["messages"][0]["content"]),
        ),
    ],
    ids=["no system turn", "a system turn"],
)
def test_tags_may_stand_in_the_system_turn(upstream: Upstream, proxied, body, system):
    proxied(tags={"place": "system"}).post("/chat/completions", json=body)
    role, content = system(upstream.last)
    assert role in ("system", "developer")
    assert "red circle" in content
    assert content.startswith("Be brief.\n\n") == (role == "developer")
    assert len(upstream.last["messages"][-1]["content"]) == 2


def test_tags_of_several_pictures_stand_in_their_turns(upstream: Upstream, proxied):
    first, second = chat(url_of("red", "circle"), url_of("blue", "square")), chat(url_of("green", "triangle"))
    answer = {"role": "assistant", "content": "Shapes."}
    body = first | {"messages": [*first["messages"], answer, *second["messages"]]}
    proxied().post("/chat/completions", json=body)
    one, said, two = upstream.last["messages"]
    lines = one["content"][2]["text"].splitlines()
    assert lines[0].startswith("Picture 1: ")
    assert "red circle" in lines[0]
    assert lines[1].startswith("Picture 2: ")
    assert "blue square" in lines[1]
    assert said == answer
    assert two["content"][1]["text"].startswith("Picture 3: ")


def test_styles_go_by_model_and_a_model_without_eyes_gets_words(upstream: Upstream, proxied):
    client = proxied(models={"blind": {"text_only": True, "template": "Look: {tags}.", "max_tags": 1}})
    client.post("/chat/completions", json=chat(url_of()) | {"model": "blind"})
    [turn] = upstream.last["messages"]
    assert isinstance(turn["content"], str)
    assert turn["content"].startswith("Look: ")
    assert turn["content"].endswith("\nWhat is it?")
    client.post("/chat/completions", json=chat(url_of()))
    assert len(upstream.last["messages"][0]["content"]) == 3


def test_banned_and_weak_tags_are_left_out(upstream: Upstream, proxied):
    response = proxied(tags={"ban": ["Red Circle"]}).post("/chat/completions", json=chat(url_of()))
    assert "red circle" not in response.headers["x-tuna-tags"]
    response = proxied(tags={"threshold": 1.0}).post("/chat/completions", json=chat(url_of()))
    assert len(json.loads(response.headers["x-tuna-tags"])) == 1


def test_the_leak_guard_of_the_store_holds(upstream: Upstream, proxied, server_address: str):
    for options, has in (("", True), ("?exclude=self", False)):
        client = proxied(stores={"s": f"grpc://{server_address}/shapes{options}"}, neighbours=1)
        response = client.post("/chat/completions", json=chat(url_of()))
        assert ("red circle" in json.loads(response.headers["x-tuna-tags"])) is has


def test_a_request_names_its_store_among_those_that_there_are(
    upstream: Upstream, proxied, server_address, shapes_root
):
    url = f"grpc://{server_address}/shapes"
    client = proxied(stores={"first": f"{url}?max_tags=1", "second": f"file://{shapes_root}/shapes"})
    count = {}
    for name in ("", "first", "second"):
        response = client.post("/chat/completions", json=chat(url_of()), headers={"X-Tuna-Store": name})
        count[name] = len(json.loads(response.headers["x-tuna-tags"]))
        assert "x-tuna-store" not in upstream.requests[-1][2]
    assert count[""] == count["first"] == 1 < count["second"]
    refused = client.post("/chat/completions", json=chat(url_of()), headers={"X-Tuna-Store": "third"})
    assert refused.status_code == 400
    assert "first, second" in refused.json()["error"]["message"]


RAW = b'{"model":"eye",  "messages": [{"role":"user","content":"caf\\u00e9?"}], "new_field": [1e3]}'


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/chat/completions", RAW),
        ("POST", "/chat/completions", b"no json \xff"),
        ("POST", "/chat/completions", b"[" * 100_000),
        ("POST", "/chat/completions", b'{"messages": {"role": 3}}'),
        (
            "POST",
            "/chat/completions",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        ),
        ("POST", "/embeddings", b'{"input":  "x"}'),
        ("POST", "/audio/transcriptions", b"--boundary\r\n\x00\xff"),
        ("GET", "/models?limit=3&after=a%20b", b""),
        ("DELETE", "/files/a%2Fb", b""),
    ],
)
def test_what_has_no_picture_passes_byte_for_byte(upstream: Upstream, proxied, method, path, body):
    headers = {"Authorization": "Bearer key", "traceparent": "00-1-2-01", "X-New": "1", "Accept": "*/*"}
    response = proxied().request(method, path, content=body, headers=headers)
    assert response.content == ANSWER
    assert response.headers["x-request-id"] == "7"
    [(sent_method, sent_path, sent_headers, sent)] = upstream.requests
    assert (sent_method, sent) == (method, body)
    assert sent_path.removeprefix("/v1") == path.replace("%2F", "/")
    for name, value in headers.items():
        assert sent_headers[name.lower()] == value


def test_a_stream_comes_byte_for_byte_and_at_once(upstream: Upstream, proxied):
    upstream.hold = threading.Event()
    with proxied().stream("POST", "/chat/completions", json=chat(url_of(), stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-tuna-store"] == "shapes@1"
        pieces = response.iter_raw()
        assert next(pieces) == EVENTS[0]  # while the upstream still waits
        upstream.hold.set()
        assert b"".join(pieces) == b"".join(EVENTS[1:])


def test_an_upstream_learns_that_the_caller_has_gone(upstream: Upstream, proxied):
    upstream.hold = threading.Event()
    with proxied().stream("POST", "/chat/completions", json=chat(url_of(), stream=True)) as response:
        next(response.iter_raw())
    assert upstream.cut.wait(20)


def test_without_its_store_every_request_passes_byte_for_byte(upstream: Upstream, proxied, shapes_root: Path):
    server = Server(shapes_root, "127.0.0.1:0", device="cpu")
    server.start()
    client = proxied(
        stores={"shapes": f"grpc://{server.address}/shapes?retries=0"}, deadline=5.0, cache_seconds=0.0
    )
    body = json.dumps(chat(url_of()), indent=3).encode()
    assert client.post("/chat/completions", content=body).headers["x-tuna-store"] == "shapes@1"
    server.stop(0)
    response = client.post("/chat/completions", content=body)
    assert response.content == ANSWER
    assert response.headers["x-tuna-degraded"] == "unavailable"
    assert upstream.requests[-1][3] == body
    streamed = json.dumps(chat(url_of(), stream=True), indent=3).encode()
    response = client.post("/chat/completions", content=streamed)
    assert response.content == b"".join(EVENTS)
    assert upstream.requests[-1][3] == streamed
    metrics = client.get(str(client.base_url.copy_with(path="/tuna/metrics"))).text
    assert 'tuna_proxy_requests_total{outcome="tagged"} 1.0' in metrics
    assert 'tuna_proxy_degraded_total{reason="unavailable"} 2.0' in metrics


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a.png", "address"),
        ("file:///etc/passwd", "address"),
        ("data:image/png;base64,@@@", "picture"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "picture"),
    ],
)
def test_a_picture_that_cannot_be_read_passes_and_says_so(upstream: Upstream, proxied, url, reason):
    body = json.dumps(chat(url_of(), url)).encode()
    response = proxied().post("/chat/completions", content=body)
    assert response.content == ANSWER
    assert response.headers["x-tuna-degraded"] == reason
    assert upstream.requests[-1][3] == body


def test_a_store_that_is_late_costs_the_deadline_and_no_more(upstream: Upstream, proxied):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = proxied(stores={"s": f"grpc://127.0.0.1:{port}/shapes"}, deadline=0.3)
        start = time.monotonic()
        response = client.post("/chat/completions", json=chat(url_of()))
        assert time.monotonic() - start < 5
    assert response.headers["x-tuna-degraded"] in ("deadline", "unavailable")
    assert response.content == ANSWER


def test_too_many_pictures_pass_and_say_so(upstream: Upstream, proxied):
    response = proxied(max_pictures=1).post("/chat/completions", json=chat(url_of(), url_of("blue")))
    assert response.headers["x-tuna-degraded"] == "pictures"
    assert response.content == ANSWER


def test_fields_beside_the_answer_come_on_demand(upstream: Upstream, proxied):
    headers = {"X-Tuna-Fields": "1"}
    answer = proxied().post("/chat/completions", json=chat(url_of()), headers=headers).json()
    assert answer["choices"][0]["message"]["content"] == "A red circle."
    assert "red circle" in answer["tags"]
    assert (answer["store"], answer["degraded"]) == ("shapes@1", False)


def test_models_go_to_the_upstream_that_has_them(upstream: Upstream, proxied):
    other = Upstream()
    with served(Starlette(routes=[Route("/{path:path}", other.answer, methods=["POST"])])) as other.url:
        client = proxied(upstreams=[{"url": upstream.url}, {"url": other.url, "models": ["ear"]}])
        client.post("/chat/completions", json=chat(url_of()) | {"model": "ear"})
        client.post("/chat/completions", json=chat(url_of()))
    assert (len(other.requests), len(upstream.requests)) == (1, 1)
    assert other.last["model"] == "ear"


def test_an_upstream_that_is_gone_is_a_502_in_openais_shape(proxied):
    with served(Starlette()) as gone:
        pass
    response = proxied(upstreams=[{"url": gone}]).post("/chat/completions", json=chat(url_of()))
    assert response.status_code == 502
    assert response.json()["error"]["type"] == "upstream_error"


def test_the_clients_of_openai_get_their_answers(upstream: Upstream, proxied):
    client = openai.OpenAI(base_url=str(proxied().base_url), api_key="key", max_retries=0)
    answer = client.chat.completions.create(**chat(url_of()))
    assert answer.choices[0].message.content == "A red circle."
    events = client.chat.completions.create(**chat(url_of(), stream=True))
    assert "".join(event.choices[0].delta.content for event in events) == "A circle."
    raw = client.chat.completions.with_raw_response.create(**chat(url_of()))
    assert "red circle" in raw.headers["x-tuna-tags"]


def test_64_streams_at_once_with_the_same_picture_ask_the_store_once(upstream: Upstream, proxied):
    client = proxied(cache_seconds=60.0)

    def stream(_: int) -> bytes:
        return client.post("/chat/completions", json=chat(url_of(), stream=True)).content

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(stream, range(64)))
    assert answers == [b"".join(EVENTS)] * 64
    assert all("red circle" in request[3].decode() for request in upstream.requests)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"upstreams": [{"url": "localhost:8000"}]}, "http://"),
        ({"tags": {"style": "poem"}}, "tags.style"),
        ({"tags": {"template": "no place"}}, "{tags}"),
        ({"models": {"eye": {"stile": "list"}}}, "stile"),
        ({"deadlin": 1}, "deadlin"),
        ({"stores": {}}, "stores"),
    ],
)
def test_wrong_settings_are_named(values, says):
    good = {"upstreams": [{"url": "http://localhost/v1"}], "stores": {"s": "null://"}}
    with pytest.raises(InvalidInput, match=says.replace("{", r"\{")):
        ProxySettings.of(good | values, "proxy.toml")


def test_the_command_reads_a_file(tmp_path: Path, upstream: Upstream, shapes_root: Path):
    import subprocess
    import sys

    config = tmp_path / "proxy.toml"
    config.write_text(
        f'deadline = 60.0\n[[upstreams]]\nurl = "{upstream.url}"\n[stores]\nshapes = "file://{shapes_root}/shapes"\n'
        '[tags]\nstyle = "words"\n[models.eye]\nmax_tags = 2\n'
    )
    command = [sys.executable, "-m", "tuna_model.cli", "proxy", "--config", str(config), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        response = httpx.post(f"{address}/chat/completions", json=chat(url_of()), timeout=90, trust_env=False)
        process.terminate()
        assert process.wait(30) in (0, -15)
    assert len(json.loads(response.headers["x-tuna-tags"])) == 2
    assert "Tags that fit this image well" in upstream.last["messages"][0]["content"][1]["text"]
