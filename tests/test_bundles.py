"""A version exported and imported gives the same answers; only a complete, sound bundle is accepted."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import faiss
import numpy as np
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tagstore.bundles import BundleInfo, export, import_, importing, inspect
from tagstore.bundles.archive import MAX_LINE, MAX_WINDOW, ArchiveWriter
from tagstore.client import connect
from tagstore.errors import AlreadyExists, Busy, Damaged, InvalidInput, NotFound, TagstoreError
from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag
from tagstore.storage import checksums
from tagstore.storage.rows import block_key
from tagstore.storage.staging import Draft
from tagstore.storage.store import Store, store_names
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint
from tagstore.upkeep.compact import compact
from tagstore.upkeep.verify import verify

D = 16
FINGERPRINT = Fingerprint("toy", "00", {"size": [8, 8], "mean": [0.1]}, False, True, D)
COLUMNS = {"image": None, "caption": [], "key": None}
SOURCE = {"path": "/data/pictures", "format": None, "columns": COLUMNS, "allow_outside": False}
DOCS = Path(__file__).parent.parent / "docs" / "bundles.md"

Files = dict[str, bytes]


def unit(seed: int, n: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, D), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draft(i: int, tags: list[str]) -> Draft:
    score = 0.4 + i % 3 / 5
    merged = [MergedTag(t, "entity", t.lower(), score, 2, ((0, 2, 2 + len(t)), (-1, 0, 0))) for t in tags]
    digest, captions = sha256(b"%d" % i).digest(), (f"a {tags}", "Ça va 👍")
    metadata = {"n": i, "x": [0.1, None]}
    return Draft(f"k{i}", digest, (i << 48) ^ i, captions, tuple(merged), metadata, f"at {i}")


def put(
    root: Path, drafts: list[Draft], vectors: np.ndarray, ended: range = range(0), source: dict | None = None
) -> None:
    with Writer(root, "toy", FINGERPRINT) as writer:
        writer.delete(list(ended))
        writer.append(drafts, vectors)
        texts = writer.new_tags(limit=1 << 20)
        writer.embed_tags(unit(len(texts), len(texts)))
        writer.commit(operation="ingest", source=source, miner={"name": "none"}, indexer=faiss_index.extend)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store of four versions: ingest, upserts, a deletion that leaves gaps in ids and tags, an addition."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    words = [f"Tag {i}" for i in range(40)]
    tags = [list(rng.choice(words, size=rng.integers(0, 6), replace=False)) for _ in range(900)]
    vectors = unit(0, 900)
    vectors[600:] = vectors[:300]  # equal vectors: their order is decided by id
    put(root, [draft(i, t) for i, t in enumerate([["Only here"], *tags[1:]])], vectors, source=SOURCE)
    upserts = [draft(i, t) for i, t in enumerate(tags[:50], 20)]
    put(root, upserts, vectors[:50], source=SOURCE | {"path": "/data/more"})
    put(root, [], vectors[:0], range(0, 520, 3))
    put(root, [draft(9999, ["Tag 1"])], vectors[:1])
    return root


@pytest.fixture(scope="module")
def bundle(root: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "toy.tagstore"
    export(root, "toy", path, version=3, licence="CC-BY-4.0", note="three of four")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A bundle small enough to be damaged many times in a short time."""
    path = tmp_path_factory.mktemp("small")
    tags = [[f"Tag {i % 7}", f"Tag {7 + i % 5}"][: i % 3] for i in range(60)]
    put(path, [draft(i, t) for i, t in enumerate([["Only here"], *tags[1:]])], unit(0, 60), source=SOURCE)
    put(path, [], unit(0, 0), range(0, 60, 9))
    export(path, "toy", path / "bundle")
    return path / "bundle"


