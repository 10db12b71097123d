"""The value types that all rooms share. They hold data only, and import nothing beyond numpy.

Pair ──mine──▶ Tag      Pair ──embed──▶ unit vector      query ──retrieve──▶ Retrieval
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
    """Replace former names of a type's fields with the present ones, with a `DeprecationWarning` each."""
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
            if not former.keys().isdisjoint(values):
                values = current_names(kind, values)
            create(self, *args, **values)

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
    """Where it was read, for messages: file with line or member."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A pair that cannot be used. It is quarantined with its reason, and the ingest continues."""

    key: str
    reason: str
    origin: str = ""


MAX_MENTIONS = 8
"""Mentions of a tag that an answer holds, at most."""
PICTURE_SPAN = (1, 1)
"""The span of a tag that was read from the picture, whose caption is -1."""


@dataclass(frozen=True, slots=True)
class Tag:
    """A short phrase mined from a caption."""

    text: str
    """As shown: "blue sky", "Montepulciano"."""
    kind: Kind
    span: tuple[int, int]
    """Character offsets `[start, end)` in its caption.

    `(0, 0)` if it has no place in one; `PICTURE_SPAN`, with caption -1, if it was read from the picture.
    """
    caption: int = 0
    """Index into `Pair.captions`; -1 for a tag from the metadata or the picture."""
    score: float = 1.0
    """Confidence in [0, 1]."""
    canonical: str = ""
    """Text with case and number folded, which identifies a tag within its kind; `text` if empty."""
    label: str = ""
    """Detail of the kind: `PERSON`, `GPE`, `ORG` or `BRAND` for an entity, the column for a custom tag."""
    language: str = "en"
    """ISO 639-1 code of the caption's language; "en" for metadata too."""

    def __post_init__(self) -> None:
        if not self.canonical:
            object.__setattr__(self, "canonical", self.text)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that determines an encoder's vectors: two encoders agree if and only if the digests do."""

    model: str
    """Name that the encoder was loaded by: `mini`, `ViT-L-14/openai`, `local-dir:PATH`."""
    weights: str
    """sha256 (hex) over the names, dtypes, shapes and bytes of all weights."""
    preprocess: Mapping[str, Any]
    """Size, mean, std, interpolation, resize mode."""
    quick_gelu: bool
    normalised: bool
    dimension: int

    @cached_property
    def digest(self) -> str:
        """Hash of all fields but `model`, which is only a name: 16 hex digits."""
        value = {k: v for k, v in asdict(self).items() if k != "model"}
        return sha256(dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.model} ({self.dimension}-d, {self.digest})"


@dataclass(frozen=True, slots=True)
class EntryTag:
    """A tag of one entry."""

    tag_id: int
    score: float
    """Confidence of the surest mention, in [0, 1], stored in steps of 1/255."""
    mentions: tuple[tuple[int, int, int], ...] = ()
    """Each place it was mined from: (caption, start, end).

    Caption -1 is the metadata, or the picture if start and end are `PICTURE_SPAN`.
    """


@dataclass(frozen=True, slots=True)
class Entry:
    """A pair as a store keeps it, without its vector."""

    entry_id: int
    key: str
    sha256: bytes
    """Digest of the encoded image, 32 bytes."""
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
    """Entries that must not be among a query's neighbours.

    A training query that finds its own image teaches a model to copy.
    """

    key: bool = False
    """Exclude the entry that has the query's key (`Identity.key`)."""
    sha256: bool = False
    """Exclude entries of the same encoded image."""
    hash_distance: int = -1
    """Bits, of 64, in which an excluded entry's perceptual hash may differ from the query's; -1 for none."""
    keys: tuple[str, ...] = ()
    """Keys of further entries that no query of the request may find; `entry_ids` are theirs by id."""
    entry_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """The image behind a query, for `Exclude`.

    A query by vector must bring the hashes that are compared; those of a query by image are computed for it.
    """

    key: str = ""
    sha256: bytes = b""
    """Digest of the encoded image, 32 bytes; empty if unknown."""
    perceptual_hash: int | None = None
    """64-bit pHash of the decoded image; None if unknown."""


@_renamed(neighbours="with_neighbours", texts="with_texts")
@dataclass(frozen=True, slots=True)
class Search:
    """Options of a request, the same for each of its queries."""

    k: int = 5
    """Neighbours per query, 1 to 1000; fewer come back if fewer entries qualify."""
    max_tags: int = 0
    """Largest number of tags per query, best first; 0 for all."""
    min_similarity: float = -1.0
    """Lowest cosine of a neighbour."""
    order: Order = "votes"
    """First signal that ranks tags. Votes, similarity, relevance and tag id, in this order, break ties."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Metadata values that a neighbour must have, as text or as JSON writes them: {"brand": "Oatly", "width":
    "640", "sale": "true"}; see `metadata_filter`."""
    exclude: Exclude = Exclude()
    exact: bool = False
    """Compare all vectors, whatever the index."""
    nprobe: int = 0
    """Lists that an inverted file visits; 0 for the tuned number. Other kinds of index ignore it."""
    ef_search: int = 0
    """Length of HNSW's candidate list; 0 for the tuned length. Other kinds of index ignore it."""
    with_neighbours: bool = True
    """Return the neighbours, and for each tag those that carry it."""
    with_texts: bool = True
    """Return the tags' texts and kinds; a caller that has the vocabulary needs only ids."""
    with_provenance: bool = False
    """Return where each tag came from: the neighbours' captions, and `RetrievedTag.mentions` in them."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A retrieved entry."""

    key: str
    entry_id: int
    similarity: float
    """Cosine of the entry's vector and the query's, in [-1, 1]."""
    captions: tuple[str, ...] = ()
    """Empty without `Search.with_provenance`."""


