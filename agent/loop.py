"""The one loop that owns a node's state: inbox -> residency.step -> dispatch.

Covers: feeding events to the core one at a time, checking its invariants after every step (which of them
when says ``packer/invariants.py``), starting what it orders and feeding the answers back, waking it on time,
and the leases that callers hold.
Does not cover: any decision (``packer/residency.py``) or how an order is carried out
(``agent/orders.py``): nothing slow ever runs here.

Every (now, event, actions) goes to a bounded ring; a broken invariant dumps it and stops the process,
because a ledger that is wrong is worse than a restart that rebuilds it from the journal.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from agent.background import Background
from agent.facade import EngineFrame, EngineRequest, Refused
from packer import residency
from packer.decisions import Forecast
from packer.events import (
    Action,
    Answer,
    Asked,
    Cancelled,
    Drop,
    Event,
    Evict,
    Fill,
    Finished,
    Grant,
    Pack,
    Refuse,
    Requested,
    Restore,
    Restored,
    ServingBegun,
    StopFill,
    Ticked,
    Wake,
)
from packer.types import ModelRef, ModelSpec, Tier

log = logging.getLogger("bunk.loop")

# Enough history to see how a state came about; about 1 KiB each, so a dump stays a few MiB.
RING_STEPS_MAX = 4096


class Effects(Protocol):
    """Carries out the core's orders; each answer is the event that says how it went (or None when a
    ``WorkerDied`` says it already)."""

    async def restore(self, order: Restore) -> Event | None: ...
    async def evict(self, order: Evict) -> Event | None: ...
    async def pack(self, order: Pack) -> Event | None: ...
    async def drop(self, order: Drop) -> Event | None: ...
    async def fill(self, order: Fill) -> Event | None: ...
    def stop_fill(self, order: StopFill) -> None: ...
    def run(
        self, ref: ModelRef, device: str, request: EngineRequest, took: Callable[[int], None]
    ) -> AsyncIterator[EngineFrame]: ...


@dataclass(slots=True)
class HeldLease:
    """A granted request. ``restored_bytes`` were moved while it waited; ``device_ms`` and ``tokens`` grow
    with every engine call made under it; whoever reads the frames counts the tokens."""

    effects: Effects
    ref: ModelRef
    device: str
    tier: Tier
    restore_ms: int
    restored_bytes: int = 0
    device_ms: int = 0
    tokens: int = 0

    def run(self, request: EngineRequest) -> AsyncIterator[EngineFrame]:
        """Closing the iterator cancels inside the worker."""
        return self.effects.run(self.ref, self.device, request, self._took)

    def _took(self, device_ms: int) -> None:
        self.device_ms += device_ms


class Leasing:
    """One request on its way to a lease and out of it; see ``Loop.lease``. A class and no generator: every
    request comes by here."""

    __slots__ = ("_deadline_ms", "_held", "_loop", "_ref", "_request", "_tokens")

    def __init__(self, loop: Loop, ref: ModelRef, request: str, deadline_ms: int, tokens: int) -> None:
        self._loop = loop
        self._ref = ref
        self._request = request
        self._deadline_ms = deadline_ms
        self._tokens = tokens

    async def __aenter__(self) -> HeldLease:
        asked = Requested(self._request, self._ref, self._deadline_ms, self._tokens)
        self._held = await self._loop.granted(asked)
        return self._held

    async def __aexit__(self, *raised: object) -> None:
        self._loop.post(Finished(self._request, self._held.device_ms, self._held.tokens))


class Loop:
    """Owns ``core``. ``observe`` is told every step, for counters and records; it must not block."""

    def __init__(
        self,
        core: residency.Node,
        effects: Effects,
        clock_ms: Callable[[], int],
        observe: Callable[[int, Event, list[Action]], None],
        dump_directory: Path,
    ) -> None:
        self.core = core
        self._effects = effects
        self._clock_ms = clock_ms
        self._observe = observe
        self._dump_directory = dump_directory
        self._inbox: deque[Event] = deque()
        self._draining = False
        self._waiting: dict[str, asyncio.Future[tuple[Grant, int]]] = {}
        self._asked: dict[str, Forecast] = {}
        self._orders = Background()
        self._wake: asyncio.TimerHandle | None = None
        self._wake_at_ms: int | None = None
        self._ring: deque[tuple[int, Event, list[Action]]] = deque(maxlen=RING_STEPS_MAX)
        self.steps = 0
        # Resolves with the error when the core breaks: the process must stop.
        self.broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def post(self, event: Event) -> None:
        """Put an event in; it is handled before this returns unless a step is running already."""
        self._inbox.append(event)
        if self._draining:
            return
        self._draining = True
        try:
            while self._inbox:
                self._step(self._inbox.popleft())
        except Exception as error:
            if not self.broken.done():
                self.broken.set_result(error)
                self.dump("broken")
            raise
        finally:
            self._draining = False

    def _step(self, event: Event) -> None:
        now_ms = self._clock_ms()
        actions = residency.step(self.core, event, now_ms)
        self._ring.append((now_ms, event, actions))
        self.steps += 1
        residency.check_after(self.core, event, actions)
        self._observe(now_ms, event, actions)
        for action in actions:
            self._dispatch(action, event)

    def _dispatch(self, action: Action, event: Event) -> None:
        match action:
            case Grant():
                # Who waited for these bytes is granted in the step that tells of their arrival.
                moved_bytes = 0
                if isinstance(event, Restored | ServingBegun) and event.ref == action.ref:
                    moved_bytes = event.restored_bytes
                self._answer(action.request, (action, moved_bytes))
            case Refuse():
                refused = Refused(action.reason, action.detail, action.retry_ms)
                self._answer(action.request, refused)
            case Answer():
                self._asked[action.question] = action.forecast
            case Wake():
                self._wake_up_at(action.at_ms)
            case Restore():
                self._start(self._effects.restore(action))
            case Evict():
                self._start(self._effects.evict(action))
            case Pack():
                self._start(self._effects.pack(action))
            case Drop():
                self._start(self._effects.drop(action))
            case Fill():
                self._start(self._effects.fill(action))
            case StopFill():
                self._effects.stop_fill(action)

    def _answer(self, request: str, answer: tuple[Grant, int] | Refused) -> None:
        # A caller that left in this very tick has cancelled its future; its Cancelled is in the inbox,
        # and the core takes it as the end of the grant.
        future = self._waiting.get(request)
        if future is None or future.done():
            return
        if isinstance(answer, Refused):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _start(self, order: Awaitable[Event | None]) -> None:
        self._orders.start(self._carry_out(order))

    async def _carry_out(self, order: Awaitable[Event | None]) -> None:
        try:
            event = await order
        except Exception as error:
            # An effect turns every operating error into an event; anything else is our mistake, and the
            # ledger would wait for ever for an answer that never comes.
            log.exception("an order failed in an unforeseen way")
            if not self.broken.done():
                self.broken.set_result(error)
            return
        if event is not None:
            self.post(event)

    def _wake_up_at(self, at_ms: int) -> None:
        if self._wake_at_ms is not None and self._wake_at_ms <= at_ms:
            return
        if self._wake is not None:
            self._wake.cancel()
        self._wake_at_ms = at_ms
        delay_s = max(0, at_ms - self._clock_ms()) / 1000
        self._wake = asyncio.get_running_loop().call_later(delay_s, self._ticked)

    def _ticked(self) -> None:
        self._wake, self._wake_at_ms = None, None
        self.post(Ticked())

    def lease(self, spec: ModelSpec, request: str, timeout_ms: int, tokens: int = 0) -> Leasing:
        """Wait for the model and hold it; see ``NodeFacade.lease``."""
        return Leasing(self, spec.ref, request, self._clock_ms() + timeout_ms, tokens)

    async def granted(self, asked: Requested) -> HeldLease:
        """Wait for the grant. ``Finished`` of the request must follow. Raises ``Refused``."""
        request = asked.request
        future: asyncio.Future[tuple[Grant, int]] = asyncio.get_running_loop().create_future()
        self._waiting[request] = future
        try:
            self.post(asked)
            grant, moved_bytes = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                future.exception()  # a refusal that crossed with the cancellation is nobody's to read
            self.post(Cancelled(request))
            raise
        finally:
            del self._waiting[request]
        return HeldLease(self._effects, grant.ref, grant.device, grant.tier, grant.restore_ms, moved_bytes)

    def forecast(self, question: str, ref: ModelRef) -> Forecast:
        """What a request for the model would meet now; nothing changes. Not from within a step."""
        self.post(Asked(question, ref))
        return self._asked.pop(question)

    def dump(self, why: str) -> Path:
        """Write the ring as JSON lines; returns the file."""
        path = self._dump_directory / f"ring-{why}-{self.steps}.jsonl"
        with path.open("w") as file:
            first = self.steps - len(self._ring) + 1
            for number, (now_ms, event, actions) in enumerate(self._ring, start=first):
                line = {
                    "step": number,
                    "now_ms": now_ms,
                    "event": [type(event).__name__, asdict(event)],
                    "actions": [[type(action).__name__, asdict(action)] for action in actions],
                }
                file.write(json.dumps(line) + "\n")
        log.error("dumped the last %d steps to %s", len(self._ring), path)
        return path

    async def close(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        await self._orders.close()
