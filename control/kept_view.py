"""What a router was told, on its disk: one that is started while control is away routes as it did before.

Covers: the file, what of it is refused, and when it is written. Does not cover: what is in it
(``control.router_view``), or when it is taken up (``control.router_process``).

The file is sealed with a key that only this router's own key leads to: what another one kept, what was cut,
and what somebody wrote there without the router's key count as nothing. It holds what the router was told and
no more: of keys the hashes alone.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from control.ca import CLOCK_SKEW, NODE_CERTIFICATE_LIFE
from control.router_view import RouterView, Snapshot
from control.router_wire import Told
from packer.durable import write_private
from packer.identity import Identity
from packer.wire import MESSAGE_BYTES_MAX, WIRE_VERSION, BadMessage, decode, encode

log = logging.getLogger("bunk.router")

T = TypeVar("T")

FILE_NAME = "view.kept"
# A certificate that a router had when it heard this has ended by then, and nodes let it in no more.
AGE_MS_MAX = round(NODE_CERTIFICATE_LIFE.total_seconds() * 1000)
# A clock that was set back makes a view younger than it is; by more than this nobody knows how old it is.
AHEAD_MS_MAX = round(CLOCK_SKEW.total_seconds() * 1000)
# What a router forgets when it is killed: no more than this, or a hundred times as long as writing takes.
KEEP_EVERY_S = 10.0
KEEP_SHARE = 100
# A view that does not change is written anew so often, so that its age is right: 1 in 24 of its life.
STAMP_EVERY_MS = 3_600_000
# Heard so much later than what is kept says is no news at a stop: nothing was heard since.
STOP_STAMP_MS = 1_000
# As one message of control may be: 200,000 words. A larger view is not kept.
VIEW_BYTES_MAX = MESSAGE_BYTES_MAX
_SEAL_CHARS = 64


class BadView(Exception):
    """What was kept can not be used; the text says why."""


@dataclass(frozen=True, slots=True)
class KeptView:
    """``heard_ms``: by this box's clock, when this was all that control knew. ``control_at``: its address
    then, which stands for nodes on its own machine."""

    version: int
    cluster: str
    router: str
    heard_ms: int
    control_at: str
    epoch: int
    seq: int
    words: tuple[Told, ...]


def sealed(kept: KeptView, key: bytes) -> bytes:
    """The file's text. Raises ``BadView`` when it would be too large."""
    body = encode(kept)
    if len(body) > VIEW_BYTES_MAX:
        raise BadView(f"it has {len(body)} bytes, more than {VIEW_BYTES_MAX}")
    return hmac.digest(key, body, "sha256").hex().encode() + b"\n" + body


def opened(data: bytes, key: bytes, cluster: str, router: str, now_ms: int) -> KeptView:
    """What a file says that this router may use now. Raises ``BadView``."""
    seal, body = data[:_SEAL_CHARS], data[_SEAL_CHARS + 1 :]
    if not hmac.compare_digest(seal, hmac.digest(key, body, "sha256").hex().encode()):
        raise BadView("it was not written by this router, or was changed since")
    try:
        kept = decode(body, KeptView)
    except BadMessage as error:
        raise BadView(f"it is of another release ({str(error)[:200]})") from None
    if (kept.cluster, kept.router) != (cluster, router):
        raise BadView(f"it is of router {kept.router} of cluster {kept.cluster}")
    age_ms = now_ms - kept.heard_ms
    if age_ms > AGE_MS_MAX:
        raise BadView(f"it is {age_ms / 3_600_000:.0f} hours old, more than {AGE_MS_MAX // 3_600_000}")
    if age_ms < -AHEAD_MS_MAX:
        raise BadView(
            f"it was written {-age_ms / 60_000:.0f} minutes from now by this box's clock, which was set back"
        )
    return kept


def read_file(path: Path) -> bytes:
    """Raises ``BadView``, ``FileNotFoundError`` and other ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadView("it is no regular file")
        limit = VIEW_BYTES_MAX + _SEAL_CHARS + 1
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadView(f"it has more than {limit} bytes")
    return data


class ViewKeeper:
    """Of one router, in its data directory. ``age_ms``: how old what it knows is now. One thread reads and
    writes, so that nothing older is written over something newer."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        view: RouterView,
        age_ms: Callable[[], int],
        control_at: Callable[[], str],
    ) -> None:
        self.path = folder / FILE_NAME
        self._identity = identity
        self._view = view
        self._age_ms = age_ms
        self._control_at = control_at
        self._thread = ThreadPoolExecutor(1, "router-view")
        self._next_s = 0.0
        self._kept_changes = 0
        self._kept_heard_ms = 0
        self._complaint = ""  # of the disk, said once
        self._closed = False

    def _now_ms(self) -> int:
        return round(self._identity.now_s() * 1000)

    # --- writing ---

    async def look(self) -> None:
        """To be called every second: write, if it is time."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        if begun_s >= self._next_s and self._has_news(STAMP_EVERY_MS):
            await self.keep()
            self._next_s = loop.time() + max(KEEP_EVERY_S, (loop.time() - begun_s) * KEEP_SHARE)

    def _has_news(self, stamp_ms: int) -> bool:
        """Whether control has said something that is not on disk; or was heard so long after it was."""
        if not self._view.is_ready or self._view.is_kept:
            return False
        heard_ms = self._now_ms() - self._age_ms()
        return self._view.changes != self._kept_changes or heard_ms - self._kept_heard_ms >= stamp_ms

    async def keep(self) -> None:
        """Write what the router knows now. Who has no identity keeps nothing; a disk that does not take it
        keeps nobody from routing."""
        mine = self._identity.answer
        if mine is None:
            return
        changes, heard_ms = self._view.changes, self._now_ms() - self._age_ms()
        snapshot, control_at = self._view.snapshot(), self._control_at()

        def write() -> None:
            kept = _kept(snapshot, mine.cluster, mine.node, heard_ms, control_at)
            write_private(self.path, sealed(kept, self._identity.secret_for("kept view")))

        try:
            await self._in_thread(write)
        except (OSError, ValueError, BadView) as error:
            if str(error) != self._complaint:
                log.warning("what control said is not kept in %s: %s", self.path, error)
            self._complaint = str(error)
            return
        self._kept_changes, self._kept_heard_ms, self._complaint = changes, heard_ms, ""

    async def close(self) -> None:
        """At an orderly stop: nothing that was heard is missing."""
        if not self._closed and self._has_news(STOP_STAMP_MS):
            await self.keep()
        self._closed = True
        self._thread.shutdown()

    async def forget(self) -> None:
        """This router is none any more."""
        with suppress(OSError):
            await self._in_thread(lambda: self.path.unlink(missing_ok=True))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # --- reading ---

    async def load(self) -> KeptView | None:
        """What may be used; None, and why in the log."""
        mine = self._identity.answer
        if mine is None:
            return None

        def read() -> KeptView:
            data = read_file(self.path)
            key = self._identity.secret_for("kept view")
            return opened(data, key, mine.cluster, mine.node, self._now_ms())

        try:
            return await self._in_thread(read)
        except FileNotFoundError:
            log.warning("control does not answer, and nothing is kept of what it said before")
        except (OSError, ValueError, BadView) as error:
            log.warning("control does not answer, and what is kept in %s is not used: %s", self.path, error)
        return None


def _kept(snapshot: Snapshot, cluster: str, router: str, heard_ms: int, control_at: str) -> KeptView:
    words = tuple(snapshot.words())
    return KeptView(WIRE_VERSION, cluster, router, heard_ms, control_at, snapshot.epoch, snapshot.seq, words)
