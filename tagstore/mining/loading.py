"""Load miners by name: the shipped ones, those of other packages, and compositions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any, cast

from tagstore.errors import InvalidInput
from tagstore.mining.compose import Composed
from tagstore.mining.miner import Miner
from tagstore.types import Pair, Tag

GROUP = "tagstore.miners"
"""Entry point group of further miners: callables that take settings by keyword and return a `Miner`."""

SHIPPED = {
    "rules": "tagstore.mining.rules:RuleMiner",
    "metadata": "tagstore.mining.metadata:MetadataMiner",
    "keywords": "tagstore.mining.keywords:KeywordMiner",
    "spacy": "tagstore.mining.spacy_models:SpacyMiner",
    "image": "tagstore.mining.pictures:ImageMiner",
    "factual": "tagstore.mining.factual:FactualMiner",
    "none": "tagstore.mining.compose:NoMiner",
}


def load_miner(spec: str = "rules", **settings: Any) -> Miner:
    """Load a miner: a shipped one, an entry point of `tagstore.miners`, or several joined by `+`.

    What stands behind a colon is the miner's setting `model`: `spacy:de_core_news_sm`. Other settings go to
    the miner; in a composition, to every part that knows them. Raises `InvalidInput` for an unknown miner or
    setting.
    """
    names = [part.strip() for part in spec.split("+")]
    makers = [_maker(name) for name in names]
    accepted = [_parameters(maker) for maker in makers]
    for key in settings:
        if not any(key in keys for keys in accepted):
            every = sorted(set().union(*accepted))
            raise InvalidInput(f"miner '{spec}' has no setting '{key}': it has {', '.join(every) or 'none'}")
    parts = [
        maker(**{k: v for k, v in settings.items() if k in keys})
        for maker, keys in zip(makers, accepted, strict=True)
    ]
    return parts[0] if len(parts) == 1 else Composed(parts)


def mine(captions: Iterable[str], spec: str = "rules", **settings: Any) -> Iterator[tuple[Tag, ...]]:
    """Mine the tags of captions that have no image, one tuple a caption, in order."""
    miner = load_miner(spec, **settings)
    return miner.mine(
        Pair(key=str(number), image=b"", captions=(caption,)) for number, caption in enumerate(captions)
    )


def _maker(name: str) -> Callable[..., Miner]:
    name, colon, model = name.partition(":")
    if colon:
        maker = _maker(name)
        if "model" not in _parameters(maker):
            raise InvalidInput(f"miner '{name}' has no model: leave ':{model}' out")
        return partial(maker, model=model)
    if target := SHIPPED.get(name):
        module, attribute = target.split(":")
        return cast(Callable[..., Miner], getattr(import_module(module), attribute))
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in others:
        return cast(Callable[..., Miner], others[name].load())
    raise InvalidInput(
        f"no miner '{name}': there are {', '.join(sorted({*SHIPPED, *others}))}; join several with '+'"
    )


def _parameters(maker: Callable[..., Miner]) -> frozenset[str]:
    kinds = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return frozenset(p.name for p in signature(maker).parameters.values() if p.kind in kinds)
