"""`connect(url)` gives a tag source: the same answers from a server, a directory or a recorded map.

    grpc://HOST:PORT/NAME               a server; several addresses as HOST:PORT,HOST:PORT
    grpcs://HOST:PORT/NAME              the same over TLS
    file://DIR/NAME                     a store on this machine, in process (`tagstore[server]`);
                                        file:///abs/dir/NAME for an absolute path
    replay://FILE                       answers that `tagstore record` kept for a data set
    null://                             no tags
    random://FILE, random+URL           random tags from a file with one a line, or from a store's vocabulary:
                                        the control experiment
    ...NAME@7                           version 7 instead of the current one
    ...?k=10&exclude=self               options, see `Options` and `tagstore.types.Search`

The base install is enough for all but file://: nothing heavier than grpcio and numpy is imported.
"""

from tagstore.client import forks as _forks  # noqa: F401  before anything imports grpc
from tagstore.client.connecting import connect
from tagstore.client.options import ConnectOptions, OnFailure, Options, SearchOptions
from tagstore.client.prefetch import TagPrefetcher
from tagstore.client.queries import Image
from tagstore.client.stats import Stats
from tagstore.client.tag_source import Pin, TagSource, require
from tagstore.client.urls import parse

__all__ = [
    "ConnectOptions",
    "Image",
    "OnFailure",
    "Options",
    "Pin",
    "SearchOptions",
    "Stats",
    "TagPrefetcher",
    "TagSource",
    "connect",
    "parse",
    "require",
]
