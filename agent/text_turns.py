"""A turn of a model for texts: one prompt is read, or texts in the making each get their next token.

Covers: which texts run, passes, texts that end, and what fails. Does not cover: how much room there is for
what was read (``cache_room``), the passes themselves (``engines/decoding.py``), or tokens and frames
(``engines/generation.py``).

Where a model's settings join nothing, texts still take turns, a token each: a long one holds up no short one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from agent.cache_room import TEXTS_MAX, Row, plan
from agent.engines.decoding import Decoder, Text, Writing
from agent.lanes import Begun, Desk, Lane, charged, shares


class TextTurns:
    """For the one thread that computes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def wants_more(self, lane: Lane) -> bool:
        """Whether to read another request before the next pass: of all that are read something is written."""
        return all(writing.choice.tokens for writing in _owners(lane))

    def turn(self, lane: Lane) -> None:
        """A pass."""
        started_s = time.perf_counter()
        owners = _owners(lane)
        decoder = next(iter(owners)).text.decoder
        running, starting, keeps = _places(lane, decoder, list(owners))
        if starting is not None and not (running and lane.read_a_prompt):
            if not running:
                self._desk.watch(lane.ref, starting.length)
            chosen = [starting]
        else:
            chosen = _next(lane, decoder, running)
        lane.read_a_prompt = not chosen[0].read
        lane.passes += 1
        for writing in chosen:
            writing.passed = lane.passes
        with torch.inference_mode():
            self._compute(lane, decoder, owners, chosen, keeps, started_s)

    def _compute(
        self,
        lane: Lane,
        decoder: Decoder,
        owners: dict[Writing, Begun],
        chosen: Sequence[Writing],
        keeps: bool,
        started_s: float,
    ) -> None:
        failed: BaseException | None = None
        # Its cache may have to be taken out of one that it shares with others.
        shared = len(chosen) > 1 or decoder.is_together(chosen[0])
        logits: list[torch.Tensor | None] = []
        try:
            logits = decoder.step(chosen) if chosen[0].read else [decoder.read(chosen[0], keeps)]
        except BaseException as error:
            failed = error
        requests = [owners[writing].request for writing in chosen]
        shares(requests, [1] * len(chosen), time.perf_counter() - started_s)
        if failed is None:
            for writing, row in zip(chosen, logits, strict=True):
                if owners[writing] in lane.begun:  # else another choice of the same request failed
                    self._take(lane, owners[writing], writing, row)
        elif not shared:
            self._end(lane, owners[chosen[0]], chosen[0].text, failed)
        else:
            # One of them may be the reason, or none. Each is read again, and goes on by itself.
            for writing in chosen:
                decoder.forget(writing)
                writing.alone = True

    def _take(self, lane: Lane, begun: Begun, writing: Writing, logits: torch.Tensor | None) -> None:
        text = writing.text
        try:
            with charged(begun.request):
                if logits is not None:
                    writing.choice.take(logits)
                if writing.choice.reason is not None:
                    text.decoder.forget(writing)
                    text.end(writing)
        except BaseException as error:
            self._end(lane, begun, text, error)
            return
        if not text.open:
            self._end(lane, begun, text)

    def _end(self, lane: Lane, begun: Begun, text: Text, error: BaseException | None = None) -> None:
        self._desk.end_begun(lane, begun, error)
        held_bytes = text.decoder.cache_bytes(list(_owners(lane)))
        self._desk.measure(begun.request.run, lane.ref, held_bytes)


def _owners(lane: Lane) -> dict[Writing, Begun]:
    """All texts that are not at their end, oldest first, and whose they are."""
    return {
        writing: begun
        for begun in lane.begun
        if isinstance(begun.answer, Text)
        for writing in begun.answer.open
    }


def _places(
    lane: Lane, decoder: Decoder, writings: Sequence[Writing]
) -> tuple[list[Writing], Writing | None, bool]:
    """The texts that run, one that may start, and whether its prompt may be kept for other choices;
    those that must stop for want of room have stopped."""
    joined = lane.batching.inputs_max > 1
    rows_max = min(lane.batching.inputs_max, TEXTS_MAX) if joined else TEXTS_MAX
    keeping = [text for text in dict.fromkeys(writing.text for writing in writings) if text.shared_tokens]
    rows = [Row(writing.read, writing.length, writing.left) for writing in writings]
    kept = [text.shared_tokens for text in keeping]
    places = plan(rows, decoder.tokens_max, rows_max, joined, kept)
    for text in keeping[places.kept :]:
        text.shared = None
    for place in places.stopping:
        decoder.forget(writings[place])
    starting = None if places.starting is None else writings[places.starting]
    return [writings[place] for place in places.running], starting, places.keeps


def _next(lane: Lane, decoder: Decoder, running: Sequence[Writing]) -> list[Writing]:
    """The text whose turn it is, and those that can share its pass."""
    first = min(running, key=lambda writing: writing.passed)
    if lane.batching.inputs_max == 1 or not decoder.joins(first):
        return [first]
    return [writing for writing in running if decoder.joins(writing)]
