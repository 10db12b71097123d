"""Change stores behind a server: the calls of `tagstore.v1.Admin` as methods.

with administer("grpc://localhost:50051/fashion") as admin:
    admin.delete(keys=["a.jpg"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, Unpack

import grpc

from tagstore.client import answer_check
from tagstore.client.channels import Channels
from tagstore.client.options import ConnectOptions, Options
from tagstore.client.urls import Location, locate
from tagstore.errors import InvalidInput, Unavailable
from tagstore.metadata_filter import filter_texts
from tagstore.readers.pair_check import checked
from tagstore.types import Fingerprint, Kind, Pair, Rejected, StoreInfo
from tagstore.wire import convert
from tagstore.wire.status import error_of, retry_after_of
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc

T = TypeVar("T")
_MAX_QUARANTINED = 1000
"""Quarantined pairs that an ingest reports with their reason."""


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What a server tells about a version without opening it."""

    number: int
    parent: int
    created: str
    operation: str
    entries: int
    tags: int
    unique_tags: int
    fingerprint: Fingerprint


@dataclass(slots=True)
class Ingested:
    """What an ingest did."""

    store: str
    version: int
    pairs: int
    added: int
    unchanged: int
    entries: int
    tags: int
    unique_tags: int
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined pairs, by reason without its particulars."""
    quarantined: list[Rejected] = field(default_factory=list)
    """The first thousand of them."""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two versions."""

    before: int
    after: int
    added: list[str]
    removed: list[str]
    changed: list[str]
    tags: list[tuple[str, Kind, int, int]]


def administer(url: str, **options: Unpack[ConnectOptions]) -> RemoteAdmin:
    """Open what a server lets its administrators do to a store.

    Args:
        url: grpc:// or grpcs://, of one address.
        options: those of `connect` that concern the connection: token, ca, cert, cert_key, server_name.

    Raises:
        InvalidInput: the URL is not that of a server with one address.
    """
    location = locate(url)
    if location.scheme not in ("grpc", "grpcs") or len(location.addresses) != 1:
        raise InvalidInput(f"'{url}' is no server of one address: write grpc://HOST:PORT/NAME")
    if location.version:
        raise InvalidInput(
            f"{url} names version {location.version}, but this is about the store as a whole: "
            f"leave @{location.version} out"
        )
    return RemoteAdmin(location, Options().merged({**location.options, **options}))


