"""Benchmarks of a served model: any endpoint of chat completions, bare or behind a proxy."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from tagstore.errors import InvalidInput, Unavailable
from tuna_model.cli import cli
from tuna_model.evaluation import TaskOptions, chat_endpoint, evaluate, load_task
from tuna_model.evaluation.chat_endpoint import ChatEndpoint
from tuna_model.evaluation.endpoint_answerer import EndpointAnswerer


@dataclass
class Server:
    """What an endpoint was asked, and what it answers next."""

    url: str = ""
    models: tuple[str, ...] = ("eye",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    replies: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    """Status, body and headers of the next answers; afterwards every answer is "a red square"."""


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": name} for name in server.models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(body | {"key": self.headers["Authorization"]})
            self.reply(*(server.replies.pop(0) if server.replies else (200, says("a red square"), {})))

        def reply(self, status, fields, headers=None):
            body = json.dumps(fields).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        yield server
        http.shutdown()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    with serving() as started:
        yield started


def says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], **more}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    for name, kind in (("a.png", "PNG"), ("b.bmp", "BMP")):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name, kind)
    data = tmp_path / "questions.jsonl"
    lines = ({"image": name, "text": "What is it?", "name": "red square"} for name in ("a.png", "b.bmp"))
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def test_a_served_model_is_asked_greedily_with_its_pictures(server: Server, questions: Path):
    task = load_task("naming", TaskOptions(questions, resamples=0))
    result = evaluate(task, EndpointAnswerer(ChatEndpoint(server.url, "eye", key="secret")))
    assert result.value("named") == 1.0
    assert result.model["endpoint"] == server.url
    assert "secret" not in str(result)
    for request in server.requests:
        assert (request["model"], request["temperature"], request["key"]) == ("eye", 0, "Bearer secret")
        [turn] = request["messages"]
        picture, text = turn["content"]
        assert text == {"type": "text", "text": "What is it?"}
        head, data = picture["image_url"]["url"].split(",")
        assert head == "data:image/png;base64"  # BMP is not what every engine reads
        assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (255, 0, 0)


def test_without_pictures_only_words_are_sent(server: Server, questions: Path):
    task = load_task("naming", TaskOptions(questions, resamples=0))
    evaluate(task, EndpointAnswerer(ChatEndpoint(server.url, "eye"), pictures=False))
    assert [r["messages"][0]["content"] for r in server.requests] == ["What is it?"] * 2


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (says("a fig", tags=[{"text": "red square", "weight": 1.0}, {"text": "fig"}], degraded=False), {}),
        (says("a fig"), {"X-Tuna-Tags": '["red square", "fig"]'}),
    ],
    ids=["tuna serve's field", "tuna proxy's header"],
)
def test_tags_that_the_model_was_given_are_in_its_answers(server: Server, questions, body, headers):
    server.replies = [(200, body, headers)]
    task = load_task("naming", TaskOptions(questions, resamples=0, limit=1))
    [answer] = EndpointAnswerer(ChatEndpoint(server.url, "eye")).answer(task.questions, max_new_tokens=4)
    assert answer.tags == ("red square", "fig")
    assert not answer.degraded


@pytest.mark.parametrize(
    ("body", "headers"),
    [(says("a fig", degraded=True), {}), (says("a fig"), {"X-Tuna-Degraded": "deadline"})],
)
def test_an_answer_without_the_store_counts_as_degraded(server: Server, questions, body, headers):
    server.replies = [(200, body, headers)]
    task = load_task("naming", TaskOptions(questions, resamples=0, limit=1))
    assert evaluate(task, EndpointAnswerer(ChatEndpoint(server.url, "eye"))).degraded == 1


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(server: Server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(chat_endpoint.time, "sleep", waits.append)
    endpoint = ChatEndpoint(server.url, "eye")
    server.replies = [(429, {}, {"Retry-After": "7"}), (503, {}, {}), (200, says(None), {})]
    assert endpoint.complete("?").text == ""
    assert waits == [7.0, 2.0]
    server.replies = [(400, {"error": {"message": "no eyes"}}, {})]
    with pytest.raises(InvalidInput, match="no eyes"):
        endpoint.complete("?")
    server.replies = [(500, {}, {})] * chat_endpoint.ATTEMPTS
    with pytest.raises(Unavailable, match="500"):
        endpoint.complete("?")
    server.replies = [(200, {"oops": 1}, {})]
    with pytest.raises(Unavailable, match="no chat completion"):
        endpoint.complete("?")


def test_an_endpoint_that_is_gone_is_unavailable():
    with serving() as gone:
        url = gone.url
    with pytest.raises(Unavailable, match="did not answer"):
        ChatEndpoint(url, "eye").complete("?")
    with pytest.raises(InvalidInput, match="http://HOST:PORT/v1"):
        ChatEndpoint("file:///x", "eye")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["eval", "naming", "--resamples", "0", *map(str, arguments)])


def test_eval_takes_the_only_model_that_is_served(server: Server, questions: Path):
    result = run("--data", questions, "--model", server.url, "--json")
    assert result.exit_code == 0, result.output
    assert server.requests[0]["model"] == "eye"
    server.models = ("eye", "ear")
    result = run("--data", questions, "--model", server.url)
    assert result.exit_code == 2
    assert "eye, ear" in result.output
    assert "--served-model" in result.output
    result = run("--data", questions, "--model", server.url, "--served-model", "ear")
    assert result.exit_code == 0, result.output
    assert server.requests[-1]["model"] == "ear"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "http://127.0.0.1:1/v1", "--store", "file:///x"], "tuna proxy"),
        (["--model", "http://127.0.0.1:1/v1", "--dtype", "bf16"], "--dtype"),
        (["--served-model", "eye"], "--served-model"),
        (["--no-pictures"], "--no-pictures"),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused(questions: Path, arguments, says):
    result = run("--data", questions, *arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_an_audit_needs_a_model_of_its_own(questions: Path):
    arguments = ["audit", "naming", "--data", str(questions), "--model", "http://127.0.0.1:1/v1"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "loaded here" in result.output
