"""A TUNA pipeline as the thing that benchmarks ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuna_model.evaluation.run import Answer
from tuna_model.evaluation.tasks import Question
from tuna_model.inference.pipeline import Pipeline, user_message
from tuna_model.processing.tags import ImageTags


class PipelineAnswerer:
    """Answers questions in batches, with the store's tags or with given ones."""

    def __init__(self, pipeline: Pipeline, *, name: str = "", store: str = "", **generation: Any) -> None:
        """
        Args:
            name: what the model is called in reports.
            store: URL of the store, for reports; its version is written behind.
            generation: options of `generate`; greedy if none.
        """
        self.pipeline, self.generation = pipeline, generation
        self._name, self._store = name, store
        self._asked: tuple[str, int] = ("", 0)

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int, tags: Sequence[ImageTags] | None = None
    ) -> list[Answer]:  # fmt: skip
        """See `Answerer`; `tags` of each question's image instead of the store's."""
        images = [[question.image.read()] for question in questions]
        conversations = [[user_message(question.text, 1)] for question in questions]
        answers = self.pipeline.answers(
            images, conversations, tags=tags, max_new_tokens=max_new_tokens, **self.generation
        )
        return [Answer(one.text, tuple(tag.text for tag in one.tags), one.degraded) for one in answers]

    def describe(self) -> Mapping[str, Any]:
        """See `Answerer`."""
        config = self.pipeline.model.config
        described = {
            "model": self._name,
            "encoder": f"{config.encoder} ({config.encoder_digest})",
            "tags": {
                name: getattr(config, name)
                for name in ("tag_signal", "tag_coupling", "tag_temperature", "max_tags", "neighbours")
            },
            "dtype": str(self.pipeline.model.dtype).removeprefix("torch."),
            "generation": {"do_sample": False, **self.generation},
        }
        if self._store.startswith("null:") or not self._store:
            return described | {"store": "none"}
        info = self.pipeline.source.info()
        return described | {"store": self._store, "store version": f"{info.store}@{info.version}"}
