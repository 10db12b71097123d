"""Filters by metadata: what a caller's value is on the wire, and which entries have it.

A value travels as text: a text as it is, everything else as JSON writes it. A stored value fits if its text
is the same; a number if it is equal (640 fits 640.0), and a list if one of its elements fits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from tagstore.errors import InvalidInput

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
MAX_NUMBER = 400
"""Characters of a number; the longest finite float has 309 before its point."""
NUMBER_DIGITS = 15
"""Digits of the largest whole number that JSON writes the same way as a float and as an integer."""


def filter_texts(where: Mapping[str, Any]) -> dict[str, str]:
    """The values of a filter as they travel.

    Raises:
        InvalidInput: a value is neither text, number, boolean nor None (null); the field is named.
    """
    if not isinstance(where, Mapping):
        raise InvalidInput(
            f"where is {type(where).__name__}: give fields and their values, {{'split': 'train'}}"
        )
    return {_name(name): _text(name, value) for name, value in where.items()}


def _name(name: object) -> str:
    if isinstance(name, str):
        return name
    raise InvalidInput(f"where names the field {name!r}: names are text")


def _text(name: str, value: object) -> str:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # of NumPy and torch
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    raise InvalidInput(
        f"where: the value of '{name}' is {type(value).__name__} ({str(value)[:40]}): give text, a finite "
        "number, true, false or null; an entry whose value is a list fits if one of its elements is it"
    )


def fits(metadata: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    """Whether metadata has all the values of a filter. A field that is missing fits nothing."""
    return all(name in metadata and _value_fits(metadata[name], text) for name, text in where.items())


def _value_fits(value: object, text: str) -> bool:
    if isinstance(value, list):
        return any(_value_fits(element, text) for element in value)
    if isinstance(value, str):
        return value == text
    if isinstance(value, bool) or value is None:
        return json.dumps(value) == text
    if isinstance(value, int | float):
        return value == _number(text)
    return False


def _number(text: str) -> int | float | None:
    if len(text) > MAX_NUMBER or not _NUMBER.fullmatch(text):
        return None
    return float(text) if set(text) & set(".eE") else int(text)


def needle(text: str) -> bytes:
    """Bytes that the JSON of metadata must hold if a value of it fits; empty where that is not known."""
    number = _number(text)
    if isinstance(number, float) and not number.is_integer():
        return b""
    if number is not None:
        plain = abs(number) < 10**NUMBER_DIGITS and text == str(int(number))
        return text.encode() if plain else b""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "replace")
