"""The state of the control server: what is in memory, the writer thread, long polls.

Covers: owning the catalog and the cluster core, making changes durable before they are visible, waking long
polls, sweeping. Does not cover: records on their way to disk (``control.record_desk``), the listeners
(``control.server``), what each route does (``control.routes``), the tables (``control.store``), or
decisions about the fleet (``control.cluster``).

One event loop owns all state in memory. Writes go through one thread; whoever changes something holds
``writing`` from its check to its change, so that two callers can not both pass the same check.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from control import cluster as fleet
from control import copies, rooms
from control.authority import Authority
from control.boxes import Boxes
from control.catalog import (
    AgeUsage,
    Change,
    DropReplays,
    DropToken,
    DropUpload,
    Joiner,
    KeyRow,
    PutKey,
    UploadRow,
    changes_plan,
)
from control.config import Config
from control.feed_desk import FeedDesk
from control.idempotency import LIFE_MS, Turns
from control.model_store import ModelStore
from control.node_session import open_session
from control.node_tls import ControlPapers, NodeLines
from control.plan_making import PlanFacts, PlanMaker
from control.questions import Questions
from control.record_desk import RecordDesk
from control.ref_lock import RefLock
from control.router_wire import RouterAsk
from control.routers_said import RoutersSaid
from control.routing import Routing, wall_ms
from control.said import Said
from control.share_desk import ShareDesk
from control.shares import Ticked as SharesTicked
from control.shown import ShownCertificates
from control.store import Acked, Meta, SpooledRecords, Store, StoreUnavailable
from control.ticket_office import TicketOffice
from packer.durable import write_private
from packer.http import make_key
from packer.types import ModelRef
from packer.usage import day_of
from packer.wire import Beat, BeatAnswer, Plan, PlanNumber, Record

log = logging.getLogger("bunk.control")

T = TypeVar("T")

SWEEP_EVERY_MS = 600_000
# Requests that are being answered may take this long to end at an orderly stop.
STOP_S = 10.0
# Model directories hashed at one time; each is one busy core.
EXAMINATIONS_MAX = 2
# A restored backup may be behind its nodes' plans by some starts of control, never by thousands.
EPOCH_LEAP_MAX = 1_000
# Each leap makes every plan anew and sends it to all. One is enough after a backup was put back; a second is
# for a node that saw more. Who claims to have seen more and more does not keep the whole fleet busy.
EPOCH_LEAP_PAUSE_MS = 60_000
EPOCH_LEAPS_MAX = 4


class AlreadyRunning(Exception):
    """Another control server uses this data directory."""


class Control(Routing):
    """Everything that routes act on. Made by ``start``, given back by ``close``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.writing = asyncio.Lock()
        self.turns = Turns()
        self.examinations = asyncio.Semaphore(EXAMINATIONS_MAX)
        self.upload_dir = config.data_dir / "uploads"
        self.models = ModelStore(config.data_dir / "models")
        self.busy_parts: set[tuple[str, int]] = set()
        self.touched_ms: dict[str, int] = {}  # when each upload was last written to
        self._leapt_ms: list[int] = []
        self._ref_locks: dict[ModelRef, tuple[asyncio.Lock, int]] = {}
        self._writer = ThreadPoolExecutor(1, "control-writer")
        self._reader = ThreadPoolExecutor(1, "control-reader")
        self._usage_aged = 0  # the day on which old usage was looked at
        self._polls: dict[str, asyncio.Future[bool]] = {}
        # By version: set when those who wait for a pack of it must ask again. No more than there are turns.
        self._source_waits: dict[ModelRef, asyncio.Event] = {}
        self._background: list[asyncio.Task[None]] = []
        self.questions = Questions(self._end_poll, self.now_ms)
        self._plans = PlanMaker(lambda: self.catalog)
        self.shares = ShareDesk(self.now_ms, self._end_poll)
        self.said = Said()
        self.boxes = Boxes(lambda: self.start_name)  # of nodes
        self.records = RecordDesk(lambda: self.catalog, self._write_records, self.wall_ms, self.log_fault)
        self.feed = FeedDesk(lambda: self.catalog, self.cluster, self.now_ms)
        self.routers = RoutersSaid(lambda: self.start_name)
        self.start_name = secrets.token_hex(8)
        self.ticket_keys: tuple[str, ...] = ()
        # Set by start().
        self.meta: Meta
        self.authority: Authority
        self.tickets: TicketOffice
        self.shown: ShownCertificates
        self._store: Store
        self._read_store: Store
        self._lock_file: int
        self._sweep_at_ms: int

    # --- life ---

    async def start(self) -> None:
        """Open the data directory, raise the epoch, load everything, sweep what a crash left."""
        folder = self.config.data_dir
        for path in (folder, self.upload_dir):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = lock_data_dir(folder)
        path = folder / "control.db"
        self._store = await self._on(self._writer, lambda: Store(path))
        self.meta = await self._on(self._writer, lambda: self._store.start(secrets.token_hex(8)))
        self.catalog = await self._on(self._writer, self._store.load)
        self._read_store = await self._on(self._reader, lambda: Store(path))
        self.authority = Authority(folder, self.meta.cluster)
        if self.authority.found:
            log.error("%s", self.authority.found)
            self.record("ca_broken", detail=self.authority.found)
        self.lines = NodeLines(
            ControlPapers(self.authority), lambda: self.catalog, self.cluster, plain=self.config.plain_routes
        )
        self.shown = ShownCertificates(self.authority, self.config, self.lines, self.now_ms())
        self.tickets = TicketOffice(folder, self.meta.cluster)
        self.ticket_keys = self.tickets.public_keys
        await self._ensure_operator()
        await asyncio.to_thread(self._sweep_files)
        self.remember_nodes()
        self.session = open_session()
        self.run_background()

    def remember_nodes(self) -> None:
        """After a start the cluster core knows who exists and the number of the plan, and nothing else."""
        for row in self.catalog.nodes.values():
            self.act(fleet.step(self.cluster, fleet.NodeJoined(row.node, row.gateway_url), self.now_ms()))
        self.cluster.newest = (self.meta.epoch, self.meta.seq)
        self.shares.open(self.start_name, self.catalog.nodes)

    def run_background(self) -> None:
        self._sweep_at_ms = self.now_ms() + SWEEP_EVERY_MS
        each_second: dict[str, Callable[[], Awaitable[None] | None]] = {
            "nodes": self._tick_nodes,
            "shares": self._tick_shares,
            "sweep": self._sweep_if_due,
            "certificates": self._tick_papers,
        }
        self._background = [
            asyncio.create_task(self.records.run()),
            asyncio.create_task(self.each_second(each_second)),
        ]

    async def close(self) -> None:
        """Stop in order: polls are answered by then, what is kept runs out, records are stored."""
        self.stopping = True
        if self._kept:
            await asyncio.wait(self._kept, timeout=STOP_S)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        with suppress(StoreUnavailable):
            await self.records.flush()
        await self.session.close()
        await self._on(self._reader, self._read_store.close)
        await self._on(self._writer, self._store.close)
        self._reader.shutdown()
        self._writer.shutdown()
        os.close(self._lock_file)

    async def _ensure_operator(self) -> None:
        """On the first start: an operator key whose text is written to one private file."""
        if any(row.tenant is None for row in self.catalog.keys.values()):
            return
        key = make_key()
        row = KeyRow(key.key_id, key.secret_sha256, None, "first operator key", wall_ms(), None)
        # The file first: a key in the database that nobody knows would be of no use.
        write_private(self.config.data_dir / "operator.key", f"{key.text}\n".encode())
        async with self.writing:
            await self.write([PutKey(row)])

    def _sweep_files(self) -> None:
        for ref in self.models.sweep(set(self.catalog.models)):
            log.warning("removed files of %s, which no version claims", ref)
        for folder in self.upload_dir.iterdir():
            row = self.catalog.uploads.get(folder.name)
            if row is None or row.committed:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self.touched_ms[folder.name] = max(
                    int(path.stat().st_mtime * 1000) for path in (folder, *folder.iterdir())
                )

    # --- threads and tasks ---

    async def _on(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call)

    async def read(self, call: Callable[[Store], T]) -> T:
        """Ask the database something on the reader's thread."""
        return await self._on(self._reader, lambda: call(self._read_store))

    # --- changes ---

    async def write(self, changes: Sequence[Change]) -> None:
        """Make changes durable, then visible, then known to nodes. The caller holds ``writing``."""
        assert self.writing.locked()
        await asyncio.shield(asyncio.ensure_future(self._write(changes)))

    async def _write(self, changes: Sequence[Change]) -> None:
        news = any(changes_plan(change) for change in changes)
        seq = self.meta.seq + 1 if news else self.meta.seq
        await self._on(self._writer, lambda: self._store.write(changes, seq))
        for change in changes:
            self.catalog.apply(change, seq)
        self.feed.note(changes)
        if news:
            self.meta = replace(self.meta, seq=seq)
            self.act(fleet.step(self.cluster, fleet.Changed(self.meta.epoch, seq), self.now_ms()))

    def is_behind(self, have: PlanNumber) -> bool:
        """Does a node have a plan that this control did not make and could not overtake by counting on?"""
        if have.epoch != self.meta.epoch:
            return have.epoch > self.meta.epoch
        return have.seq > self.meta.seq or have.start not in ("", self.start_name)

    async def leap_epoch(self, have: PlanNumber) -> bool:
        """A node has a plan that is not of this control's making: this database is a backup that was put
        back, and counts numbers again that were counted before it was lost. Overtake them."""
        async with self.writing:
            if not self.is_behind(have):
                return True
            if have.epoch - self.meta.epoch > EPOCH_LEAP_MAX or not self._may_leap():
                return False
            log.warning("a node has a plan of epoch %d, this is %d: overtaking", have.epoch, self.meta.epoch)
            self.meta = await self._on(
                self._writer, lambda: self._store.start(self.meta.cluster, have.epoch + 1)
            )
            changed = fleet.Changed(self.meta.epoch, self.meta.seq)
            self.act(fleet.step(self.cluster, changed, self.now_ms()))
            return True

    def _may_leap(self) -> bool:
        now_ms = self.now_ms()
        self._leapt_ms = [each for each in self._leapt_ms if now_ms - each < EPOCH_LEAP_PAUSE_MS]
        if len(self._leapt_ms) >= EPOCH_LEAPS_MAX:
            return False
        self._leapt_ms.append(now_ms)
        return True

    def ref_lock(self, ref: ModelRef) -> RefLock:
        """Held while a version's files are written or removed."""
        return RefLock(self._ref_locks, ref)

    def plan_for(self, node: str, have_peers: str = "") -> Plan:
        """The newest plan. Every node is told of everything; placement is not control's yet."""
        meta = self.meta
        facts = PlanFacts(meta.cluster, meta.epoch, meta.seq, self.start_name, self.ticket_keys)
        return self._plans.make(facts, node, have_peers, self.wall_ms())

    def encode_answer(self, answer: BeatAnswer) -> bytes:
        """See ``PlanMaker.encode``."""
        return self._plans.encode(answer)

    # --- nodes ---

    def check_ready(self) -> None:
        """Control knows who may call before it listens."""

    def act(self, actions: Sequence[fleet.Action]) -> None:
        """Carry out what the cluster core ordered."""
        for action in actions:
            match action:
                case fleet.SendPlan(node) | fleet.EndPoll(node):
                    poll = self._polls.pop(node, None)
                    if poll is not None and not poll.done():
                        poll.set_result(isinstance(action, fleet.SendPlan))
                case fleet.WakeSources(ref):
                    if (waiting := self._source_waits.pop(ref, None)) is not None:
                        waiting.set()
                case fleet.NoteSilent(node, silent_ms):
                    log.warning("node %s is silent for %d ms", node, silent_ms)
                    self.feed.note_node(node)
                    self.record("node_silent", detail=f"{node}: nothing heard for {silent_ms} ms")
                case fleet.NoteBack(node):
                    log.info("node %s is back", node)
                    self.record("node_back", detail=node)

    def hear(self, event: fleet.NodeBeat) -> bool:
        """Take a beat in; True when its answer must carry the plan."""
        actions = fleet.step(self.cluster, event, self.now_ms())
        due = any(isinstance(action, fleet.SendPlan) for action in actions)
        if self.catalog.replicated:
            specs = [self.catalog.models[ref] for ref in self.catalog.replicated]
            for seen in copies.seen(self.cluster, specs, event.node, self.now_ms()):
                fleet.step(self.cluster, seen, self.now_ms())
        self.act([action for action in actions if not isinstance(action, fleet.SendPlan)])
        self.feed.note_node(event.node)
        self.wake_waiting()
        return due

    def note_said(self, node: str, beat: Beat, peer: str | None) -> None:
        """What a beat says of the box that it comes from; finds out that there are two of them."""
        self.said.note(node, beat, self.wall_ms())
        both = self.boxes.hear(node, beat.life, beat.told, beat.box, peer, self.now_ms())
        view = self.cluster.nodes.get(node)
        if not both or view is None or view.cloned:
            return
        self._say_cloned(Joiner.NODE, node, both)
        self.act(fleet.step(self.cluster, fleet.Cloned(node, True), self.now_ms()))
        self.feed.note_node(node)

    def note_router(self, router: str, ask: RouterAsk, peer: str | None) -> None:
        """The same of a router's question."""
        turn = self.routers.boxes.turn(router)
        both = self.routers.note(router, ask, peer, self.now_ms(), self.wall_ms())
        if self.routers.boxes.turn(router) != turn:
            self.feed.wake()  # one that waits, and is another box, is found out by its next word
        if both and not self.routers.is_cloned(router):
            self._say_cloned(Joiner.ROUTER, router, both)
            self.routers.note_cloned(router)
            self.feed.wake()

    def _say_cloned(self, what: Joiner, name: str, both: str) -> None:
        log.error("two boxes use the identity of %s %s: %s", what, name, both)
        self.record(f"{what}_cloned", detail=f"{name}: two boxes use its identity: {both}")

    def _release_clones(self) -> None:
        for node, view in self.cluster.nodes.items():
            if view.cloned and self.boxes.is_alone(node, self.now_ms()):
                self._say_alone(Joiner.NODE, node)
                self.act(fleet.step(self.cluster, fleet.Cloned(node, False), self.now_ms()))
                self.feed.note_node(node)
        for router in self.routers.released(self.now_ms()):
            self._say_alone(Joiner.ROUTER, router)

    def _say_alone(self, what: Joiner, name: str) -> None:
        log.info("one box is left with the identity of %s %s", what, name)
        self.record(f"{what}_alone", detail=f"{name}: one box is left with its identity")

    async def poll(self, node: str, wait_ms: int) -> bool:
        """Wait for a newer plan on behalf of a node; True when there is one."""
        if self.stopping:
            return False
        poll: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        earlier = self._polls.get(node)
        self._polls[node] = poll
        if earlier is not None and not earlier.done():
            earlier.set_result(False)  # its connection is most likely dead
        try:
            async with asyncio.timeout(wait_ms / 1000):
                return await poll
        except TimeoutError:
            return False
        finally:
            if self._polls.get(node) is poll:
                del self._polls[node]
                self.act(fleet.step(self.cluster, fleet.PollEnded(node), self.now_ms()))

    def _end_poll(self, node: str) -> None:
        """Answer the node's long poll without a plan, so that it comes again at once."""
        poll = self._polls.get(node)
        if poll is not None and not poll.done():
            poll.set_result(False)

    async def end_polls(self) -> None:
        """Answer every long poll now: the server stops."""
        self.stopping = True
        for poll in list(self._polls.values()):
            if not poll.done():
                poll.set_result(False)
        self.wake_sources()
        self.shares.close()
        self.feed.close()

    def wake_sources(self) -> None:
        """Let every node that waits for a pack be answered again: one of them may be no more."""
        for waiting in self._source_waits.values():
            waiting.set()
        self._source_waits.clear()

    async def source(self, asked: fleet.SourceAsked, wait_ms: int) -> fleet.AnswerSource:
        """Where a node gets a pack from; waits for one that another node is about to have."""
        until_ms = self.now_ms() + wait_ms
        while True:
            now_ms = self.now_ms()
            actions = fleet.step(self.cluster, asked, now_ms)
            self.act(actions)
            answer = next(action for action in actions if isinstance(action, fleet.AnswerSource))
            left_ms = until_ms - now_ms
            if answer.granted or answer.peers or asked.ended or left_ms <= 0 or self.stopping:
                return answer
            if asked.node not in self.cluster.nodes:
                return answer  # it was removed while it waited
            waiting = self._source_waits.setdefault(asked.ref, asyncio.Event())
            with suppress(TimeoutError):
                async with asyncio.timeout(left_ms / 1000):
                    await waiting.wait()

    # --- records ---

    def record(self, kind: str, tenant: str = "", model: str = "", detail: str = "") -> None:
        """See ``RecordDesk.note``."""
        self.records.note(kind, tenant, model, detail)

    async def _write_records(self, spooled: Sequence[SpooledRecords], own: Sequence[Record]) -> Acked:
        return await self._on(self._writer, lambda: self._store.write_records(spooled, own))

    # --- time ---

    def _tick_nodes(self) -> None:
        self.act(fleet.step(self.cluster, fleet.Ticked(), self.now_ms()))
        rooms.settle(self.cluster, rooms.SETTLED_MAX)
        self._release_clones()

    def _tick_shares(self) -> None:
        self.shares.step(SharesTicked())

    async def _sweep_if_due(self) -> None:
        if self.now_ms() >= self._sweep_at_ms:
            self._sweep_at_ms = self.now_ms() + SWEEP_EVERY_MS
            await self.sweep(wall_ms())

    def _tick_papers(self) -> None:
        self.shown.tick(self.now_ms())
        self.advance_rotation()

    def advance_rotation(self) -> None:
        """Another stage of replacing the CA, when it is time; every node hears of what it must trust."""
        asked = [view.node for view in self.cluster.nodes.values() if not view.silent]
        trusted = self.said.all_trust(asked, self.authority.ca_sha256)
        trusted = trusted and self.routers.all_trust(self.authority.ca_sha256, self.now_ms())
        happened = self.authority.advance(trusted)
        if happened is not None:
            log.info("rotation of the CA: %s", happened)
            self.record("ca_rotated", detail=happened)
            self.shown.renew()
            self.feed.wake()
            for node in list(self._polls):
                self._end_poll(node)

    async def sweep(self, now_ms: int) -> None:
        """Remove join tokens that ended, answers kept for too long, and uploads that nobody touched."""
        async with self.writing:
            life_ms = self.config.upload_life_s * 1000
            old = [row for row in self.catalog.uploads.values() if now_ms - self.last_touch_ms(row) > life_ms]
            ended = [row for row in self.catalog.tokens.values() if row.expires_ms <= now_ms]
            changes: list[Change] = [DropUpload(row.upload_id) for row in old]
            changes += [DropToken(row.token_id) for row in ended]
            if (today := day_of(now_ms)) != self._usage_aged:
                changes.append(AgeUsage(now_ms))
            await self.write([*changes, DropReplays(now_ms - LIFE_MS)])
            self._usage_aged = today
        for row in old:
            self.forget_upload(row.upload_id)

    def last_touch_ms(self, row: UploadRow) -> int:
        return max(row.created_ms, self.touched_ms.get(row.upload_id, 0))

    def forget_upload(self, upload_id: str) -> None:
        """Remove the part files of an upload that is no longer in the catalog (or is committed)."""
        self.touched_ms.pop(upload_id, None)
        asyncio.get_running_loop().run_in_executor(
            None, lambda: shutil.rmtree(self.upload_dir / upload_id, ignore_errors=True)
        )


def lock_data_dir(folder: Path) -> int:
    """Have a data directory alone, until the descriptor is closed. Raises ``AlreadyRunning``, ``OSError``."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise AlreadyRunning(
            f"another control server uses {folder}: stop it, or choose another --data-dir"
        ) from None
    return descriptor
