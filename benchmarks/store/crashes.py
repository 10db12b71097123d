"""Whether a store loses what it acknowledged when its process dies, in every way of `tests/crash.py`.

    python -m benchmarks.store.crashes [--deaths 300] [--seed 0]

The test suite runs a short version of this.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import arguments_parser, table, write

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from crash import WAYS, Harness


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--deaths", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", help="where the stores are made; a store that lost something is left there"
    )
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="crash-", dir=arguments.directory))
    start = time.perf_counter()
    harness = Harness(directory, arguments.seed)
    if harness.shim is None:
        sys.exit("a C compiler is needed: without one, only kills at random instants are possible")
    figures = harness.run(arguments.deaths)
    names = {
        "clock": "SIGKILL at a random instant",
        "KILL": "SIGKILL before the n-th write, sync, rename or removal",
        "TORN": "SIGKILL in the middle of the n-th write",
        "POWER": "power cut at the n-th: what was not synced is lost at random",
        "ENOSPC": "disk full at the n-th for a while, then SIGKILL",
        "EIO": "disk failing at the n-th for a while, then SIGKILL",
    }
    write(
        "crash",
        f"What a store holds after {sum(figures.ends.values())} deaths of the process that writes it",
        table(["death", "times"], [[names[way], figures.ends[way]] for way in WAYS]),
        table(["acknowledged operation", "times"], sorted(figures.acknowledged.items())),
        table(
            ["figure", "value"],
            [
                ["acknowledged operations", sum(figures.acknowledged.values())],
                ["**lost, torn or found damaged**", f"**{len(figures.lost)}**"],
                ["operations in flight at a death, found committed", figures.in_flight["committed"]],
                ["operations in flight at a death, not there", figures.in_flight["not there"]],
                ["operations refused by a full or failing disk", sum(figures.refused.values())],
                ["operations acknowledged later by the same process", figures.went_on],
                ["pairs that an interrupted ingest did not have to do again", figures.resumed_pairs],
                ["times a store was opened, verified in full and compared", figures.checks],
                ["versions compared entry by entry", figures.versions_compared],
                ["files left that no version needs", figures.orphans],
                ["seconds", round(time.perf_counter() - start)],
            ],
        ),
        *(["\n".join(["What was wrong:", *figures.lost])] if figures.lost else []),
        packages=("lmdb", "faiss-cpu", "numpy"),
    )
    if figures.lost:
        sys.exit(f"seed {arguments.seed}: {len(figures.lost)} losses; the store is under {directory}")


if __name__ == "__main__":
    main()
