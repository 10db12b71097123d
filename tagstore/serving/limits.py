"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one worker. What goes beyond is refused with RESOURCE_EXHAUSTED; where it is worth trying again, with the time to wait."""

    threads: int = 8
    """For what is not searched but embedded, read or opened."""
    in_flight: int = 1024
    """Calls in hand: worked on, waiting, or with an answer that the client has not taken yet; streams not counted. Room for a burst, such
    as what comes while a new version is opened."""
    standing: int = 128
    """Calls in hand when there is too much to do: when for as long as `burst` none was answered as soon as `soon`. What would wait longer
    then is refused, so that what is taken in is still answered in time."""
    soon: float = 0.05
    """Seconds."""
    burst: float = 1.0
    """Seconds."""
    per_client: int = 64
    """Calls and streams of one client: a caller with a token, else a connection."""
    streams: int = 64
    """Open streams."""
    message_bytes: int = 64 << 20
    """Of one request or answer."""
    image_bytes: int = 32 << 20
    """Of one encoded image."""
    images: int = 256
    """Of one request; as many texts."""
    search_wait: float = 1.0
    """Seconds that a query may be expected to wait for the search."""
    embed_wait: float = 1.0
    """Seconds that an image or a text may be expected to wait for the encoder."""
    search_queue: int = 128
    """Queries that may always wait, whatever that takes: with a slow index they are waited for, not refused."""
    search_inline: float = 0.003
    """Seconds that a lone query's search may take in the thread that takes calls in."""
    embed_queue: int = 8
    """Images and texts that may always wait."""
    slow_reader: float = 60.0
    """Seconds that a client may take to accept an answer."""
