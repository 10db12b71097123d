"""Resident memory of the default miner while it reads very many different captions, each with a word never seen before.

Run alone:  python -m benchmarks.mining.memory --captions 1000000
Prints a line of JSON at every tenth of the way; run in a process of its own by benchmarks/mining/quality.py.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from tagstore.mining import load_miner
from tagstore.types import Pair

THINGS = "dog cat horse car bus train boat bench table chair lamp bottle cup plate bowl bird tree house bridge street window door".split()  # noqa: SIM905
LOOKS = "red blue green black white old young small large wooden plastic striped wet dirty shiny broken empty parked narrow bright".split()  # noqa: SIM905


def captions(n: int, seed: int = 0) -> Iterator[Pair]:
    """Short captions, every one different, with an invented name in it: what lets spaCy's string store grow."""
    rng = random.Random(seed)
    for i in range(n):
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4)) + f"{i:x}"
        thing, other = rng.sample(THINGS, 2)
        yield Pair(
            str(i),
            b"",
            (f"A {rng.choice(LOOKS)} {thing} near the {rng.choice(LOOKS)} {other} of {name.capitalize()}",),
        )


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=1_000_000)
    arguments = parser.parse_args()
    miner = load_miner("rules")
    start = time.perf_counter()
    tags = 0
    every = max(1, arguments.captions // 10)
    for done, found in enumerate(miner.mine(captions(arguments.captions)), 1):
        tags += len(found)
        if done % every == 0 or done == 100_000:
            line = {
                "captions": done,
                "rss_mib": round(resident() / 2**20, 1),
                "tags": tags,
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
