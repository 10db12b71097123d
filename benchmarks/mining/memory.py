"""Resident memory of the default miner while it reads many different captions, each with a new word.

    python -m benchmarks.mining.memory --captions 1000000

Prints a line of JSON at every tenth of the way; `quality.py` runs it in its own process.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator

from benchmarks.processes import memory_mib
from benchmarks.report import arguments_parser
from tagstore.mining import load_miner
from tagstore.types import Pair

THINGS = (
    "dog", "cat", "horse", "car", "bus", "train", "boat", "bench", "table", "chair", "lamp", "bottle", "cup",
    "plate", "bowl", "bird", "tree", "house", "bridge", "street", "window", "door",
)  # fmt: skip
LOOKS = (
    "red", "blue", "green", "black", "white", "old", "young", "small", "large", "wooden", "plastic",
    "striped", "wet", "dirty", "shiny", "broken", "empty", "parked", "narrow", "bright",
)  # fmt: skip


def captions(n: int, seed: int = 0) -> Iterator[Pair]:
    """Short captions, each with an invented name, which makes spaCy's string store grow."""
    rng = random.Random(seed)
    for i in range(n):
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4)) + f"{i:x}"
        thing, other = rng.sample(THINGS, 2)
        yield Pair(
            str(i),
            b"",
            (f"A {rng.choice(LOOKS)} {thing} near the {rng.choice(LOOKS)} {other} of {name.capitalize()}",),
        )


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--captions", type=int, default=1_000_000)
    arguments = parser.parse_args()
    miner = load_miner("rules")
    start = time.perf_counter()
    tags = 0
    every = max(1, arguments.captions // 10)
    for done, mined in enumerate(miner.mine(captions(arguments.captions)), 1):
        tags += len(mined)
        if done % every == 0 or done == 100_000:
            line = {
                "captions": done,
                "rss_mib": round(sum(memory_mib()), 1),
                "tags": tags,
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
