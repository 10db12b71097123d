"""The options of a source: given to `connect`, in the URL's query string, and in part to each call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, get_args

from tagstore.errors import InvalidInput
from tagstore.metadata_filter import filter_texts
from tagstore.types import Exclude, Order, Search, current_names

OnFailure = Literal["raise", "empty"]
ExcludeOption = Literal["self"] | Exclude | None


class SearchOptions(TypedDict, total=False):
    """What a call of `retrieve` may set. The defaults are the source's options; see `Options`, `Search`."""

    k: int
    max_tags: int
    min_similarity: float
    order: Order
    where: Mapping[str, str | float | bool | None]
    exact: bool
    nprobe: int
    ef_search: int
    with_neighbours: bool
    with_texts: bool
    with_provenance: bool
    exclude: ExcludeOption
    exclude_distance: int
    exclude_keys: Sequence[str]
    on_failure: OnFailure
    preload: bool


class ConnectOptions(SearchOptions, total=False):
    """What `connect` takes. See `Options`."""

    timeout: float
    retries: int
    hedge: float
    breaker: int
    cooldown: float
    token: str
    ca: str
    cert: str
    cert_key: str
    server_name: str
    cache: str
    cache_bytes: int
    embedding_cache: int
    seed: int
    tags: int


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a source."""

    search: Search = Search()  # noqa: RUF009  frozen
    """How queries are answered, unless a call says otherwise."""
    exclude: ExcludeOption = None
    """The leak guard. `self`: the query's own image, by its key, sha256 and perceptual hash where known."""
    exclude_distance: int = 4
    """For `exclude="self"`: bits of 64 in which hashes of the same image may differ; -1 to compare none."""
    exclude_keys: tuple[str, ...] = ()
    """Keys that no query may find, whatever `exclude` says."""
    timeout: float = 30.0
    """Seconds that a request may take, retries included. A call of several requests has as many for each."""
    on_failure: OnFailure = "raise"
    """`raise`, or `empty`: answer without tags if no server does in time; counted, logged once a minute."""
    retries: int = 4
    """Tries after the first, within `timeout`."""
    hedge: float = 0.0
    """Seconds after which a request without an answer is also sent to another address; 0 for never."""
    breaker: int = 5
    """Failures in a row after which an address is left alone for `cooldown`; 0 for never."""
    cooldown: float = 5.0
    """Seconds that an address is left alone; then one request tries it."""
    token: str = field(default="", repr=False)
    """Bearer token; from the environment variable TAGSTORE_TOKEN if empty."""
    ca: str = ""
    """For grpcs://: PEM file of the authorities to trust; gRPC's own if empty."""
    cert: str = ""
    """For grpcs://: PEM file of the client's certificate chain, where the server asks for one."""
    cert_key: str = ""
    """For grpcs://: PEM file of the client's private key."""
    server_name: str = ""
    """For grpcs://: the name that the server's certificate must be for, if not the one in the URL."""
    cache: str = ""
    """Directory of a cache of answers, shared by the machine's processes; needs lmdb and a pinned version."""
    cache_bytes: int = 1 << 30
    """Bytes that the cached answers may take; the file is at most twice as large."""
    embedding_cache: int = 1 << 15
    """Tags whose embeddings are kept in memory; 0 for none."""
    preload: bool = False
    """Fetch the embeddings of an answer's tags with the answer, so that `tags` finds them in memory."""
    seed: int = 0
    """For random://: which draw."""
    tags: int = 10
    """For random://: tags for each query."""

    def __post_init__(self) -> None:
        exclude = self.exclude
        for name, valid, rule in (
            ("timeout", self.timeout > 0, "seconds, more than 0"),
            ("on_failure", self.on_failure in get_args(OnFailure), "'raise' or 'empty'"),
            ("retries", self.retries >= 0, _NOT_NEGATIVE),
            ("hedge", self.hedge >= 0, _NOT_NEGATIVE),
            ("breaker", self.breaker >= 0, _NOT_NEGATIVE),
            ("cooldown", self.cooldown > 0, "seconds, more than 0"),
            (
                "exclude",
                exclude in (None, "self") or isinstance(exclude, Exclude),
                "'self', an Exclude or None",
            ),
            ("exclude_distance", -1 <= self.exclude_distance <= 64, "0 to 64 bits, or -1 to compare none"),
            ("cache_bytes", self.cache_bytes >= 1 << 20, "at least 1 MiB"),
            ("embedding_cache", self.embedding_cache >= 0, _NOT_NEGATIVE),
            ("seed", self.seed >= 0, _NOT_NEGATIVE),
            ("tags", self.tags >= 0, _NOT_NEGATIVE),
        ):
            if not valid:
                raise InvalidInput(f"option {name} cannot be {getattr(self, name)!r}: {rule}")

    def merged(self, values: Mapping[str, Any], *, of_call: bool = False) -> Options:
        """Return these options with some replaced. Raises `InvalidInput` for an unknown option, by name.

        Args:
            of_call: accept only what a single call may set.
        """
        known = _SEARCH | (_OF_CALL if of_call else _OWN)
        if not known.issuperset(values):
            values = current_names(Search, values)
        unknown = [name for name in values if name not in known]
        if unknown:
            problem = "retrieve takes no option" if of_call else "there is no option"
            raise InvalidInput(
                f"{problem} {', '.join(map(repr, unknown))}; there are: {', '.join(sorted(known))}"
            )
        if not isinstance(values.get("with_texts", True), bool):
            raise InvalidInput(
                "with_texts says whether answers hold the tags' texts, true or false: "
                "queries by text are captions=[...]"
            )
        search = {name: value for name, value in values.items() if name in _SEARCH}
        own = {name: value for name, value in values.items() if name in _OWN}
        if "where" in search:
            search["where"] = filter_texts(search["where"])
        if "exclude_keys" in own:
            if isinstance(own["exclude_keys"], str):
                raise InvalidInput(f"exclude_keys is a list: pass [{own['exclude_keys']!r}] for one")
            own["exclude_keys"] = tuple(own["exclude_keys"])
        return replace(self, search=replace(self.search, **search), **own)


