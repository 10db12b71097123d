"""Why the model says what it says, as one self-contained page: what it saw, which tags it was given with which weight, where each tag
looked, which pictures the tags came from, and what it would have said without them.

    page = explain(Pipeline.load("smol", store=URL), "picture.jpg", "What is on the table?")
    Path("why.html").write_text(page)
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Sample
from tagstore.types import Retrieval
from tuna_model.inference.pipeline import Pipeline, user_message
from tuna_model.processing.image_processor import upright
from tuna_model.processing.tags import ImageTags, TagLayout

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class SeenTag:
    """A tag on the page."""

    text: str
    weight: float
    relevance: float
    similarity: float
    votes: float
    heat: NDArray[np.float32]
    """`[side, side]`, attention over the patches; sums to 1."""
    neighbours: tuple[int, ...]
    """Places in the list of neighbours of those that carry it."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that the page shows."""

    question: str
    answers: Mapping[str, str]
    """What the model says "with tags", "without tags", 'without the tag "..."'."""
    seen: Image.Image
    """What the tower saw: the picture as it was cut and scaled."""
    tags: tuple[SeenTag, ...]
    retrieval: Retrieval | None
    degraded: bool


def examine(
    tuna: Pipeline, image: Any, question: str, *, ban: Sequence[str] = (), **generation: Any
) -> Explanation:
    """Look at one picture and ask one question, in several ways.

    Args:
        ban: tags to leave out for one more answer; the heaviest tag if none is named.
        generation: options of `generate`.

    Raises:
        InvalidInput: `ban` names a tag that the picture was not given.
    """
    picture = upright(image)
    conversation = [user_message(question, 1)]
    pixels = tuna.processor.image_processor([picture])["pixel_values"].to(tuna.model.device)
    _, vectors = tuna.model.encode_images(pixels)
    nothing = ImageTags.none(tuna.model.config.tag_dimension)
    given, retrieval = nothing, None
    before = tuna.lookup.degraded
    if vectors is not None and tuna.model.config.tags:
        given, retrieval = tuna.lookup.detailed(vectors, tuna.model.config.encoder_digest)[0]
    prepared = tuna.prepare([[picture]], [conversation], tags=[given])
    chosen = TagLayout(**tuna.processor.layout).choose(given)
    heats = _attention(tuna, prepared.inputs, len(chosen))
    places = {n.entry_id: i for i, n in enumerate(retrieval.neighbours)} if retrieval is not None else {}
    carriers = {tag.tag_id: tag.neighbours for tag in retrieval.tags} if retrieval is not None else {}
    tags = tuple(
        SeenTag(
            tag.text, tag.weight, tag.relevance, tag.similarity, tag.votes, heat,
            tuple(places[i] for i in carriers.get(tag_id, ()) if i in places),
        )
        for tag, heat, tag_id in zip(prepared.tags[0], heats, chosen.ids, strict=True)
    )  # fmt: skip
    banned = list(ban) or [tag.text for tag in sorted(tags, key=lambda tag: -tag.weight)[:1]]
    if unknown := set(banned) - {tag.text for tag in tags}:
        raise InvalidInput(
            f"the picture was not given the tag {', '.join(sorted(unknown))}: it has {', '.join(tag.text for tag in tags)}"
        )
    ways: dict[str, ImageTags] = {"with tags": chosen} if tags else {}
    ways["without tags"] = nothing
    for text in banned:
        ways[f"without the tag “{text}”"] = chosen.take(
            [i for i, one in enumerate(chosen.texts) if one != text]
        )
    answers = {
        name: tuna.answers([[picture]], [conversation], tags=[some], **generation)[0].text
        for name, some in ways.items()
    }
    return Explanation(question, answers, _seen(tuna, pixels), tags, retrieval, tuna.lookup.degraded > before)


def explain(
    tuna: Pipeline,
    image: Any,
    question: str,
    *,
    ban: Sequence[str] = (),
    samples: Sequence[Sample] = (),
    name: str = "",
    **generation: Any,
) -> str:
    """The page as HTML.

    Args:
        image: a path, encoded bytes or a PIL image.
        ban: see `examine`.
        samples: the data set that the store was made of: pictures and captions of the neighbours come from it, by key. A store keeps no
            pictures.
        name: of the model, for the page.
        generation: options of `generate`.
    """
    import jinja2

    found = examine(tuna, image, question, ban=ban, **generation)
    known = {sample.key: sample for sample in samples}
    neighbours = [
        {
            "key": one.key,
            "similarity": one.similarity,
            "captions": known[one.key].captions if one.key in known else (),
            "source": data_url(upright(known[one.key].images[0].read()), 200)
            if one.key in known and known[one.key].images
            else "",
        }
        for one in (found.retrieval.neighbours if found.retrieval is not None else ())
    ]
    heaviest = max((tag.weight for tag in found.tags), default=1.0) or 1.0
    tags = [
        {
            "tag": tag,
            "share": tag.weight / heaviest,
            "heat": heat_url(tag.heat),
            "carriers": [i + 1 for i in tag.neighbours],
        }
        for tag in found.tags
    ]
    config = tuna.model.config
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("explain.html.j2").render(
        question=question,
        answers=found.answers,
        picture=data_url(found.seen, 448),
        tags=tags,
        neighbours=neighbours,
        degraded=found.degraded,
        error=tuna.lookup.last_error,
        facts={
            "model": name,
            "encoder": f"{config.encoder} ({config.encoder_digest})",
            "store": f"{found.retrieval.store}@{found.retrieval.version}"
            if found.retrieval is not None
            else "none",
            "weights": f"{config.tag_signal}, temperature {config.tag_temperature:g}, {config.tag_coupling}",
        },
    )


def _attention(tuna: Pipeline, inputs: Mapping[str, Any], tags: int) -> list[NDArray[np.float32]]:
    """Where each tag looked, `[side, side]`; of a tag with several queries (one a word) their mean."""
    if not tags:
        return []
    with torch.inference_mode():
        attention = tuna.model(**inputs, output_tag_attention=True, logits_to_keep=1).tag_attention
    rows: NDArray[np.float32] = attention.float().cpu().numpy()
    if "tag_lengths" in inputs:
        ends = np.cumsum([0, *inputs["tag_lengths"].tolist()])
        rows = np.stack([rows[a:b].mean(axis=0) for a, b in pairwise(ends)])
    side = round(rows.shape[1] ** 0.5)
    return [row.reshape(side, side) for row in rows]


def _seen(tuna: Pipeline, pixels: torch.Tensor) -> Image.Image:
    """Normalised pixels back to a picture."""
    prepare = tuna.processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepare.mean, prepare.std))
    values = ((pixels[0].float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def data_url(picture: Image.Image, side: int) -> str:
    """A picture within a page, at most `side` pixels wide and high."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat_url(heat: NDArray[np.float32]) -> str:
    """A heat map to lie over the picture: the hotter, the more orange and the less transparent. It is stretched smoothly by the browser."""
    share = heat / max(float(heat.max()), 1e-9)
    rgba = np.zeros((*heat.shape, 4), np.uint8)
    rgba[..., :3] = (226, 88, 34)
    rgba[..., 3] = np.round(200 * share).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(rgba).resize((112, 112), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
