"""Pictures and questions to answers: model, processor and tag source in one, for the command line and `tuna
serve`.

    tuna = Pipeline.load("smol", store="grpc://localhost:50051/flickr8k")
    tuna.answer("picture.jpg", "What is on the table?").text
    for piece in tuna.stream(["picture.jpg"], messages): ...

Each picture goes through the image tower once: the model reads its grid, the store is queried with its
vector.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from tagstore.client import TagSource, connect
from tagstore.errors import InvalidInput, Unavailable
from tagstore.types import Identity, Retrieval
from tuna_model import presets
from tuna_model.inference.answers import Answer, PreparedBatch, weighed_tags
from tuna_model.inference.conversations import Message, Prompt, Reader, user_message
from tuna_model.inference.decoding import AnswerStream, Ending
from tuna_model.inference.generation import Generation
from tuna_model.modeling.model import TAG_INPUTS, TunaForConditionalGeneration
from tuna_model.processing.processor import EncodedPrompt, TunaProcessor
from tuna_model.processing.tags import ImageTags, TagLookup, weigh_for_stores
from tuna_model.training.runs import load_run

log = logging.getLogger(__name__)


class Pipeline:
    """A model that answers questions about pictures. Safe for one thread at a time."""

    def __init__(
        self,
        model: TunaForConditionalGeneration,
        processor: TunaProcessor,
        source: TagSource,
        *,
        any_store: bool = False,
        contrast: float = 0.0,
    ) -> None:
        """
        Args:
            contrast: strength of contrastive decoding against the same prompts without tags
                (`ContrastiveLogits`); 0 for none. It costs a second forward of the decoder.
        """
        if contrast < 0:
            raise InvalidInput(f"contrast is {contrast}: it must not be negative")
        self.model, self.processor, self.source = model, processor, source
        self._weigh_for_store()
        self.lookup = TagLookup.of(source, model.config, any_store=any_store)
        context = getattr(model.config.text_config, "max_position_embeddings", 0)
        self.reader = Reader(processor, context or 0)
        """Reads conversations before the model is asked."""
        self._contrast = contrast
        self._generation = Generation(model, processor, contrast)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        store: str = "null://",
        timeout: float = 5.0,
        any_store: bool = False,
        contrast: float = 0.0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **fields: Any,
    ) -> Self:
        """Load a model and connect to a store.

        Args:
            name: a preset, a directory (`presets.load`), or a training run, of which the newest checkpoint.
            store: URL of a tag source (`tagstore.client`); null:// for none.
            timeout: seconds after which the model answers without tags.
            any_store: accept tags of another store than the one that the checkpoint was trained with.
            contrast: as for `Pipeline`.
            device, dtype, fields: as for `presets.load`; a run takes no fields, it has its own.
        """
        if Path(name).is_dir() and not Path(name, "config.json").exists():
            if fields:
                raise InvalidInput(f"{name} is a training run, which sets {', '.join(sorted(fields))} itself")
            model, processor = load_run(name)
            model = model.to(device=device, dtype=dtype)
        else:
            model, processor = presets.load(name, device=device, dtype=dtype, **fields)
        source = connect(store, timeout=timeout)
        return cls(model, processor, source, any_store=any_store, contrast=contrast)

    def _weigh_for_store(self) -> None:
        """Weigh signals as they are in a store that is grounded, if this one is."""
        if self.model.config.tag_signal != "mixed":
            return
        try:
            info = self.source.info()
        except Unavailable as error:
            log.warning("signals of tags keep tag_mix, because the store did not say what it is: %s", error)
            return
        weigh_for_stores(self.model, self.processor, [info])
        if self.model.weight_tuner.grounded:
            log.info(
                "store %s@%d is grounded: its tags are weighed by tag_mix_grounded", info.store, info.version
            )

    def answer(self, image: Any, question: str, *, tags: ImageTags | None = None, **options: Any) -> Answer:
        """Answer a question about one picture (None for a question without).

        Args:
            image: a path, encoded bytes, or a PIL image.
            question: as text.
            tags: instead of the store's.
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
        identities: Sequence[Identity] = (),
        **options: Any,
    ) -> list[Answer]:
        """Answer several conversations in one batch.

        Args:
            images: of each conversation, in the order of its {"type": "image"} parts.
            conversations: the messages of each; the answer is the assistant's next message.
            tags: of all pictures, instead of the store's.
            identities: key and hashes of all pictures, for a store with `exclude=self`; or none.
            options: of `generate`.
        """
        prompts = self._read(images, conversations, self._options(options)["max_new_tokens"])
        return self.answer_prompts(prompts, tags=tags, identities=identities, **options)

    def answer_prompts(
        self,
        prompts: Sequence[Prompt],
        *,
        tags: Sequence[ImageTags] | None = None,
        identities: Sequence[Identity] = (),
        stops: Sequence[threading.Event] = (),
        choices: int = 1,
        stop_texts: Sequence[str] = (),
        seed: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer conversations that were read before (`Pipeline.reader`), in one batch.

        Args:
            stops: none, or one for each: an answer ends where it is once its event is set.
            choices: answers of each conversation, which come one after the other.
            stop_texts: an answer ends before the first of these.
            seed: of the random numbers of sampling, for this batch.

        Raises:
            InvalidInput: stop texts or several choices with beams.
        """
        prepared = self.prepare_prompts(prompts, tags=tags, identities=identities)
        options = self._options(options)
        copies = 1 if options["do_sample"] else choices
        if options.get("num_beams", 1) > 1:
            endings = self._generation.search_beams(prepared, options, choices, stop_texts, stops)
        else:
            rows = choices // copies
            endings = self._generation.generate(prepared, options, rows, stop_texts, seed, stops)
        counts = prepared.inputs["attention_mask"].sum(1).tolist()
        rows = choices // copies
        return [
            self._answer(prepared, number // rows, ending, int(counts[number // rows]))
            for number, ending in enumerate(endings)
            for _ in range(copies)
        ]

    def stream(
        self,
        images: Sequence[Any],
        messages: Sequence[Message],
        *,
        prepared: PreparedBatch | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Answer one conversation piece by piece. Closing the iterator or setting `stop` stops the model.

        Options are those of `stream_choices`.
        """
        prepared = prepared or self.prepare([images], [messages])
        pieces = self.stream_choices(prepared, stop=stop, **options)
        try:
            yield from (piece for _, piece in pieces)
        finally:
            pieces.close()

    def stream_choices(
        self,
        prepared: PreparedBatch,
        *,
        stop: threading.Event | None = None,
        choices: int = 1,
        stop_texts: Sequence[str] = (),
        seed: int | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Answer one prepared conversation, piece by piece, each with the number of the answer that it is of.

        Arguments are those of `answer_prompts`.
        """
        options, stop = self._options(options), stop or threading.Event()
        copies = 1 if options["do_sample"] else choices

        def generate(listener: Callable[[int, str], object]) -> list[Ending]:
            rows = choices // copies
            return self._generation.generate(prepared, options, rows, stop_texts, seed, [stop], listener)

        return AnswerStream(generate, stop, copies=copies)

    def prepare(
        self,
        images: Sequence[Sequence[Any]],
        conversations: Sequence[Sequence[Message]],
        *,
        tags: Sequence[ImageTags] | None = None,
        identities: Sequence[Identity] = (),
        new_tokens: int = 0,
    ) -> PreparedBatch:
        """Encode the pictures, ask the store for tags, and write the prompts. Arguments as for `answers`.

        Args:
            new_tokens: that an answer may have; what the context cannot hold with them is refused.
        """
        prompts = self._read(images, conversations, new_tokens)
        return self.prepare_prompts(prompts, tags=tags, identities=identities)

    def prepare_prompts(
        self,
        prompts: Sequence[Prompt],
        *,
        tags: Sequence[ImageTags] | None = None,
        identities: Sequence[Identity] = (),
    ) -> PreparedBatch:
        """As `prepare`, of conversations that were read before."""
        features: dict[str, Any] = {}
        retrieved: list[tuple[ImageTags, Retrieval | None]] = []
        store_asked = False
        pixels = [prompt.pixels for prompt in prompts if len(prompt.pixels)]
        if pixels:
            grid, vectors = self.model.encode_images(torch.cat(pixels).to(self.model.device))
            features = {"grid": grid} | ({} if vectors is None else {"image_vectors": vectors})
            if tags is not None:
                retrieved = [(image_tags, None) for image_tags in tags]
            elif vectors is None and not str(getattr(self.source, "url", "")).startswith("null:"):
                raise InvalidInput(
                    "this checkpoint's own tower is not joined to an encoder, so a store cannot be asked "
                    "with its vectors: call model.join_encoder(load_encoder('hf:...')) and save it, or use null://"
                )
            elif vectors is not None and self.model.config.tags:
                store_asked = True
                fingerprint = self.model.config.encoder_digest or self.model.encoder.fingerprint
                retrieved = self.lookup.detailed(vectors, fingerprint, identities=identities)
        encoded: list[EncodedPrompt] = []
        retrievals: list[tuple[Retrieval | None, ...]] = []
        start = 0
        for prompt in prompts:
            part = retrieved[start : start + len(prompt.pixels)]
            start += len(prompt.pixels)
            encoded.append(self._with_tags(prompt, [image_tags for image_tags, _ in part]))
            retrievals.append(tuple(retrieval for _, retrieval in part))
        batch = self.processor.pad(encoded)
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()} | features
        weights = iter(self._weights(inputs))
        weighed = tuple(
            tuple(tag for i, tags in enumerate(prompt.tags) for tag in weighed_tags(tags, weights, i))
            for prompt in encoded
        )
        degraded = tuple(store_asked and None in part for part in retrievals)
        against = None
        if self._contrast and any(weighed):
            plain = self.processor.pad([self.processor.insert(prompt.token_ids) for prompt in prompts])
            against = {name: tensor.to(self.model.device) for name, tensor in plain.items()} | features
        return PreparedBatch(inputs, weighed, tuple(retrievals), degraded, against)

    def _read(
        self, images: Sequence[Sequence[Any]], conversations: Sequence[Sequence[Message]], new_tokens: int
    ) -> list[Prompt]:
        return [
            self.reader.read(pictures, messages, new_tokens=new_tokens)
            for pictures, messages in zip(images, conversations, strict=True)
        ]

    def _with_tags(self, prompt: Prompt, tags: Sequence[ImageTags]) -> EncodedPrompt:
        """Put the tags of its pictures into a prompt; none, if the context does not hold them."""
        encoded = self.processor.insert(prompt.token_ids, tags)
        if self.reader.context and len(encoded.input_ids) + prompt.new_tokens > self.reader.context:
            without = self.processor.insert(prompt.token_ids)
            dropped = sum(map(len, encoded.tags))
            if dropped:
                log.warning("%d tags are left out: the context of the model does not hold them", dropped)
                self.lookup.dropped += dropped
            return without
        return encoded

    def _weights(self, inputs: dict[str, Any]) -> list[float]:
        """Weights of all tags, as the model computes them."""
        if not all(name in inputs for name in TAG_INPUTS[:4]):
            return []
        embeddings, vectors = inputs["tag_embeddings"], inputs.get("image_vectors")
        with torch.no_grad():
            weights = self.model.weight_tuner(embeddings, vectors, inputs["tag_signals"], inputs["cu_tags"])[
                0
            ]
        values: list[float] = weights.tolist()
        return values

    def _answer(self, prepared: PreparedBatch, row: int, ending: Ending, prompt_tokens: int) -> Answer:
        retrievals = [retrieval for retrieval in prepared.retrievals[row] if retrieval is not None]
        return Answer(
            text=ending.text,
            tags=prepared.tags[row],
            neighbours=tuple(neighbour for retrieval in retrievals for neighbour in retrieval.neighbours),
            store=retrievals[0].store if retrievals else "",
            version=retrievals[0].version if retrievals else 0,
            degraded=prepared.degraded[row],
            finished=ending.finished,
            tokens=ending.tokens,
            prompt_tokens=prompt_tokens,
        )

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"max_new_tokens": 64, "do_sample": False} | options
