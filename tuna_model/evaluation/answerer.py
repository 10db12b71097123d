"""A TUNA pipeline as the `Answerer` of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuna_model.evaluation.questions import Question, TaskAnswer
from tuna_model.inference.conversations import user_message
from tuna_model.inference.pipeline import Pipeline
from tuna_model.processing.tags import ImageTags

_TAG_FIELDS = ("tag_signal", "tag_coupling", "tag_temperature", "max_tags", "neighbours")


class PipelineAnswerer:
    """Answers questions in batches, with the store's tags or with given ones."""

    def __init__(self, pipeline: Pipeline, *, name: str = "", store: str = "", **generation: Any) -> None:
        """
        Args:
            name: of the model, for reports.
            store: URL of the store, for reports.
            generation: options of `generate`; greedy if none.
        """
        self.pipeline, self.generation = pipeline, generation
        self._name, self._store = name, store

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int, tags: Sequence[ImageTags] | None = None
    ) -> list[TaskAnswer]:
        """See `Answerer`; `tags` are of each question's image, instead of the store's."""
        pictures = [question.picture() for question in questions]
        conversations = [[user_message(question.text, 1)] for question in questions]
        answers = self.pipeline.answers(
            [[picture] for picture, _ in pictures], conversations, tags=tags,
            identities=[identity for _, identity in pictures], max_new_tokens=max_new_tokens,
            **self.generation,
        )  # fmt: skip
        return [
            TaskAnswer(answer.text, tuple(tag.text for tag in answer.tags), answer.degraded)
            for answer in answers
        ]

    def describe(self) -> Mapping[str, Any]:
        """See `Answerer`."""
        config = self.pipeline.model.config
        description = {
            "model": self._name,
            "encoder": f"{config.encoder} ({config.encoder_digest})",
            "tags": {name: getattr(config, name) for name in _TAG_FIELDS},
            "dtype": str(self.pipeline.model.dtype).removeprefix("torch."),
            "generation": {"do_sample": False, **self.generation},
        }
        if self._store.startswith("null:") or not self._store:
            return description | {"store": "none"}
        info = self.pipeline.source.info()
        return description | {"store": self._store, "store version": f"{info.store}@{info.version}"}
