"""Prompts, pictures and tags to the tensors of a model. Where a prompt says "<image>", an image's tokens and tags are written.

    <image>  ─▶  [prefix]  H_vt1 w w  [,]  H_vt2 w  [suffix]  v v v v ... v        (`tag_place="before"`)

`encode` and `pad` are the two halves of a call, for those who build labels between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin

from tagstore.errors import InvalidInput
from tuna_model.modeling.config import TunaConfig
from tuna_model.processing.image_processor import TunaImageProcessor
from tuna_model.processing.tags import ImageTags, TagLayout


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt as token ids, before padding."""

    input_ids: list[int]
    tag_index: list[int]
    """For every token -1, or its tag among this prompt's (at H_vt: its query)."""
    tags: tuple[ImageTags, ...]
    """Of each image, as chosen."""
    words: tuple[tuple[int, ...], ...]
    """Token ids of each tag."""


class TunaProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenizer, image preparation and tag layout in one; saved and loaded like every processor of transformers."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_tokens: int = 49,
        image_token: str = "<image>",
        layout: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """
        Args:
            image_processor: a `TunaImageProcessor`.
            tokenizer: the decoder's, with `image_token` among its tokens.
            chat_template: Jinja; messages whose content is a list of {"type": "image"} and {"type": "text", "text": ...}, or a string.
            image_tokens: tokens an image takes without its tags (`TunaConfig.image_tokens`).
            image_token: what stands for an image in a prompt.
            layout: fields of `TagLayout`.

        Raises:
            InvalidInput: the tokenizer has no such token, or no token to pad with.
        """
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_tokens, self.image_token = image_tokens, image_token
        self.layout = TagLayout(**(layout or {})).to_dict()
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise InvalidInput(
                f"the tokenizer has no token '{image_token}': add it, or name the token that stands for an image"
            )
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
        **_: Any,
    ) -> BatchFeature:
        """A batch for `TunaForConditionalGeneration`.

        Args:
            images: pictures (see `TunaImageProcessor`) in the order of the prompts' `<image>`; lists of a prompt may be nested. None
                where features were computed before (`grid`, `image_vectors`).
            text: prompts.
            tags: of each image in the same order; None for none at all.
            padding_side: `left` for generation; `right` or `left` for training.

        Returns:
            The tensors of the table in `tuna_model`, `pixel_values` only with images, those of tags only if there are any.

        Raises:
            InvalidInput: as many `<image>` as images (or tags) is not what the prompts say.
        """
        if text is None:
            raise InvalidInput("give text: a prompt, or a list of prompts")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = None if images is None else _flat(images)
        counts = [prompt.count(self.image_token) for prompt in prompts]
        for name, given in (("images", pictures), ("tags", tags)):
            if given is not None and len(given) != sum(counts):
                raise InvalidInput(
                    f"the prompts hold '{self.image_token}' {sum(counts)} times, and {len(given)} {name} are given"
                )
        given_tags: list[ImageTags | None] = list(tags) if tags is not None else [None] * sum(counts)
        encoded, start = [], 0
        for prompt, count in zip(prompts, counts, strict=True):
            encoded.append(
                self.encode(prompt, given_tags[start : start + count], add_special_tokens=add_special_tokens)
            )
            start += count
        batch = self.pad(encoded, padding_side=padding_side)
        if pictures:
            batch["pixel_values"] = self.image_processor(pictures)["pixel_values"]
        return BatchFeature(batch, tensor_type=return_tensors)

    def encode(
        self, text: str, tags: Sequence[ImageTags | None] = (), *, add_special_tokens: bool = True
    ) -> Encoded:
        """Token ids of one text, `<image>` written out, with the chosen of each image's tags (none where `tags` is empty).

        Parts of a conversation may be encoded one by one and put together with `join`.
        """
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        places = ids.count(self.image_token_id)
        given = list(tags) or [None] * places
        if len(given) != places:
            raise InvalidInput(
                f"the text holds '{self.image_token}' {places} times, and tags of {len(given)} images are given"
            )
        layout = TagLayout(**self.layout)
        chosen = tuple(
            layout.choose(of_image) if of_image is not None and len(of_image) else None for of_image in given
        )
        input_ids: list[int] = []
        index: list[int] = []
        words: list[tuple[int, ...]] = []
        queries = 0
        images = iter(chosen)
        for token in ids:
            if token != self.image_token_id:
                input_ids.append(token)
                index.append(-1)
                continue
            of_image = next(images)
            block, places_of = (
                ([], []) if of_image is None else self._block(of_image, layout, len(words), queries)
            )
            patches = [self.image_token_id] * self.image_tokens
            before = layout.place == "before"
            input_ids += block + patches if before else patches + block
            index += places_of + [-1] * len(patches) if before else [-1] * len(patches) + places_of
            if of_image is not None:
                new = [self._words(text) for text in of_image.texts]
                words += new
                queries += sum(map(len, new)) if layout.queries == "token" else len(new)
        nothing = ImageTags.none(0)
        return Encoded(
            input_ids, index, tuple(nothing if one is None else one for one in chosen), tuple(words)
        )

    def join(self, parts: Sequence[Encoded]) -> Encoded:
        """Parts of one sequence, one after the other."""
        input_ids: list[int] = []
        index: list[int] = []
        tags: list[ImageTags] = []
        words: list[tuple[int, ...]] = []
        for part in parts:
            queries = sum(map(len, words)) if self.layout["queries"] == "token" else len(words)
            index += [
                self._moved(i, token, len(words), queries)
                for i, token in zip(part.tag_index, part.input_ids, strict=True)
            ]
            input_ids += part.input_ids
            tags += part.tags
            words += part.words
        return Encoded(input_ids, index, tuple(tags), tuple(words))

    def pad(self, encoded: Sequence[Encoded], *, padding_side: str = "left") -> dict[str, torch.Tensor]:
        """Sequences to a batch: the tensors of the table in `tuna_model`, without pictures and labels."""
        if padding_side not in ("left", "right"):
            raise InvalidInput(f"padding_side is '{padding_side}': left or right")
        length = max(len(one.input_ids) for one in encoded)
        input_ids = torch.full((len(encoded), length), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        index = torch.full_like(input_ids, -1)
        total, queries = 0, 0
        for row, one in enumerate(encoded):
            size = len(one.input_ids)
            at = slice(length - size, length) if padding_side == "left" else slice(0, size)
            input_ids[row, at] = torch.tensor(one.input_ids, dtype=torch.int64)
            mask[row, at] = 1
            moved = [
                self._moved(i, token, total, queries)
                for i, token in zip(one.tag_index, one.input_ids, strict=True)
            ]
            index[row, at] = torch.tensor(moved, dtype=torch.int64)
            total += len(one.words)
            queries += sum(map(len, one.words)) if self.layout["queries"] == "token" else len(one.words)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        return batch | self._tag_tensors(encoded, index) if total else batch

    def _tag_tensors(self, encoded: Sequence[Encoded], index: torch.Tensor) -> dict[str, torch.Tensor]:
        images = [tags for one in encoded for tags in one.tags]
        some = [tags for tags in images if len(tags)]
        words = [word for one in encoded for word in one.words]
        signals = np.stack(
            [
                np.concatenate([tags.similarity for tags in some]),
                np.concatenate([tags.votes for tags in some]),
            ],
            axis=1,
        )
        found = {
            "tag_index": index,
            "tag_embeddings": torch.from_numpy(np.concatenate([tags.embeddings for tags in some])),
            "tag_signals": torch.from_numpy(signals),
            "cu_tags": torch.tensor(np.cumsum([0, *map(len, images)]), dtype=torch.int32),
        }
        if self.layout["queries"] == "token":
            found["tag_word_ids"] = torch.tensor(
                [token for word in words for token in word], dtype=torch.int64
            )
            found["tag_lengths"] = torch.tensor([len(word) for word in words], dtype=torch.int64)
        return found

    def _moved(self, i: int, token: int, tags: int, queries: int) -> int:
        if i < 0:
            return i
        return i + (queries if token == self.image_token_id else tags)

    def _block(
        self, tags: ImageTags, layout: TagLayout, first_tag: int, first_query: int
    ) -> tuple[list[int], list[int]]:
        """Token ids and tag indices of an image's tags, its texts around them."""
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
        return tuple(
            i for i in _tokens(self.tokenizer, self._lead + text.strip()) if i != self.image_token_id
        )

    def _text(self, text: str) -> tuple[int, ...]:
        return _tokens(self.tokenizer, text) if text else ()

    @property
    def _lead(self) -> str:
        """A word inside a text begins with a space; tokenizers that write one themselves (Llama's) must not get a second."""
        return " " if len(_tokens(self.tokenizer, " a")) == len(_tokens(self.tokenizer, "a")) else ""


def _flat(images: Any) -> list[Any]:
    if not isinstance(images, list | tuple):
        return [images]
    return [one for item in images for one in (item if isinstance(item, list | tuple) else [item])]


# tags repeat: the same few thousand texts over a whole training run
@lru_cache(maxsize=100_000)
def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


AutoImageProcessor.register(
    TunaConfig, image_processor_classes={"pil": TunaImageProcessor, "torchvision": TunaImageProcessor}
)
AutoProcessor.register(TunaConfig, TunaProcessor)
