"""What a miner is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any, Protocol, cast, runtime_checkable

from tagstore.errors import InvalidInput
from tagstore.mining.vocabulary import Rules
from tagstore.types import Pair, Rejected, Tag

GROUP = "tagstore.miners"
"""Entry points of this group are further miners: callables that take their settings by keyword and return a `Miner`."""

SHIPPED = {
    "rules": "tagstore.mining.rules:RuleMiner",
    "metadata": "tagstore.mining.metadata:MetadataMiner",
    "keywords": "tagstore.mining.keywords:KeywordMiner",
    "factual": "tagstore.mining.factual:FactualMiner",
    "none": "tagstore.mining.compose:NoMiner",
}


@runtime_checkable
class Miner(Protocol):
    """Reads pairs, writes tags. `name`, `version` and `settings` identify it: they are stored with every version of a store."""

    name: str
    version: str
    """Changes whenever the output may change."""
    settings: Mapping[str, Any]
    """JSON values, defaults included."""

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """One tuple of tags a pair, in order, read lazily with a bounded look-ahead."""
        ...


def load_miner(spec: str = "rules", **settings: Any) -> Miner:
    """The miner of that name: a shipped one, an entry point of `tagstore.miners`, or several joined by `+` (`rules+metadata`).

    Settings go to the miner; in a composition, to every part that knows them. Raises `InvalidInput` for an unknown miner or setting.
    """
    from tagstore.mining.compose import Composed

    names = [part.strip() for part in spec.split("+")]
    makers = [_maker(name) for name in names]
    accepted = [_parameters(maker) for maker in makers]
    for key in settings:
        if not any(key in keys for keys in accepted):
            every = sorted(set().union(*accepted))
            raise InvalidInput(f"miner '{spec}' has no setting '{key}': it has {', '.join(every) or 'none'}")
    parts = [maker(**{k: v for k, v in settings.items() if k in keys}) for maker, keys in zip(makers, accepted, strict=True)]
    return parts[0] if len(parts) == 1 else Composed(parts)


def identity(miner: Miner, rules: Rules) -> dict[str, Any]:
    """What a version records of how its tags came about: two that are equal give the same tags for the same captions."""
    return {"name": miner.name, "version": miner.version, "settings": dict(miner.settings), "vocabulary": rules.digest}


def mine(captions: Iterable[str], spec: str = "rules", **settings: Any) -> Iterator[tuple[Tag, ...]]:
    """Tags of plain captions, one tuple a caption, in order: `load_miner(spec)` for text that has no image."""
    miner = load_miner(spec, **settings)
    return miner.mine(Pair(key=str(number), image=b"", captions=(caption,)) for number, caption in enumerate(captions))


def refuse(pair: Pair) -> Rejected | None:
    """Why a pair has nothing to mine, or None if it has: no captions, a caption that is no text, or none with a letter or digit in it."""
    for number, caption in enumerate(pair.captions):
        if not isinstance(caption, str):
            return Rejected(pair.key, f"caption {number} is {type(caption).__name__}, not text", pair.origin)
    if not pair.captions:
        return Rejected(pair.key, "no caption", pair.origin)
    if not any(character.isalnum() for caption in pair.captions for character in caption):
        return Rejected(pair.key, "no caption has a letter or a digit", pair.origin)
    return None


def _maker(name: str) -> Callable[..., Miner]:
    if target := SHIPPED.get(name):
        module, attribute = target.split(":")
        return cast(Callable[..., Miner], getattr(import_module(module), attribute))
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in others:
        return cast(Callable[..., Miner], others[name].load())
    raise InvalidInput(f"no miner '{name}': there are {', '.join(sorted({*SHIPPED, *others}))}; join several with '+'")


def _parameters(maker: Callable[..., Miner]) -> frozenset[str]:
    kinds = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return frozenset(p.name for p in signature(maker).parameters.values() if p.kind in kinds)
