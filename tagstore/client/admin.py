"""Changing stores behind a server: the calls of `tagstore.v1.Admin` as functions of a URL.

with administer("grpc://localhost:50051/fashion") as admin:
    admin.delete(keys=["a.jpg"])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, Unpack

from tagstore.client.options import ConnectOptions, Options
from tagstore.client.sources.remote import Wire
from tagstore.client.stats import counters
from tagstore.client.urls import locate
from tagstore.errors import InvalidInput, Unavailable
from tagstore.types import Fingerprint, Kind, Pair, Rejected, StoreInfo

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What is known of a version without opening it."""

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
    """How many were quarantined for what, without the particulars."""
    quarantined: list[Rejected] = field(default_factory=list)
    """The first thousand."""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """What lies between two versions; as `maintenance.Diff`."""

    before: int
    after: int
    added: list[str]
    removed: list[str]
    changed: list[str]
    tags: list[tuple[str, Kind, int, int]]


def administer(url: str, **options: Unpack[ConnectOptions]) -> RemoteAdmin:
    """What a server lets its administrators do to a store.

    Args:
        url: grpc:// or grpcs://, of one address.
        options: those of `connect` that concern the connection: token, ca, cert, cert_key, server_name.

    Raises:
        InvalidInput: a URL of something else.
    """
    location = locate(url)
    if location.scheme not in ("grpc", "grpcs") or len(location.addresses) != 1:
        raise InvalidInput(f"'{url}' is no server of one address: write grpc://HOST:PORT/NAME")
    if location.version:
        raise InvalidInput(
            f"{url} names version {location.version}, but this is about the store as a whole: leave @{location.version} out"
        )
    return RemoteAdmin(Wire(location, Options().merged({**location.options, **options}), counters()))


