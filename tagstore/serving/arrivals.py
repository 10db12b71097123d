"""Bounds the messages that arrive at a time, over all callers.

How long a message is going to be is known to nobody before it has arrived. Most are short and are there at
once. So `READS` messages are read at a time, the clients in turn. One that takes longer than `GRACE_SECONDS`
makes room for the next, if it gets one of a few places for slow ones, of which a client gets at most half;
without one its call is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from tagstore import errors
from tagstore.serving.call import Call
from tagstore.serving.message_memory import RETRY_AFTER
from tagstore.serving.settings import Limits

READS = 8
"""Messages that are read at a time. Those that are there already take one turn of the loop."""
GRACE_SECONDS = 0.1
"""Seconds in which a message arrives without a place: several turns of a busy loop."""


class Arrivals:
    """The messages of calls that are being read. Only the event loop's thread may use it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._fast: dict[Call, float] = {}
        """When each began, the oldest first."""
        self._slow: dict[Call, float] = {}
        self._reading = 0
        """Turns that calls have, or are about to have."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Calls that wait for their turn, by client; the client whose turn is next first."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._fast) + len(self._slow)

    async def read(self, call: Call) -> bytes:
        """Read the message of a call. Raises `InvalidInput` if there is none, `Overloaded`, `TimedOut`."""
        if self._waiting or self._reading >= READS:
            await self._turn(call)
        else:
            self._reading += 1
        self._fast[call] = time.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._check)
        try:
            data = await call.read()
        finally:
            self._slow.pop(call, None)
            if self._fast.pop(call, None) is not None:
                self._end_turn()
        if not isinstance(data, bytes):
            raise errors.InvalidInput("the call brought no message: send one")
        return data

    async def _turn(self, call: Call) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(call.client or "", deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end_turn()
            raise

    def _end_turn(self) -> None:
        """Give the turn of a call to the next one that waits."""
        self._reading -= 1
        while self._reading < READS and self._waiting:
            client = next(iter(self._waiting))
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # last, after the other clients
            if not turn.done():
                turn.set_result(None)
                self._reading += 1

    def _check(self) -> None:
        """Refuse the messages that take long and have no place."""
        now = time.monotonic()
        limit = self._limits.slow_reader
        for call, since in list(self._slow.items()):
            if now - since > limit:
                call.end(errors.TimedOut(f"the request did not arrive within {limit:g} s"))
        for call, since in list(self._fast.items()):
            if now - since < GRACE_SECONDS:
                break
            del self._fast[call]
            own = sum(other.client == call.client for other in self._slow)
            if len(self._slow) < self._limits.slow_requests and own < max(1, self._limits.slow_requests // 2):
                self._slow[call] = since
            else:
                call.end(
                    errors.Overloaded(
                        f"{len(self._slow)} requests that take long to arrive are being read, as many as "
                        "there may be: try again later",
                        RETRY_AFTER,
                    )
                )
            self._end_turn()
        busy = bool(self)
        self._timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._check) if busy else None

    async def close(self) -> None:
        """Stop the timer: one that is due while the interpreter ends crashes it."""
        if self._timer is not None:
            self._timer.cancel()
