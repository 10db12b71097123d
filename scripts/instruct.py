"""Instruction data for `smol`: conversations about captioned photographs and catalogues, and their stores.

    python scripts/instruct.py --data ../shared/data --out runs/instruct --domain fashion

OUT/stores        flickr8k, the DOMAIN's own, and catalogues of the same pictures under invented names, each
                  of half of its pictures and grounded (`tagstore ground`); *-asked hold the other half
OUT/data.jsonl    a conversation a line; its field `store` says whose tags it gets (`tags.store` with {store})
OUT/mix.json      factors of the signals for `tag_mix_grounded`, fitted to which tags are true

A conversation is about a picture of the other half than its store has: what taught the tags' embeddings fits
them better than what comes later. To answer with an invented name a model must read it among the tags: no
weight can know it. The other domain (grocery for fashion, fashion for grocery) is never read: its store can
be swapped in to see what was learnt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from instruct_pictures import (
    Picture,
    Remembering,
    catalogue,
    halves,
    invented,
    make_store,
    path_of,
    photographs,
    retrieved,
)
from instruct_questions import NAMING, UNKNOWN, Photographs, pick, plain_text, product_turns
from numpy.typing import NDArray

from tagstore.client import connect
from tagstore.encoding.encoder import load_encoder
from tagstore.storage.store import Store
from tagstore.types import Retrieval, RetrievedTag
from tagstore.upkeep.reprocessing import ground

PHOTOGRAPHS = "flickr8k"
COPIES = 3
"""Conversations about each photograph."""


class Signals:
    """Signals of retrieved tags, and which of them are true: the learned mix is fitted to them."""

    def __init__(self, *parts: Signals) -> None:
        self.rows: list[NDArray[np.float64]] = [row for part in parts for row in part.rows]
        self.true: list[NDArray[np.bool_]] = [row for part in parts for row in part.true]

    def add(self, answer: Retrieval, own: frozenset[str]) -> None:
        """Add a picture, if some of its tags are true and some are not."""
        votes = max(1, len(answer.neighbours))
        true = np.array([tag.tag.casefold() in own for tag in answer.tags], bool)
        if true.any() and not true.all():
            rows = [(tag.relevance, tag.similarity, tag.votes / votes) for tag in answer.tags]
            self.rows.append(np.array(rows))
            self.true.append(true)

    def fit(self) -> list[float]:
        """Factors of relevance, similarity and vote share: they make it likeliest that a tag which is drawn
        from a picture's softmax is true (a conditional logit)."""
        import torch

        x, true = torch.tensor(np.concatenate(self.rows)), torch.tensor(np.concatenate(self.true))
        picture = torch.repeat_interleave(
            torch.arange(len(self.rows)), torch.tensor([len(row) for row in self.rows])
        )
        factors = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([factors], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            weight = (x @ factors).exp()
            sums = torch.zeros(2, len(self.rows), dtype=torch.float64)
            all_tags = sums[1].index_add(0, picture, weight)
            chance = sums[0].index_add(0, picture, weight * true) / all_tags
            value = -chance.log().mean() + 1e-6 * factors.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return [round(float(factor), 3) for factor in factors.detach()]


def by_relevance(answer: Retrieval) -> list[RetrievedTag]:
    return sorted(answer.tags, key=lambda tag: -tag.relevance)


def sample(key: str, picture: Picture | None, store: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversation = [
        {"from": role, "value": text}
        for question, answer in turns
        for role, text in (("human", question), ("gpt", answer))
    ]
    conversation[0]["value"] = ("<image>\n" if picture else "") + conversation[0]["value"]
    image = {"image": str(picture.path), "store": store} if picture else {}
    return {"id": key, **image, "conversations": conversation}


def without_tags(rng: np.random.Generator, store: str, others: Sequence[str], rate: float) -> str:
    """The store, or at times none, or another one whose tags do not fit."""
    draw = rng.random()
    return "" if draw < rate else pick(rng, others) if draw < 1.5 * rate else store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with flickr8k/, fashion/, grocery/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domain", choices=("fashion", "grocery"), default="fashion")
    parser.add_argument("--photographs", type=int, default=0, help="of Flickr8k; 0 for all")
    parser.add_argument("--plain", type=int, default=380, help="instructions without a picture")
    parser.add_argument("--vectors", type=Path, help="keeps vectors of pictures between runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build(options, np.random.default_rng(options.seed))


def build(options: argparse.Namespace, rng: np.random.Generator) -> None:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    encoder = Remembering(load_encoder("mini", device="cpu"), options.vectors or out / "vectors.npz")
    photos = photographs(options.data, out)
    photos = photos[: options.photographs] if options.photographs else photos
    products = catalogue(options.data, options.domain)
    for name, pictures in ((PHOTOGRAPHS, photos), (options.domain, products)):
        taught, asked = halves(pictures)
        make_store(taught, name, out, encoder)
        make_store(asked, f"{name}-asked", out, encoder)
    catalogues = {options.domain: products} | invented(out, photos, products, rng)
    for name, pictures in catalogues.items():
        make_store(halves(pictures)[0], name, out, encoder)
    for name in (PHOTOGRAPHS, *catalogues):
        if not Store(out / "stores", name).snapshot().version.tag_embeddings:
            ground(out / "stores", name)

    samples: list[dict[str, Any]] = []
    of_photographs, of_products = Signals(), Signals()
    photos = halves(photos)[1]
    snapshot = Store(out / "stores", f"{PHOTOGRAPHS}-asked").snapshot()
    tags_of = {
        tag.tag_id: tag for tag in connect(f"file://{out / 'stores'}/{PHOTOGRAPHS}-asked").vocabulary()
    }
    entries = {path_of(out, entry): entry for entry in snapshot.entries()}
    texts = [[tags_of[tag.tag_id] for tag in entries[str(p.path)].tags] for p in photos]
    own = [frozenset(tag.text.casefold() for tag in row) for row in texts]
    asked_about = Photographs(own)
    strange = [name for name in catalogues if name.startswith("invented")]
    answers = list(retrieved(out, PHOTOGRAPHS, photos))
    for i, (picture, answer) in enumerate(zip(photos, answers, strict=True)):
        of_photographs.add(answer, own[i])
        objects = [tag.text for tag in texts[i] if tag.kind == "object" and " " not in tag.text]
        found = [tag.tag for tag in answer.tags[:40]]
        for copy in range(COPIES):
            turns = asked_about.turns(picture, own[i], objects, found, rng)
            store = without_tags(rng, PHOTOGRAPHS, strange, 0.2)
            samples.append(sample(f"{picture.path.stem}-{copy}", picture, store, turns))
    of_photos = {picture.path for picture in photos}
    for name, pictures in catalogues.items():
        pictures = halves(pictures)[1]
        for picture, answer in zip(pictures, retrieved(out, name, pictures), strict=True):
            of_products.add(answer, frozenset(tag.casefold() for tag in picture.tags.values()))
            turns = product_turns(picture, [tag.tag for tag in by_relevance(answer)], rng)
            if turns:
                samples.append(sample(f"{name}-{picture.path.stem}", picture, name, turns))
            if rng.random() < 0.04:
                turns = [(pick(rng, NAMING), UNKNOWN)]
                store = pick(rng, ["", PHOTOGRAPHS]) if picture.path not in of_photos else ""
                samples.append(sample(f"{name}-{picture.path.stem}-none", picture, store, turns))
    pairs = plain_text(options.plain, rng, out)
    samples += [sample(f"plain-{i}-{n}", None, "", [pair]) for n in range(3) for i, pair in enumerate(pairs)]
    order = rng.permutation(len(samples))
    with (out / "data.jsonl").open("w") as file:
        file.writelines(json.dumps(samples[i]) + "\n" for i in order)
    both = Signals(of_photographs, of_products)
    mixes = {"photographs": of_photographs.fit(), "products": of_products.fit(), "both": both.fit()}
    (out / "mix.json").write_text(json.dumps(mixes))
    print(f"{len(samples)} conversations; factors of relevance, similarity, vote share: {mixes}")


if __name__ == "__main__":
    main()
