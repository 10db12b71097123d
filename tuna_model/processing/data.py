"""What the model is trained and tested on: samples of a data set, read by place and not by copying.

    data.json, data.jsonl     LLaVA's format: {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}
    DIR of .tar, FILE.tar     WebDataset shards: KEY.jpg with KEY.json (conversations as above, or caption, captions, split) or KEY.txt

Only places of images are kept in memory (file, offset, length), so an epoch may be walked in any order at the cost of one read an image,
also inside a tar.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tagstore.errors import InvalidInput, NotFound

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_PROMPT = "Describe the image in one sentence."


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says, without markers of where the image goes: images come first in the first turn of the user."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes in a file: a whole one, or a member of a tar."""

    path: Path
    offset: int = 0
    length: int = -1
    """-1 for all that follows."""

    def read(self) -> bytes:
        """The bytes. Raises `NotFound` where they are not there."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise NotFound(f"cannot read {self.path}: {error.strerror}") from error
        if self.length >= 0 and len(data) < self.length:
            raise NotFound(
                f"{self.path} ends before byte {self.offset + self.length}: it was changed or cut since it was indexed"
            )
        return data


@dataclass(frozen=True, slots=True)
class Sample:
    """An example: images and a conversation, or images and captions from which a conversation is made."""

    key: str
    images: tuple[Place, ...]
    turns: tuple[Turn, ...] = ()
    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def conversation(self, rng: np.random.Generator, prompt: str = CAPTION_PROMPT) -> tuple[Turn, ...]:
        """The turns; of a captioned picture `prompt` and one of its captions, drawn by `rng`."""
        if self.turns:
            return self.turns
        return Turn("user", prompt), Turn("assistant", self.captions[int(rng.integers(len(self.captions)))])

    @property
    def length(self) -> int:
        """Characters of the conversation (of captions the mean): what samples are grouped by."""
        if self.turns:
            return sum(len(turn.text) for turn in self.turns)
        return sum(map(len, self.captions)) // max(1, len(self.captions))


def read_samples(
    path: str | Path, *, images: str | Path | None = None, split: str = "", limit: int = 0
) -> list[Sample]:
    """All samples of a data set, in its own order.

    Args:
        path: see the module.
        images: directory that image paths of a JSON file are relative to; the file's own if not given.
        split: only samples whose `split` is this.
        limit: only the first so many; 0 for all.

    Raises:
        NotFound: nothing there.
        InvalidInput: a record that is no sample, with file and number; or no sample at all.
    """
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            raise NotFound(
                f"{path} holds no .tar: give a directory of WebDataset shards, or a .json or .jsonl file"
            )
    elif not path.exists():
        raise NotFound(f"there is no data set at {path}")
    else:
        shards = [path] if path.suffix == ".tar" else []
    found: Iterator[Sample] = (
        (sample for shard in shards for sample in _read_shard(shard))
        if shards
        else _read_json(path, Path(images) if images is not None else path.parent)
    )
    samples: list[Sample] = []
    for sample in found:
        if split and sample.metadata.get("split") != split:
            continue
        samples.append(sample)
        if len(samples) == limit:
            break
    if not samples:
        raise InvalidInput(f"{path} has no sample" + (f" of split '{split}'" if split else ""))
    return samples


def _read_json(path: Path, images: Path) -> Iterator[Sample]:
    try:
        text = path.read_text(encoding="utf-8")
        records = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is no JSON: {error}") from error
    if not isinstance(records, list):
        raise InvalidInput(f"{path} is a JSON {type(records).__name__}: LLaVA's format is a list of records")
    for number, record in enumerate(records):
        yield _sample(record, f"{path}, record {number}", images, str(number))


def _sample(
    record: Any, where: str, images: Path, key: str, places: tuple[Place, ...] | None = None
) -> Sample:
    """A record as a sample; `places` where the images are not named in the record."""
    if not isinstance(record, dict):
        raise InvalidInput(f"{where}: a sample is an object, not {type(record).__name__}")
    if places is None:
        named: Any = record.get("image", record.get("images", []))
        places = tuple(Place(images / name) for name in ([named] if isinstance(named, str) else named))
    captions = record.get("captions") or ([record["caption"]] if record.get("caption") else [])
    turns = tuple(_turn(turn, where) for turn in record.get("conversations", ()))
    if turns and not any(turn.role == "assistant" for turn in turns):
        raise InvalidInput(
            f"{where}: the conversation has no answer ('from': 'gpt'), so there is nothing to learn from it"
        )
    if not turns and not captions:
        raise InvalidInput(f"{where}: neither conversations nor captions")
    metadata = {
        name: value
        for name, value in record.items()
        if name not in ("conversations", "captions", "caption", "image", "images")
    }
    return Sample(str(record.get("id", record.get("key", key))), places, turns, tuple(captions), metadata)


def _turn(turn: Any, where: str) -> Turn:
    try:
        role, text = _ROLES[turn.get("from", turn.get("role"))], turn.get("value", turn.get("content"))
    except (KeyError, AttributeError) as error:
        raise InvalidInput(
            f"{where}: a turn is {{'from': 'human' or 'gpt', 'value': text}}, not {turn!r}"
        ) from error
    if not isinstance(text, str):
        raise InvalidInput(f"{where}: the text of a turn is {text!r}")
    return Turn(role, text.replace("<image>", "").strip())


def _read_shard(path: Path) -> Iterator[Sample]:
    """Samples of a tar, whose members of one key stand beside each other."""
    try:
        with tarfile.open(path) as tar:
            key, images, record = "", list[Place](), dict[str, Any]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (stem := f"{folder}/{stem}" if folder else stem) != key:
                    if record:
                        yield _sample(record, f"{path}, {key}", path, key, tuple(images))
                    key, images, record = stem, [], {}
                if f".{suffix.lower()}" in _IMAGES:
                    images.append(Place(path, member.offset_data, member.size))
                elif suffix in ("json", "txt"):
                    extracted = tar.extractfile(member)
                    assert extracted is not None  # it is a file
                    text = extracted.read().decode()
                    record = (
                        {"caption": text.strip(), **record}
                        if suffix == "txt"
                        else {**record, **json.loads(text)}
                    )
            if record:
                yield _sample(record, f"{path}, {key}", path, key, tuple(images))
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{path} is no shard of a WebDataset: {error}") from error


def batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int, group: int = 50) -> list[list[int]]:
    """The batches of an epoch as indices: a permutation that depends on `seed` and `epoch` alone, with like lengths together.

    Batches of `group` x `size` shuffled samples are sorted by length before they are cut, so that little is padded; then the batches are
    shuffled. The last samples that make no full batch are left out: they come in other epochs. `group` 0 keeps no lengths together.
    """
    if len(lengths) < size:
        raise InvalidInput(f"a batch of {size} needs at least as many samples, there are {len(lengths)}")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = order[: len(order) // size * size]
    if group:
        by_length = np.asarray(lengths)
        span = group * size
        order = np.concatenate(
            [
                (part := order[i : i + span])[np.argsort(by_length[part], kind="stable")]
                for i in range(0, len(order), span)
            ]
        )
    cut = order.reshape(-1, size)
    if group:
        rng.shuffle(cut)
    return [[int(i) for i in row] for row in cut]