@pytest.fixture(scope="module")
def imported(bundle: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    import_(root, bundle)
    return root


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        write_key(path, name, Ed25519PrivateKey.generate())
    write_key(path, "rsa", generate_private_key(65537, 2048))
    (path / "junk.pem").write_text("no key")
    return path


def write_key(path: Path, name: str, key) -> None:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (path / f"{name}.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (path / f"{name}.pub").write_bytes(public)


def decompress(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def unpacked(bundle: Path) -> Files:
    with tarfile.open(fileobj=io.BytesIO(decompress(bundle.read_bytes()))) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def packed(path: Path, files: Files, change: Callable[[dict], None] = lambda manifest: None) -> Path:
    """Write a bundle of these files, with a manifest that fits them."""
    manifest = json.loads(files["manifest.json"])
    manifest["files"] = {
        n: {"bytes": len(d), "sha256": sha256(d).hexdigest()} for n, d in files.items() if "manifest" not in n
    }
    change(manifest)
    with ArchiveWriter(path) as archive:
        for name, data in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
            archive.put(name, len(data), [data])
    return path


def refused(root: Path, bundle: Path, error: type[Exception], match: str, **options: object) -> None:
    with pytest.raises(error, match=match):
        import_(root, bundle, **options)
    nothing_in(root)


def nothing_in(root: Path) -> None:
    assert store_names(root) == []
    assert [p.name for p in root.rglob("*") if p.name not in (".importing", "writer.lock")] == []


def test_an_imported_store_gives_the_answers_of_the_exported_one(root: Path, imported: Path):
    before, after = Store(root, "toy").snapshot(3), Store(imported, "toy").snapshot()
    queries = np.concatenate([before.vectors(before.live()[::10]), unit(5, 40)])
    with connect(f"file://{root}/toy@3") as ours, connect(f"file://{imported}/toy") as theirs:
        for k in (1, 5, 60):
            query = {"vectors": queries, "fingerprint": FINGERPRINT, "k": k}
            assert ours.retrieve(**query) == theirs.retrieve(**query)
        for a, b in zip(ours.vocabulary(embeddings=True), theirs.vocabulary(embeddings=True), strict=True):
            assert (a.tag_id, a.text, a.kind, a.count) == (b.tag_id, b.text, b.kind, b.count)
            np.testing.assert_array_equal(a.embedding, b.embedding)
    assert list(before.entries()) == list(after.entries())
    ids = before.live()
    np.testing.assert_array_equal(before.vectors(ids), after.vectors(ids))
    same = ["number", "entries", "tags", "unique_tags", "fingerprint", "miner"]
    same += ["next_entry_id", "next_tag_id"]
    assert {n: getattr(before.version, n) for n in same} == {n: getattr(after.version, n) for n in same}
    assert (after.version.operation, after.version.parent) == ("import", 0)
    assert before.tags([0]) == [("Only here", "entity", "only here")]
    with pytest.raises(NotFound, match="no tag 0"):
        after.tags([0])  # no entry of the version carries it: what was deleted is not handed on


def test_the_manifest_says_what_is_in_it_and_where_it_is_from(
    bundle: Path, root: Path, imported: Path, tmp_path: Path
):
    info, version = inspect(bundle), Store(root, "toy").snapshot(3).version
    assert (info.store, info.version) == ("toy", 3)
    assert (info.created, info.entries) == (version.created, version.entries)
    assert (info.licence, info.note) == ("CC-BY-4.0", "three of four")
    assert (info.signer, info.fingerprint) == ("", FINGERPRINT)
    assert [s["path"] for s in info.sources] == ["/data/pictures", "/data/more"]
    again = export(imported, "toy", tmp_path / "again")
    assert again.files == info.files  # the content is the same to the byte
    assert again.sources == info.sources
    [came] = again.bundles
    assert (came["store"], came["version"], came["licence"]) == ("toy", 3, "CC-BY-4.0")
    assert came["manifest_sha256"] == sha256(unpacked(bundle)["manifest.json"]).hexdigest()


def test_the_same_version_gives_the_same_bytes_anywhere(root: Path, bundle: Path, tmp_path: Path):
    env = {**os.environ, "TZ": "Pacific/Auckland", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    options = "version=3, licence='CC-BY-4.0', note='three of four'"
    code = f"from tagstore.bundles import export; print(export({str(root)!r}, 'toy', 'b', {options}).sha256)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    ).stdout
    assert (tmp_path / "b").read_bytes() == bundle.read_bytes()
    assert out.strip() == sha256(bundle.read_bytes()).hexdigest()


def test_the_bytes_of_an_archive_do_not_change_between_releases(tmp_path: Path):
    pieces = [b"%d" % (i * i) for i in range(100_000)]
    with ArchiveWriter(tmp_path / "a") as archive:
        archive.put("one", len(b"".join(pieces)), pieces)
        archive.put("none", 0, [])
    with ArchiveWriter(tmp_path / "b") as archive:
        archive.put("one", len(b"".join(pieces)), [b"".join(pieces)])
        archive.put("none", 0, [])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert archive.sha256 == sha256((tmp_path / "b").read_bytes()).hexdigest()
    assert archive.sha256 == "d78bf197d6887b49e0d9a679116f61970ca4b15fd37f93fb3bba1f5d356bfff3"


def test_an_imported_store_goes_on_like_any_other(bundle: Path, tmp_path: Path):
    version = import_(tmp_path, bundle)
    put(tmp_path, [draft(21, ["Tag 3", "New"])], unit(1, 1))
    after = Store(tmp_path, "toy").snapshot()
    assert (after.version.number, after.version.parent) == (4, 3)
    assert after.find("k21") == version.next_entry_id
    assert after.tags([version.next_tag_id]) == [("New", "entity", "new")]
    assert verify(tmp_path, "toy", full=True) == []


def test_a_version_without_entries_is_one_too(tmp_path: Path):
    put(tmp_path / "a", [draft(0, ["Tag"])], unit(0, 1))
    put(tmp_path / "a", [], unit(0, 0), range(1))
    assert export(tmp_path / "a", "toy", tmp_path / "empty").entries == 0
    version = import_(tmp_path / "new" / "root", tmp_path / "empty", store="other")
    assert store_names(tmp_path / "new" / "root") == ["other"]
    assert (version.number, version.entries, version.next_entry_id, version.next_tag_id) == (2, 0, 1, 1)


def test_the_reader_in_the_documentation_reads_a_bundle(bundle: Path, root: Path):
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    scope: dict = {"path": bundle}
    exec(code, scope)
    snapshot = Store(root, "toy").snapshot(3)
    assert [e["key"] for e in scope["entries"]] == [e.key for e in snapshot.entries()]
    np.testing.assert_array_equal(scope["vectors"], snapshot.vectors(snapshot.live()))
    assert scope["tags"][scope["entries"][9]["tags"][0][0]]["text"] in [
        t for t, _, _ in snapshot.tags(snapshot.vocabulary())
    ]


def test_a_signature_is_checked_where_one_is_demanded(root: Path, bundle: Path, keys: Path, tmp_path: Path):
    signed = tmp_path / "signed"
    info = export(root, "toy", signed, version=3, key=keys / "ours.pem")
    assert info.sha256 == export(root, "toy", tmp_path / "again", version=3, key=keys / "ours.pem").sha256
    assert inspect(signed) == BundleInfo.from_manifest(unpacked(signed)["manifest.json"])
    assert inspect(signed).signer == info.signer != ""
    new = tmp_path / "root"
    new.mkdir()
    refused(new, bundle, InvalidInput, "not signed, and a signature is demanded", key=keys / "ours.pub")
    message = "is signed by [0-9a-f]{64}, the key demanded is"
    refused(new, signed, InvalidInput, message, key=keys / "theirs.pub")
    files = unpacked(signed)
    other = packed(tmp_path / "other", files, lambda m: m.update(licence="CC0-1.0"))
    refused(new, other, Damaged, "the signature is not one of this manifest", key=keys / "ours.pub")
    refused(new, other, Damaged, "the signature is not one of this manifest")
    stripped = packed(tmp_path / "stripped", {n: d for n, d in files.items() if n != "manifest.sig"})
    refused(new, stripped, InvalidInput, "'manifest.sig' should come next, but there is 'tags.jsonl'")
    for bad in ("junk.pem", "rsa.pub", "ours.pem"):
        refused(new, signed, InvalidInput, bad, key=keys / bad)
    for bad in ("junk.pem", "rsa.pem", "ours.pub"):
        with pytest.raises(InvalidInput, match=bad):
            export(root, "toy", tmp_path / "no", key=keys / bad)
    with pytest.raises(NotFound, match=r"cannot read the private key .*nowhere"):
        export(root, "toy", tmp_path / "no", key=keys / "nowhere")
    assert not (tmp_path / "no").exists()
    assert import_(new, signed, key=keys / "ours.pub").number == 3


def test_a_flipped_bit_is_found(small: Path, tmp_path: Path, rng):
    data = small.read_bytes()
    (tmp_path / "root").mkdir()
    anywhere, in_headers = rng.integers(0, len(data), 20), rng.integers(0, 700, 20)
    for offset in [*anywhere.tolist(), *range(12), *in_headers.tolist(), len(data) - 1]:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped").write_bytes(flipped)
        # zstd can encode the same content in several ways, and some bits of its headers mean nothing
        if not same_content(flipped, data):
            refused(tmp_path / "root", tmp_path / "flipped", TagstoreError, "flipped|manifest.json")


def same_content(a: bytes, b: bytes) -> bool:
    try:
        return decompress(a) == decompress(b)
    except zstandard.ZstdError:
        return False


def test_a_bundle_that_was_cut_off_or_added_to_is_refused(small: Path, tmp_path: Path, rng):
    data = small.read_bytes()
    (tmp_path / "root").mkdir()
    for cut in [*range(1, 6), 100, *rng.integers(0, len(data), 10).tolist(), len(data)]:
        (tmp_path / "cut").write_bytes(data[:-cut])
        refused(tmp_path / "root", tmp_path / "cut", Damaged, "cut")
    for more in (b"x", bytes(1000), zstandard.compress(b"."), zstandard.compress(bytes(512)), data):
        (tmp_path / "more").write_bytes(data + more)
        refused(tmp_path / "root", tmp_path / "more", Damaged, "more")
    (tmp_path / "other").write_bytes(b"PK\3\4 a zip")
    refused(tmp_path / "root", tmp_path / "other", Damaged, "cannot be decompressed")
    refused(tmp_path / "root", tmp_path / "nowhere", NotFound, "cannot read the bundle")


def tarred(
    path: Path, members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(zstandard.compress(raw.getvalue()))
    return path


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_only_the_members_of_a_bundle_are_taken_in_their_order(small: Path, tmp_path: Path):
    files = unpacked(small)
    good = [(member(name), data) for name, data in files.items()]
    new = tmp_path / "root"
    new.mkdir()
    names = ("../../escape", "/etc/passwd", "a/../manifest.json", "./manifest.json", "manifest.json\n")
    kinds = (tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
    fields = [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "tags.jsonl"},
        {"type": tarfile.CHRTYPE, "devmajor": 1},
        {"type": tarfile.BLKTYPE, "devmajor": 8},
        *({"type": kind} for kind in kinds),
        *({"mode": 0o4755}, {"mtime": 1}, {"uid": 1000}, {"uname": "root"}),
    ]
    strange = [member(name) for name in names] + [member("manifest.json", **values) for values in fields]
    strange.append(member("n" * 200))
    for i, info in enumerate(strange):
        for position in (0, 1) if i % 5 else (0, len(good)):
            data = files["manifest.json"] if position == 0 and info.isfile() else b""
            members = [*good[:position], (info, data), *good[position if position else 1 :]]
            archive = tarred(tmp_path / "strange", members)
            refused(new, archive, InvalidInput, "should come next|where the archive should end")
    for i in range(len(good)):
        for members in (good[:i] + good[i + 1 :], good[: i + 1] + good[i:]):
            refused(new, tarred(tmp_path / "order", members), TagstoreError, "should come next|should end")
    pax = tarred(tmp_path / "pax", [(member("manifest.json", mtime=0.5), b"{}")], tarfile.PAX_FORMAT)
    refused(new, pax, InvalidInput, "should come")
    refused(new, tarred(tmp_path / "none", []), Damaged, "no header")
    assert not (tmp_path / "escape").exists()


def test_a_bundle_packed_by_another_tar_and_zstd_is_read(bundle: Path, tmp_path: Path):
    other = tarred(tmp_path / "other", [(member(name), data) for name, data in unpacked(bundle).items()])
    assert inspect(other) == inspect(bundle)
    assert other.read_bytes() != bundle.read_bytes()


def lines(change: Callable[[list[dict]], object], name: str = "entries.jsonl") -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        values = [json.loads(line) for line in files[name].splitlines()]
        change(values)
        files[name] = b"".join(json.dumps(value).encode() + b"\n" for value in values)

    return apply


def entry(index: int, **fields: object) -> Callable[[Files], None]:
    """Return a change of fields of one entry."""
    return lines(lambda entries: entries[index].update(fields))


def tag(**fields: object) -> Callable[[Files], None]:
    """Return a change of fields of the second tag."""
    return lines(lambda tags: tags[1].update(fields), "tags.jsonl")


def rows(change: Callable[[np.ndarray], object], name: str = "vectors.f16") -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        array = np.frombuffer(files[name], "<f2").copy()
        change(array)
        files[name] = array.tobytes()

    return apply


def text(old: bytes, new: bytes, name: str = "entries.jsonl") -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new, 1)

    return apply


NO_FIELDS = "line {} does not have the fields"
BAD = {
    "a key twice": (lines(lambda e: e[5].update(key=e[9]["key"])), "is there twice"),
    "ids that descend": (lines(lambda e: e.reverse()), "ids ascend"),
    "an id twice": (lines(lambda e: e[5].update(id=e[4]["id"])), "ids ascend"),
    "an id out of range": (entry(-1, id=10**9), "stay below"),
    "an id that is no number": (entry(0, id=True), NO_FIELDS.format(1)),
    "a fraction as id": (entry(0, id=1.0), NO_FIELDS.format(1)),
    "a tag that is not there": (entry(7, tags=[[0, 9, []]]), "carries a tag"),
    "a tag far off": (entry(7, tags=[[1 << 60, 9, []]]), "carries a tag"),
    "a tag twice": (entry(7, tags=[[3, 9, []], [3, 9, []]]), "carries a tag twice"),
    "a score too high": (entry(7, tags=[[3, 256, []]]), NO_FIELDS.format(8)),
    "a place before the beginning": (entry(7, tags=[[3, 9, [[0, -1, 4]]]]), NO_FIELDS.format(8)),
    "a place that ends before it starts": (
        entry(7, tags=[[3, 9, [[0, 5, 4]]]]),
        "line 8 has a tag that ends before",
    ),
    "captions that are a text": (entry(0, captions="abc"), NO_FIELDS.format(1)),
    "a short hash": (entry(0, sha256="00"), NO_FIELDS.format(1)),
    "a field too many": (entry(0, more=1), NO_FIELDS.format(1)),
    "a field too few": (lines(lambda e: e[0].pop("origin")), NO_FIELDS.format(1)),
    "an entry too few": (lines(lambda e: e.pop()), r"entries.jsonl: there are \d+, manifest.json says"),
    "a count that is wrong": (entry(8, tags=[]), "tags in entries.jsonl: there are"),
    "half a surrogate pair": (text(b'"k', b'"\\ud83d'), "no JSON that can be read"),
    "bytes that are no text": (text(b'"k', b'"\xff'), "no JSON that can be read"),
    "NaN": (text(b"0.1", b"NaN"), "no JSON that can be read"),
    "a number of many digits": (text(b"0.1", b"1" * 5000), "no JSON that can be read"),
    "a deep nest": (text(b"0.1", b"[" * 99999 + b"]" * 99999), "no JSON|too deep"),
    "a nest that is too deep for a walk": (
        text(b"0.1", b"[" * 900 + b"]" * 900),
        "entries.jsonl, line 1 .*more than 128 levels",
    ),
    "a name twice": (text(b'"captions"', b'"key":"k0","captions"'), "line 1 .*'key' is there twice"),
    "a name twice in metadata": (text(b'{"n":1,', b'{"n":1,"n":2,'), "'n' is there twice in one object"),
    "a number that is infinite": (text(b"0.1", b"1e999"), "line 1 .*1e999 is more than a number can hold"),
    "no end of line": (
        lambda f: f.update({"entries.jsonl": f["entries.jsonl"][:-1]}),
        "does not end with the end of a line",
    ),
    "a tag's form twice": (
        lines(lambda t: t[1].update(canonical=t[0]["canonical"]), "tags.jsonl"),
        "is there twice",
    ),
    "an unknown kind": (tag(kind="colour"), "tags.jsonl, " + NO_FIELDS.format(2)),
    "a tag without a form": (tag(canonical=""), "tags.jsonl, " + NO_FIELDS.format(2)),
    "tags that nobody carries": (
        lines(lambda e: [x.update(tags=[]) for x in e]),
        "tags in entries.jsonl: there are 0",
    ),
    "NaN in a vector": (rows(lambda v: v.put(40, np.nan)), "has length nan"),
    "infinity in a vector": (rows(lambda v: v.put(40, np.inf)), "has length inf"),
    "a vector of zeros": (rows(lambda v: v.put(range(D * 3, D * 4), 0)), "has length 0"),
    "an embedding too long": (
        rows(lambda v: v.__imul__(2), "embeddings.f16"),
        "embeddings.f16: the row of id",
    ),
    "half a row": (lambda f: f.update({"vectors.f16": f["vectors.f16"][:-2]}), "rows have"),
}


@pytest.mark.parametrize("fault", BAD)
def test_records_that_no_store_would_write_are_refused(small: Path, tmp_path: Path, fault: str):
    change, message = BAD[fault]
    files = unpacked(small)
    change(files)
    (tmp_path / "root").mkdir()
    refused(tmp_path / "root", packed(tmp_path / "bad", files), InvalidInput, message)


def nested(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "has format 1, this release reads 2"),
        (lambda m: m.update(image_bytes=5), "in a bundle without images"),
        (lambda m: m.update(bundle="other"), "not that of a bundle"),
        (lambda m: m.update(more=1), "unknown field 'more'"),
        (lambda m: m.pop("miner"), "lacks 'miner'"),
        (lambda m: m.update(version=0), "'version' is not what it should be"),
        (lambda m: m.update(version="3"), "'version' is not what it should be"),
        (lambda m: m["fingerprint"].update(dimension=0), "'fingerprint' is not"),
        (lambda m: m["fingerprint"].update(dimension=D * 2), "rows have"),
        (lambda m: m.update(signer="zz"), "'signer' is not"),
        (lambda m: m.update(entries=m["entries"] + 1), "rows have"),
        (lambda m: m.update(next_entry_id=1 << 50), "out of all proportion"),
        (lambda m: m.update(next_tag_id=1 << 50), "out of all proportion"),
        (lambda m: m.update(next_entry_id=1), "out of all proportion"),
        (lambda m: m.update(tags=0), "manifest.json says 0"),
        (lambda m: m["files"]["entries.jsonl"].update(bytes=5), "'entries.jsonl' has .* its manifest says 5"),
        (lambda m: m["files"]["entries.jsonl"].update(bytes=1 << 60), r"needs \d+ bytes in .* are free"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "'files' is not"),
        (lambda m: m.update(store="../up"), "no name for a store"),
        (lambda m: m.update(miner=nested(900)), "manifest.json .*more than 128 levels"),
        (lambda m: m.update(sources=[nested(900)]), "manifest.json .*more than 128 levels"),
        (lambda m: m["fingerprint"].update(preprocess=nested(900)), "manifest.json .*more than 128 levels"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    small: Path, tmp_path: Path, change: Callable, message: str
):
    (tmp_path / "root").mkdir()
    refused(tmp_path / "root", packed(tmp_path / "bad", unpacked(small), change), InvalidInput, message)


def test_content_that_does_not_fit_its_checksum_is_damage_even_if_it_makes_no_sense(
    small: Path, tmp_path: Path
):
    files = unpacked(small)
    (tmp_path / "root").mkdir()
    for name in ("tags.jsonl", "embeddings.f16", "entries.jsonl", "vectors.f16"):

        def wrong(manifest: dict, name: str = name) -> None:
            manifest["files"][name]["sha256"] = "0" * 64

        for content in (files, {**files, name: b"\xff" * len(files[name])}):
            bad = packed(tmp_path / "bad", content, wrong)
            refused(tmp_path / "root", bad, Damaged, f"{name} does not fit the checksum")


def test_json_of_as_many_levels_as_are_allowed_passes_through(small: Path, tmp_path: Path):
    bundle = packed(tmp_path / "deep", unpacked(small), lambda m: m.update(miner=nested(127)))
    import_(tmp_path, bundle)
    assert export(tmp_path, "toy", tmp_path / "again").miner == nested(127)
    assert import_(tmp_path, tmp_path / "again", store="other").miner == nested(127)


@pytest.mark.parametrize("size", [MAX_LINE, MAX_LINE + (1 << 20), MAX_LINE + 1])
def test_a_line_of_more_than_16_mib_is_refused_wherever_its_end_lies(small: Path, tmp_path: Path, size: int):
    files = unpacked(small)
    first, *rest = files["entries.jsonl"].splitlines(keepends=True)
    files["entries.jsonl"] = first.replace(b"{", b"{" + b" " * (size - len(first)), 1)
    files["entries.jsonl"] += b"".join(rest)
    bad = packed(tmp_path / "bad", files)
    if size == MAX_LINE:
        assert import_(tmp_path / "root", bad).number == 2
    else:
        (tmp_path / "root").mkdir()
        refused(tmp_path / "root", bad, InvalidInput, "entries.jsonl has a line of more than 16777216 bytes")


SMALL_ORDER = {
    "zeros": bytes(32),
    "zeros with a sign": bytes(31) + b"\x80",
    "the neutral point": b"\1" + bytes(31),
    "order 2": b"\xec" + b"\xff" * 30 + b"\x7f",
    "order 8": bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    "order 8, the other": bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    "zero, written as the prime": b"\xed" + b"\xff" * 30 + b"\x7f",
}


@pytest.mark.parametrize("name", SMALL_ORDER)
def test_a_key_for_which_anybody_can_sign_is_refused(small: Path, tmp_path: Path, name: str):
    public = SMALL_ORDER[name]
    content = unpacked(small)
    files = {"manifest.json": content.pop("manifest.json"), "manifest.sig": bytes(64), **content}
    forged = packed(tmp_path / "forged", files, lambda m: m.update(signer=public.hex()))
    (tmp_path / "root").mkdir()
    refused(tmp_path / "root", forged, InvalidInput, "belongs to nobody: anybody can sign for it")
    key = Ed25519PublicKey.from_public_bytes(public)
    (tmp_path / "key.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    refused(tmp_path / "root", small, InvalidInput, "belongs to nobody", key=tmp_path / "key.pub")


def test_ids_that_no_record_has_take_no_time(tmp_path: Path, monkeypatch):
    """Rows are hashed where there are some: 2^24 ids of 1,024 dimensions would be 34 GB of zeros."""
    put(tmp_path / "a", [draft(i, [f"Tag {i}"]) for i in range(9)], unit(0, 9))
    export(tmp_path / "a", "toy", tmp_path / "small")
    files = unpacked(tmp_path / "small")
    ids = [0, 1, 254, 255, 999, 1 << 20, (1 << 20) + 1, 1 << 22, (1 << 24) - 10_000]
    lines(lambda e: [x.update(id=i) for x, i in zip(e, ids, strict=True)])(files)
    ends = {"next_entry_id": 1 << 24, "next_tag_id": 1 << 24}
    hashed = []
    checksum = checksums._checksum
    monkeypatch.setattr(checksums, "_checksum", lambda *args: hashed.append(args[1:5]) or checksum(*args))
    import_(tmp_path, packed(tmp_path / "sparse", files, lambda m: m.update(ends)))
    assert sum(end - first for name, _, first, end in hashed if name == "vectors") <= len(ids) * 255
    assert sum(end - first for name, _, first, end in hashed if name == "embeddings") <= 255
    hashed.clear()
    put(tmp_path, [draft(100, ["Tag 3", "New"])], unit(1, 1), range(1))
    compact(tmp_path, "toy")
    put(tmp_path, [], unit(0, 0), range(255, 256))
    put(tmp_path, [draft(101, ["Tag 3", "Newer"])], unit(2, 1))
    assert sum(end - first for name, _, first, end in hashed if name == "vectors") < 20_000
    assert verify(tmp_path, "toy", full=True) == []
    store = Store(tmp_path, "toy")
    assert len(store.versions()) == 5
    with store.env.begin() as txn:
        row = bytes(txn.get(block_key(0, (1 << 20) // 255), db=store.db["vectors"]))
    with Writer(tmp_path, "toy") as writer, writer.env.begin(write=True) as txn:
        txn.put(block_key(0, (1 << 20) // 255), row[:-2] + b"\0\0", db=writer.db["vectors"])
    assert any("vectors" in problem.what for problem in verify(tmp_path, "toy"))


def test_a_bomb_is_refused_in_bounded_memory(small: Path, tmp_path: Path):
    files = unpacked(small)
    root = tmp_path / "root"
    root.mkdir()
    size = 300 << 20

    def bomb(name: str, data: bytes) -> Path:
        manifest = json.loads(files["manifest.json"])
        manifest["files"][name] = {"bytes": size, "sha256": "0" * 64}
        with ArchiveWriter(tmp_path / "bomb") as archive:
            for before in files:
                if before == name:
                    break
                content = json.dumps(manifest).encode() if before == "manifest.json" else files[before]
                archive.put(before, len(content), [content])
            archive.put(name, size, [data * (1 << 20)] * (size >> 20))
        assert (tmp_path / "bomb").stat().st_size < 1 << 20
        return tmp_path / "bomb"

    tracemalloc.start()
    try:
        refused(root, bomb("manifest.json", b" "), InvalidInput, "314572800 bytes, 4194304 is the most")
        refused(root, bomb("tags.jsonl", b" "), Damaged, "does not fit")
        refused(root, bomb("entries.jsonl", b"["), Damaged, "does not fit")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    refused(root, small, InvalidInput, "unpacks to .* 1000 are allowed", max_bytes=1000)
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    (tmp_path / "window").write_bytes(
        zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(os.urandom(1 << 20))
    )
    assert zstandard.get_frame_parameters((tmp_path / "window").read_bytes()).window_size > MAX_WINDOW
    refused(root, tmp_path / "window", Damaged, "too much memory")


def test_an_import_that_is_killed_leaves_nothing_to_see_and_the_next_one_tidies_up(
    bundle: Path, tmp_path: Path, monkeypatch
):
    def killed(seconds: float) -> int:
        child = os.fork()
        if child == 0:
            try:
                faiss.omp_set_num_threads(1)  # threads of the parent's OpenMP are not there after a fork
                # SIGALRM ends the process as SIGKILL does: nothing of Python runs any more
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                import_(tmp_path, bundle)
            finally:
                os._exit(0)
        return os.WTERMSIG(os.waitpid(child, 0)[1])

    # complete except for the last step
    monkeypatch.setattr(importing, "verify", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    for seconds in (0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 60):
        assert killed(seconds) in (signal.SIGALRM, signal.SIGKILL)
        assert store_names(tmp_path) == []
        assert not (tmp_path / "toy").exists()
    assert (tmp_path / ".importing" / "toy" / "CURRENT").exists()
    monkeypatch.undo()
    assert import_(tmp_path, bundle).number == 3
    assert os.listdir(tmp_path / ".importing") == ["writer.lock"]
    with pytest.raises(AlreadyExists, match="there is a store 'toy' already"):
        import_(tmp_path, bundle)
    assert store_names(tmp_path) == ["toy"]


def test_one_import_into_a_root_at_a_time(small: Path, tmp_path: Path):
    (tmp_path / ".importing").mkdir()
    with (tmp_path / ".importing" / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(tmp_path, small, Busy, "another import into")


def test_a_store_that_comes_up_meanwhile_is_kept(small: Path, tmp_path: Path, monkeypatch):
    def other(*_: object, **__: object) -> list:
        (tmp_path / "toy").mkdir()
        (tmp_path / "toy" / "writer.lock").touch()
        return []

    monkeypatch.setattr(importing, "verify", other)
    with pytest.raises(AlreadyExists, match="has come up meanwhile"):
        import_(tmp_path, small)
    assert os.listdir(tmp_path / "toy") == ["writer.lock"]


def test_a_bundle_appears_whole_or_not_at_all(root: Path, bundle: Path, tmp_path: Path, monkeypatch):
    target = tmp_path / "b"
    target.write_text("what was there")
    partial = tmp_path / ".b.partial"
    partial.write_bytes(b"left by an export that was killed" * 100_000)
    with partial.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="being written by another process"):
            export(root, "toy", target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            export(root, "toy", target)
    assert os.listdir(tmp_path) == ["b"]
    assert target.read_text() == "what was there"
    export(root, "toy", target, version=3, licence="CC-BY-4.0", note="three of four")
    assert target.read_bytes() == bundle.read_bytes()
    assert os.listdir(tmp_path) == ["b"]
    for bad, error in ((tmp_path, InvalidInput), (tmp_path / "no" / "b", NotFound)):
        with pytest.raises(error, match=re.escape(str(bad))):
            export(root, "toy", bad)
    with pytest.raises(NotFound, match="no version 9"):
        export(root, "toy", target, version=9)


def test_a_damaged_store_is_not_exported(tmp_path: Path):
    put(tmp_path, [draft(0, ["Tag"])], unit(0, 1))
    with Writer(tmp_path, "toy") as writer, writer.env.begin(write=True) as txn:
        txn.put(block_key(0, 0), unit(1, 1).astype(np.float16).tobytes(), db=writer.db["vectors"])
    with pytest.raises(Damaged, match="vectors 0 to 0 of store 'toy' are not what version 1 committed"):
        export(tmp_path, "toy", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_store_of_very_many_sources_names_the_newest(tmp_path: Path, monkeypatch):
    for i in range(5):
        put(tmp_path, [draft(i, ["Tag"])], unit(i, 1), source={"stream": f"{i}" * 100})
    monkeypatch.setattr("tagstore.bundles.exporting.MAX_ORIGINS_BYTES", 250)
    info = export(tmp_path, "toy", tmp_path / "b")
    assert info.sources == [{"stream": "3" * 100}, {"stream": "4" * 100}]
    assert import_(tmp_path, tmp_path / "b", store="again").entries == 5


def test_what_json_cannot_hold_is_named(tmp_path: Path):
    put(tmp_path, [Draft("odd", bytes(32), 0, ("c",), metadata={"x": float("nan")})], unit(0, 1))
    with pytest.raises(InvalidInput, match=r"entry 0 \(odd\) holds what JSON cannot"):
        export(tmp_path, "toy", tmp_path / "b")
