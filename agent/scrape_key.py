"""The key by which a node knows its operator's scraper: who has it sees figures of tenants at ``/metrics``.

Covers: making it at the first start and comparing it. Does not cover: who may see what without it
(``guard``), or which figures are of tenants (``metrics``).

It lies in the data directory, readable by the agent's user only. A new one is made when the file is gone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from packer.durable import write_private

FILE = "metrics.key"
PREFIX = "bm_"
# A key is 46 characters; a file of another kind is not taken for one.
CHARS_MIN, CHARS_MAX = 32, 256


class BadScrapeKey(OSError):
    """The file is there and holds no key."""


class ScrapeKey:
    """Compares without telling how much was right."""

    def __init__(self, text: str) -> None:
        self._sha256 = _digest(text)

    def matches(self, text: str | None) -> bool:
        return text is not None and hmac.compare_digest(_digest(text), self._sha256)


def scrape_key(data_dir: Path) -> ScrapeKey:
    """The key of this node, made now if there is none. Raises ``BadScrapeKey`` and other ``OSError``."""
    path = data_dir / FILE
    if not path.exists():
        write_private(path, f"{PREFIX}{secrets.token_urlsafe(32)}\n".encode())
    text = path.read_text(errors="replace").strip()
    if not CHARS_MIN <= len(text) <= CHARS_MAX or not text.isascii():
        raise BadScrapeKey(f"{path} holds no key; delete it and a new one is made at the next start")
    return ScrapeKey(text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()
