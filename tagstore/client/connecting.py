"""From a URL to a source."""

from __future__ import annotations

from typing import Unpack

from tagstore.client.options import ConnectOptions, Options
from tagstore.client.source import Backend, Source
from tagstore.client.stats import Counters, counters
from tagstore.client.urls import Location, locate


def connect(url: str, **options: Unpack[ConnectOptions]) -> Source:
    """The tag source of a URL. Nothing is opened before it is first used.

    Args:
        url: see `tagstore.client`.
        options: see `Options` and `tagstore.types.Search`; these win over those in the URL.

    Raises:
        InvalidInput: a URL that names no store, an option that there is not, or a value that it cannot have.
    """
    location = locate(url)
    return _source(url, location, Options().merged({**location.options, **options}), counters())


def reconnect(url: str, location: Location, options: Options, counters: str) -> Source:
    """The source that another process had, opened anew in this one."""
    from tagstore.client import stats

    return _source(url, location, options, stats.counters(counters))


def _source(url: str, location: Location, options: Options, counted: Counters) -> Source:
    return Source(url, location, options, counted, _backend(location, options, counted))


def _backend(location: Location, options: Options, counted: Counters) -> Backend:
    from tagstore.client.local import LocalBackend
    from tagstore.client.remote import RemoteBackend, Wire

    match location.scheme:
        case "file":
            return LocalBackend(location.place, location.store)
        case _:
            return RemoteBackend(Wire(location, options, counted))
