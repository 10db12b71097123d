"""The whole way: pictures -> `tagstore ingest` -> `tagstore serve` -> tags of unseen pictures -> TUNA.

    make demo                 the pictures of Debian's tuxpaint-stamps-default
    make demo DATA=path       anything that `tagstore ingest` can read

Some pictures are held out, the others become the store, which learns its tags from them. Each held-out
picture gets three answers: TUNA's with its tags and without, and that of the bare language model which reads
the tags as words. Ends with a table and one self-contained page, OUT/index.html.
"""

from __future__ import annotations

import argparse
import base64
import glob
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from tagstore.client import connect
from tagstore.encoding.images import decode
from tagstore.errors import BadImage, InvalidInput, TagstoreError, Unavailable
from tagstore.mining import mine
from tagstore.readers import Columns, read
from tagstore.types import Pair, Retrieval, RetrievedTag, StoreInfo
from tuna_model.evaluation.naming import holds

sys.path.insert(0, str(Path(__file__).parent))
from fetch_stamps import PACKAGE, NoPictures, fetch

HELD_OUT = 40
AT_ONCE = 20
"""Pictures that are answered together."""
ANSWER_TOKENS = 16
QUESTION = "What is this?"
"""One of the questions that `smol` learnt to answer with its tags."""
STORE = "demo"
TAGSTORE = (sys.executable, "-m", "tagstore.cli")
SHOWN_TAGS = 10
HUES = (
    "#8a6f9e", "#c9a227", "#5b8fb9", "#a3a38f", "#c4683a", "#2e7f79", "#b5838d", "#6d8b4f", "#3d405b",
    "#d98c5f",
)  # fmt: skip
console = Console()


@dataclass(frozen=True)
class Asked:
    """A held-out picture and what the store answered."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    retrieval: Retrieval
    answers: tuple[str, str, str] | None = None
    """TUNA's with the tags and without, and the bare language model's with the tags as words."""
    things: frozenset[str] = frozenset()
    """What its own description names."""


def main() -> None:
    options = _parser().parse_args()
    out: Path = options.out
    columns = Columns(options.image_column, tuple(options.caption_column), options.key_column)
    try:
        if options.data is None:
            console.print(f"[dim]pictures of {PACKAGE}, kept in {out}/pictures[/dim]")
        source = options.data or str(fetch(out / "pictures"))
        asked, info, seconds, common = run(source, options.format, columns, out)
    except (TagstoreError, NoPictures) as error:
        sys.exit(f"error: {error}")
    print_table(asked)
    print_answers(asked)
    page = out / "index.html"
    origin = f"Debian package {PACKAGE} (Tux Paint)" if options.data is None else options.data
    page.write_text(
        render(asked, info, seconds, origin, lambda key: picture(out / "train", key), common),
        encoding="utf-8",
    )
    size = f"{page.stat().st_size / 1e6:.1f} MB"
    console.print(f"\n{summary(asked, common)}\nThe page: [bold]{page}[/bold]  ({size}, self-contained)")


def run(
    source: str, format: str | None, columns: Columns, out: Path
) -> tuple[list[Asked], StoreInfo, dict[str, float], str]:
    """Split, ingest, serve, query. Returns the answers, the store's info, the seconds of each stage, and the
    most frequent tag of the store."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter()
    held_out = split(source, format, columns, out / "train", out / "heldout")
    seconds["split"] = time.perf_counter() - clock
    root = out / "stores"
    shutil.rmtree(root, ignore_errors=True)
    seconds |= ingest(out / "train", root)
    clock = time.perf_counter()
    ground(root)
    seconds["learn tags"] = time.perf_counter() - clock
    clock = time.perf_counter()
    with serving(root) as address:
        seconds["start server"] = time.perf_counter() - clock
        url = f"grpc://{address}/{STORE}"
        console.print(f"[bold]$[/bold] python: connect({url!r}).retrieve(images, k=5)")
        with connect(url) as tags:
            clock = time.perf_counter()
            answers = tags.retrieve([pair.image for pair in held_out], k=5)
            seconds["ask"] = time.perf_counter() - clock
            info = tags.info()
            common = max(tags.vocabulary(), key=lambda tag: tag.count, default=None)
        things = mine(" ".join(pair.captions) for pair in held_out)
        asked = [
            Asked(
                pair.key, pair.image, pair.captions, answer,
                things=frozenset(tag.text for tag in own if tag.kind in ("object", "entity")),
            )
            for pair, answer, own in zip(held_out, answers, things, strict=True)
        ]  # fmt: skip
        # the surest first
        asked.sort(key=lambda one: -max((n.similarity for n in one.retrieval.neighbours), default=0))
        clock = time.perf_counter()
        asked = answered(asked, url)
        seconds["answer"] = time.perf_counter() - clock
    return asked, info, seconds, common.text if common else ""


