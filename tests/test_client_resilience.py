"""Servers that refuse, stall, die and come back: what the client does about it, and what it says."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import accumulate, repeat
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scripted import Behaviour, Scripted, fails
from tagstore import errors
from tagstore.client import aio, channels, connect
from tagstore.client.options import Options
from tagstore.client.resilience import Attempts, Balancer, Breaker
from waiting import wait_until

CODE = grpc.StatusCode
StartServer = Callable[..., Scripted]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    servers: list[Scripted] = []

    def start(*script: Behaviour, name: str = "one") -> Scripted:
        servers.append(Scripted(name, *script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


async def both(url: str, images: list[bytes], **options):
    """Ask with the blocking and the asyncio client. Returns answers or errors of each, and their counts."""
    with connect(url, **options) as source:
        try:
            blocking = source.retrieve(images)
        except errors.TagstoreError as error:
            blocking = error
        first = source.stats()
    async with aio.connect(url, **options) as source:
        try:
            awaited = await source.retrieve(images)
        except errors.TagstoreError as error:
            awaited = error
        return blocking, awaited, first, source.stats()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_circuit_opens_probes_once_and_closes():
    clock = Clock()
    breaker = Breaker(2, 10, clock)
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert (breaker.state, breaker.allows()) == ("open", False)
    clock.now += 13
    assert breaker.state == "half-open"
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.failed()
    assert not breaker.allows()
    clock.now += 13
    assert breaker.allows()
    # nobody heard of that probe again: another may try
    clock.now += 11
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert all(breaker.allows() for _ in range(3))


def test_waits_grow_are_jittered_and_end_within_the_deadline():
    clock = Clock()
    options = Options(timeout=10, retries=8, breaker=0)
    waits = []
    attempts = Attempts(Balancer(["a:1"], options), clock)

    def fail(attempt):
        clock.now += 0.3
        following = attempts.failed(attempt, errors.Unavailable("gone"))
        waits.append(following.wait)
        clock.now += following.wait
        assert clock.now + following.timeout <= 110 + 1e-9
        return following

    attempt = attempts.next()
    with pytest.raises(errors.Unavailable, match=r"gone \(\d tries in .* s, 10 s allowed\)"):
        deque(accumulate(repeat(attempt, 20), lambda last, _: fail(last)), maxlen=0)
    assert all(0.05 * 2**i <= wait <= 0.1 * 2**i for i, wait in enumerate(waits[:4]))
    assert max(waits) <= 2


def test_a_silent_address_costs_its_share_of_the_time_and_work_goes_to_the_idle_one():
    balancer = Balancer(["a:1", "b:1", "c:1"], Options(timeout=9))
    attempts = Attempts(balancer, Clock())
    assert attempts.next().timeout == pytest.approx(3)
    assert len({balancer.pick().address for _ in range(2)} | {attempts.next().endpoint.address}) == 3


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.CANCELLED])
async def test_what_another_try_may_mend_is_tried_again(start_server: StartServer, code):
    server = start_server(fails(code), fails(code))
    blocking, _, stats, _ = await both(f"grpc://{server.address}/s", [b"1"])
    assert blocking[0][0].tag == "one"
    assert (stats.requests, stats.retries, stats.failures, stats.queries, stats.excluded) == (3, 2, 2, 1, 2)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (CODE.INVALID_ARGUMENT, errors.InvalidInput),
        (CODE.NOT_FOUND, errors.NotFound),
        (CODE.FAILED_PRECONDITION, errors.FingerprintMismatch),
        (CODE.UNAUTHENTICATED, errors.NotAuthenticated),
        (CODE.PERMISSION_DENIED, errors.NotPermitted),
    ],
)
async def test_what_the_caller_did_wrong_is_raised_at_once_in_any_mode(start_server: StartServer, code, kind):
    server = start_server(*[fails(code)] * 4)
    for mode in ("raise", "empty"):
        blocking, awaited, stats, _ = await both(f"grpc://{server.address}/s?on_failure={mode}", [b"1"])
        assert type(blocking) is type(awaited) is kind
        assert "as the test says" in str(blocking)
        assert stats.requests == 1
    assert server.calls == 4


async def test_a_server_with_too_much_to_do_is_asked_again_when_it_says(start_server: StartServer):
    server = start_server(fails(CODE.RESOURCE_EXHAUSTED, retry_after_ms=120))
    start = time.monotonic()
    with connect(f"grpc://{server.address}/s") as source:
        assert source.retrieve([b"1"])[0][0].tag == "one"
    assert time.monotonic() - start >= 0.12
    # a server, or a proxy before it, that does not say when is overloaded all the same
    server.script = [fails(CODE.RESOURCE_EXHAUSTED)] * 4
    blocking, awaited, _, _ = await both(f"grpc://{server.address}/s?retries=0", [b"1"])
    assert type(blocking) is type(awaited) is errors.Overloaded
    degraded, _, _, _ = await both(f"grpc://{server.address}/s?retries=0&on_failure=empty", [b"1"])
    assert degraded[0].degraded
    # a wait beyond the deadline is not begun
    other = start_server(*[fails(CODE.RESOURCE_EXHAUSTED, retry_after_ms=600_000)] * 4)
    start = time.monotonic()
    blocking, awaited, _, _ = await both(f"grpc://{other.address}/s?timeout=60", [b"1"])
    assert type(blocking) is type(awaited) is errors.Overloaded
    degraded, _, stats, _ = await both(f"grpc://{other.address}/s?timeout=60&on_failure=empty", [b"1", b"2"])
    assert [list(a) for a in degraded] == [[], []]
    assert (stats.degraded, stats.queries) == (2, 2)
    assert time.monotonic() - start < 60


async def test_a_server_that_does_not_answer_ends_with_the_deadline_and_is_named(start_server: StartServer):
    server = start_server()
    server.script = [server.stalls] * 8
    blocking, awaited, _, _ = await both(f"grpc://{server.address}/s?timeout=0.2", [b"1"])
    for error in (blocking, awaited):
        assert type(error) is errors.Unavailable
        assert server.address in str(error)
        assert "0.2 s" in str(error)
    blocking, awaited, stats, _ = await both(
        f"grpc://{server.address}/s?timeout=0.2&on_failure=empty", [b"1"]
    )
    assert blocking == awaited
    assert (blocking[0].degraded, blocking[0].version, len(blocking[0]), stats.degraded) == (True, 0, 0, 1)
    with connect(f"grpc://{server.address}/s?timeout=0.2") as source:  # a single call may say so as well
        assert source.retrieve([b"1"], on_failure="empty")[0].degraded
        assert server.address in source.stats().last_error


class Relay:
    """Relay connections to a server; `vanish` makes the open ones silent, as if the machine were gone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._silent = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._held: list[socket.socket] = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def vanish(self) -> None:
        """What is connected gets nothing through any more; new connections do."""
        self._silent.set()
        self._silent = threading.Event()

    def close(self) -> None:
        self._silent.set()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(("127.0.0.1", self._port))
                self.connections += 1
                self._held += ours, theirs
                for ends in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._pass, args=(*ends, self._silent), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, silent: threading.Event) -> None:
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and not silent.is_set():
                target.sendall(data)
        if not silent.is_set():
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)


