"""The servicer that changes stores: the library's own functions behind the gate, with an audit line for each call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from queue import Queue
from threading import Event, Thread
from typing import Any

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
from tagstore.types import Pair, Rejected
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

RESULTS_AHEAD = 8
"""Batches of results that may wait for the caller; then the ingest waits for it."""


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
            event: dict[str, Any] = {"method": "Ingest", "store": start.store, "caller": caller.name, "peer": context.peer()}
            self.gate.audit.write(event="begun", **event)
            try:
                yield from _Ingest(self._catalog, start, requests).responses()
            except errors.TagstoreError as error:
                self.gate.audit.write(event="failed", reason=str(error), **event)
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


class _Ingest:
    """One ingest: the pairs go into a thread that works on them, what became of them comes out."""

    def __init__(self, catalog: LiveCatalog, start: pb.IngestStart, requests: Iterator[pb.IngestRequest]) -> None:
        self._catalog, self._start, self._requests = catalog, start, requests
        self._results: Queue[pb.IngestResponse | BaseException | None] = Queue(RESULTS_AHEAD)
        self._given_up = Event()

    def responses(self) -> Iterator[pb.IngestResponse]:
        worker = Thread(target=self._work, name="rpc-ingest", daemon=True)
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

    def _work(self) -> None:
        try:
            report = ingest_pairs(
                self._pairs(),
                root=self._catalog.root,
                store=self._start.store,
                source=self._start.source,
                encoder=self._encoder(),
                miner=self._start.miner or "rules",
                device=self._catalog.device,
                settled=lambda results: self._results.put(
                    pb.IngestResponse(results=[pb.PairResult(key=k, outcome=convert.OUTCOMES[o], reason=r) for k, o, r in results])
                ),
            )
            self._results.put(pb.IngestResponse(report=_report(report)))
            self._results.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the thread of the call
            self._results.put(error)

    def _encoder(self) -> str | Encoder | None:
        """The store's encoder as it is loaded here already, unless another one is asked for."""
        if self._start.encoder:
            return self._start.encoder
        try:
            return self._catalog.encoder(self._catalog.engine(self._start.store).fingerprint)
        except errors.NotFound:
            return None

    def _pairs(self) -> Iterator[Pair | Rejected]:
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
        if self._given_up.is_set():
            raise errors.Unavailable("the caller has gone: nothing was changed")


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