def answered(asked: Sequence[Asked], url: str) -> list[Asked]:
    """Add the three answers about each picture; TUNA looks its tags up at `url` itself."""
    from tuna_model import ImageTags, Pipeline

    console.print(
        f"[bold]$[/bold] tuna generate --model smol --store {url} PICTURE {shlex.quote(QUESTION)}",
        soft_wrap=True,
    )
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    done: list[Asked] = []
    with console.status("the model loads") as status:
        tuna = Pipeline.load("smol", store=url)
        for start in range(0, len(asked), AT_ONCE):
            part = asked[start : start + AT_ONCE]
            pictures, questions = [[one.image] for one in part], [question] * len(part)
            nothing = [ImageTags.none(tuna.model.config.tag_dimension)] * len(part)
            grounded = tuna.answers(pictures, questions, max_new_tokens=ANSWER_TOKENS)
            if any(answer.degraded for answer in grounded):
                raise Unavailable(
                    f"the store at {url} did not answer in time: is the machine very busy? Try again"
                )
            plain = tuna.answers(pictures, questions, tags=nothing, max_new_tokens=ANSWER_TOKENS)
            texts = zip(grounded, plain, in_words(part), strict=True)
            done += [
                replace(one, answers=(a.text, b.text, c)) for one, (a, b, c) in zip(part, texts, strict=True)
            ]
            status.update(f"the model answers: {len(done)} of {len(asked)} pictures")
    return done


