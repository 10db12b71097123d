"""Multiple choice: questions of MMBench, ScienceQA and SEED-Bench, and which option an answer means.

    MMBench     .tsv        index, question, hint, A, B, C, D, answer (a letter), category, image (base64)
    ScienceQA   .jsonl      image, question, hint, choices (a list), answer (a number from 0), subject
    SEED-Bench  .json       {"questions": [{data_id, question, choice_a ... choice_d, answer (a letter)}]}
                or .jsonl   the same questions, one a line

MMBench: Liu et al., arXiv 2307.06281. ScienceQA: Lu et al., NeurIPS 2022. SEED-Bench: Li et al., arXiv
2307.16125.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from tagstore.errors import InvalidInput, NotFound
from tagstore.readers.image_files import MAX_IMAGE_BYTES, Embedded, decoded, is_base64
from tagstore.readers.samples import Place, image_key, image_place, read_lines
from tagstore.readers.tables import open_text
from tagstore.readers.values import RecordError, is_unicode
from tuna_model.evaluation.bootstrap import Metric, mean
from tuna_model.evaluation.naming import fold, holds
from tuna_model.evaluation.questions import Question, TaskOptions

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
_FIRST = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])(?=\s*$|\s*[.:,;)\n]))")
_STATED = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*(?:option\s+)?\(?([A-Z])(?=\s*$|[.:,;)\n])", re.IGNORECASE
)


def read_choice(answer: str, options: Sequence[str]) -> int | None:
    """Read the number of the option that an answer means, by the first of these rules that finds one:

    1. The answer is an option's letter, or begins with one in brackets or before punctuation: "B", "(b)",
       "B. red".
    2. It names one: "the answer is B", "option B.".
    3. It holds the text of exactly one option as whole words, as `naming` compares them. An option within
       another that it holds too does not count: "dark red" is not "red".

    None if no rule does.
    """
    for pattern in (_FIRST.match, _STATED.search):
        if match := pattern(answer):
            number = ascii_uppercase.index(next(filter(None, match.groups())).upper())
            if number < len(options):
                return number
    held = [i for i, option in enumerate(options) if holds(answer, option)]
    whole = [i for i in held if not any(_within(options[i], options[j]) for j in held)]
    return whole[0] if len(whole) == 1 else None


def choice(
    answers: Sequence[str],
    questions: Sequence[Question],
    images: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """Accuracy, the share of answers that mean no option (they are wrong), and accuracy by category."""
    truths = [question.truth for question in questions]
    read = [read_choice(answer, truth["options"]) for answer, truth in zip(answers, truths, strict=True)]
    right = [float(number == truth["right"]) for number, truth in zip(read, truths, strict=True)]
    categories = [truth["category"] for truth in truths]
    metrics = [
        mean("accuracy", right, images, resamples=resamples, seed=seed),
        mean("unread", [float(number is None) for number in read], images, resamples=resamples, seed=seed),
    ]
    for category in sorted(set(categories) - {""}):
        rows = [i for i, name in enumerate(categories) if name == category]
        of_rows = [right[i] for i in rows], [images[i] for i in rows]
        metrics.append(mean(f"{category}: accuracy", *of_rows, resamples=resamples, seed=seed))
    return metrics


def read_choices(o: TaskOptions) -> list[Question]:
    """Read the questions of a file in one of the formats above; those without an image are left out.

    Raises:
        NotFound: there is no such file.
        InvalidInput: a question lacks a field, two have the same id, or none has an image.
    """
    folder = o.images or o.data.parent
    questions: dict[str, Question] = {}
    places: dict[str, tuple[Place, str]] = {}
    for number, record in _records(o.data):
        where = f"{o.data}, {number}"
        name = record.get("image", record.get("data_id"))
        if not name or record.get("data_type", "image") != "image":
            continue
        if o.split not in ("", record.get("split")):
            continue
        key = str(record.get("index", record.get("question_id", record.get("id", len(questions)))))
        if key in questions:
            raise InvalidInput(f"{where}: the question {key} is there twice, and answers are kept by its id")
        options = _options(record)
        right = _right(record.get("answer"), len(options))
        if not isinstance(record.get("question"), str) or len(options) < 2 or right is None:
            raise InvalidInput(
                f"{where}: a question has 'question', at least two options ('choices', 'choice_a' ... or "
                f"'A' ...) and the right one as 'answer'; this has {', '.join(record)}"
            )
        # further rows of MMBench give the index of the row that holds their image
        earlier = places.get(str(name)) if "index" in record else None
        place, image = earlier or _image(record, str(name), folder, where, o.allow_outside)
        places[key] = place, image
        lines = [f"{ascii_uppercase[i]}. {option}" for i, option in enumerate(options)]
        parts = (record.get("hint"), record["question"], *lines, o.prompt or LETTER_PROMPT)
        text = "\n".join(part for part in parts if part)
        if not is_unicode(text):
            raise InvalidInput(f"{where}: not UTF-8: convert the file")
        truth = {"options": options, "right": right, "category": _category(record)}
        store_key = "" if isinstance(place, Embedded) else image_key({}, image, folder, where)
        questions[key] = Question(key, place, image, text, truth, store_key)
        if len(questions) == o.limit:
            break
    if not questions:
        split = f" of split '{o.split}'" if o.split else ""
        raise InvalidInput(f"{o.data} has no question{split} with an image")
    return list(questions.values())


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a file, each with its place in the file."""
    if not path.exists():
        raise NotFound(f"cannot read {path}: no such file")
    if path.suffix == ".tsv":
        csv.field_size_limit(2 * MAX_IMAGE_BYTES)
        with open_text(path) as text:
            rows = csv.DictReader(text, delimiter="\t", strict=True)
            try:
                for row in rows:
                    fields = {name: value for name, value in row.items() if name and value}
                    yield f"line {rows.line_num}", fields
            except csv.Error as error:
                raise InvalidInput(f"{path}, line {rows.line_num}: {error}") from error
    elif path.suffix == ".json":
        try:
            content = json.loads(path.read_bytes())
            kinds = {number: name for name, number in content.get("question_type", {}).items()}
            records = [{**r, "kind": kinds.get(r.get("question_type_id"), "")} for r in content["questions"]]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(
                f'{path} is not {{"questions": [...]}}, as SEED-Bench has it: {error!r}'
            ) from error
        yield from ((f"question {number}", record) for number, record in enumerate(records))
    else:
        yield from ((f"line {number}", record) for number, record in read_lines(path))