def test_a_machine_that_vanishes_is_noticed_and_connected_to_again(start_server: StartServer, monkeypatch):
    monkeypatch.setattr(channels, "KEEPALIVE_SECONDS", 0.2)
    monkeypatch.setattr(channels, "KEEPALIVE_TIMEOUT", 1.0)
    server = start_server()
    relay = Relay(server.port)
    with connect(f"grpc://{relay.address}/s", timeout=5, retries=0, breaker=1000) as source:
        assert source.retrieve([b"image"])
        relay.vanish()
        end = time.monotonic() + 60
        failed = 0
        while time.monotonic() < end:
            try:
                assert source.retrieve([b"image"])
                break
            except errors.Unavailable:
                failed += 1
        assert failed
        assert relay.connections == 2
        assert source.retrieve([b"image"])
    relay.close()


async def test_the_other_address_answers_when_one_is_gone(start_server: StartServer):
    server, other = start_server(name="one"), start_server(name="two")
    server.stop()
    url = f"grpc://{server.address},{other.address}/s"
    with connect(url) as source:
        assert [source.retrieve([b"1"])[0][0].tag for _ in range(20)] == ["two"] * 20
        states = source.stats().addresses
        assert (states[server.address], states[other.address]) == ("open", "closed")
    async with aio.connect(url) as source:
        assert [(await source.retrieve([b"1"]))[0][0].tag for _ in range(20)] == ["two"] * 20


