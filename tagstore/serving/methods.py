"""Turn a servicer's methods into gRPC handlers that pass the gate, are measured, and fail with status codes.

A method has one of these signatures; `answering` marks those that answer one message with one:

    async def Method(self, request, call) -> response       runs in the event loop, and must not block it
    def Method(self, request, call) -> response             runs in a thread
    async def Method(self, requests, call, send)            a stream, in the event loop
    def Method(self, requests, call, send)                  a stream, in a thread

`streaming` marks streams. If the client of a stream sends one message only, the method gets it in place of
`requests`.

All handlers are registered as streams of requests, whose messages gRPC leaves to us to read: the caller is
identified, and the call counted, before a byte of a message takes memory here.
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
from tagstore.serving.call import GONE, Call
from tagstore.serving.gate import REFUSALS, Gate, abort, public_error
from tagstore.wire.bounds import bounded
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


def streaming(role: Role | None, *, parses: bool = False) -> Callable[[Method], Method]:
    """Mark a stream.

    Args:
        role: role that the caller needs on some store, whichever the messages name.
        parses: the method gets bytes, and answers each message with one.
    """

    def mark(method: Method) -> Method:
        method.role, method.parses = role, parses  # type: ignore[attr-defined]
        return method

    return mark


class Methods:
    """Collects the handlers that generated code would add to a server.

    Args:
        threads: run the methods that are no coroutines.
        kept: run those of administrators, so that others do not keep them waiting.
        long: count calls with the streams, so that long ones do not keep short ones out.
    """

    def __init__(
        self, gate: Gate, threads: Executor, *, kept: Executor | None = None, long: bool = False
    ) -> None:
        self.gate, self._long = gate, long
        self._threads, self._kept = threads, kept or threads
        self.handlers: dict[str, grpc.RpcMethodHandler] = {}
        """Handlers by full name of the method: "/tagstore.v1.TagStore/Retrieve"."""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: handlers are registered by name."""

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        for name, handler in handlers.items():
            parse = bounded(name, handler.request_deserializer)
            serialize = handler.response_serializer
            if method := handler.unary_unary:
                answer = self._unary(name, method, parse, serialize)
                wrapped = grpc.stream_unary_rpc_method_handler(answer)
            elif method := handler.unary_stream:
                answer = self._stream(name, method, parse, serialize, single_request=True)
                wrapped = grpc.stream_stream_rpc_method_handler(answer)
            else:
                answer = self._stream(name, handler.stream_stream, parse, serialize, single_request=False)
                wrapped = grpc.stream_stream_rpc_method_handler(answer)
            self.handlers[f"/{service}/{name}"] = wrapped

    def _pool(self, call: Call) -> Executor:
        return self._kept if call.caller.may_anywhere("admin") else self._threads

    def _unary(self, name: str, method: Method, parse: Method, serialize: Method) -> Method:
        gate = self.gate
        role, writes = method.role, method.writes  # type: ignore[attr-defined]
        in_loop = inspect.iscoroutinefunction(method)

        async def answer(_: Any, context: Any) -> bytes:
            start = time.perf_counter()
            store, code = "", "OK"
            event: dict[str, str] = {}
            call: Call | None = None
            request: Any = None
            failure: errors.TagstoreError
            try:
                call = Call(context, gate.access, role)
                call.check_role()
                gate.enter(call, stream=self._long)
                request = parse(await gate.read(call))
                store = getattr(request, "store", "")
                if role is not None:
                    call.caller.check(role, store)
                if writes:
                    event = {"method": name, "store": store, "caller": call.caller.name, "peer": call.peer}
                    gate.audit.begun(**event)
                with _span(name, context, store=store) if tracing.enabled else tracing.NO_SPAN:
                    if in_loop:
                        response = await method(request, call)
                    else:
                        response = await in_thread(self._pool(call), method, request, call)
                if event:
                    gate.audit.end("done", **event)
                answer_bytes = response if type(response) is bytes else serialize(response)
                gate.memory.send(call, len(answer_bytes))
                return answer_bytes
            except asyncio.CancelledError:
                if event:
                    gate.audit.end("failed", **event, reason="the caller has gone; the change may be done")
                if call is None or call.ended is None:
                    code = "CANCELLED"
                    raise
                failure, code = call.ended, code_of(call.ended).name
                if isinstance(failure, REFUSALS):
                    gate.refused(failure, context, name, store, call)
            except Exception as error:  # noqa: BLE001  what is not ours becomes INTERNAL
                failure = public_error(error, name)
                code = code_of(failure).name
                if isinstance(failure, REFUSALS):
                    gate.refused(failure, context, name, store, call)
                elif event:
                    gate.audit.end("failed", **event, reason=str(failure))
            finally:
                request = None  # gRPC keeps this frame until the next call comes
                # a name that a caller invented must not become a label
                label = store if code in ("OK", "INVALID_ARGUMENT") else ""
                metrics.child(metrics.REQUESTS, name, label, code).inc()
                metrics.child(metrics.LATENCY, name, label).observe(time.perf_counter() - start)
            return await abort(context, failure)

        return answer

    def _stream(
        self, name: str, method: Method, parse: Method, serialize: Method, *, single_request: bool
    ) -> Method:
        gate = self.gate
        role, parses = method.role, method.parses  # type: ignore[attr-defined]
        in_loop = inspect.iscoroutinefunction(method)

        async def answer(_: Any, context: Any) -> None:
            call: Call | None = None
            failure: errors.TagstoreError

            async def send(response: Any) -> None:
                assert call is not None
                call.identify()  # a token may have been withdrawn since the stream began
                data = response if type(response) is bytes else serialize(response)
                await gate.memory.send_soon(call, len(data))
                await call.write(data)
                gate.sent(call)

            async def requests() -> AsyncIterator[Any]:
                assert call is not None
                while True:
                    gate.streams.waiting(call)
                    data = await call.read()
                    if data is grpc.aio.EOF:
                        return
                    gate.streams.working(call)
                    if parses:
                        await gate.memory.hold(call, len(data))
                    request = data if parses else parse(data)
                    del data  # it must not wait here for the next one
                    yield request
                    del request

            try:
                call = Call(context, gate.access, role)
                call.check_role()
                gate.enter(call, stream=True)
                stream: Any = requests()
                if single_request:
                    stream = parse(await gate.read(call))
                elif not in_loop:
                    stream = await _begun(stream)
                with _span(name, context) if tracing.enabled else tracing.NO_SPAN:
                    if in_loop:
                        await method(stream, call, send)
                    else:
                        await _stream_in_thread(self._pool(call), call, method, stream, send)
                return
            except asyncio.CancelledError:
                if call is None or call.ended is None:
                    raise
                failure = call.ended
                if isinstance(failure, REFUSALS):
                    gate.refused(failure, context, name, "", call)
            except grpc.aio.BaseError as error:
                raise asyncio.CancelledError from error  # the connection has ended
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


async def _begun(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Wait for the first message, so that no thread waits for a caller that sends nothing."""
    first = await anext(requests, None)

    async def all_requests() -> AsyncIterator[Any]:
        if first is not None:
            yield first
            async for request in requests:
                yield request

    return all_requests()


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
