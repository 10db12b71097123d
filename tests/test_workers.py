"""Several processes on one port: they share it, survive each other and drain."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import grpc
import pytest

from benchmarks import synthetic
from serving import serve_command
from tagstore import errors
from tagstore.serving.settings import Settings
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc
from waiting import wait_until


def test_workers_share_a_port_survive_each_other_and_drain(tmp_path: Path):
    """One test for the whole life of a group of processes: starting it takes seconds."""
    root = tmp_path / "root"
    synthetic.build(root, 300, 64)  # of an encoder that cannot be loaded, so that nobody waits for torch
    options = ("--workers", "2", "--anonymous", "admin", "--metrics", "127.0.0.1:0")
    command = serve_command(root, *options, "--audit", str(tmp_path / "audit"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        children = workers_of(process.pid)
        assert len(children) == 2
        vectors = convert.vectors_to_proto(synthetic.queries(1, 300, 64))
        request = pb.RetrieveRequest(
            store="bench", vectors=vectors, fingerprint=synthetic.fingerprint(64).digest
        )
        expected = call(address, request)
        # both of them answer, over connections of their own
        for _ in range(20):
            assert call(address, request) == expected
        os.kill(children[0], signal.SIGKILL)
        # the kernel may have given a connection to the dead worker: such a call fails at once and is repeated
        for _ in range(20):
            assert again(address, request) == expected
        wait_until(lambda: len(workers_of(process.pid)) == 2 and children[0] not in workers_of(process.pid))
        children = workers_of(process.pid)
        assert again(address, request) == expected
        from tagstore.client.admin import administer

        with administer(f"grpc://{address}/bench") as admin:
            admin.unload()
        until_unloaded(address, request)
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.TagStoreStub(channel)
            pb_grpc.AdminStub(channel).Load(pb.LoadRequest(store="bench"))
            assert stub.Retrieve(request).retrievals
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


def workers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def call(address: str, request: pb.RetrieveRequest) -> pb.RetrieveResponse:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        return pb_grpc.TagStoreStub(channel).Retrieve(request, timeout=30)


def again(address: str, request: pb.RetrieveRequest) -> pb.RetrieveResponse:
    for _ in range(100):
        try:
            return call(address, request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
    raise AssertionError("no worker answers")


def until_unloaded(address: str, request: pb.RetrieveRequest) -> None:
    """Call until 20 calls were refused: the other worker learns of it a moment later."""
    refusals = []

    def refused_often() -> bool:
        try:
            call(address, request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            refusals.append(error)
        return len(refusals) == 20

    wait_until(refused_often)


def test_a_supervisor_refuses_what_a_server_refuses(shapes_root: Path, server_address: str, tmp_path: Path):
    from tagstore.serving.workers import Supervisor

    with pytest.raises(errors.Unavailable, match="is another server running"):
        Supervisor(shapes_root, server_address, settings=Settings(workers=2))
    with pytest.raises(errors.InvalidInput, match="--insecure"):
        Supervisor(shapes_root, "0.0.0.0:0", settings=Settings(workers=2))
    supervisor = Supervisor(tmp_path / "nothing", "127.0.0.1:0", settings=Settings(workers=2))
    with pytest.raises(errors.InvalidInput, match="no directory"):
        supervisor.start()
