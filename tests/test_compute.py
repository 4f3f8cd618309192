"""What the compute thread does next, with models that are functions of their inputs' tokens.

Covers: that answers are the same however requests are joined, cancelled and mixed; passes' bounds; models'
turns; one request's fault beside others; shares of the time; delays on a clock that the test moves. Does not
cover: real models (``test_vectors``, ``test_worker``), or which inputs fit together (``test_batching``).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import pytest
import torch
from compute_bench import A, B, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.engines.vectors import EmbedFields, VectorAnswer
from agent.facade import EngineError, EngineFrame, EngineRequest
from agent.frames import Broke, End, Fault, Last
from agent.lanes import Request
from packer.types import ModelRef

TOKENS_MAX = 64
REFUSED, BROKEN = 900, 901  # tokens that a model refuses to read, or breaks at


def vector(tokens: Sequence[int]) -> torch.Tensor:
    """What the model makes of an input: every token and its place counts."""
    return torch.tensor([float(sum(tokens)), float(sum(at * token for at, token in enumerate(tokens)))])


@dataclass
class Model:
    """Notes its passes. ``passing`` is called in the middle of each."""

    passes: list[list[tuple[int, ...]]] = field(default_factory=list)
    passing: Callable[[], None] = lambda: None
    is_gated: bool = False
    tokens_max: int = TOKENS_MAX

    def begin(self, request: EngineRequest, emit: object) -> VectorAnswer | None:
        if request.op == "whole":
            return None
        inputs = cast(list[list[int]], msgspec.convert(request.fields, EmbedFields).inputs)
        if any(REFUSED in tokens for tokens in inputs):
            raise EngineError("invalid_request", "is refused", "input")
        return VectorAnswer(inputs)

    def compute(self, parts: Sequence[tuple[VectorAnswer, int]]) -> None:
        inputs = [tuple(answer.inputs[place]) for answer, place in parts]
        self.passes.append(inputs)
        self.passing()
        if any(BROKEN in tokens for tokens in inputs):
            raise RuntimeError("broken")
        for (answer, place), tokens in zip(parts, inputs, strict=True):
            answer.put(place, vector(tokens))

    def frame(self, answer: VectorAnswer) -> EngineFrame:
        tokens = sum(map(len, answer.inputs))
        return EngineFrame({"prompt_tokens": tokens}, torch.stack(answer.rows).numpy().tobytes())

    def run(self, request: EngineRequest, emit: Callable[[EngineFrame], None], cancelled: object) -> None:
        self.passes.append([()])
        emit(EngineFrame({}, request.body))


class VectorBench(Bench):
    """With two models."""

    def __init__(self) -> None:
        self.models = {A: Model(), B: Model()}
        super().__init__(self.models)

    def ask(
        self, number: int, *inputs: Sequence[int], ref: ModelRef = A, op: str = "embed", **settings: int
    ) -> Request:
        return self.put(number, ref, op, {"inputs": [list(tokens) for tokens in inputs]}, **settings)

    def body(self, number: int) -> bytes | None:
        found = [body for _, body in self.pieces(number)]
        assert len(found) <= 1
        return found[0] if found else None

    def passes(self, ref: ModelRef = A) -> list[list[tuple[int, ...]]]:
        return self.models[ref].passes


def answer(*inputs: Sequence[int]) -> bytes:
    return torch.stack([vector(tokens) for tokens in inputs]).numpy().tobytes()


_INPUTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=90), min_size=1, max_size=7)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(_INPUTS, st.sampled_from([A, B]), st.integers(1, 8), st.integers(0, 3)), max_size=12),
    st.integers(0, 2**32),
)
def test_answers_are_the_same_however_requests_are_joined(
    requests: list[tuple[list[list[int]], ModelRef, int, int]], seed: int
) -> None:
    """Requests come between turns, some leave, some are at fault; each has its own answer or none."""
    bench, chance = VectorBench(), random.Random(seed)
    left: set[int] = set()
    faulty: dict[int, int] = {}
    for number, (inputs, ref, batch_max, delay_ms) in enumerate(requests):
        if chance.random() < 0.2:
            faulty[number] = chance.choice([REFUSED, BROKEN])
            inputs[chance.randrange(len(inputs))].append(faulty[number])
        asked = bench.ask(number, *inputs, ref=ref, batch_max=batch_max, batch_delay_ms=delay_ms)
        for _ in range(chance.randrange(4)):
            bench.compute.turn()
            bench.clock_ms += chance.choice([0, 1])
        if number in bench.open and chance.random() < 0.2:
            asked.cancelled.set()
            left.add(number)
    bench.run()
    assert bench.open == {}
    assert [resident.users for resident in bench.held.values()] == [0, 0]
    for number, (inputs, _, _, _) in enumerate(requests):
        end, body = bench.end(number), bench.body(number)
        if number in left:
            assert body is None
        elif number in faulty:
            assert isinstance(end, Fault if faulty[number] == REFUSED else Broke)
            assert body is None
        else:
            assert isinstance(end, Last)
            assert body == answer(*inputs)


@settings(deadline=None, max_examples=40)
@given(st.lists(_INPUTS, min_size=1, max_size=6), st.integers(1, 8))
def test_no_pass_is_larger_than_its_model_s_settings(requests: list[list[list[int]]], batch_max: int) -> None:
    bench = VectorBench()
    for number, inputs in enumerate(requests):
        bench.ask(number, *inputs, batch_max=batch_max)
    bench.run()
    for passed in bench.passes():
        assert len(passed) <= batch_max
        assert len(passed) == 1 or max(map(len, passed)) * len(passed) <= TOKENS_MAX


def test_requests_that_wait_share_a_pass_and_one_that_is_alone_does_not_wait() -> None:
    bench = VectorBench()
    for number in range(6):
        bench.ask(number, [number, 1], batch_max=4)
    bench.run()
    assert [len(inputs) for inputs in bench.passes()] == [4, 2]


def test_each_is_alone_unless_its_model_says_otherwise() -> None:
    bench = VectorBench()
    bench.ask(1, [1], [2])
    bench.ask(2, [3])
    bench.run()
    assert bench.passes() == [[(1,)], [(2,)], [(3,)]]


def test_a_setting_counts_from_the_next_pass_on() -> None:
    bench = VectorBench()
    bench.ask(1, *[[1]] * 6, batch_max=2)
    bench.compute.turn()
    bench.ask(2, [2], batch_max=1)
    bench.run()
    assert [len(inputs) for inputs in bench.passes()] == [2, 1, 1, 1, 1, 1]


def test_models_take_turns_however_much_there_is_to_do_for_one() -> None:
    bench = VectorBench()
    order: list[str] = []
    bench.models[A].passing = lambda: order.append("a")
    bench.models[B].passing = lambda: order.append("b")
    bench.ask(1, *[[1]] * 100, batch_max=2)
    bench.ask(2, [1], [2], [3], ref=B)
    bench.run()
    assert order[:7] == ["a", "b", "a", "b", "a", "b", "a"]
    ends = [frame for frame, _ in bench.sent]
    assert ends.index(bench.end(2)) < ends.index(bench.end(1))


def test_a_model_whose_weights_still_come_holds_up_no_other() -> None:
    bench = VectorBench()
    bench.models[A].is_gated = True
    bench.ask(1, [1])
    bench.ask(2, [2], ref=B)
    bench.compute.turn()
    assert (bench.passes(A), bench.passes(B)) == ([], [[(2,)]])
    bench.run()
    assert bench.body(1) == answer([1])


def test_who_leaves_in_the_middle_of_its_inputs_takes_nobody_along() -> None:
    bench = VectorBench()
    leaving = bench.ask(1, *[[1]] * 20, batch_max=4)
    bench.ask(2, [7, 7], batch_max=4)
    bench.models[A].passing = leaving.cancelled.set
    bench.run()
    assert len(bench.passes()) < 5
    assert (bench.body(1), bench.body(2)) == (None, answer([7, 7]))
    assert isinstance(bench.end(1), End)


def test_who_waits_for_company_is_let_go_at_once() -> None:
    bench = VectorBench()
    leaving = bench.ask(1, [1], batch_max=8, batch_delay_ms=50)
    assert bench.compute.turn() == pytest.approx(0.05)
    assert bench.held[A].users == 1
    leaving.cancelled.set()
    assert bench.compute.turn() is None
    assert bench.held[A].users == 0
    assert bench.passes() == []


def test_a_delay_gathers_and_ends() -> None:
    bench = VectorBench()
    bench.ask(1, [1], batch_max=8, batch_delay_ms=5)
    assert bench.compute.turn() == pytest.approx(0.005)
    bench.clock_ms = 4.0
    bench.ask(2, [2], batch_max=8, batch_delay_ms=5)
    assert bench.compute.turn() == pytest.approx(0.001)
    bench.clock_ms = 5.0
    assert bench.compute.turn() == 0.0
    assert bench.passes() == [[(1,), (2,)]]


def test_one_model_s_delay_is_no_other_s() -> None:
    bench = VectorBench()
    bench.ask(1, [1], batch_max=8, batch_delay_ms=5)
    bench.ask(2, [2], ref=B)
    assert bench.compute.turn() == 0.0
    assert bench.body(2) == answer([2])


def test_what_one_breaks_the_others_do_not_pay_for() -> None:
    bench = VectorBench()
    for number, inputs in enumerate(([[1]], [[BROKEN]], [[2], [3]])):
        bench.ask(number, *inputs, batch_max=8)
    bench.run()
    assert isinstance(bench.end(1), Broke)
    assert (bench.body(0), bench.body(1), bench.body(2)) == (answer([1]), None, answer([2], [3]))


def test_an_answer_that_can_not_be_written_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = VectorBench()
    write = Model.frame

    def frame(model: Model, answer: VectorAnswer) -> EngineFrame:
        if len(answer.inputs) > 1:
            raise MemoryError
        return write(model, answer)

    monkeypatch.setattr(Model, "frame", frame)
    bench.ask(1, [1], [2], batch_max=8)
    bench.ask(2, [3], batch_max=8)
    bench.run()
    assert isinstance(bench.end(1), Broke)
    assert bench.body(2) == answer([3])
    assert not bench.open


def test_a_request_at_fault_joins_nothing() -> None:
    bench = VectorBench()
    bench.ask(1, [1], [REFUSED], batch_max=8)
    bench.ask(2, [2], batch_max=8)
    bench.run()
    assert (bench.end(1).code, bench.end(1).field) == ("invalid_request", "input")
    assert bench.passes() == [[(2,)]]


def test_a_model_that_is_not_here_is_said_to_be_gone() -> None:
    bench = VectorBench()
    bench.ask(1, [1], ref=ModelRef("acme", "absent", "0" * 16))
    bench.run()
    assert bench.end(1).gone


def test_what_is_computed_whole_has_its_turn_too() -> None:
    bench = VectorBench()
    bench.ask(1, [1], op="whole")
    bench.ask(2, [2])
    bench.run()
    assert bench.passes() == [[()], [(2,)]]
    assert isinstance(bench.end(1), End)


def test_a_pass_is_paid_for_by_those_whose_tokens_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, clock_s = VectorBench(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock_s[0])

    def passing() -> None:
        clock_s[0] += 1.0

    bench.models[A].passing = passing
    bench.ask(1, [1, 1, 1], batch_max=8)
    bench.ask(2, [2, 2, 2, 2], [2, 2, 2], batch_max=8)
    bench.run()
    assert (bench.end(1).busy_us, bench.end(2).busy_us) == (300_000, 700_000)


def test_what_fails_is_paid_for_by_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that breaks by all that were part of it, each try alone by its own, reading by its reader."""
    bench, clock_s = VectorBench(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock_s[0])
    begin, frame = Model.begin, Model.frame

    def slow_begin(model: Model, request: EngineRequest, emit: object) -> VectorAnswer | None:
        clock_s[0] += 10.0
        return begin(model, request, emit)

    def slow_frame(model: Model, answer: VectorAnswer) -> EngineFrame:
        clock_s[0] += 100.0
        if len(answer.inputs) > 1:
            raise MemoryError
        return frame(model, answer)

    def passing() -> None:
        clock_s[0] += 1.0

    monkeypatch.setattr(Model, "begin", slow_begin)
    monkeypatch.setattr(Model, "frame", slow_frame)
    bench.models[A].passing = passing
    for number, inputs in enumerate(([[1]], [[BROKEN]], [[2], [3]], [[REFUSED]])):
        bench.ask(number, *inputs, batch_max=8)
    bench.run()
    # Four inputs of a token each, then each again by itself.
    busy_us = [bench.end(number).busy_us for number in range(4)]
    assert busy_us == [111_250_000, 11_250_000, 112_500_000, 10_000_000]
    assert sum(busy_us) == clock_s[0] * 1e6