def _image(
    record: Mapping[str, Any], name: str, folder: Path, where: str, allow_outside: bool
) -> tuple[Place, str]:
    """The place of a record's image, and what identifies it: its path, or the digest of base64 bytes."""
    if not is_base64(name, folder):
        return image_place(name, folder, where, allow_outside=allow_outside), name
    try:
        data = decoded(name, MAX_IMAGE_BYTES)
    except RecordError as error:
        raise InvalidInput(f"{where}: {error}") from None
    return Embedded(folder, data=data), sha256(data).hexdigest()


def _options(record: Mapping[str, Any]) -> list[str]:
    """The texts of a record's options, up to the first that is empty."""
    if "choices" in record:
        values = record["choices"] if isinstance(record["choices"], list) else []
    else:
        names = [f"choice_{letter.lower()}" if "choice_a" in record else letter for letter in ascii_uppercase]
        values = [record.get(name) for name in names]
    texts = ["" if value is None else str(value) for value in values[: len(ascii_uppercase)]]
    return texts[: texts.index("")] if "" in texts else texts


def _right(answer: Any, count: int) -> int | None:
    """The number of the right option; None if the answer is neither a letter nor a number of one."""
    letters = ascii_uppercase[:count]
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        return letters.index(answer.upper())
    return answer if type(answer) is int and 0 <= answer < count else None


def _category(record: Mapping[str, Any]) -> str:
    """MMBench's category, ScienceQA's subject, SEED-Bench's kind of question."""
    return str(record.get("subject") or record.get("kind") or record.get("category") or "")


def _within(part: str, whole: str) -> bool:
    return fold(part) != fold(whole) and holds(whole, part)
