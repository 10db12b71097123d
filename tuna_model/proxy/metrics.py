"""Counts of the proxy, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """The counts of one proxy."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tuna_proxy_requests", "Requests, by what was done to them: tagged, untouched, degraded.",
            ["outcome"], registry=self.registry,
        )  # fmt: skip
        self.degraded = Counter(
            "tuna_proxy_degraded", "Requests with pictures that got no tags, by reason.",
            ["reason"], registry=self.registry,
        )  # fmt: skip
        self.tagging = Histogram(
            "tuna_proxy_tagging_seconds", "From a request's body to the one that is forwarded.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.upstream = Histogram(
            "tuna_proxy_upstream_seconds", "Until an upstream began to answer.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.failures = Counter(
            "tuna_proxy_upstream_failures",
            "Requests that an upstream did not answer.",
            registry=self.registry,
        )
        self.open = Gauge("tuna_proxy_open_requests", "Requests under way.", registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
