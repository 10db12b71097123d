"""When to try again, where, and when to stop trying. Decisions only: nothing here sends or sleeps, so both faces share it.

request ──▶ Attempts: which address, how long to wait before, how long it may take ──▶ sent ──▶ succeeded | failed ──▶ again?
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tagstore.client.options import Options
from tagstore.errors import Overloaded, TagstoreError, Unavailable

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0


class Breaker:
    """The circuit of one address: closed; open after `failures` in a row; half-open once `cooldown` seconds are over.

    A half-open circuit lets one request through. If it succeeds the circuit closes, if not it is open for as long again; if nothing is
    heard of it, another may try after as long again. Safe for threads.
    """

    def __init__(self, failures: int, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._until = 0.0
        self._opened = False

    @property
    def state(self) -> str:
        if not self._opened:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    def allows(self) -> bool:
        """Whether a request may be sent now; of a half-open circuit only the first who asks is told so."""
        with self._lock:
            if not self._opened:
                return True
            now = self._clock()
            if now < self._until:
                return False
            self._until = now + self._cooldown
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
                self._until = self._clock() + self._cooldown * random.uniform(1, 1.25)


class Endpoint:
    """An address with its circuit and how many requests it has in hand."""

    def __init__(self, address: str, options: Options) -> None:
        self.address = address
        self.breaker = Breaker(options.breaker, options.cooldown)
        self.in_flight = 0


class Balancer:
    """Several addresses of the same stores: the one with the least in hand is next, in turn where they are equal. Safe for threads."""

    def __init__(self, addresses: Sequence[str], options: Options) -> None:
        self.options = options
        self.endpoints = [Endpoint(address, options) for address in addresses]
        self._turn = random.randrange(len(addresses))
        self._lock = threading.Lock()

    @property
    def names(self) -> str:
        return ", ".join(e.address for e in self.endpoints)

    def pick(self, avoid: Sequence[Endpoint] = (), *, insist: bool = False) -> Endpoint | None:
        """The address for the next try, one not in `avoid` if there is any; None if every circuit is open and nobody insists."""
        with self._lock:
            self._turn += 1
            turned = [
                self.endpoints[(self._turn + i) % len(self.endpoints)] for i in range(len(self.endpoints))
            ]
            ranked = sorted(turned, key=lambda e: (e in avoid, e.in_flight))
            found = next((e for e in ranked if e.breaker.allows()), None)
            if found is None and insist:
                found = ranked[0]
            if found is not None:
                found.in_flight += 1
            return found

    def release(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.in_flight -= 1


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

    def __init__(self, balancer: Balancer, clock: Callable[[], float] = time.monotonic) -> None:
        self._balancer, self._options, self._clock = balancer, balancer.options, clock
        self._start = clock()
        self._failed: list[Endpoint] = []
        self._wait = 0.0
        self._last: TagstoreError | None = None
        self.count = 0

    def first(self) -> Attempt:
        """The first try. Raises `Unavailable` if every circuit is open and degraded answers are wanted."""
        return self._next()

    def another(self, avoid: Endpoint) -> Attempt | None:
        """A try elsewhere while `avoid` has not answered; None if there is nowhere else."""
        if len(self._balancer.endpoints) < 2:
            return None
        endpoint = self._balancer.pick([avoid, *self._failed])
        if endpoint is None or endpoint is avoid:
            if endpoint is not None:
                self._balancer.release(endpoint)
            return None
        self.count += 1
        return Attempt(endpoint, 0.0, max(0.001, self._remaining()))

    def succeeded(self, attempt: Attempt) -> None:
        attempt.endpoint.breaker.succeeded()
        self._balancer.release(attempt.endpoint)

    def abandoned(self, attempt: Attempt) -> None:
        """Nobody waits for it any more."""
        self._balancer.release(attempt.endpoint)

    def failed(self, attempt: Attempt, error: TagstoreError) -> Attempt:
        """The next try after one that failed; raises what the caller is to be told if there is none."""
        self._balancer.release(attempt.endpoint)
        if not isinstance(error, Unavailable):
            attempt.endpoint.breaker.succeeded()  # it is there, and answers
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
            raise self._gone()
        return self._next()

    def _next(self) -> Attempt:
        # somebody who evaluates wants an answer or an error: an open circuit is still tried
        endpoint = self._balancer.pick(self._failed, insist=self._options.on_failure == "raise")
        if endpoint is None:
            if self._last is not None:
                raise self._gone()
            raise Unavailable(
                f"{self._balancer.names}: left alone after {self._options.breaker} failures in a row, until it is tried again"
            )
        untried = [e for e in self._balancer.endpoints if e not in self._failed and e is not endpoint]
        wait = 0.0 if endpoint not in self._failed else self._wait
        remaining = self._remaining() - wait
        if remaining <= 0:
            self._balancer.release(endpoint)
            raise self._gone()
        self.count += 1
        # a silent server costs its share of the time, not all of it, as long as there are others to ask
        return Attempt(endpoint, wait, remaining / (1 + len(untried)))

    def _remaining(self) -> float:
        return self._options.timeout - (self._clock() - self._start)

    def _gone(self) -> TagstoreError:
        assert self._last is not None  # something failed, or there would be another try
        spent = self._clock() - self._start
        said = f"{self._last} ({self.count} {'try' if self.count == 1 else 'tries'} in {spent:.1f} s, {self._options.timeout:g} s allowed)"
        if isinstance(self._last, Overloaded):
            return Overloaded(said, self._last.retry_after)
        return Unavailable(said)
