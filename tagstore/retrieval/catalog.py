"""All stores under one root, opened when they are first needed. The server and `file://` sources share this
face."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.decode_memory import SHARED, MemoryBudget
from tagstore.encoding.encoder import Encoder, load_encoder_of
from tagstore.errors import (
    BadImage,
    Damaged,
    InvalidInput,
    NotFound,
    TagstoreError,
)
from tagstore.indexing.gpu import devices
from tagstore.indexing.protocol import PLAIN
from tagstore.retrieval.engine import Engine, Query, check_request
from tagstore.storage.store import Store, store_names
from tagstore.types import Exclude, Fingerprint, Identity, Retrieval, Search, StoreInfo, Vectors

if TYPE_CHECKING:
    from os import PathLike

log = logging.getLogger(__name__)

Encode = Callable[[Encoder, "NDArray[np.uint8] | Sequence[str]"], Vectors]
"""What embeds prepared images `[N, ...]`, or texts."""
DECODE_BYTES = 4 << 20
"""Bytes of a request's images, at the size of the encoder's input, that are held before they are embedded: 27
images of 224 x 224 pixels."""
MAX_TEXT = 4096
"""Characters of a query by text; an encoder reads far fewer."""
MAX_OPEN = 256
"""Versions held open. Beyond that the least recently used one is closed."""


class Catalog:
    """The stores under a directory. Safe for threads. A new version is served from the first request after
    its commit."""

    def __init__(
        self, root: str | PathLike[str], *, device: str = "auto", decode_memory: MemoryBudget = SHARED
    ) -> None:
        self.root, self.decode_memory = Path(root), decode_memory
        self.device = device
        self._index_device = device if devices() else "cpu"
        if device.startswith("cuda") and not devices():
            log.warning(
                "indexes are searched on the CPU: this FAISS has no GPU support (install the extra `gpu`)"
            )
        self._stores: dict[str, Store] = {}
        self._engines: dict[tuple[str, int], Engine] = {}
        self._encoders: dict[str, Encoder] = {}
        self._lock, self._loading = Lock(), Lock()
        self._decoders = ThreadPoolExecutor(thread_name_prefix="decode")
        if not self.root.is_dir():
            raise NotFound(
                f"{self.root.resolve()} is no directory: "
                f"`tagstore ingest SRC --root {self.root} --store NAME` makes one"
            )

    def engine(self, store: str, version: int = 0) -> Engine:
        """The engine of a version, 0 for the current one. Raises `NotFound`, `InvalidInput` for a name that
        can't be one."""
        with self._lock:
            try:
                return self._engine(store, version)
            except (Damaged, NotFound):
                opened = self._stores.get(store)
                if opened is None or opened.is_current():
                    raise
                return self._engine(store, version)  # a compaction replaced it between two of our steps

    def _engine(self, store: str, version: int) -> Engine:
        opened = self._stores.get(store)
        if opened is not None and not opened.is_current():
            self._let_go(store)
            opened = None
        if opened is None:
            opened = self._stores[store] = Store(self.root, store)
        else:
            opened.check_length()
        number = version or opened.state()["current"]
        engine = self._engines.pop((store, number), None)
        if engine is not None:
            self._engines[store, number] = engine  # the last one used stands last
        else:
            engine = self._engines[store, number] = Engine(
                opened.snapshot(number or None), device=self._index_device
            )
            log.info(
                "opened %s@%d: %d entries, index %s",
                store,
                number,
                engine.version.entries,
                engine.index.describe().get("kind"),
            )
            if not version:
                for old in [key for key in self._engines if key[0] == store and key[1] < number]:
                    del self._engines[old]  # requests in flight hold their own reference
            while len(self._engines) > MAX_OPEN:
                del self._engines[next(iter(self._engines))]
        return engine

    def _let_go(self, store: str) -> None:
        """Of a store that was compacted, dropped or renamed; requests in flight keep what they hold until
        they end."""
        self._engines = {key: engine for key, engine in self._engines.items() if key[0] != store}
        self._stores.pop(store).release()

    def encoder(self, fingerprint: Fingerprint) -> Encoder:
        """The encoder of a fingerprint. Raises `FingerprintMismatch` if what its name loads today is another
        one."""
        # a lock of its own: loading takes seconds, and nobody who asks by vector should wait for it
        with self._loading:
            encoder = self._encoders.get(fingerprint.digest)
            if encoder is None:
                encoder = self._encoders[fingerprint.digest] = load_encoder_of(
                    fingerprint, device=self.device
                )
            return encoder

    def warm(self, opened: Callable[[], None] = lambda: None) -> list[StoreInfo]:
        """Open every store and load its encoder, so that the first request finds them there; returns what was
        opened.

        Args: opened: called between the two: queries by vector can be answered from then on, and loading
            encoders takes seconds.
        """
        infos = self.stores()
        opened()
        for info in infos:
            self._warm_encoder(info)
        return infos

    def _warm_encoder(self, info: StoreInfo) -> None:
        try:
            self.encoder(info.fingerprint)
        except TagstoreError as error:
            log.warning(
                "store '%s' answers vectors only, its encoder cannot be loaded: %s", info.store, error
            )

    def stores(self) -> list[StoreInfo]:
        """The current version of every store; one that can't be opened is logged and left out."""
        names = store_names(self.root)
        with self._lock:
            for gone in [name for name in self._stores if name not in names]:
                self._let_go(gone)
        infos = []
        for name in names:
            try:
                infos.append(self.engine(name).info())
            except TagstoreError as error:
                log.warning("store '%s' is left out: %s", name, error)
        return infos

    def retrieve(
        self,
        engine: Engine,
        *,
        images: Sequence[bytes] = (),
        vectors: NDArray[np.floating] | None = None,
        texts: Sequence[str] = (),
        fingerprint: str = "",
        search: Search = PLAIN,
        identities: Sequence[Identity] = (),
    ) -> list[Retrieval]:
        """Return the tags of encoded images, then of vectors `[N, D]`, then of texts. Takes and raises what
        `query` does."""
        return self.query(engine, images, vectors, texts, fingerprint, search, identities).retrieve()

    def query(
        self,
        engine: Engine,
        images: Sequence[bytes],
        vectors: NDArray[np.floating] | None,
        texts: Sequence[str],
        fingerprint: str,
        search: Search,
        identities: Sequence[Identity],
        encode: Encode | None = None,
    ) -> Query:
        """Check a request and embed its images and texts, so that it is ready to be searched.

        Args: engine: of the version that answers. vectors: `[N, D]`. texts: embedded with the text tower of
            the store's encoder: finds entries whose pictures show what a text says. fingerprint: digest of
            the encoder that made `vectors`; required with them. identities: which image each query is, for
            `search.exclude`: none, or one for each, images first, then vectors,
                then texts. Hashes of images that are needed and not given are computed here.
            encode: embeds; by default in this thread.

        Raises:
            FingerprintMismatch: `fingerprint` is not the store's.
            BadImage, BadVector, InvalidInput: a query that means nothing; the message says which.
        """
        if vectors is None:
            vectors = np.zeros((0, engine.fingerprint.dimension), np.float32)
        if not images and not texts:
            return engine.query(vectors, search, identities, fingerprint)
        queries = len(images) + len(vectors) + len(texts)
        check_request(queries, search, identities)
        _check_texts(texts)
        engine.check_vectors(vectors, fingerprint)
        parts: list[NDArray[np.floating]] = [vectors] if len(vectors) else []
        encoder, encode = self.encoder(engine.fingerprint), encode or encode_singly
        if images:
            identities = list(identities) or [Identity()] * queries
            parts.insert(0, self._embed_images(encoder, images, search.exclude, identities, encode))
        if texts:
            parts.append(encode(encoder, texts))
        return engine.ready(np.concatenate(parts), search, identities)

    def _embed_images(
        self,
        encoder: Encoder,
        images: Sequence[bytes],
        exclude: Exclude,
        identities: list[Identity],
        encode: Encode,
    ) -> Vectors:
        """Decode and embed images; write the hashes that `exclude` needs into their identities."""
        from tagstore.encoding.images import decoding, perceptual_hash

        def prepared(position: int) -> NDArray[np.uint8]:
            identity = identities[position]
            if exclude.sha256 and not identity.sha256:
                identity = replace(identity, sha256=sha256(images[position]).digest())
            try:
                with decoding(images[position], memory=self.decode_memory) as image:
                    if exclude.hash_distance >= 0 and identity.perceptual_hash is None:
                        identity = replace(identity, perceptual_hash=perceptual_hash(image))
                    identities[position] = identity
                    return encoder.prepare(image)
            except BadImage as error:
                raise BadImage(f"image {position} of the request: {error}") from error

        # in pieces, so that memory is bounded whatever the request
        height, width = encoder.image_size
        step = max(1, DECODE_BYTES // (3 * height * width))
        pieces = [range(len(images))[start : start + step] for start in range(0, len(images), step)]
        # for one image a thread costs more than it saves
        apply = map if len(images) == 1 else self._decoders.map
        return np.concatenate([encode(encoder, np.stack(list(apply(prepared, piece)))) for piece in pieces])


def encode_singly(encoder: Encoder, queries: NDArray[np.uint8] | Sequence[str]) -> Vectors:
    """Embed prepared images `[N, ...]`, or texts: on a CPU one at a time.

    The last bits of a vector depend on how many go through a CPU's kernels at once: one at a time they are
    the same in whatever company.
    """
    encode: Callable[[Any], Vectors] = encoder.encode_images
    if not isinstance(queries, np.ndarray):
        encode = encoder.encode_texts
    if encoder.device != "cpu":
        return encode(queries)
    return np.concatenate([encode(queries[i : i + 1]) for i in range(len(queries))])


def _check_texts(texts: Sequence[str]) -> None:
    """Raise `InvalidInput` for a text that means nothing, or is too long."""
    for position, text in enumerate(texts):
        if not text.strip():
            raise InvalidInput(f"text {position} of the request is empty: say what the pictures should show")
        if len(text) > MAX_TEXT:
            raise InvalidInput(
                f"text {position} of the request has {len(text)} characters: "
                f"at most {MAX_TEXT}, and an encoder reads far fewer"
            )
