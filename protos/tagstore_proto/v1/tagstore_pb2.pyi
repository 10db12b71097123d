from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_OBJECT: _ClassVar[Kind]
    KIND_ATTRIBUTE: _ClassVar[Kind]
    KIND_ENTITY: _ClassVar[Kind]
    KIND_RELATION: _ClassVar[Kind]
    KIND_CUSTOM: _ClassVar[Kind]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]

class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORDER_UNSPECIFIED: _ClassVar[Order]
    ORDER_VOTES: _ClassVar[Order]
    ORDER_SIMILARITY: _ClassVar[Order]
    ORDER_RELEVANCE: _ClassVar[Order]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_ADDED: _ClassVar[Outcome]
    OUTCOME_UNCHANGED: _ClassVar[Outcome]
    OUTCOME_QUARANTINED: _ClassVar[Outcome]
KIND_UNSPECIFIED: Kind
KIND_OBJECT: Kind
KIND_ATTRIBUTE: Kind
KIND_ENTITY: Kind
KIND_RELATION: Kind
KIND_CUSTOM: Kind
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT16: Dtype
ORDER_UNSPECIFIED: Order
ORDER_VOTES: Order
ORDER_SIMILARITY: Order
ORDER_RELEVANCE: Order
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_ADDED: Outcome
OUTCOME_UNCHANGED: Outcome
OUTCOME_QUARANTINED: Outcome

class Vectors(_message.Message):
    __slots__ = ("data", "dimension", "dtype")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    dimension: int
    dtype: Dtype
    def __init__(self, data: _Optional[bytes] = ..., dimension: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("store", "version", "images", "vectors", "fingerprint", "k", "max_tags", "min_similarity", "order", "where", "exclude", "identities", "exact", "nprobe", "ef_search", "omit_neighbours", "omit_texts", "texts", "provenance")
    class WhereEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    MAX_TAGS_FIELD_NUMBER: _ClassVar[int]
    MIN_SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    NPROBE_FIELD_NUMBER: _ClassVar[int]
    EF_SEARCH_FIELD_NUMBER: _ClassVar[int]
    OMIT_NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    OMIT_TEXTS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    images: _containers.RepeatedScalarFieldContainer[bytes]
    vectors: Vectors
    fingerprint: str
    k: int
    max_tags: int
    min_similarity: float
    order: Order
    where: _containers.ScalarMap[str, str]
    exclude: Exclude
    identities: _containers.RepeatedCompositeFieldContainer[Identity]
    exact: bool
    nprobe: int
    ef_search: int
    omit_neighbours: bool
    omit_texts: bool
    texts: _containers.RepeatedScalarFieldContainer[str]
    provenance: bool
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., images: _Optional[_Iterable[bytes]] = ..., vectors: _Optional[_Union[Vectors, _Mapping]] = ..., fingerprint: _Optional[str] = ..., k: _Optional[int] = ..., max_tags: _Optional[int] = ..., min_similarity: _Optional[float] = ..., order: _Optional[_Union[Order, str]] = ..., where: _Optional[_Mapping[str, str]] = ..., exclude: _Optional[_Union[Exclude, _Mapping]] = ..., identities: _Optional[_Iterable[_Union[Identity, _Mapping]]] = ..., exact: _Optional[bool] = ..., nprobe: _Optional[int] = ..., ef_search: _Optional[int] = ..., omit_neighbours: _Optional[bool] = ..., omit_texts: _Optional[bool] = ..., texts: _Optional[_Iterable[str]] = ..., provenance: _Optional[bool] = ...) -> None: ...