@dataclass(frozen=True, slots=True)
class Mention:
    """Where a tag of a neighbour was read."""

    entry_id: int
    """The neighbour."""
    caption: int
    """Index into `Neighbour.captions`; -1 for metadata and for the picture."""
    start: int
    end: int
    """Characters `[start, end)` of the caption; of the picture both are those of `PICTURE_SPAN`."""
    score: float
    """The miner's confidence in the tag of this neighbour, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """One place that a tag came from, in words."""

    key: str
    """Of the neighbour."""
    source: Literal["caption", "metadata", "picture"]
    caption: str
    """The caption; empty for metadata and for the picture."""
    words: str
    """The part of the caption that the tag was read from."""
    miner: str
    """Name of the miner: of a composition the part that reads such a source, or all of them."""
    score: float


@dataclass(frozen=True, slots=True)
class RetrievedTag:
    """A tag of a query's neighbours, with its signals."""

    tag_id: int
    tag: str
    kind: Kind
    similarity: float
    """Cosine of the best neighbour that carries it."""
    votes: int
    """Number of neighbours that carry it."""
    relevance: float
    """Cosine of the tag's text embedding and the query's image vector."""
    neighbours: tuple[int, ...]
    """Entry ids of the neighbours that carry it, best first; empty without `Search.with_neighbours`."""
    mentions: tuple[Mention, ...] = ()
    """Up to `MAX_MENTIONS` places that it was read, those of the best neighbour first; empty without
    `Search.with_provenance`."""


@dataclass(frozen=True, slots=True)
class Retrieval(Sequence[RetrievedTag]):
    """The answer to one query: a sequence of retrieved tags, with their neighbours and version."""

    store: str
    version: int
    fingerprint: str
    """`Fingerprint.digest` of the version."""
    neighbours: tuple[Neighbour, ...]
    tags: tuple[RetrievedTag, ...]
    excluded: int = 0
    """Number of nearer entries that `Search.exclude` kept out."""
    degraded: bool = False
    """Whether no store answered, and a client that may continue without tags made this substitute."""
    miner: str = ""
    """Name of the miner that made the version's tags; empty without `Search.with_provenance`."""

    def why(self, tag: RetrievedTag | str) -> tuple[Provenance, ...]:
        """Trace a tag of this answer to the words it came from; needs `Search.with_provenance`.

        A text takes the first tag that is shown so. Raises `KeyError` if there is none.
        """
        if isinstance(tag, str):
            shown = next((known for known in self.tags if known.tag == tag), None)
            if shown is None:
                raise KeyError(f"no tag '{tag}' in this answer")
            tag = shown
        entries = {neighbour.entry_id: neighbour for neighbour in self.neighbours}
        return tuple(_in_words(mention, entries[mention.entry_id], self.miner) for mention in tag.mentions)

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: Any) -> Any:
        return self.tags[index]

    def __iter__(self) -> Iterator[RetrievedTag]:
        return iter(self.tags)


def _in_words(mention: Mention, neighbour: Neighbour, miner: str) -> Provenance:
    """A mention with the words that it points to."""
    parts = miner.split("+")
    if mention.caption >= 0:
        caption = neighbour.captions[mention.caption]
        words = caption[mention.start : mention.end]
        fitting = [part for part in parts if part not in ("metadata", "image", "none")]
        source: Literal["caption", "metadata", "picture"] = "caption"
    else:
        caption = words = ""
        source = "picture" if (mention.start, mention.end) == PICTURE_SPAN else "metadata"
        own = {"picture": ("image",), "metadata": ("metadata", "keywords")}[source]
        fitting = [part for part in parts if part in own]
    return Provenance(neighbour.key, source, caption, words, "+".join(fitting or parts), mention.score)


@dataclass(frozen=True, slots=True)
class TagInfo:
    """A tag of a store's vocabulary."""

    tag_id: int
    text: str
    kind: Kind
    count: int
    """Number of entries of the version that carry it."""
    embedding: NDArray[np.float32] | None = None
    """Text embedding, `[D]` float32 of unit length; None unless the caller asked for it."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """Description of one version of a store."""

    store: str
    version: int
    entries: int
    tags: int
    """Sum of the entries' numbers of tags."""
    unique_tags: int
    fingerprint: Fingerprint
    index: Mapping[str, Any]
    """Kind and parameters of the index that answers."""
    created: str
    """UTC time of the commit, ISO 8601."""
    tag_embeddings: Mapping[str, Any] = field(default_factory=dict)
    """How the tags' embeddings were learnt from pictures; empty where the text tower made them."""
