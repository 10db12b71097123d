"""The FACTUAL scene graph parser (Li et al., Findings of ACL 2023) as a miner.

A Flan-T5 writes the scene graph of a caption:

    "2 beautiful pigs are flying on the sky" -> "( pigs , is , 2 ) , ( pigs , is , beautiful ) , ( pigs , fly
    on , sky )"

The model is loaded from a hub or from a local directory; it runs on a GPU if there is one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tagstore.errors import InvalidInput, MissingExtra, NotFound
from tagstore.mining.nouns import NUMERALS, singular
from tagstore.mining.text import Clean, clean
from tagstore.types import Pair, Tag

PROMPT = "Generate Scene Graph: "
SOURCE = 0.9
"""Score of a tag whose words stand in the caption."""
UNPLACED = 0.5
"""Score of a tag whose words don't: the model probably made it up."""

_FACT = re.compile(r"\(([^()]*)\)")
_MARKS = re.compile(r"\b(?:p?v:|:\d+)|:\d+")  # verb, passive and node marks of the model's longer output form
_log = logging.getLogger(__name__)


class FactualMiner:
    """Objects, attributes and (if asked for) relations from a generated scene graph.

    `model`: name on a hub or a local directory. `device`: "auto", "cpu", "cuda". `batch_size`: captions
    generated together. `beams`: width of the beam search. `max_chars`: characters read of a caption;
    `max_tokens`: tokens written for it. Raises `NotFound` if the model cannot be loaded.
    """

    name = "factual"
    version = "1"

    def __init__(
        self,
        *,
        model: str = "lizhuang144/flan-t5-base-VG-factual-sg",
        device: str = "auto",
        batch_size: int = 64,
        beams: int = 1,
        max_chars: int = 400,
        max_tokens: int = 128,
        relations: bool = False,
    ) -> None:
        if min(batch_size, beams, max_chars, max_tokens) < 1:
            raise InvalidInput("batch_size, beams, max_chars and max_tokens are at least 1")
        self._model_name, self._device, self._batch = model, device, batch_size
        self._beams, self._max_chars, self._max_tokens, self._relations = (
            beams,
            max_chars,
            max_tokens,
            relations,
        )
        self._loaded: tuple[Any, Any, str] | None = None
        self.settings: Mapping[str, Any] = {
            "beams": beams,
            "max_chars": max_chars,
            "max_tokens": max_tokens,
            "model": model,
            "relations": relations,
        }

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair; reads ahead until a batch of captions is together."""
        block: list[Pair] = []
        captions = 0
        for pair in pairs:
            block.append(pair)
            captions += max(1, len(pair.captions))
            if captions >= self._batch:
                yield from self._block(block)
                block, captions = [], 0
        yield from self._block(block)

    def _block(self, block: list[Pair]) -> Iterator[tuple[Tag, ...]]:
        texts = {c: clean(c, self._max_chars) for pair in block for c in pair.captions if isinstance(c, str)}
        parsable = [c for c, cleaned in texts.items() if any(x.isalpha() for x in cleaned.text)]
        graphs: dict[str, str] = {}
        for i in range(0, len(parsable), self._batch):
            part = parsable[i : i + self._batch]
            graphs.update(zip(part, self._generate([texts[c].text for c in part]), strict=True))
        for pair in block:
            yield tuple(
                tag
                for number, c in enumerate(pair.captions)
                if c in graphs
                for tag in graph_tags(graphs[c], texts[c], number, self._relations)
            )

    def _generate(self, texts: list[str]) -> list[str]:
        import torch

        tokenizer, model, device = self._load()
        batch = tokenizer(
            [PROMPT + text for text in texts],
            padding=True,
            truncation=True,
            max_length=512,
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self._max_tokens,
                num_beams=self._beams,
                do_sample=False,
            )
        return [str(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _load(self) -> tuple[Any, Any, str]:
        if self._loaded is None:
            try:
                import torch

                from tagstore.encoding.torchvision_shim import prepare_torchvision

                prepare_torchvision()
                from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
            except ModuleNotFoundError as error:
                raise MissingExtra(
                    "the miner 'factual' needs torch and transformers: pip install 'tagstore[server]'"
                ) from error
            device = (
                ("cuda" if torch.cuda.is_available() else "cpu") if self._device == "auto" else self._device
            )
            try:
                tokenizer = AutoTokenizer.from_pretrained(self._model_name)
                model = AutoModelForSeq2SeqLM.from_pretrained(self._model_name)
            except (OSError, ValueError) as error:
                raise NotFound(
                    f"cannot load the scene graph model '{self._model_name}': {str(error).splitlines()[0]}. "
                    "Give model= a directory with config, weights and tokenizer, or a name on a reachable hub"
                ) from error
            self._loaded = tokenizer, model.to(device).eval(), device
            _log.info("scene graph model %s on %s", self._model_name, device)
        return self._loaded


def facts(graph: str) -> list[tuple[str, ...]]:
    """The facts of a generated graph, each once; one that is cut off or malformed is left out."""
    facts = (
        tuple(" ".join(_MARKS.sub("", part).split()) for part in fact.split(","))
        for fact in _FACT.findall(graph)
    )
    return list(dict.fromkeys(fact for fact in facts if len(fact) in (1, 3) and all(fact)))


def graph_tags(graph: str, c: Clean, caption: int, relations: bool) -> list[Tag]:
    """Tags of a scene graph, each with its place in the caption if its words stand there."""
    tags: dict[tuple[str, str], Tag] = {}

    def add(text: str, kind: Any, canonical: str, spans: list[tuple[int, int]]) -> None:
        placed = [s for s in spans if s != (0, 0)]
        whole = len(placed) == len(spans)
        span = (min(s for s, _ in placed), max(e for _, e in placed)) if whole else (0, 0)
        tags.setdefault(
            (kind, canonical), Tag(text, kind, span, caption, SOURCE if whole else UNPLACED, canonical)
        )

    for fact in facts(graph):
        subject = fact[0].lower()
        source = _place(subject, c)
        add(subject, "object", singular(subject), [source])
        if len(fact) == 1:
            continue
        verb, other = fact[1].lower(), fact[2].lower()
        if verb == "is":
            attribute = NUMERALS.get(other, other)
            if attribute not in ("1", "one"):
                add(
                    f"{other} {subject}",
                    "attribute",
                    f"{attribute} {singular(subject)}",
                    [_place(other, c), source],
                )
        else:
            target = _place(other, c)
            add(other, "object", singular(other), [target])
            if relations:
                add(
                    f"{subject} {verb} {other}",
                    "relation",
                    f"{singular(subject)} {verb} {singular(other)}",
                    [source, target],
                )
    return list(tags.values())


def _place(words: str, c: Clean) -> tuple[int, int]:
    """Offsets of the words in the caption, in singular or plural; `(0, 0)` if they are not in it."""
    match = re.search(rf"\b{re.escape(words)}\b", c.text, re.IGNORECASE)
    if not match:
        match = re.search(rf"\b{re.escape(singular(words))}(?:s|es)?\b", c.text, re.IGNORECASE)
    return c.span(match.start(), match.end()) if match else (0, 0)