class Exclude(_message.Message):
    __slots__ = ("key", "sha256", "perceptual_hash", "keys", "entry_ids")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    PERCEPTUAL_HASH_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ENTRY_IDS_FIELD_NUMBER: _ClassVar[int]
    key: bool
    sha256: bool
    perceptual_hash: int
    keys: _containers.RepeatedScalarFieldContainer[str]
    entry_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[bool] = ..., sha256: _Optional[bool] = ..., perceptual_hash: _Optional[int] = ..., keys: _Optional[_Iterable[str]] = ..., entry_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("key", "sha256", "perceptual_hash")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    PERCEPTUAL_HASH_FIELD_NUMBER: _ClassVar[int]
    key: str
    sha256: bytes
    perceptual_hash: int
    def __init__(self, key: _Optional[str] = ..., sha256: _Optional[bytes] = ..., perceptual_hash: _Optional[int] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("store", "version", "fingerprint", "retrievals")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RETRIEVALS_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    fingerprint: str
    retrievals: _containers.RepeatedCompositeFieldContainer[Retrieval]
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., retrievals: _Optional[_Iterable[_Union[Retrieval, _Mapping]]] = ...) -> None: ...

class RetrieveStreamResponse(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: RetrieveResponse
    error: Error
    def __init__(self, response: _Optional[_Union[RetrieveResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Retrieval(_message.Message):
    __slots__ = ("neighbours", "tags", "excluded", "miner")
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    MINER_FIELD_NUMBER: _ClassVar[int]
    neighbours: _containers.RepeatedCompositeFieldContainer[Neighbour]
    tags: _containers.RepeatedCompositeFieldContainer[RetrievedTag]
    excluded: int
    miner: str
    def __init__(self, neighbours: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ..., tags: _Optional[_Iterable[_Union[RetrievedTag, _Mapping]]] = ..., excluded: _Optional[int] = ..., miner: _Optional[str] = ...) -> None: ...

class Neighbour(_message.Message):
    __slots__ = ("entry_id", "key", "similarity", "captions")
    ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    CAPTIONS_FIELD_NUMBER: _ClassVar[int]
    entry_id: int
    key: str
    similarity: float
    captions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, entry_id: _Optional[int] = ..., key: _Optional[str] = ..., similarity: _Optional[float] = ..., captions: _Optional[_Iterable[str]] = ...) -> None: ...

class RetrievedTag(_message.Message):
    __slots__ = ("tag_id", "tag", "kind", "similarity", "relevance", "neighbours", "votes", "mentions")
    TAG_ID_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    MENTIONS_FIELD_NUMBER: _ClassVar[int]
    tag_id: int
    tag: str
    kind: Kind
    similarity: float
    relevance: float
    neighbours: _containers.RepeatedScalarFieldContainer[int]
    votes: int
    mentions: _containers.RepeatedCompositeFieldContainer[Mention]
    def __init__(self, tag_id: _Optional[int] = ..., tag: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., similarity: _Optional[float] = ..., relevance: _Optional[float] = ..., neighbours: _Optional[_Iterable[int]] = ..., votes: _Optional[int] = ..., mentions: _Optional[_Iterable[_Union[Mention, _Mapping]]] = ...) -> None: ...

class Mention(_message.Message):
    __slots__ = ("neighbour", "caption", "start", "end", "score")
    NEIGHBOUR_FIELD_NUMBER: _ClassVar[int]
    CAPTION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    neighbour: int
    caption: int
    start: int
    end: int
    score: float
    def __init__(self, neighbour: _Optional[int] = ..., caption: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class GetTagsRequest(_message.Message):
    __slots__ = ("store", "version", "tag_ids", "first_tag_id", "page_size", "embeddings")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TAG_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TAG_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    tag_ids: _containers.RepeatedScalarFieldContainer[int]
    first_tag_id: int
    page_size: int
    embeddings: bool
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., tag_ids: _Optional[_Iterable[int]] = ..., first_tag_id: _Optional[int] = ..., page_size: _Optional[int] = ..., embeddings: _Optional[bool] = ...) -> None: ...

class GetTagsResponse(_message.Message):
    __slots__ = ("store", "version", "fingerprint", "tags", "embeddings", "next_tag_id")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TAG_ID_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    fingerprint: str
    tags: _containers.RepeatedCompositeFieldContainer[TagInfo]
    embeddings: Vectors
    next_tag_id: int
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., tags: _Optional[_Iterable[_Union[TagInfo, _Mapping]]] = ..., embeddings: _Optional[_Union[Vectors, _Mapping]] = ..., next_tag_id: _Optional[int] = ...) -> None: ...

class TagInfo(_message.Message):
    __slots__ = ("tag_id", "text", "kind", "count")
    TAG_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    tag_id: int
    text: str
    kind: Kind
    count: int
    def __init__(self, tag_id: _Optional[int] = ..., text: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., count: _Optional[int] = ...) -> None: ...

class ListStoresRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStoresResponse(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[StoreInfo]
    def __init__(self, stores: _Optional[_Iterable[_Union[StoreInfo, _Mapping]]] = ...) -> None: ...

class GetStoreRequest(_message.Message):
    __slots__ = ("store", "version")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GetStoreResponse(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: StoreInfo
    def __init__(self, store: _Optional[_Union[StoreInfo, _Mapping]] = ...) -> None: ...

class StoreInfo(_message.Message):
    __slots__ = ("store", "version", "entries", "tags", "unique_tags", "fingerprint", "index", "created", "tag_embeddings")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_TAGS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    TAG_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    entries: int
    tags: int
    unique_tags: int
    fingerprint: Fingerprint
    index: str
    created: str
    tag_embeddings: str
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., entries: _Optional[int] = ..., tags: _Optional[int] = ..., unique_tags: _Optional[int] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., index: _Optional[str] = ..., created: _Optional[str] = ..., tag_embeddings: _Optional[str] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("model", "weights", "preprocess", "quick_gelu", "normalised", "dimension")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    QUICK_GELU_FIELD_NUMBER: _ClassVar[int]
    NORMALISED_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights: str
    preprocess: str
    quick_gelu: bool
    normalised: bool
    dimension: int
    def __init__(self, model: _Optional[str] = ..., weights: _Optional[str] = ..., preprocess: _Optional[str] = ..., quick_gelu: _Optional[bool] = ..., normalised: _Optional[bool] = ..., dimension: _Optional[int] = ...) -> None: ...

class IngestRequest(_message.Message):
    __slots__ = ("start", "pair", "rejected")
    START_FIELD_NUMBER: _ClassVar[int]
    PAIR_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    start: IngestStart
    pair: Pair
    rejected: Rejected
    def __init__(self, start: _Optional[_Union[IngestStart, _Mapping]] = ..., pair: _Optional[_Union[Pair, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ...) -> None: ...

class IngestStart(_message.Message):
    __slots__ = ("store", "encoder", "miner", "source")
    STORE_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    MINER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    store: str
    encoder: str
    miner: str
    source: str
    def __init__(self, store: _Optional[str] = ..., encoder: _Optional[str] = ..., miner: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("key", "image", "captions", "metadata", "origin")
    KEY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CAPTIONS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    key: str
    image: bytes
    captions: _containers.RepeatedScalarFieldContainer[str]
    metadata: str
    origin: str
    def __init__(self, key: _Optional[str] = ..., image: _Optional[bytes] = ..., captions: _Optional[_Iterable[str]] = ..., metadata: _Optional[str] = ..., origin: _Optional[str] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("key", "reason", "origin")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    key: str
    reason: str
    origin: str
    def __init__(self, key: _Optional[str] = ..., reason: _Optional[str] = ..., origin: _Optional[str] = ...) -> None: ...

class PairResult(_message.Message):
    __slots__ = ("key", "outcome", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: str
    outcome: Outcome
    reason: str
    def __init__(self, key: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class IngestResponse(_message.Message):
    __slots__ = ("results", "report")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[PairResult]
    report: IngestReport
    def __init__(self, results: _Optional[_Iterable[_Union[PairResult, _Mapping]]] = ..., report: _Optional[_Union[IngestReport, _Mapping]] = ...) -> None: ...

class IngestReport(_message.Message):
    __slots__ = ("store", "version", "pairs", "added", "unchanged", "quarantined", "entries", "tags", "unique_tags")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_TAGS_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    pairs: int
    added: int
    unchanged: int
    quarantined: int
    entries: int
    tags: int
    unique_tags: int
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., pairs: _Optional[int] = ..., added: _Optional[int] = ..., unchanged: _Optional[int] = ..., quarantined: _Optional[int] = ..., entries: _Optional[int] = ..., tags: _Optional[int] = ..., unique_tags: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("store", "keys", "sha256", "near", "where")
    class WhereEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STORE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NEAR_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    store: str
    keys: _containers.RepeatedScalarFieldContainer[str]
    sha256: _containers.RepeatedScalarFieldContainer[str]
    near: _containers.RepeatedCompositeFieldContainer[Near]
    where: _containers.ScalarMap[str, str]
    def __init__(self, store: _Optional[str] = ..., keys: _Optional[_Iterable[str]] = ..., sha256: _Optional[_Iterable[str]] = ..., near: _Optional[_Iterable[_Union[Near, _Mapping]]] = ..., where: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Near(_message.Message):
    __slots__ = ("perceptual_hash", "distance")
    PERCEPTUAL_HASH_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    perceptual_hash: int
    distance: int
    def __init__(self, perceptual_hash: _Optional[int] = ..., distance: _Optional[int] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("version", "keys")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    version: VersionInfo
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[VersionInfo, _Mapping]] = ..., keys: _Optional[_Iterable[str]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("store", "version")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: VersionInfo
    def __init__(self, version: _Optional[_Union[VersionInfo, _Mapping]] = ...) -> None: ...

class BuildIndexRequest(_message.Message):
    __slots__ = ("store", "recall", "memory_bytes", "latency_ms", "kind")
    STORE_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    store: str
    recall: float
    memory_bytes: int
    latency_ms: float
    kind: str
    def __init__(self, store: _Optional[str] = ..., recall: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., latency_ms: _Optional[float] = ..., kind: _Optional[str] = ...) -> None: ...

class BuildIndexResponse(_message.Message):
    __slots__ = ("progress", "version", "report")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    progress: str
    version: VersionInfo
    report: str
    def __init__(self, progress: _Optional[str] = ..., version: _Optional[_Union[VersionInfo, _Mapping]] = ..., report: _Optional[str] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: StoreInfo
    def __init__(self, store: _Optional[_Union[StoreInfo, _Mapping]] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("number", "parent", "created", "operation", "entries", "tags", "unique_tags", "fingerprint")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_TAGS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    number: int
    parent: int
    created: str
    operation: str
    entries: int
    tags: int
    unique_tags: int
    fingerprint: Fingerprint
    def __init__(self, number: _Optional[int] = ..., parent: _Optional[int] = ..., created: _Optional[str] = ..., operation: _Optional[str] = ..., entries: _Optional[int] = ..., tags: _Optional[int] = ..., unique_tags: _Optional[int] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ...) -> None: ...

class DiffRequest(_message.Message):
    __slots__ = ("store", "before", "after")
    STORE_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    store: str
    before: int
    after: int
    def __init__(self, store: _Optional[str] = ..., before: _Optional[int] = ..., after: _Optional[int] = ...) -> None: ...

class DiffResponse(_message.Message):
    __slots__ = ("before", "after", "added", "removed", "changed", "tags")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    before: int
    after: int
    added: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    changed: _containers.RepeatedScalarFieldContainer[str]
    tags: _containers.RepeatedCompositeFieldContainer[TagChange]
    def __init__(self, before: _Optional[int] = ..., after: _Optional[int] = ..., added: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ..., changed: _Optional[_Iterable[str]] = ..., tags: _Optional[_Iterable[_Union[TagChange, _Mapping]]] = ...) -> None: ...

class TagChange(_message.Message):
    __slots__ = ("text", "kind", "before", "after")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    text: str
    kind: Kind
    before: int
    after: int
    def __init__(self, text: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., before: _Optional[int] = ..., after: _Optional[int] = ...) -> None: ...