def test_an_agent_that_is_gone_ends_computing_and_no_other_error_of_the_system_does_so_unsaid() -> None:
    bench = VectorBench()
    bench.ask(1, [1])

    def gone(frame: object, body: bytes) -> None:
        raise BrokenPipeError

    bench.compute._desk._take_frame = gone
    bench.compute.serve()
    bench = VectorBench()
    bench.ask(1, [1])

    def full(ref: ModelRef, tokens: int) -> None:
        raise OSError("too many open files")

    bench.compute._desk.watch = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="open files"):
        bench.compute.serve()


def test_inputs_that_wait_are_not_all_looked_at_for_each_pass() -> None:
    """Else 2,048 inputs, each alone, cost two million looks."""
    looks: list[int] = []

    class Missing(OrderedDict[int, None]):
        def __iter__(self) -> Iterator[int]:
            for place in super().__iter__():
                looks.append(place)
                yield place

    bench = VectorBench()
    bench.ask(1, *[[1]] * 500)
    bench.compute.turn()
    (begun,) = bench.compute._lanes[A].begun
    assert isinstance(begun.answer, VectorAnswer)
    begun.answer.missing = Missing(begun.answer.missing)
    looks.clear()
    bench.run()
    assert len(bench.passes()) == 500
    assert len(looks) < 2 * 500
