"""Tags for any vision-language model, without training: weighed tags as text before the question. numpy only.

Tags and question are foreign text: what could be a special token of any decoder is taken apart.

text = tag_prompt("What wine is this?", tags)       # send it with the picture to any served model
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tuna_model.processing.foreign_text import neutral
from tuna_model.processing.tags import ImageTags, TagLayout

STYLES = ("weights", "words", "list")


def tag_prompt(
    question: str,
    tags: ImageTags,
    *,
    style: str = "weights",
    temperature: float = 0.1,
    layout: TagLayout | None = None,
) -> str:
    """Write a question with the tags of its image; without tags, the question alone.

    Args:
        question: the user's; comes last.
        tags: of the image.
        style: `weights` gives each tag its weight as a number, `words` sorts tags into sure and doubtful,
            `list` only names them.
        temperature: of the softmax over the layout's signal.
        layout: chooses and orders the tags; its texts are not used.

    Raises:
        InvalidInput: an unknown style, or a temperature that is not positive.
    """
    if style not in STYLES:
        raise InvalidInput(f"style '{style}' is not one of {', '.join(STYLES)}")
    question = neutral(question)
    layout = layout or TagLayout()
    chosen = layout.choose(tags)
    if not len(chosen):
        return question
    weights = relative_weights(chosen, signal=layout.signal, temperature=temperature)
    weighed = list(zip(chosen.texts, weights, strict=True))
    if style == "weights":
        named = ", ".join(f"{text} ({weight:.2f})" for text, weight in weighed)
        lines = (
            f"Similar images carry these tags, each with how well it fits this image, from 0 to 1: {named}."
        )
    elif style == "list":
        lines = f"Similar images carry these tags: {', '.join(chosen.texts)}."
    else:
        sure = [text for text, weight in weighed if weight >= 0.5]
        doubtful = [text for text, weight in weighed if weight < 0.5]
        lines = f"Tags that fit this image well: {', '.join(sure)}."
        if doubtful:
            lines += f" Tags that fit it less well: {', '.join(doubtful)}."
    advice = "use those that you can see in this image, and ignore the others."
    return f"{lines} They come from other images and may be wrong: {advice}\n\n{question}"


def relative_weights(
    tags: ImageTags, *, signal: str = "relevance", temperature: float = 0.1
) -> NDArray[np.float32]:
    """`[n]`: softmax(signal / temperature), divided by the best tag's. Raises `InvalidInput`."""
    if not temperature > 0:
        raise InvalidInput(f"temperature is {temperature}: it must be positive")
    score = tags.score(signal)
    return np.exp((score - score.max()) / temperature) if len(tags) else score
