"""Requests of `tuna serve` on their way to the model: read each alone, then answered in batches.

    body ──read (threads)──▶ Job ──queue──▶ batch of equal settings ──model (one thread)──▶ answers

The event loop decodes, tokenises and computes nothing. A caller that has gone ends its own computation. What
fails, fails alone: a batch that fails is answered again, each of its requests by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tagstore.errors import Overloaded, Unavailable
from tuna_model.inference.conversations import Prompt, Reader
from tuna_model.inference.decoding import AnswerStream
from tuna_model.inference.pipeline import Pipeline
from tuna_model.serving.chat_messages import RequestLimits
from tuna_model.serving.chat_request import ChatRequest, read_request

log = logging.getLogger(__name__)

MAX_PICTURES = 64
"""Pictures of a request, at most, if the model's context holds more."""
MAX_WAITING_PICTURES = 512
"""Pictures of all requests that wait, at most; further ones are refused. One takes some 600 KB."""
READING_THREADS = 2
"""Threads that decode pictures and tokenise texts. Each holds at most one decoded picture."""


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits for the model."""

    request: ChatRequest
    prompt: Prompt | None = None
    """The request's conversation, read."""
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    """Gets the `Answer` of each choice, as a list. Or of a stream its `PreparedBatch`, its pieces as (choice,
    text), and the `Ending` of each choice, as a list. Or the error."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when the caller went away."""

    @property
    def pictures(self) -> int:
        """Pictures of the conversation."""
        return len(self.prompt.pixels) if self.prompt else 0


class Worker:
    """Brings requests to the model, one batch after the other. Used in one event loop."""

    def __init__(
        self, tuna: Pipeline, *, name: str = "", batch: int = 8, wait: float = 0.01, waiting: int = 256
    ) -> None:
        """
        Args:
            name: of the model; empty if requests may give any.
            batch: requests answered together, at most.
            wait: seconds that the first request of a batch waits for others.
            waiting: requests that may wait; further ones are refused.
        """
        self.tuna, self._name, self._batch_size, self._wait = tuna, name, batch, wait
        self._most_waiting = waiting
        self._queue: asyncio.Queue[Job] = asyncio.Queue(waiting)
        self._waiting_pictures = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tuna")
        self._readers = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="read")
        self._of_thread = threading.local()
        self._reading = 0
        self._unfinished: set[Job] = set()
        self.batches = 0
        """Batches answered so far."""
        self.answered = 0
        """Requests answered so far."""

    async def read(self, body: bytes) -> Job:
        """Check a request and make it ready for the model. Raises `InvalidInput`, `Overloaded`."""
        if self._reading + self.waiting >= self._most_waiting:
            raise _overloaded()
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, body)
        finally:
            self._reading -= 1

    async def first_result(self, job: Job) -> Any:
        """Let a request wait for the model, and return the first of its results. Cancelling it drops the job.

        Raises `Overloaded` if too many wait, or what the request failed of.
        """
        try:
            self.submit(job)
            result = await job.results.get()
        except asyncio.CancelledError:
            job.gone.set()
            raise
        if isinstance(result, Exception):
            raise result
        return result

    def submit(self, job: Job) -> None:
        """Let a request wait for the model. Raises `Overloaded` if too many wait, or too many pictures."""
        pictures = self._waiting_pictures + job.pictures
        if self._queue.full() or (self._waiting_pictures and pictures > MAX_WAITING_PICTURES):
            raise _overloaded()
        self._queue.put_nowait(job)
        self._waiting_pictures = pictures

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return self._queue.qsize()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests within the context. Its end stops those that are being answered, and refuses those
        that wait."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            for job in self._unfinished:
                job.gone.set()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            while not self._queue.empty():
                await self._next()
            for job in self._unfinished:
                job.results.put_nowait(Unavailable("the server stops: ask another one"))
            for pool in (self._readers, self._thread):
                await asyncio.to_thread(pool.shutdown, cancel_futures=True)

    def _read(self, body: bytes) -> Job:
        reader = getattr(self._of_thread, "reader", None)
        if reader is None:
            # a tokenizer is not safe for several threads
            reader = self._of_thread.reader = copy.deepcopy(self.tuna.reader)
        request = read_request(body, _limits(reader, self._name))
        new_tokens = request.options["max_new_tokens"]
        prompt = reader.read(request.images, request.conversation, new_tokens=new_tokens)
        return Job(request.model_copy(update={"messages": []}), prompt)

    async def _next(self) -> Job:
        job = await self._queue.get()
        self._waiting_pictures -= job.pictures
        self._unfinished.add(job)
        return job

    async def _run(self) -> None:
        held: list[Job] = []  # the request that did not fit into the batch before
        while True:
            first = held.pop() if held else await self._next()
            batch = [first]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait):
                    while first.request.shares_batch and len(batch) < self._batch_size and not held:
                        job = await self._next()
                        same = job.request.shares_batch and job.request.options == first.request.options
                        (batch if same else held).append(job)
            await self._answer(batch)
            self._unfinished.difference_update(batch)

    async def _answer(self, batch: list[Job]) -> None:
        batch = [job for job in batch if not job.gone.is_set()]
        if not batch:
            return
        self.batches += 1
        try:
            if batch[0].request.stream:
                await self._stream(batch[0])
            else:
                await self._answer_together(batch)
        except Exception as error:  # noqa: BLE001  given to its caller
            if len(batch) > 1:
                log.info("a batch of %d requests failed (%s): each is answered alone", len(batch), error)
                for job in batch:
                    await self._answer([job])
                return
            batch[0].results.put_nowait(error)
        self.answered += len(batch)

    async def _answer_together(self, batch: list[Job]) -> None:
        prompts = [job.prompt for job in batch if job.prompt is not None]
        stops, options = [job.gone for job in batch], batch[0].request.options
        answers = await self._in_thread(lambda: self.tuna.answer_prompts(prompts, stops=stops, **options))
        choices = len(answers) // len(batch)
        for number, job in enumerate(batch):
            job.results.put_nowait(answers[number * choices : (number + 1) * choices])

    async def _stream(self, job: Job) -> None:
        prompts = [job.prompt] if job.prompt is not None else []
        prepared = await self._in_thread(lambda: self.tuna.prepare_prompts(prompts))
        job.results.put_nowait(prepared)
        pieces: AnswerStream = await self._in_thread(
            lambda: self.tuna.stream_choices(prepared, stop=job.gone, **job.request.options)
        )
        try:
            while not job.gone.is_set():
                piece = await self._in_thread(lambda: next(pieces, None))
                if piece is None:
                    break
                job.results.put_nowait(piece)
        finally:
            await self._in_thread(pieces.close)
        job.results.put_nowait(pieces.endings)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _limits(reader: Reader, name: str) -> RequestLimits:
    pictures = min(reader.most_pictures or MAX_PICTURES, MAX_PICTURES)
    characters = reader.most_characters or RequestLimits().characters
    return RequestLimits(pictures, characters, reader.pixels, name)


def _overloaded() -> Overloaded:
    return Overloaded("too many requests are waiting: try again later", retry_after=1.0)
