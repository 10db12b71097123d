"""From a URL to a source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, Unpack

from tagstore.client import stats
from tagstore.client.mapfile import Map, options_of
from tagstore.client.options import ConnectOptions, Options
from tagstore.client.source import Backend, Source
from tagstore.client.sources.random_tags import NullBackend, RandomBackend, of_file
from tagstore.client.sources.local import LocalBackend
from tagstore.client.sources.remote import RemoteBackend, Wire
from tagstore.client.sources.replay import ReplayBackend
from tagstore.client.stats import Counters, counters
from tagstore.client.urls import Location, locate
from tagstore.types import StoreInfo, TagInfo


def connect(url: str, **options: Unpack[ConnectOptions]) -> Source:
    """The tag source of a URL. Nothing is opened before it is first used.

    Args:
        url: see `tagstore.client`.
        options: see `Options` and `tagstore.types.Search`; these win over those in the URL.

    Raises:
        InvalidInput: a URL that names no store, an option that there is not, or a value that it cannot have.
    """
    location = locate(url)
    given = {**location.options, **options}
    if location.scheme == "replay":
        given = {**_recorded(location.place), **given}
    return _source(url, location, Options().merged(given), counters())


def reconnect(url: str, location: Location, options: Options, counters: str) -> Source:
    """The source that another process had, opened anew in this one."""
    return _source(url, location, options, stats.counters(counters))


def _source(url: str, location: Location, options: Options, counted: Counters) -> Source:
    return Source(url, location, options, counted, _backend(location, options, counted))


def _recorded(path: str) -> dict[str, Any]:
    """The options that a map was recorded with are those it is asked with."""
    with closing(Map(path)) as map_:
        return options_of(map_.options)


def _backend(location: Location, options: Options, counted: Counters) -> Backend:
    match location.scheme:
        case "file":
            return LocalBackend(location.place, location.store)
        case "replay":
            return ReplayBackend(location.place)
        case "null":
            return NullBackend()
        case "random":
            return _random(location, options, counted)
        case _:
            return RemoteBackend(Wire(location, options, counted))


def _random(location: Location, options: Options, counted: Counters) -> RandomBackend:
    if "://" not in location.place:
        return of_file(location.place, seed=options.seed, count=options.tags)
    inner = locate(location.place)
    # the vocabulary of one version: what is drawn must not change when the store does
    source = _source(location.place, inner, options, counted)

    def info() -> StoreInfo:
        source.pin()
        return source.info()

    def vocabulary() -> list[TagInfo]:
        source.pin()
        return list(source.vocabulary())

    def lookup(tag_ids: Sequence[int], embeddings: bool) -> list[TagInfo]:
        return source.tags(tag_ids, embeddings=embeddings)

    return RandomBackend(vocabulary, info, lookup, seed=options.seed, count=options.tags)
