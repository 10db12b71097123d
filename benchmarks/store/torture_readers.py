"""What the versions of a store must answer, and processes that ask: parts of `benchmarks.store.torture`.

A writer notes each operation in a journal before it begins, and whether it was committed. A version's number
is never used again once it is committed, so the last note of a number says what its version holds.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from tagstore import errors
from tagstore.client import connect
from tagstore.types import Retrieval, Vectors

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import crash

Contents = dict[int, tuple[str, crash.Content]]
"""Encoder and content by version."""
DEADLINE = 60.0
"""Seconds after which an operation or an answer counts as hanging."""
MAX_FINDINGS = 10
"""Things wrong after which a process stops."""
QUERIES = 5
"""Queries to a version of a damaged copy."""
_unit = lru_cache(1 << 16)(crash.unit)


@dataclass
class Findings:
    """What a process did, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    """What was acknowledged and is not there."""
    wrong: list[str] = field(default_factory=list)
    """Answers that are not those of their version, and damage that nobody noticed."""
    hangs: list[str] = field(default_factory=list)

    def enough(self) -> bool:
        return len(self.lost + self.wrong + self.hangs) >= MAX_FINDINGS


class Oracle:
    """What the versions of a store hold, as its journal says."""

    def __init__(self, journal: Path) -> None:
        self._file, self._part = journal.open(), ""
        self.model = crash.Model()
        """What is committed and acknowledged."""
        self.possible = [self.model, self.model]
        """What the store can have held since the last `mark`, oldest first. The last two are what it holds
        without and with the operation in flight."""

    def mark(self) -> None:
        """Forget what the store held before now."""
        self.follow()
        self.possible = self.possible[-2:]

    def follow(self) -> None:
        """Read what was noted meanwhile."""
        while line := self._file.readline():
            self._part += line
            if self._part.endswith("\n"):
                note, self._part = json.loads(self._part), ""
                if "operation" in note:
                    self.possible += [self.model, self.model.after(note)]
                else:
                    self.model = self.possible[-1] if note["committed"] else self.possible[-2]
                    self.possible += [self.model, self.model]

    def version(self, number: int) -> tuple[str, crash.Content] | None:
        """The encoder and the content of a version."""
        holding = (model.versions[number] for model in reversed(self.possible) if number in model.versions)
        return next(holding, None)


def difference(
    answer: Retrieval, query: Vectors, store: str, version: tuple[str, crash.Content] | None, k: int
) -> str:
    """Compare an answer with an exact search over what its version holds; empty if they agree."""
    if version is None:
        return "no such version was ever written"
    space, content = version
    if (answer.store, answer.fingerprint) != (store, crash.SPACES[space].digest):
        return f"it is of {answer.store} and encoder {answer.fingerprint}"
    similarity = {key: min(1.0, float(_unit(space, serial) @ query)) for key, serial in content.items()}
    best = sorted(similarity.values(), reverse=True)[:k]
    keys = [neighbour.key for neighbour in answer.neighbours]
    if len(set(keys)) != len(best) or not similarity.keys() >= set(keys):
        return f"its neighbours are {keys}"
    given = [neighbour.similarity for neighbour in answer.neighbours]
    if not np.allclose(given, best, atol=1e-5) or not np.allclose(
        given, [similarity[key] for key in keys], atol=1e-5
    ):
        return f"its similarities are {given}, not {best}"
    carriers: dict[str, list[float]] = {}
    for key in keys:
        for tag in crash.draft(key, content[key]).tags:
            carriers.setdefault(tag.text, []).append(similarity[key])
    if {tag.tag: tag.votes for tag in answer} != {text: len(values) for text, values in carriers.items()}:
        return f"its tags are {[(tag.tag, tag.votes) for tag in answer]}"
    for tag in answer:
        expected = max(carriers[tag.tag]), float(_unit(space, tag.tag) @ query)
        if not np.allclose((tag.similarity, tag.relevance), expected, atol=1e-5):
            return f"tag {tag.tag} has {tag.similarity}, {tag.relevance}, not {expected}"
    return "" if all(a.votes >= b.votes for a, b in pairwise(answer)) else "its tags are not in order"


