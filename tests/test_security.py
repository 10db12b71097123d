"""Who may do what; certificates and tokens that change under way; what outsiders see."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tagstore import errors
from tagstore.client import connect
from tagstore.client.admin import administer
from tagstore.serving.access import Access, Caller
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings, checked_host

READER, WRITER = "reader's long token", "writer's long token"


def tokens(path: Path, **names: tuple[str, dict[str, str]]) -> Path:
    path.write_text(
        json.dumps({"callers": [{"name": n, "token": t, "stores": s} for n, (t, s) in names.items()]})
    )
    return path


@pytest.fixture(scope="module")
def secured(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("secured")
    file = tokens(
        folder / "tokens.json", reader=(READER, {"shapes": "read"}), writer=(WRITER, {"other": "ingest"})
    )
    server = Server(
        shapes_root,
        "127.0.0.1:0",
        device="cpu",
        settings=Settings(tokens=str(file), audit=str(folder / "audit.jsonl")),
    )
    server.start()
    yield server, folder
    server.stop(0)


def test_a_token_opens_what_it_is_for_and_nothing_else(secured: tuple[Server, Path]) -> None:
    url = f"grpc://{secured[0].address}/shapes"
    with connect(url, token=READER) as source:
        assert source.info().entries == 18
    with connect(url, retries=0) as source, pytest.raises(errors.NotAuthenticated, match="wants a token"):
        source.info()
    with (
        connect(url, token="a token that nobody has", retries=0) as source,
        pytest.raises(errors.NotAuthenticated, match="not known"),
    ):
        source.info()
    with (
        connect(url, token=WRITER, retries=0) as source,
        pytest.raises(errors.NotPermitted, match="writer may not read store 'shapes'"),
    ):
        source.info()
    with (
        connect(f"grpc://{secured[0].address}/nothing", token=READER, retries=0) as source,
        pytest.raises(errors.NotPermitted) as caught,
    ):
        source.info()
    assert "no store" not in str(caught.value)  # whether there is one is not told


def test_rights_hold_for_what_changes_stores_and_refusals_are_recorded(secured: tuple[Server, Path]) -> None:
    server, folder = secured
    with administer(f"grpc://{server.address}/shapes", token=READER) as admin:
        assert [v.number for v in admin.versions()] == [1]
        for call in (
            lambda: admin.delete(keys=["red-circle"]),
            lambda: admin.rollback(1),
            admin.unload,
            lambda: admin.ingest([]),
        ):
            with pytest.raises(
                errors.NotPermitted, match=r"reader may not (write to|administer) store 'shapes'"
            ):
                call()
    with administer(f"grpc://{server.address}/other", token=WRITER) as admin:
        with pytest.raises(errors.NotFound):
            admin.delete(keys=["x"])
        with pytest.raises(errors.NotPermitted, match="administer"):
            admin.ingest([], encoder="local-dir:/etc")
    events = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert {"Delete", "Rollback", "Unload", "Ingest"} <= {
        e["method"] for e in events if e["event"] == "refused" and e["caller"] == "reader"
    }
    assert [e["store"] for e in events if e["event"] == "failed" and e["method"] == "Delete"] == ["other"]
    assert not any(token in (folder / "audit.jsonl").read_text() for token in (READER, WRITER))


def test_stores_are_listed_for_those_who_may_read_them(secured: tuple[Server, Path]) -> None:
    from tagstore_proto.v1 import tagstore_pb2 as pb
    from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

    with grpc.insecure_channel(secured[0].address) as channel:
        stub = pb_grpc.TagStoreStub(channel)
        for token, names in ((READER, ["shapes"]), (WRITER, [])):
            found = stub.ListStores(
                pb.ListStoresRequest(), metadata=(("authorization", f"Bearer {token}"),)
            ).stores
            assert [info.store for info in found] == names


def test_outsiders_see_health_only(secured: tuple[Server, Path]) -> None:
    from tagstore_proto.v1 import tagstore_pb2 as pb
    from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

    with grpc.insecure_channel(secured[0].address) as channel:
        assert (
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
            == health_pb2.HealthCheckResponse.SERVING
        )
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        stub = pb_grpc.TagStoreStub(channel)
        calls = (
            lambda: stub.Retrieve(pb.RetrieveRequest(store="shapes")),
            lambda: stub.ListStores(pb.ListStoresRequest()),
            lambda: list(stub.RetrieveStream(iter([pb.RetrieveRequest(store="shapes")]))),
            lambda: stub.GetStore(pb.GetStoreRequest(store="shapes"), metadata=(("authorization", READER),)),
        )
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "shapes" not in caught.value.details()


def test_tokens_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tokens(tmp_path / "tokens.json", a=("first long token", {"s": "read"}))
    access = Access(path)
    assert access.caller("Bearer first long token").name == "a"

    def changed(text: str) -> None:
        path.write_text(text)
        os.utime(path, ns=(1, len(text)))  # whatever the clock of the file system, it differs
        access._checked -= 2

    changed(json.dumps({"callers": [{"name": "b", "token": "second long token", "stores": {"s": "admin"}}]}))
    assert access.caller("Bearer second long token").may("admin", "s")
    with pytest.raises(errors.NotAuthenticated):
        access.caller("Bearer first long token")
    changed("{half a fi")
    assert (
        access.caller("Bearer second long token").name == "b"
    )  # a file that is being written does not lock everybody out


def test_callers_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = __import__("hashlib").sha256(b"secret").hexdigest()
    monkeypatch.setenv(
        "TAGSTORE_TOKENS", json.dumps({"callers": [{"name": "e", "sha256": digest, "stores": {"*": "read"}}]})
    )
    assert Access().caller("Bearer secret") == Caller("e", {"*": "read"})
    with pytest.raises(errors.NotAuthenticated):
        Access().caller("")
    assert Access(anonymous="read").caller("").may("read", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no list of callers"),
        ('{"callers": [{"name": "a", "stores": {"s": "read"}}]}', "neither token"),
        ('{"callers": [{"name": "a", "token": "short", "stores": {"s": "read"}}]}', "at least 16"),
        (
            '{"callers": [{"name": "a", "token": "long enough, really", "stores": {"s": "root"}}]}',
            "role 'root'",
        ),
        ('{"callers": [{"name": "a", "tokn": "x", "stores": {"s": "read"}}]}', "unknown key 'tokn'"),
        ('{"callers": [{"name": "a", "sha256": "xx", "stores": {"s": "read"}}]}', "sha256 that is none"),
        ('{"callers": [{"token": "long enough, really", "stores": {"s": "read"}}]}', "needs a name"),
    ],
)
def test_a_file_of_tokens_that_means_nothing_is_refused_at_the_start(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(errors.InvalidInput, match=message):
        Access(path)


def test_roles_include_those_below_and_names_go_before_the_star() -> None:
    caller = Caller("c", {"a": "read", "*": "ingest"})
    assert [caller.may(role, "a") for role in ("read", "ingest", "admin")] == [True, False, False]
    assert [caller.may(role, "b") for role in ("read", "ingest", "admin")] == [True, True, False]
    assert not Caller("nobody").may("read", "a")


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        (Settings(), "encrypt .* nor ask who calls"),
        (Settings(tokens="t"), "does not encrypt"),
        (Settings(tls_certificate="c", tls_key="k"), "does not ask who calls"),
    ],
)
def test_an_address_that_others_can_reach_needs_both_encryption_and_access(
    settings: Settings, lacking: str
) -> None:
    with pytest.raises(errors.InvalidInput, match=lacking):
        checked_host("0.0.0.0:1", settings)
    assert checked_host("127.0.0.1:1", settings) == "127.0.0.1"


def test_both_together_may_be_reached() -> None:
    assert checked_host("0.0.0.0:1", Settings(tls_certificate="c", tls_key="k", tokens="t")) == "0.0.0.0"
    assert (
        checked_host("0.0.0.0:1", Settings(tls_certificate="c", tls_key="k", tls_client_ca="a")) == "0.0.0.0"
    )
    with pytest.raises(errors.InvalidInput, match="both a certificate and its key"):
        checked_host("127.0.0.1:1", Settings(tls_certificate="c"))


class Authority:
    """A certificate authority for a test."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(name, self.key, days=10, authority=True)
        self.path = self._write(f"{name}.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, common_name: str, file: str, *, days: int = 1) -> tuple[str, str]:
        """Paths of a certificate and its key, for localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self._signed(common_name, key, days=days).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._write(f"{file}.crt", pem), self._write(f"{file}.key", private)

    def _signed(
        self, common_name: str, key: ec.EllipticCurvePrivateKey, *, days: int, authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=20))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)


@pytest.fixture(scope="module")
def tls(
    shapes_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Authority, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder, "authority")
    certificate, key = authority.issue("localhost", "server")
    file = folder / "tokens.json"
    file.write_text(
        json.dumps({"callers": [{"name": "operator", "certificate": "operator", "stores": {"*": "admin"}}]})
    )
    settings = Settings(
        tls_certificate=certificate, tls_key=key, tls_client_ca=authority.path, tokens=str(file)
    )
    server = Server(shapes_root, "localhost:0", device="cpu", settings=settings)
    server.start()
    yield server, authority, folder
    server.stop(0)


def test_mutual_tls_says_who_calls(tls: tuple[Server, Authority, Path]) -> None:
    server, authority, _ = tls
    url = f"grpcs://{server.address}/shapes"
    cert, key = authority.issue("operator", "operator")
    with connect(url, ca=authority.path, cert=cert, cert_key=key) as source:
        assert source.info().entries == 18
    with administer(url, ca=authority.path, cert=cert, cert_key=key) as admin, pytest.raises(errors.NotFound):
        admin.delete(keys=["nobody"])
    cert, key = authority.issue("somebody", "somebody")
    with administer(url, ca=authority.path, cert=cert, cert_key=key) as admin:
        assert admin.versions()
        with pytest.raises(errors.NotPermitted, match="certificate 'somebody' may not write"):
            admin.delete(keys=["nobody"])


def test_a_wrong_expired_or_missing_client_certificate_gets_no_connection(
    tls: tuple[Server, Authority, Path],
) -> None:
    server, authority, folder = tls
    url = f"grpcs://{server.address}/shapes"
    stranger = Authority(folder, "stranger")
    for options in (
        {},
        dict(zip(("cert", "cert_key"), authority.issue("operator", "expired", days=-1), strict=True)),
        dict(zip(("cert", "cert_key"), stranger.issue("operator", "forged"), strict=True)),
    ):
        with (
            connect(url, ca=authority.path, retries=0, timeout=5, **options) as source,
            pytest.raises(errors.Unavailable),
        ):
            source.info()
    cert, key = authority.issue("operator", "operator")
    with (
        connect(url, ca=stranger.path, cert=cert, cert_key=key, retries=0, timeout=5) as source,
        pytest.raises(errors.Unavailable),
    ):
        source.info()  # the server is not whom this client trusts
    with (
        connect(f"grpc://{server.address}/shapes", retries=0, timeout=5) as source,
        pytest.raises(errors.Unavailable),
    ):
        source.info()  # not without TLS


def test_a_certificate_is_replaced_without_a_restart(tls: tuple[Server, Authority, Path]) -> None:
    server, authority, folder = tls
    cert, key = authority.issue("operator", "operator")
    url = f"grpcs://{server.address}/shapes"

    def answers() -> bool:
        try:
            with connect(url, ca=authority.path, cert=cert, cert_key=key, retries=0, timeout=5) as source:
                return source.info().entries == 18
        except errors.Unavailable:
            return False

    assert answers()
    good = {name: (folder / name).read_bytes() for name in ("server.crt", "server.key")}
    authority.issue("localhost", "server", days=-1)  # one that has expired
    assert not answers()
    (folder / "server.key").write_bytes(b"half a key")
    assert not answers()  # and a pair that does not fit changes nothing
    for name, data in good.items():
        (folder / name).write_bytes(data)
    assert answers()


def test_certificates_that_do_not_fit_are_refused_at_the_start(shapes_root: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "a")
    certificate, _ = authority.issue("localhost", "one")
    _, key = authority.issue("localhost", "two")
    for settings in (
        Settings(tls_certificate=certificate, tls_key=key),
        Settings(tls_certificate=certificate, tls_key=str(tmp_path / "no")),
    ):
        with pytest.raises(errors.InvalidInput, match="cannot be"):
            Server(shapes_root, "127.0.0.1:0", settings=settings)
