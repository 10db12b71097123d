"""Bounds the memory of requests, over all callers: of those that arrive and of those that are being answered.

How long a message is going to be is known to nobody before it has arrived. Most are short and are there at
once. So every call may begin to read; a message that takes longer than `GRACE_SECONDS` needs one of a few
places, of which a client gets at most half, and without one its call is refused.
"""

from __future__ import annotations

import asyncio
import time

from tagstore import errors
from tagstore.serving.call import Call
from tagstore.serving.settings import Limits

GRACE_SECONDS = 0.1
"""Seconds in which a message arrives without a place: several turns of a busy loop."""
COPIES = 2
"""Times that a request is in memory while it is answered: its fields are copies of parts of the message."""
RETRY_AFTER = 0.5
"""Seconds after which a refused caller may try again."""


class Intake:
    """The requests of a server. Only the event loop's thread may use it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._arriving: dict[Call, float] = {}
        """When each message began to arrive, the oldest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._freed: asyncio.Future[None] | None = None
        self.bytes = 0
        """Bytes of requests that are being answered."""
        self.total = 0
        """Bytes of requests so far."""

    async def read(self, call: Call) -> bytes:
        """Read the one message of a call. Raises `InvalidInput` if there is none, `Overloaded`."""
        self._arriving[call] = time.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._check)
        try:
            data = await call.context.read()
        finally:
            del self._arriving[call]
        if not isinstance(data, bytes):
            raise errors.InvalidInput("the call brought no message: send one")
        self.take(call, len(data))
        return data

    def take(self, call: Call, size: int) -> None:
        """Count a message of `size` bytes until the call ends. Raises `Overloaded` if there are too many."""
        needed = COPIES * size
        if self.bytes and self.bytes + needed > self._limits.request_bytes:
            raise errors.Overloaded(
                f"requests of {self.bytes >> 20} MiB are being answered, and yours has {size >> 20} MiB: "
                "try again later",
                RETRY_AFTER,
            )
        self.bytes += needed
        self.total += needed
        call.bytes += needed

    async def hold(self, call: Call, size: int) -> None:
        """Count a message of a stream until it is answered, once there is room for it."""
        while self.bytes and self.bytes + COPIES * size > self._limits.request_bytes:
            self._freed = self._freed or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._freed)
        self.take(call, size)
        call.unanswered.append(size)

    def give_back(self, call: Call, size: int | None = None) -> None:
        """Stop counting a message of `size` bytes, or all messages of a call."""
        freed = call.bytes if size is None else COPIES * size
        self.bytes -= freed
        call.bytes -= freed
        if freed and self._freed is not None:
            self._freed.set_result(None)
            self._freed = None

    def _check(self) -> None:
        """Refuse the messages that take long and have no place."""
        now = time.monotonic()
        places, of_client = self._limits.slow_requests, dict[str, int]()
        for call, since in list(self._arriving.items()):
            if now - since < GRACE_SECONDS:
                break
            client = call.client or ""
            used = of_client.get(client, 0)
            if now - since > self._limits.slow_reader:
                call.end(errors.TimedOut(f"the request did not arrive within {self._limits.slow_reader:g} s"))
            elif places and used < max(1, self._limits.slow_requests // 2):
                places, of_client[client] = places - 1, used + 1
            else:
                call.end(
                    errors.Overloaded(
                        f"{self._limits.slow_requests} large requests are arriving, as many as there may be: "
                        "try again later",
                        RETRY_AFTER,
                    )
                )
        self._timer = None
        if self._arriving:
            self._timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._check)

    async def close(self) -> None:
        """Stop the timer: one that is due while the interpreter ends crashes it."""
        if self._timer is not None:
            self._timer.cancel()
