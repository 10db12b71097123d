"""Train `smol` for real: does it caption better with retrieved tags than without, or with random ones?

    python scripts/train_smol.py --data FLICKR8K --out runs/smol-caption    # all; continues a killed run
    python scripts/train_smol.py --data FLICKR8K --out /tmp/quick --quick   # a small run, as a check

FLICKR8K is a folder of WebDataset shards with splits train and test (train-*.tar, test-*.tar). 1. The store
is made of train. 2. The features of its photographs are computed once. 3. Three arms learn with the same
seed, data order and budget, side by side, one core each. 4. Each captions photographs of test, which no arm
and no store has seen. The decoder is frozen; connector and tag path are trained.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS = {"none": "null://", "retrieved": "file://{root}/flickr8k", "random": "random+file://{root}/flickr8k"}
"""The tag source of each arm, in training and test. Random tags are ten of the vocabulary a picture."""


def main() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options = arguments_parser().parse_args()
    if options.quick:
        options.steps, options.limit, options.photographs = 6, 64, 8
    if options.arm:
        run_arm(options.arm, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    root = options.out / "stores"
    if not (root / "flickr8k" / "CURRENT").exists():
        source = str(options.data / "train-*.tar")
        command = [sys.executable, "-m", "tagstore.cli", "ingest", source, "--root", str(root)]
        subprocess.run([*command, "--store", "flickr8k"], check=True)
    recipe = recipe_of("none", options)
    embed(recipe)
    clock = time.perf_counter()
    # one core an arm: small matrices share cores badly, and a busy machine stalls waiting threads
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    waiting = list(options.arms)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < options.parallel:
            arm = waiting.pop(0)
            running[arm] = subprocess.Popen(
                [sys.executable, *sys.argv, "--arm", arm], env={**os.environ, **threads}
            )
        arm, process = next(iter(running.items()))
        if process.wait():
            sys.exit(f"error: arm {arm} failed; its reason is above")
        del running[arm]
    print(f"{time.perf_counter() - clock:.0f} s for {', '.join(options.arms)}")
    text = report(options)
    print(text)
    if options.docs:
        write_into(options.docs, text)
    if options.export:
        from tuna_model.training.runs import export

        # `smol` is for any store of its encoder: what it learnt with one it shall use with the next
        print(export(options.out / "retrieved", options.export, pin=False))


def recipe_of(arm: str, options: argparse.Namespace) -> Any:
    from tuna_model.training.recipe import Recipe

    shards = options.out / "train"
    shards.mkdir(parents=True, exist_ok=True)
    for shard in sorted(options.data.glob("train-*.tar")):
        if not (shards / shard.name).exists():
            (shards / shard.name).symlink_to(shard.resolve())
    settings = [
        f"out={options.out / arm}", f"steps={options.steps}", f"data.path={shards}",
        f"data.features={options.out / 'features'}", f"data.limit={options.limit}",
        f"tags.store={ARMS[arm].format(root=options.out / 'stores')}", f"seed={options.seed}",
        f"precision={options.precision}", f"batch_size={options.batch}",
    ]  # fmt: skip
    return Recipe.read("smol-caption").with_values(settings)


def embed(recipe: Any) -> None:
    """Fill the cache of features before the arms that share it start."""
    from accelerate import Accelerator
    from rich.progress import track

    from tagstore.readers.samples import read_samples
    from tuna_model.training.runs import build_model
    from tuna_model.training.train import image_features

    if (Path(recipe.data.features) / "cache.json").exists():
        return
    model, processor = build_model(recipe)
    samples = read_samples(recipe.data.path, split=recipe.data.split, limit=recipe.data.limit)
    steps = iter(track(range(-(-len(samples) // 16)), "images embedded"))
    image_features(recipe, model, processor, samples, Accelerator(cpu=True), lambda *_: next(steps, None))


def run_arm(arm: str, options: argparse.Namespace) -> None:
    """Train one arm, then let it caption with its own kind of tags and without."""
    from tagstore.client import connect
    from tuna_model.evaluation import TaskOptions, evaluate, load_task
    from tuna_model.evaluation.answerer import PipelineAnswerer
    from tuna_model.inference.pipeline import Pipeline
    from tuna_model.training.runs import load_run
    from tuna_model.training.train import train

    recipe = recipe_of(arm, options)

    def show(line: Any) -> None:
        if line.step % 10 == 0 or line.step == 1:
            print(
                f"{arm} {line.step}/{recipe.steps}: loss {line.loss:.3f}, "
                f"{line.samples_a_second:.2f} samples/s",
                flush=True,
            )

    train(recipe, progress=show)
    model, processor = load_run(options.out / arm)
    for name, url in {"own": recipe.tags.store, "without": "null://"}.items():
        if name == "without" and arm == "none":
            continue
        task = load_task(
            "captions",
            TaskOptions(
                options.data / "test-000.tar",
                split="test",
                limit=options.photographs,
                prompt=recipe.data.prompt,
                seed=options.seed,
            ),
        )
        with connect(url) as source:
            tuna = PipelineAnswerer(Pipeline(model, processor, source), name=f"smol, arm {arm}", store=url)
            result = evaluate(task, tuna, batch_size=16, out=options.out / arm / name)
        print(f"{arm}, {name} tags: CIDEr {result.value('CIDEr'):.3f}", flush=True)


def report(options: argparse.Namespace) -> str:
    """Curves and figures as Markdown."""
    curves = {
        arm: [json.loads(line) for line in (options.out / arm / "log.jsonl").read_text().splitlines()]
        for arm in options.arms
    }
    marks = sorted({max(1, round(options.steps * share / 8)) for share in range(1, 9)})
    width = max(1, options.steps // 16)

    def loss(arm: str, step: int) -> float:
        losses = [line["loss"] for line in curves[arm] if step - width < line["step"] <= step]
        return sum(losses) / len(losses)

    lines = [
        "| arm | " + " | ".join(f"step {step}" for step in marks) + " |",
        "| --- |" + " --- |" * len(marks),
    ]
    lines += [
        f"| {arm} | " + " | ".join(f"{loss(arm, step):.3f}" for step in marks) + " |" for arm in options.arms
    ]
    lines += ["", "| arm | tags at the test | CIDEr | BLEU-4 | ROUGE-L |", "| --- | --- | --- | --- | --- |"]
    for arm in options.arms:
        for name in ("own", "without"):
            path = options.out / arm / name / "captions.json"
            if path.exists():
                metrics = {metric["name"]: metric for metric in json.loads(path.read_text())["metrics"]}
                figures = [
                    f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})"
                    for m in (metrics[name] for name in ("CIDEr", "BLEU-4", "ROUGE-L"))
                ]
                tags = arm if name == "own" else "none"
                lines.append(f"| {arm} | {tags} | " + " | ".join(figures) + " |")
    recipe = recipe_of("none", options)
    seen = recipe.steps * recipe.batch_size
    head = (
        f"`python scripts/train_smol.py --data FLICKR8K --steps {options.steps} --batch {options.batch} "
        f"--photographs {options.photographs}`: {recipe.steps} steps of {recipe.batch_size} captioned "
        "photographs "
        f"({seen:,} of the 6,000 x 5 captions), seed {recipe.seed}; "
        f"{options.photographs} test photographs, greedy. Losses are means of {width} steps; "
        "intervals are 95 %, over photographs.\n"
    )
    return "\n".join([head, *lines]) + "\n"


def write_into(path: Path, text: str) -> None:
    """Replace the text between the markers of a page."""
    begin, end = "<!-- smol-caption -->", "<!-- /smol-caption -->"
    page = path.read_text(encoding="utf-8")
    if begin not in page:
        page += f"\n## `smol` learns to caption\n\n{begin}\n{end}\n"
    path.write_text(
        re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}{end}", page, flags=re.DOTALL), encoding="utf-8"
    )


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.tar and test-000.tar")
    parser.add_argument("--out", type=Path, default=Path("runs/smol-caption"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--photographs", type=int, default=1000, help="of the test split, the first")
    parser.add_argument("--limit", type=int, default=0, help="training photographs; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument(
        "--parallel", type=int, default=os.cpu_count() or 1, help="arms that run side by side"
    )
    parser.add_argument("--quick", action="store_true", help="6 steps on 64 photographs, 8 to test")
    parser.add_argument(
        "--docs", type=Path, help="page to write the figures into, such as docs/experiments.md"
    )
    parser.add_argument(
        "--export",
        type=Path,
        help="the trained part of the arm `retrieved`: tuna_model/presets/smol/trained.safetensors",
    )
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
