"""Pictures and questions to answers: model, processor and tag source in one. What the command line and a server stand on.

    tuna = Pipeline.load("smol", store="grpc://localhost:50051/flickr8k")
    tuna.answer("picture.jpg", "What is on the table?").text
    for piece in tuna.stream(["picture.jpg"], messages): ...

Each picture goes through the image tower once: its grid is what the model sees, its vector is what the store is asked with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from tagstore.client import TagSource, connect
from tagstore.errors import InvalidInput
from tagstore.types import Neighbour, Retrieval
from tuna_model import presets
from tuna_model.modeling.model import TAG_INPUTS, TunaForConditionalGeneration
from tuna_model.processing.processor import TunaProcessor
from tuna_model.processing.tags import ImageTags, TagLayout, TagLookup

Message = dict[str, Any]
"""{"role": "user", "content": "text", or [{"type": "image"}, {"type": "text", "text": "..."}]}"""


@dataclass(frozen=True, slots=True)
class WeighedTag:
    """A tag as the model took it."""

    text: str
    weight: float
    relevance: float
    similarity: float
    votes: float
    """Share of the neighbours that carry it."""
    image: int = 0
    """Of which picture of the conversation."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, and what it was told."""

    text: str
    tags: tuple[WeighedTag, ...]
    neighbours: tuple[Neighbour, ...]
    """Of all pictures, those of the first one first."""
    store: str
    """Name of the store that answered; empty if none did."""
    version: int
    degraded: bool
    """Whether the store did not answer in time, so that the model did without tags."""
    finished: bool = True
    """False if `max_new_tokens` cut it off."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Conversations ready for `generate`."""

    inputs: dict[str, Any]
    tags: tuple[tuple[WeighedTag, ...], ...]
    """Of each conversation."""
    retrievals: tuple[tuple[Retrieval | None, ...], ...]
    """Of each conversation, of each of its pictures; None where no store was asked or none answered."""
    degraded: tuple[bool, ...]
    """Of each conversation: whether the store did not answer for one of its pictures."""


