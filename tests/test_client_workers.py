"""DataLoader workers, however they are started, while their parent goes on using the source."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pictures import picture
from tagstore.client import connect

MATRIX = Path(__file__).parent / "fork_matrix.py"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--combinations", "fork:0", "fork:2", "fork:8", "forkserver:2", "forkserver:8"],
        ["--combinations", "spawn:2", "--epochs", "1"],
    ],
    ids=["fork and forkserver", "spawn"],
)
def test_every_sample_comes_once_and_nothing_hangs(server_address: str, arguments: list[str]):
    command = [sys.executable, str(MATRIX), f"grpc://{server_address}/shapes", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all there" in result.stdout


def test_a_fork_where_grpc_was_imported_first_is_refused_instead_of_hanging(server_address: str):
    program = f"""
import os, grpc
from tagstore_proto.v1 import tagstore_pb2_grpc
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
from tagstore.client import connect
source = connect("grpc://{server_address}/shapes")
source.info()
if os.fork() == 0:
    try:
        source.info()
    except Exception as error:
        os.write(1, str(error).encode())
    os._exit(0)
os.wait()
"""
    env = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    ).stdout
    assert "import tagstore.client before grpc" in out


def _nearest(source, data: bytes) -> tuple[str, bool]:
    [answer] = source.retrieve([data], keys=["red-circle"])
    return answer.neighbours[0].key, answer.version == 1


def test_a_source_travels_as_its_configuration(server_address: str):
    source = connect(f"grpc://{server_address}/shapes", k=2, exclude="self")
    source.pin()
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.options, copy.pin()) == (source.options, source.pin())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        key, pinned = pool.apply(_nearest, (source, picture("red", "circle")))
    assert pinned
    assert key != "red-circle"
    # the parent's counts include the worker's
    stats = source.stats()
    assert (stats.queries, stats.guarded) == (1, 1)
    assert stats.excluded >= 1
    source.close()


def test_a_token_travels_and_is_not_shown():
    source = connect("grpc://store:1/s", token="secret")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.options.token == "secret"
    assert "secret" not in repr(copy) + repr(copy.options)


def test_counters_of_another_machine_start_anew(server_address: str, tmp_path: Path):
    source = connect(f"grpc://{server_address}/shapes")
    reopen, (url, location, options, _) = source.__reduce__()
    copy = reopen(url, location, options, str(tmp_path / "is not here"))
    assert copy.stats().queries == 0
    copy.counters.add(queries=3)
    assert (copy.stats().queries, source.stats().queries) == (3, 0)
