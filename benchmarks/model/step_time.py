"""The parts of an answer and of a training step on `smol`: vision, retrieval, the tag path, the decoder.

    python -m benchmarks.model.step_time            # --quick: fewer repeats and a smaller batch
    python -m benchmarks.model.step_time --store grpc://localhost:50051/flickr8k --images DIR

Without --store it draws pictures, ingests them into its own store and queries that. The parts of a step are
timed one by one on the inputs of the step, since the difference of two steps would be smaller than the noise.
Steps with and without tags are timed too, in turns.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.report import arguments_parser, table, write
from tagstore.client import connect
from tagstore.ingestion import ingest
from tuna_model import Pipeline, presets
from tuna_model.inference.pipeline import user_message
from tuna_model.modeling.model import TAG_INPUTS

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown")
SHAPES = ("circle", "square", "triangle")
GROUNDS = ("white", "grey", "black")
ANSWER = "A picture of something on a table, in front of a wall, with some light on it."
LIMIT = 0.10


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats, small batch")
    parser.add_argument("--store", help="URL of a store of the encoder mini")
    parser.add_argument("--images", type=Path, help="pictures to ask about, with --store")
    parser.add_argument("--preset", default="smol")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    repeats, batch, new_tokens = (3, 2, 16) if args.quick else (9, 8, 32)

    with tempfile.TemporaryDirectory() as scratch:
        pictures, url = (
            (sorted(args.images.iterdir()), args.store) if args.store else drawn_store(Path(scratch))
        )
        with connect(url) as source:
            model, processor = presets.load(args.preset, device=args.device)
            tuna = Pipeline(model, processor, source, any_store=True)
            check(tuna, pictures[0])
            answer, answer_tags = generation(tuna, pictures, repeats, new_tokens)
            step, step_tags = training(tuna, pictures, repeats, batch)
    parts = [
        f"One answer of {new_tokens} tokens about one picture (batch 1, greedy), {answer_tags} tags.",
        answer,
        f"One training step of {batch} pictures: forward, backward, AdamW over decoder, connector and tag "
        f"path, fp32; {step_tags} tags in all. A frozen decoder takes less; cached features take no vision.",
        step,
        "Median of the repeats, in milliseconds, and the range from the first to the third quartile. "
        "`tag path` is weight tuner, tag encoder, its connector, and writing the pairs into the prompt; "
        "`of which longer prompt` is the decoder's time for the tokens of the tags.",
    ]
    write(
        "tuna-step",
        f"Time split of `{args.preset}` on {args.device}",
        *parts,
        packages=["torch", "transformers"],
    )


def drawn_store(scratch: Path) -> tuple[list[Path], str]:
    """Pictures with captions, and the URL of a store of them."""
    folder = scratch / "pictures"
    folder.mkdir()
    for colour, shape, ground in itertools.product(COLOURS, SHAPES, GROUNDS):
        image = Image.new("RGB", (256, 256), ground)
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse((60, 60, 200, 200), fill=colour)
        else:
            draw.regular_polygon((128, 128, 80), 4 if shape == "square" else 3, fill=colour)
        name = f"{colour}-{shape}-{ground}"
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(
            f"A {colour} {shape} in front of a {ground} wall, beside an old door.\n"
        )
    ingest(str(folder), root=scratch / "root", store="drawn")
    return sorted(folder.glob("*.png")), f"file://{scratch}/root/drawn"


def check(tuna: Pipeline, picture: Path) -> None:
    """Check that the picture has tags, and that prepared features give the logits of pixels."""
    prepared = tuna.prepare([[picture]], [[user_message("What is it?", 1)]])
    assert prepared.tags[0], "the store gives no tags for this picture"
    pixels = tuna.processor.image_processor([picture])["pixel_values"].to(tuna.model.device)
    features = {
        name: tensor for name, tensor in prepared.inputs.items() if name not in ("grid", "image_vectors")
    }
    with torch.no_grad():
        made, seen = tuna.model(**prepared.inputs).logits, tuna.model(**features, pixel_values=pixels).logits
    torch.testing.assert_close(made, seen)


def timed(device: torch.device, repeats: int, *calls: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of each call, in turns, so that a busy moment of the machine meets all of them."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first is for caches
                found[i].append(1000 * (time.perf_counter() - start))
    return found


def line(name: str, times: list[float], whole: float) -> list[str]:
    middle, (low, _, high) = statistics.median(times), statistics.quantiles(times, n=4)
    return [name, f"{middle:.1f}", f"{low:.1f} to {high:.1f}", f"{100 * middle / whole:.1f} %"]


def split(rows: list[tuple[str, list[float]]], whole: list[float]) -> str:
    total = statistics.median(whole)
    share = statistics.median(dict(rows)["tag path"]) / total
    verdict = f"The tag path takes {100 * share:.1f} % of it; at most {100 * LIMIT:.0f} % is asked for."
    body = [line(name, times, total) for name, times in [*rows, ("all of it, with tags", whole)]]
    return table(["part", "ms", "quartiles", "share"], body) + f"\n\n{verdict}"


def generation(tuna: Pipeline, pictures: list[Path], repeats: int, new_tokens: int) -> tuple[str, int]:
    model, processor, device = tuna.model, tuna.processor, tuna.model.device
    messages = [[user_message("What is in this picture?", 1)]]
    turn = itertools.cycle(pictures)
    prepared = tuna.prepare([[pictures[0]]], messages)
    given = prepared.inputs
    tuna.lookup.detailed(
        torch.cat([features(tuna, [picture])[1] for picture in pictures]), model.config.encoder_digest
    )
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def one_answer() -> None:
        with torch.inference_mode():
            model.generate(**tuna.prepare([[next(turn)]], messages).inputs, **options)

    without = {name: tensor for name, tensor in given.items() if name not in TAG_INPUTS}
    plain = dict(
        processor(text=processor.apply_chat_template(messages[0], add_generation_prompt=True)).to(device)
    )
    same_length = {**without, "input_ids": hidden(model, given)}

    def decode(inputs: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode():
            model.generate(**{k: v for k, v in inputs.items() if k != "image_vectors"}, **options)

    picture = [pictures[0]]
    preparing, vision, retrieval, path, long, short, whole = timed(
        device, repeats,
        lambda: processor.image_processor(picture),
        lambda: features(tuna, picture, pixels=True),
        lambda: tuna.lookup.detailed(given["image_vectors"], model.config.encoder_digest),
        lambda: tag_path(model, given, learn=False),
        lambda: decode(same_length),
        lambda: decode({**plain, "grid": given["grid"]}),
        one_answer,
    )  # fmt: skip
    extra = [a - b for a, b in zip(long, short, strict=True)]
    rows = [
        ("decoding and resizing", preparing),
        ("vision", [a - b for a, b in zip(vision, preparing, strict=True)]),
        ("retrieval", retrieval), ("tag path", path), ("decoder", long), ("of which longer prompt", extra),
    ]  # fmt: skip
    return split(rows, whole), len(given["tag_embeddings"])


def training(tuna: Pipeline, pictures: list[Path], repeats: int, batch: int) -> tuple[str, int]:
    model, processor, device = tuna.model, tuna.processor, tuna.model.device
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    some = pictures[:batch]
    text = (
        processor.apply_chat_template(
            [user_message("What is in this picture?", 1)], add_generation_prompt=True
        )
        + ANSWER
    )
    pixels = processor.image_processor(some)["pixel_values"].to(device)
    grid, vectors = model.encode_images(pixels)
    tags = tuna.lookup(vectors, model.config.encoder_digest)
    found = {"grid": grid, "image_vectors": vectors}
    given = dict(processor(text=[text] * batch, tags=tags, padding_side="right").to(device)) | found
    plain = dict(processor(text=[text] * batch, padding_side="right").to(device)) | found
    same_length = {name: tensor for name, tensor in given.items() if name not in TAG_INPUTS} | {
        "input_ids": hidden(model, given)
    }

    def step(inputs: dict[str, torch.Tensor]) -> None:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole() -> None:
        step(given | dict(zip(("grid", "image_vectors"), model.encode_images(pixels), strict=True)))
        tuna.lookup(vectors, model.config.encoder_digest)

    vision, retrieval, path, long, short, all_of_it = timed(
        device, repeats,
        lambda: model.encode_images(pixels),
        lambda: tuna.lookup(vectors, model.config.encoder_digest),
        lambda: tag_path(model, given, learn=True),
        lambda: step(same_length),
        lambda: step(plain),
        whole,
    )  # fmt: skip
    extra = [a - b for a, b in zip(long, short, strict=True)]
    rows = [
        ("vision", vision), ("retrieval", retrieval), ("tag path", path),
        ("connector, decoder, optimizer", long), ("of which longer prompt", extra),
    ]  # fmt: skip
    model.eval()
    return split(rows, all_of_it), len(given["tag_embeddings"])


def features(tuna: Pipeline, pictures: list[Path], pixels: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    grid, vectors = tuna.model.encode_images(
        tuna.processor.image_processor(pictures)["pixel_values"].to(tuna.model.device)
    )
    assert vectors is not None
    return grid, vectors


def hidden(model: presets.TunaForConditionalGeneration, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same prompt for a decoder that knows of no tags: an ordinary token where H_vt stands."""
    ids = given["input_ids"]
    return ids.masked_fill((given["tag_index"] >= 0) & (ids == model.config.image_token_id), 1)


def tag_path(
    model: presets.TunaForConditionalGeneration, given: dict[str, torch.Tensor], learn: bool
) -> None:
    """Everything that only tags need, forward and (to learn) backward."""
    with torch.set_grad_enabled(learn):
        embeds = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_(learn)
        tags = [given.get(name) for name in TAG_INPUTS]
        out = model._tags(given["input_ids"], embeds, given["grid"], given["image_vectors"], *tags, False)[
            "inputs_embeds"
        ]
        if learn:
            out.backward(torch.ones_like(out))
            model.zero_grad()


if __name__ == "__main__":
    main()
