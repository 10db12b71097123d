"""Do the tags of the nearest training pictures name what a new picture shows?

    python -m benchmarks.mining.tag_recall --data DIR_WITH_SHARDS [--root DIR]

Ingests train-*.tar (or takes the store "flickr8k" that is under --root), serves it, and asks about every
picture of test-*.tar over gRPC and in process; both must answer alike. The truth of a picture is what is
mined from its own captions.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import mean

from benchmarks.report import arguments_parser, table, write
from tagstore.client import connect
from tagstore.ingestion import ingest
from tagstore.mining import load_miner, merge
from tagstore.readers import read
from tagstore.serving.server import Server
from tagstore.storage.store import Store, store_names
from tagstore.types import Pair, Retrieval

STORE = "flickr8k"


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.tar and test-*.tar")
    parser.add_argument("--root", type=Path, help="where the store is kept; a temporary folder if not given")
    parser.add_argument("--k", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.root or Path(scratch)
        if STORE not in (store_names(root) if root.exists() else []):
            ingest(str(arguments.data / "train-*.tar"), root=root, store=STORE)
        measure(arguments.data, root, arguments.k)


def measure(data: Path, root: Path, k: int) -> None:
    pairs = [pair for pair in read(str(data / "test-*.tar")) if isinstance(pair, Pair)]
    images = [pair.image for pair in pairs]
    server = Server(root, "127.0.0.1:0")
    server.start()
    with connect(f"grpc://{server.address}/{STORE}") as remote, connect(f"file://{root}/{STORE}") as local:
        start = time.perf_counter()
        answers = remote.retrieve(images, k=k)
        seconds = time.perf_counter() - start
        identical = answers == local.retrieve(images, k=k)
    server.stop(0)
    assert identical, "grpc:// and file:// answer differently"

    snapshot = Store(root, STORE).snapshot()
    forms = {
        i: (kind, canonical)
        for i, (_, kind, canonical) in enumerate(snapshot.tags(range(snapshot.version.next_tag_id)))
    }
    own = [{(t.kind, t.canonical) for t in merge(tags)} for tags in load_miner("rules").mine(pairs)]

    def shown(answer: Retrieval, top: int | None = None) -> list[tuple[str, str]]:
        return [forms[t.tag_id] for t in answer.tags[:top]]

    rows = []
    for name, subset in (("objects", {"object"}), ("attributes", {"attribute"}), ("all kinds", None)):
        truth = [{t for t in tags if subset is None or t[0] in subset} for tags in own]
        recall = mean(len(t & set(shown(a))) / len(t) for t, a in zip(truth, answers, strict=True) if t)
        top = mean(len(t & set(shown(a, 10))) / len(t) for t, a in zip(truth, answers, strict=True) if t)
        rows.append([name, f"{mean(map(len, truth)):.1f}", f"{recall:.1%}", f"{top:.1%}"])
    precision = mean(
        sum(t in o for t in shown(a, 10)) / len(shown(a, 10))
        for o, a in zip(own, answers, strict=True)
        if a.tags
    )
    precision_objects = mean(
        mean(t in o for t in objects[:10])
        for o, a in zip(own, answers, strict=True)
        if (objects := [t for t in shown(a) if t[0] == "object"])
    )
    miner = snapshot.version.miner
    write(
        "tag-recall",
        f"Tags of {len(images)} test pictures from {snapshot.version.entries} training pictures, k = {k}",
        table(["own tags of a picture", "mean number", "among the retrieved", "among the top 10"], rows),
        table(
            ["figure", "value"],
            [
                ["precision of the top 10 tags by votes", f"{precision:.1%}"],
                ["precision of the top 10 objects by votes", f"{precision_objects:.1%}"],
                ["retrieved tags a picture", f"{mean(len(a) for a in answers):.1f}"],
                ["grpc:// and file:// identical", "yes" if identical else "no"],
                ["pictures a second over gRPC, by image bytes", f"{len(images) / seconds:.0f}"],
            ],
        ),
        f"Encoder {snapshot.version.fingerprint}, miner {miner['name']} {miner['version']}.",
        packages=("torch", "open-clip-torch", "spacy", "lmdb", "faiss-cpu"),
    )


if __name__ == "__main__":
    main()
