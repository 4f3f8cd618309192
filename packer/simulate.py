"""Replay a trace through the production cores on a virtual clock: what would this fleet have cost?

Covers: the clock, the requests of a trace and their ends, and the tally of who waited for what. The cores
are the very ones that run in production: ``residency.step`` decides on every box, the caller's ``choose``
between boxes (``control.simulate_command`` gives control's own). Does not cover: what orders take
(``simulated_box``), files and tables (``control.simulate_command``).

Pure: the same trace and fleet give the same outcome. Boxes report at once, nothing fails, and a caller who
was refused does not come back, but for one that a box would not take a further copy for: a holder answers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain

from packer import residency
from packer.events import Event, Finished, Grant, Refuse, Requested, Ticked
from packer.fleet import Fleet
from packer.hits import finish_quietly, grant_at_once, use_at_once
from packer.ledger import Lease, State
from packer.outcome import Outcome, Tally
from packer.regret import UseLog, missing_bytes
from packer.simulated_box import Box, Choice, Ended, Pipe, Transfer, spec_of
from packer.simulated_turns import Turns
from packer.traces import Trace
from packer.types import Tier

# The books are proved this often, besides at the end: a simulation of millions of steps need not look after
# each, as production does.
CHECK_STEPS = 4_096
# A box with a model in one of these has it, or soon will.
_NEAR = (State.RESIDENT, State.RESTORING)
# After the last request comes nothing, for longer than any request takes.
DAYS_MS = 10 * 86_400_000


@dataclass(frozen=True, slots=True)
class _Wake:
    box: Box


@dataclass(frozen=True, slots=True)
class _PipeDue:
    box: Box
    pipe: Pipe
    version: int


@dataclass(frozen=True, slots=True)
class _RestoreDone:
    box: Box
    transfer: Transfer


@dataclass(slots=True, eq=False)
class _Waiting:
    model: int
    at_ms: int
    duration_ms: int
    again: bool = False  # it was refused where a further copy was to be


# What happens at a moment: a lease of a box ends, or one of the above.
_Due = tuple[int, int, object, Box | None, int]


def first_box(boxes: list[Box], model: int, now_ms: int) -> int:
    """The choice where there is none."""
    return 0


class Simulation:
    """One replay: the clock and the tally of its boxes."""

    def __init__(
        self,
        trace: Trace,
        fleet: Fleet,
        choose: Choice = first_box,
        remembered: Sequence[Event] = (),
        ended: Ended | None = None,
    ) -> None:
        self.trace = trace
        self.fleet = fleet
        self._choose = choose
        self._ended = ended
        specs = tuple(spec_of(sized, number, fleet) for number, sized in enumerate(trace.catalog))
        # Those that may be on several boxes, when requests wait for each other and there is more than one.
        self._turns = Turns(fleet.together) if fleet.together else None
        shared = self._turns is not None and ended is not None and fleet.boxes > 1
        self._shared = [shared and spec.replicas > 1 for spec in specs]
        self.tally = Tally(len(specs))
        self._heap: list[_Due] = []
        self._sequence = 0
        self._waiting: dict[str, _Waiting] = {}
        self._again: dict[str, bool] = {}  # requests in flight that were refused once
        self._homes = [0] * len(specs)
        self._checked_at = 0
        # Last: a box tells of itself from its first event on.
        self.boxes = [Box(f"box{at}", at, fleet, specs, self, remembered) for at in range(fleet.boxes)]

    # --- the clock --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """The whole trace, and what it leaves under way."""
        at_ms, models, durations = self.trace.at_ms, self.trace.models, self.trace.duration_ms
        start_ms, service_ms = at_ms[0], self.fleet.service_ms
        boxes, single = self.boxes, len(self.boxes) == 1
        heap, box, hits = self._heap, self.boxes[0], self.tally.hits
        following = chain(at_ms[1:], (at_ms[-1] + DAYS_MS,))
        columns = zip(at_ms, models, durations, following, strict=True)
        for number, (at, model, duration_ms, next_at) in enumerate(columns):
            now_ms = at - start_ms
            while heap and heap[0][0] <= now_ms:
                self._next()
            if duration_ms < 0:
                duration_ms = service_ms
            if self._turns is not None:
                self._arrive(self._turns, str(number), model, now_ms, duration_ms)
                continue
            if not single:
                box = boxes[self._box_for(model, now_ms)]
            end_ms = now_ms + duration_ms
            # It ends before anything else happens: both at once.
            if (
                end_ms <= next_at - start_ms
                and (not heap or end_ms < heap[0][0])
                and end_ms < (box.calm_ms if box.calm_step == box.steps else box.look_how_calm())
                and use_at_once(box.node, box.models[model], now_ms, end_ms)
            ):
                hits[model] += 1
                continue
            lease = grant_at_once(box.node, str(number), box.models[model], now_ms)
            if lease is not None:
                hits[model] += 1
                heappush(heap, (now_ms + duration_ms, number, lease, box, duration_ms))
            else:
                self._ask(box, str(number), model, now_ms, duration_ms)
        while heap:
            self._next()
        for each in self.boxes:
            residency.check(each.node, full=True)
        assert not self._waiting, "a request was never answered"
        return self._outcome()

    def _next(self) -> None:
        """The next thing that happens."""
        at_ms, _, what, box, duration_ms = heappop(self._heap)
        if type(what) is Lease:
            assert box is not None
            if not finish_quietly(box.node, what, duration_ms, at_ms):
                box.feed(Finished(what.request, duration_ms), at_ms)
            if self._turns is not None:
                self._tell_end(box, what.request, True, at_ms)
            return
        match what:
            case _Wake():
                what.box.feed(Ticked(), at_ms)
            case _PipeDue():
                if what.version == what.pipe.version:
                    what.box.pipe_due(what.pipe, at_ms)
            case _RestoreDone():
                what.box.restored(what.transfer, at_ms)
                self._check(what.box)

    def _at(self, at_ms: int, what: object) -> None:
        # Behind all leases that end at that moment, and in the order of their coming.
        self._sequence += 1
        heappush(self._heap, (at_ms, (1 << 60) + self._sequence, what, None, 0))

    def _check(self, box: Box) -> None:
        if box.steps - self._checked_at >= CHECK_STEPS or box.steps < self._checked_at:
            self._checked_at = box.steps
            residency.check(box.node)

    # --- requests ---------------------------------------------------------------------------------

    def _box_for(self, model: int, now_ms: int) -> int:
        home = self._homes[model]
        if self.boxes[home].models[model].state is not State.RESIDENT:
            self._homes[model] = home = self._choose(self.boxes, model, now_ms)
        return home

    def _arrive(self, turns: Turns, request: str, model: int, now_ms: int, duration_ms: int) -> None:
        """Where requests wait for each other, each is a step of its box."""
        if not self._shared[model]:
            number = self._box_for(model, now_ms) if len(self.boxes) > 1 else 0
        else:
            number = self._choose(self.boxes, model, now_ms)
            near = [box.number for box in self.boxes if box.models[model].state in _NEAR]
            turns.copies += bool(near) and number not in near
        self._ask(self.boxes[number], request, model, now_ms, duration_ms)

    def _tell_end(self, box: Box, request: str, served: bool, now_ms: int) -> None:
        """To whoever chose. Not of one that was asked for again: it is counted where it was sent first."""
        again = self._again.pop(request, False)
        model = self.trace.models[int(request)]
        if self._shared[model] and self._ended is not None and not again:
            self._ended(box.number, model, served, now_ms)

    def _ask(self, box: Box, request: str, model: int, now_ms: int, duration_ms: int) -> None:
        self._waiting[request] = _Waiting(model, now_ms, duration_ms)
        ref = box.models[model].spec.ref
        box.feed(Requested(request, ref, now_ms + self.fleet.deadline_s * 1000), now_ms)

    def granted(self, box: Box, action: Grant, now_ms: int) -> None:
        waiting = self._waiting.pop(action.request)
        lease = box.node.requests[action.request]
        self.tally.note_grant(waiting.model, now_ms - waiting.at_ms, action.tier, waiting.at_ms)
        begins_ms = now_ms
        if self._turns is not None:
            begins_ms = self._turns.take(box.number, waiting.model, now_ms, waiting.duration_ms)
        ends_ms = begins_ms + waiting.duration_ms
        heappush(self._heap, (ends_ms, int(action.request), lease, box, waiting.duration_ms))

    def refused(self, box: Box, action: Refuse, now_ms: int) -> None:
        waiting = self._waiting.pop(action.request)
        self._tell_end(box, action.request, False, now_ms)
        if self._shared[waiting.model] and not waiting.again:
            holders = [each for each in self.boxes if each.models[waiting.model].state is State.RESIDENT]
            if holders and box not in holders:
                waiting.again = self._again[action.request] = True
                self._waiting[action.request] = waiting
                ref = box.models[waiting.model].spec.ref
                until_ms = waiting.at_ms + self.fleet.deadline_s * 1000
                holders[0].feed(Requested(action.request, ref, until_ms), now_ms)
                return
        size = self.trace.catalog[waiting.model].size_bytes
        self.tally.note_refusal(waiting.model, action.reason, size)

    def wake(self, box: Box, at_ms: int) -> None:
        self._at(at_ms, _Wake(box))

    def pipe_changed(self, box: Box, pipe: Pipe) -> None:
        due_ms = pipe.next_ms()
        if due_ms is not None:
            self._at(due_ms, _PipeDue(box, pipe, pipe.version))

    def restored_at(self, box: Box, transfer: Transfer, at_ms: int) -> None:
        self._at(at_ms, _RestoreDone(box, transfer))

    def moved(self, tier: Tier, nbytes: int) -> None:
        self.tally.moved_bytes[tier] = self.tally.moved_bytes.get(tier, 0) + nbytes

    # --- the end ----------------------------------------------------------------------------------

    def _outcome(self) -> Outcome:
        least_ms = least_cold_ms(self.trace, self.fleet)
        steps = sum(box.steps for box in self.boxes)
        waited = self._turns.waited() if self._turns is not None else None
        return self.tally.outcome(self.fleet, self.trace.catalog, least_ms, steps, waited)


def least_cold_ms(trace: Trace, fleet: Fleet) -> float:
    """No policy that restores on demand makes callers wait less in sum, however well it knows the future.

    What is missing on the devices crosses a link, what is missing in devices and RAM together comes from
    disk; each of the two amounts has its own minimum (``regret.missing_bytes``), as if all boxes were one.
    Every model's first use pays the fixed cost once; all others are let off.
    """
    sizes = [sized.size_bytes for sized in trace.catalog]
    log = UseLog(trace.at_ms, trace.models, (), sizes)
    ram_bytes = int(fleet.boxes * fleet.ram_bytes / fleet.ram_ratio)
    below = sum(missing_bytes(log, fleet.memory_bytes + ram_bytes))
    off_devices = sum(missing_bytes(log, fleet.memory_bytes)) if ram_bytes else below
    disk_ms = fleet.ratio / (fleet.disk_gbps * 1e6)
    # Shares of a gang pass through several links at once; of all models, as if each did.
    links = max((sized.devices for sized in trace.catalog), default=1)
    link_ms = min(fleet.ram_ratio / (fleet.host_gbps * 1e6) / links, disk_ms)
    return (off_devices - below) * link_ms + below * disk_ms + fleet.fixed_ms * len(sizes)


def simulate(trace: Trace, fleet: Fleet, choose: Choice = first_box) -> Outcome:
    """What the fleet would have done with the trace."""
    return Simulation(trace, fleet, choose).run()
