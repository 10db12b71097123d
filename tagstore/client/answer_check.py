"""Compare a server's answers with the questions, and convert them.

Whatever a server sends is foreign. Each function takes a request and its response and raises `BadAnswer` for
one that does not fit: another store or version, too few or too many answers, numbers that are not finite,
positions that are not there. A few comparisons an answer; what is inside one is checked as it is converted.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tagstore.errors import BadAnswer
from tagstore.types import Retrieval, StoreInfo, TagInfo
from tagstore.wire import convert


def retrievals(request: Any, response: Any, queries: int) -> list[Retrieval]:
    """Return the answer to each of a request's queries."""
    _check_version(request, response)
    if request.fingerprint and response.fingerprint != request.fingerprint:
        raise BadAnswer(
            f"encoder {request.fingerprint} was asked for, and '{response.fingerprint:.40}' answered"
        )
    if len(response.retrievals) != queries:
        raise BadAnswer(f"{len(response.retrievals)} answers to {queries} queries")
    most = request.max_tags or float("inf")
    for answer in response.retrievals:
        if len(answer.neighbours) > request.k or len(answer.tags) > most:
            raise BadAnswer(
                f"{len(answer.neighbours)} neighbours and {len(answer.tags)} tags, more than were asked for"
            )
    return convert.retrievals_from_proto(response)


def tags(request: Any, response: Any) -> tuple[list[TagInfo], int]:
    """Return the tags of the ids that a request names, and their version."""
    _check_version(request, response)
    if [tag.tag_id for tag in response.tags] != list(request.tag_ids):
        raise BadAnswer("the tags are not those that were asked for")
    return convert.tags_from_proto(response), response.version


def page(request: Any, response: Any) -> tuple[list[TagInfo], int, int]:
    """Return a page of the vocabulary, the first id of the next page or 0, and the version."""
    _check_version(request, response)
    ids = [request.first_tag_id - 1, *(tag.tag_id for tag in response.tags)]
    if response.next_tag_id:
        ids.append(response.next_tag_id)
    # a page that does not lead on would be asked for without end
    if any(following <= tag_id for tag_id, following in pairwise(ids)) or (
        response.next_tag_id and not response.tags
    ):
        raise BadAnswer(f"the page from tag {request.first_tag_id} on is not in order of its ids")
    return convert.tags_from_proto(response), response.next_tag_id, response.version


def info(request: Any, response: Any) -> StoreInfo:
    """Return the description of a store."""
    _check_version(request, response.store)
    return convert.info_from_proto(response.store)


def _check_version(request: Any, response: Any) -> None:
    version = request.version or response.version
    if response.store != request.store or response.version != version or not version:
        asked = f"{request.store}@{request.version}" if request.version else request.store
        raise BadAnswer(f"{asked} was asked for, and '{response.store:.80}@{response.version}' answered")
