"""Turn a servicer's methods into gRPC handlers that pass the gate, are measured, and fail with status codes.

A method has one of these signatures; `answering` marks those that answer one message with one:

    async def Method(self, request, call) -> response       runs in the event loop, and must not block it
    def Method(self, request, call) -> response             runs in a thread
    async def Method(self, requests, call, send)            a stream, in the event loop
    def Method(self, requests, call, send)                  a stream, in a thread

If the client of a stream sends one message only, the method gets it in place of `requests`. A method with the
attribute `parses` gets bytes.
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
    """Mark a method that answers one message with one.

    Args:
        role: role that the caller needs on the request's store; None if the method checks it.
        writes: write a line into the audit log for every call.
    """

    def mark(method: Method) -> Method:
        method.role, method.writes = role, writes  # type: ignore[attr-defined]
        return method

    return mark


class Methods:
    """Collects the handlers that generated code would add to a server.

    Args:
        threads: run the methods that are no coroutines.
        long: count calls with the streams, so that long ones do not keep short ones out.
    """

    def __init__(self, gate: Gate, threads: Executor, *, long: bool = False) -> None:
        self.gate, self._threads, self._long = gate, threads, long
        self.handlers: dict[str, grpc.RpcMethodHandler] = {}
        """Handlers by full name of the method: "/tagstore.v1.TagStore/Retrieve"."""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: handlers are registered by name."""

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        for name, handler in handlers.items():
            parse, serialize = handler.request_deserializer, handler.response_serializer
            if method := handler.unary_unary:
                answer = self._unary(name, method, parse, serialize)
                wrapped = grpc.unary_unary_rpc_method_handler(answer)
            elif method := handler.unary_stream:
                answer = self._stream(name, method, parse, serialize, single_request=True)
                wrapped = grpc.unary_stream_rpc_method_handler(answer)
            else:
                answer = self._stream(name, handler.stream_stream, parse, serialize, single_request=False)
                wrapped = grpc.stream_stream_rpc_method_handler(answer)
            self.handlers[f"/{service}/{name}"] = wrapped

    def _unary(self, name: str, method: Method, parse: Method, serialize: Method) -> Method:
        gate, threads = self.gate, self._threads
        role, writes = method.role, method.writes  # type: ignore[attr-defined]
        in_loop = inspect.iscoroutinefunction(method)

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
                    if in_loop:
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
                # a name that a caller invented must not become a label
                label = store if code in ("OK", "INVALID_ARGUMENT") else ""
                metrics.child(metrics.REQUESTS, name, label, code).inc()
                metrics.child(metrics.LATENCY, name, label).observe(time.perf_counter() - start)
            return await abort(context, failure)

        return answer

    def _stream(
        self, name: str, method: Method, parse: Method, serialize: Method, *, single_request: bool
    ) -> Method:
        gate, threads = self.gate, self._threads
        in_loop, parses = inspect.iscoroutinefunction(method), getattr(method, "parses", False)

        async def answer(first: Any, context: Any) -> None:
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
                stream = parse(first) if single_request else requests()
                with _span(name, context) if tracing.enabled else tracing.NO_SPAN:
                    if in_loop:
                        await method(stream, call, send)
                    else:
                        await _stream_in_thread(threads, call, method, stream, send)
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
    """Run a function in a thread and return its result."""
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


async def _stream_in_thread(threads: Executor, call: Call, method: Method, stream: Any, send: Method) -> None:
    """Run a stream's method in a thread, which reads and writes through the event loop."""
    loop = asyncio.get_running_loop()

    def wait(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        call.check()
        try:
            return asyncio.run_coroutine_threadsafe(work(), loop).result()
        except grpc.aio.BaseError as error:
            call.gone = True
            raise errors.Unavailable(GONE) from error

    async def next_request() -> Any:
        return await anext(stream, None)

    def requests() -> Iterator[Any]:
        while (request := wait(next_request)) is not None:
            yield request

    def work() -> None:
        argument = requests() if hasattr(stream, "__anext__") else stream
        method(argument, call, lambda response: wait(lambda: send(response)))

    try:
        await in_thread(threads, work)
    except asyncio.CancelledError:
        call.gone = True  # the thread notices when it next reads or writes
        raise
