"""Take a URL apart: where a source is, which store and version, and its options."""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from tagstore.client.options import from_query
from tagstore.errors import InvalidInput

_STORE_SCHEMES = ("grpc", "grpcs", "file")
_OTHER_SCHEMES = ("replay", "null", "random")
_URL = re.compile(r"(?P<scheme>[a-z]+)(?P<inner>\+[a-z]+)?://(?P<rest>[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_REST = re.compile(r"(?P<place>.*?)(?:/(?P<store>[^/@]+)(?:@(?P<version>[^/@]*))?)?/?", re.DOTALL)
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
    """Return (scheme, place, store, version or 0) of a URL. Raises `InvalidInput`, with an example."""
    return locate(url)[:4]


def locate(url: str) -> Location:
    """Take a URL apart and check it. Raises `InvalidInput`, with an example."""
    match = _URL.fullmatch(url)
    if (
        match is None
        or match["scheme"] not in (*_STORE_SCHEMES, *_OTHER_SCHEMES)
        or (match["inner"] and match["scheme"] != "random")
    ):
        raise InvalidInput(
            f"'{url}' is no URL of a store: write grpc://HOST:PORT/NAME, file://DIR/NAME or replay://FILE"
        )
    scheme, rest = match["scheme"], match["rest"]
    options = from_query(parse_qsl(match["query"] or "", keep_blank_values=True))
    if scheme in _OTHER_SCHEMES:
        return Location(scheme, _place_without_store(url, scheme, match["inner"], rest), "", 0, options)
    parts = _REST.fullmatch(rest)
    assert parts is not None  # it matches anything
    place, store = parts["place"], parts["store"]
    if scheme == "file" and not place and store:
        place = "/" if rest.startswith("/") else "."
    if not store or not place:
        raise InvalidInput(
            f"'{url}' names no store: end it with one, as in {scheme}://{rest.rstrip('/')}/NAME"
        )
    if scheme != "file":
        _check_addresses(url, scheme, place, store)
    asked = parts["version"]
    if asked is not None and (not re.fullmatch("[0-9]{1,30}", asked) or not int(asked)):
        raise InvalidInput(
            f"'{url}' asks for version '{asked}': versions count from @1; without @ it is the latest"
        )
    version = int(asked or 0)
    if version >= 1 << 63:
        raise InvalidInput(f"'{url}' asks for version {version}: there can be no such version")
    return Location(scheme, place, store, version, options)


def _place_without_store(url: str, scheme: str, inner: str | None, rest: str) -> str:
    if scheme == "null":
        return ""
    if not rest:
        example = {
            "replay": "replay://FILE, a map made by `tagstore record`",
            "random": "random://FILE, a tag a line, or random+URL",
        }[scheme]
        raise InvalidInput(f"'{url}' names no file: write {example}")
    if not inner:
        return rest
    place = f"{inner[1:]}://{rest}"
    if locate(place).scheme in ("null", "random"):
        raise InvalidInput(
            f"'{url}': random tags are drawn from the vocabulary of a store, as in random+grpc://HOST:PORT/NAME"
        )
    return place


def _check_addresses(url: str, scheme: str, place: str, store: str) -> None:
    for address in place.split(","):
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match[1]) < 65536:
            example = f"{scheme}://{address or 'localhost'}:50051/{store}"
            raise InvalidInput(f"'{url}' has no port, or an impossible one, in '{address}': write {example}")
