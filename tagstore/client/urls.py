"""Where a source is."""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from tagstore.client.options import from_query
from tagstore.errors import InvalidInput

_STORES = ("grpc", "grpcs", "file")
_OTHERS = ("replay", "null", "random")
_URL = re.compile(r"(?P<scheme>[a-z]+)(?P<of>\+[a-z]+)?://(?P<rest>[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_REST = re.compile(r"(?P<place>.*?)(?:/(?P<store>[^/@]+)(?:@(?P<version>\d+))?)?/?", re.DOTALL)
_ADDRESS = re.compile(r"(?:\[[^\]]+\]|[^:,\[\]]+):(\d{1,5})")


class Location(NamedTuple):
    """A URL, taken apart."""

    scheme: str
    place: str
    """Addresses, a directory, or the path of a file."""
    store: str
    version: int
    """0 for the current one."""
    options: dict[str, Any]

    @property
    def addresses(self) -> list[str]:
        return self.place.split(",")


def parse(url: str) -> tuple[str, str, str, int]:
    """(scheme, place, store, version or 0) of a URL. Raises `InvalidInput`, with an example."""
    location = locate(url)
    return location.scheme, location.place, location.store, location.version


def locate(url: str) -> Location:
    """A URL, taken apart and checked. Raises `InvalidInput`, with an example."""
    match = _URL.fullmatch(url)
    if (
        match is None
        or match["scheme"] not in (*_STORES, *_OTHERS)
        or (match["of"] and match["scheme"] != "random")
    ):
        raise InvalidInput(
            f"'{url}' is no URL of a store: write grpc://HOST:PORT/NAME, file://DIR/NAME or replay://FILE"
        )
    scheme, rest = match["scheme"], match["rest"]
    options = from_query(parse_qsl(match["query"] or "", keep_blank_values=True))
    if scheme in _OTHERS:
        return Location(scheme, _other_place(url, scheme, match["of"], rest), "", 0, options)
    parts = _REST.fullmatch(rest)
    assert parts is not None  # it fits anything
    place, store = parts["place"], parts["store"]
    if scheme == "file" and not place and store:
        place = "/" if rest.startswith("/") else "."
    if not store or not place:
        raise InvalidInput(
            f"'{url}' names no store: end it with one, as in {scheme}://{rest.rstrip('/')}/NAME"
        )
    if scheme != "file":
        _check_addresses(url, scheme, place, store)
    version = int(parts["version"] or 0)
    if version >= 1 << 63:
        raise InvalidInput(f"'{url}' asks for version {version}: there can be no such")
    return Location(scheme, place, store, version, options)


def _other_place(url: str, scheme: str, of: str | None, rest: str) -> str:
    if scheme == "null":
        return ""
    if not rest:
        what = {
            "replay": "replay://FILE, a map made by `tagstore record`",
            "random": "random://FILE, a tag a line, or random+URL",
        }[scheme]
        raise InvalidInput(f"'{url}' names no file: write {what}")
    if of:
        inner = f"{of[1:]}://{rest}"
        if locate(inner).scheme in ("null", "random"):
            raise InvalidInput(
                f"'{url}': random tags are drawn from the vocabulary of a store, as in random+grpc://HOST:PORT/NAME"
            )
        return inner
    return rest


def _check_addresses(url: str, scheme: str, place: str, store: str) -> None:
    for address in place.split(","):
        found = _ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found[1]) < 65536:
            example = f"{scheme}://{address or 'localhost'}:50051/{store}"
            raise InvalidInput(f"'{url}' has no port, or one that cannot be, in '{address}': write {example}")
