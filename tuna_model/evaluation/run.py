"""Ask a task's questions, score the answers, and write down all that a reader needs to trust or repeat the figures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tuna_model.evaluation.bootstrap import Metric
from tuna_model.evaluation.tasks import Question, Task


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and from which tags."""

    text: str
    tags: tuple[str, ...] = ()
    degraded: bool = False
    """The store did not answer, so this was answered without tags."""


class Answerer(Protocol):
    """A model that answers questions about images."""

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[Answer]:
        """An answer for each question, in order."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What answers: model, store and version, generation settings. JSON values."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """A task's figures, with everything that they depend on."""

    task: str
    metrics: tuple[Metric, ...]
    questions: int
    degraded: int
    """Answers that were given without tags because the store was away."""
    seconds: float
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    created: str
    """UTC, ISO 8601."""

    def value(self, name: str) -> float:
        """The value of one metric."""
        return next(m.value for m in self.metrics if m.name == name)


def evaluate(
    task: Task,
    model: Answerer,
    *,
    batch_size: int = 8,
    out: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Result:
    """Answer all questions of a task and score them.

    Args:
        batch_size: questions a call of `model`.
        out: directory for `TASK.answers.jsonl`, `TASK.json` and `TASK.md`; answers are appended as they come, and those that are already
            there from the same model and settings are not asked again.
        progress: called with how many questions were just answered.
    """
    clock = time.perf_counter()
    described = dict(model.describe())
    kept = _Answers(
        out / f"{task.name}.answers.jsonl" if out else None,
        {"model": described, "settings": dict(task.settings)},
    )
    with kept:
        todo = [question for question in task.questions if question.key not in kept.found]
        progress(len(task.questions) - len(todo))
        for start in range(0, len(todo), batch_size):
            some = todo[start : start + batch_size]
            kept.add(some, model.answer(some, max_new_tokens=task.max_new_tokens))
            progress(len(some))
    answers = [kept.found[question.key] for question in task.questions]
    result = Result(
        task.name,
        tuple(task.score([answer.text for answer in answers])),
        len(answers),
        sum(answer.degraded for answer in answers),
        time.perf_counter() - clock,
        dict(task.settings),
        described,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out:
        write_atomically(out / f"{task.name}.json", json.dumps(asdict(result), indent=1, default=str) + "\n")
        write_atomically(out / f"{task.name}.md", markdown([result]))
    return result


class _Answers:
    """Answers in a file that outlives a run that was cut off. The first line says what they are answers of."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.found: dict[str, Answer] = {}
        self._path, self._header = path, json.dumps(header, sort_keys=True, default=str)

    def __enter__(self) -> _Answers:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if lines and lines[0] == self._header:
                for line in lines[1:]:
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError:
                        break  # the line that was being written when the run was cut off
                    self.found[record["key"]] = Answer(
                        record["answer"], tuple(record["tags"]), record["degraded"]
                    )
            self._file = self._path.open("w", encoding="utf-8")
            self._file.write(self._header + "\n")
            for key, answer in self.found.items():
                self._write(key, {}, answer)
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def add(self, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
        for question, answer in zip(questions, answers, strict=True):
            self.found[question.key] = answer
            if self._path is not None:
                self._write(question.key, {"question": question.text}, answer)
        if self._path is not None:
            self._file.flush()

    def _write(self, key: str, extra: Mapping[str, Any], answer: Answer) -> None:
        record = {
            "key": key,
            **extra,
            "answer": answer.text,
            "tags": list(answer.tags),
            "degraded": answer.degraded,
        }
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")


def markdown(results: Sequence[Result]) -> str:
    """A table of metrics with their 95 % intervals for each result, and what they depend on."""
    parts = []
    for result in results:
        rows = "\n".join(
            f"| {m.name} | {m.value:.4f} | {m.low:.4f} to {m.high:.4f} | {m.count} |" for m in result.metrics
        )
        facts = {
            **result.model,
            **result.settings,
            "degraded answers": result.degraded,
            "date": result.created,
        }
        parts.append(
            f"## {result.task}\n\n| metric | value | 95 % interval | answers |\n| --- | --- | --- | --- |\n{rows}\n\n"
            + "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items())
            + "\n"
        )
    return "\n".join(parts)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
