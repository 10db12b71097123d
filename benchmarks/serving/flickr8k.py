"""Flickr8k by image bytes and by vector: what a call takes, and how much of it is not the encoder."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.request import urlopen

import grpc
import numpy as np

from benchmarks.report import table
from benchmarks.serving.callers import LOCAL, RETRIEVE, Apart, callers, one_caller, percentiles, timed
from benchmarks.serving.query_paths import requests_of
from benchmarks.serving.servers import cpu_seconds, free_port, ours
from tagstore_proto.v1 import tagstore_pb2 as pb

STORE, IMAGES = "flickr8k", 64


def prepared(directory: Path, data: Path) -> Path:
    """The root of a store of the training photographs, made where it is not there."""
    root = directory / "real"
    done = root / "ingested"
    if not done.exists():
        source = str(data / "flickr8k" / "train-*.tar")
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "tagstore.cli",
            "ingest",
            source,
            "--root",
            str(root),
            "--store",
            STORE,
            "--encoder",
            "mini",
            "--json",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        done.touch()
        print(f"Flickr8k's training photographs ingested in {time.perf_counter() - start:.0f} s", flush=True)
    return root


def photographs(data: Path) -> list[bytes]:
    """The first of the test split, which the store does not hold."""
    with tarfile.open(sorted((data / "flickr8k").glob("test-*.tar"))[0]) as shard:
        found = []
        for member in shard:
            file = shard.extractfile(member) if member.name.endswith(".jpg") else None
            if file is not None:
                found.append(file.read())
            if len(found) == IMAGES:
                break
    return found


def embedded(address: str) -> tuple[float, float]:
    """Seconds that a server's encoder has worked, and how often, from its metrics."""
    with urlopen(f"http://{address}/metrics") as page:
        lines = [line.split() for line in page.read().decode().splitlines() if 'stage="embed"' in line]
    sums, counts = (
        sum(float(value) for name, value in lines if name.startswith(f"tagstore_stage_seconds_{what}"))
        for what in ("sum", "count")
    )
    return sums, counts


def report(root: Path, data: Path, seconds: float, rounds: int, apart: Apart) -> str:
    """The tables. The encoder alone runs here, in turn with calls to a server; an answer by image must be the answer by its vector."""
    from tagstore.encoding.images import decode
    from tagstore.retrieval.catalog import Catalog

    images = photographs(data)
    catalog = Catalog(root, device="cpu")
    engine = catalog.engine(STORE)
    encoder = catalog.encoder(engine.fingerprint)
    pixels = [encoder.prepare(decode(image)) for image in images]
    vectors = np.concatenate([encoder.encode_images(one[None]) for one in pixels])
    calls = [pb.RetrieveRequest(store=STORE, images=[image]).SerializeToString() for image in images]
    by_vector = requests_of(vectors, 1, engine.digest, store=STORE)
    spent: dict[str, list[float]] = {"whole": [], "encoder": [], "decode": [], "engine": []}
    figures: dict[str, list[float]] = {"p50": [], "p99": [], "images": [], "vectors": [], "cpu": []}
    n, inside = len(images), []
    watched = f"127.0.0.1:{free_port()}"
    with ours(root, "--workers", "1", "--metrics", watched) as (address, pid):
        with grpc.insecure_channel(address, LOCAL) as channel:
            call = channel.unary_unary(RETRIEVE)
            for image, vector in zip(calls[:16], by_vector, strict=False):
                if call(image) != call(vector):
                    raise RuntimeError("an image and its vector are answered differently")
            for _ in range(rounds):
                spent["encoder"] += timed(lambda i: encoder.encode_images(pixels[i % n][None]), seconds)
                before = embedded(watched)
                spent["whole"] += timed(lambda i: call(calls[i % n]), seconds)
                took, times = (now - then for now, then in zip(embedded(watched), before, strict=True))
                inside.append(took / times)
            spent["decode"] += timed(lambda i: encoder.prepare(decode(images[i % n])), seconds / 2)
            spent["engine"] += timed(lambda i: engine.retrieve(vectors[i % n][None]), seconds / 2)
        for _ in range(rounds):
            p50, p99 = apart(one_caller, address, by_vector, seconds)
            figures["p50"].append(p50)
            figures["p99"].append(p99)
            used = cpu_seconds(pid)
            rate = apart(callers, address, by_vector, 8, seconds)
            figures["cpu"].append((cpu_seconds(pid) - used) / rate.calls * 1e6)
            figures["vectors"].append(rate.per_second)
            figures["images"].append(apart(callers, address, calls, 8, seconds).per_second)
    whole, alone, decoding, search = (
        percentiles(spent[name])[0] for name in ("whole", "encoder", "decode", "engine")
    )
    mean, encoding = float(np.mean(spent["whole"])) * 1e3, float(np.median(inside)) * 1e3
    rows = [
        [
            "entries, queries",
            f"{engine.version.entries:,}; {n} photographs of the test split, {np.mean([len(i) for i in images]) / 1024:.0f} KiB",
        ],
        ["p50 of a call by image, one client", f"{whole:.2f} ms"],
        ["... mean; the encoder in it, as the server's metrics have it", f"{mean:.2f} ms; {encoding:.2f} ms"],
        ["share that is not the encoder (15 % at most)", f"{1 - encoding / mean:.0%}"],
        ["the encoder alone, again and again in this process", f"{alone:.2f} ms"],
        ["decoding and resizing alone", f"{decoding:.2f} ms"],
        ["search, tags alone (our engine in process)", f"{search:.2f} ms"],
        [
            "the rest of a call: wire, threads, an encoder that is slower in a server",
            f"{whole - alone - decoding - search:.2f} ms",
        ],
        ["share that is not the encoder alone", f"{1 - alone / whole:.0%}"],
        ["by image, 8 clients", f"{np.median(figures['images']):,.0f}/s"],
        [
            "by vector, one client, p50 / p99",
            f"{np.median(figures['p50']):.2f} / {np.median(figures['p99']):.2f} ms",
        ],
        [
            "by vector, 8 clients",
            f"{np.median(figures['vectors']):,.0f}/s, {np.median(figures['cpu']):,.0f} us of the server's CPU a query",
        ],
    ]
    return f"Flickr8k, encoder `mini`, medians of {rounds} rounds in turn.\n\n" + table(
        ["figure", "value"], rows
    )
