"""The servicer that changes stores: the library's own functions behind the gate, with an audit line for each call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Queue
from typing import Any, Generic, TypeVar

import grpc

from tagstore import convert, errors
from tagstore.builder import Report, ingest_pairs
from tagstore.encoder import Encoder
from tagstore.maintenance import Diff, Selection, delete, diff, rollback
from tagstore.serving.access import Caller
from tagstore.serving.gate import Gate, answering, streaming
from tagstore.serving.live import LiveCatalog
from tagstore.serving.parsing import parsed
from tagstore.store import Store, Version
from tagstore.tuning import Budget, build_index
from tagstore.types import Pair, Rejected
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

AHEAD = 8
"""Responses that may wait for the caller; then the work waits for it."""

T = TypeVar("T")


class AdminService(pb_grpc.AdminServicer):
    """`tagstore.v1.Admin` over a catalog.

    Args:
        announce: told what the other workers on this port must know: {"unload": STORE}.
    """

    def __init__(self, catalog: LiveCatalog, gate: Gate, announce: Callable[[Mapping[str, Any]], None]) -> None:
        self._catalog, self.gate, self._announce = catalog, gate, announce

    def Ingest(self, requests: Iterator[pb.IngestRequest], context: Any) -> Iterator[pb.IngestResponse]:  # noqa: N802
        with streaming(self.gate, context, "Ingest") as caller:
            first = next(requests, None)
            if first is None or parsed(first).WhichOneof("part") != "start":
                raise errors.InvalidInput("the first message of an ingest says which store: send `start`")
            start = first.start
            caller.check("ingest", start.store)
            if start.encoder not in ("", "mini"):
                caller.check("admin", start.store)  # it may name files of the server, or something to fetch
            with self._recorded("Ingest", start.store, caller, context):
                yield from _Background(_Ingest(self._catalog, start, requests).run).responses()

    @contextmanager
    def _recorded(self, method: str, store: str, caller: Caller, context: Any) -> Iterator[None]:
        """Audit lines around what takes long: one at its beginning, one at its end."""
        event: dict[str, Any] = {"method": method, "store": store, "caller": caller.name, "peer": context.peer()}
        self.gate.audit.write(event="begun", **event)
        try:
            yield
        except BaseException as error:
            self.gate.audit.write(event="failed", reason=str(error) or "the caller broke off", **event)
            raise
        self.gate.audit.write(event="done", **event)

    @answering("ingest", writes=True)
    def Delete(self, request: pb.DeleteRequest, context: Any, caller: Caller) -> pb.DeleteResponse:  # noqa: N802
        near = [(n.perceptual_hash, n.distance) for n in request.near]
        selection = Selection(list(request.keys), list(request.sha256), near, dict(request.where))
        version, keys = delete(self._catalog.root, request.store, selection)
        return pb.DeleteResponse(version=_version(version), keys=keys)

    @answering("admin", writes=True)
    def Rollback(self, request: pb.RollbackRequest, context: Any, caller: Caller) -> pb.RollbackResponse:  # noqa: N802
        return pb.RollbackResponse(version=_version(rollback(self._catalog.root, request.store, request.version)))

    def BuildIndex(self, request: pb.BuildIndexRequest, context: Any) -> Iterator[pb.BuildIndexResponse]:  # noqa: N802
        with streaming(self.gate, context, "BuildIndex") as caller:
            caller.check("admin", parsed(request).store)
            budget = Budget(
                recall=request.recall or 0.95,
                memory=request.memory_bytes or None,
                latency=request.latency_ms / 1e3 or None,
            )

            def build(background: _Background[pb.BuildIndexResponse]) -> None:
                outcome = build_index(
                    self._catalog.root,
                    request.store,
                    budget,
                    kind=request.kind or "auto",
                    device=self._catalog.device,
                    advance=lambda stage, rows: background.check(),
                    say=lambda what: background.put(pb.BuildIndexResponse(progress=what)),
                )
                report = json.dumps(outcome.report(), sort_keys=True)
                background.put(pb.BuildIndexResponse(version=_version(outcome.version), report=report))

            with self._recorded("BuildIndex", request.store, caller, context):
                yield from _Background(build).responses()

    @answering("admin", writes=True)
    def Load(self, request: pb.LoadRequest, context: Any, caller: Caller) -> pb.LoadResponse:  # noqa: N802
        info = self._catalog.load(request.store)
        self._announce({"load": request.store})
        return pb.LoadResponse(store=convert.info_to_proto(info))

    @answering("admin", writes=True)
    def Unload(self, request: pb.UnloadRequest, context: Any, caller: Caller) -> pb.UnloadResponse:  # noqa: N802
        self._catalog.unload(request.store)
        self._announce({"unload": request.store})
        return pb.UnloadResponse()

    @answering("read")
    def ListVersions(self, request: pb.ListVersionsRequest, context: Any, caller: Caller) -> pb.ListVersionsResponse:  # noqa: N802
        versions = Store(self._catalog.root, request.store).versions()
        return pb.ListVersionsResponse(versions=[_version(version) for version in versions])

    @answering("read")
    def Diff(self, request: pb.DiffRequest, context: Any, caller: Caller) -> pb.DiffResponse:  # noqa: N802
        return _diff(diff(self._catalog.root, request.store, request.before, request.after))


class _Background(Generic[T]):
    """Work in a thread of its own that says how it goes: what it puts comes out of `responses`, and so does what it raises."""

    def __init__(self, work: Callable[[_Background[T]], None]) -> None:
        self._work = work
        self._results: Queue[T | BaseException | None] = Queue(AHEAD)
        self._given_up = threading.Event()

    def put(self, response: T) -> None:
        """Hand a response over; waits while many wait already. Raises `Unavailable` once the caller has gone."""
        self.check()
        self._results.put(response)

    def check(self) -> None:
        if self._given_up.is_set():
            raise errors.Unavailable("the caller has gone: nothing was changed")

    def responses(self) -> Iterator[T]:
        worker = threading.Thread(target=self._run, name="rpc-admin", daemon=True)
        worker.start()
        try:
            while (item := self._results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._given_up.set()
            while worker.is_alive():  # it may be waiting to hand over a result that nobody wants any more
                while not self._results.empty():
                    self._results.get_nowait()
                worker.join(0.05)

    def _run(self) -> None:
        try:
            self._work(self)
            self._results.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the thread of the call
            self._results.put(error)


class _Ingest:
    """One ingest: the pairs of a call go into the library, what became of them comes out."""

    def __init__(self, catalog: LiveCatalog, start: pb.IngestStart, requests: Iterator[pb.IngestRequest]) -> None:
        self._catalog, self._start, self._requests = catalog, start, requests

    def run(self, background: _Background[pb.IngestResponse]) -> None:
        report = ingest_pairs(
            self._pairs(background),
            root=self._catalog.root,
            store=self._start.store,
            source=self._start.source,
            encoder=self._encoder(),
            miner=self._start.miner or "rules",
            device=self._catalog.device,
            settled=lambda results: background.put(
                pb.IngestResponse(results=[pb.PairResult(key=k, outcome=convert.OUTCOMES[o], reason=r) for k, o, r in results])
            ),
        )
        background.put(pb.IngestResponse(report=_report(report)))

    def _encoder(self) -> str | Encoder | None:
        """The store's encoder as it is loaded here already, unless another one is asked for."""
        if self._start.encoder:
            return self._start.encoder
        try:
            return self._catalog.encoder(self._catalog.engine(self._start.store).fingerprint)
        except errors.NotFound:
            return None

    def _pairs(self, background: _Background[pb.IngestResponse]) -> Iterator[Pair | Rejected]:
        try:
            for request in self._requests:
                match parsed(request).WhichOneof("part"):
                    case "pair":
                        yield convert.pair_from_proto(request.pair)
                    case "rejected":
                        yield Rejected(request.rejected.key, request.rejected.reason, request.rejected.origin)
                    case other:
                        raise errors.InvalidInput(f"a message of an ingest is a pair or a rejected one, not {other or 'empty'}")
        except grpc.RpcError as error:
            raise errors.Unavailable("the caller broke off: nothing was changed") from error
        background.check()


def _version(version: Version) -> pb.VersionInfo:
    return pb.VersionInfo(
        number=version.number,
        parent=version.parent,
        created=version.created,
        operation=version.operation,
        entries=version.entries,
        tags=version.tags,
        unique_tags=version.unique_tags,
        fingerprint=convert.fingerprint_to_proto(version.fingerprint),
    )


def _diff(found: Diff) -> pb.DiffResponse:
    return pb.DiffResponse(
        before=found.before,
        after=found.after,
        added=found.added,
        removed=found.removed,
        changed=found.changed,
        tags=[pb.TagChange(text=text, kind=convert.KIND_TO_WIRE[kind], before=b, after=a) for text, kind, b, a in found.tags],
    )


def _report(report: Report) -> pb.IngestReport:
    return pb.IngestReport(
        store=report.store,
        version=report.version,
        pairs=report.pairs,
        added=report.added,
        unchanged=report.unchanged,
        quarantined=sum(report.reasons.values()),
        entries=report.entries,
        tags=report.tags,
        unique_tags=report.unique_tags,
    )