class RemoteAdmin:
    """See `administer`.

    Methods raise what the functions of the same name in `tagstore.upkeep` raise, and `NotAuthenticated`,
    `NotPermitted`.
    """

    def __init__(self, location: Location, options: Options) -> None:
        channels = Channels(location, options)
        self._store = location.store
        # by it the server refuses a caller without the role before it reads a message
        self._metadata = (*channels.metadata, ("tagstore-store", self._store))
        [self._address] = location.addresses
        self._channel = channels.open(self._address)
        self._stub = tagstore_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def ingest(
        self,
        pairs: Iterable[Pair | Rejected],
        *,
        encoder: str = "",
        miner: str = "",
        source: str = "",
        progress: Callable[[str, int], None] = lambda stage, done: None,
    ) -> Ingested:
        """Send pairs; they are a version of the store when this returns. Pairs are read as they are sent."""
        failure: list[Exception] = []

        def requests() -> Iterator[pb.IngestRequest]:
            yield pb.IngestRequest(
                start=pb.IngestStart(store=self._store, encoder=encoder, miner=miner, source=source)
            )
            try:
                for item in map(checked, pairs):
                    if isinstance(item, Rejected):
                        yield pb.IngestRequest(
                            rejected=pb.Rejected(key=item.key, reason=item.reason, origin=item.origin)
                        )
                    else:
                        yield pb.IngestRequest(pair=convert.pair_to_proto(item))
            # gRPC would end the stream without error: what came so far must not become a version
            except Exception as error:  # noqa: BLE001
                failure.append(error)
                call.cancel()

        report: pb.IngestReport | None = None
        reasons: dict[str, int] = {}
        quarantined: list[Rejected] = []
        call = self._stub.Ingest(requests(), metadata=self._metadata)
        for response in self._errors(lambda: call, failure):
            for result in response.results:
                if result.outcome == pb.OUTCOME_QUARANTINED:
                    reason = result.reason.split(":")[0]
                    reasons[reason] = reasons.get(reason, 0) + 1
                    if len(quarantined) < _MAX_QUARANTINED:
                        quarantined.append(Rejected(result.key, result.reason))
            progress("pairs", len(response.results))
            if response.HasField("report"):
                report = response.report
        if report is None:
            raise Unavailable(
                f"the server at {self._address} ended the ingest without a report: nothing was changed"
            )
        read = (report.pairs, report.added, report.unchanged)
        counts = (*read, report.entries, report.tags, report.unique_tags)
        return Ingested(report.store, report.version, *counts, reasons, quarantined)

    def delete(
        self,
        *,
        keys: Sequence[str] = (),
        sha256: Sequence[str] = (),
        near: Sequence[tuple[int, int]] = (),
        where: Mapping[str, str | float | bool | None] | None = None,
    ) -> tuple[VersionInfo, list[str]]:
        """Make a version without some entries. Returns it and their keys."""
        hashes = [pb.Near(perceptual_hash=value, distance=distance) for value, distance in near]
        request = pb.DeleteRequest(
            store=self._store, keys=keys, sha256=sha256, near=hashes, where=filter_texts(where or {})
        )
        response = self._call("Delete", request)
        return _version(response.version), list(response.keys)

    def rollback(self, version: int) -> VersionInfo:
        """Make a version that holds what an old one held."""
        request = pb.RollbackRequest(store=self._store, version=version)
        return _version(self._call("Rollback", request).version)

    def build_index(
        self, *, progress: Callable[[str], None] = lambda message: None, **budget: Any
    ) -> tuple[VersionInfo, dict[str, Any]]:
        """Build an index within a budget of recall, memory_bytes, latency_ms. Returns version and report."""
        request = pb.BuildIndexRequest(store=self._store, **budget)
        for response in self._errors(lambda: self._stub.BuildIndex(request, metadata=self._metadata)):
            if response.progress:
                progress(response.progress)
            if response.HasField("version"):
                return _version(response.version), convert.object_from_json(
                    "the report of a build", response.report
                )
        raise Unavailable(f"the server at {self._address} ended the build without a report")

    def load(self) -> StoreInfo:
        """Let the server serve the store."""
        request = pb.GetStoreRequest(store=self._store)
        return answer_check.info(request, self._call("Load", pb.LoadRequest(store=self._store)))

    def unload(self) -> None:
        """Let the server stop serving the store, and free its memory."""
        self._call("Unload", pb.UnloadRequest(store=self._store))

    def versions(self) -> list[VersionInfo]:
        """List all versions, oldest first."""
        response = self._call("ListVersions", pb.ListVersionsRequest(store=self._store))
        return [_version(version) for version in response.versions]

    def diff(self, before: int, after: int) -> Difference:
        """Compare two versions."""
        diff = self._call("Diff", pb.DiffRequest(store=self._store, before=before, after=after))
        tags = [(t.text, convert.kind_from_proto(t.kind), t.before, t.after) for t in diff.tags]
        keys = (list(diff.added), list(diff.removed), list(diff.changed))
        return Difference(diff.before, diff.after, *keys, tags)

    def _call(self, method: str, request: Any) -> Any:
        [response] = self._errors(lambda: [getattr(self._stub, method)(request, metadata=self._metadata)])
        return response

    def _errors(self, call: Callable[[], Iterable[T]], failure: Sequence[Exception] = ()) -> Iterator[T]:
        """Yield the responses of a call, its errors as ours. What changes a store is never sent twice."""
        try:
            yield from call()
        except grpc.RpcError as error:
            if failure:
                raise failure[0] from None
            code, details = error.code(), error.details() or ""
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise Unavailable(
                    f"no server answers at {self._address} ({details}): "
                    "check the address, then `tagstore versions`"
                ) from None
            raise error_of(code, details, retry_after_of(error.trailing_metadata())) from None


def _version(message: Any) -> VersionInfo:
    origin = (message.number, message.parent, message.created, message.operation)
    counts = (message.entries, message.tags, message.unique_tags)
    return VersionInfo(*origin, *counts, convert.fingerprint_from_proto(message.fingerprint))
