"""OpenAI's chat completions over a real socket."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn

from pictures import picture
from tagstore.errors import InvalidInput, Overloaded
from tuna_model.inference.pipeline import Pipeline
from tuna_model.serving.chat_request import read_request
from tuna_model.serving.server import app
from tuna_model.serving.worker import Job, Worker


def url_of(colour: str, shape: str = "circle") -> str:
    return "data:image/png;base64," + base64.b64encode(picture(colour, shape)).decode()


def body(colour: str | None = "red", text: str = "What is it?", **more) -> dict:
    image = [{"type": "image_url", "image_url": {"url": url_of(colour)}}] if colour else []
    message = {"role": "user", "content": [*image, {"type": "text", "text": text}]}
    return {"model": "tiny", "messages": [message], "max_tokens": 6, **more}


class Served:
    """The application behind a socket on a free port, in a thread."""

    def __init__(self, tuna: Pipeline, *, name: str = "tiny", **options) -> None:
        self.started = threading.Event()
        self.app = app(tuna, name=name, **options)
        self.worker: Worker = self.app.state.worker
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning")

        class Server(uvicorn.Server):
            async def startup(inner, sockets=None) -> None:  # noqa: N805
                await uvicorn.Server.startup(inner, sockets)
                self.started.set()

        self.server = Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> httpx.Client:
        self.thread.start()
        assert self.started.wait(60)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def tuna(shapes_root: Path):
    pipeline = Pipeline.load("tiny", store=f"file://{shapes_root}/shapes", max_tags=3)
    yield pipeline
    pipeline.source.close()


@pytest.fixture(scope="module")
def served(tuna: Pipeline) -> Iterator[tuple[Served, httpx.Client]]:
    server = Served(tuna, wait=0.2)
    with server as client:
        yield server, client


def test_an_answer_comes_with_its_tags(served, tuna: Pipeline):
    _, client = served
    value = client.post("/v1/chat/completions", json=body()).raise_for_status().json()
    expected = tuna.answer(picture("red", "circle"), "What is it?", max_new_tokens=6)
    assert value["object"] == "chat.completion"
    assert value["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert value["choices"][0]["finish_reason"] in ("stop", "length")
    assert [tag["text"] for tag in value["tags"]] == [tag.text for tag in expected.tags]
    assert (value["store"], value["degraded"]) == ("shapes@1", False)
    for tag, expected_tag in zip(value["tags"], expected.tags, strict=True):
        assert tag["vote_share"] == tag["votes"] == expected_tag.vote_share
        assert 0 < tag["vote_share"] <= 1


def test_a_stream_is_the_same_answer_in_pieces(served):
    _, client = served
    whole = client.post("/v1/chat/completions", json=body("blue")).json()
    with client.stream("POST", "/v1/chat/completions", json=body("blue", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["tags"] == whole["tags"]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_requests_that_wait_share_a_batch_and_get_their_own_answers(served):
    server, client = served
    colours = ("red", "green", "blue", "yellow")
    alone = {colour: client.post("/v1/chat/completions", json=body(colour)).json() for colour in colours}
    before = server.worker.batches
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda c: client.post("/v1/chat/completions", json=body(c)).json(), colours)
        together = dict(zip(colours, answers, strict=True))
    assert server.worker.batches - before < 4
    for colour in colours:
        assert together[colour]["choices"] == alone[colour]["choices"]
        texts = [[tag["text"] for tag in answers[colour]["tags"]] for answers in (together, alone)]
        assert texts[0] == texts[1]


def test_words_without_a_picture_and_the_list_of_models(served):
    _, client = served
    value = client.post("/v1/chat/completions", json=body(None)).raise_for_status().json()
    assert (value["tags"], value["store"]) == ([], "")
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").json()["answered"] > 0


def test_a_store_that_is_away_degrades_the_answer(tuna: Pipeline):
    from tagstore.client import connect

    away = Pipeline(tuna.model, tuna.processor, connect("grpc://127.0.0.1:1/none?retries=0"))
    with Served(away) as client:
        value = client.post("/v1/chat/completions", json=body()).raise_for_status().json()
        assert (value["degraded"], value["tags"]) == (True, [])
        assert client.get("/health").json()["degraded"] == 1


def content(*parts: object) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role is 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is 3"),
        (content({"type": "audio"}), r"content\[0\].type is 'audio': it must be 'text' or 'image_url'"),
        (content({"type": "text"}), r"content\[0\] is .* has a field 'text'"),
        (content({"type": "image_url", "image_url": {"url": "http://x/y.png"}}), "are not fetched"),
        (content({"type": "image_url", "image_url": {"url": "data:,%%"}}), "no base64"),
        (content({"type": "image_url", "image_url": {"url": "data:;base64,eHh4"}}), "known format"),
        ({"temperature": 3}, "temperature is 3"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"n": 9}, "n is 9: it must be less than or equal to 8"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(change, message):
    with pytest.raises(InvalidInput, match=message):
        read_request(json.dumps({**body(None), **change}).encode())
    with pytest.raises(InvalidInput, match="no JSON"):
        read_request(b"{")


def test_errors_are_openais(served):
    _, client = served
    answer = client.post("/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/chat/completions").status_code == 405


def test_a_full_queue_turns_requests_away(tuna: Pipeline):
    worker = Worker(tuna, waiting=1)
    request = read_request(json.dumps(body(None)).encode())
    worker.submit(Job(request))
    with pytest.raises(Overloaded):
        worker.submit(Job(request))


def test_sampling_settings_are_taken_over():
    values = {**body(None), "temperature": 0.7, "top_p": 0.9, "stream": True, "seed": 3}
    request = read_request(json.dumps(values).encode())
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    assert request.options == {"max_new_tokens": 6, **sampling}
    assert request.stream