def test_addresses_share_the_work(start_server: StartServer):
    server, other = start_server(name="one"), start_server(name="two")
    with connect(f"grpc://{server.address},{other.address}/s") as source:
        for _ in range(20):
            source.retrieve([b"1"])
    assert server.calls == other.calls == 10


async def test_a_slow_address_is_hedged(start_server: StartServer):
    slow, fast = start_server(name="slow"), start_server(name="fast")
    slow.script = [slow.stalls] * 50
    url = f"grpc://{slow.address},{fast.address}/s?hedge=0.05&timeout=20"
    start = time.monotonic()
    with connect(url) as source:
        assert {source.retrieve([b"1"])[0][0].tag for _ in range(4)} == {"fast"}
        assert source.stats().hedges >= 1
        slow.released.set()
    slow.released.clear()
    async with aio.connect(url) as source:
        assert {(await source.retrieve([b"1"]))[0][0].tag for _ in range(4)} == {"fast"}
        assert source.stats().hedges >= 1
    assert time.monotonic() - start < 20


def test_a_hedge_survives_an_address_that_fails(start_server: StartServer):
    slow, bad = start_server(name="slow"), start_server(*[fails(CODE.UNAVAILABLE)] * 50, name="bad")
    slow.script = [slow.stalls]
    with connect(f"grpc://{slow.address},{bad.address}/s?hedge=0.05&timeout=20") as source:
        letting_go = threading.Timer(0.3, slow.released.set)
        letting_go.start()
        assert {source.retrieve([b"1"])[0][0].tag for _ in range(3)} == {"slow"}
        letting_go.join()


def test_a_server_that_dies_and_comes_back_costs_exactly_the_samples_in_between(
    start_server: StartServer, caplog
):
    server = start_server()
    with (
        connect(
            f"grpc://{server.address}/s?on_failure=empty&timeout=2&retries=1&breaker=2&cooldown=0.2"
        ) as source,
        caplog.at_level(logging.WARNING),
    ):
        before = [source.retrieve([b"1", b"2"]) for _ in range(3)]
        server.stop()
        during = [source.retrieve([b"1", b"2"]) for _ in range(20)]
        assert source.stats().addresses[server.address] in ("open", "half-open")
        sent = source.stats().requests
        server.released.clear()
        server.start()
        after: list = []

        def answered() -> bool:
            after.append(source.retrieve([b"1", b"2"]))
            return not after[-1][0].degraded

        wait_until(answered)
        after += [source.retrieve([b"1", b"2"]) for _ in range(3)]
        answers = [a for call in before + during + after for a in call]
        stats = source.stats()
    assert all(a.degraded for call in during for a in call)
    assert not any(a.degraded for call in before + after[-4:] for a in call)
    assert stats.degraded == sum(a.degraded for a in answers)
    assert stats.queries == len(answers)
    assert sent < 20  # an open circuit isn't knocked at
    assert stats.skipped > 0
    assert len([r for r in caplog.records if "gives no tags" in r.message]) == 1  # once a minute
    with connect(f"grpc://{server.address}/s?timeout=1") as source:
        server.stop()
        with pytest.raises(errors.Unavailable, match=f"{server.address}.*1 s allowed"):
            source.retrieve([b"1"])


