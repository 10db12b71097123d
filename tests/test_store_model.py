"""Any sequence of operations on a store gives the same versions as on a plain dict."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import crash
from tagstore.storage.store import Store
from tagstore.upkeep.edits import diff

KEYS = st.integers(0, 30).map("key-{:05d}".format)


class StoreMachine(RuleBasedStateMachine):
    """The operations of the crash harness, without crashes, in sequences that hypothesis shrinks."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="model-"))
        self.model = crash.Model()
        self.serial = itertools.count(1)
        self.looked = self.model

    def teardown(self) -> None:
        if hasattr(self, "root"):
            crash.look(self.root, close=True)
            shutil.rmtree(self.root)

    def _do(self, operation: crash.Operation) -> None:
        answer = crash.OPERATIONS[operation["operation"]](self.root, operation)
        self.model = self.model.after(operation)
        assert answer["version"] == self.model.current

    @rule(
        batches=st.lists(st.lists(KEYS, min_size=1, max_size=12), min_size=1, max_size=3),
        sync=st.sampled_from(["full", "batch"]),
    )
    def ingest(self, batches: list[list[str]], sync: str) -> None:
        """Insert new keys and replace existing ones; the first of a duplicate key counts."""
        items = [[(key, next(self.serial)) for key in batch] for batch in batches]
        identity = f"source {next(self.serial)}"
        self._do(crash.ingest_of(self.model.content[0], identity, items, sync))

    @precondition(lambda self: self.model.content[1])
    @rule(data=st.data())
    def ingest_the_same_again(self, data: st.DataObject) -> None:
        """Unchanged pairs make no version."""
        space, content = self.model.content
        items = data.draw(st.lists(st.sampled_from(sorted(content.items())), min_size=1, max_size=5))
        self._do(crash.ingest_of(space, "again", [items]))

    @precondition(lambda self: self.model.content[1])
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        keys = st.sampled_from(sorted(self.model.content[1]))
        chosen = data.draw(st.lists(keys, min_size=1, max_size=12, unique=True))
        self._do({"operation": "delete", "keys": chosen})

    @precondition(lambda self: self.model.versions)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        self._do({"operation": "rollback", "to": data.draw(st.sampled_from(sorted(self.model.versions)))})

    @precondition(lambda self: self.model.versions)
    @rule()
    def reembed(self) -> None:
        self._do({"operation": "reembed", "space": "second" if self.model.content[0] == "first" else "first"})

    @precondition(lambda self: self.model.versions)
    @rule(keep=st.sampled_from([None, 1, 2, 3, 100]))
    def compact(self, keep: int | None) -> None:
        self._do({"operation": "compact", "keep": keep})

    @precondition(lambda self: self.model.content[1])
    @rule(data=st.data())
    def purge(self, data: st.DataObject) -> None:
        """A purged key is gone from the current version, and so are the versions that held it."""
        self._do({"operation": "purge", "keys": [data.draw(st.sampled_from(sorted(self.model.content[1])))]})

    @precondition(lambda self: len(self.model.versions) > 1)
    @rule(data=st.data())
    def compare(self, data: st.DataObject) -> None:
        """`diff` equals the difference of two dicts."""
        before, after = (data.draw(st.sampled_from(sorted(self.model.versions))) for _ in range(2))
        (_, old), (_, new) = self.model.versions[before], self.model.versions[after]
        difference = diff(self.root, crash.NAME, before, after)
        assert difference.added == sorted(new.keys() - old.keys())
        assert difference.removed == sorted(old.keys() - new.keys())
        assert {k for k in old.keys() & new.keys() if old[k] != new[k]} <= set(difference.changed)

    @precondition(lambda self: self.model.versions)
    @rule(data=st.data(), key=KEYS)
    def travel(self, data: st.DataObject, key: str) -> None:
        """An old version finds a key as it was then."""
        number = data.draw(st.sampled_from(sorted(self.model.versions)))
        snapshot = Store(self.root, crash.NAME).snapshot(number)
        entry_id = snapshot.find(key)
        expected = self.model.versions[number][1].get(key)
        assert (snapshot.entry(entry_id).perceptual_hash if entry_id is not None else None) == expected

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        """After a change every version is read in full, and `verify` finds nothing."""
        if getattr(self, "model", None) is not getattr(self, "looked", None):
            actual, wrong = crash.look(self.root, close=False)
            assert wrong == []
            assert actual == self.model
            self.looked = self.model


HEALTH = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
StoreMachine.TestCase.settings = settings(max_examples=6, stateful_step_count=20, **HEALTH)
TestStoreMachine = StoreMachine.TestCase


def _in_turn(root: Path, *operations: crash.Operation) -> None:
    model = crash.Model()
    for operation in operations:
        crash.OPERATIONS[operation["operation"]](root, operation)
        model = model.after(operation)
        assert crash.look(root, close=False) == (model, [])


def _ingest(space: str, *items: tuple[str, int]) -> crash.Operation:
    return crash.ingest_of(space, f"{items}", [list(items)])


def test_a_tag_that_only_versions_of_another_encoder_need_keeps_its_embedding_through_compaction(
    tmp_path: Path,
):
    _in_turn(
        tmp_path,
        _ingest("first", ("a", 1), ("b", 2)),
        {"operation": "reembed", "space": "second"},
        {"operation": "delete", "keys": ["a"]},
        {"operation": "compact", "keep": None},
        _ingest("second", ("c", 8)),  # carries "tag 1", as the entry that was deleted did
    )


def test_entries_that_came_with_another_encoder_leave_the_checksums_of_the_first_as_they_are(tmp_path: Path):
    _in_turn(
        tmp_path,
        _ingest("first", ("a", 1), ("b", 2)),
        {"operation": "reembed", "space": "second"},
        _ingest("second", ("c", 3), ("d", 4)),
        {"operation": "rollback", "to": 1},
        {"operation": "delete", "keys": ["a"]},
        _ingest("first", ("e", 5)),
    )
