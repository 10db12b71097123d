"""`connect(url)` gives a tag source: the same answers from a server or from a directory.

    grpc://HOST:PORT/NAME     a server
    file://DIR/NAME           a store on this machine, in process (`tagstore[server]`); file:///abs/dir/NAME for an absolute path
    ...NAME@7                 version 7 instead of the current one

The base install is enough for grpc://: nothing heavier than grpcio and numpy is imported.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tagstore import errors
from tagstore.types import Fingerprint, Retrieval, Search, StoreInfo, TagInfo

if TYPE_CHECKING:
    from tagstore.catalog import Catalog

Image = bytes | str | os.PathLike[str]
"""An encoded image, or the path of a file that holds one."""

DEFAULT_TIMEOUT = 30.0
MAX_MESSAGE = 64 << 20
_BATCH_BYTES = 16 << 20
_BATCH_IMAGES = 32
_BATCH_ROWS = 256
_BATCH_NEIGHBOURS = 1 << 14
_URL = re.compile(r"(?P<scheme>[a-z]+)://(?P<place>.*?)(?:/(?P<store>[^/@]+)(?:@(?P<version>\d+))?)?/?")


class TagSource(Protocol):
    """Where a model gets tags from."""

    def retrieve(
        self,
        images: Sequence[Image] = (),
        *,
        vectors: NDArray[np.floating] | None = None,
        fingerprint: Fingerprint | str = "",
        k: int = 5,
        max_tags: int = 0,
    ) -> list[Retrieval]:
        """Retrieved tags of each image, then of each vector, all from one version of the store.

        Args:
            images: encoded images or paths; the store's side embeds them.
            vectors: `[N, D]` float32 or float16 of the store's encoder.
            fingerprint: of the encoder that made `vectors`; required with them.
            k: neighbours a query.
            max_tags: at most so many tags a query, best first; 0 for all.

        Raises:
            InvalidInput: a query that means nothing; the message says which and why.
            NotFound: no such store, version or image file.
            FingerprintMismatch: vectors of another encoder.
            Unavailable: no server there, or no answer in time.
        """
        ...

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        """Tags by id, with their text embeddings if asked for. Raises `NotFound`."""
        ...

    def vocabulary(self, *, embeddings: bool = False) -> Iterator[TagInfo]:
        """All tags of the version in order of their ids, fetched page by page."""
        ...

    def info(self) -> StoreInfo:
        """The version that answers now."""
        ...

    def close(self) -> None:
        """Let go of connections. A closed source opens again when used."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def connect(url: str, *, timeout: float = DEFAULT_TIMEOUT) -> TagSource:
    """The tag source of a URL. Nothing is opened before it is first used.

    Args:
        url: see above.
        timeout: seconds a call may take, for grpc://.

    Raises:
        InvalidInput: a URL that names no store.
    """
    scheme, place, store, version = parse(url)
    if scheme == "grpc":
        return RemoteSource(place, store, version, timeout=timeout)
    return LocalSource(place, store, version)


def parse(url: str) -> tuple[str, str, str, int]:
    """(scheme, place, store, version or 0) of a URL. Raises `InvalidInput`, with an example."""
    match = _URL.fullmatch(url)
    if match is None or match["scheme"] not in ("grpc", "file"):
        raise errors.InvalidInput(f"'{url}' is no URL of a store: write grpc://HOST:PORT/NAME or file://DIR/NAME")
    scheme, place, store = match["scheme"], match["place"], match["store"]
    if scheme == "file" and not place and store:
        place = "/" if url.startswith("file:///") else "."
    if not store or not place:
        raise errors.InvalidInput(f"'{url}' names no store: end it with one, as in {url.rstrip('/')}/NAME")
    if scheme == "grpc" and not re.fullmatch(r".+:\d{1,5}", place):
        raise errors.InvalidInput(f"'{url}' has no port: write grpc://{place}:50051/{store}")
    version = int(match["version"] or 0)
    if version >= 1 << 63:
        raise errors.InvalidInput(f"'{url}' asks for version {version}: there can be no such")
    return scheme, place, store, version


class _Source:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class LocalSource(_Source):
    """A store in this process."""

    def __init__(self, root: str, store: str, version: int = 0) -> None:
        self._root, self._store, self._version = root, store, version
        self._catalog: Catalog | None = None
        self._pid = 0

    def retrieve(
        self,
        images: Sequence[Image] = (),
        *,
        vectors: NDArray[np.floating] | None = None,
        fingerprint: Fingerprint | str = "",
        k: int = 5,
        max_tags: int = 0,
    ) -> list[Retrieval]:
        catalog, search = self._opened(), Search(k=k, max_tags=max_tags)
        # opened once, so that a version committed meanwhile does not split the answer
        engine = catalog.engine(self._store, self._version)
        answers: list[Retrieval] = []
        for some_images, some_vectors in _batches(images, vectors, k):
            answers += catalog.retrieve(
                engine,
                images=some_images,
                vectors=some_vectors,
                fingerprint=_digest(fingerprint),
                search=search,
            )
        return answers

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        return self._opened().engine(self._store, self._version).tags(tag_ids, embeddings=embeddings) if tag_ids else []

    def vocabulary(self, *, embeddings: bool = False) -> Iterator[TagInfo]:
        engine = self._opened().engine(self._store, self._version)
        first = 0
        while page := engine.tags(first=first, limit=1000, embeddings=embeddings):
            yield from page
            first = page[-1].tag_id + 1

    def info(self) -> StoreInfo:
        return self._opened().engine(self._store, self._version).info()

    def close(self) -> None:
        self._catalog = None

    def _opened(self) -> Catalog:
        if self._catalog is None or self._pid != os.getpid():
            self._pid = os.getpid()  # an LMDB environment must not cross a fork: a child opens its own
            try:
                from tagstore.catalog import Catalog
            except ModuleNotFoundError as error:
                raise errors.MissingExtra(f"file:// needs {error.name}: pip install 'tagstore[server]', or use grpc://") from error
            self._catalog = Catalog(self._root)
        return self._catalog


