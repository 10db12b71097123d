"""From a URL to a source. A backend is imported when a URL asks for it."""

from __future__ import annotations

from contextlib import closing
from typing import Any, Unpack

from tagstore.client import stats
from tagstore.client.backend import Backend
from tagstore.client.mapfile import Map, connect_options
from tagstore.client.options import ConnectOptions, Options
from tagstore.client.source import Source
from tagstore.client.stats import Counters
from tagstore.client.urls import Location, locate


def connect(url: str, **options: Unpack[ConnectOptions]) -> Source:
    """Connect to the tag source of a URL. Nothing is opened before it is first used.

    Args:
        url: see `tagstore.client`.
        options: see `Options` and `tagstore.types.Search`; they win over those in the URL.

    Raises:
        InvalidInput: a URL that names no store, an unknown option, or a value that an option cannot have.
    """
    location = locate(url)
    values = {**location.options, **options}
    if location.scheme == "replay":
        values = {**_recorded(location.place), **values}
    return _source(url, location, Options().merged(values), stats.counters())


def reconnect(url: str, location: Location, options: Options, counters: str) -> Source:
    """Open in this process the source that another one had."""
    return _source(url, location, options, stats.counters(counters))


def _source(url: str, location: Location, options: Options, counters: Counters) -> Source:
    backend = _backend(location, options, counters)
    return Source(url, location, options, counters, backend, reconnect)


def _recorded(path: str) -> dict[str, Any]:
    """Return the options that a map was recorded with, which are those that it is asked with."""
    with closing(Map(path)) as map_:
        return connect_options(map_.options)


def _backend(location: Location, options: Options, counters: Counters) -> Backend:
    match location.scheme:
        case "file":
            from tagstore.client.sources.local import LocalBackend

            return LocalBackend(location.place, location.store)
        case "replay":
            from tagstore.client.sources.replay import ReplayBackend

            return ReplayBackend(location.place)
        case "null":
            from tagstore.client.sources.null import NullBackend

            return NullBackend()
        case "random":
            from tagstore.client.sources.random_tags import RandomBackend

            draw: dict[str, Any] = {"seed": options.seed, "count": options.tags}
            if "://" not in location.place:
                return RandomBackend.of_file(location.place, **draw)
            store = _source(location.place, locate(location.place), options, counters)
            return RandomBackend.of_source(store, **draw)
        case _:
            from tagstore.client.sources.remote import RemoteBackend

            return RemoteBackend(location, options, counters)
