"""The check of a request's options, made once, before any work is done for it."""

from __future__ import annotations

from collections.abc import Sequence

from tagstore.errors import InvalidInput
from tagstore.indexing.plans import MAX_EF
from tagstore.types import ORDERS, Exclude, Identity, Search

MAX_K = 1000
"""Neighbours of a query."""
MAX_QUERIES = 4096
"""Queries of one request."""
MAX_ANSWERS = 1 << 16
"""Neighbours of one request, over all its queries."""
MAX_EXCLUDED = 10_000
"""Keys and entry ids that one request may exclude."""
NOBODY = Exclude()


def check_request(queries: int, search: Search, identities: Sequence[Identity] = ()) -> None:
    """Raise `InvalidInput` for options out of range, too many queries, or identities that do not fit them."""
    k = search.k
    if not 1 <= k <= MAX_K:
        raise InvalidInput(f"k is {k}: ask for 1 to {MAX_K} neighbours")
    if search.max_tags < 0:
        raise InvalidInput(f"max_tags is {search.max_tags}: pass 0 for all tags, or how many you want")
    if not -1 <= search.min_similarity <= 1:
        raise InvalidInput(f"min_similarity is {search.min_similarity}: a cosine, from -1 to 1")
    if search.order not in ORDERS:
        raise InvalidInput(f"order is '{search.order}': it is one of {', '.join(ORDERS)}")
    if search.nprobe < 0 or search.ef_search < 0:
        raise InvalidInput(
            f"nprobe is {search.nprobe}, ef_search {search.ef_search}: pass 0 for what the index was tuned to, or more"
        )
    if search.ef_search > MAX_EF:
        raise InvalidInput(f"ef_search is {search.ef_search}: at most {MAX_EF}, or ask for an exact search")
    if queries * k > MAX_ANSWERS:
        raise InvalidInput(
            f"{queries} queries with k = {k} ask for {queries * k} neighbours: at most {MAX_ANSWERS} in one request"
        )
    if queries > MAX_QUERIES:
        raise InvalidInput(f"{queries} queries in one request: send at most {MAX_QUERIES}")
    if identities:
        _check_identities(queries, identities)
    if search.exclude != NOBODY:
        _check_exclude(search.exclude)


def _check_identities(queries: int, identities: Sequence[Identity]) -> None:
    if len(identities) != queries:
        raise InvalidInput(
            f"{len(identities)} identities for {queries} queries: pass one for each, images first, or none"
        )
    for i, identity in enumerate(identities):
        if len(identity.sha256) not in (0, 32):
            raise InvalidInput(
                f"the sha256 of query {i} has {len(identity.sha256)} bytes: pass all 32, or none"
            )
        if identity.perceptual_hash is not None and not 0 <= identity.perceptual_hash < 1 << 64:
            raise InvalidInput(
                f"the perceptual hash of query {i} is {identity.perceptual_hash}: it has 64 bits, unsigned"
            )


def _check_exclude(exclude: Exclude) -> None:
    if len(exclude.keys) + len(exclude.entry_ids) > MAX_EXCLUDED:
        raise InvalidInput(
            f"{len(exclude.keys) + len(exclude.entry_ids)} keys and entry ids to exclude: "
            f"at most {MAX_EXCLUDED} in one request; "
            "what must never be found is better filtered by its metadata, or deleted"
        )
    if not -1 <= exclude.hash_distance <= 64:
        raise InvalidInput(
            f"exclude.hash_distance is {exclude.hash_distance}: 0 to 64 bits, or -1 to leave it out"
        )
