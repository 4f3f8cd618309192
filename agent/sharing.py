"""A node's part in sharing packs: a listener for other nodes, fetching from them, and what binds both to it.

Covers: start and stop, taking up plans and certificates, the packs and keys that may be given away. Does not
cover: the protocol (``agent/peers.py``, ``agent/peer_fetch.py``) or where a pack comes from
(``agent/sources.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress

from agent.config import AgentConfig
from agent.journal import JournalFailed
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.peer_fetch import PeerFetch
from agent.peers import Allowed, PeerServer
from agent.sources import AskControl, Sources
from packer.identity import Identity
from packer.seal import BadSeal
from packer.types import ModelRef, OriginFile
from packer.wire import Plan

log = logging.getLogger("bunk.peers")

# A journal that does not answer in this time hangs on its disk; the other node asks somebody else.
KEY_WAIT_S = 5.0


class Sharing:
    """``start`` before use, ``close`` before the journal is closed. ``note`` records what was given away."""

    def __init__(
        self,
        config: AgentConfig,
        identity: Identity,
        ask: AskControl | None,
        packs: PackDirectory,
        journal: JournalThread,
        clock_ms: Callable[[], int],
        note: Callable[[str, ModelRef, str], None],
    ) -> None:
        self._config = config
        self._identity = identity
        self._packs = packs
        self._journal = journal
        self._note = note
        self._versions: frozenset[ModelRef] = frozenset()
        self._files: dict[ModelRef, Sequence[OriginFile]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: PeerServer | None = None
        self.fetch = PeerFetch(identity)
        self.sources = Sources(ask, self.fetch, packs, journal, clock_ms, lambda ref: ref in self._versions)
        self.sources.note = note
        self.sources.files_of = lambda ref: self._files.get(ref)
        self.peer_url = ""

    @property
    def served_bytes(self) -> int:
        return self._server.served_bytes if self._server is not None else 0

    @property
    def fetched_bytes(self) -> int:
        return self.fetch.fetched_bytes

    def start(self) -> None:
        """Listen, if this node shares. A port that is taken is no reason not to serve tenants."""
        self._loop = asyncio.get_running_loop()
        where = self._config.peer_listen
        if where is None or self._config.control_url is None:
            return
        server = PeerServer(*where, self, self._config.peer_rate_bytes_s)
        try:
            port = server.start()
        except OSError as error:
            log.error("--peer-listen %s:%d: %s; this node gives no packs to others", *where, error.strerror)
            return
        self._server = server
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
        self.peer_url = self._config.peer_url or f"https://{host}:{port}"
        log.info("packs for other nodes at %s", self.peer_url)
        self._identity.watch(self._certified)
        self._certified()

    def _certified(self) -> None:
        if self._server is not None:
            self._server.certify(self._identity)

    def planned(self, plan: Plan) -> None:
        """A plan is in force: its nodes may ask, for its versions."""
        self._files = {spec.ref: spec.files for spec in plan.models}
        self._versions = frozenset(self._files)
        if self._server is not None:
            nodes = {peer.node: peer.key_sha256 for peer in plan.peers if peer.node != plan.node}
            self._server.allow(Allowed(nodes, self._versions))

    async def close(self) -> None:
        self._identity.unwatch(self._certified)
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
        await self.sources.close()

    # --- what the listener asks, on its threads (``agent.peers.PackStore``) -----------------------

    def open(self, ref: ModelRef, base: int | None = None) -> int:
        return self._packs.open(ref) if base is None else self._packs.open_base(ref, base)

    def data_key(self, ref: ModelRef) -> bytes | None:
        assert self._loop is not None
        asked = self._journal.call(self._journal.journal.data_key, ref)
        with suppress(JournalFailed, BadSeal, NoAnswer, RuntimeError):  # RuntimeError: the node stops
            return asyncio.run_coroutine_threadsafe(asked, self._loop).result(KEY_WAIT_S)
        return None

    def gave_key(self, ref: ModelRef, node: str) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note, "pack_shared", ref, f"its key to node {node}")