_NOT_NEGATIVE = "it must not be negative"
_SEARCH = {f.name for f in fields(Search)} - {"exclude"}
_OWN = {f.name for f in fields(Options)} - {"search"}
_OF_CALL = {"exclude", "exclude_distance", "exclude_keys", "on_failure", "preload"}
_DEFAULTS: dict[str, Any] = {f.name: getattr(Search(), f.name) for f in fields(Search)} | {
    name: getattr(Options(), name) for name in _OWN
}
_NOT_IN_A_URL = {
    "token": "a token does not belong in a URL, which is logged: pass token=, or set TAGSTORE_TOKEN",
    "where": "'where' is no option of a URL: write where.FIELD=VALUE",
    "exclude_keys": "'exclude_keys' is no option of a URL: pass it in code",
}
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def from_query(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Read the options of a URL's query string. Raises `InvalidInput` for one that means nothing, by name."""
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    for name, text in pairs:
        (name,) = current_names(Search, {name: text})
        if name.startswith("where."):
            where[name.removeprefix("where.")] = text
        elif name in _NOT_IN_A_URL:
            raise InvalidInput(_NOT_IN_A_URL[name])
        elif name not in _DEFAULTS:
            known = ", ".join(sorted(set(_DEFAULTS) - set(_NOT_IN_A_URL)))
            raise InvalidInput(f"'{name}' is no option of a URL: there are: {known}, where.FIELD")
        else:
            values[name] = _value(name, text)
    return {**values, "where": where} if where else values


def _value(name: str, text: str) -> Any:
    kind = type(_DEFAULTS[name])
    try:
        if name == "exclude":
            return {"self": "self", "none": None}[text]
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        hint = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "self or none")
        raise InvalidInput(f"option {name}={text}: write {hint}") from None
