"""One self-contained page that explains an answer: the picture as the model saw it, its tags with their
weights and attention, the pictures that the tags came from, and the answers without tags.

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
from tagstore.types import Provenance, Retrieval
from tuna_model.inference.conversations import user_message
from tuna_model.inference.pipeline import Pipeline
from tuna_model.processing.image_processor import upright
from tuna_model.processing.tags import ImageTags, TagLayout

MAX_PLACES = 3
"""Places that the page shows of a tag."""
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class ExplainedTag:
    """A tag on the page."""

    text: str
    weight: float
    relevance: float
    similarity: float
    vote_share: float
    heat: NDArray[np.float32]
    """`[side, side]`, attention over the patches; sums to 1."""
    neighbours: tuple[int, ...]
    """Positions of the neighbours that carry it, in the list of neighbours."""
    places: tuple[Provenance, ...] = ()
    """Where it was read: the words, their caption, the miner. Empty from a store that does not say."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The content of the page."""

    question: str
    answers: Mapping[str, str]
    """Answers "with tags", "without tags", "without the tag ..."."""
    seen: Image.Image
    """The picture as the tower saw it: cropped and scaled."""
    tags: tuple[ExplainedTag, ...]
    retrieval: Retrieval | None
    degraded: bool


def examine(
    tuna: Pipeline, image: Any, question: str, *, ban: Sequence[str] = (), **generation: Any
) -> Explanation:
    """Ask one question about one picture, with and without tags.

    Args:
        ban: tags to leave out, one at a time, for further answers; the heaviest tag if none is named.
        generation: options of `generate`.

    Raises:
        InvalidInput: `ban` names a tag that the picture was not given.
    """
    picture = upright(image)
    conversation = [user_message(question, 1)]
    pixels = tuna.processor.image_processor([picture])["pixel_values"].to(tuna.model.device)
    _, vectors = tuna.model.encode_images(pixels)
    no_tags = ImageTags.none(tuna.model.config.tag_dimension)
    given, retrieval = no_tags, None
    before = tuna.lookup.degraded
    if vectors is not None and tuna.model.config.tags:
        given, retrieval = tuna.lookup.detailed(
            vectors, tuna.model.config.encoder_digest, with_provenance=True
        )[0]
    prepared = tuna.prepare([[picture]], [conversation], tags=[given])
    chosen = TagLayout(**tuna.processor.layout).choose(given)
    heats = _attention(tuna, prepared.inputs, len(chosen))
    positions = {n.entry_id: i for i, n in enumerate(retrieval.neighbours)} if retrieval is not None else {}
    carriers = {tag.tag_id: tag.neighbours for tag in retrieval.tags} if retrieval is not None else {}
    places = {tag.tag_id: retrieval.why(tag) for tag in retrieval.tags} if retrieval is not None else {}
    tags = tuple(
        ExplainedTag(
            tag.text, tag.weight, tag.relevance, tag.similarity, tag.vote_share, heat,
            tuple(positions[i] for i in carriers.get(tag_id, ()) if i in positions), places.get(tag_id, ()),
        )
        for tag, heat, tag_id in zip(prepared.tags[0], heats, chosen.ids, strict=True)
    )  # fmt: skip
    banned = list(ban) or [tag.text for tag in sorted(tags, key=lambda tag: -tag.weight)[:1]]
    if unknown := set(banned) - {tag.text for tag in tags}:
        raise InvalidInput(
            f"the picture was not given the tag {', '.join(sorted(unknown))}: "
            f"it has {', '.join(tag.text for tag in tags)}"
        )
    variants: dict[str, ImageTags] = {"with tags": chosen} if tags else {}
    variants["without tags"] = no_tags
    for banned_text in banned:
        rows = [i for i, text in enumerate(chosen.texts) if text != banned_text]
        variants[f"without the tag “{banned_text}”"] = chosen.take(rows)
    answers = {
        name: tuna.answers([[picture]], [conversation], tags=[variant], **generation)[0].text
        for name, variant in variants.items()
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
    """Write the page as HTML.

    Args:
        image: a path, encoded bytes or a PIL image.
        ban: see `examine`.
        samples: the data set that the store was made of, with pictures and captions of the neighbours by key.
            A store keeps no pictures.
        name: of the model, for the page.
        generation: options of `generate`.
    """
    import jinja2

    explanation = examine(tuna, image, question, ban=ban, **generation)
    retrieval, config = explanation.retrieval, tuna.model.config
    known = {sample.key: sample for sample in samples}
    neighbours = []
    for neighbour in retrieval.neighbours if retrieval is not None else ():
        sample = known.get(neighbour.key)
        pictures = sample.images if sample is not None else ()
        neighbours.append(
            {
                "key": neighbour.key,
                "similarity": neighbour.similarity,
                "captions": sample.captions if sample is not None else (),
                "source": data_url(upright(pictures[0].read()), 200) if pictures else "",
            }
        )
    heaviest = max((tag.weight for tag in explanation.tags), default=1.0) or 1.0
    tags = [
        {
            "tag": tag,
            "share": tag.weight / heaviest,
            "heat": heat_url(tag.heat),
            "carriers": [i + 1 for i in tag.neighbours],
            "places": tag.places[:MAX_PLACES],
        }
        for tag in explanation.tags
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("explain.html.j2").render(
        question=question,
        answers=explanation.answers,
        picture=data_url(explanation.seen, 448),
        tags=tags,
        neighbours=neighbours,
        degraded=explanation.degraded,
        error=tuna.lookup.last_error,
        facts={
            "model": name,
            "encoder": f"{config.encoder} ({config.encoder_digest})",
            "store": f"{retrieval.store}@{retrieval.version}" if retrieval is not None else "none",
            "weights": f"{config.tag_signal}, temperature {config.tag_temperature:g}, {config.tag_coupling}",
        },
    )


def _attention(tuna: Pipeline, inputs: Mapping[str, Any], tags: int) -> list[NDArray[np.float32]]:
    """Attention of each tag, `[side, side]`; with a query for each word, their mean."""
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
    """Encode a picture, at most `side` pixels wide and high, as a data: URL."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat_url(heat: NDArray[np.float32]) -> str:
    """Encode a heat map to lie over the picture: the hotter, the less transparent. The browser stretches it
    smoothly."""
    share = heat / max(float(heat.max()), 1e-9)
    rgba = np.zeros((*heat.shape, 4), np.uint8)
    rgba[..., :3] = (226, 88, 34)
    rgba[..., 3] = np.round(200 * share).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(rgba).resize((112, 112), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
