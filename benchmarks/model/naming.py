"""Does a model name what a swapped-in store knows? Beside the baselines that need no training.

    python -m benchmarks.model.naming --model smol --data ../shared/data/grocery --out /tmp/naming

DATA is a catalogue: items.csv with image, name and split. Its pictures of split train become the store
OUT/stores, each with its name as tag; the questions, OUT/questions.jsonl, are what `PROMPTS` asks about the
first picture of every name in split test. All rows answer the same questions with the same tags: the model
with the store, the model without, SmolLM2 as it comes with the tags as words in its prompt, and the first tag
by votes, by similarity, and as the model orders them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.report import arguments_parser, table, write
from tagstore.ingestion import ingest
from tagstore.mining import load_miner
from tagstore.storage.store import Store
from tagstore.upkeep.reprocessing import ground
from tuna_model import ImageTags, Pipeline
from tuna_model.cli.options import load
from tuna_model.evaluation.answerer import PipelineAnswerer
from tuna_model.evaluation.naming import naming
from tuna_model.evaluation.questions import Question, TaskAnswer
from tuna_model.evaluation.tasks import TaskOptions, load_task
from tuna_model.inference.prompt import tag_prompt
from tuna_model.presets import smollm
from tuna_model.processing.tags import TagLayout

MAX_TOKENS = 24
PROMPTS = (
    "What product is this?",
    "Which product is shown in this picture?",
    "What is this product called?",
)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--model", default="smol", help="a preset, a directory or a run")
    parser.add_argument("--data", type=Path, required=True, help="folder with items.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for store and questions; used again")
    parser.add_argument(
        "--ground", action="store_true", help="learn the store's tags from its pictures first"
    )
    parser.add_argument("--limit", type=int, default=0, help="the first so many questions; 0 for all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help="write the report to benchmarks/results")
    options = parser.parse_args()
    store, questions = prepare(options.data.resolve(), options.out)
    if (
        options.ground
        and not Store(options.out / "stores", options.data.name).snapshot().version.tag_embeddings
    ):
        ground(options.out / "stores", options.data.name)
    task = load_task("naming", TaskOptions(questions, limit=options.limit, allow_outside=True))
    tuna = load(options.model, store, True, 60.0, "cpu", "fp32")
    asked = list(task.questions)
    tags = looked_up(tuna, asked, options.batch)
    nothing = [ImageTags.none(tuna.model.config.tag_dimension)] * len(asked)
    chosen = TagLayout(**tuna.processor.layout)
    rows = {
        "the model with the store": answers(tuna, asked, tags, options.batch),
        "the model without": answers(tuna, asked, nothing, options.batch),
        "SmolLM2, tags as words": as_words(asked, tags, chosen, options.batch),
    }
    rows |= {f"first tag by {name}": first(tags, order) for name, order in ORDERS.items()}
    rows["first tag as the model orders them"] = [TaskAnswer(text(chosen.choose(t))) for t in tags]
    names = [str(question.truth["name"]) for question in asked]
    images = [question.image_key for question in asked]
    lines = []
    for label, given in rows.items():
        with_tags = [
            TaskAnswer(answer.text, chosen.choose(t).texts) for answer, t in zip(given, tags, strict=True)
        ]
        metrics = {metric.name: metric for metric in naming(with_tags, names, images)}
        cells = [
            f"{m.value:.3f} ({m.low:.3f} to {m.high:.3f})" if (m := metrics.get(name)) else "-"
            for name in ("named", "named if among tags", "name among tags")
        ]
        lines.append([label, *cells])
    header = ["answers of", "named", "named if among tags", "name among tags"]
    kind = "grounded store" if options.ground else "store"
    title = f"Names by lookup: {options.model}, {kind} {options.data.name}"
    about = f"{len(asked)} questions on {len(set(images))} images, greedy; 95 % intervals over images."
    write("naming", title, about, table(header, lines), packages=("torch", "transformers"), keep=options.keep)


def prepare(data: Path, out: Path) -> tuple[str, Path]:
    """Make store and questions of a catalogue; returns the store's URL and the file of questions."""
    questions, root = out / "questions.jsonl", out / "stores"
    url = f"file://{root.resolve()}/{data.name}"
    if questions.exists():
        return url, questions
    out.mkdir(parents=True, exist_ok=True)
    with (data / "items.csv").open(newline="") as file:
        rows = [row | {"image": str(data / row["image"])} for row in csv.DictReader(file)]
    table_of = out / "train.jsonl"
    with table_of.open("w") as file:
        for row in rows:
            if row["split"] == "train":
                record = {"image": row["image"], "captions": [row["name"]], "name": row["name"]}
                file.write(json.dumps(record) + "\n")
    miner = load_miner("metadata", columns="name")
    ingest(str(table_of), root=root, store=data.name, encoder="mini", miner=miner, allow_outside=True)
    first = {row["name"]: row for row in reversed(rows) if row["split"] == "test"}
    with questions.open("w") as file:
        for name, row in sorted(first.items()):
            for number, prompt in enumerate(PROMPTS):
                key = f"{Path(row['image']).stem}-{number}"
                record = {"question_id": key, "image": row["image"], "text": prompt, "name": name}
                file.write(json.dumps(record) + "\n")
    return url, questions


Order = Callable[[ImageTags, int], tuple[float, ...]]
ORDERS: dict[str, Order] = {
    "votes": lambda tags, i: (tags.vote_share[i], tags.similarity[i]),
    "similarity": lambda tags, i: (tags.similarity[i],),
    "relevance": lambda tags, i: (tags.relevance[i],),
}


def text(tags: ImageTags) -> str:
    return tags.texts[0] if len(tags) else ""


def first(tags: Sequence[ImageTags], order: Order) -> list[TaskAnswer]:
    """The tag of each image that an order puts first."""
    return [
        TaskAnswer(t.texts[max(range(len(t)), key=lambda i: order(t, i))] if len(t) else "") for t in tags
    ]


def looked_up(tuna: Pipeline, asked: Sequence[Question], batch: int) -> list[ImageTags]:
    """The store's tags of each question's image."""
    tags: list[ImageTags] = []
    for start in range(0, len(asked), batch):
        pixels = tuna.processor.image_processor([q.image.read() for q in asked[start : start + batch]])
        _, vectors = tuna.model.encode_images(pixels["pixel_values"])
        tags += tuna.lookup(vectors, tuna.model.config.encoder_digest)
    return tags


def answers(
    tuna: Pipeline, asked: Sequence[Question], tags: Sequence[ImageTags], batch: int
) -> list[TaskAnswer]:
    """The model's answers with given tags."""
    answerer, given = PipelineAnswerer(tuna), []
    for start in range(0, len(asked), batch):
        part = slice(start, start + batch)
        given += answerer.answer(asked[part], max_new_tokens=MAX_TOKENS, tags=tags[part])
    return given


def as_words(
    asked: Sequence[Question], tags: Sequence[ImageTags], layout: TagLayout, batch: int
) -> list[TaskAnswer]:
    """The answers of the decoder as it comes, with the tags named in the prompt and no image."""
    model, tokenizer, given = smollm.load().eval(), smollm.tokenizer(), []
    tokenizer.padding_side = "left"
    prompts = [
        tag_prompt(question.text, t, style="list", layout=layout)
        for question, t in zip(asked, tags, strict=True)
    ]
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        given += [TaskAnswer(answer) for answer in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return given


if __name__ == "__main__":
    main()
