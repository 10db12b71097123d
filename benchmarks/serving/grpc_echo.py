"""What gRPC itself costs on this machine: an echo of 2 KB in and 1 KB out, behind each of its Python APIs.

    python -m benchmarks.serving.grpc_echo [--work 0 200] [--seconds 2] [--quick]

The server runs in its own process (two with SO_REUSEPORT in one row), the load in another; they share the
cores. Rows: p50 and p99 of one client, calls a second of eight clients, messages a second over streams, and
the server's CPU time of a call with eight clients. For each `--work MICROSECONDS` there is a table: the
handler works that long in C without the GIL (as a search does), in its own thread, in the event loop, in the
loop's pool, or in one thread that takes all waiting calls as one batch.
"""

from __future__ import annotations

import os
import tempfile

import numpy as np

from benchmarks.processes import cpu_seconds
from benchmarks.report import arguments_parser, table, write
from benchmarks.serving.callers import (
    LoadProcess,
    async_callers,
    blocking_callers,
    one_caller,
    stream_caller,
)
from benchmarks.serving.comparison_servers import echo_server, in_processes

REQUEST, RESPONSE = bytes(2100), bytes(1000)
APIS = (
    "sync pool", "sync pool, unix socket", "aio", "aio, uvloop", "aio, uvloop, unix socket",
    "aio, uvloop, 2 processes", "aio, uvloop, work in threads", "aio, uvloop, one search thread",
)  # fmt: skip
DIGITS = {
    "p50 ms": 2,
    "p99 ms": 2,
    "8 blocking clients, calls/s": 0,
    "8 aio clients, calls/s": 0,
    "server's CPU, us a call": 0,
    "stream, one at a time": 0,
    "stream, 32 ahead": 0,
}


def measure(api: str, seconds: float, work: float, load: LoadProcess) -> tuple[float, ...]:
    """A row: the figures of `DIGITS`."""
    messages = [REQUEST]
    with tempfile.TemporaryDirectory() as scratch:
        address = f"unix:{scratch}/socket" if "unix" in api else ""
        processes = 2 if "2 processes" in api else 1
        with in_processes(echo_server, api, RESPONSE, work, address=address, processes=processes) as (
            address,
            pids,
        ):
            p50, p99 = load(one_caller, address, messages, seconds)
            blocking = load(blocking_callers, address, messages, 8, seconds)
            before = cpu_seconds(*pids)
            aio = load(async_callers, address, messages, 8, seconds)
            cpu = (cpu_seconds(*pids) - before) / aio.calls * 1e6
            single, ahead = (load(stream_caller, address, messages, n, seconds) for n in (1, 32))
    return p50, p99, blocking.per_second, aio.per_second, cpu, single.per_second, ahead.per_second


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each figure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=float, nargs="+", default=[0.0, 200.0], metavar="MICROSECONDS", help="of the handler"
    )
    parser.add_argument("--quick", action="store_true", help="0.3 seconds each, once; not kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.repeats = 0.3, 1
    rows_in_all = len(arguments.work) * arguments.repeats * len(APIS)
    print(f"about {rows_in_all * (5 * arguments.seconds + 4) / 60:.0f} min ...", flush=True)
    parts = []
    with LoadProcess() as load:
        for work in arguments.work:
            runs: dict[str, list[tuple[float, ...]]] = {api: [] for api in APIS}
            for _ in range(arguments.repeats):
                for api in APIS:  # in turn, so that what else the machine does falls on all of them
                    runs[api].append(measure(api, arguments.seconds, work, load))
            medians = {api: np.median(figures, axis=0) for api, figures in runs.items()}
            rows = [
                [api, *(f"{value:,.{digits}f}" for value, digits in zip(row, DIGITS.values(), strict=True))]
                for api, row in medians.items()
            ]
            parts += [f"The handler's own work: {work:g} us.", table(["API", *DIGITS], rows)]
    about = (
        f"Echo of {len(REQUEST)} -> {len(RESPONSE)} bytes, medians of {arguments.repeats}; load and server "
        f"share {os.cpu_count()} cores. Load average at the end {os.getloadavg()[0]:.1f}."
    )
    packages = ("grpcio", "uvloop")
    write("faces", "What gRPC costs by itself", about, *parts, packages=packages, keep=not arguments.quick)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
