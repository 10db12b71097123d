"""What a store says about pictures of samples: tags of similar pictures, and of the pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tagstore.client.source import Source
from tagstore.errors import BadImage, InvalidInput
from tagstore.mining import Rules
from tagstore.mining.nouns import singular
from tagstore.preferences.swaps import Candidate
from tagstore.types import Exclude, Retrieval, RetrievedTag

_LEAST_SHARE = 0.001
"""Share of a store's entries that carry a tag which may be put in, at least: rarer ones are often misread."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """The tags around a picture."""

    tags: tuple[Candidate, ...]
    """Of the neighbours, without the picture's own entries."""
    own: frozenset[str]
    """Canonical tags of the picture's own entries: they are true of it."""


def ask(
    source: Source, images: Sequence[bytes], keys: Sequence[str], rules: Rules, entries: int
) -> list[Neighbourhood | None]:
    """Ask the store about pictures; None for one that it cannot decode.

    Args:
        keys: of the samples; an entry of the same key is the picture's own, as are those of its hashes.
        entries: of the store's version.
    """
    try:
        return [*_ask(source, images, keys, rules, entries)]
    except (InvalidInput, BadImage):
        if len(images) == 1:
            return [None]
    return [ask(source, [image], [key], rules, entries)[0] for image, key in zip(images, keys, strict=True)]


def canonical(tag: RetrievedTag, rules: Rules) -> str:
    """The form of a store's tag that equals that of a mined one."""
    text = tag.tag.lower()
    return rules.preferred(tag.kind, text if tag.kind in ("entity", "custom") else singular(text))


def _ask(
    source: Source, images: Sequence[bytes], keys: Sequence[str], rules: Rules, entries: int
) -> list[Neighbourhood]:
    if not images:
        return []
    answers = source.retrieve(images, keys=keys, exclude="self", with_neighbours=True)
    ids = sorted({tag.tag_id for answer in answers for tag in answer})
    counts = {tag.tag_id: tag.count for tag in source.tags(ids)}
    own = _own_tags(source, images, answers)
    return [
        Neighbourhood(
            tuple(
                Candidate(
                    tag.tag,
                    tag.kind,
                    canonical(tag, rules),
                    tag.relevance,
                    # what most of the neighbours carry is likely to be true here too
                    may_be_put_in=tag.votes <= len(answer.neighbours) // 2
                    and counts[tag.tag_id] >= _LEAST_SHARE * entries,
                )
                for tag in answer
            ),
            frozenset(canonical(tag, rules) for tag in tags),
        )
        for answer, tags in zip(answers, own, strict=True)
    ]


def _own_tags(
    source: Source, images: Sequence[bytes], answers: Sequence[Retrieval]
) -> list[list[RetrievedTag]]:
    """The tags of the entries that the leak guard kept out of each answer."""
    own: list[list[RetrievedTag]] = [[] for _ in answers]
    hidden = [number for number, answer in enumerate(answers) if answer.excluded]
    if hidden:
        k = max(answers[number].excluded for number in hidden)
        nearest = source.retrieve(
            [images[number] for number in hidden], exclude=Exclude(), k=k, with_neighbours=True
        )
        for number, answer in zip(hidden, nearest, strict=True):
            others = {neighbour.entry_id for neighbour in answers[number].neighbours}
            own[number] = [tag for tag in answer if not others.issuperset(tag.neighbours)]
    return own