class RemoteAdmin:
    """See `administer`. Methods raise what the library's functions of the same name raise, and `NotAuthenticated`, `NotPermitted`."""

    def __init__(self, wire: Wire) -> None:
        import grpc

        from tagstore_proto.v1 import tagstore_pb2_grpc

        self._wire = wire
        self._store = wire.location.store
        self._address = wire.location.addresses[0]
        self._channel = wire.channel(self._address, grpc.insecure_channel, grpc.secure_channel)
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
        """Send pairs; they are a version of the store when this returns. Pairs are read as the server takes them."""
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        failure: list[Exception] = []

        def requests() -> Iterator[pb.IngestRequest]:
            yield pb.IngestRequest(
                start=pb.IngestStart(store=self._store, encoder=encoder, miner=miner, source=source)
            )
            try:
                for item in pairs:
                    if isinstance(item, Rejected):
                        yield pb.IngestRequest(
                            rejected=pb.Rejected(key=item.key, reason=item.reason, origin=item.origin)
                        )
                    else:
                        yield pb.IngestRequest(pair=convert.pair_to_proto(item))
            except Exception as error:  # noqa: BLE001  gRPC would swallow it and half-close: what came so far must not become a version
                failure.append(error)
                call.cancel()

        done: Ingested | None = None
        reasons: dict[str, int] = {}
        quarantined: list[Rejected] = []
        call = self._stub.Ingest(requests(), metadata=self._wire.metadata)
        for response in self._errors(lambda: call, failure):
            for result in response.results:
                if result.outcome == pb.OUTCOME_QUARANTINED:
                    reason = result.reason.split(":")[0]
                    reasons[reason] = reasons.get(reason, 0) + 1
                    if len(quarantined) < 1000:
                        quarantined.append(Rejected(result.key, result.reason))
            progress("pairs", len(response.results))
            if response.HasField("report"):
                r = response.report
                done = Ingested(
                    r.store,
                    r.version,
                    r.pairs,
                    r.added,
                    r.unchanged,
                    r.entries,
                    r.tags,
                    r.unique_tags,
                    reasons,
                    quarantined,
                )
        if done is None:
            raise Unavailable(
                f"the server at {self._address} ended the ingest without a report: nothing was changed"
            )
        return done

    def delete(
        self,
        *,
        keys: Sequence[str] = (),
        sha256: Sequence[str] = (),
        near: Sequence[tuple[int, int]] = (),
        where: Mapping[str, str] | None = None,
    ) -> tuple[VersionInfo, list[str]]:
        """As `maintenance.delete`: the version made, and the keys of what it lacks."""
        from tagstore_proto.v1 import tagstore_pb2 as pb

        hashes = [pb.Near(perceptual_hash=value, distance=distance) for value, distance in near]
        request = pb.DeleteRequest(
            store=self._store, keys=keys, sha256=sha256, near=hashes, where=where or {}
        )
        response = self._call("Delete", request)
        return _version(response.version), list(response.keys)

    def rollback(self, version: int) -> VersionInfo:
        """As `maintenance.rollback`."""
        from tagstore_proto.v1 import tagstore_pb2 as pb

        return _version(
            self._call("Rollback", pb.RollbackRequest(store=self._store, version=version)).version
        )

    def build_index(
        self, *, progress: Callable[[str], None] = lambda what: None, **budget: Any
    ) -> tuple[VersionInfo, dict[str, Any]]:
        """Build an index within a budget (recall, memory_bytes, latency_ms, kind): the version made, and the report."""
        from tagstore_proto.v1 import tagstore_pb2 as pb

        request = pb.BuildIndexRequest(store=self._store, **budget)
        for response in self._errors(lambda: self._stub.BuildIndex(request, metadata=self._wire.metadata)):
            if response.progress:
                progress(response.progress)
            if response.HasField("version"):
                return _version(response.version), json.loads(response.report)
        raise Unavailable(f"the server at {self._address} ended the build without a report")

    def load(self) -> StoreInfo:
        """Have the store served."""
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        return convert.info_from_proto(self._call("Load", pb.LoadRequest(store=self._store)).store)

    def unload(self) -> None:
        """Have the store served no more, and its memory given back."""
        from tagstore_proto.v1 import tagstore_pb2 as pb

        self._call("Unload", pb.UnloadRequest(store=self._store))

    def versions(self) -> list[VersionInfo]:
        """All versions, oldest first."""
        from tagstore_proto.v1 import tagstore_pb2 as pb

        return [
            _version(v)
            for v in self._call("ListVersions", pb.ListVersionsRequest(store=self._store)).versions
        ]

    def diff(self, before: int, after: int) -> Difference:
        """As `maintenance.diff`."""
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        r = self._call("Diff", pb.DiffRequest(store=self._store, before=before, after=after))
        tags = [(t.text, convert.KIND_FROM_WIRE[t.kind], t.before, t.after) for t in r.tags]
        return Difference(r.before, r.after, list(r.added), list(r.removed), list(r.changed), tags)

    def _call(self, method: str, request: Any) -> Any:
        [response] = self._errors(
            lambda: [getattr(self._stub, method)(request, metadata=self._wire.metadata)]
        )
        return response

    def _errors(self, call: Callable[[], Iterable[T]], failure: Sequence[Exception] = ()) -> Iterator[T]:
        """The answers of a call, its errors as ours. What changes a store is never sent twice."""
        import grpc

        from tagstore.wire.status import error_of, retry_after_of

        try:
            yield from call()
        except grpc.RpcError as error:
            if failure:
                raise failure[0] from None
            code, said = error.code(), error.details()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise Unavailable(
                    f"no server answers at {self._address} ({said}): check the address, then `tagstore versions`"
                ) from None
            raise error_of(code, said, retry_after_of(error.trailing_metadata())) from None


def _version(message: Any) -> VersionInfo:
    from tagstore.wire import convert

    return VersionInfo(
        message.number,
        message.parent,
        message.created,
        message.operation,
        message.entries,
        message.tags,
        message.unique_tags,
        convert.fingerprint_from_proto(message.fingerprint),
    )
