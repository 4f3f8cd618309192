"""The regret meter: how far this node was from the clairvoyant optimum, by its own log and its own costs.

Covers: when the log is replayed, in a child process of low priority with a bound on its time, what memory
and costs it is told, and the last result. Does not cover: the log (``use_log``), the arithmetic
(``packer/regret.py``) or showing it (``reports``, ``metrics``).

Replaying 200,000 uses takes about a second of one core. It runs every hour, or when asked, at most once a
minute; a child that needs more than ``CPU_S_MAX`` is ended by the kernel. So it takes less than a part in a
hundred of one core, and only what nobody else wants (nice 19).
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import msgspec

from agent.child import ChildFailed, ask_child, module_command
from agent.use_log import UseColumns, UseLog
from packer import residency
from packer.estimate import expect_ms
from packer.ledger import Model, Node
from packer.regret import Costs, Memory
from packer.types import Tier
from packer.wire import RegretReport

log = logging.getLogger("bunk.regret")

EVERY_S = 3_600.0
# After a start the first one comes sooner: an operator who has just changed something wants to see it.
FIRST_S = 600.0
ASKED_PAUSE_S = 60.0
CPU_S_MAX = 30
# On a machine whose cores are all busy a child of the lowest priority may wait for long.
CHILD_TIMEOUT_S = 900.0
# Models whose expected restores make the node's mean costs: the last ones used, at some 15 microseconds each.
SAMPLED_MAX = 64
_ANSWER_CHARS_MAX = 4096


class ReplayFailed(Exception):
    """The child did not answer; the next hour tries again."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first line for the child; the columns follow as they are in memory."""

    uses: int
    sizes: list[int]
    memory: Memory
    costs: Costs


def question(columns: UseColumns, core: Node) -> bytes:
    """What the child is told: all that it needs, and no name of any tenant or model."""
    sizes = []
    for ref in columns.refs:
        model = core.models.get(ref)
        # What left the plan can not be priced any more; it is passed over like what never fits.
        sizes.append(model.spec.image_bytes if model is not None else 2**62)
    recent: dict[int, None] = {}
    for number in reversed(columns.models[-1_000:]):
        recent[number] = None
        if len(recent) >= SAMPLED_MAX:
            break
    models = [core.models[ref] for ref in (columns.refs[n] for n in recent) if ref in core.models]
    header = Header(len(columns.at_ms), sizes, _memory(core, models), _costs(core, models))
    parts = (columns.at_ms.tobytes(), columns.models.tobytes(), columns.cold_ms.tobytes())
    return b"".join([msgspec.json.encode(header), b"\n", *parts])


def _memory(core: Node, models: list[Model]) -> Memory:
    device_bytes = sum(d.account.limit_bytes or 0 for d in core.devices.values() if d.healthy)
    # In raw weights, so that both tiers are counted alike: what a copy stands for, by those that are known.
    known = [model for model in models if model.opened_bytes]
    raw, opened = (sum(m.spec.image_bytes for m in known), sum(m.opened_bytes for m in known))
    host_bytes = core.host.limit_bytes or 0
    return Memory(device_bytes, host_bytes * raw // opened if opened else host_bytes)


def _costs(core: Node, models: list[Model]) -> Costs:
    """The node's mean: what its own estimates expect of the models that it has used last."""
    nbytes = sum(model.spec.image_bytes for model in models)
    if not nbytes:
        return Costs(0.0, 0.0, 0.0)

    def per_byte(tier: Tier) -> float:
        whole = sum(expect_ms(core.learned, m.history, tier, m.spec.image_bytes) for m in models)
        return max(whole - fixed(tier) * len(models), 0.0) / nbytes

    def fixed(tier: Tier) -> float:
        return sum(expect_ms(core.learned, m.history, tier, 0) for m in models) / len(models)

    return Costs(min(fixed(Tier.HOST), fixed(Tier.DISK)), per_byte(Tier.HOST), per_byte(Tier.DISK))


async def replay(asked: bytes) -> RegretReport:
    """Ask a child. Ends it when the caller is cancelled. Raises ``ReplayFailed``."""
    command = module_command("agent.replay_uses", str(CPU_S_MAX))
    try:
        output = await ask_child(command, "the replay", CHILD_TIMEOUT_S, asked)
    except ChildFailed as error:
        raise ReplayFailed(str(error)) from error
    try:
        return msgspec.json.decode(output[:_ANSWER_CHARS_MAX], type=RegretReport)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ReplayFailed(f"the replay's answer: {error}") from None


class RegretMeter:
    """``ask`` is replaced in tests."""

    def __init__(
        self,
        uses: UseLog,
        core: Callable[[], residency.Node],
        wall_ms: Callable[[], int],
        every_s: float = EVERY_S,
        ask: Callable[[bytes], Awaitable[RegretReport]] = replay,
    ) -> None:
        self.last: RegretReport | None = None
        self._uses = uses
        self._core = core
        self._wall_ms = wall_ms
        self._every_s = every_s
        self._ask = ask
        self._asked = asyncio.Event()

    def look_now(self) -> None:
        """Somebody wants a fresh figure."""
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        await self._pause(min(FIRST_S, self._every_s))
        while True:
            await self.look()
            await asyncio.sleep(min(ASKED_PAUSE_S, self._every_s))
            await self._pause(self._every_s)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        self._asked.clear()

    async def look(self) -> None:
        """One replay of the log as it is now."""
        if not len(self._uses):
            return
        asked = question(self._uses.columns, self._core())
        try:
            found = await self._ask(asked)
        except ReplayFailed as error:
            log.warning("%s", error)
            return
        self.last = replace(found, at_ms=self._wall_ms())


def read_question(data: bytes) -> tuple[Header, array[int], array[int], array[int]]:
    """The other end of ``question``. Raises ``ValueError``."""
    line, newline, rest = data.partition(b"\n")
    if not newline:
        raise ValueError("no header")
    header = msgspec.json.decode(line, type=Header)
    columns = (array("q"), array("I"), array("Q"))
    if len(rest) != header.uses * sum(column.itemsize for column in columns):
        raise ValueError(f"{len(rest)} bytes are not {header.uses} uses")
    at = 0
    for column in columns:
        end = at + header.uses * column.itemsize
        column.frombytes(rest[at:end])
        at = end
    if header.uses and max(columns[1]) >= len(header.sizes):
        raise ValueError("uses of models that the header does not name")
    return header, *columns
