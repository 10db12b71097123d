"""Threads for calls, and the door before them: who comes when too many wait is told so by the thread that takes calls in.

A refusal in a handler would cost as much as an answer: a place in the queue, a thread, a parsed request. At the door it costs one message,
so that three times as many calls as there can be leave the server time for those it has admitted. Few threads, because all of them share
one interpreter with the one that takes calls in: with many it gets too seldom to its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import grpc

from tagstore.serving import metrics
from tagstore.status import RETRY_AFTER

P = ParamSpec("P")
R = TypeVar("R")

AGAIN_MS = 100


class Pool(ThreadPoolExecutor):
    """A thread pool that says how much waits for a thread."""

    @property
    def waiting(self) -> int:
        return self._work_queue.qsize()


class _AtOnce(ThreadPoolExecutor):
    """Runs what it is given in the thread that gives it. gRPC asks for a `ThreadPoolExecutor`."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Door(grpc.ServerInterceptor):
    """Refuses calls while as many as there may be wait for a thread. What is of no pool here, health above all, is always let in.

    Args:
        queues: by the beginning of a method's name, the first that fits: the pool whose threads do it, and how many calls may wait for one.
    """

    def __init__(self, queues: Mapping[str, tuple[Pool, int]]) -> None:
        self._queues = list(queues.items())

        def refuse(_: Any, context: Any) -> None:
            metrics.child(metrics.REFUSED, "queue").inc()
            context.set_trailing_metadata(((RETRY_AFTER, str(AGAIN_MS)),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "as many calls wait as there may be: try again later")

        refuse.experimental_thread_pool = _AtOnce(1)  # type: ignore[attr-defined]  # gRPC's own name for it
        # as a method that streams in: one that takes a single message would wait for it first
        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        method = handler_call_details.method
        for beginning, (pool, most) in self._queues:
            if method.startswith(beginning):
                return self._refusal if pool.waiting >= most else continuation(handler_call_details)
        return continuation(handler_call_details)
