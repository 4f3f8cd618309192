"""Pieces that break JSON, or change what it says, when they are put into a valid body.

Covers: the list. Does not cover: where they are put (``test_gateway_bodies``, ``test_oip_bodies``).
"""

from __future__ import annotations

JSON_PIECES = (
    *(b"\x00", b"\xff", b"[", b"]", b"{", b"}", b'"', b",", b":", b"-"),
    *(b"1e9", b"null", b"\\ud800"),
)
