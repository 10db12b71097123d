"""The servicer that changes stores with the library's functions, and writes each call into the audit log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tagstore import errors
from tagstore.encoding.decode_memory import MemoryBudget
from tagstore.encoding.encoder import Encoder
from tagstore.ingestion import Report, ingest_pairs
from tagstore.mining import reads_pictures
from tagstore.readers.pair_check import checked
from tagstore.serving.call import Call
from tagstore.serving.gate import Gate
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.methods import answering, streaming
from tagstore.serving.shared_miners import SharedMiners
from tagstore.storage.store import Store
from tagstore.storage.version import Version
from tagstore.types import Pair, Rejected
from tagstore.upkeep.edits import Diff, Selection, delete, diff, rollback
from tagstore.upkeep.tuning import Budget, build_index
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

INGEST_BATCH, INGEST_BATCH_BYTES = 32, 8 << 20
"""Pairs, and bytes of them, that an ingest writes at once: less than a local one, as there may be several."""
INGEST_IMAGE_BYTES = 64 << 20
"""Bytes of images of all ingests that wait to be decoded."""


class AdminService:
    """`tagstore.v1.Admin` over a catalog.

    Args:
        announce: called with what the other workers of this port must know: {"unload": STORE}.
    """

    def __init__(
        self, catalog: LiveCatalog, gate: Gate, announce: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._catalog, self.gate, self._announce = catalog, gate, announce
        self._images = MemoryBudget(INGEST_IMAGE_BYTES)
        """For images that wait to be decoded; each is given back once it is."""
        self._miners = SharedMiners()

    @streaming("ingest")
    def Ingest(  # noqa: N802
        self, requests: Iterator[pb.IngestRequest], call: Call, send: Callable[[pb.IngestResponse], None]
    ) -> None:
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "start":
            raise errors.InvalidInput("the first message of an ingest says which store: send `start`")
        start = first.start
        call.caller.check("ingest", start.store)
        if start.encoder not in ("", "mini"):
            call.caller.check(
                "admin", start.store
            )  # the name may be of a file on the server, or of a download
        if ":" in start.miner:
            call.caller.check("admin", start.store)  # a model that it names may be such a file too
        with self._recorded("Ingest", start.store, call):
            miner = self._miners.get(start.miner or "rules")
            report = ingest_pairs(
                _pairs(requests, send, call, start.store, self._images, reads_pictures(miner)),
                root=self._catalog.root,
                store=start.store,
                source=start.source,
                encoder=self._encoder(start),
                miner=miner,
                device=self._catalog.device,
                batch=INGEST_BATCH,
                batch_bytes=INGEST_BATCH_BYTES,
                decode_memory=self._catalog.decode_memory,
                decoded=lambda pair: self._images.give_back(len(pair.image)),
                settled=lambda results: send(
                    pb.IngestResponse(
                        results=[
                            pb.PairResult(key=k, outcome=convert.OUTCOMES[o], reason=r) for k, o, r in results
                        ]
                    )
                ),
            )
            send(pb.IngestResponse(report=_report(report)))

    def _encoder(self, start: pb.IngestStart) -> str | Encoder | None:
        """Return the requested encoder, or the store's, which the catalog may have loaded."""
        if start.encoder:
            return start.encoder
        try:
            return self._catalog.encoder(self._catalog.engine(start.store).fingerprint)
        except errors.NotFound:
            return None

    @contextmanager
    def _recorded(self, method: str, store: str, call: Call) -> Iterator[None]:
        """Write one audit line when a long call begins and one when it ends."""
        event = {"method": method, "store": store, "caller": call.caller.name, "peer": call.peer}
        self.gate.audit.begun(**event)
        try:
            yield
        except BaseException as error:
            self.gate.audit.end("failed", **event, reason=str(error) or "the caller disconnected")
            raise
        self.gate.audit.end("done", **event)

    @answering("ingest", writes=True)
    def Delete(self, request: pb.DeleteRequest, call: Call) -> pb.DeleteResponse:  # noqa: N802
        neighbourhoods = [(n.perceptual_hash, n.distance) for n in request.near]
        selection = Selection(list(request.keys), list(request.sha256), neighbourhoods, dict(request.where))
        version, keys = delete(self._catalog.root, request.store, selection)
        return pb.DeleteResponse(version=_version(version), keys=keys)

    @answering("admin", writes=True)
    def Rollback(self, request: pb.RollbackRequest, call: Call) -> pb.RollbackResponse:  # noqa: N802
        return pb.RollbackResponse(
            version=_version(rollback(self._catalog.root, request.store, request.version))
        )

    @streaming("admin")
    def BuildIndex(  # noqa: N802
        self, request: pb.BuildIndexRequest, call: Call, send: Callable[[pb.BuildIndexResponse], None]
    ) -> None:
        call.caller.check("admin", request.store)
        budget = Budget(
            recall=request.recall or 0.95,
            memory=request.memory_bytes or None,
            latency=request.latency_ms / 1e3 or None,
        )
        with self._recorded("BuildIndex", request.store, call):
            outcome = build_index(
                self._catalog.root,
                request.store,
                budget,
                kind=request.kind or "auto",
                device=self._catalog.device,
                advance=lambda stage, rows: call.check(),
                say=lambda progress: send(pb.BuildIndexResponse(progress=progress)),
            )
            report = json.dumps(outcome.report(), sort_keys=True)
            send(pb.BuildIndexResponse(version=_version(outcome.version), report=report))

    @answering("admin", writes=True)
    def Load(self, request: pb.LoadRequest, call: Call) -> pb.LoadResponse:  # noqa: N802
        info = self._catalog.load(request.store)
        self._announce({"load": request.store})
        return pb.LoadResponse(store=convert.info_to_proto(info))

    @answering("admin", writes=True)
    def Unload(self, request: pb.UnloadRequest, call: Call) -> pb.UnloadResponse:  # noqa: N802
        self._catalog.unload(request.store)
        self._announce({"unload": request.store})
        return pb.UnloadResponse()

    @answering("read")
    def ListVersions(self, request: pb.ListVersionsRequest, call: Call) -> pb.ListVersionsResponse:  # noqa: N802
        versions = Store(self._catalog.root, request.store).versions()
        return pb.ListVersionsResponse(versions=[_version(version) for version in versions])

    @answering("read")
    def Diff(self, request: pb.DiffRequest, call: Call) -> pb.DiffResponse:  # noqa: N802
        return _diff(diff(self._catalog.root, request.store, request.before, request.after))


