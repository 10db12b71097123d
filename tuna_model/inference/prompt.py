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

STYLES = ("weights", "words", "list", "candidates")
_DOUBT = (
    "They come from other images and may be wrong: use those that you can see in this image, and ignore the "
    "others."
)


def tag_prompt(
    question: str,
    tags: ImageTags,
    *,
    style: str = "weights",
    temperature: float = 0.1,
    layout: TagLayout | None = None,
    threshold: float = 0.0,
) -> str:
    """Write a question with the tags of its image; without tags, the question alone.

    Args:
        question: the user's; comes last.
        tags: of the image.
        style: `weights` gives each tag its weight as a number, `words` sorts tags into sure and doubtful,
            `list` only names them, `candidates` says that the answer is likely one of them.
        temperature: of the softmax over the layout's signal.
        layout: chooses and orders the tags; its texts are not used.
        threshold: tags with less than this share of the best one's weight are left out.

    Raises:
        InvalidInput: an unknown style, or a temperature that is not positive.
    """
    layout, question = layout or TagLayout(), neutral(question)
    chosen = chosen_tags(tags, layout, temperature=temperature, threshold=threshold)
    lines = tag_lines(chosen, style=style, signal=layout.signal, temperature=temperature)
    return f"{lines}\n\n{question}" if lines else question


def chosen_tags(
    tags: ImageTags, layout: TagLayout, *, temperature: float = 0.1, threshold: float = 0.0
) -> ImageTags:
    """The sound tags that a layout chooses, without those below a share of the best one's weight."""
    chosen = layout.choose(tags)
    if threshold <= 0 or not len(chosen):
        return chosen
    weights = relative_weights(chosen, signal=layout.signal, temperature=temperature)
    return chosen.take(np.flatnonzero(weights >= threshold).tolist())


def tag_lines(
    tags: ImageTags, *, style: str = "weights", signal: str = "relevance", temperature: float = 0.1
) -> str:
    """Write the tags of one image as a sentence or two; empty without tags. See `tag_prompt`."""
    if style not in STYLES:
        raise InvalidInput(f"style '{style}' is not one of {', '.join(STYLES)}")
    if not len(tags):
        return ""
    if style == "candidates":
        return f"The answer is likely one of these, the likeliest first: {', '.join(tags.texts)}."
    if style == "list":
        return f"Similar images carry these tags: {', '.join(tags.texts)}. {_DOUBT}"
    weights = relative_weights(tags, signal=signal, temperature=temperature)
    weighed = list(zip(tags.texts, weights, strict=True))
    if style == "weights":
        named = ", ".join(f"{text} ({weight:.2f})" for text, weight in weighed)
        how = "each with how well it fits this image, from 0 to 1"
        return f"Similar images carry these tags, {how}: {named}. {_DOUBT}"
    sure = [text for text, weight in weighed if weight >= 0.5]
    doubtful = [text for text, weight in weighed if weight < 0.5]
    line = f"Tags that fit this image well: {', '.join(sure)}."
    if doubtful:
        line += f" Tags that fit it less well: {', '.join(doubtful)}."
    return f"{line} {_DOUBT}"


def relative_weights(
    tags: ImageTags, *, signal: str = "relevance", temperature: float = 0.1
) -> NDArray[np.float32]:
    """`[n]`: softmax(signal / temperature), divided by the best tag's. Raises `InvalidInput`."""
    if not temperature > 0:
        raise InvalidInput(f"temperature is {temperature}: it must be positive")
    score = tags.score(signal)
    return np.exp((score - score.max()) / temperature) if len(tags) else score
