"""Bounds the memory of requests that are being answered and of answers that callers have yet to take."""

from __future__ import annotations

import asyncio
import time

from tagstore import errors
from tagstore.serving.call import Call
from tagstore.serving.settings import Limits

COPIES = 2
"""Times that a request is in memory while it is answered: its fields are copies of parts of the message."""
SMALL_BYTES, SMALL_COPIES = 1 << 14, 16
"""Bytes of a message that may be small fields, each larger in memory, and how much larger."""
RETRY_AFTER = 0.5
"""Seconds after which a refused caller may try again."""
CONTESTED_SECONDS = 5.0
"""Seconds after which a client that does not take its answers is hung up on, if others need the memory."""


class MessageMemory:
    """Memory for the messages of a server. Only the event loop's thread may use it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._freed: asyncio.Future[None] | None = None
        self._sending: dict[Call, float] = {}
        """When each call's answer began to wait for its client, the oldest first."""
        self.requests = self.answers = 0
        """Bytes of requests that are being answered; of answers that are being sent."""

    def take(self, call: Call, size: int) -> None:
        """Count a request of `size` bytes until the call ends. Raises `Overloaded` if there are too many."""
        needed = _in_memory(size)
        if self.requests and self.requests + needed > self._limits.request_bytes:
            raise errors.Overloaded(
                f"requests of {self.requests >> 20} MiB are being answered, and yours has {size >> 20} MiB: "
                "try again later",
                RETRY_AFTER,
            )
        self.requests += needed
        call.bytes += needed

    async def hold(self, call: Call, size: int) -> None:
        """Count a request of a stream until it is answered, once there is room for it."""
        while self.requests and self.requests + _in_memory(size) > self._limits.request_bytes:
            await self._room()
        self.take(call, size)
        call.unanswered.append(size)

    def answered(self, call: Call) -> None:
        """Stop counting the oldest request of a stream, and the answer that was sent."""
        if call.unanswered:
            needed = _in_memory(call.unanswered.popleft())
            self.requests -= needed
            call.bytes -= needed
        self._sent(call)

    def send(self, call: Call, size: int) -> None:
        """Count an answer of `size` bytes until it is sent. Raises `Overloaded` if there are too many."""
        if not self._fits(size):
            self.hang_up_on_slow(CONTESTED_SECONDS)
            raise errors.Overloaded(
                f"answers of {self.answers >> 20} MiB wait for their callers, yours has {size >> 20} MiB: "
                "try again later",
                RETRY_AFTER,
            )
        self.answers += size
        call.answer_bytes += size
        self._sending[call] = time.monotonic()

    async def send_soon(self, call: Call, size: int) -> None:
        """Count an answer of a stream, once there is room for it."""
        while not self._fits(size):
            self.hang_up_on_slow(CONTESTED_SECONDS)
            await self._room()
        self.send(call, size)

    def release(self, call: Call) -> None:
        """Stop counting all of a call, which has ended."""
        self.requests -= call.bytes
        call.bytes = 0
        self._sent(call)

    def hang_up_on_slow(self, seconds: float) -> list[Call]:
        """Hang up on clients that have not taken an answer for so long; returns their calls."""
        limit = time.monotonic() - seconds
        slow = [call for call, since in self._sending.items() if since < limit]
        for call in slow:
            del self._sending[call]
            call.hang_up()
        return slow

    def _fits(self, size: int) -> bool:
        return not self.answers or self.answers + size <= self._limits.answer_bytes

    def _sent(self, call: Call) -> None:
        self._sending.pop(call, None)
        self.answers -= call.answer_bytes
        call.answer_bytes = 0
        if self._freed is not None:
            self._freed.set_result(None)
            self._freed = None

    async def _room(self) -> None:
        """Wait until something was freed."""
        self._freed = self._freed or asyncio.get_running_loop().create_future()
        await asyncio.shield(self._freed)


def _in_memory(size: int) -> int:
    return COPIES * size + SMALL_COPIES * min(size, SMALL_BYTES)
