"""Queries by image bytes and by vector against a store of Flickr8k: what a call takes beside its encoder."""

from __future__ import annotations

import subprocess
import tarfile
import time
from pathlib import Path
from urllib.request import urlopen

import grpc
import numpy as np

from benchmarks.processes import cpu_seconds, free_port, running_server, tagstore
from benchmarks.report import table
from benchmarks.serving.callers import (
    CHANNEL_OPTIONS,
    RETRIEVE,
    LoadProcess,
    async_callers,
    call_seconds,
    one_caller,
    percentiles,
)
from benchmarks.serving.query_paths import request_messages
from tagstore_proto.v1 import tagstore_pb2 as pb

STORE, IMAGES = "flickr8k", 64


def is_prepared(directory: Path) -> bool:
    return (directory / "real" / "ingested").exists()


def prepare(directory: Path, data: Path) -> Path:
    """The root of a store of the training photographs; ingested if it is missing."""
    root = directory / "real"
    if not is_prepared(directory):
        source = data / "flickr8k" / "train-*.tar"
        start = time.perf_counter()
        command = tagstore("ingest", source, "--root", root, "--store", STORE, "--encoder", "mini", "--json")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (root / "ingested").touch()
        print(f"Flickr8k's training photographs ingested in {time.perf_counter() - start:.0f} s", flush=True)
    return root


def photographs(data: Path) -> list[bytes]:
    """The first photographs of the test split, which the store does not hold."""
    images = []
    with tarfile.open(sorted((data / "flickr8k").glob("test-*.tar"))[0]) as shard:
        for member in shard:
            file = shard.extractfile(member) if member.name.endswith(".jpg") else None
            if file is not None:
                images.append(file.read())
            if len(images) == IMAGES:
                break
    return images


def embed_totals(address: str) -> tuple[float, float]:
    """Seconds and number of runs of a server's encoder, from its metrics."""
    with urlopen(f"http://{address}/metrics") as page:
        lines = [line.split() for line in page.read().decode().splitlines() if 'stage="embed"' in line]
    seconds, runs = (
        sum(float(value) for name, value in lines if name.startswith(f"tagstore_stage_seconds_{suffix}"))
        for suffix in ("sum", "count")
    )
    return seconds, runs


def report(root: Path, data: Path, seconds: float, rounds: int, load: LoadProcess) -> str:
    """The table. The encoder alone runs here, in turn with calls to a server.

    Raises `RuntimeError` if the answer by an image differs from the answer by its vector.
    """
    from tagstore.encoding.images import decode
    from tagstore.retrieval.catalog import Catalog

    images = photographs(data)
    catalog = Catalog(root, device="cpu")
    engine = catalog.engine(STORE)
    encoder = catalog.encoder(engine.fingerprint)
    pixels = [encoder.prepare(decode(image)) for image in images]
    vectors = np.concatenate([encoder.encode_images(image[None]) for image in pixels])
    by_image = [pb.RetrieveRequest(store=STORE, images=[image]).SerializeToString() for image in images]
    by_vector = request_messages(vectors, 1, engine.digest, store=STORE)
    spent: dict[str, list[float]] = {"call": [], "encoder": [], "decode": [], "engine": []}
    figures: dict[str, list[float]] = {"p50": [], "p99": [], "images": [], "vectors": [], "cpu": []}
    n, in_server = len(images), []
    metrics = f"127.0.0.1:{free_port()}"
    with running_server(root, "--workers", "1", "--metrics", metrics) as (address, pid):
        with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(RETRIEVE)
            for image, vector in zip(by_image[:16], by_vector, strict=False):
                if call(image) != call(vector):
                    raise RuntimeError("an image and its vector are answered differently")
            for _ in range(rounds):
                spent["encoder"] += call_seconds(
                    lambda i: encoder.encode_images(pixels[i % n][None]), seconds
                )
                before = embed_totals(metrics)
                spent["call"] += call_seconds(lambda i: call(by_image[i % n]), seconds)
                took, runs = (now - then for now, then in zip(embed_totals(metrics), before, strict=True))
                in_server.append(took / runs)
            spent["decode"] += call_seconds(lambda i: encoder.prepare(decode(images[i % n])), seconds / 2)
            spent["engine"] += call_seconds(lambda i: engine.retrieve(vectors[i % n][None]), seconds / 2)
        for _ in range(rounds):
            p50, p99 = load(one_caller, address, by_vector, seconds)
            figures["p50"].append(p50)
            figures["p99"].append(p99)
            before_cpu = cpu_seconds(pid)
            rate = load(async_callers, address, by_vector, 8, seconds)
            figures["cpu"].append((cpu_seconds(pid) - before_cpu) / rate.calls * 1e6)
            figures["vectors"].append(rate.per_second)
            figures["images"].append(load(async_callers, address, by_image, 8, seconds).per_second)
    whole, alone, decoding, search = (percentiles(spent[name])[0] for name in spent)
    mean, encoding = float(np.mean(spent["call"])) * 1e3, float(np.median(in_server)) * 1e3
    rest = whole - alone - decoding - search
    kib = np.mean([len(image) for image in images]) / 1024
    middle = {name: float(np.median(values)) for name, values in figures.items()}
    rows = [
        ["entries, queries", f"{engine.version.entries:,}; {n} photographs of the test split, {kib:.0f} KiB"],
        ["p50 of a call by image, one client", f"{whole:.2f} ms"],
        ["... mean; the encoder in it, by the server's metrics", f"{mean:.2f} ms; {encoding:.2f} ms"],
        ["share that is not the encoder (at most 15 %)", f"{1 - encoding / mean:.0%}"],
        ["the encoder alone, repeated in this process", f"{alone:.2f} ms"],
        ["decoding and resizing alone", f"{decoding:.2f} ms"],
        ["search and tags alone (our engine in process)", f"{search:.2f} ms"],
        ["the rest of a call: wire, threads, an encoder that is slower in a server", f"{rest:.2f} ms"],
        ["share that is not the encoder alone", f"{1 - alone / whole:.0%}"],
        ["by image, 8 clients", f"{middle['images']:,.0f}/s"],
        ["by vector, one client, p50 / p99", f"{middle['p50']:.2f} / {middle['p99']:.2f} ms"],
        [
            "by vector, 8 clients",
            f"{middle['vectors']:,.0f}/s, {middle['cpu']:,.0f} us of the server's CPU a query",
        ],
    ]
    about = f"Flickr8k, encoder `mini`, medians of {rounds} rounds in turn."
    return about + "\n\n" + table(["figure", "value"], rows)
