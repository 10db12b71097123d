"""Ask a task's questions, score the answers, and write both down with all that is needed to repeat them."""

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
from tuna_model.evaluation.questions import Question, Task, TaskAnswer, read_answers


class Answerer(Protocol):
    """A model that answers questions about images."""

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[TaskAnswer]:
        """Answer each question, in order."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Describe the model, store and version, and generation settings. JSON values."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of a task, with everything that they depend on."""

    task: str
    metrics: tuple[Metric, ...]
    questions: int
    degraded: int
    """Answers that were given without tags because the store did not answer."""
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
    """Answer all questions of a task and score the answers.

    Args:
        batch_size: questions per call of `model`.
        out: directory for `TASK.answers.jsonl`, `TASK.json` and `TASK.md`. Answers are appended as they come;
            questions with an answer of the same model and settings in that file are not asked again.
        progress: called with the number of questions just answered.
    """
    clock = time.perf_counter()
    description = dict(model.describe())
    settings = {**task.settings, "max_new_tokens": task.max_new_tokens}
    header = {"model": description, "settings": settings}
    with _AnswerFile(out / f"{task.name}.answers.jsonl" if out else None, header) as file:
        open_questions = [question for question in task.questions if question.key not in file.answers]
        progress(len(task.questions) - len(open_questions))
        for start in range(0, len(open_questions), batch_size):
            batch = open_questions[start : start + batch_size]
            file.add(batch, model.answer(batch, max_new_tokens=task.max_new_tokens))
            progress(len(batch))
    answers = [file.answers[question.key] for question in task.questions]
    result = Result(
        task.name,
        tuple(task.score(answers)),
        len(answers),
        sum(answer.degraded for answer in answers),
        time.perf_counter() - clock,
        settings,
        description,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out:
        write_atomically(out / f"{task.name}.json", json.dumps(asdict(result), indent=1, default=str) + "\n")
        write_atomically(out / f"{task.name}.md", markdown([result]))
    return result


class _AnswerFile:
    """Answers in a JSON-lines file, from which a run that was cut off resumes. Its first line is the
    header."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.answers: dict[str, TaskAnswer] = {}
        self._path, self._header = path, json.dumps(header, sort_keys=True, default=str)

    def __enter__(self) -> _AnswerFile:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self.answers = read_answers(self._path, self._header)
            self._file = self._path.open("w", encoding="utf-8")
            self._file.write(self._header + "\n")
            for key, answer in self.answers.items():
                self._write(key, {}, answer)
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def add(self, questions: Sequence[Question], answers: Sequence[TaskAnswer]) -> None:
        for question, answer in zip(questions, answers, strict=True):
            self.answers[question.key] = answer
            if self._path is not None:
                self._write(question.key, {"question": question.text}, answer)
        if self._path is not None:
            self._file.flush()

    def _write(self, key: str, extra: Mapping[str, Any], answer: TaskAnswer) -> None:
        fields = {"answer": answer.text, "tags": list(answer.tags), "degraded": answer.degraded}
        record = {"key": key, **extra, **fields}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")


def markdown(results: Sequence[Result]) -> str:
    """Write each result as a table of metrics with 95 % intervals, and what they depend on."""
    parts = []
    for result in results:
        rows = "\n".join(
            f"| {m.name} | {m.value:.4f} | {m.low:.4f} to {m.high:.4f} | {m.count} |" for m in result.metrics
        )
        counts = {"degraded answers": result.degraded, "date": result.created}
        facts = {**result.model, **result.settings, **counts}
        parts.append(
            f"## {result.task}\n\n| metric | value | 95 % interval | answers |\n"
            f"| --- | --- | --- | --- |\n{rows}\n\n"
            + "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items())
            + "\n"
        )
    return "\n".join(parts)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
