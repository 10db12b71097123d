"""Answers while they grow: where each ends, and its text as far as it will not change.

A text that is shown early must not be taken back. So its end is held back while it may still become part of a
character, of a stop text, or of the blanks that an answer loses at its end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import StoppingCriteria

_HALF_CHARACTER = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended."""

    text: str
    """All of it, without blanks at its ends and without the stop text."""
    tokens: int
    """Generated, with the end token and those of the stop text."""
    finished: bool
    """False if `max_new_tokens` cut it off."""


@dataclass(slots=True)
class _Row:
    shown: int = 0
    """Characters that the listener got, with the blanks before them."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    finished: bool = False


class GrowingAnswers(StoppingCriteria):  # type: ignore[misc]
    """Follows the rows of one `generate` without beams, and ends each at its end token, at a stop text, or
    when its caller has gone."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int,
        end_tokens: Sequence[int],
        *,
        stop_texts: Sequence[str] = (),
        gone: Sequence[threading.Event] = (),
        listener: Callable[[int, str], object] | None = None,
    ) -> None:
        """
        Args:
            prompt_length: tokens of a row before its answer.
            stop_texts: an answer ends before the first of them.
            gone: none, or one for each prompt: its rows end once it is set.
            listener: called with a row's number and the next piece of its text.
        """
        self._tokenizer, self._prompt_length = tokenizer, prompt_length
        self._end_tokens, self._stop_texts = frozenset(end_tokens), tuple(stop_texts)
        self._gone, self._listener = gone, listener
        self._rows: list[_Row] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Take the next token of each row, and tell which rows end."""
        new = input_ids[:, self._prompt_length :].tolist()
        self._rows = self._rows or [_Row() for _ in new]
        for number, (row, tokens) in enumerate(zip(self._rows, new, strict=True)):
            if not row.ended:
                self._grow(number, row, tokens)
        ended = [row.ended or self._is_gone(number) for number, row in enumerate(self._rows)]
        return torch.tensor(ended, device=input_ids.device)

    def endings(self) -> list[Ending]:
        """End the rows that grow no more; of each row its text and length."""
        for number, row in enumerate(self._rows):
            if self._texts_are_late:
                row.text = self._decode(row.tokens)
            elif not row.ended:
                row.ended = True
                self._show(number, row)
        return [Ending(row.text.strip(), len(row.tokens), row.finished) for row in self._rows]

    def _grow(self, number: int, row: _Row, tokens: list[int]) -> None:
        row.tokens = tokens
        row.ended = row.finished = tokens[-1] in self._end_tokens
        if self._texts_are_late:
            return
        row.text = self._decode(tokens)
        found = [at for stop in self._stop_texts if (at := row.text.find(stop)) >= 0]
        if found:
            row.text, row.ended, row.finished = row.text[: min(found)], True, True
        self._show(number, row)

    def _show(self, number: int, row: _Row) -> None:
        """Give the listener what will not change any more."""
        if self._listener is None:
            return
        start = len(row.text) - len(row.text.lstrip())
        end = len(row.text.rstrip())
        if not row.ended:
            end = min(end, len(row.text) - self._open(row.text))
        if end > max(row.shown, start):
            self._listener(number, row.text[max(row.shown, start) : end])
            row.shown = end

    def _open(self, text: str) -> int:
        """Characters at the end of a text that a later token may change or turn into a stop text."""
        half = len(text) - len(text.rstrip(_HALF_CHARACTER))
        begun = (
            length
            for stop in self._stop_texts
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(half, max(begun, default=0))

    @property
    def _texts_are_late(self) -> bool:
        """Whether nobody needs the texts before the end."""
        return self._listener is None and not self._stop_texts

    def _is_gone(self, number: int) -> bool:
        return bool(self._gone) and self._gone[number * len(self._gone) // len(self._rows)].is_set()

    def _decode(self, tokens: list[int]) -> str:
        # cleaning up blanks would change text that was shown
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class AnswerStream:
    """Iterator over the pieces of a prompt's answers, as (number of the answer, text), while a thread
    generates them."""

    def __init__(
        self,
        generate: Callable[[Callable[[int, str], object]], list[Ending]],
        gone: threading.Event,
        *,
        copies: int = 1,
    ) -> None:
        """
        Args:
            generate: called in the thread with a listener for `GrowingAnswers`; gives how the answers ended.
            gone: ends `generate` when it is set.
            copies: how often each answer is given: greedy ones are all the same.
        """
        self.endings: list[Ending] = []
        """How the answers ended; empty before."""
        self._pieces: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._errors: list[BaseException] = []
        self._gone, self._over = gone, False

        def show(row: int, text: str) -> None:
            for copy in range(copies):
                self._pieces.put((row * copies + copy, text))

        def run() -> None:
            try:
                self.endings = [ending for ending in generate(show) for _ in range(copies)]
            except BaseException as error:  # noqa: BLE001  raised again in the thread that reads
                self._errors.append(error)
            finally:
                self._pieces.put(None)

        self._thread = threading.Thread(target=run, name="generate")
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, str]:
        piece = None if self._over else self._pieces.get()
        if piece is not None:
            return piece
        self._over = True
        self._thread.join()
        if self._errors:
            raise self._errors.pop()
        raise StopIteration

    def close(self) -> None:
        """Stop generating."""
        self._gone.set()
        self._over = True
        self._thread.join()
