"""The gate identifies callers, enforces limits, ends calls of slow readers, and writes the audit log."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from tagstore import errors
from tagstore.serving import metrics
from tagstore.serving.access import Access
from tagstore.serving.arrivals import Arrivals
from tagstore.serving.audit import Audit
from tagstore.serving.call import Call
from tagstore.serving.damages import LeftOut
from tagstore.serving.message_memory import MessageMemory
from tagstore.serving.settings import Limits
from tagstore.serving.stream_places import StreamPlaces
from tagstore.wire.status import code_of, trailing

log = logging.getLogger(__name__)

MAX_DETAILS = 4096
"""Characters of an error's message on the wire: it may repeat what the caller sent."""
REFUSALS = (errors.NotAuthenticated, errors.NotPermitted, errors.Overloaded)


class Gate:
    """Access, limits and the audit log of a server.

    Only the event loop's thread may use more than `refused` and `audit`.
    """

    def __init__(self, access: Access, limits: Limits, audit: Audit) -> None:
        self.access, self.limits, self.audit = access, limits, audit
        self.closed = ""
        """Why calls are refused while the stores are being opened; empty once the server answers."""
        self.arrivals, self.streams = Arrivals(limits), StreamPlaces(limits)
        self.memory = MessageMemory(limits)
        self._calls = 0
        self._last_prompt = 0.0
        """When a call was last answered within `Limits.soon`, or came to an idle server."""
        self._clients: dict[str, int] = {}

    def open(self) -> None:
        """Answer calls from now on."""
        self.closed = ""

    @property
    def in_flight(self) -> int:
        """Calls and streams in flight."""
        return self._calls + len(self.streams)

    def is_idle(self) -> bool:
        """Tell whether at most one call or stream is in flight."""
        return self._calls + len(self.streams) <= 1

    @property
    def full(self) -> bool:
        """Whether the calls in flight have reached their limit.

        The limit is `in_flight`, or `standing` when no call was answered soon for longer than a burst lasts.
        This follows CoDel (Nichols and Jacobson, ACM Queue 10(5), 2012): the shortest wait in a queue, not
        its length, distinguishes a queue that drains from one that stands.
        """
        if self._calls < min(self.limits.standing, self.limits.in_flight):
            return False
        return (
            self._calls >= self.limits.in_flight or time.monotonic() - self._last_prompt > self.limits.burst
        )

    def overloaded(self) -> errors.Overloaded:
        """Make the error for a call that comes while the server is full."""
        return errors.Overloaded(
            f"{self._calls} calls are in hand, as many as there may be: try again later", 0.1
        )

    def enter(self, call: Call, *, stream: bool = False) -> None:
        """Count a call until its answer is taken. Raises `Overloaded`, or `Unavailable` at start-up."""
        if self.closed:
            raise errors.Unavailable(self.closed)
        client = call.caller.name if call.caller.known else call.peer
        in_flight = self._clients.get(client, 0)
        if in_flight >= self.limits.per_client:
            raise errors.Overloaded(
                f"{call.caller.name} has {in_flight} calls in flight, as many as one client may: "
                "wait for some to end",
                0.1,
            )
        if stream:
            self.streams.take(call, client)
        elif self.full:
            raise self.overloaded()
        call.entered = time.monotonic()
        if not self._calls:
            self._last_prompt = call.entered
        self._clients[client] = in_flight + 1
        self._calls += not stream
        metrics.IN_FLIGHT.inc()
        call.client, call.stream = client, stream
        call.context.add_done_callback(lambda _: self._leave(call))

    def _leave(self, call: Call) -> None:
        self.memory.release(call)
        self.streams.leave(call)
        if call.client is None:
            return
        self._calls -= not call.stream
        if not call.stream and (now := time.monotonic()) - call.entered <= self.limits.soon:
            self._last_prompt = now
        if self._clients[call.client] == 1:
            del self._clients[call.client]
        else:
            self._clients[call.client] -= 1
        call.client = None
        metrics.IN_FLIGHT.dec()

    async def read(self, call: Call) -> bytes:
        """Read the message of a call. Raises `InvalidInput` if there is none, `Overloaded`, `TimedOut`."""
        data = await self.arrivals.read(call)
        self.memory.take(call, len(data))
        return data

    def sent(self, call: Call) -> None:
        """Note that the client has taken an answer of a stream."""
        unanswered = bool(call.unanswered)
        self.memory.answered(call)
        if unanswered:
            self.streams.answered(call)

    def end_slow(self) -> int:
        """End the calls whose client takes too long to accept an answer or to send the next message.

        Returns how many there were.
        """
        limit = self.limits.slow_reader
        slow = self.memory.hang_up_on_slow(limit)
        for call in slow:
            log.warning(
                "a client at %s did not take its answer for %g s: the connection is ended", call.peer, limit
            )
            call.end(errors.Unavailable("the answers were not taken"))
        return len(slow) + self.streams.end_idle()

    def refused(
        self, error: errors.TagstoreError, context: Any, method: str, store: str, call: Call | None
    ) -> None:
        """Count and record a call that was refused for a reason of access or load."""
        metrics.child(metrics.REFUSED, type(error).__name__).inc()
        name, store = (call.caller.name, store or call.named_store) if call else ("", store)
        event = {"method": method, "store": store, "caller": name, "peer": context.peer()}
        self.audit.end("refused", **event, reason=str(error))


class Door(grpc.GenericRpcHandler):
    """Refuses calls while the server is full, before their messages are read.

    Args:
        handlers: the handler of each method, by full name.
        limited: names of the methods that are refused; the others, health above all, are always let in.
    """

    def __init__(self, handlers: Mapping[str, Any], gate: Gate, limited: Collection[str]) -> None:
        self._handlers, self._gate, self._limited = handlers, gate, frozenset(limited)

        async def refuse(_: Any, context: Any) -> None:
            metrics.child(metrics.REFUSED, "queue").inc()
            await abort(context, gate.overloaded())

        # a handler of a stream of requests: one of a single request would wait for its message first
        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if self._gate.full and method in self._limited:
            return self._refusal
        return self._handlers.get(method)


def public_error(error: Exception, name: str) -> errors.TagstoreError:
    """Turn an exception into the error that the caller gets: it hides the server's faults and disks."""
    if isinstance(error, LeftOut):
        return error
    if isinstance(error, errors.Damaged | errors.WriteFailed):
        log.error("%s failed: %s", name, error)
        damaged = isinstance(error, errors.Damaged)
        summary = "the store or the version is damaged" if damaged else "the server's disk took nothing"
        return type(error)(f"{summary}; the server's log has the details")
    if isinstance(error, errors.TagstoreError):
        return error
    if isinstance(error, DecodeError):
        return errors.InvalidInput(f"the message cannot be parsed: {error}")
    log.error("%s failed", name, exc_info=error)
    return errors.TagstoreError(f"{name} failed by a fault of the server; its log has the details")


async def abort(context: Any, error: errors.TagstoreError) -> NoReturn:
    """End a call with the status that stands for an error."""
    # tracebacks would keep the frames of the call, and the message in them, until cycles are collected
    error.__traceback__ = error.__context__ = error.__cause__ = None
    await context.abort(code_of(error), str(error)[:MAX_DETAILS], trailing(error))
    raise AssertionError("abort does not return")
