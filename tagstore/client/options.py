"""What a source may be told, at `connect`, in the URL's query string, and what of it at each call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, get_args

from tagstore.errors import InvalidInput
from tagstore.types import Exclude, Order, Search, current_names

OnFailure = Literal["raise", "empty"]
Self = Literal["self"]


class SearchOptions(TypedDict, total=False):
    """What each call of `retrieve` may set; the source's own settings are the defaults. See `tagstore.types.Search`."""

    k: int
    max_tags: int
    min_similarity: float
    order: Order
    where: Mapping[str, str]
    exact: bool
    nprobe: int
    ef_search: int
    with_neighbours: bool
    with_texts: bool
    exclude: Self | Exclude | None
    exclude_distance: int
    exclude_keys: Sequence[str]


class ConnectOptions(SearchOptions, total=False):
    """What `connect` takes. See `Options`."""

    timeout: float
    on_failure: OnFailure
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
    preload: bool
    seed: int
    tags: int


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of a source."""

    search: Search = Search()  # noqa: RUF009  frozen
    """What each call asks for unless it says otherwise."""
    exclude: Self | Exclude | None = None
    """The leak guard. `self`: the query's own image, by everything that is known of it: key, sha256, perceptual hash."""
    exclude_distance: int = 4
    """For `exclude="self"`: images whose perceptual hash differs in at most so many of 64 bits count as the same; -1 for no such test."""
    exclude_keys: tuple[str, ...] = ()
    """Keys that no query may find, whatever `exclude` says."""
    timeout: float = 30.0
    """Seconds that a request may take, retries included. A call with more queries than fit one request has as much for each."""
    on_failure: OnFailure = "raise"
    """`raise`, or `empty`: answer with no tags where no server does in time; counted, and logged once a minute."""
    retries: int = 4
    """At most so many tries after the first, within `timeout`."""
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
    """For grpcs://: PEM file of its private key."""
    server_name: str = ""
    """For grpcs://: the name that the server's certificate must be for, if not the one in the URL."""
    cache: str = ""
    """Directory of a cache of answers, shared by the processes of the machine; needs lmdb, and a version in the URL or `pin()`."""
    cache_bytes: int = 1 << 30
    """What the cached answers may take; the file is at most twice that."""
    embedding_cache: int = 1 << 15
    """Tags whose embeddings are kept in memory."""
    preload: bool = False
    """Fetch with each answer the embeddings of its tags, so that `tags` finds them in memory."""
    seed: int = 0
    """Of random://."""
    tags: int = 10
    """Of random://: how many tags a query."""

    def __post_init__(self) -> None:
        for name, good in (
            ("timeout", self.timeout > 0),
            ("on_failure", self.on_failure in get_args(OnFailure)),
            ("retries", self.retries >= 0),
            ("hedge", self.hedge >= 0),
            ("breaker", self.breaker >= 0),
            ("cooldown", self.cooldown > 0),
            ("exclude", self.exclude is None or self.exclude == "self" or isinstance(self.exclude, Exclude)),
            ("exclude_distance", -1 <= self.exclude_distance <= 64),
            ("cache_bytes", self.cache_bytes >= 1 << 20),
            ("embedding_cache", self.embedding_cache >= 0),
            ("seed", self.seed >= 0),
            ("tags", self.tags >= 0),
        ):
            if not good:
                raise InvalidInput(
                    f"option {name} cannot be {getattr(self, name)!r}: {_HINTS.get(name, 'it must not be negative')}"
                )

    def merged(self, options: Mapping[str, Any], *, call: bool = False) -> Options:
        """These with some replaced. `call`: only what a single call may set.

        Raises `InvalidInput` for an option that there is not, by name.
        """
        options = current_names(Search, options)
        known = _SEARCH | _GUARD if call else _SEARCH | _OWN
        unknown = [name for name in options if name not in known]
        if unknown:
            where = "retrieve takes no option" if call else "there is no option"
            raise InvalidInput(
                f"{where} {', '.join(map(repr, unknown))}; there are: {', '.join(sorted(known))}"
            )
        if not isinstance(options.get("with_texts", True), bool):
            raise InvalidInput(
                "with_texts says whether answers hold the tags' texts, true or false: queries by text are captions=[...]"
            )
        search = {name: value for name, value in options.items() if name in _SEARCH}
        own = {name: value for name, value in options.items() if name in _OWN}
        if "exclude_keys" in own:
            own["exclude_keys"] = tuple(_listed("exclude_keys", own["exclude_keys"]))
        return (
            replace(self, search=replace(self.search, **search) if search else self.search, **own)
            if options
            else self
        )


_SEARCH = {f.name for f in fields(Search)} - {"exclude"}
_OWN = {f.name for f in fields(Options)} - {"search"}
_GUARD = {"exclude", "exclude_distance", "exclude_keys"}
_HINTS = {
    "timeout": "seconds, more than 0",
    "cooldown": "seconds, more than 0",
    "on_failure": "'raise' or 'empty'",
    "exclude": "'self', an Exclude or None",
    "exclude_distance": "0 to 64 bits, or -1 for no comparison of perceptual hashes",
    "cache_bytes": "at least 1 MiB",
}


def from_query(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Options of a URL's query string, as text. Raises `InvalidInput` for one that has no such meaning, by name."""
    found: dict[str, Any] = {}
    where: dict[str, str] = {}
    defaults = {
        **{f.name: getattr(_PLAIN.search, f.name) for f in fields(Search)},
        **{name: getattr(_PLAIN, name) for name in _OWN},
    }
    for name, text in pairs:
        (name,) = current_names(Search, {name: text})
        if name == "token":
            raise InvalidInput(
                "a token does not belong in a URL, which is logged: pass token=, or set TAGSTORE_TOKEN"
            )
        if name.startswith("where."):
            where[name.removeprefix("where.")] = text
        elif name in ("where", "exclude_keys") or name not in defaults:
            hint = {"where": "write where.FIELD=VALUE", "exclude_keys": "pass it in code"}.get(
                name,
                f"there are: {', '.join(sorted(set(defaults) - {'token', 'where', 'exclude_keys'}))}, where.FIELD",
            )
            raise InvalidInput(f"'{name}' is no option of a URL: {hint}")
        else:
            found[name] = _value(name, text, defaults[name])
    return {**found, "where": where} if where else found


_PLAIN = Options()
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _value(name: str, text: str, default: Any) -> Any:
    try:
        if name == "exclude":
            return {"self": "self", "none": None}[text]
        if isinstance(default, bool):
            return _BOOLEANS[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = (
            "self or none"
            if name == "exclude"
            else {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        )
        raise InvalidInput(f"option {name}={text}: write {kind}") from None


def _listed(name: str, value: Any) -> Sequence[str]:
    if isinstance(value, str):
        raise InvalidInput(f"{name} is a list: pass [{value!r}] for one")
    return list(value)
