"""The client is light to import, strict about URLs, and plain about what went wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pictures import picture
from tagstore import errors
from tagstore.client import connect, parse

HEAVY = {"torch", "faiss", "spacy", "open_clip", "timm", "transformers", "lmdb", "PIL", "pyarrow"}


def loaded_by(code: str) -> set[str]:
    """Name the heavy modules that a fresh interpreter has loaded after running some code."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return HEAVY & {name.partition(".")[0] for name in out.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import tagstore",
        "import tagstore.client; tagstore.client.connect('grpc://127.0.0.1:1/x')",
        "import tagstore.encoding.encoder",
        "import tagstore.mining",
        "from tagstore.cli import cli\ntry: cli(['--help'])\nexcept SystemExit: pass",
        "from tagstore.cli import cli\ntry: cli(['ingest', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code: str):
    assert not loaded_by(code)


def test_a_remote_query_loads_nothing_heavy(server_address: str):
    assert not loaded_by(
        f"from tagstore.client import connect\nconnect('grpc://{server_address}/shapes').info()"
    )


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("grpc://localhost:50051/fashion", ("grpc", "localhost:50051", "fashion", 0)),
        ("grpc://[::1]:1/fashion@12", ("grpc", "[::1]:1", "fashion", 12)),
        ("file://stores/f8/", ("file", "stores", "f8", 0)),
        ("file:///data/stores/f8@3", ("file", "/data/stores", "f8", 3)),
        ("file:///f8", ("file", "/", "f8", 0)),
    ],
)
def test_urls_are_read(url: str, parts: tuple[str, str, str, int]):
    assert parse(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "f8",
        "http://localhost/f8",
        "grpc://localhost:1",
        "grpc://localhost/f8",
        "grpc://",
        "file://",
        "grpc:///f8",
    ],
)
def test_a_url_that_names_no_store_is_refused_with_an_example(url: str):
    with pytest.raises(errors.InvalidInput, match="://"):
        connect(url)


def test_an_error_names_the_address_where_no_server_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        connect(f"grpc://{address}/x") as source,
        pytest.raises(errors.Unavailable, match=f"no server answers at {address}.*tagstore serve"),
    ):
        source.info()


def test_a_server_that_does_not_answer_ends_with_the_deadline():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            connect(f"grpc://{address}/x", timeout=0.3) as source,
            pytest.raises(errors.Unavailable, match=address),
        ):
            source.info()


def test_images_may_be_paths(server_address: str, tmp_path: Path):
    path = tmp_path / "red.png"
    path.write_bytes(data := picture("red", "circle"))
    with connect(f"grpc://{server_address}/shapes") as source:
        assert source.retrieve([path]) == source.retrieve([str(path)]) == source.retrieve([data])
        with pytest.raises(errors.NotFound, match="nowhere"):
            source.retrieve([tmp_path / "nowhere"])
        with pytest.raises(errors.InvalidInput, match="images is a list"):
            source.retrieve(str(path))  # type: ignore[arg-type]


def test_a_closed_source_opens_again(server_address: str):
    source = connect(f"grpc://{server_address}/shapes")
    assert source.info().entries == 18
    source.close()
    assert source.info().entries == 18
    source.close()


def test_many_images_become_several_requests_from_one_version(server_address: str):
    with connect(f"grpc://{server_address}/shapes") as source:
        answers = source.retrieve([picture("red", "circle", size=32)] * 70, k=2)
    assert len(answers) == 70
    assert {a.version for a in answers} == {1}


def test_vectors_of_a_wrong_shape_are_refused_before_they_travel(server_address: str):
    with (
        connect(f"grpc://{server_address}/shapes") as source,
        pytest.raises(errors.BadVector, match=r"pass \[N, D\]"),
    ):
        source.retrieve(vectors=np.ones(4, np.float32), fingerprint="x")
