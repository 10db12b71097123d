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
KIND_UNSPECIFIED: Kind
KIND_OBJECT: Kind
KIND_ATTRIBUTE: Kind
KIND_ENTITY: Kind
KIND_RELATION: Kind
KIND_CUSTOM: Kind
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT16: Dtype

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
    __slots__ = ("store", "version", "images", "vectors", "fingerprint", "k", "max_tags")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    MAX_TAGS_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    images: _containers.RepeatedScalarFieldContainer[bytes]
    vectors: Vectors
    fingerprint: str
    k: int
    max_tags: int
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., images: _Optional[_Iterable[bytes]] = ..., vectors: _Optional[_Union[Vectors, _Mapping]] = ..., fingerprint: _Optional[str] = ..., k: _Optional[int] = ..., max_tags: _Optional[int] = ...) -> None: ...

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

class Retrieval(_message.Message):
    __slots__ = ("neighbours", "tags")
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    neighbours: _containers.RepeatedCompositeFieldContainer[Neighbour]
    tags: _containers.RepeatedCompositeFieldContainer[RetrievedTag]
    def __init__(self, neighbours: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ..., tags: _Optional[_Iterable[_Union[RetrievedTag, _Mapping]]] = ...) -> None: ...

class Neighbour(_message.Message):
    __slots__ = ("entry_id", "key", "similarity")
    ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    entry_id: int
    key: str
    similarity: float
    def __init__(self, entry_id: _Optional[int] = ..., key: _Optional[str] = ..., similarity: _Optional[float] = ...) -> None: ...

class RetrievedTag(_message.Message):
    __slots__ = ("tag_id", "tag", "kind", "similarity", "relevance", "neighbours")
    TAG_ID_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    tag_id: int
    tag: str
    kind: Kind
    similarity: float
    relevance: float
    neighbours: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tag_id: _Optional[int] = ..., tag: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., similarity: _Optional[float] = ..., relevance: _Optional[float] = ..., neighbours: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("store", "version", "entries", "tags", "unique_tags", "fingerprint", "index", "created")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_TAGS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    store: str
    version: int
    entries: int
    tags: int
    unique_tags: int
    fingerprint: Fingerprint
    index: str
    created: str
    def __init__(self, store: _Optional[str] = ..., version: _Optional[int] = ..., entries: _Optional[int] = ..., tags: _Optional[int] = ..., unique_tags: _Optional[int] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., index: _Optional[str] = ..., created: _Optional[str] = ...) -> None: ...

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
