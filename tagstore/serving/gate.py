"""Every call comes in through the gate: who it is from, whether there is room, how long it may take; and goes out through it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import grpc

from tagstore import errors
from tagstore.serving import metrics, tracing
from tagstore.serving.access import Access, Caller, Role, bearer
from tagstore.serving.audit import Audit
from tagstore.serving.current import current
from tagstore.serving.limits import Limits
from tagstore.serving.parsing import parsed
from tagstore.status import code_of, trailing

log = logging.getLogger(__name__)

_REFUSALS = (errors.NotAuthenticated, errors.NotPermitted, errors.Overloaded)


class Gate:
    """Access, limits and the audit log of a server."""

    def __init__(self, access: Access, limits: Limits, audit: Audit) -> None:
        self.access, self.limits, self.audit = access, limits, audit
        self.closed = ""
        """Why nothing is answered now, while the stores are being opened."""
        self._lock = threading.Lock()
        self._in_flight = 0
        self._streams = 0
        self._clients: dict[str, int] = {}
        self._sending: dict[Any, float] = {}

    def caller(self, context: Any) -> Caller:
        """Who a call comes from. Raises `NotAuthenticated`."""
        names = context.auth_context().get("x509_common_name") if self.access.certificates else None
        return self.access.caller(bearer(context.invocation_metadata()), names[0].decode() if names else "")

    def enter(self, context: Any, caller: Caller, *, stream: bool = False) -> None:
        """Count a call in, and out when its answer was taken. Raises `Overloaded`, or `Unavailable` at start-up."""
        if self.closed:
            raise errors.Unavailable(self.closed)
        client = caller.name if caller.known else context.peer()
        with self._lock:
            mine = self._clients.get(client, 0)
            if mine >= self.limits.per_client:
                raise errors.Overloaded(f"{caller.name} has {mine} calls in flight, as many as one client may: wait for some to end", 0.1)
            if stream and self._streams >= self.limits.streams:
                raise errors.Overloaded(f"{self._streams} streams are open, as many as there may be: try again later", 1.0)
            if not stream and self._in_flight >= self.limits.in_flight:
                raise errors.Overloaded(f"{self._in_flight} calls are in hand, as many as there may be: try again later", 0.1)
            self._clients[client] = mine + 1
            self._streams += stream
            self._in_flight += not stream
        metrics.IN_FLIGHT.inc()

        def leave() -> None:
            with self._lock:
                self._sending.pop(context, None)
                self._streams -= stream
                self._in_flight -= not stream
                if self._clients[client] == 1:
                    del self._clients[client]
                else:
                    self._clients[client] -= 1
            metrics.IN_FLIGHT.dec()

        if not context.add_callback(leave):
            leave()
            raise errors.TimedOut("the caller has gone")

    def sending(self, context: Any) -> None:
        """An answer is on its way to the client: from now on the client's time runs."""
        self._sending[context] = time.monotonic()

    def sent(self, context: Any) -> None:
        self._sending.pop(context, None)

    def cancel_slow(self) -> int:
        """End the calls whose client takes too long to accept its answer; returns how many."""
        limit = time.monotonic() - self.limits.slow_reader
        slow = [context for context, since in list(self._sending.items()) if since < limit]
        for context in slow:
            self._sending.pop(context, None)
            log.warning("a client at %s did not take its answer for %g s: its call is ended", context.peer(), self.limits.slow_reader)
            metrics.child(metrics.REFUSED, "slow reader").inc()
            context.cancel()
        return len(slow)

    @property
    def in_flight(self) -> int:
        return self._in_flight + self._streams

    def refused(self, error: errors.TagstoreError, context: Any, method: str, store: str, caller: Caller | None) -> None:
        """Count and record what was refused for a reason of access or load."""
        metrics.child(metrics.REFUSED, type(error).__name__).inc()
        self.audit.write(
            event="refused", method=method, store=store, caller=caller.name if caller else "", peer=context.peer(), reason=str(error)
        )


def answering(role: Role | None, *, writes: bool = False) -> Callable[[Callable[..., Any]], Callable[[Any, Any, Any], Any]]:
    """A method of a servicer as `method(self, request, context, caller)`: access, limits, deadline, metrics, audit, errors as status codes.

    Args:
        role: that the caller must have on the request's store; None where the method checks by itself.
        writes: whether the audit log has a line for every call.
    """

    def decorate(method: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
        name = method.__name__

        @wraps(method)
        def answer(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
            gate: Gate = self.gate
            start = time.perf_counter()
            store = getattr(request, "store", "")
            caller: Caller | None = None
            code = "OK"
            try:
                caller = gate.caller(context)
                parsed(request)
                if role is not None:
                    caller.check(role, store)
                gate.enter(context, caller)
                set_current(context, store)
                with tracing.span(name, context.invocation_metadata(), store=store):
                    response = method(self, request, context, caller)
                if writes:
                    gate.audit.write(event="done", method=name, store=store, caller=caller.name, peer=context.peer())
                gate.sending(context)
                return response
            except Exception as error:  # noqa: BLE001  what is not ours becomes INTERNAL
                failure = understood(error, name)
                code = code_of(failure).name
                if isinstance(failure, _REFUSALS):
                    gate.refused(failure, context, name, store, caller)
                elif writes:
                    gate.audit.write(
                        event="failed",
                        method=name,
                        store=store,
                        caller=caller.name if caller else "",
                        peer=context.peer(),
                        reason=str(failure),
                    )
                abort(context, failure)
            finally:
                known = store if code in ("OK", "INVALID_ARGUMENT") else ""  # names that callers make up are no labels
                metrics.child(metrics.REQUESTS, name, known, code).inc()
                metrics.child(metrics.LATENCY, name, known).observe(time.perf_counter() - start)

        return answer

    return decorate


@contextmanager
def streaming(gate: Gate, context: Any, name: str, caller: Caller | None = None) -> Iterator[Caller]:
    """As `answering`, around the body of a method that streams."""
    try:
        caller = gate.caller(context)
        gate.enter(context, caller, stream=True)
        set_current(context, "")
        yield caller
    except GeneratorExit:
        raise
    except Exception as error:  # noqa: BLE001  what is not ours becomes INTERNAL
        failure = understood(error, name)
        if isinstance(failure, _REFUSALS):
            gate.refused(failure, context, name, "", caller)
        abort(context, failure)


def set_current(context: Any, store: str) -> None:
    """What the work in this thread is for."""
    left = context.time_remaining()
    current.deadline = float("inf") if left is None else time.monotonic() + left
    current.store = store


def understood(error: Exception, name: str) -> errors.TagstoreError:
    """An error as a caller may see it: nothing of a fault of ours, nor of what the server's disks look like."""
    if isinstance(error, errors.Damaged | errors.WriteFailed):
        log.error("%s failed: %s", name, error)
        what = "the store is damaged" if isinstance(error, errors.Damaged) else "the server's disk took nothing"
        return type(error)(f"{what}; the server's log has the details")
    if isinstance(error, errors.TagstoreError):
        return error
    log.error("%s failed", name, exc_info=error)
    return errors.TagstoreError(f"{name} failed by a fault of the server; its log has the details")


def abort(context: Any, error: errors.TagstoreError) -> NoReturn:
    """End a call with the status that stands for an error."""
    metadata = trailing(error)
    if metadata:
        context.set_trailing_metadata(metadata)
    context.abort(code_of(error), str(error))
    raise AssertionError("abort does not return")
