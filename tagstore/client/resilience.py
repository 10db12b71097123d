"""Decide when to try again, where, and when to stop. Nothing here sends or sleeps: asyncio calls share it.

request ──▶ Attempts: address, wait, time allowed ──▶ sent ──▶ succeeded | failed ──▶ the next attempt or an
error
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tagstore.client.options import Options
from tagstore.errors import BadAnswer, Overloaded, TagstoreError, Unavailable

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0
"""Seconds to wait before the second try of an address, doubled for each further one; the longest wait."""


class Breaker:
    """The circuit of one address: closed; open after `failures` in a row; half-open once `cooldown` seconds
    are over.

    A half-open circuit lets one request through. It closes if that one succeeds, and opens again if it fails;
    if nothing is heard from it, another request may try after a further `cooldown`. Safe for threads.
    """

    def __init__(self, failures: int, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until = 0.0
        self._opened = False

    @property
    def state(self) -> str:
        if not self._opened:
            return "closed"
        return "open" if self._clock() < self._open_until else "half-open"

    def allows(self) -> bool:
        """Say whether a request may be sent now; a half-open circuit allows only the first who asks."""
        with self._lock:
            if not self._opened:
                return True
            now = self._clock()
            if now < self._open_until:
                return False
            self._open_until = now + self._cooldown
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._opened = 0, False

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._limit and self._failures >= self._limit:
                self._opened = True
                # jitter, or all workers of a job would try at the same instant
                self._open_until = self._clock() + self._cooldown * random.uniform(1, 1.25)


class Endpoint:
    """An address with its circuit and its number of requests in flight."""

    def __init__(self, address: str, options: Options) -> None:
        self.address = address
        self.breaker = Breaker(options.breaker, options.cooldown)
        self.in_flight = 0


class Balancer:
    """Addresses that serve the same stores. The one with the fewest requests in flight is next. Safe for
    threads.
    """

    def __init__(self, addresses: Sequence[str], options: Options) -> None:
        self.options = options
        self.endpoints = [Endpoint(address, options) for address in addresses]
        self._turn = random.randrange(len(addresses))
        self._lock = threading.Lock()

    def pick(self, avoid: Sequence[Endpoint] = (), *, insist: bool = False) -> Endpoint | None:
        """Choose the address of the next attempt, outside `avoid` if possible.

        Returns None if every circuit is open, unless the caller insists.
        """
        with self._lock:
            self._turn += 1
            start = self._turn % len(self.endpoints)
            in_turn = self.endpoints[start:] + self.endpoints[:start]
            ranked = sorted(in_turn, key=lambda e: (e in avoid, e.in_flight))
            endpoint = next((e for e in ranked if e.breaker.allows()), ranked[0] if insist else None)
            if endpoint is not None:
                endpoint.in_flight += 1
            return endpoint

    def release(self, endpoint: Endpoint) -> None:
        """Count a request of an address as ended."""
        with self._lock:
            endpoint.in_flight -= 1

    def health(self) -> dict[str, str]:
        """Return the state of each address's circuit."""
        return {e.address: e.breaker.state for e in self.endpoints}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a request."""

    endpoint: Endpoint
    wait: float
    """Seconds to wait before it is sent."""
    timeout: float
    """Seconds that it may take."""


class Attempts:
    """The tries of one request. Every attempt must be ended with `succeeded`, `failed` or `abandoned`."""

    def __init__(
        self, balancer: Balancer, clock: Callable[[], float] = time.monotonic, *, insist: bool = True
    ) -> None:
        """
        Args:
            insist: try an address although every circuit is open: the caller wants an answer or an error.
        """
        self._balancer, self._options, self._clock, self._insist = balancer, balancer.options, clock, insist
        self._start = clock()
        self._failed: list[Endpoint] = []
        self._wait = 0.0
        self._last: TagstoreError | None = None
        self.count = 0

    def next(self) -> Attempt:
        """Return the next try. Raises `Unavailable` if every circuit is open or the time is over."""
        endpoint = self._balancer.pick(self._failed, insist=self._insist)
        if endpoint is None:
            if self._last is not None:
                raise self._exhausted(self._last)
            addresses = ", ".join(e.address for e in self._balancer.endpoints)
            raise Unavailable(
                f"{addresses}: left alone after {self._options.breaker} failures in a row, "
                "until it is tried again"
            )
        untried = [e for e in self._balancer.endpoints if e not in self._failed and e is not endpoint]
        wait = self._wait if endpoint in self._failed else 0.0
        remaining = self._remaining() - wait
        if remaining <= 0:
            self._balancer.release(endpoint)
            raise self._exhausted(self._last or Unavailable(f"no time is left to ask {endpoint.address}"))
        self.count += 1
        # a silent server costs its share of the time, not all of it, while there are others to ask
        return Attempt(endpoint, wait, remaining / (1 + len(untried)))

    def elsewhere(self, slow: Endpoint) -> Attempt | None:
        """Return a try at another address while a slow one has not answered; None if there is no other."""
        if len(self._balancer.endpoints) < 2:
            return None
        endpoint = self._balancer.pick([slow, *self._failed])
        if endpoint is None or endpoint is slow:
            if endpoint is not None:
                self._balancer.release(endpoint)
            return None
        self.count += 1
        return Attempt(endpoint, 0.0, max(0.001, self._remaining()))

    def succeeded(self, attempt: Attempt) -> None:
        attempt.endpoint.breaker.succeeded()
        self._balancer.release(attempt.endpoint)

    def abandoned(self, attempt: Attempt) -> None:
        """End an attempt that nobody waits for any more."""
        self._balancer.release(attempt.endpoint)

    def failed(self, attempt: Attempt, error: TagstoreError) -> Attempt:
        """End an attempt that failed and return the next one; raise what the caller gets if there is none."""
        self._balancer.release(attempt.endpoint)
        if not isinstance(error, Unavailable):
            attempt.endpoint.breaker.succeeded()  # the server is there, and answers
            raise error
        self._last = error
        self._failed.append(attempt.endpoint)
        if isinstance(error, Overloaded):
            self._wait = error.retry_after * random.uniform(1, 1.25)
        else:
            attempt.endpoint.breaker.failed()
            longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (self.count - 1))
            self._wait = random.uniform(longest / 2, longest)
        if self.count > self._options.retries or self._remaining() <= 0:
            raise self._exhausted(error)
        return self.next()

    def _remaining(self) -> float:
        return self._options.timeout - (self._clock() - self._start)

    def _exhausted(self, error: TagstoreError) -> TagstoreError:
        spent = self._clock() - self._start
        tries = f"{self.count} {'try' if self.count == 1 else 'tries'}"
        message = f"{error} ({tries} in {spent:.1f} s, {self._options.timeout:g} s allowed)"
        if isinstance(error, Overloaded):
            return Overloaded(message, error.retry_after)
        return BadAnswer(message) if isinstance(error, BadAnswer) else Unavailable(message)
