"""Keys that have shown their secret, by the text that callers send.

Covers: asking for the secret's hash once per key instead of once per request. Does not cover: what a key's
text is made of and the check itself (``packer/http.py``), or tickets (``agent/credentials.py``).

A text stands for the very record that it proved: as soon as the key is revoked or changed it is checked anew.
A look-up compares texts only after their hashes, which are keyed, so that it tells a stranger nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from packer.http import check_key
from packer.types import KeySpec

# The oldest go first; about 200 bytes each.
TEXTS_MAX = 4_096


class KnownKeys:
    """Texts that proved a key."""

    def __init__(self) -> None:
        self._proven: dict[str, KeySpec] = {}

    def check(self, keys: Mapping[str, KeySpec], text: str, now_ms: int) -> KeySpec | None:
        """As ``check_key``."""
        known = self._proven.get(text)
        if known is not None and keys.get(known.key_id) is known:
            return None if known.expires_ms is not None and now_ms >= known.expires_ms else known
        key = check_key(keys, text, now_ms)
        if key is not None:
            self._proven.pop(text, None)
            while len(self._proven) >= TEXTS_MAX:
                del self._proven[next(iter(self._proven))]
            self._proven[text] = key
        return key
