"""What the node decided lately, for ``bunk explain``: a bounded ring, fed by every step of the core.

Covers: keeping decisions and requests, and answering questions about them. Does not cover: what is decided
(``packer``) or how a question comes here (``agent/uplink.py``). Nothing of it survives a restart: it
explains the process that runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from packer import residency
from packer.decisions import Decision, Kind, shortened
from packer.events import (
    Action,
    Asked,
    Cancelled,
    Dropped,
    Event,
    Grant,
    Planned,
    Refuse,
    Requested,
    Restored,
    RestoreFailed,
)
from packer.questions import DECISIONS_BYTES_MAX, DECISIONS_MAX, Asks, Question, Reply, RequestStory
from packer.types import ModelRef, Tier
from packer.wire import encode

# About half a KiB each: hours of a busy node, some MiB.
DECISIONS_KEPT_MAX = 4096
# Requests whose story is told; some 200 bytes each.
REQUESTS_KEPT_MAX = 8192
# The core's clock and the wall clock are read one after the other.
SLACK_MS = 50


class Decisions:
    """``wall_ms`` reads the wall clock, which is what people compare with."""

    def __init__(self, wall_ms: Callable[[], int]) -> None:
        self._wall_ms = wall_ms
        self._ring: deque[Decision] = deque(maxlen=DECISIONS_KEPT_MAX)
        # Requests by id, oldest first: the model, when it was asked for, and what became of it.
        self._requests: dict[str, tuple[ModelRef, int, Grant | Refuse | Cancelled | None]] = {}

    def granted_at_once(self, request: str, ref: ModelRef, how: Grant) -> None:
        """The step that most requests are: in it nothing else was decided."""
        if len(self._requests) >= REQUESTS_KEPT_MAX:
            del self._requests[next(iter(self._requests))]
        self._requests[request] = (ref, self._wall_ms(), how)

    def observe(self, core: residency.Node, event: Event, actions: list[Action]) -> None:
        """One step of the core."""
        if isinstance(event, Asked):
            return
        at_ms = self._wall_ms()
        if core.why:
            self._ring.extend(shortened(replace(decision, at_ms=at_ms)) for decision in core.why)
        match event:
            case Requested(request=request, ref=ref):
                if len(self._requests) >= REQUESTS_KEPT_MAX:
                    del self._requests[next(iter(self._requests))]
                self._requests[request] = (ref, at_ms, None)
            case Cancelled(request=request):
                self._end(request, event)
            case Planned(tenants=tenants):
                self._forget_others({spec.tenant for spec in tenants})
            case Restored() | RestoreFailed() | Dropped():
                self._ring.append(_about(core, event, at_ms))
            case _:
                pass
        for action in actions:
            if isinstance(action, Grant | Refuse):
                self._end(action.request, action)
            if isinstance(action, Refuse) and (known := self._requests.get(action.request)):
                why = f"{action.reason.value}: {action.detail}"
                self._ring.append(
                    Decision(Kind.REFUSED, str(known[0]), why, request=action.request, at_ms=at_ms)
                )

    def _forget_others(self, tenants: set[str]) -> None:
        """A tenant that is made anew under an old name must not read what was decided about the old one."""
        kept = [each for each in self._ring if tenants.issuperset(_tenants(each))]
        if len(kept) < len(self._ring):
            self._ring = deque(kept, maxlen=DECISIONS_KEPT_MAX)
        for request in [name for name, known in self._requests.items() if known[0].tenant not in tenants]:
            del self._requests[request]

    def _end(self, request: str, how: Grant | Refuse | Cancelled) -> None:
        known = self._requests.get(request)
        if known is not None and known[2] is None:
            self._requests[request] = (known[0], known[1], how)

    # --- answers ----------------------------------------------------------------------------------

    def reply(self, question: Question) -> Reply:
        """The answer to a question about the past."""
        if question.asks is Asks.REQUEST:
            return self._request(question)
        found = [each for each in self._ring if _concerns(each, question.subject)]
        return Reply(question.question, decisions=_newest(found))

    def _request(self, question: Question) -> Reply:
        known = self._requests.get(question.subject)
        if known is None:
            return Reply(question.question)
        ref, asked_ms, end = known
        story = RequestStory(question.subject, str(ref), asked_ms, "waiting")
        match end:
            case Grant(device=device, tier=tier, restore_ms=waited_ms):
                story = replace(
                    story, outcome="granted", device=device, from_tier=tier.value, waited_ms=waited_ms
                )
            case Refuse(reason=reason, detail=detail):
                story = replace(story, outcome="refused", reason=f"{reason.value}: {detail}")
            case Cancelled():
                story = replace(story, outcome="left")
            case _:
                pass
        # A request that was served at once waited for nothing that was decided.
        served = isinstance(end, Grant) and end.tier is Tier.DEVICE
        until_ms = asked_ms + story.waited_ms if isinstance(end, Grant) else self._wall_ms()
        found = [
            each
            for each in self._ring
            if not served and asked_ms <= each.at_ms <= until_ms + SLACK_MS and _concerns(each, str(ref))
        ]
        return Reply(question.question, decisions=_newest(found), story=story)


def _newest(found: Sequence[Decision]) -> tuple[Decision, ...]:
    """As many of the newest as one answer holds, the oldest first."""
    kept: list[Decision] = []
    left_bytes = DECISIONS_BYTES_MAX
    for decision in reversed(found[-DECISIONS_MAX:]):
        left_bytes -= len(encode(decision)) + 1
        if left_bytes < 0:
            break
        kept.append(decision)
    return tuple(reversed(kept))


def _tenants(decision: Decision) -> list[str]:
    """Everybody whom a decision names."""
    refs = [decision.ref, decision.by, *(victim.ref for victim in decision.victims)]
    return [ref.partition("/")[0] for ref in refs if ref]


def _concerns(decision: Decision, ref: str) -> bool:
    return ref in (decision.ref, decision.by) or any(victim.ref == ref for victim in decision.victims)


def _about(core: residency.Node, event: Restored | RestoreFailed | Dropped, at_ms: int) -> Decision:
    """What was answered to an order; what had been expected is still in the core."""
    ref = str(event.ref)
    if isinstance(event, Dropped):
        why = f"its copy in the {event.tier.value} tier made room for others"
        return Decision(Kind.DROPPED, ref, why, from_tier=event.tier.value, at_ms=at_ms)
    tier = event.from_tier.value
    if isinstance(event, RestoreFailed):
        return Decision(Kind.FAILED, ref, event.message, event.device, from_tier=tier, at_ms=at_ms)
    model = core.models.get(event.ref)
    expected_ms = model.expected_ms if model is not None else 0
    return Decision(
        Kind.RESTORED,
        ref,
        f"expected {expected_ms} ms, took {event.restore_ms}",
        event.device,
        from_tier=tier,
        nbytes=event.restored_bytes,
        expected_ms=expected_ms,
        took_ms=event.restore_ms,
        at_ms=at_ms,
    )
