"""Pairs are checked the same way wherever they come from, and what is stored can be exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pictures import ToyEncoder, picture
from tagstore.bundles import export, import_
from tagstore.client.admin import administer
from tagstore.errors import InvalidInput
from tagstore.ingestion import ingest, ingest_pairs
from tagstore.readers.pair_check import MAX_CAPTION_BYTES, MAX_KEY_BYTES, MAX_METADATA_BYTES, checked
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.storage.store import Store
from tagstore.types import Pair, Rejected
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

RED = picture("red", "circle", size=96)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def pair(key: Any = "k", captions: Any = ("a red circle",), metadata: Any = None) -> Pair:
    return Pair(key, RED, captions, {} if metadata is None else metadata, "here")


REFUSED = {
    "an empty key": (pair(key=""), "no key"),
    "a key that is no text": (pair(key=7), "the key is not a text"),
    "a key of half a character": (pair(key="\ud83d"), "not UTF-8"),
    "a key that is too long": (pair(key="k" * 1_000_000), "the key is too long: 1000000 bytes, 4096 is the"),
    "a key with too many bytes": (pair(key="é" * 2049), "the key is too long: 4098 bytes"),
    "no caption": (pair(captions=()), "no caption"),
    "empty captions": (pair(captions=("", " \n")), "no caption"),
    "missing captions": (pair(captions=("nan", "N/A")), "no caption: 'N/A' stands for a missing one"),
    "a caption that is no text": (pair(captions=(5,)), "a caption is not a text"),
    "captions that are too long": (
        pair(captions=("red " * 40_000, "blue" * 40_000)),
        "the captions are too long: 319999 bytes, 262144 is the most",
    ),
    "metadata that is no object": (pair(metadata=[1]), "the metadata is no JSON object"),
    "metadata of 5,000 levels": (pair(metadata=nested(5000)), "nested too deeply"),
    "metadata of 40 levels": (pair(metadata=nested(40)), "nested too deeply"),
    "a number of many digits": (pair(metadata={"a": 10**5000}), "a number is too long"),
    "metadata that is too large": (pair(metadata={"a": "é" * 600_000}), "the metadata is too large: 12000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_that_no_store_can_hold_is_refused_with_its_reason(name: str):
    item, reason = REFUSED[name]
    refused = checked(item)
    assert isinstance(refused, Rejected)
    assert refused.reason.startswith(reason)
    assert len(refused.key) <= MAX_KEY_BYTES
    assert checked(refused) == refused


def test_what_passes_is_plain_and_passes_again():
    metadata = {"a": nan, "b": [inf, -inf, 1.5], "c": date(2026, 1, 2), "\ud83d": "\udc00", "d": b"left out"}
    good = checked(pair(captions=[" a ", "a", "b", None], metadata=metadata))
    assert good == Pair(
        "k", RED, ("a", "b"), {"a": None, "b": [None, None, 1.5], "c": "2026-01-02", "?": "?"}, "here"
    )
    assert checked(good) == good
    largest = pair("k" * MAX_KEY_BYTES, ("c" * MAX_CAPTION_BYTES,), {"a": "m" * (MAX_METADATA_BYTES - 9)})
    assert checked(largest) == largest


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    server = Server(root, "127.0.0.1:0", device="cpu", settings=Settings(anonymous="admin"))
    server.start()
    yield server.address
    server.stop(0)


def raw(address: str, store: str, messages: list[pb.Pair], source: str = "") -> list[Any]:
    """Send pairs as they are, as a client of another language would."""
    start = pb.IngestStart(store=store, encoder="mini", miner="keywords", source=source)
    requests = [pb.IngestRequest(start=start), *(pb.IngestRequest(pair=message) for message in messages)]
    with grpc.insecure_channel(address) as channel:
        responses = list(pb_grpc.AdminStub(channel).Ingest(iter(requests), timeout=120))
    return [result for response in responses for result in response.results]


def test_a_pair_over_the_network_is_checked_like_one_of_a_file(
    root: Path, address: str, tmp_path: Path, mini
):
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    captions = ["a red circle"]
    messages = {
        "good": pb.Pair(key="good", captions=captions, metadata='{"a": 1}'),
        "deep": pb.Pair(key="deep", captions=captions, metadata=deep),
        "nested": pb.Pair(key="nested", captions=captions, metadata=json.dumps(nested(40))),
        "nan": pb.Pair(key="nan", captions=captions, metadata='{"a": NaN, "b": 1e999}'),
        "list": pb.Pair(key="list", captions=captions, metadata="[1]"),
        "none": pb.Pair(key="none"),
        "blank": pb.Pair(key="blank", captions=[""]),
        "": pb.Pair(key="", captions=captions),
        "k" * 1_000_000: pb.Pair(key="k" * 1_000_000, captions=captions),
        "strip": pb.Pair(key="strip", captions=[" a red circle\n", "a red circle"]),
    }
    for message in messages.values():
        message.image = RED
    results = raw(address, "wire", list(messages.values()))
    outcomes = {r.key: (r.outcome == pb.OUTCOME_ADDED, r.reason.split(":")[0]) for r in results}
    assert outcomes == {
        "good": (True, ""),
        "nan": (True, ""),
        "strip": (True, ""),
        "deep": (False, "nested too deeply"),
        "nested": (False, "nested too deeply"),
        "list": (False, "metadata"),
        "none": (False, "no caption"),
        "blank": (False, "no caption"),
        "": (False, "no key"),
        "k" * 4096: (False, "the key is too long"),
    }
    # the same as rows of a file
    rows = [
        {"id": key, "image": "red.png", "caption": list(m.captions), "a": json.loads(m.metadata or "{}")}
        for key, m in messages.items()
        if key not in ("deep", "list")
    ]
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = ingest(str(tmp_path / "rows.jsonl"), root=tmp_path / "root", store="file", encoder=mini)
    refused = {r.reason.split(":")[0] for r in report.quarantined}
    assert refused == {"nested too deeply", "no caption", "no key", "the key is too long"}
    served = {e.key: (e.captions, e.metadata) for e in Store(root, "wire").snapshot().entries()}
    local = {e.key: (e.captions, e.metadata) for e in Store(tmp_path / "root", "file").snapshot().entries()}
    assert served.keys() == local.keys()
    assert {key: captions for key, (captions, _) in served.items()} == {k: c for k, (c, _) in local.items()}
    assert served["nan"][1] == local["nan"][1]["a"] == {"a": None, "b": None}
    assert export(root, "wire", tmp_path / "b").entries == 3


def test_a_source_has_a_name_that_a_manifest_can_hold(address: str):
    with pytest.raises(grpc.RpcError, match="4096 is the most") as caught:
        raw(address, "named", [], source="s" * 5_000_000)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_program_sends_to_a_server_what_it_could_ingest_itself(address: str, root: Path, tmp_path: Path):
    items = [item for item, _ in REFUSED.values()]
    odd = pair("odd", (" a ", "a"), {"when": date(2026, 1, 2), "x": nan})
    with administer(f"grpc://{address}/program") as admin:
        report = admin.ingest([*items, odd], encoder="mini", miner="keywords")
    own = ingest_pairs([*items, odd], root=tmp_path, store="own", encoder="mini", miner="keywords")
    assert (report.added, report.reasons) == (own.added, own.reasons)
    [theirs], [ours] = (
        Store(root, "program").snapshot().entries(),
        Store(tmp_path, "own").snapshot().entries(),
    )
    assert (theirs.key, theirs.captions, theirs.metadata) == (ours.key, ours.captions, ours.metadata)


TEXTS = st.text(st.characters(), max_size=20) | st.text(st.characters(categories=["Cs", "Cc"]), max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.dates(),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(TEXTS, items, max_size=3),
    max_leaves=12,
)
PAIRS = st.builds(
    pair, TEXTS, st.lists(TEXTS, max_size=3).map(tuple), st.dictionaries(TEXTS, JSON, max_size=4)
)


def check_round_trip(items: list[Pair]) -> None:
    with TemporaryDirectory() as folder:
        try:
            report = ingest_pairs(items, root=folder, store="s", encoder=ToyEncoder(), miner="keywords")
        except InvalidInput as refusal:
            assert "can be used" in str(refusal)  # noqa: PT017  nothing was accepted
            assert not any(isinstance(checked(item), Pair) for item in items)
            return
        assert report.pairs == len(items) == report.added + report.unchanged + sum(report.reasons.values())
        export(folder, "s", f"{folder}/bundle")
        import_(folder, f"{folder}/bundle", store="again")
        before, after = Store(folder, "s").snapshot(), Store(folder, "again").snapshot()
        assert list(before.entries()) == list(after.entries())
        ids = before.live()
        np.testing.assert_array_equal(before.vectors(ids), after.vectors(ids))
        assert before.tags(before.vocabulary()) == after.tags(after.vocabulary())
        assert export(folder, "again", f"{folder}/bundle2").files == export(folder, "s", f"{folder}/b").files


@given(st.lists(PAIRS, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_an_ingest_accepts_is_exported_and_imported_as_it_is(items: list[Pair]):
    check_round_trip(items)


def test_the_largest_pairs_that_an_ingest_accepts_are_exported_too():
    largest = pair(
        "\0" * MAX_KEY_BYTES,
        ("\x01" * (MAX_CAPTION_BYTES // 2 - 1) + "a", "\x02 " * (MAX_CAPTION_BYTES // 4 - 1) + "b"),
        {"a": "\x01" * (MAX_METADATA_BYTES // 6 - 99), "deep": nested(32)},
    )
    words = pair("words", ("a " * (MAX_CAPTION_BYTES // 2 - 2) + "cat",))
    assert all(isinstance(checked(item), Pair) for item in (largest, words))
    check_round_trip([largest, words, *(item for item, _ in REFUSED.values())])
