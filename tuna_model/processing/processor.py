"""Prompts, pictures and tags to the tensors of a model. "<image>" in a prompt becomes an image's tokens and
its tags.

    <image>  ─▶  [prefix]  H_vt1 w w  [,]  H_vt2 w  [suffix]  v v v v ... v        (`tag_place="before"`)

A call is `encode`, then `pad`; training builds its labels between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin

from tagstore.errors import InvalidInput
from tuna_model.modeling.config import TunaConfig
from tuna_model.processing.foreign_text import neutral_messages, special_tokens
from tuna_model.processing.image_processor import TunaImageProcessor, refuse_unknown
from tuna_model.processing.tags import ImageTags, TagLayout


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt as token ids, before padding."""

    input_ids: list[int]
    tag_index: list[int]
    """For every token the number of its tag in this prompt (at H_vt: of its query), or -1."""
    tags: tuple[ImageTags, ...]
    """The chosen tags of each image."""
    words: tuple[tuple[int, ...], ...]
    """Token ids of each tag."""


class TunaProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenizer, image processor and tag layout in one; saved and loaded like every processor of
    transformers."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_tokens: int = 49,
        image_token: str = "<image>",
        layout: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        """
        Args:
            image_processor: a `TunaImageProcessor`.
            tokenizer: the decoder's, with `image_token` among its tokens.
            chat_template: Jinja; a message's content is a string, or a list of {"type": "image"} and
                {"type": "text", "text": ...}.
            image_tokens: tokens per image without its tags (`TunaConfig.image_tokens`).
            image_token: the text that stands for an image in a prompt.
            layout: fields of `TagLayout`.

        Raises:
            InvalidInput: the tokenizer has no such token, or no token to pad with; or an argument is unknown.
        """
        refuse_unknown("TunaProcessor", unknown)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_tokens, self.image_token = image_tokens, image_token
        self.layout = TagLayout(**(layout or {})).to_dict()
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise InvalidInput(f"the tokenizer has no token '{image_token}': add it, or name another")
        self._pad_id: int = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), -1
        )
        if self._pad_id < 0:
            raise InvalidInput("the tokenizer has neither a pad nor an eos token: set tokenizer.pad_token")

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        tags: Sequence[ImageTags | None] | None = None,
        *,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str = "pt",
        padding: bool | str = True,
        **unknown: Any,
    ) -> BatchFeature:
        """Make a batch for `TunaForConditionalGeneration`.

        Args:
            images: pictures (see `TunaImageProcessor`) in the order of `<image>` in the prompts, as one list
                or as a list for each prompt. None where features are computed elsewhere (`grid`,
                `image_vectors`).
            text: prompts.
            tags: of each image in the same order; None for none at all.
            padding_side: `left` for generation; `right` or `left` for training.
            padding: True or "longest": prompts of a batch are always padded.

        Returns:
            The tensors of the table in `tuna_model`: `pixel_values` only with images, those of tags only with
            tags.

        Raises:
            InvalidInput: the prompts hold more or fewer `<image>` than there are images (or tags); or an
                argument is unknown.
        """
        refuse_unknown(
            "TunaProcessor", unknown | ({} if padding in (True, "longest") else {"padding": padding})
        )
        if text is None:
            raise InvalidInput("give text: a prompt, or a list of prompts")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = None if images is None else _flatten(images)
        counts = [prompt.count(self.image_token) for prompt in prompts]
        for name, given in (("images", pictures), ("tags", tags)):
            if given is not None and len(given) != sum(counts):
                raise InvalidInput(
                    f"the prompts hold '{self.image_token}' {sum(counts)} times, "
                    f"and {len(given)} {name} are given"
                )
        given_tags: list[ImageTags | None] = list(tags) if tags is not None else [None] * sum(counts)
        encoded, start = [], 0
        for prompt, count in zip(prompts, counts, strict=True):
            prompt_tags = given_tags[start : start + count]
            encoded.append(self.encode(prompt, prompt_tags, add_special_tokens=add_special_tokens))
            start += count
        batch = self.pad(encoded, padding_side=padding_side)
        if pictures:
            batch["pixel_values"] = self.image_processor(pictures)["pixel_values"]
        return BatchFeature(batch, tensor_type=return_tensors)

    def encode(
        self, text: str, tags: Sequence[ImageTags | None] = (), *, add_special_tokens: bool = True
    ) -> EncodedPrompt:
        """Tokenize one text, with image tokens and the chosen of each image's tags (none if `tags` is empty)
        for `<image>`.

        Parts of a conversation may be encoded one by one and joined with `join`.
        """
        return self.insert(self.token_ids(text, add_special_tokens=add_special_tokens), tags)

    def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize one text; an image is still one token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def insert(self, ids: Sequence[int], tags: Sequence[ImageTags | None] = ()) -> EncodedPrompt:
        """Put image tokens and the chosen of each image's tags in the place of image tokens; see `encode`."""
        count = ids.count(self.image_token_id)
        if len(tags) not in (0, count):
            raise InvalidInput(
                f"the text holds '{self.image_token}' {count} times, and tags of {len(tags)} images are given"
            )
        layout, empty = TagLayout(**self.layout), ImageTags.none(0)
        chosen = tuple(layout.choose(given) if given else empty for given in tags or [None] * count)
        patches, no_tags = [self.image_token_id] * self.image_tokens, [-1] * self.image_tokens
        input_ids: list[int] = []
        index: list[int] = []
        words: list[tuple[int, ...]] = []
        images = iter(chosen)
        for token in ids:
            if token != self.image_token_id:
                input_ids.append(token)
                index.append(-1)
                continue
            image_tags = next(images)
            block_ids, block_index = self._block(image_tags, layout, len(words), self._queries(words))
            before = layout.place == "before"
            input_ids += block_ids + patches if before else patches + block_ids
            index += block_index + no_tags if before else no_tags + block_index
            words += [self._words(text) for text in image_tags.texts]
        return EncodedPrompt(input_ids, index, chosen, tuple(words))

    def neutral(self, messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Make the texts of a conversation harmless in this decoder's prompts (`foreign_text`)."""
        return neutral_messages(messages, special_tokens(self.tokenizer))

    def join(self, parts: Sequence[EncodedPrompt]) -> EncodedPrompt:
        """Concatenate the parts of one sequence."""
        input_ids: list[int] = []
        index: list[int] = []
        tags: list[ImageTags] = []
        words: list[tuple[int, ...]] = []
        for part in parts:
            index += self._shifted(part, len(words), self._queries(words))
            input_ids += part.input_ids
            tags += part.tags
            words += part.words
        return EncodedPrompt(input_ids, index, tuple(tags), tuple(words))

    def pad(self, encoded: Sequence[EncodedPrompt], *, padding_side: str = "left") -> dict[str, torch.Tensor]:
        """Pad sequences to a batch: the tensors of the table in `tuna_model`, without pictures and labels."""
        if padding_side not in ("left", "right"):
            raise InvalidInput(f"padding_side is '{padding_side}': left or right")
        length = max(len(prompt.input_ids) for prompt in encoded)
        input_ids = torch.full((len(encoded), length), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        index = torch.full_like(input_ids, -1)
        tags, queries = 0, 0
        for row, prompt in enumerate(encoded):
            size = len(prompt.input_ids)
            columns = slice(length - size, length) if padding_side == "left" else slice(0, size)
            input_ids[row, columns] = torch.tensor(prompt.input_ids, dtype=torch.int64)
            mask[row, columns] = 1
            index[row, columns] = torch.tensor(self._shifted(prompt, tags, queries), dtype=torch.int64)
            tags += len(prompt.words)
            queries += self._queries(prompt.words)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        return batch | self._tag_tensors(encoded, index) if tags else batch

    def _tag_tensors(self, encoded: Sequence[EncodedPrompt], index: torch.Tensor) -> dict[str, torch.Tensor]:
        images = [tags for prompt in encoded for tags in prompt.tags]
        tagged = [tags for tags in images if len(tags)]
        words = [word for prompt in encoded for word in prompt.words]
        signals = [np.stack([tags.similarity, tags.vote_share], axis=1) for tags in tagged]
        tensors = {
            "tag_index": index,
            "tag_embeddings": torch.from_numpy(np.concatenate([tags.embeddings for tags in tagged])),
            "tag_signals": torch.from_numpy(np.concatenate(signals)),
            "cu_tags": torch.tensor(np.cumsum([0, *map(len, images)]), dtype=torch.int32),
        }
        if self.layout["queries"] == "token":
            tokens = [token for word in words for token in word]
            tensors["tag_word_ids"] = torch.tensor(tokens, dtype=torch.int64)
            tensors["tag_lengths"] = torch.tensor([len(word) for word in words], dtype=torch.int64)
        return tensors

    def _queries(self, words: Sequence[tuple[int, ...]]) -> int:
        """Queries (H_vt) of these tags."""
        return sum(map(len, words)) if self.layout["queries"] == "token" else len(words)

    def _shifted(self, prompt: EncodedPrompt, tags: int, queries: int) -> list[int]:
        """`tag_index` of a prompt after others that have so many tags and queries."""
        return [
            -1 if i < 0 else i + (queries if token == self.image_token_id else tags)
            for i, token in zip(prompt.tag_index, prompt.input_ids, strict=True)
        ]

    def _block(
        self, tags: ImageTags, layout: TagLayout, first_tag: int, first_query: int
    ) -> tuple[list[int], list[int]]:
        """Token ids and tag indices of an image's tags, with the layout's texts; nothing without tags."""
        if not len(tags):
            return [], []
        ids = list(self._text(layout.prefix))
        index = [-1] * len(ids)
        query = first_query
        for i, text in enumerate(tags.texts):
            if i:
                separator = self._text(layout.separator)
                ids += separator
                index += [-1] * len(separator)
            words = self._words(text)
            count = len(words) if layout.queries == "token" else 1
            ids += [self.image_token_id] * count + list(words)
            index += list(range(query, query + count)) + [first_tag + i] * len(words)
            query += count
        suffix = self._text(layout.suffix)
        return ids + list(suffix), index + [-1] * len(suffix)

    def _words(self, text: str) -> tuple[int, ...]:
        # a tag is foreign text: what looks like a special token in it must not become one
        tokens = _tokenize(self.tokenizer, self._word_start + text.strip())
        return tuple(token for token in tokens if token != self.image_token_id)

    def _text(self, text: str) -> tuple[int, ...]:
        return _tokenize(self.tokenizer, text) if text else ()

    @property
    def _word_start(self) -> str:
        """The space before a word inside a text; empty for tokenizers that add one themselves (Llama's)."""
        return " " if len(_tokenize(self.tokenizer, " a")) == len(_tokenize(self.tokenizer, "a")) else ""


def _flatten(images: Any) -> list[Any]:
    if not isinstance(images, list | tuple):
        return [images]
    nested = [item if isinstance(item, list | tuple) else [item] for item in images]
    return [picture for pictures in nested for picture in pictures]


# tags repeat: the same few thousand texts over a whole training run
@lru_cache(maxsize=100_000)
def _tokenize(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


AutoImageProcessor.register(
    TunaConfig, image_processor_classes={"pil": TunaImageProcessor, "torchvision": TunaImageProcessor}
)
AutoProcessor.register(TunaConfig, TunaProcessor)
