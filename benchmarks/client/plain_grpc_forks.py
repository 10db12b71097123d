"""What happens to a plain gRPC client in forked workers: the accident that `tagstore.client` is made against.

    python -m benchmarks.client.plain_grpc_forks [--workers 8] [--patience 10]

A parent asks a server once, then forks workers that ask it too, each in a process of its own so that a hang can be ended:

    inherited   workers use the parent's channel
    reopened    workers open a channel of their own, the advice that is given most
    busy        as reopened, while other threads of the parent are asking
    tagstore    workers use the parent's `tagstore.client` source, while other threads of the parent are asking
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter

SERVER = """
from concurrent.futures import ThreadPoolExecutor
import grpc
from tagstore_proto.v1 import tagstore_pb2 as pb, tagstore_pb2_grpc as pb_grpc
class Service(pb_grpc.TagStoreServicer):
    def Retrieve(self, request, context):
        return pb.RetrieveResponse(store=request.store, version=1, retrievals=[pb.Retrieval() for _ in request.images])
server = grpc.server(ThreadPoolExecutor(8))
pb_grpc.add_TagStoreServicer_to_server(Service(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""

CLIENT = """
import os, sys, threading
way, port, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
if way == "tagstore":
    from tagstore.client import connect
    source = connect(f"grpc://127.0.0.1:{port}/s")
    ask = lambda: source.retrieve([b"1"])
else:
    import grpc
    from tagstore_proto.v1 import tagstore_pb2 as pb, tagstore_pb2_grpc as pb_grpc
    def opened():
        stub = pb_grpc.TagStoreStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        return lambda: stub.Retrieve(pb.RetrieveRequest(store="s", images=[b"1"]), timeout=3)
    ask = opened()
ask()
def keep_asking():
    while True:
        ask()
if way in ("busy", "tagstore"):
    for _ in range(3):
        threading.Thread(target=keep_asking, daemon=True).start()
children = []
for _ in range(workers):
    child = os.fork()
    if not child:
        code = 0
        try:
            if way in ("reopened", "busy"):
                ask = opened()
            for _ in range(20):
                ask()
        except Exception:
            code = 1
        os._exit(code)
    children.append(child)
for child in children:
    print("failed" if os.waitpid(child, 0)[1] else "answered", flush=True)
os._exit(0)
"""


def outcome(way: str, port: str, workers: int, patience: float, support: str | None) -> Counter[str]:
    """How many workers were answered, failed, or had to be killed after `patience` seconds."""
    env = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    if support is not None:
        env["GRPC_ENABLE_FORK_SUPPORT"] = support
    command = [sys.executable, "-c", CLIENT, way, port, str(workers)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        text, _ = process.communicate()
    counted = Counter(text.split())
    counted["hung"] = workers - counted.total()
    return counted


def measure(workers: int, patience: float) -> list[list[object]]:
    """A row for each way and setting of gRPC's fork support: workers answered, failed, hung."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        rows = []
        for way in ("inherited", "reopened", "busy", "tagstore"):
            for support in (None, "0", "1"):
                if way == "tagstore" and support == "0":
                    continue  # refused with an error that says so
                found = outcome(way, port, workers, patience, support)
                rows.append(
                    [
                        way,
                        "not set" if support is None else support,
                        found["answered"],
                        found["failed"],
                        found["hung"],
                    ]
                )
        return rows
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds after which a worker counts as hanging"
    )
    arguments = parser.parse_args()
    for row in measure(arguments.workers, arguments.patience):
        print("{:<10} GRPC_ENABLE_FORK_SUPPORT {:<8} answered {} failed {} hung {}".format(*row))


if __name__ == "__main__":
    main()
