"""Writes a store's tags into requests. What cannot be tagged stays as it was, to the byte, and says why."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from tagstore.errors import InvalidInput, TagstoreError, TimedOut
from tagstore.types import Retrieval
from tuna_model.inference.tag_style import TagStyle
from tuna_model.proxy.apis import Api, Fields
from tuna_model.proxy.lookup import Lookup
from tuna_model.proxy.settings import ProxySettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tagged:
    """A request, and what was done to it."""

    fields: Fields | None = None
    """The new request; None if it stays as it was."""
    tags: tuple[str, ...] = ()
    """All tags that were written, in their order."""
    store: str = ""
    """NAME@VERSION that they come from."""
    degraded: str = ""
    """Why a request with pictures got no tags: deadline, unavailable, picture, pictures, address."""


UNTOUCHED = Tagged()


class Tagger:
    """Tags requests as the settings say. To be used in one event loop."""

    def __init__(self, settings: ProxySettings) -> None:
        """Raises `InvalidInput` for a store's URL that means nothing."""
        self.settings = settings
        self.lookup = Lookup(
            settings.stores, neighbours=settings.neighbours, deadline=settings.deadline,
            cache_entries=settings.cache_entries, cache_seconds=settings.cache_seconds,
        )  # fmt: skip

    async def tag(self, fields: Fields, api: Api, store: str = "") -> Tagged:
        """Write the tags of its pictures into a request, which is not changed itself.

        Args:
            store: name of the store to ask; the default one if empty.
        """
        try:
            pictures = api.pictures(fields)
        except InvalidInput as error:
            return _degraded("address" if "address" in str(error) else "picture", error)
        if not pictures:
            return UNTOUCHED
        if len(pictures) > self.settings.max_pictures:
            return Tagged(degraded="pictures")
        try:
            answers = await self.lookup([picture.data for picture in pictures], store)
        except InvalidInput as error:  # over gRPC a bad image is one of these
            return _degraded("picture", error)
        except TimedOut as error:
            return _degraded("deadline", error)
        except TagstoreError as error:
            return _degraded("unavailable", error)
        except Exception as error:
            log.error("a lookup failed", exc_info=error)
            return Tagged(degraded="unavailable")
        if any(answer.degraded for answer in answers):
            return Tagged(degraded="unavailable")
        style = self.settings.style_of(str(fields.get("model", "")))
        return self._write(fields, api, style, [picture.turn for picture in pictures], answers)

    def _write(
        self, fields: Fields, api: Api, style: TagStyle, turns: Sequence[int], answers: Sequence[Retrieval]
    ) -> Tagged:
        """Write tags into a copy of the request."""
        fields = deepcopy(fields)
        given = [style.choose(answer) for answer in answers]
        texts: dict[int, list[str]] = {}
        for turn, line in zip(turns, style.lines(given), strict=True):
            if line:
                texts.setdefault(turn, []).append(line)
        if style.place == "system" and texts:
            api.add_to_system(fields, "\n".join(line for lines in texts.values() for line in lines))
        else:
            for turn, lines in texts.items():
                api.add_to_turn(fields, turn, "\n".join(lines))
        if style.text_only:
            api.leave_pictures_out(fields)
        return Tagged(
            fields,
            tuple(text for tags in given for text in tags.texts),
            f"{answers[0].store}@{answers[0].version}",
        )

    async def tag_body(self, body: bytes, api: Api, store: str = "") -> tuple[bytes, Tagged]:
        """Tag a request's body. One that is no JSON object is left to the upstream."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return body, UNTOUCHED
        if not isinstance(fields, dict):
            return body, UNTOUCHED
        tagged = await self.tag(fields, api, store)
        if tagged.fields is None:
            return body, tagged
        return json.dumps(tagged.fields, ensure_ascii=True).encode(), tagged

    async def close(self) -> None:
        await self.lookup.close()


def _degraded(reason: str, error: Exception) -> Tagged:
    log.info("a request is forwarded without tags (%s): %s", reason, error)
    return Tagged(degraded=reason)