def question(rng: random.Random, space: str, content: crash.Content) -> Vectors:
    """A query near an entry."""
    noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(crash.D)
    query = _unit(space, rng.choice(list(content.values()) or [0])) + rng.choice([0.0, 0.3]) * noise
    unit: Vectors = (query / np.linalg.norm(query)).astype(np.float32)
    return unit


def read(place: str, journals: Sequence[Path], seed: int, seconds: float) -> Findings:
    """Query stores, current and old versions of them, and compare each answer with the oracle."""
    findings, rng = Findings(), random.Random(seed)
    oracles = {path.stem: Oracle(path) for path in journals}
    sources = {name: connect(f"{place}/{name}", timeout=DEADLINE) for name in oracles}
    end = time.monotonic() + seconds
    while time.monotonic() < end and not findings.enough():
        name, oracle = rng.choice(list(oracles.items()))
        oracle.mark()
        acknowledged = oracle.model
        if not acknowledged.versions:
            time.sleep(0.05)
            continue
        number = rng.choice([0, 0, *acknowledged.versions])
        space, content = acknowledged.versions[number or acknowledged.current]
        rows, k = np.stack([question(rng, space, content) for _ in range(2)]), rng.randint(1, 8)
        asked = {"vectors": rows, "fingerprint": crash.SPACES[space].digest, "k": k}
        asked["exact"] = rng.random() < 0.3
        what = f"{place}: {name}@{number or ''}, k={k}"
        try:
            if number:
                with closing(connect(f"{place}/{name}@{number}", timeout=DEADLINE)) as source:
                    answers = source.retrieve(**asked)
            else:
                answers = sources[name].retrieve(**asked)
        except errors.Overloaded:
            findings.counts["refused for overload"] += 1
        except errors.TimedOut as error:
            findings.hangs.append(f"{what}: {error}")
        except errors.NotFound as error:
            oracle.follow()
            if number and any(number not in model.versions for model in oracle.possible):
                findings.counts["old versions that compaction or purge had removed"] += 1
            else:
                findings.lost.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
            oracle.follow()
            if isinstance(error, errors.FingerprintMismatch) and not number and _reembedded(oracle, space):
                findings.counts["refused, as the encoder had changed"] += 1
            else:
                findings.wrong.append(f"{what}: {error!r}")
        else:
            oracle.follow()
            version = answers[0].version
            if (version != number) if number else (version < acknowledged.current):
                findings.lost.append(f"{what}: {version} answered, {acknowledged.current} is acknowledged")
            for answer, row in zip(answers, rows, strict=True):
                if problem := difference(answer, row, name, oracle.version(version), k):
                    findings.wrong.append(f"{what}: version {version}: {problem}")
            findings.counts["answers compared, of " + ("old versions" if number else "current versions")] += 2
    return findings


def _reembedded(oracle: Oracle, space: str) -> bool:
    return any(model.content[0] != space for model in oracle.possible)


def answers_of(place: str, store: str, versions: Contents, seed: int) -> list[str]:
    """Ask versions of a store: for each query 'right', 'refused', or what is wrong."""
    outcomes, rng = [], random.Random(seed)
    for number, (space, content) in versions.items():
        with closing(connect(f"{place}/{store}@{number}", timeout=DEADLINE, retries=0)) as source:
            for _ in range(QUERIES):
                query = question(rng, space, content)
                try:
                    asked = {"fingerprint": crash.SPACES[space].digest, "k": 3}
                    [answer] = source.retrieve(vectors=query[None], **asked)
                except errors.TimedOut:
                    outcomes.append("hangs")
                except errors.TagstoreError:
                    outcomes.append("refused")
                except Exception as error:  # noqa: BLE001  a raw error is a finding
                    outcomes.append(repr(error))
                else:
                    problem = difference(answer, query, store, (space, content), 3)
                    outcomes.append(problem or "right")
    return outcomes
