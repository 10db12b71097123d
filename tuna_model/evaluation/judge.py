"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions.

Prompt and scale are those of LLaVA-Bench (Liu et al., "Visual Instruction Tuning", NeurIPS 2023): the judge
reads the question, a description of the image and two answers, and gives each answer a mark from 1 to 10. It
is asked twice with the answers swapped, since judges prefer the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from tagstore.errors import InvalidInput
from tuna_model.evaluation.chat_endpoint import ChatEndpoint
from tuna_model.processing.foreign_text import neutral

_PROMPT = """[Context]
{context}

[Question]
{question}

[Assistant 1]
{first}

[End of Assistant 1]

[Assistant 2]
{second}

[End of Assistant 2]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user \
question displayed above. The user asks the question on observing an image. For your reference, the \
visual content in the image is represented by the description above. Please rate the helpfulness, \
relevance, accuracy, level of details of their responses. Each assistant receives an overall score on a \
scale of 1 to 10, where a higher score indicates better overall performance. Please first output a single \
line containing only two values indicating the scores for Assistant 1 and 2, respectively. The two scores \
are separated by a space. In the subsequent line, please provide a comprehensive explanation of your \
evaluation, avoiding any potential bias and ensuring that the order in which the responses were presented \
does not affect your judgment."""
_SCORES = re.compile(r"^\s*(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)", re.MULTILINE)


class Judge(Protocol):
    """Gives marks to two answers to one question."""

    def marks(self, *, context: str, question: str, first: str, second: str) -> tuple[float, float]:
        """Marks from 1 to 10 for the two answers. Raises `Unavailable` if the judge does not answer."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAIJudge:
    """A judge behind an endpoint."""

    endpoint: ChatEndpoint

    def marks(self, *, context: str, question: str, first: str, second: str) -> tuple[float, float]:
        """See `Judge`."""
        first_mark, second_mark = self._ask(context, question, first, second)
        second_swapped, first_swapped = self._ask(context, question, second, first)
        return (first_mark + first_swapped) / 2, (second_mark + second_swapped) / 2

    def _ask(self, context: str, question: str, first: str, second: str) -> tuple[float, float]:
        texts = {"context": context, "question": question, "first": first, "second": second}
        prompt = _PROMPT.format(**{name: neutral(text) for name, text in texts.items()})
        return parse_marks(self.endpoint.complete(prompt, temperature=0).text)


def parse_marks(text: str) -> tuple[float, float]:
    """Read the two marks in a judge's answer. Raises `InvalidInput` if there are none, with the answer."""
    if match := _SCORES.search(text):
        first, second = float(match[1]), float(match[2])
        if 1 <= first <= 10 and 1 <= second <= 10:
            return first, second
    raise InvalidInput(f"the judge gave no two marks from 1 to 10: {text[:120]!r}")