def in_words(asked: Sequence[Asked]) -> list[str]:
    """What SmolLM2, as it comes, says to the tags as words; it sees no picture."""
    import torch

    from tuna_model.inference.tag_style import TagStyle
    from tuna_model.presets import smollm

    style, model, tokenizer = TagStyle(style="list"), smollm.load().eval(), smollm.tokenizer()
    tokenizer.padding_side = "left"
    lines = [style.line(style.choose(one.retrieval)) for one in asked]
    chats = [[{"role": "user", "content": f"{line}\n\n{QUESTION}"}] for line in lines]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def split(source: str, format: str | None, columns: Columns, train: Path, heldout: Path) -> list[Pair]:
    """Write a source as two folders of pictures with .txt, and return the pairs of the second folder.

    It holds `HELD_OUT` pictures, or a tenth if that is less, always the same ones: a reservoir sample, so one
    pass is enough and only these pictures are in memory.
    """
    for folder in (train, heldout):
        shutil.rmtree(folder, ignore_errors=True)
    chance = random.Random(0)
    reservoir: list[Pair] = []
    count = rejected = 0
    for item in track(
        read(source, format=format, columns=columns), "reading", console=console, transient=True
    ):
        if not isinstance(item, Pair):
            rejected += 1
            continue
        count += 1
        place = len(reservoir) if len(reservoir) < HELD_OUT else chance.randrange(count)
        if place >= HELD_OUT:
            write(train, item)
        elif place == len(reservoir):
            reservoir.append(item)
        else:
            write(train, reservoir[place])
            reservoir[place] = item
    chance.shuffle(reservoir)
    keep = min(HELD_OUT, max(1, count // 10))
    for pair in reservoir[keep:]:
        write(train, pair)
    held_out = sorted((pair for pair in reservoir[:keep] if _decodes(pair)), key=lambda pair: pair.key)
    if count < 2 or not held_out:
        raise InvalidInput(
            f"{source}: the demo needs at least two captioned pictures, one to hold out and one to find; "
            f"there are {count}"
        )
    for pair in held_out:
        write(heldout, pair)
    console.print(
        f"{count} pairs, {len(held_out)} of them held out"
        + (f"; {rejected} could not be used" if rejected else "")
    )
    return held_out


def write(folder: Path, pair: Pair) -> None:
    """Put a pair into a folder source, under a name made of its key."""
    name = re.sub(r"[^\w/-]+", "_", pair.key)[-60:].strip("/") or "picture"
    signatures = {b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"II*\0": ".tif", b"MM\0*": ".tif"}
    path, number = folder / (name + signatures.get(pair.image[:4], ".jpg")), 1
    while path.with_suffix(".txt").exists():
        number += 1
        path = path.with_stem(f"{Path(name).name}-{number}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pair.image)
    path.with_suffix(".txt").write_text(
        "\n".join(" ".join(caption.split()) for caption in pair.captions), encoding="utf-8"
    )


def ingest(source: Path, root: Path) -> dict[str, float]:
    """Run `tagstore ingest`. Returns the seconds by stage."""
    command = ("ingest", str(source), "--root", str(root), "--store", STORE)
    console.print(f"[bold]$[/bold] tagstore {shlex.join(command)}", soft_wrap=True)
    done = subprocess.run([*TAGSTORE, *command, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise TagstoreError("tagstore ingest failed; its reason is above")
    report = json.loads(done.stdout)
    console.print(f"{report['entries']} entries, {report['tags']} tags, {report['unique_tags']} unique tags")
    return {stage: spent for stage, spent in report["seconds"].items() if stage != "total"}


def ground(root: Path) -> None:
    """Run `tagstore ground`: relevance then tells how much a picture looks like those that carry a tag."""
    url = f"file://{root.resolve()}/{STORE}"
    console.print(f"[bold]$[/bold] tagstore ground {url}", soft_wrap=True)
    done = subprocess.run([*TAGSTORE, "ground", url], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise TagstoreError("tagstore ground failed; its reason is above")


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Run `tagstore serve` on a free port; gives HOST:PORT."""
    command = ("serve", "--root", str(root), "--address", "127.0.0.1:0")
    console.print(f"[bold]$[/bold] tagstore {shlex.join(command)}", soft_wrap=True)
    with subprocess.Popen([*TAGSTORE, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise Unavailable("tagstore serve did not start; its reason is above")
            yield address
        finally:
            process.terminate()


def print_table(asked: Sequence[Asked]) -> None:
    """Print a row for each picture; tags that its own description names are green."""
    table = Table(
        "picture",
        "its own description",
        "retrieved tags · votes",
        box=None,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    for one in asked:
        tags = [
            f"[green]{escape(tag.tag)}·{tag.votes}[/green]"
            if named(tag, one.captions)
            else f"{escape(tag.tag)}[dim]·{tag.votes}[/dim]"
            for tag in one.retrieval.tags[:5]
        ]
        table.add_row(escape(one.key.rpartition("/")[2]), escape(one.captions[0]), ", ".join(tags))
    console.print(table)


def print_answers(asked: Sequence[Asked]) -> None:
    """Print the answers about the surest pictures and the least sure ones."""
    columns = ("picture", "TUNA with the tags", "TUNA without", "SmolLM2, tags as words")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for one in [*asked[:5], *asked[max(5, len(asked) - 3) :]]:
        if one.answers:
            table.add_row(escape(one.key.rpartition("/")[2]), *map(escape, one.answers))
    console.print(f"\n[bold]{QUESTION}[/bold]", table)


def named(tag: RetrievedTag, captions: Sequence[str]) -> bool:
    """Whether the picture's own description has the words of the tag."""
    pattern = rf"(?<!\w){re.escape(tag.tag)}(?!\w)"
    return any(re.search(pattern, caption, re.IGNORECASE) for caption in captions)


def names_a_thing(answer: str, one: Asked) -> bool:
    """Whether an answer names a thing of the picture's own description."""
    return any(holds(answer, thing) for thing in one.things)


def summary(asked: Sequence[Asked], common: str) -> str:
    """The result in a sentence or two, beside what needs no store."""
    hits = sum(any(named(tag, one.captions) for tag in one.retrieval.tags) for one in asked)
    retrieved = f"For {hits} of {len(asked)} unseen pictures a retrieved tag is in their own description."
    told = [one for one in asked if one.answers]
    if not told:
        return retrieved
    with_tags, without, words = (
        sum(names_a_thing(one.answers[i], one) for one in told if one.answers) for i in range(3)
    )
    always = sum(names_a_thing(common, one) for one in told)
    return (
        f"{retrieved} TUNA names a thing of that description for {with_tags} of {len(told)}; without the "
        f"store for {without}; the bare language model with the tags as words for {words}; the most "
        f"frequent tag (“{common}”) for {always}."
    )


def marked(text: str, tags: Sequence[RetrievedTag]) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether a tag has its words."""
    words = sorted({tag.tag for tag in tags if tag.tag.strip()}, key=len, reverse=True)
    if not words:
        return [(text, False)]
    pattern = "|".join(re.escape(word) for word in words)
    parts = re.split(rf"(?<!\w)({pattern})(?!\w)", text, flags=re.IGNORECASE)
    return [(part, bool(i % 2)) for i, part in enumerate(parts) if part]


def render(
    asked: Sequence[Asked],
    info: StoreInfo,
    seconds: dict[str, float],
    origin: str,
    picture: Any,
    common: str = "",
) -> str:
    """The page as HTML. `picture(key)` gives the bytes and the caption of an entry."""
    thumbnails: dict[str, dict[str, str]] = {}

    def neighbour(key: str) -> dict[str, str]:
        if key not in thumbnails:
            image, caption = picture(key)
            thumbnails[key] = {"source": thumbnail(image, 176), "caption": caption}
        return thumbnails[key]

    cards = [
        {
            "key": one.key,
            "captions": one.captions,
            "source": thumbnail(one.image, 440),
            "neighbours": [
                {"key": n.key, "similarity": n.similarity, **neighbour(n.key)}
                for n in one.retrieval.neighbours
            ],
            "tags": [{"tag": t, "named": named(t, one.captions)} for t in one.retrieval.tags],
            "answers": [marked(answer, one.retrieval.tags) for answer in one.answers or ()],
        }
        for one in asked
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("demo.html.j2")
    k = max((len(one.retrieval.neighbours) for one in asked), default=0)
    return template.render(
        cards=cards,
        info=info,
        seconds=seconds,
        origin=origin,
        k=k,
        shown=SHOWN_TAGS,
        hues=HUES,
        summary=summary(asked, common),
        question=QUESTION,
    )


def thumbnail(data: bytes, side: int) -> str:
    """A data URL of the picture, at most `side` pixels wide and high."""
    image = decode(data)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=78)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(folder: Path, key: str) -> tuple[bytes, str]:
    """The image and first caption of an entry that was read from `folder`."""
    caption = folder / f"{key}.txt"
    image = next(path for path in caption.parent.glob(f"{glob.escape(caption.stem)}.*") if path != caption)
    return image.read_bytes(), caption.read_text(encoding="utf-8").partition("\n")[0]


def _decodes(pair: Pair) -> bool:
    try:
        decode(pair.image)
    except BadImage as error:
        console.print(f"{escape(pair.key)}: {escape(str(error))}")
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show what a tag store answers for pictures it has never seen."
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help=f"anything that `tagstore ingest` can read; default: the pictures of {PACKAGE}",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".demo"), help="folder for pictures, store and page (default: .demo)"
    )
    parser.add_argument("--format", help="of SOURCE, where it can't be found by looking")
    parser.add_argument("--image-column")
    parser.add_argument("--caption-column", action="append", default=[])
    parser.add_argument("--key-column")
    return parser


if __name__ == "__main__":
    main()
