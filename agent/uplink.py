"""The node's line to control: beat, plans, records, and fetching what control's store holds.

Covers: what a node that has joined says to control, and when it must join or renew; the node always dials.
Does not cover: the session and its pauses (``packer/control_line.py``), how it joins (``packer/joining.py``),
keys and certificates (``packer/identity.py``) or what a plan means (``packer/residency.py``). While control
is away nothing here fails a request: the node serves with its last plan and this keeps trying, with growing
pauses.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Sequence
from enum import Enum
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.parse import quote

import aiohttp

from agent.control_clock import ControlClock
from agent.origin import PIECE_BYTES, OriginUnavailable
from agent.shares import Shares
from agent.sources import ControlAway
from packer.control_answers import Answer, refusal_of, text_of
from packer.control_line import CONNECT_TIMEOUT_S, POLL_WAIT_MS, ControlLine
from packer.identity import Identity
from packer.joining import ANSWER_TIMEOUT_S, RETRY_FIRST_S, Forgotten, Joiner, Refused, Renewed, pause
from packer.peer_lists import KnownPeers
from packer.questions import QUESTIONS_MAX, Question, Replies, Reply
from packer.types import ModelRef, ModelSpec
from packer.usage import NO_USAGE, USAGE_ROWS_PER_BEAT_MAX, UsageBatch
from packer.wire import (
    SPOOL_RECORDS_MAX,
    WIRE_VERSION,
    BadMessage,
    Beat,
    BeatAnswer,
    Plan,
    PlanNumber,
    Record,
    Report,
    SourcesAnswer,
    SourcesAsk,
    decode,
)

log = logging.getLogger("bunk.uplink")

NODE = Joiner("node", "/node/v1", "the agent")
# Reports go out this long after a change, so that a burst of changes is one beat.
REPORT_PAUSE_S = 0.2
SOURCES_TIMEOUT_S = 3.0  # a model waits for this answer, and can be loaded without it
SOURCES_CONNECT_TIMEOUT_S = 2.0


class UsageSource(Protocol):
    """What tenants used, in batches."""

    async def batch(self) -> UsageBatch: ...  # what is due now: the same one until it is acknowledged
    async def acknowledge(self, seq: int) -> None: ...


class UplinkOwner(Protocol):
    """What the uplink asks of the node."""

    def report(self) -> Report: ...
    @property
    def spool_id(self) -> str: ...
    def have_plan(self) -> PlanNumber: ...
    async def accept_plan(self, plan: Plan) -> None: ...  # ignores one that is not newer
    async def spooled(self, limit: int) -> tuple[Record, ...]: ...
    async def acknowledge(self, acked_seq: int) -> None: ...
    @property
    def usage(self) -> UsageSource: ...
    async def reply(self, question: Question) -> Reply: ...
    def heard_clock(self, control_ms: int) -> None: ...  # control's wall clock, just now


class Uplink(ControlLine):
    """Runs until cancelled. ``changed`` says that there is something new to report."""

    def __init__(
        self,
        owner: UplinkOwner,
        identity: Identity,
        control_url: str,
        name: str,
        token_file: Path | None,
        shares: Shares | None = None,
    ) -> None:
        super().__init__(NODE, identity, control_url, name, token_file)
        self._owner = owner
        self._shares = shares
        self._changed = asyncio.Event()
        self._online = asyncio.Event()
        # Beats overtake each other; control goes by the newest of this life.
        self.life = secrets.token_hex(8)
        self._beats = 0
        self._told = ""  # by control's newest answer
        self._peers = KnownPeers()
        self._clock = ControlClock()

    def changed(self) -> None:
        self._changed.set()

    @property
    def connected(self) -> bool:
        return self._online.is_set()

    async def run(self, gateway_url: str) -> None:
        """Join if need be, then beat for ever. See ``Joining.run``."""
        joined = self._shares.forget if self._shares is not None else None
        await self.joining.run(self._talk, joined, gateway_url)

    async def _talk(self) -> None:
        """Poll and push over one session until it must be made anew."""
        async with self._connected():
            tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._push())]
            if self._shares is not None:
                tasks.append(asyncio.create_task(self._shares.run(self._post, self._online)))
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:  # in this order, when both are done
                    if task.done():
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._online.clear()

    # --- beats ------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        """Long polls, one after the other: this is how plans arrive."""
        await self._ask_for_ever(lambda: self._beat(POLL_WAIT_MS if self.connected else 0), self._lost)

    def _lost(self, error: Exception) -> None:
        if self.connected:
            log.warning("control is away, serving on with the last plan: %s", error)
        self._online.clear()

    async def _push(self) -> None:
        """Short beats when something changed: reports and records."""
        pause_s = RETRY_FIRST_S
        while True:
            await self._changed.wait()
            await asyncio.sleep(REPORT_PAUSE_S)
            # The poll loop finds out when control is back; its first answer leads on here.
            await self._online.wait()
            self._changed.clear()
            try:
                left = await self._beat(0)
            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:
                log.debug("report not delivered: %s", error)
                left = _Left.STUCK
            if left is _Left.NOTHING:
                pause_s = RETRY_FIRST_S
                continue
            self._changed.set()
            # A control that takes no records now is not asked again at once, with all of them.
            pause_s = await pause(pause_s) if left is _Left.STUCK else RETRY_FIRST_S

    async def _beat(self, wait_ms: int) -> _Left:
        """One beat; what is left to be told."""
        assert self._identity.answer is not None
        records = () if wait_ms else await self._owner.spooled(SPOOL_RECORDS_MAX)
        usage = NO_USAGE if wait_ms else await self._owner.usage.batch()
        have = self._owner.have_plan()
        self._beats += 1
        beat = Beat(
            WIRE_VERSION,
            self._identity.answer.node,
            have.epoch,
            have.seq,
            wait_ms,
            self._owner.report(),
            records,
            have.start,
            self._owner.spool_id,
            self.life,
            self._beats,
            self._told,
            round(self._identity.now_s() * 1000),
            self._identity.ca_sha256,
            self._identity.box,
            self._peers.known,
            usage.rows,
            usage.seq,
        )
        timeout_s = wait_ms / 1000 + ANSWER_TIMEOUT_S
        answer = await self._post("/node/v1/beat", beat, timeout_s, CONNECT_TIMEOUT_S)
        if answer.status != 200:
            self._complain(answer)
        got = decode(answer.body, BeatAnswer)
        if got.life and (got.life, got.number) != (beat.life, beat.number):
            raise BadMessage("control's answer is to another beat")
        if got.now_ms:
            self._owner.heard_clock(got.now_ms)
        self._complaint = ""
        self._told = got.told
        if not self.connected:
            log.info("connected to control at %s", self._url)
            self._online.set()
            self._changed.set()
        self._clock.heard(got.now_ms, self._identity.now_s())
        if records:
            await self._owner.acknowledge(got.acked_seq)
        if usage.rows and got.usage_acked:
            await self._owner.usage.acknowledge(got.usage_acked)
        if got.plan is not None:
            await self._consider(got.plan)
        if got.shares and self._shares is not None:
            self._shares.nudge()
        if got.questions:
            await self._reply(got.questions[:QUESTIONS_MAX])
        if got.ca_pem and self._identity.adopt_cas(got.ca_pem):
            raise Renewed
        if records and got.acked_seq < records[-1].seq:
            return _Left.STUCK
        if got.usage_acked < usage.seq:
            return _Left.STUCK
        full = len(records) == SPOOL_RECORDS_MAX or len(usage.rows) == USAGE_ROWS_PER_BEAT_MAX
        return _Left.MORE if full else _Left.NOTHING

    def _complain(self, answer: Answer) -> NoReturn:
        """Control does not take a beat: what that means for this node."""
        code, text = refusal_of(answer.body)
        if answer.status in (403, 404):
            raise Forgotten(text)
        if answer.status == 401:
            raise Refused(text)
        self._say_cloned(code, text)
        raise aiohttp.ClientError(f"beat: control answered {answer.status}: {text}")

    async def _consider(self, plan: Plan) -> None:
        mine = self._identity.answer
        assert mine is not None
        if plan.cluster != mine.cluster or plan.node != mine.node:
            log.error("ignored a plan for node %s of cluster %s", plan.node, plan.cluster)
            return
        number = f"{plan.epoch}.{plan.seq}"
        if plan.expires_ms and self._clock.is_past(plan.expires_ms):
            log.error("ignored plan %s, which was made too long ago", number)
            self._clock = ControlClock()  # should it be control's clock that was set back, the next is taken
            return
        whole = self._peers.complete(plan)
        if whole is None:
            log.error("ignored plan %s: its list of peers does not follow", number)
            return
        await self._owner.accept_plan(whole)
        if self._shares is not None:
            self._shares.planned(f"{plan.epoch} {plan.start} {len(whole.peers) < 2}")

    async def _reply(self, questions: Sequence[Question]) -> None:
        """Answer what control asks. Nobody depends on it: who asked is told when no answer comes."""
        replies = tuple([await self._owner.reply(question) for question in questions])
        answer = await self._post_now("/node/v1/replies", Replies(WIRE_VERSION, replies))
        if answer.status not in (200, 204):
            log.debug("control took no replies: %s: %s", answer.status, text_of(answer.body))

    # --- sources of packs -------------------------------------------------------------------------

    async def sources(
        self, ref: ModelRef, wait_ms: int, failed: Sequence[str] = (), *, ended: bool = False
    ) -> SourcesAnswer:
        """Who has a pack, or whose turn it is to read its origin. Raises ``ControlAway``."""
        if not self.connected:
            raise ControlAway("control is away")
        ask = SourcesAsk(WIRE_VERSION, str(ref), wait_ms, tuple(failed), ended)
        timeout_s = wait_ms / 1000 + SOURCES_TIMEOUT_S
        try:
            answer = await self._post("/node/v1/sources", ask, timeout_s, SOURCES_CONNECT_TIMEOUT_S)
            if answer.status != 200:
                raise ControlAway(f"control answered {answer.status}")
            return decode(answer.body, SourcesAnswer)
        except (aiohttp.ClientError, TimeoutError, OSError, BadMessage, RuntimeError) as error:
            # RuntimeError: the session is just being made anew.
            raise ControlAway(f"control does not say where packs are: {error}") from None

    # --- origins ----------------------------------------------------------------------------------

    async def fetch(
        self, spec: ModelSpec, path: str, start: int = 0, nbytes: int | None = None
    ) -> AsyncIterator[bytes]:
        """One file, or a range of one, of a version that control's own store holds.

        Raises ``OriginUnavailable``.
        """
        if self._session is None:
            raise OriginUnavailable(f"{spec.ref}: its origin is control's store, and control is away")
        ref = spec.ref
        where = quote(f"{ref.tenant}/{ref.name}/{ref.version}/{path}")
        try:
            # Without a limit on silence a control that hangs would hold the model's bytes for ever.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=ANSWER_TIMEOUT_S)
            url = f"{self._url}/node/v1/origins/{where}"
            ranged = {} if nbytes is None else {"Range": f"bytes={start}-{start + nbytes - 1}"}
            async with self._session.get(url, timeout=timeout, headers=ranged) as answer:
                if answer.status not in (200, 206):
                    raise OriginUnavailable(f"{ref}: {path}: control answered {answer.status}")
                async for piece in answer.content.iter_chunked(PIECE_BYTES):
                    yield piece
        except (aiohttp.ClientError, TimeoutError, ssl.SSLError) as error:
            raise OriginUnavailable(
                f"{ref}: {path}: control does not send it now", f"{path}: {error}"
            ) from None


class _Left(Enum):
    """Records that wait after a beat: none, more than one beat carries, or what control did not take."""

    NOTHING = "nothing"
    MORE = "more"
    STUCK = "stuck"
