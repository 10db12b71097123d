"""Answers as OpenAI's API writes them: a completion, or the events of a stream, with the tags beside them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tuna_model.inference.answers import Answer, PreparedBatch, WeighedTag
from tuna_model.inference.decoding import Ending
from tuna_model.serving.refusals import error_value
from tuna_model.serving.worker import Job


class Reply:
    """The answer to one request: its id, its time, and the name of the model."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def completion(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All choices at once."""
        first = answers[0]
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "logprobs": None,
                "finish_reason": _reason(answer.finished),
            }
            for index, answer in enumerate(answers)
        ]
        usage = _usage(first.prompt_tokens, sum(answer.tokens for answer in answers))
        sources = _sources(first.tags, first.store, first.version, first.degraded)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage, **sources}

    async def events(self, job: Job, prepared: PreparedBatch) -> AsyncIterator[str]:
        """Server-sent events of a stream. The tags come with the first one, the usage with the last."""
        request = job.request
        # where usage is asked for, every event has the field
        no_usage: dict[str, Any] = {"usage": None} if request.with_usage else {}

        def chunk(choices: list[dict[str, Any]], **extra: Any) -> str:
            return _event(
                {**self._head, "object": "chat.completion.chunk", "choices": choices, **no_usage, **extra}
            )

        def delta(index: int, finish: str | None = None, **fields: Any) -> list[dict[str, Any]]:
            return [{"index": index, "delta": fields, "logprobs": None, "finish_reason": finish}]

        try:
            retrievals = [retrieval for retrieval in prepared.retrievals[0] if retrieval is not None]
            store, version = (retrievals[0].store, retrievals[0].version) if retrievals else ("", 0)
            sources = _sources(prepared.tags[0], store, version, prepared.degraded[0])
            for index in range(request.n):
                yield chunk(delta(index, role="assistant", content=""), **({} if index else sources))
            endings: list[Ending] = []
            while not endings:
                result = await job.results.get()
                if isinstance(result, Exception):
                    yield _event(error_value(result))
                    return
                if isinstance(result, list):
                    endings = result
                else:
                    index, piece = result
                    yield chunk(delta(index, content=piece))
            for index, ending in enumerate(endings):
                yield chunk(delta(index, _reason(ending.finished)))
            if request.with_usage:
                prompt_tokens = int(prepared.inputs["attention_mask"].sum())
                usage = _usage(prompt_tokens, sum(ending.tokens for ending in endings))
                yield chunk([], usage=usage)
            yield "data: [DONE]\n\n"
        finally:
            job.gone.set()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _reason(finished: bool) -> str:
    return "stop" if finished else "length"


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _sources(tags: Sequence[WeighedTag], store: str, version: int, degraded: bool) -> dict[str, Any]:
    """The fields beside OpenAI's: tags, and the store that they come from."""
    named = f"{store}@{version}" if store else ""
    return {"tags": [tag.to_dict() for tag in tags], "store": named, "degraded": degraded}
