"""A plain gRPC client in forked workers: the failure that `tagstore.client` prevents.

    python -m benchmarks.client.plain_grpc_forks [--workers 8] [--timeout 10]

A parent queries a server once, then forks workers that query it too. Each way runs in its own process, so
that a hang can be ended:

    inherited   workers use the parent's channel
    reopened    workers open their own channel, the usual advice
    busy        as reopened, while other threads of the parent send queries
    tagstore    as busy, but workers use the parent's `tagstore.client` source
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

from benchmarks.report import arguments_parser

SERVER = """
from concurrent.futures import ThreadPoolExecutor
import grpc
from tagstore_proto.v1 import tagstore_pb2 as pb, tagstore_pb2_grpc as pb_grpc
class Service(pb_grpc.TagStoreServicer):
    def Retrieve(self, request, context):
        retrievals = [pb.Retrieval() for _ in request.images]
        return pb.RetrieveResponse(store=request.store, version=1, retrievals=retrievals)
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
    query = lambda: source.retrieve([b"1"])
else:
    import grpc
    from tagstore_proto.v1 import tagstore_pb2 as pb, tagstore_pb2_grpc as pb_grpc
    def open_channel():
        stub = pb_grpc.TagStoreStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        return lambda: stub.Retrieve(pb.RetrieveRequest(store="s", images=[b"1"]), timeout=3)
    query = open_channel()
query()
def keep_querying():
    while True:
        query()
if way in ("busy", "tagstore"):
    for _ in range(3):
        threading.Thread(target=keep_querying, daemon=True).start()
children = []
for _ in range(workers):
    child = os.fork()
    if not child:
        code = 0
        try:
            if way in ("reopened", "busy"):
                query = open_channel()
            for _ in range(20):
                query()
        except Exception:
            code = 1
        os._exit(code)
    children.append(child)
for child in children:
    print("failed" if os.waitpid(child, 0)[1] else "answered", flush=True)
os._exit(0)
"""


def outcome(way: str, port: str, workers: int, timeout: float, fork_support: str | None) -> Counter[str]:
    """How many workers were answered, failed, or had to be killed after `timeout` seconds."""
    env = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    if fork_support is not None:
        env["GRPC_ENABLE_FORK_SUPPORT"] = fork_support
    command = [sys.executable, "-c", CLIENT, way, port, str(workers)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes)
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        text, _ = process.communicate()
    counts = Counter(text.split())
    counts["hung"] = workers - counts.total()
    return counts


def measure(workers: int, timeout: float) -> list[list[object]]:
    """A row for each way and setting of gRPC's fork support: workers answered, failed, hung."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        rows: list[list[object]] = []
        for way in ("inherited", "reopened", "busy", "tagstore"):
            for fork_support in (None, "0", "1"):
                if way == "tagstore" and fork_support == "0":
                    continue  # refused with an error that says so
                counts = outcome(way, port, workers, timeout, fork_support)
                columns = (counts[name] for name in ("answered", "failed", "hung"))
                rows.append([way, "not set" if fork_support is None else fork_support, *columns])
        return rows
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds after which a worker has hung")
    arguments = parser.parse_args()
    for row in measure(arguments.workers, arguments.timeout):
        print("{:<10} GRPC_ENABLE_FORK_SUPPORT {:<8} answered {} failed {} hung {}".format(*row))


if __name__ == "__main__":
    main()
