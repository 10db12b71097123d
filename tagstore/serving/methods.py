"""From a servicer's methods to gRPC's handlers: every call goes through the gate, is measured and recorded, and fails with a status code.

A method is one of these; what answers one message is marked with what it needs (`answering`):

    async def Method(self, request, call) -> response       runs in the event loop, and may not keep it
    def Method(self, request, call) -> response             runs in a thread
    async def Method(self, requests, call, send)            a stream: `async for request in requests: await send(response)`
    def Method(self, requests, call, send)                  a stream in a thread: `for request in requests: send(response)`

Where a stream's client sends one message only, that stands in the place of `requests`. A method with the attribute `parses` gets bytes.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any

import grpc

from tagstore import errors
from tagstore.serving import metrics, tracing
from tagstore.serving.access import Role
from tagstore.serving.gate import GONE, REFUSALS, Call, Gate, abort, public_error
from tagstore.wire.status import code_of

Method = Callable[..., Any]


def answering(role: Role | None, *, writes: bool = False) -> Callable[[Method], Method]:
    """A method that answers one message with one.

    Args:
        role: that the caller must have on the request's store; None where the method checks by itself.
        writes: whether the audit log has a line for every call.
    """

    def mark(method: Method) -> Method:
        method.role, method.writes = role, writes  # type: ignore[attr-defined]
        return method

    return mark


class Methods:
    """Stands in for a server where generated code adds its handlers.

    Args:
        threads: for methods that are no coroutines.
        long: whether all methods take long: then they are counted with the streams, and do not keep short calls out.
    """

    def __init__(self, gate: Gate, threads: Executor, *, long: bool = False) -> None:
        self.gate, self._threads, self._long = gate, threads, long
        self.handlers: dict[str, grpc.RpcMethodHandler] = {}
        """By full name: "/tagstore.v1.TagStore/Retrieve"."""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Not needed: methods are taken by name."""

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        for name, handler in handlers.items():
            parse, serialize = handler.request_deserializer, handler.response_serializer
            if handler.unary_unary:
                made = grpc.unary_unary_rpc_method_handler(
                    self._unary(name, handler.unary_unary, parse, serialize)
                )
            else:
                kind = next(
                    kind
                    for kind in ("unary_stream", "stream_unary", "stream_stream")
                    if getattr(handler, kind)
                )
                make = (
                    grpc.stream_stream_rpc_method_handler
                    if kind == "stream_stream"
                    else grpc.unary_stream_rpc_method_handler
                )
                made = make(
                    self._stream(name, getattr(handler, kind), parse, serialize, one=kind == "unary_stream")
                )
            self.handlers[f"/{service}/{name}"] = made

    def _unary(self, name: str, method: Method, parse: Method, serialize: Method) -> Method:
        gate, threads = self.gate, self._threads
        role, writes = method.role, method.writes  # type: ignore[attr-defined]
        quick = inspect.iscoroutinefunction(method)

        async def answer(data: bytes, context: Any) -> bytes:
            start = time.perf_counter()
            store, code = "", "OK"
            call: Call | None = None
            failure: errors.TagstoreError
            try:
                call = Call(context, gate.access)
                request = parse(data)
                store = getattr(request, "store", "")
                if role is not None:
                    call.caller.check(role, store)
                gate.enter(call, stream=self._long)
                with _span(name, context, store=store) if tracing.enabled else tracing.NO_SPAN:
                    if quick:
                        response = await method(request, call)
                    else:
                        response = await in_thread(threads, method, request, call)
                if writes:
                    gate.audit.write(
                        event="done", method=name, store=store, caller=call.caller.name, peer=call.peer
                    )
                gate.sending(call)
                return response if type(response) is bytes else serialize(response)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception as error:  # noqa: BLE001  what is not ours becomes INTERNAL
                failure = public_error(error, name)
                code = code_of(failure).name
                if isinstance(failure, REFUSALS):
                    gate.refused(failure, context, name, store, call)
                elif writes:
                    caller = call.caller.name if call else ""
                    gate.audit.write(
                        event="failed",
                        method=name,
                        store=store,
                        caller=caller,
                        peer=context.peer(),
                        reason=str(failure),
                    )
            finally:
                known = (
                    store if code in ("OK", "INVALID_ARGUMENT") else ""
                )  # names that callers make up are no labels
                metrics.child(metrics.REQUESTS, name, known, code).inc()
                metrics.child(metrics.LATENCY, name, known).observe(time.perf_counter() - start)
            return await abort(context, failure)

        return answer

    def _stream(self, name: str, method: Method, parse: Method, serialize: Method, *, one: bool) -> Method:
        gate, threads = self.gate, self._threads
        quick, parses = inspect.iscoroutinefunction(method), getattr(method, "parses", False)

        async def answer(given: Any, context: Any) -> None:
            call: Call | None = None
            failure: errors.TagstoreError

            async def send(response: Any) -> None:
                assert call is not None
                gate.sending(call)
                await context.write(response if type(response) is bytes else serialize(response))
                gate.sent(call)

            async def requests() -> AsyncIterator[Any]:
                while (data := await context.read()) is not grpc.aio.EOF:
                    yield data if parses else parse(data)

            try:
                call = Call(context, gate.access)
                gate.enter(call, stream=True)
                taken = parse(given) if one else requests()
                with _span(name, context) if tracing.enabled else tracing.NO_SPAN:
                    if quick:
                        await method(taken, call, send)
                    else:
                        await _in_thread_with_stream(threads, call, method, taken, send)
                return
            except asyncio.CancelledError:
                if call is None or not call.slow:
                    raise
                failure = errors.Unavailable("the answers were not taken")
            except Exception as error:  # noqa: BLE001  what is not ours becomes INTERNAL
                failure = public_error(error, name)
                if isinstance(failure, REFUSALS):
                    gate.refused(failure, context, name, "", call)
            await abort(context, failure)

        return answer


def _span(name: str, context: Any, **attributes: str) -> AbstractContextManager[Any]:
    return tracing.span(name, context.invocation_metadata(), **attributes)


async def in_thread(threads: Executor, work: Method, *arguments: Any) -> Any:
    """Return what a function returns in a thread, or raise what it raises."""
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


async def _in_thread_with_stream(
    threads: Executor, call: Call, method: Method, given: Any, send: Method
) -> None:
    """Run a stream's method in a thread: what it reads and writes there goes through the event loop."""
    loop = asyncio.get_running_loop()

    def wait(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        call.check()
        try:
            return asyncio.run_coroutine_threadsafe(work(), loop).result()
        except grpc.aio.BaseError as error:
            call.gone = True
            raise errors.Unavailable(GONE) from error

    async def following() -> Any:
        return await anext(given, None)

    def requests() -> Iterator[Any]:
        while (request := wait(following)) is not None:
            yield request

    def work() -> None:
        method(
            requests() if hasattr(given, "__anext__") else given,
            call,
            lambda response: wait(lambda: send(response)),
        )

    try:
        await in_thread(threads, work)
    except asyncio.CancelledError:
        call.gone = True  # the thread hears of it when it reads or writes next
        raise
