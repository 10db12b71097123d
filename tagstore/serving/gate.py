"""The gate: who a call is from, whether there is room for it, whether its answer is taken, and what is written down of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import grpc

from tagstore import errors
from tagstore.serving import metrics
from tagstore.serving.access import Access, Caller, bearer
from tagstore.serving.audit import Audit
from tagstore.serving.settings import Limits
from tagstore.wire.status import code_of, trailing

log = logging.getLogger(__name__)

GONE = "the caller has gone: nothing was changed"
REFUSALS = (errors.NotAuthenticated, errors.NotPermitted, errors.Overloaded)


class Call:
    """A call in hand, or a stream. Its context is for the event loop's thread alone; the rest may be read in any."""

    __slots__ = (
        "caller",
        "context",
        "counted",
        "deadline",
        "entered",
        "gone",
        "peer",
        "slow",
        "stream",
        "task",
    )

    def __init__(self, context: Any, caller: Caller) -> None:
        self.context, self.caller = context, caller
        self.peer: str = context.peer()
        left = context.time_remaining()
        self.entered = time.monotonic()
        self.deadline = float("inf") if left is None else self.entered + left
        """On the monotonic clock."""
        self.task = asyncio.current_task()
        self.counted: str | None = None
        """As whose call it is counted, while it is."""
        self.stream = False
        self.gone = False
        """Whether nobody waits for an answer any more."""
        self.slow = False
        """Whether it was given up because its client does not take the answer."""

    def check(self) -> None:
        """Raises `Unavailable` once the caller has gone."""
        if self.gone:
            raise errors.Unavailable(GONE)


