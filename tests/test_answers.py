"""Frames of answers that nobody has taken yet: how many bytes of them an agent holds of one worker.

Covers: texts in headers, tensors in bodies, very many small frames, and who is told what answers cost whose
worker died. Does not cover: what answers cost and stuck workers (``test_due``), or requests' bodies
(``test_bodies``).
"""

from __future__ import annotations

import pytest

from agent.answers import BUFFERED_BYTES_MAX, FRAME_OVERHEAD_BYTES, Answers
from agent.frames import End, Piece, encode_value
from packer.types import KIB, MIB


@pytest.mark.parametrize(
    ("header_bytes", "body_bytes"), [(0, MIB), (MIB, 0), (0, 0), (2 * KIB, 0), (300 * KIB, 700 * KIB)]
)
async def test_a_worker_waits_while_its_answers_are_not_taken(header_bytes: int, body_bytes: int) -> None:
    told: list[str] = []
    answers = Answers(lambda device_ms: None, lambda: told.append("room"))
    slow, quick = answers.open(1), answers.open(2)
    piece, body = Piece(1, encode_value({"delta": "x" * header_bytes})), bytes(body_bytes)
    frames = BUFFERED_BYTES_MAX // (len(piece.header) + body_bytes + FRAME_OVERHEAD_BYTES)
    for _ in range(frames - 2):
        answers.heard(piece, body)
    assert answers.has_room()
    for _ in range(3):
        answers.heard(piece, body)
    assert not answers.has_room()
    assert not told
    answers.taken(quick)
    assert not answers.has_room()
    assert len(answers.taken(slow)) == frames + 1
    assert answers.has_room()
    assert told == ["room"]


async def test_who_leaves_gives_the_room_of_its_answer_back() -> None:
    answers = Answers(lambda device_ms: None)
    answer = answers.open(1)
    for _ in range(BUFFERED_BYTES_MAX // MIB):
        answers.heard(Piece(1, encode_value({})), bytes(MIB))
    answers.heard(End(1), b"")
    assert not answers.has_room()
    assert not answers.close(answer)
    assert answers.has_room()


async def test_a_worker_that_dies_is_paid_for_by_those_who_wait_and_those_who_left() -> None:
    late: list[int] = []
    answers, now_s = Answers(late.append), [100.0]
    answers._time = lambda: now_s[0]
    waiting, leaving, done = (answers.open(number) for number in range(3))
    for answer in (done, waiting, leaving):
        await answers.may_send(answer, 0)
    assert answers.close(leaving)
    now_s[0] = 102.0
    answers.heard(End(done.number, busy_us=1_000_000), b"")
    now_s[0] = 105.0
    answers.end()
    assert (done.busy_ms, waiting.busy_ms, late) == (1000, 2000, [2000])
    assert waiting.arrived.is_set()
    assert not answers.close(waiting)
