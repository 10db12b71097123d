"""Places for open streams: some for each caller, some kept for administrators, none held by an idle stream.

A stream may bring a message of the largest size at any time, so their number bounds memory.
"""

from __future__ import annotations

import time

from tagstore import errors
from tagstore.serving.call import Call
from tagstore.serving.settings import Limits

CONTESTED_SECONDS = 5.0
"""Seconds after which an idle stream gives up its place, if somebody else needs one."""


class StreamPlaces:
    """The open streams of a server. Only the event loop's thread may use it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[Call, float] = {}
        """When each stream began to wait for its caller; infinity while the server works for it."""

    def __len__(self) -> int:
        return len(self._open)

    def take(self, call: Call, client: str) -> None:
        """Give a call a place. Raises `Overloaded`."""
        limits = self._limits
        own = sum(other.client == client for other in self._open)
        if own >= limits.streams_per_client:
            raise errors.Overloaded(
                f"{call.caller.name} has {own} streams open, as many as one client may: close some", 1.0
            )
        kept = 0 if call.caller.may_anywhere("admin") else min(limits.streams_kept, limits.streams - 1)
        if len(self._open) >= limits.streams - kept and not self._evict():
            raise errors.Overloaded(
                f"{len(self._open)} streams are open, as many as there may be: try again later", 1.0
            )
        self._open[call] = float("inf")

    def leave(self, call: Call) -> None:
        """Free the place of a call, if it has one."""
        self._open.pop(call, None)

    def waiting(self, call: Call) -> None:
        """Note that the caller is to send the next message."""
        if call in self._open:
            self._open[call] = time.monotonic()

    def working(self, call: Call) -> None:
        """Note that the caller has sent a message, or waits for an answer."""
        if call in self._open:
            self._open[call] = float("inf")

    def answered(self, call: Call) -> None:
        """Note that an answer was taken: from now on it is the caller's turn, if nothing else is asked."""
        if self._open.get(call, float("inf")) < float("inf"):
            self._open[call] = time.monotonic()

    def end_idle(self) -> int:
        """End the streams that are idle for too long, and return how many there were."""
        limit = self._limits.idle_stream
        idle = [call for call in self._open if self._since(call) < time.monotonic() - limit]
        for call in idle:
            call.end(
                errors.TimedOut(f"the stream brought no message for {limit:g} s and is ended: open it anew")
            )
        return len(idle)

    def _since(self, call: Call) -> float:
        """Return when it became the caller's turn."""
        return float("inf") if call.unanswered else self._open[call]

    def _evict(self) -> bool:
        """End the stream that is idle for longest, if for long enough; tells whether there was one."""
        call = min(self._open, key=self._since, default=None)
        if call is None or self._since(call) > time.monotonic() - CONTESTED_SECONDS:
            return False
        self.leave(call)
        call.end(errors.Overloaded("the stream was idle and others need its place: open it anew", 1.0))
        return True
