"""What control answers to the node: read whole and within a limit, and how it says no.

Covers: an answer's body and the code and text of a refusal. Does not cover: what an answer means
(``agent/uplink.py``, ``agent/shares.py``).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import msgspec

from packer.wire import MESSAGE_BYTES_MAX, BadMessage

ERROR_BYTES_MAX = 16 * 1024  # errors of control are some hundred bytes
CODE_CHARS_MAX, TEXT_CHARS_MAX = 64, 500  # of them that are kept or logged


@dataclass(frozen=True, slots=True)
class Answer:
    """What control said to one message."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class _Said:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class _ErrorAnswer:
    """How control says no."""

    error: _Said


async def read_answer(answer: aiohttp.ClientResponse, bytes_max: int = MESSAGE_BYTES_MAX) -> Answer:
    """The whole answer, in however many pieces it comes. Raises ``BadMessage`` when it is above the limit,
    and ``aiohttp.ClientError`` when it breaks off."""
    pieces: list[bytes] = []
    left = bytes_max
    while piece := await answer.content.readany():
        left -= len(piece)
        if left < 0:
            raise BadMessage(f"control's answer is above the limit of {bytes_max} bytes")
        pieces.append(piece)
    return Answer(answer.status, b"".join(pieces))


def refusal_of(body: bytes) -> tuple[str, str]:
    """The code and the message of an answer that refuses; the code is empty when it has none."""
    try:
        said = msgspec.json.decode(body[:ERROR_BYTES_MAX], type=_ErrorAnswer).error
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError):
        return "", text_of(body)
    return said.code[:CODE_CHARS_MAX], said.message[:TEXT_CHARS_MAX]


def text_of(body: bytes) -> str:
    """The beginning of a body for people to read, or its size."""
    with suppress(UnicodeDecodeError):
        return body[:TEXT_CHARS_MAX].decode()
    return f"{len(body)} bytes"
