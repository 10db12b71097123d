"""Callers that want to harm a server, and a server that lies to its clients."""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import grpc

from benchmarks.serving.malformed_messages import METHODS, REFUSED, STREAMS, fuzz
from tagstore import errors
from tagstore.client import connect

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from scripted import Scripted
from test_client_distrust import LIES

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HUGE_BYTES, HUGE_AT_ONCE = 48 << 20, 4
"""Size of a huge message, and how many are sent at once."""
IDLE_STREAMS, IDLE_SECONDS = 24, 3.0
DEADLINE = 60.0


class Attacks:
    """Attacks on a server; `counts` says how often, `trouble` what they achieved."""

    def __init__(self, address: str, store: str, digest: str, dimension: int, token: str, seed: int) -> None:
        self.address, self.rng, self.token = address, random.Random(seed), token
        self._query = store, digest, dimension
        self.counts: Counter[str] = Counter()
        self.trouble: list[str] = []

    def run(self, seconds: float) -> None:
        attacks: list[Callable[[], None]] = [self.garbage, self.silence, self.huge, self.idle, self.malformed]
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.trouble) < 10:
            for attack in self.rng.sample(attacks, len(attacks)):
                attack()

    def garbage(self) -> None:
        """Random bytes over TCP, with or without the start of HTTP/2; the server closes or is left."""
        for _ in range(20):
            with suppress(OSError), self._connected() as connection:
                connection.sendall(self.rng.choice([b"", PREFACE, b"GET / HTTP/1.1\r\n\r\n"]))
                connection.sendall(self.rng.randbytes(self.rng.choice([1, 9, 1000, 100_000])))
                connection.settimeout(0.2)
                connection.recv(1 << 16)
            self.counts["connections with random bytes"] += 1

    def silence(self) -> None:
        """Connections that send half a beginning and nothing more."""
        with ExitStack() as stack, suppress(OSError):
            for _ in range(50):
                connection = stack.enter_context(self._connected())
                connection.sendall(PREFACE[: self.rng.randrange(len(PREFACE))])
                self.counts["silent connections"] += 1
            time.sleep(IDLE_SECONDS)

    def huge(self) -> None:
        """Huge messages without a token, several at once."""
        data = os.urandom(1 << 20) * (HUGE_BYTES >> 20)
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.address, options) as channel:
            calls = [
                channel.unary_unary(f"/tagstore.v1.{self.rng.choice(list(METHODS))}").future(
                    data, timeout=DEADLINE
                )
                for _ in range(HUGE_AT_ONCE)
            ]
            for call in calls:
                self._refused("a huge message without a token", call.code().name)
                self.counts["huge messages without a token"] += 1

    def idle(self) -> None:
        """Streams of a known caller that send nothing."""
        with grpc.insecure_channel(self.address) as channel:
            calls = []
            for _ in range(IDLE_STREAMS):
                stream = channel.stream_stream(f"/tagstore.v1.{self.rng.choice(STREAMS)}")
                calls.append(stream(_nothing(), timeout=DEADLINE, metadata=self._metadata()))
                self.counts["idle streams"] += 1
            time.sleep(IDLE_SECONDS)
            for call in calls:
                call.cancel()

    def malformed(self) -> None:
        """Damaged messages of a caller who may read."""
        seed = self.rng.randrange(1 << 30)
        try:
            outcomes = fuzz(self.address, *self._query, seconds=3.0, seed=seed, token=self.token)
        except AssertionError as error:
            self.trouble.append(f"damaged messages, seed {seed}: {error}")
            return
        for code in set(outcomes) - {"OK"}:
            self._refused(f"damaged messages, seed {seed}", code)
        self.counts["damaged messages"] += outcomes.total()

    def _refused(self, what: str, code: str) -> None:
        if code not in REFUSED | {"UNAUTHENTICATED", "UNAVAILABLE", "CANCELLED"}:
            self.trouble.append(f"{what}: {code}")

    def _connected(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=5.0)

    def _metadata(self) -> tuple[tuple[str, str]]:
        return (("authorization", f"Bearer {self.token}"),)


def _nothing() -> Iterator[bytes]:
    time.sleep(2 * IDLE_SECONDS)
    yield from ()


def deceive(seconds: float) -> tuple[Counter[str], list[str]]:
    """Ask a server that lies, and one that is silent; gives what became of the lies, and those believed."""
    counts: Counter[str] = Counter()
    trouble: list[str] = []
    end = time.monotonic() + seconds
    server = Scripted()
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        stack.callback(server.stop)
        silent_address = f"127.0.0.1:{silent.getsockname()[1]}"
        while time.monotonic() < end and len(trouble) < 10:
            for name, (lie, _) in LIES.items():
                server.tamper = lie
                _ask(server.address, f"a lie ({name})", errors.BadAnswer, counts, trouble)
                time.sleep(0.1)
            _ask(silent_address, "a server that says nothing", errors.Unavailable, counts, trouble)
    return counts, trouble


def _ask(
    address: str, what: str, expected: type[Exception], counts: Counter[str], trouble: list[str]
) -> None:
    url, images = f"grpc://{address}/m@7?max_tags=1&retries=0&breaker=0&timeout=2", [b"1", b"2", b"3"]
    start = time.monotonic()
    try:
        with closing(connect(url)) as source:
            source.retrieve(images)
        trouble.append(f"{what} was believed")
    except expected:
        counts["lies refused"] += 1
    except Exception as error:  # noqa: BLE001  any other error is a finding
        trouble.append(f"{what}: {error!r}")
    with closing(connect(url, on_failure="empty")) as source:
        answers = source.retrieve(images)
    if [answer.degraded for answer in answers] == [True] * 3:
        counts["lies answered without tags"] += 1
    else:
        trouble.append(f"{what} was believed in part: {answers}")
    if time.monotonic() - start > 20:
        trouble.append(f"{what}: took {time.monotonic() - start:.0f} s")