def _pairs(
    requests: Iterator[pb.IngestRequest],
    send: Callable[[pb.IngestResponse], None],
    call: Call,
    store: str,
    images: MemoryBudget,
    captions_optional: bool,
) -> Iterator[Pair | Rejected]:
    for request in requests:
        match request.WhichOneof("part"):
            case "pair":
                pair = checked(convert.pair_from_proto(request.pair), captions_optional=captions_optional)
                del request
                if isinstance(pair, Pair):  # one that was refused is never decoded, and so never given back
                    images.take(len(pair.image))
                yield pair
                del pair
            case "rejected":
                yield Rejected(request.rejected.key, request.rejected.reason, request.rejected.origin)
            case other:
                raise errors.InvalidInput(
                    f"a message of an ingest is a pair or a rejected one, not {other or 'empty'}"
                )
    # a caller that disconnected looks like one that has finished, but sending to it fails
    send(pb.IngestResponse())
    call.caller.check("ingest", store)  # `send` has looked whether the right was withdrawn meanwhile


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


def _diff(difference: Diff) -> pb.DiffResponse:
    return pb.DiffResponse(
        before=difference.before,
        after=difference.after,
        added=difference.added,
        removed=difference.removed,
        changed=difference.changed,
        tags=[
            pb.TagChange(text=text, kind=convert.KIND_TO_WIRE[kind], before=b, after=a)
            for text, kind, b, a in difference.tags
        ],
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