def test_embeddings_come_with_the_answers_if_asked_for(start_server: StartServer):
    server = start_server()
    with connect(f"grpc://{server.address}/s?preload=true&on_failure=empty&retries=0") as source:
        [answer] = source.retrieve([b"1"])
        server.stop()
        [tag] = source.tags([t.tag_id for t in answer], embeddings=True)
        assert tag.embedding.tolist() == [1.0]
        assert not tag.embedding.flags.writeable
        assert (source.stats().embedding_hits, source.stats().embedding_misses) == (1, 1)
        server.released.clear()
        server.script = [lambda context: None, fails(CODE.UNAVAILABLE)]
        server.start()
        # an answer whose embeddings could not be fetched is no answer that a model can use
        fresh = connect(f"grpc://{server.address}/s?preload=true&on_failure=empty&retries=0")
        assert fresh.retrieve([b"1"])[0].degraded
        fresh.close()


def test_a_token_is_sent_and_never_to_strangers_from_the_environment(start_server: StartServer, monkeypatch):
    server = start_server()
    with connect(f"grpc://{server.address}/s", token="given") as source:
        source.retrieve([b"1"])
    monkeypatch.setenv("TAGSTORE_TOKEN", "of the environment")
    with connect(f"grpc://{server.address}/s") as source:
        source.retrieve([b"1"])
    assert [m.get("authorization") for m in server.metadata] == ["Bearer given", "Bearer of the environment"]
    assert connect("grpcs://example.org:1/s").backend.channels.metadata
    assert not connect("grpc://example.org:1/s").backend.channels.metadata


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, str]:
    """An authority, and what it signed for the server `store.test` and for a client: paths of PEM files."""
    folder = tmp_path_factory.mktemp("certificates")
    now = datetime.now(UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def signed(
        subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey
    ) -> bytes:
        builder = x509.CertificateBuilder(
            name(issuer), name(subject), key.public_key(), x509.random_serial_number()
        )
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        builder = builder.add_extension(
            x509.BasicConstraints(ca=subject == "authority", path_length=None), critical=True
        )
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    keys = {
        owner: ec.generate_private_key(ec.SECP256R1()) for owner in ("authority", "store.test", "trainer")
    }
    paths = {}
    for owner, key in keys.items():
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        for suffix, data in (("key", pem), ("pem", signed(owner, "authority", key, keys["authority"]))):
            paths[f"{owner}.{suffix}"] = str(folder / f"{owner}.{suffix}")
            (folder / f"{owner}.{suffix}").write_bytes(data)
    return paths


async def test_tls_with_certificates_of_both_sides(certificates: dict[str, str]):
    read = {file: Path(path).read_bytes() for file, path in certificates.items()}
    server = Scripted("one", tls=((read["store.test.key"], read["store.test.pem"]), read["authority.pem"]))
    url = f"grpcs://{server.address}/s?timeout=5&retries=0"
    both_sides = {
        "ca": certificates["authority.pem"],
        "cert": certificates["trainer.pem"],
        "cert_key": certificates["trainer.key"],
        "server_name": "store.test",
    }
    try:
        blocking, awaited, _, _ = await both(url, [b"1"], **both_sides, token="secret")
        assert blocking[0][0].tag == awaited[0][0].tag == "one"
        assert server.metadata[0]["authorization"] == "Bearer secret"
        for missing in ("ca", "server_name"):
            error, _, _, _ = await both(url, [b"1"], **{k: v for k, v in both_sides.items() if k != missing})
            assert type(error) is errors.Unavailable
            assert server.address in str(error)
    finally:
        server.stop()
    for options, message in (
        ({"cert": "a"}, "both cert and cert_key"),
        ({"ca": "/nowhere"}, "option ca: cannot read /nowhere"),
    ):
        with pytest.raises(errors.TagstoreError, match=message), connect(url, **options) as source:
            source.info()
    with pytest.raises(errors.InvalidInput, match="write grpcs://"):
        connect("grpc://a:1/s", ca="x")
