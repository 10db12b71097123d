"""The door: which handler a call gets, decided before anything of it but its name has been read.

A refusal in a handler would cost nearly as much as an answer: a message received and parsed. At the door it costs one message sent: about
a third of an answer, which is what gRPC's asyncio face takes for any call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import grpc

from tagstore.serving import metrics
from tagstore.serving.gate import Gate, abort


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
