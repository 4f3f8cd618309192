"""What lies between a simulated node and the world: its uplink, its journal and its search for packs.

Covers: the real ones, over the simulated network and a simulated disk. Does not cover: the node itself
(``simulated_member``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from simulated_control import Disk, DiskFaults

from agent.journal import Journal, JournalFailed
from agent.peer_fetch import FetchedPack
from agent.sources import Sources
from agent.uplink import NODE, Uplink
from packer.control_answers import Answer
from packer.joining import Joining
from packer.types import ModelRef
from packer.wire import WIRE_VERSION, BoxFacts, JoinAnswer, JoinAsk, PeerSpec, decode

if TYPE_CHECKING:
    from simulated_member import Member

P = ParamSpec("P")
T = TypeVar("T")


class MemoryPath(type(Path())):  # type: ignore[misc]
    """``:memory:``, which has no mode to change."""

    def chmod(self, mode: int, **_: Any) -> None:
        pass


class Papers:
    """Stands in for ``packer.identity.Identity``: certificates are not of this world."""

    def __init__(self) -> None:
        self.answer: JoinAnswer | None = None
        self.token: str | None = None

    ca_sha256 = ""
    box = BoxFacts()

    def now_s(self) -> float:
        return 1_700_000_000 + asyncio.get_running_loop().time()

    def expired(self, margin_s: float = 0.0) -> bool:
        return False

    def renew_due(self) -> bool:
        return False

    def forget(self) -> None:
        self.answer = None

    def exists(self) -> bool:
        """As the token's file."""
        return self.token is not None


class SimulatedUplink(Uplink):
    """The real one over the simulated network."""

    def __init__(self, member: Member) -> None:
        papers = cast(Any, member.papers)
        super().__init__(cast(Any, member), papers, "", member.name, papers, member.shares)
        self.life = f"{member.name} {member.life}"
        self._member = member
        self.joining = SimulatedJoining(member, self._post_now)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        yield

    async def _post(self, path: str, message: object, timeout_s: float, connect_s: float) -> Answer:
        return Answer(*await self._member.network.to_control(self._member.name, path, message, timeout_s))


class SimulatedJoining(Joining):
    """One message, in place of a token's pin, a key and a certificate."""

    def __init__(self, member: Member, post: Callable[[str, object], Awaitable[Answer]]) -> None:
        papers = cast(Any, member.papers)
        super().__init__(NODE, papers, "", member.name, papers)
        self._member = member
        self._send = post

    async def _join(self, token_file: Path, gateway_url: str) -> None:
        papers = self._member.papers
        ask = JoinAsk(WIRE_VERSION, "", papers.token or "", "", self._member.name, gateway_url)
        answer = await self._send("/node/v1/join", ask)
        if answer.status >= 300:
            raise OSError(f"join: {answer.status}")
        papers.answer = decode(answer.body, JoinAnswer)
        papers.token = None


class SimulatedJournal:
    """The journal's thread: slow, and now and then its disk is full."""

    def __init__(self, journal: Journal, rng: Random, faults: DiskFaults) -> None:
        self.journal = journal
        self._disk = Disk(rng, faults, lambda: JournalFailed("no space"))

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._disk.call(partial(function, *args, **kwargs))


class SimulatedSources(Sources):
    """The real search for packs; bytes come over the simulated network."""

    def __init__(self, member: Member) -> None:
        nothing = cast(Any, SimpleNamespace(refuse=lambda ref, peers: None))
        super().__init__(
            member.uplink.sources, nothing, nothing, nothing, lambda: 0, lambda ref: ref in member.planned
        )
        self._member = member

    async def _fetch_from(
        self, ref: ModelRef, peers: Sequence[PeerSpec], limit_bytes: int
    ) -> FetchedPack | None:
        return await self._member.fetch(ref, [peer.node for peer in peers], limit_bytes)
