"""A server's Prometheus metrics.

If the variable PROMETHEUS_MULTIPROC_DIR is set before this module is imported, workers count into that
directory, and `probes.serve` adds them up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.multiprocess import mark_process_dead

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)

REQUESTS = Counter(
    "tagstore_requests_total", "Calls by method, store and status code.", ["method", "store", "code"]
)
LATENCY = Histogram(
    "tagstore_request_seconds",
    "Seconds from the arrival of a request to its answer.",
    ["method", "store"],
    buckets=_SECONDS,
)
STAGE = Histogram(
    "tagstore_stage_seconds",
    "Seconds by stage: queue, decode, embed, search, tags.",
    ["stage", "store"],
    buckets=_SECONDS,
)
BATCH = Histogram("tagstore_batch_rows", "Images or vectors processed together.", ["stage"], buckets=_ROWS)
DEPTH = Gauge("tagstore_queue_rows", "Images or vectors waiting.", ["stage"], multiprocess_mode="livesum")
IN_FLIGHT = Gauge("tagstore_in_flight", "Calls in flight.", multiprocess_mode="livesum")
VERSION = Gauge("tagstore_store_version", "The version that answers.", ["store"], multiprocess_mode="livemax")
DAMAGED = Gauge(
    "tagstore_store_damaged",
    "1 for a store that is left out because it is damaged.",
    ["store"],
    multiprocess_mode="livemax",
)
SCRUBBED = Counter("tagstore_scrubbed_bytes_total", "Bytes compared with their checksums in the background.")
SCRUB_SHARE = Gauge(
    "tagstore_store_scrubbed",
    "Share of a store's checksums that the current pass of the scrub has compared.",
    ["store"],
    multiprocess_mode="livemax",
)
REFUSED = Counter("tagstore_refused_total", "Calls refused for a reason of access or load.", ["reason"])


@cache
def child(metric: Any, *labels: str) -> Any:
    """Return `metric.labels(...)`, cached, because that takes a lock and several microseconds each time."""
    return metric.labels(*labels)


def stage(name: str, store: str, seconds: float) -> None:
    """Record the time of a stage."""
    child(STAGE, name, store).observe(seconds)


def batch(name: str, rows: int, depth: int) -> None:
    """Record the size of a batch and the number of rows that wait."""
    child(BATCH, name).observe(rows)
    child(DEPTH, name).set(depth)


def forget(pid: int, directory: str) -> None:
    """Remove the gauges of a worker that has ended."""
    mark_process_dead(pid, directory)