class RemoteSource(_Source):
    """A store behind a server. Safe for threads; the channel is opened at first use in each process."""

    def __init__(self, address: str, store: str, version: int = 0, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._address, self._store, self._version, self._timeout = address, store, version, timeout
        self._lock = threading.Lock()
        self._channel: Any = None
        self._pid = 0

    def retrieve(
        self,
        images: Sequence[Image] = (),
        *,
        vectors: NDArray[np.floating] | None = None,
        fingerprint: Fingerprint | str = "",
        k: int = 5,
        max_tags: int = 0,
    ) -> list[Retrieval]:
        from tagstore import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        answers: list[Retrieval] = []
        version = self._version
        for some_images, some_vectors in _batches(images, vectors, k):
            request = pb.RetrieveRequest(
                store=self._store, version=version, images=some_images, fingerprint=_digest(fingerprint), k=_in_range("k", k)
            )
            request.max_tags = _in_range("max_tags", max_tags)
            if some_vectors is not None:
                if some_vectors.ndim != 2:
                    raise errors.BadVector(f"vectors have shape {list(some_vectors.shape)}: pass [N, D]")
                request.vectors.CopyFrom(convert.vectors_to_proto(some_vectors))
            response = self._call("Retrieve", request)
            version = response.version  # later batches come from the version that answered the first
            answers += convert.retrievals_from_proto(response)
        return answers

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        from tagstore import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        found: list[TagInfo] = []
        for start in range(0, len(tag_ids), 1000):
            some = tag_ids[start : start + 1000]
            request = pb.GetTagsRequest(store=self._store, version=self._version, tag_ids=some, embeddings=embeddings)
            found += convert.tags_from_proto(self._call("GetTags", request))
        return found

    def vocabulary(self, *, embeddings: bool = False) -> Iterator[TagInfo]:
        from tagstore import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        first, version = 0, self._version
        while True:
            request = pb.GetTagsRequest(store=self._store, version=version, first_tag_id=first, embeddings=embeddings)
            response = self._call("GetTags", request)
            yield from convert.tags_from_proto(response)
            first, version = response.next_tag_id, response.version
            if not first:
                return

    def info(self) -> StoreInfo:
        from tagstore import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        return convert.info_from_proto(self._call("GetStore", pb.GetStoreRequest(store=self._store, version=self._version)).store)

    def close(self) -> None:
        with self._lock:
            if self._channel is not None and self._pid == os.getpid():
                self._channel.close()
            self._channel = None

    def _call(self, method: str, request: Any) -> Any:
        import grpc

        try:
            return getattr(self._stub(), method)(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise _from_status(error, self._address, self._timeout) from None

    def _stub(self) -> Any:
        import grpc

        from tagstore_proto.v1 import tagstore_pb2_grpc

        with self._lock:
            if self._channel is None or self._pid != os.getpid():
                options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
                if re.match(r"(localhost|127\.|\[::1\])", self._address):
                    options.append(("grpc.enable_http_proxy", 0))  # a proxy knows no loopback address of ours
                self._channel = grpc.insecure_channel(self._address, options=options)
                self._open_stub = tagstore_pb2_grpc.TagStoreStub(self._channel)
                self._pid = os.getpid()
            return self._open_stub


def _from_status(error: Any, address: str, timeout: float) -> errors.TagstoreError:
    import grpc

    code, message = error.code(), error.details()
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return errors.InvalidInput(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.InvalidInput(f"too much for the server at {address}: {message}. Send less at once, or later")
        case grpc.StatusCode.NOT_FOUND:
            return errors.NotFound(message)
        case grpc.StatusCode.ALREADY_EXISTS:
            return errors.AlreadyExists(message)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return errors.FingerprintMismatch(message)
        case grpc.StatusCode.DATA_LOSS:
            return errors.Damaged(message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.Unavailable(f"the server at {address} did not answer within {timeout:g} s")
        case grpc.StatusCode.UNAVAILABLE:
            return errors.Unavailable(f"no server answers at {address} ({message}): start one with `tagstore serve`, or check the address")
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.Unavailable(f"the server at {address} is no tagstore of this version: {message}")
        case _:
            return errors.TagstoreError(f"the server at {address} answered {code.name}: {message}")


def _batches(
    images: Sequence[Image], vectors: NDArray[np.floating] | None, k: int
) -> Iterator[tuple[list[bytes], NDArray[np.floating] | None]]:
    """Requests small enough for the wire: images first, then vectors."""
    if isinstance(images, bytes | str | os.PathLike):
        raise errors.InvalidInput("images is a list: pass [image] for one")
    batch: list[bytes] = []
    size = 0
    for image in images:
        data = _read(image)
        if batch and (size + len(data) > _BATCH_BYTES or len(batch) == max(1, min(_BATCH_IMAGES, _BATCH_NEIGHBOURS // max(1, k)))):
            yield batch, None
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    if batch:
        yield batch, None
    if vectors is not None:
        rows = max(1, min(_BATCH_ROWS, _BATCH_NEIGHBOURS // max(1, k)))
        for start in range(0, len(vectors), rows):
            yield [], vectors[start : start + rows]


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise errors.NotFound(f"cannot read image {os.fspath(image)}: {error.strerror}") from error


def _digest(fingerprint: Fingerprint | str) -> str:
    return fingerprint if isinstance(fingerprint, str) else fingerprint.digest


def _in_range(name: str, value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise errors.InvalidInput(f"{name} is {value}: it must be a small number, not negative")
    return value
