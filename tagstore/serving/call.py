"""A call in flight: who calls, from where, how long the caller waits, and why the server ended it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any

from tagstore import errors
from tagstore.serving.access import Access, Role, read_metadata
from tagstore.serving.connections import hang_up

GONE = "the caller has gone: nothing was changed"


class Call:
    """A call in flight, or a stream.

    Only the event loop's thread may use its context; any thread may read the rest.
    """

    __slots__ = (
        "access",
        "answer_bytes",
        "authorization",
        "authorized",
        "bytes",
        "caller",
        "certificate",
        "client",
        "context",
        "deadline",
        "ended",
        "entered",
        "gone",
        "named_store",
        "peer",
        "role",
        "stream",
        "task",
        "unanswered",
    )

    def __init__(self, context: Any, access: Access, role: Role | None = None) -> None:
        """Identify the caller. Raises `NotAuthenticated`."""
        names = context.auth_context().get("x509_common_name") if access.certificates else None
        self.authorization, self.named_store = read_metadata(context.invocation_metadata())
        self.certificate = names[0].decode() if names else ""
        self.access = access
        self.caller = access.caller(self.authorization, self.certificate)
        self.role, self.authorized = role, access.changes
        self.context = context
        self.peer: str = context.peer()
        remaining = context.time_remaining()
        self.entered = time.monotonic()
        """Time on the monotonic clock, as is `deadline`."""
        self.deadline = float("inf") if remaining is None else self.entered + remaining
        self.task = asyncio.current_task()
        self.client: str | None = None
        """The client that the gate counts the call for, from `enter` until the answer is taken."""
        self.stream = False
        self.bytes = 0
        """Bytes of memory that are counted for the call's requests."""
        self.answer_bytes = 0
        """Bytes of answers that its client has yet to take."""
        self.unanswered: deque[int] = deque()
        """Bytes of each request of a stream that waits for its answer."""
        self.gone = False
        """Whether nobody waits for an answer any more."""
        self.ended: errors.TagstoreError | None = None
        """Why the server ended the call, if it did."""

    def check(self) -> None:
        """Raise `Unavailable` once the caller has gone."""
        if self.gone:
            raise errors.Unavailable(GONE)

    def identify(self) -> None:
        """Identify the caller anew if the callers have changed. Raises as when it began."""
        self.access.refresh()
        if self.authorized != self.access.changes:
            self.authorized = self.access.changes
            self.caller = self.access.caller(self.authorization, self.certificate)
            self.check_role()

    def check_role(self) -> None:
        """Raise `NotPermitted` if the caller lacks the role on the named store, or on every one."""
        if self.role is not None and self.named_store:
            self.caller.check(self.role, self.named_store)
        elif self.role is not None:
            self.caller.check_anywhere(self.role)

    async def read(self) -> Any:
        """Read a message; `grpc.aio.EOF` if there are no more."""
        return await _unharmed(self.context.read())

    async def write(self, data: bytes) -> None:
        """Send a message, and return when gRPC takes the next one."""
        await _unharmed(self.context.write(data))

    def hang_up(self) -> None:
        """End the connection that the call came on, and so all its calls."""
        hang_up(self.peer)

    def end(self, error: errors.TagstoreError) -> None:
        """End the call with an error, whatever it waits for."""
        if self.ended is None and self.task is not None:
            self.ended = error
            self.task.cancel()


def _unharmed(operation: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    """Run an operation of gRPC to its end, also if nobody waits for it any longer.

    gRPC's asyncio API never frees the message of a read or write that is cancelled.
    """
    task = asyncio.ensure_future(operation)
    task.add_done_callback(_retrieve)
    return asyncio.shield(task)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Look at an outcome that nobody may wait for, or asyncio logs it."""
    _ = task.cancelled() or task.exception()
