"""`tuna serve` under attack: one request, however long, broken or abandoned, costs its neighbours nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pictures import COLOURS, picture
from tagstore.client import connect
from tagstore.errors import InvalidInput
from test_serve import Served, body, content, url_of
from tuna_model import presets
from tuna_model.inference.conversations import Reader
from tuna_model.inference.pipeline import Pipeline
from tuna_model.serving import bodies
from tuna_model.serving import worker as working
from tuna_model.serving.chat_messages import RequestLimits
from tuna_model.serving.chat_request import read_request
from tuna_model.serving.refusals import INTERNAL_ERROR
from waiting import wait_until

CHAT = "/v1/chat/completions"


class Controlled(Pipeline):
    """A pipeline that answers without end, fails, or waits, as the test says."""

    endless = False
    broken: Callable[[int], None] = staticmethod(lambda prompts: None)

    def _options(self, options):
        more = {"min_new_tokens": 10**7, "max_new_tokens": 10**7} if self.endless else {}
        return super()._options(options) | more

    def prepare_prompts(self, prompts, **options):
        self.broken(prompts)
        return super().prepare_prompts(prompts, **options)


@pytest.fixture(scope="module")
def tuna(shapes_root: Path) -> Iterator[Controlled]:
    with connect(f"file://{shapes_root}/shapes") as source:
        yield Controlled(*presets.load("tiny", max_tags=3), source)


@pytest.fixture
def served(tuna: Controlled) -> Iterator[tuple[Served, httpx.Client]]:
    server = Served(tuna, wait=0.2, body_seconds=0.3)
    with server as client:
        yield server, client
    tuna.endless, tuna.broken = False, Controlled.broken


def chat(client: httpx.Client, value: dict) -> httpx.Response:
    return client.post(CHAT, json=value)


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["message"]


def raw(client: httpx.Client, value: dict, *, length: int | None = None) -> socket.socket:
    """Send a request over a socket of its own; with `length`, only so many bytes of its body."""
    data = json.dumps(value).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    opened = socket.create_connection((client.base_url.host, client.base_url.port), timeout=120)
    opened.sendall(head.encode() + data[:length])
    return opened


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (body(None, "word " * 160_000), r"800000 characters, and this model reads 131072 at most"),
        (body(None, "w" * 100_000), r"have 10\d{4} tokens and the answer may have 6, .* context holds 2048"),
        (body(None, "w" * 2000, max_tokens=1024), "the answer may have 1024, .* holds 2048"),
        (
            content(*[{"type": "image_url", "image_url": {"url": url_of("red")}}] * 65),
            "65 pictures, .* reads 41",
        ),
        (content(*[{"type": "text", "text": ""}] * 5000), "5001 messages and parts"),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "5000 messages and parts"),
    ],
)
def test_what_the_context_cannot_hold_is_refused_with_the_limit(served, tuna, value: dict, message: str):
    _, client = served
    tuna.broken = lambda prompts: pytest.fail("nothing may be computed")
    status, text = error(chat(client, value))
    assert status == 400
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(text)


def test_pictures_are_counted_before_one_is_decoded():
    def prepare(picture):
        raise AssertionError("decoded")

    parts = [{"type": "image_url", "image_url": {"url": url_of("red")}}] * 3
    with pytest.raises(InvalidInput, match="3 pictures, and this model reads 2"):
        read_request(json.dumps(content(*parts)).encode(), RequestLimits(pictures=2, prepare=prepare))


def test_the_library_refuses_what_the_context_cannot_hold(tuna: Controlled):
    tuna.broken = lambda prompts: pytest.fail("nothing may be computed")
    with pytest.raises(InvalidInput, match="the answer may have 64, but the model's context holds 2048"):
        tuna.answer(None, "w" * 3000)
    with pytest.raises(InvalidInput, match=r"have \d\d tokens and the answer may have 2040"):
        tuna.answer(None, "short enough", max_new_tokens=2040)
    with pytest.raises(InvalidInput, match=r"have \d\d tokens and the answer may have 2040"):
        tuna.prepare([[]], [body(None)["messages"]], new_tokens=2040)
    tuna.broken = Controlled.broken
    with pytest.raises(InvalidInput, match="200 pictures are more than the 41"):
        Reader(tuna.processor, 2048).read(
            [b""] * 200, [{"role": "user", "content": [{"type": "image"}] * 200}]
        )
    with pytest.raises(InvalidInput, match="far more than the model's context"):
        tuna.answer(None, "w " * 100_000)


def test_tags_that_the_context_does_not_hold_are_left_out(tuna: Controlled):
    pixels = picture("red", "circle")
    room = 2048 - tuna.processor.image_tokens - len(tuna.processor.token_ids("Q:  A:")) - 20
    before = tuna.lookup.dropped
    answer = tuna.answer(pixels, "w" * room, max_new_tokens=2)
    assert (answer.tags, answer.degraded) == ((), False)
    assert tuna.lookup.dropped == before + 3


def test_reading_leaves_the_event_loop_to_others(served, monkeypatch):
    """While one request is decoded, others are told how the server is."""
    _, client = served
    started, go, threads = threading.Event(), threading.Event(), []

    def slow(body: bytes, limits: RequestLimits):
        threads.append(threading.current_thread().name)
        started.set()
        assert go.wait(60)
        return read_request(body, limits)

    monkeypatch.setattr(working, "read_request", slow)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, client, body())
        assert started.wait(60)
        assert client.get("/health").json()["answered"] == 0
        go.set()
        assert answer.result().status_code == 200
    assert threads[0].startswith("read")


def test_one_bad_request_fails_alone(served, tuna: Controlled):
    _, client = served
    alone = {colour: chat(client, body(colour)).json()["choices"] for colour in ("red", "blue")}
    bad = body("red", "w" * 3000)
    broken_picture = body("green")
    broken_picture["messages"][0]["content"][0]["image_url"]["url"] = "data:;base64," + "eHh4"
    with ThreadPoolExecutor(4) as pool:
        red, first, second, blue = pool.map(
            lambda value: chat(client, value), [body("red"), bad, broken_picture, body("blue")]
        )
    assert (red.json()["choices"], blue.json()["choices"]) == (alone["red"], alone["blue"])
    assert error(first)[0] == error(second)[0] == 400
    assert "3" in error(first)[1]
    assert "known format" in error(second)[1]


@pytest.mark.parametrize("kind", [InvalidInput, RuntimeError])
def test_a_batch_that_fails_is_answered_one_by_one(tuna: Controlled, kind: type[Exception], monkeypatch):
    """Whatever in a batch of good-looking requests makes the model fail hits nobody else."""
    alone = {
        colour: tuna.answer(picture(colour, "circle"), "What is it?", max_new_tokens=6)
        for colour in COLOURS[:2]
    }
    marked = tuna.reader.read([], body(None, "poison")["messages"]).token_ids
    sizes = []

    def broken(prompts) -> None:
        sizes.append(len(prompts))
        if any(prompt.token_ids == marked for prompt in prompts):
            raise kind("only the poisoned one reads this")

    monkeypatch.setattr(tuna, "broken", broken)
    values = [body(COLOURS[0]), body(None, "poison"), body(COLOURS[1])]
    with Served(tuna, wait=60, batch=3) as client, ThreadPoolExecutor(3) as pool:
        first, poisoned, second = pool.map(lambda value: chat(client, value), values)
    for colour, answer in zip(COLOURS[:2], (first, second), strict=True):
        assert answer.json()["choices"][0]["message"]["content"] == alone[colour].text
    status, message = error(poisoned)
    if kind is InvalidInput:
        assert (status, message) == (400, "only the poisoned one reads this")
    else:
        assert (status, message) == (500, INTERNAL_ERROR)
    assert sorted(sizes) == [1, 1, 1, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_has_gone_stops_its_computation(served, tuna: Controlled, stream: bool):
    server, client = served
    tuna.endless = True
    gone = raw(client, body(stream=stream))
    wait_until(lambda: server.worker.batches == 1)
    gone.close()
    wait_until(lambda: server.worker.answered == 1)
    tuna.endless = False
    assert chat(client, body()).status_code == 200


def test_a_caller_that_has_gone_ends_only_its_own_row_of_a_batch(tuna: Controlled, monkeypatch):
    expected = tuna.answer(picture("blue", "circle"), "What is it?", max_new_tokens=200)
    sizes, entered, go = [], threading.Event(), threading.Event()

    def hold(prompts) -> None:
        sizes.append(len(prompts))
        entered.set()
        assert go.wait(60)

    monkeypatch.setattr(tuna, "broken", hold)
    server = Served(tuna, wait=60, batch=2)
    with server as client, ThreadPoolExecutor(1) as pool:
        gone = raw(client, body("red", max_tokens=200))
        stays = pool.submit(chat, client, body("blue", max_tokens=200))
        assert entered.wait(60)
        gone.close()
        wait_until(lambda: any(job.gone.is_set() for job in server.worker._unfinished))
        go.set()
        answer = stays.result().json()["choices"][0]["message"]["content"]
    assert (answer, sizes) == (expected.text, [2])


def test_a_body_that_does_not_arrive_is_given_up(served):
    _, client = served
    with raw(client, body(), length=20) as half:
        answer = b"".join(iter(lambda: half.recv(4096), b""))  # until the server closes it
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.3 s" in answer


def test_bodies_share_a_bounded_memory(served, monkeypatch):
    _, client = served
    monkeypatch.setattr(bodies, "MAX_BODIES", 1000)
    assert error(chat(client, body(None, "w" * 2000)))[0] == 429
    assert chat(client, body(None)).status_code == 200


def test_pictures_that_wait_are_bounded(tuna: Controlled, monkeypatch):
    monkeypatch.setattr(working, "MAX_WAITING_PICTURES", 2)
    worker = working.Worker(tuna)
    jobs = [worker._read(json.dumps(body()).encode()) for _ in range(3)]
    for job in jobs[:2]:
        worker.submit(job)
    with pytest.raises(working.Overloaded):
        worker.submit(jobs[2])
    for pool in (worker._thread, worker._readers):
        pool.shutdown()


@pytest.mark.slow
def test_sigterm_ends_a_server_within_its_grace():
    """Half-sent bodies and answers without end do not hold a server that was told to stop."""
    command = [sys.executable, "-m", "tuna_model.cli", "serve", "--model", "tiny", "--port", "0"]
    command += ["--grace", "1", "--body-seconds", "3600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with httpx.Client(base_url=address.removesuffix("/v1"), trust_env=False) as client:
                half = raw(client, body(), length=20)
                whole = raw(client, body(max_tokens=1024))
                wait_until(lambda: client.get("/health").json()["batches"] == 1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
            half.close()
            whole.close()
        finally:
            process.kill()
