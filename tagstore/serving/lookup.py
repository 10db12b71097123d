"""Requests that are ready to be searched: several are searched at once, and each is answered in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from tagstore.errors import InvalidInput
from tagstore.retrieval.engine import Query
from tagstore.retrieval.tag_votes import Neighbours, RetrievalColumns
from tagstore.types import Search
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

PART_VALUES = 1 << 14
"""Neighbours and tags that are a message in memory before they become bytes: some megabytes."""
TEXT_CHARS = 64
"""Characters of captions that count as much as one of them."""


class Lookup(NamedTuple):
    """A request that is ready to be searched."""

    query: Query
    streamed: bool
    limit: int
    """Bytes of its answer, at most."""

    @staticmethod
    def find(lookups: Sequence[Lookup]) -> tuple[Query, list[Neighbours]]:
        """Find the neighbours of requests that differ in vectors and identities only, in one search."""
        query = Query.joined([lookup.query for lookup in lookups])
        return query, query.find()

    @staticmethod
    def answer(lookups: Sequence[Lookup], outcome: tuple[Query, list[Neighbours]]) -> list[bytes]:
        """Write the answer to each request. Raises `InvalidInput` for one that is too large."""
        query, neighbours = outcome
        answers = query.answers(neighbours)
        return [lookup.message(islice(answers, len(lookup.query.vectors))) for lookup in lookups]

    def message(self, answers: Iterable[RetrievalColumns]) -> bytes:
        """Write a message with the answers to this request's queries.

        It is written in parts: one after the other, the bytes of messages are those of the message that has
        the fields of all.
        """
        engine, search = self.query.engine, self.query.search
        parts: list[bytes] = []
        message, response = self._part()
        response.store, response.version = engine.store, engine.version.number
        response.fingerprint = engine.digest
        values = size = 0
        for answer in answers:
            _write(response.retrievals.add(), answer, search)
            values += len(answer.entry_ids) + len(answer.tag_ids)
            values += sum(len(caption) for captions in answer.captions for caption in captions) // TEXT_CHARS
            if values > PART_VALUES:
                parts.append(message.SerializeToString())
                size += len(parts[-1])
                if size > self.limit:
                    break
                message, response = self._part()
                values = 0
        data: bytes = message.SerializeToString()
        if parts:
            data = b"".join([*parts, data])
        if len(data) > self.limit:
            raise InvalidInput(
                f"the answer has more than {self.limit} bytes: send fewer queries at once, or ask for fewer "
                "neighbours, for `max_tags`, or for no texts"
            )
        return data

    def _part(self) -> tuple[pb.RetrieveStreamResponse | pb.RetrieveResponse, pb.RetrieveResponse]:
        if self.streamed:
            message = pb.RetrieveStreamResponse()
            return message, message.response
        response = pb.RetrieveResponse()
        return response, response


def _write(message: pb.Retrieval, answer: RetrievalColumns, search: Search) -> None:
    """Write an answer into a message, without the objects that `RetrievalColumns.retrieval` makes."""
    message.excluded = answer.excluded
    if search.with_neighbours:
        add_neighbour = message.neighbours.add
        for entry_id, key, similarity in zip(answer.entry_ids, answer.keys, answer.similarities, strict=True):
            add_neighbour(entry_id=entry_id, key=key, similarity=similarity)
        if answer.miner:
            message.miner = answer.miner
            for neighbour, captions in zip(message.neighbours, answer.captions, strict=True):
                neighbour.captions.extend(captions)
    add_tag = message.tags.add
    columns = zip(answer.tag_ids, answer.tag_similarities, answer.relevance, answer.carriers, strict=True)
    for place, (tag_id, similarity, relevance, carriers) in enumerate(columns):
        tag = add_tag(tag_id=tag_id, similarity=similarity, relevance=relevance, votes=len(carriers))
        if search.with_neighbours:
            tag.neighbours.extend(carriers)
        if search.with_texts:
            tag.tag, tag.kind = answer.texts[place], convert.KIND_TO_WIRE[answer.kinds[place]]
        if answer.mentions:
            positions = {answer.entry_ids[carrier]: carrier for carrier in carriers}
            tag.mentions.extend(convert.mentions_to_proto(answer.mentions[place], positions))
