"""What the JSON decoder complains of, in the words that all other refusals have.

Covers: where it is, limits of numbers and lengths, wrong types, unknown fields. Does not cover: decoding, or
missing fields (``http.decode_json``); what is not known here is passed on as the decoder said it.
"""

from __future__ import annotations

import re

_AT = re.compile(r" - at `\$\.?(.*)`$")
_LIMIT = re.compile(r"Expected `(\w+)` (of length )?(<=|>=|<|>) (\S+)")
_TYPE = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "array": "a list",
    "object": "an object",
    "bool": "true or false",
    "null": "null",
}
_UNITS = {"str": "characters", "array": "items", "object": "members"}
_BOUNDS = {"<=": "at most", ">=": "at least", "<": "below", ">": "above"}


def told(message: str) -> tuple[str, str]:
    """Where in the value it is (nothing: all of it), and what is wrong there."""
    at = _AT.search(message)
    # The decoder does not say which key of a map it was.
    where = at[1].partition("[...]")[0] if at else ""
    return where, in_words(message[: at.start()] if at else message)


def in_words(message: str) -> str:
    """The decoder's message as a sentence about the field before it."""
    if match := _LIMIT.fullmatch(message):
        kind, length, sign, limit = match.groups()
        bound = f"{_BOUNDS[sign]} {limit}"
        if not length:
            return f"must be {_kind(kind)}, {bound}."
        unit = _UNITS.get(kind, "items")
        return f"must be {_kind(kind)} of {bound} {unit[:-1] if limit == '1' else unit}."
    if match := _TYPE.fullmatch(message):
        wanted = " or ".join(_kind(each) for each in match[1].split(" | "))
        return f"must be {wanted}, not {_kind(match[2])}."
    if match := _UNKNOWN.fullmatch(message):
        return f"there is no field {match[1]!r}."
    return message


def _kind(name: str) -> str:
    return _KINDS.get(name, name)