class Gate:
    """Access, limits and the audit log of a server. Everything but `refused` and `audit` is for the event loop's thread."""

    def __init__(self, access: Access, limits: Limits, audit: Audit) -> None:
        self.access, self.limits, self.audit = access, limits, audit
        self.closed = ""
        """Why nothing is answered now, while the stores are being opened."""
        self._calls = 0
        self._streams = 0
        self._quick = 0.0
        """When a call was last answered soon, or came to an idle server."""
        self._clients: dict[str, int] = {}
        self._sending: dict[Call, float] = {}

    def open(self) -> None:
        """From now on calls are answered."""
        self.closed = ""

    @property
    def in_flight(self) -> int:
        return self._calls + self._streams

    def is_idle(self) -> bool:
        """Whether at most one call or stream is in hand."""
        return self._calls + self._streams <= 1

    @property
    def full(self) -> bool:
        """Whether as many calls are in hand as there may be.

        Fewer, when they have been answered late for longer than a burst lasts: after Nichols and Jacobson's CoDel (ACM Queue 10(5), 2012),
        which tells a queue that drains from one that stands by the shortest wait in it, not by its length.
        """
        if self._calls < min(self.limits.standing, self.limits.in_flight):
            return False
        return self._calls >= self.limits.in_flight or time.monotonic() - self._quick > self.limits.burst

    def overloaded(self) -> errors.Overloaded:
        """What a call is told that finds the server full."""
        return errors.Overloaded(
            f"{self._calls} calls are in hand, as many as there may be: try again later", 0.1
        )

    def call(self, context: Any) -> Call:
        """Whose call this is. Raises `NotAuthenticated`."""
        names = context.auth_context().get("x509_common_name") if self.access.certificates else None
        return Call(
            context,
            self.access.caller(bearer(context.invocation_metadata()), names[0].decode() if names else ""),
        )

    def enter(self, call: Call, *, stream: bool = False) -> None:
        """Count a call in, and out when its answer was taken. Raises `Overloaded`, or `Unavailable` at start-up."""
        if self.closed:
            raise errors.Unavailable(self.closed)
        client = call.caller.name if call.caller.known else call.peer
        mine = self._clients.get(client, 0)
        if mine >= self.limits.per_client:
            raise errors.Overloaded(
                f"{call.caller.name} has {mine} calls in flight, as many as one client may: wait for some to end",
                0.1,
            )
        if stream and self._streams >= self.limits.streams:
            raise errors.Overloaded(
                f"{self._streams} streams are open, as many as there may be: try again later", 1.0
            )
        if not stream and self.full:
            raise self.overloaded()
        if not self._calls:
            self._quick = call.entered
        self._clients[client] = mine + 1
        self._streams += stream
        self._calls += not stream
        metrics.IN_FLIGHT.inc()
        call.counted, call.stream = client, stream
        call.context.add_done_callback(lambda _: self._leave(call))

    def _leave(self, call: Call) -> None:
        self._sending.pop(call, None)
        if call.counted is None:
            return
        self._streams -= call.stream
        self._calls -= not call.stream
        if not call.stream and (now := time.monotonic()) - call.entered <= self.limits.soon:
            self._quick = now
        if self._clients[call.counted] == 1:
            del self._clients[call.counted]
        else:
            self._clients[call.counted] -= 1
        call.counted = None
        metrics.IN_FLIGHT.dec()

    def sending(self, call: Call) -> None:
        """An answer is on its way to the client: from now on the client's time runs."""
        self._sending[call] = time.monotonic()

    def sent(self, call: Call) -> None:
        self._sending.pop(call, None)

    def give_up_slow(self) -> int:
        """Count calls no more whose client takes too long to accept its answer, and end such streams; returns how many."""
        limit = time.monotonic() - self.limits.slow_reader
        slow = [call for call, since in self._sending.items() if since < limit]
        for call in slow:
            self._leave(
                call
            )  # now: the end of its stream, too, waits until the client has taken what came before
            call.slow = True
            log.warning(
                "a client at %s did not take its answer for %g s: its call is ended",
                call.peer,
                self.limits.slow_reader,
            )
            if call.task is not None:
                call.task.cancel()
        return len(slow)

    def refused(
        self, error: errors.TagstoreError, context: Any, method: str, store: str, call: Call | None
    ) -> None:
        """Count and record what was refused for a reason of access or load."""
        metrics.child(metrics.REFUSED, type(error).__name__).inc()
        name = call.caller.name if call else ""
        self.audit.write(
            event="refused", method=method, store=store, caller=name, peer=context.peer(), reason=str(error)
        )


class Door(grpc.GenericRpcHandler):
    """Refuses calls while as many are in hand as there may be.

    Args:
        handlers: by full name of the method.
        limited: names of those that are refused; the others, health above all, are always let in.
    """

    def __init__(self, handlers: Mapping[str, Any], gate: Gate, limited: Collection[str]) -> None:
        self._handlers, self._gate, self._limited = handlers, gate, frozenset(limited)

        async def refuse(_: Any, context: Any) -> None:
            metrics.child(metrics.REFUSED, "queue").inc()
            await abort(context, gate.overloaded())

        # as a method that streams in: one that takes a single message would wait for it first
        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if self._gate.full and method in self._limited:
            return self._refusal
        return self._handlers.get(method)


def understood(error: Exception, name: str) -> errors.TagstoreError:
    """An error as a caller may see it: nothing of a fault of ours, nor of what the server's disks look like."""
    if isinstance(error, errors.Damaged | errors.WriteFailed):
        log.error("%s failed: %s", name, error)
        what = (
            "the store is damaged" if isinstance(error, errors.Damaged) else "the server's disk took nothing"
        )
        return type(error)(f"{what}; the server's log has the details")
    if isinstance(error, errors.TagstoreError):
        return error
    log.error("%s failed", name, exc_info=error)
    return errors.TagstoreError(f"{name} failed by a fault of the server; its log has the details")


async def abort(context: Any, error: errors.TagstoreError) -> NoReturn:
    """End a call with the status that stands for an error."""
    await context.abort(code_of(error), str(error), trailing(error))
    raise AssertionError("abort does not return")
