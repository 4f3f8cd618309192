"""A turn of a model for vectors: one pass over inputs of the requests that wait.

Covers: reading requests as far as passes look ahead, passes, and what fails in them. Does not cover: which
inputs fit together (``batching``) or the pass itself (``engines/vectors.py``).

What one request does wrong ends that one alone: a pass over several that fails is done again for each input
by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

from agent.batching import Item, choose, due_ms, window
from agent.engines.vectors import VectorAnswer
from agent.lanes import Begun, Desk, Lane, charged, shares

_Part = tuple[Begun, VectorAnswer, int]  # an input of a request, by its place


class VectorTurns:
    """For the one thread that computes."""

    def __init__(self, desk: Desk, now_ms: Callable[[], float]) -> None:
        self._desk = desk
        self._now_ms = now_ms

    def wants_more(self, lane: Lane) -> bool:
        """Whether to read another request before the next pass."""
        return sum(len(answer.missing) for _, answer in _answers(lane)) < window(lane.batching)

    def turn(self, lane: Lane) -> float | None:
        """A pass; a time in milliseconds: there was none, and nothing is due before."""
        started_s = time.perf_counter()
        waiting = ((begun, answer, at) for begun, answer in _answers(lane) for at in answer.missing)
        parts = list(islice(waiting, window(lane.batching)))
        items = [Item(len(answer.inputs[at]), begun.request.arrived_ms) for begun, answer, at in parts]
        tokens_max = parts[0][0].held.model.tokens_max
        chosen = choose(items, lane.batching, tokens_max, self._now_ms())
        if not chosen:
            return due_ms(items[0], lane.batching)
        self._compute(lane, [parts[place] for place in chosen], started_s)
        return None

    def _compute(self, lane: Lane, parts: Sequence[_Part], started_s: float) -> None:
        tokens = [len(answer.inputs[at]) for _, answer, at in parts]
        self._desk.watch(lane.ref, max(tokens) * len(tokens))
        wrong_together: BaseException | None = None
        try:
            parts[0][0].held.model.compute([(answer, at) for _, answer, at in parts])
        except BaseException as error:
            wrong_together = error
        requests = [begun.request for begun, _, _ in parts]
        shares(requests, tokens, time.perf_counter() - started_s)
        failed: dict[Begun, BaseException] = {}
        if wrong_together is not None:
            failed = {parts[0][0]: wrong_together} if len(parts) == 1 else _compute_alone(parts)
        for begun, answer in {begun: answer for begun, answer, _ in parts}.items():
            wrong, whole = failed.get(begun), None
            if wrong is None and not answer.missing:
                try:
                    with charged(begun.request):
                        whole = begun.held.model.frame(answer)
                except BaseException as error:  # no memory to write it
                    wrong = error
            if wrong is not None or not answer.missing:
                self._desk.end_begun(lane, begun, wrong, whole)
        self._desk.measure(requests[0].run, lane.ref)


def _answers(lane: Lane) -> list[tuple[Begun, VectorAnswer]]:
    return [(begun, begun.answer) for begun in lane.begun if isinstance(begun.answer, VectorAnswer)]


def _compute_alone(parts: Sequence[_Part]) -> dict[Begun, BaseException]:
    """After a pass that failed: one of its inputs may be the reason, and no other request is at fault.

    All have paid their shares of that pass; now each pays its own.
    """
    failed: dict[Begun, BaseException] = {}
    for begun, answer, at in parts:
        if begun not in failed and at in answer.missing:
            try:
                with charged(begun.request):
                    begun.held.model.compute([(answer, at)])
            except BaseException as error:
                failed[begun] = error
    return failed
