"""What gRPC itself costs on this machine: a bare echo, 2 KB in and 1 KB out, behind each face that it has in Python.

    python -m benchmarks.serving.grpc_echo [--work 0 200] [--seconds 2] [--quick]

The server is a process of its own (two with SO_REUSEPORT in one row), the load another; both share the machine's cores. Rows: p50 and p99
of one client, calls a second of eight clients, messages a second over streams, and the server's own CPU time of a call with eight clients.
`--work MICROSECONDS`, one table for each that is given, makes the handler spend that much in C without the GIL (as a search does): in its
own thread, in the event loop, in the loop's pool, or in one thread that takes all that waits as one batch.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import numpy as np

from benchmarks.report import table, write
from benchmarks.serving.callers import Apart, blocking_callers, callers, one_caller, streamed
from benchmarks.serving.servers import child_server, cpu_seconds, echo

REQUEST, RESPONSE = bytes(2100), bytes(1000)
FACES = (
    "sync pool",
    "sync pool, unix socket",
    "aio",
    "aio, uvloop",
    "aio, uvloop, unix socket",
    "aio, uvloop, 2 processes",
    "aio, uvloop, work in threads",
    "aio, uvloop, one search thread",
)
COLUMNS = (
    ("p50 ms", 2),
    ("p99 ms", 2),
    ("8 blocking clients, calls/s", 0),
    ("8 aio clients, calls/s", 0),
    ("server's CPU, us a call", 0),
    ("stream, one at a time", 0),
    ("stream, 32 ahead", 0),
)


def measure(face: str, seconds: float, work: float, apart: Apart) -> tuple[float, ...]:
    """A row: the figures of `COLUMNS`."""
    messages = [REQUEST]
    with tempfile.TemporaryDirectory() as scratch:
        address = f"unix:{scratch}/socket" if "unix" in face else ""
        with child_server(
            echo, face, RESPONSE, work, address=address, processes=2 if "2 processes" in face else 1
        ) as (where, pids):
            p50, p99 = apart(one_caller, where, messages, seconds)
            blocking = apart(blocking_callers, where, messages, 8, seconds)
            before = cpu_seconds(*pids)
            aio = apart(callers, where, messages, 8, seconds)
            spent = (cpu_seconds(*pids) - before) / aio.calls * 1e6
            ping, pipelined = (apart(streamed, where, messages, ahead, seconds) for ahead in (1, 32))
    return (p50, p99, blocking.per_second, aio.per_second, spent, ping.per_second, pipelined.per_second)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each figure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=float, nargs="+", default=[0.0, 200.0], metavar="MICROSECONDS", help="of the handler"
    )
    parser.add_argument("--quick", action="store_true", help="half a second each, once; not kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.repeats = 0.3, 1
    minutes = len(arguments.work) * arguments.repeats * len(FACES) * (5 * arguments.seconds + 4) / 60
    print(
        f"{len(FACES)} faces, {arguments.repeats} times, for {len(arguments.work)} amounts of work: about {minutes:.0f} min ...",
        flush=True,
    )
    parts = []
    with Apart() as apart:
        for work in arguments.work:
            found: dict[str, list[tuple[float, ...]]] = {face: [] for face in FACES}
            for _ in range(arguments.repeats):
                for face in FACES:  # in turn, so that what else the machine does falls on all of them
                    found[face].append(measure(face, arguments.seconds, work, apart))
            rows = []
            for face, runs in found.items():
                medians = np.median(runs, axis=0)
                rows.append(
                    [
                        face,
                        *(
                            f"{value:,.{digits}f}"
                            for value, (_, digits) in zip(medians, COLUMNS, strict=True)
                        ),
                    ]
                )
            parts += [
                f"The handler's own work: {work:g} us.",
                table(["face", *(name for name, _ in COLUMNS)], rows),
            ]
    about = (
        f"Echo of {len(REQUEST)} -> {len(RESPONSE)} bytes, medians of {arguments.repeats}; load and server share {os.cpu_count()} cores. "
        f"Load average at the end {os.getloadavg()[0]:.1f}."
    )
    write(
        "faces",
        "What gRPC costs by itself",
        about,
        *parts,
        packages=("grpcio", "uvloop"),
        keep=not arguments.quick,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
