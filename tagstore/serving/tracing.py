"""OpenTelemetry spans, if switched on and installed (`tagstore[otel]`); otherwise nothing, at no cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

from tagstore.errors import MissingExtra

NO_SPAN: AbstractContextManager[Any] = nullcontext()
enabled = False
"""Whether spans are recorded."""
_tracer: Any = None


def enable() -> None:
    """Send spans to the collector that the variables OTEL_EXPORTER_OTLP_* name. Raises `MissingExtra`."""
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        raise MissingExtra("tracing needs OpenTelemetry: pip install 'tagstore[otel]'")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "tagstore"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)


def use(provider: Any) -> None:
    """Give spans to a provider, or switch tracing off with None."""
    global _tracer, enabled
    _tracer = provider.get_tracer("tagstore") if provider is not None else None
    enabled = _tracer is not None


def start(name: str, **attributes: str | int) -> Callable[[object], None]:
    """Start a child of the current span and return the function that ends it.

    Call this only while `enabled`.
    """
    span = _tracer.start_span(name, attributes=attributes)
    return lambda _: span.end()


def span(
    name: str, metadata: Iterable[tuple[str, str | bytes]] = (), **attributes: str | int
) -> AbstractContextManager[Any]:
    """Return a context in a span, which is a child of the caller's span if the metadata carry a trace."""
    if _tracer is None:
        return NO_SPAN
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key: str(value) for key, value in metadata if key in ("traceparent", "tracestate")}
    parent = TraceContextTextMapPropagator().extract(carrier) if carrier else None
    context: AbstractContextManager[Any] = _tracer.start_as_current_span(
        name, context=parent, attributes=attributes
    )
    return context
