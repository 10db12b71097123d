"""All stores under one root, opened as they are asked for: the one face that the server and `file://` sources share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.encoder import Encoder, load_encoder_of
from tagstore.errors import (
    BadImage,
    BadVector,
    Damaged,
    FingerprintMismatch,
    InvalidInput,
    NotFound,
    TagstoreError,
)
from tagstore.indexing.gpu import devices
from tagstore.indexing.protocol import PLAIN
from tagstore.retrieval.engine import Engine, check_request
from tagstore.storage.lmdb_files import release
from tagstore.storage.store import Store, store_names
from tagstore.types import Exclude, Fingerprint, Identity, Retrieval, Search, StoreInfo, Vectors

if TYPE_CHECKING:
    from os import PathLike

log = logging.getLogger(__name__)

EMBED_AT_ONCE = 128
MAX_TEXT = 4096
"""Characters of a query by text; an encoder reads far fewer."""
OPEN = 256
"""Versions held open; beyond that, the one that was asked longest ago is closed, and opened again when it is asked."""


class Catalog:
    """The stores under a directory. Safe for threads. A new version is served from the first request after its commit."""

    def __init__(self, root: str | PathLike[str], *, device: str = "auto") -> None:
        self.root = Path(root)
        self.device = device
        self._index_device = device if devices() else "cpu"
        if device.startswith("cuda") and not devices():
            log.warning(
                "indexes are searched on the CPU: the installed FAISS knows no GPU (the extra `gpu` has one that does)"
            )
        self._stores: dict[str, Store] = {}
        self._engines: dict[tuple[str, int], Engine] = {}
        self._encoders: dict[str, Encoder] = {}
        self._lock, self._loading = Lock(), Lock()
        self._decoders = ThreadPoolExecutor(thread_name_prefix="decode")
        if not self.root.is_dir():
            raise NotFound(
                f"{self.root.resolve()} is no directory: `tagstore ingest SRC --root {self.root} --store NAME` makes one"
            )

    def engine(self, store: str, version: int = 0) -> Engine:
        """The engine of a version, 0 for the current one. Raises `NotFound`, `InvalidInput` for a name that can't be one."""
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
            while len(self._engines) > OPEN:
                del self._engines[next(iter(self._engines))]
        return engine

    def _let_go(self, store: str) -> None:
        """Of a store that was compacted, dropped or renamed; requests in flight keep what they hold until they end."""
        self._engines = {key: engine for key, engine in self._engines.items() if key[0] != store}
        release(self._stores.pop(store).env)

    def encoder(self, fingerprint: Fingerprint) -> Encoder:
        """The encoder of a fingerprint. Raises `FingerprintMismatch` if what its name loads today is another one."""
        # a lock of its own: loading takes seconds, and nobody who asks by vector should wait for it
        with self._loading:
            encoder = self._encoders.get(fingerprint.digest)
            if encoder is None:
                encoder = self._encoders[fingerprint.digest] = load_encoder_of(
                    fingerprint, device=self.device
                )
            return encoder

    def warm(self, opened: Callable[[], None] = lambda: None) -> list[StoreInfo]:
        """Open every store and load its encoder, so that the first request finds them there; returns what was opened.

        Args:
            opened: called between the two: queries by vector can be answered from then on, and loading encoders takes seconds.
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
        """Retrieved tags of encoded images, then of vectors `[N, D]`, then of texts, from the version that `engine` has open.

        Args:
            texts: embedded with the text tower of the store's encoder: entries whose pictures show what a text says.
            fingerprint: digest of the encoder that made `vectors`; required with them.
            identities: which image each query is, for `search.exclude`: none, or one for each, in this order. The hashes of images are
                computed here where they are needed and not given.

        Raises:
            FingerprintMismatch: `fingerprint` is not the store's.
            BadImage, BadVector, InvalidInput: a query that means nothing; the message says which.
        """
        matrix, identities = self.queries(engine, images, vectors, texts, fingerprint, search, identities)
        return engine.retrieve(matrix, search, identities) if len(matrix) else []

    def queries(
        self,
        engine: Engine,
        images: Sequence[bytes],
        vectors: NDArray[np.floating] | None,
        texts: Sequence[str],
        fingerprint: str,
        search: Search,
        identities: Sequence[Identity],
    ) -> tuple[NDArray[np.floating], Sequence[Identity]]:
        """What `retrieve` is asked, as vectors `[N, D]`, and which image each is; nothing is searched yet. Raises as `retrieve`."""
        store = engine.snapshot.store.name
        others = (0 if vectors is None else len(vectors)) + len(texts)
        check_request(len(images) + others, search, identities)
        _check_texts(texts)
        if fingerprint and fingerprint != engine.digest:
            raise FingerprintMismatch.between(store, engine.fingerprint, fingerprint)
        parts: list[NDArray[np.floating]] = []
        if vectors is not None and len(vectors):
            if not fingerprint:
                raise InvalidInput("a query by vector must say which encoder made it: pass its fingerprint")
            if vectors.ndim != 2 or vectors.shape[1] != engine.fingerprint.dimension:
                raise BadVector(
                    f"queries have shape {list(vectors.shape)}, store '{store}' takes [N, {engine.fingerprint.dimension}]"
                )
            parts.append(vectors)
        if images:
            embedded, identities = self._embed(engine, images, search.exclude, identities, others)
            parts.insert(0, embedded)
        if texts:
            parts.append(self._encode_texts(self.encoder(engine.fingerprint), texts))
        matrix = (
            parts[0]
            if len(parts) == 1
            else np.concatenate(parts)
            if parts
            else np.zeros((0, engine.fingerprint.dimension), np.float32)
        )
        return matrix, identities

    def _embed(
        self,
        engine: Engine,
        images: Sequence[bytes],
        exclude: Exclude,
        identities: Sequence[Identity],
        others: int,
    ) -> tuple[NDArray[np.floating], Sequence[Identity]]:
        """Vectors of images, and the identities of all queries with the images' hashes, so far as they are needed."""
        from tagstore.encoding.images import decode, perceptual_hash

        encoder = self.encoder(engine.fingerprint)
        known = list(identities) or [Identity()] * (len(images) + others)

        def prepared(position: int) -> NDArray[np.uint8]:
            try:
                image = decode(images[position])
            except BadImage as error:
                raise BadImage(f"image {position} of the request: {error}") from error
            own = known[position]
            if exclude.sha256 and not own.sha256:
                own = replace(own, sha256=sha256(images[position]).digest())
            if exclude.hash_distance >= 0 and own.perceptual_hash is None:
                own = replace(own, perceptual_hash=perceptual_hash(image))
            known[position] = own
            return encoder.prepare(image)

        # in pieces, so that a request of many small files is not a memory of many large pictures
        pieces = [
            range(len(images))[start : start + EMBED_AT_ONCE]
            for start in range(0, len(images), EMBED_AT_ONCE)
        ]
        over = (
            map if len(images) == 1 else self._decoders.map
        )  # a thread of its own would cost one image more than it saves
        vectors = np.concatenate(
            [self._encode(encoder, np.stack(list(over(prepared, piece)))) for piece in pieces]
        )
        return vectors, known

    def _encode(self, encoder: Encoder, pixels: NDArray[np.uint8]) -> Vectors:
        """A server overrides this: there, images of several requests go together."""
        if encoder.device != "cpu":
            return encoder.encode_images(pixels)
        # a vector's last bits depend on how many go through a CPU's kernels at once: one at a time they are the same in whatever company
        return np.concatenate([encoder.encode_images(one[None]) for one in pixels])

    def _encode_texts(self, encoder: Encoder, texts: Sequence[str]) -> Vectors:
        """As `_encode`, and overridden with it."""
        if encoder.device != "cpu":
            return encoder.encode_texts(texts)
        return np.concatenate([encoder.encode_texts([text]) for text in texts])


def _check_texts(texts: Sequence[str]) -> None:
    """Raises `InvalidInput` for a text that means nothing, or is too long."""
    for position, text in enumerate(texts):
        if not text.strip():
            raise InvalidInput(f"text {position} of the request is empty: say what the pictures should show")
        if len(text) > MAX_TEXT:
            raise InvalidInput(
                f"text {position} of the request has {len(text)} characters: at most {MAX_TEXT}, and an encoder reads far fewer"
            )
