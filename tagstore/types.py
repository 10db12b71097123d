"""The words of the project as values. Nothing here does anything; nothing here imports more than numpy.

Pair ──mine──▶ Tag      Pair ──embed──▶ unit vector      query ──retrieve──▶ Retrieval(Neighbour, RetrievedTag)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, wraps
from hashlib import sha256
from json import dumps
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["object", "attribute", "entity", "relation", "custom"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Order = Literal["votes", "similarity", "relevance"]
ORDERS: tuple[Order, ...] = get_args(Order)

Vectors = NDArray[np.float32]
"""`[N, D]` float32, every row of unit length."""

T = TypeVar("T")
_FORMER_NAMES: dict[type, dict[str, str]] = {}
"""For each type, the former names of its fields with the present ones."""


def current_names(kind: type, values: Mapping[str, Any], *, stacklevel: int = 3) -> dict[str, Any]:
    """Replace former names of a type's fields by the present ones, with a `DeprecationWarning` for each."""
    former = _FORMER_NAMES.get(kind, {})
    renamed = {former[name]: value for name, value in values.items() if name in former}
    for name in former.keys() & values.keys():
        _warn(kind, name, stacklevel + 1)
    return {**{name: value for name, value in values.items() if name not in former}, **renamed}


def _renamed(**former: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass accept former names of its fields, as keywords and as attributes."""

    def decorate(kind: Any) -> Any:
        _FORMER_NAMES[kind] = former
        create = kind.__init__

        @wraps(create)
        def init(self: Any, *args: Any, **values: Any) -> None:
            create(
                self, *args, **(values if former.keys().isdisjoint(values) else current_names(kind, values))
            )

        kind.__init__ = init
        for name, present in former.items():
            setattr(kind, name, _alias(kind, name, present))
        return kind

    return decorate


def _alias(kind: type, name: str, present: str) -> property:
    def get(self: Any) -> Any:
        _warn(kind, name, 3)
        return getattr(self, present)

    return property(get)


def _warn(kind: type, name: str, stacklevel: int) -> None:
    message = f"{kind.__name__}.{name} is now called {_FORMER_NAMES[kind][name]}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with its captions, as a reader yields it."""

    key: str
    """Unique in its source."""
    image: bytes
    """The encoded image (JPEG, PNG, WebP ...), not yet decoded and not yet trusted."""
    captions: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the source; JSON values."""
    origin: str = ""
    """Where it was read (file and line or member), for messages."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A pair that was read and could not be used: it is quarantined with its reason, the rest goes on."""

    key: str
    reason: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Tag:
    """A short phrase mined from a caption."""

    text: str
    """As shown: "blue sky", "Montepulciano"."""
    kind: Kind
    span: tuple[int, int]
    """Character offsets `[start, end)` in the caption that the tag was read from; `(0, 0)` when it has no place in one."""
    caption: int = 0
    """Index into `Pair.captions`; -1 for a tag that comes from metadata."""
    score: float = 1.0
    """Confidence in [0, 1]."""
    canonical: str = ""
    """What makes two tags of a kind the same tag (folded case and number); the text itself if left empty."""
    label: str = ""
    """What a miner knows beyond the kind: of an entity `PERSON`, `GPE`, `ORG`, `BRAND`; of a custom tag its column."""

    def __post_init__(self) -> None:
        if not self.canonical:
            object.__setattr__(self, "canonical", self.text)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides what a vector means. Two encoders agree on vectors if and only if their fingerprints are equal."""

    model: str
    """What the encoder was asked for: `mini`, `ViT-L-14/openai`, `local-dir:PATH`."""
    weights: str
    """sha256 (hex) over the names, dtypes, shapes and bytes of all weights."""
    preprocess: Mapping[str, Any]
    """Size, mean, std, interpolation, resize mode."""
    quick_gelu: bool
    normalised: bool
    dimension: int

    @cached_property
    def digest(self) -> str:
        """16 hex digits that stand for the whole; `model` is left out: it is a name, the weights say which model it is."""
        value = {k: v for k, v in asdict(self).items() if k != "model"}
        return sha256(dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.model} ({self.dimension}-d, {self.digest})"


@dataclass(frozen=True, slots=True)
class EntryTag:
    """A tag as one entry carries it."""

    tag_id: int
    score: float
    """Of the surest mention, in [0, 1]; kept to 1/255."""
    mentions: tuple[tuple[int, int, int], ...] = ()
    """Provenance: (caption, start, end) of each place it was read from; caption -1 is the metadata."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a store keeps of a pair, beside its vector."""

    entry_id: int
    key: str
    sha256: bytes
    """Of the encoded image, 32 bytes."""
    perceptual_hash: int
    """64-bit pHash of the decoded image."""
    captions: tuple[str, ...]
    tags: tuple[EntryTag, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    """Where the image was read."""


@_renamed(perceptual_hash="hash_distance")
@dataclass(frozen=True, slots=True)
class Exclude:
    """Entries that must not be among a query's neighbours. A training query that finds its own image teaches a model to copy."""

    key: bool = False
    """The entry that has the query's own key (`Identity.key`)."""
    sha256: bool = False
    """Entries of the very same encoded image."""
    hash_distance: int = -1
    """Entries whose perceptual hash differs from the query's in at most this many of 64 bits; -1 to compare none."""
    keys: tuple[str, ...] = ()
    """Further keys that no query of the request may find."""
    entry_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """Which image a query is, for `Exclude`. Hashes of a query by image are computed where it is answered; one by vector brings them."""

    key: str = ""
    sha256: bytes = b""
    """32 bytes, or empty if not known."""
    perceptual_hash: int | None = None
    """64 bits unsigned, or None if not known."""


@_renamed(neighbours="with_neighbours", texts="with_texts")
@dataclass(frozen=True, slots=True)
class Search:
    """How queries are answered: the options of a request, the same for each of its queries."""

    k: int = 5
    """Neighbours a query, 1 to 1000; fewer come back if the store has fewer that qualify."""
    max_tags: int = 0
    """At most so many tags a query, best first; 0 for all."""
    min_similarity: float = -1.0
    """Neighbours less similar than this are left out."""
    order: Order = "votes"
    """What ranks merged tags first; ties are broken by the others in the order votes, similarity, relevance, then by tag id."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Only entries whose metadata has these values, compared as text: {"brand": "Oatly"}."""
    exclude: Exclude = Exclude()
    exact: bool = False
    """Search all vectors, whatever the index."""
    nprobe: int = 0
    """Of an inverted file: lists visited; 0 for what the index was tuned to. Ignored by other kinds."""
    ef_search: int = 0
    """Of HNSW: length of the candidate list; 0 for what the index was tuned to. Ignored by other kinds."""
    with_neighbours: bool = True
    """Return neighbours, and of each tag those that carry it."""
    with_texts: bool = True
    """Return the tags' texts and kinds; a caller that knows the vocabulary needs only the ids."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A retrieved entry."""

    key: str
    entry_id: int
    similarity: float
    """Cosine of the entry's vector and the query's, in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class RetrievedTag:
    """A tag of the neighbours, with its signals."""

    tag_id: int
    tag: str
    kind: Kind
    similarity: float
    """Of the best neighbour that carries it."""
    votes: int
    """How many neighbours carry it."""
    relevance: float
    """Cosine of the tag's text embedding and the query's image vector."""
    neighbours: tuple[int, ...]
    """The `entry_id`s of the neighbours that carry it, best first; empty where neighbours were not asked for."""


@dataclass(frozen=True, slots=True)
class Retrieval(Sequence[RetrievedTag]):
    """The answer to one query: a sequence of its retrieved tags, with the neighbours and the version they came from."""

    store: str
    version: int
    fingerprint: str
    """`Fingerprint.digest` of the version."""
    neighbours: tuple[Neighbour, ...]
    tags: tuple[RetrievedTag, ...]
    excluded: int = 0
    """How many nearer entries `Search.exclude` kept out."""
    degraded: bool = False
    """No store answered: a client that may go on without tags made this up."""

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: Any) -> Any:
        return self.tags[index]

    def __iter__(self) -> Iterator[RetrievedTag]:
        return iter(self.tags)


@dataclass(frozen=True, slots=True)
class TagInfo:
    """A tag of a store's vocabulary."""

    tag_id: int
    text: str
    kind: Kind
    count: int
    """How many entries of the version carry it."""
    embedding: NDArray[np.float32] | None = None
    """Its text embedding, `[D]` float32 of unit length, where asked for."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What is known of one version of a store."""

    store: str
    version: int
    entries: int
    tags: int
    """Tags over all entries, counted once an entry."""
    unique_tags: int
    fingerprint: Fingerprint
    index: Mapping[str, Any]
    """Kind and parameters of the index that answers."""
    created: str
    """UTC time of the commit, ISO 8601."""
