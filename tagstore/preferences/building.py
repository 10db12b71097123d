"""Samples and a store to preference pairs, batch by batch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tagstore.client.source import Source
from tagstore.errors import AlreadyExists, InvalidInput, NotFound
from tagstore.mining import Miner, Rules
from tagstore.preferences.neighbours import Neighbourhood, ask
from tagstore.preferences.swaps import swap, words
from tagstore.preferences.table import PreferenceTable, Row
from tagstore.preferences.vocabulary import Spoken
from tagstore.readers.samples import Sample, Turn
from tagstore.types import Pair, Tag

Progress = Callable[[str, int], None]
NO_PAIR: Mapping[str, str] = {
    "pictures": "no picture, or several",
    "image": "a picture that cannot be read",
    "tags": "no tag in any answer",
    "neighbours": "neighbours without tags",
    "fit": "no tag of the neighbours that is surely absent and fits an answer",
}
"""Why samples give no pair, in words."""
_BATCH = 16
"""Samples that the store is asked about at once."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `write_pairs`."""

    path: str
    store: str
    version: int
    samples: int
    pairs: int
    kinds: Mapping[str, int]
    """Pairs by the kind of the tags that were exchanged."""
    without: Mapping[str, int]
    """Samples without a pair, by the reason (`NO_PAIR`)."""


def write_pairs(
    source: Source,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    miner: Miner,
    rules: Rules,
    prompt: str = "Describe the image.",
    seed: int = 0,
    progress: Progress = lambda stage, done: None,
) -> Report:
    """Write a preference pair of each sample that gives one, in the order of the samples.

    The chosen answer is the sample's own, the first in which a tag can be exchanged; the turns before it are
    the prompt. Of a captioned image it is the first caption, and the other captions are known to be true.

    Args:
        source: will be pinned. Its `k` is the number of neighbours whose tags are candidates.
        out: a Parquet file; `OUT.part` until it is complete.
        miner, rules: read the tags of answers, as the store's were read.
        prompt: the question before a caption.
        seed: of the choice among tags that fit; the same seed, samples and version give the same file.

    Raises:
        AlreadyExists: there is a file at `out`.
        InvalidInput: a source that answers without tags when it fails.
        Unavailable: the store is gone.
    """
    out = Path(out)
    if out.exists():
        raise AlreadyExists(f"{out} is there: delete it, or write to another file")
    if source.options.on_failure != "raise":
        raise InvalidInput("pairs need the store's answers: leave on_failure=empty out of the URL")
    pin = source.pin()
    builder = _Builder(source, miner, rules, prompt, seed, source.info().entries)
    part = Path(f"{out}.part")
    with PreferenceTable(part) as table:
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            for row in builder.rows(batch):
                table.add(row)
            progress("samples", len(batch))
    os.replace(part, out)
    kinds, without = dict(sorted(builder.kinds.items())), dict(builder.without)
    return Report(str(out), pin.store, pin.version, len(samples), sum(kinds.values()), kinds, without)


@dataclass(slots=True)
class _Builder:
    """Makes pairs, and counts what became of the samples."""

    source: Source
    miner: Miner
    rules: Rules
    prompt: str
    seed: int
    entries: int
    kinds: Counter[str] = field(default_factory=Counter)
    without: Counter[str] = field(default_factory=Counter)

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        usable = list(self._with_image(samples))
        images, keys = [image for _, image in usable], [sample.key for sample, _ in usable]
        mined = self.miner.mine(Pair(sample.key, b"", self._texts(sample)) for sample, _ in usable)
        around = ask(self.source, images, keys, self.rules, self.entries)
        for (sample, image), tags, neighbourhood in zip(usable, list(mined), around, strict=True):
            row = "image" if neighbourhood is None else self._row(sample, image, tags, neighbourhood)
            if isinstance(row, str):
                self.without[row] += 1
            else:
                self.kinds[row.swap.kind] += 1
                yield row

    def _with_image(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, bytes]]:
        for sample in samples:
            if len(sample.images) != 1:
                self.without["pictures"] += 1
                continue
            try:
                yield sample, sample.images[0].read()
            except (NotFound, InvalidInput):
                self.without["image"] += 1

    def _row(self, sample: Sample, image: bytes, tags: Sequence[Tag], around: Neighbourhood) -> Row | str:
        """A pair, or why there is none; `tags` are those of `_texts`."""
        turns = self._turns(sample)
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        if not any(tag.caption in answers for tag in tags):
            return "tags"
        if not around.tags:
            return "neighbours"
        spoken = self._spoken(sample, tags, around)
        for number in answers:
            mentions = [tag for tag in tags if tag.caption == number]
            seed = f"{self.seed}\n{sample.key}\n{number}"
            exchanged = swap(turns[number].text, mentions, around.tags, spoken, self.rules, seed=seed)
            if exchanged is not None:
                return Row(sample.key, image, turns[:number], turns[number].text, exchanged)
        return "fit"

    def _spoken(self, sample: Sample, tags: Sequence[Tag], around: Neighbourhood) -> Spoken:
        names = around.own | {self.rules.preferred(tag.kind, tag.canonical) for tag in tags}
        for text in (*self._texts(sample), *_objects(sample.metadata)):
            names |= words(text, self.rules)
        return Spoken.of(names)

    def _texts(self, sample: Sample) -> tuple[str, ...]:
        """All that a sample says of its picture: its turns first, then its captions."""
        return tuple(turn.text for turn in self._turns(sample)) + sample.captions

    def _turns(self, sample: Sample) -> tuple[Turn, ...]:
        """The conversation of a sample; of a captioned image the prompt and the first caption."""
        if sample.turns:
            return sample.turns
        return Turn("user", self.prompt), Turn("assistant", sample.captions[0])


def _objects(metadata: Mapping[str, Any]) -> list[str]:
    """What annotators found in a picture, if the record says it in a field `objects`."""
    objects = metadata.get("objects")
    return [name for name in objects if isinstance(name, str)] if isinstance(objects, list) else []