class Pipeline:
    """Safe for one thread at a time."""

    def __init__(
        self,
        model: TunaForConditionalGeneration,
        processor: TunaProcessor,
        source: TagSource,
        *,
        any_store: bool = False,
    ) -> None:
        self.model, self.processor, self.source = model, processor, source
        self.lookup = TagLookup.of(source, model.config, any_store=any_store)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        store: str = "null://",
        timeout: float = 5.0,
        any_store: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **fields: Any,
    ) -> Self:
        """
        Args:
            name: a preset or a directory (`presets.load`).
            store: URL of a tag source (`tagstore.client`); null:// for none.
            timeout: seconds that the store has; then the model answers without tags.
            any_store: take tags of another store than the one that the checkpoint was trained with.
            device, dtype, fields: as for `presets.load`.
        """
        model, processor = presets.load(name, device=device, dtype=dtype, **fields)
        return cls(model, processor, connect(store, timeout=timeout), any_store=any_store)

    def answer(self, image: Any, question: str, *, tags: ImageTags | None = None, **options: Any) -> Answer:
        """Answer a question about one picture (None for a question without).

        Args:
            image: a path, encoded bytes, or a PIL image.
            question: in words.
            tags: these instead of the store's.
            options: of `generate` (max_new_tokens=64, do_sample=False, num_beams ...).
        """
        images = [] if image is None else [image]
        messages = [user_message(question, len(images))]
        return self.answers([images], [messages], tags=None if tags is None else [tags], **options)[0]

    def answers(
        self,
        images: Sequence[Sequence[Any]],
        conversations: Sequence[Sequence[Message]],
        *,
        tags: Sequence[ImageTags] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer several conversations in one batch.

        Args:
            images: of each conversation, in the order of its {"type": "image"} parts.
            conversations: their messages; each gets the next one of the assistant.
            tags: of all pictures, instead of the store's.
            options: of `generate`.
        """
        prepared = self.prepare(images, conversations, tags=tags)
        with torch.inference_mode():
            out = self.model.generate(**prepared.inputs, **self._options(options))
        new = out[:, prepared.inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        ends = self._ends()
        several = len(texts) // len(conversations)
        return [
            self._answer(
                prepared,
                row,
                texts[row * several].strip(),
                bool(np.isin(new[row * several].cpu().numpy(), ends).any()),
            )
            for row in range(len(conversations))
        ]

    def stream(
        self,
        images: Sequence[Any],
        messages: Sequence[Message],
        *,
        prepared: Prepared | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece. Closing the iterator stops the model."""
        prepared = prepared or self.prepare([images], [messages])
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **prepared.inputs,
                        **self._options(options),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Asked(stop)]),
                    )
            except BaseException as error:  # noqa: BLE001  raised again in the thread that reads
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=run, name="generate")
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]

    def prepare(
        self,
        images: Sequence[Sequence[Any]],
        conversations: Sequence[Sequence[Message]],
        *,
        tags: Sequence[ImageTags] | None = None,
    ) -> Prepared:
        """Look at the pictures, ask the store, and write the prompts. Arguments as for `answers`."""
        for pictures, messages in zip(images, conversations, strict=True):
            places = sum(
                part.get("type") == "image"
                for m in messages
                if not isinstance(m["content"], str)
                for part in m["content"]
            )
            if places != len(pictures):
                raise InvalidInput(
                    f'the messages hold {places} parts {{"type": "image"}}, and {len(pictures)} images are given'
                )
        prompts = [
            self.processor.apply_chat_template(list(messages), add_generation_prompt=True)
            for messages in conversations
        ]
        pictures = [picture for some in images for picture in some]
        extra: dict[str, Any] = {}
        found: list[tuple[ImageTags, Retrieval | None]] = []
        asked = False
        if pictures:
            grid, vectors = self.model.encode_images(
                self.processor.image_processor(pictures)["pixel_values"].to(self.model.device)
            )
            extra = {"grid": grid} | ({} if vectors is None else {"image_vectors": vectors})
            if tags is not None:
                found = [(one, None) for one in tags]
            elif vectors is None and not str(getattr(self.source, "url", "")).startswith("null:"):
                raise InvalidInput(
                    "this checkpoint's own tower is not joined to an encoder, so a store cannot be asked with its vectors: "
                    "call model.join_encoder(load_encoder('hf:...')) and save it, or use null://"
                )
            elif vectors is not None and self.model.config.tags:
                asked = True
                found = self.lookup.detailed(
                    vectors, self.model.config.encoder_digest or self.model.encoder.fingerprint
                )
        bos = self.processor.tokenizer.bos_token
        # a template that writes the first token itself must not get a second
        add = not (bos and prompts[0].startswith(bos))
        batch = self.processor(text=prompts, tags=[one for one, _ in found] or None, add_special_tokens=add)
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()} | extra
        tags_of, answers = self._described(images, found, inputs)
        return Prepared(inputs, tags_of, answers, tuple(asked and None in some for some in answers))

    def _described(
        self,
        images: Sequence[Sequence[Any]],
        found: Sequence[tuple[ImageTags, Retrieval | None]],
        inputs: dict[str, Any],
    ) -> tuple[tuple[tuple[WeighedTag, ...], ...], tuple[tuple[Retrieval | None, ...], ...]]:
        """Weighed tags and retrievals of each conversation."""
        weights = self._weights(inputs)
        layout = TagLayout(**self.processor.layout)
        tags: list[tuple[WeighedTag, ...]] = []
        retrievals: list[tuple[Retrieval | None, ...]] = []
        at, start = 0, 0
        for pictures in images:
            some: list[WeighedTag] = []
            mine = found[start : start + len(pictures)]
            for image, (given, _) in enumerate(mine):
                chosen = layout.choose(given)
                signals = zip(chosen.texts, chosen.relevance, chosen.similarity, chosen.votes, strict=True)
                for text, relevance, similarity, votes in signals:
                    some.append(
                        WeighedTag(
                            text, float(weights[at]), float(relevance), float(similarity), float(votes), image
                        )
                    )
                    at += 1
            start += len(pictures)
            tags.append(tuple(some))
            retrievals.append(tuple(answer for _, answer in mine))
        return tuple(tags), tuple(retrievals)

    def _weights(self, inputs: dict[str, Any]) -> list[float]:
        if not all(name in inputs for name in TAG_INPUTS[:4]):
            return []
        with torch.no_grad():
            weights, _, _ = self.model.weight_tuner(
                inputs["tag_embeddings"],
                inputs.get("image_vectors"),
                inputs["tag_signals"],
                inputs["cu_tags"],
            )
        found: list[float] = weights.tolist()
        return found

    def _answer(self, prepared: Prepared, row: int, text: str, finished: bool) -> Answer:
        answers = [one for one in prepared.retrievals[row] if one is not None]
        return Answer(
            text=text,
            tags=prepared.tags[row],
            neighbours=tuple(neighbour for one in answers for neighbour in one.neighbours),
            store=answers[0].store if answers else "",
            version=answers[0].version if answers else 0,
            degraded=prepared.degraded[row],
            finished=finished,
        )

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"max_new_tokens": 64, "do_sample": False} | options

    def _ends(self) -> Any:
        end = self.model.generation_config.eos_token_id
        return np.atleast_1d(self.processor.tokenizer.eos_token_id if end is None else end)


class _Asked(StoppingCriteria):  # type: ignore[misc]
    """Stops when it is asked to."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)


def user_message(text: str, images: int = 0) -> Message:
    """A message of the user: pictures first, then words."""
    return {
        "role": "user",
        "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}],
    }
