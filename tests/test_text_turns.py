"""Texts of several requests in one worker: each has its own tokens, stops and counts, and its turn.

Covers: requests that come, leave and fail while others are written, with passes of one and of several; turns
of texts and of models; room for what was read; shares of the time. Does not cover: passes on every
architecture (``test_decoding``), or real workers (``test_worker``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import pytest
import torch
from compute_bench import A, B, Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_texts import WORDS, module, prompts, text
from transformers import PreTrainedModel

from agent.engines import decoding
from agent.engines.decoding import Decoder, Text, Writing
from agent.facade import EngineError, EngineFrame, EngineRequest
from agent.frames import Broke, End, Fault
from agent.lanes import Request
from packer.types import ModelRef

ROOM = 96
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values of two layers and two heads of eight floats
Said = tuple[int, str, str]  # a choice, its text, and why it ended
BROKEN = WORDS - 1  # a token that a pass breaks at


class Noted(Decoder):
    """Notes its passes. ``passing`` is called before each with its texts."""

    def __init__(self, made: PreTrainedModel) -> None:
        super().__init__(made, ROOM)
        self.passes: list[int] = []
        self.passing: Callable[[Sequence[Writing]], None] = lambda writings: None
        self.running: set[Writing] = set()
        self.most_held = 0

    def read(self, writing: Writing, keeps: bool) -> torch.Tensor | None:
        self._note([writing])
        return super().read(writing, keeps)

    def step(self, writings: Sequence[Writing]) -> list[torch.Tensor | None]:
        self._note(writings)
        return super().step(writings)

    def _note(self, writings: Sequence[Writing]) -> None:
        self.passes.append(len(writings))
        self.passing(writings)
        if any(BROKEN in writing.text.answer.prompt for writing in writings):
            raise RuntimeError("broken")
        self.running |= set(writings)
        self.most_held = max(self.most_held, sum(writing.read for writing in self.running))


class Model:
    """Real passes of a tiny model."""

    is_gated = False

    def __init__(self, made: PreTrainedModel) -> None:
        self.decoder = Noted(made)

    def begin(self, request: EngineRequest, emit: Callable[[EngineFrame], None]) -> Text:
        fields = cast(dict[str, Any], dict(request.fields))
        prompt = fields.pop("tokens")
        if not prompt:
            raise EngineError("invalid_request", "has no tokens", "prompt")
        return text(self.decoder, prompt, emit, **fields)


@pytest.fixture(scope="module")
def made() -> PreTrainedModel:
    torch.set_num_threads(1)  # such small models only wait for each other's threads
    return module("LlamaForCausalLM")


class TextBench(Bench):
    def __init__(self, made: PreTrainedModel) -> None:
        self.models = {A: Model(made), B: Model(made)}
        super().__init__(self.models)

    def ask(
        self, number: int, prompt: Sequence[int], ref: ModelRef = A, batch_max: int = 1, **fields: Any
    ) -> Request:
        asked = {"tokens": list(prompt), "max_tokens": 12, "temperature": 0.0, **fields}
        return self.put(number, ref, "generate", asked, batch_max=batch_max)

    def headers(self, number: int) -> list[dict[str, Any]]:
        return [msgspec.json.decode(frame.header) for frame, _ in self.pieces(number)]

    def said(self, number: int) -> list[Said]:
        found: dict[int, list[str]] = {}
        for header in self.headers(number):
            words = found.setdefault(header.get("choice", 0), ["", ""])
            words[0] += header.get("delta", "")
            words[1] += header.get("finish_reason", "")
        return [(choice, text, reason) for choice, (text, reason) in sorted(found.items())]


def alone(made: PreTrainedModel, prompt: Sequence[int], **fields: Any) -> tuple[list[Said], tuple[int, int]]:
    """What a request says that nothing runs beside, and its counts."""
    bench = TextBench(made)
    bench.ask(0, prompt, **fields)
    bench.run()
    last = bench.headers(0)[-1]
    return bench.said(0), (last["prompt_tokens"], last["completion_tokens"])


_ASKED = st.fixed_dictionaries(
    {
        "length": st.integers(1, 30),
        "max_tokens": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 1.5]),
        "seed": st.integers(0, 3),
        "n": st.integers(1, 3),
        "stop": st.sampled_from(
            [[], [chr(0x4E00 + 40)], [chr(0x4E00 + token) for token in range(20, 90, 5)]]
        ),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_ASKED, min_size=1, max_size=6), st.sampled_from([1, 2, 8]), st.integers(0, 2**32))
def test_nothing_of_a_text_depends_on_its_company(
    made: PreTrainedModel, requests: list[dict[str, Any]], batch_max: int, seed: int
) -> None:
    bench, chance = TextBench(made), random.Random(seed)
    left: set[int] = set()
    asked = []
    for number, fields in enumerate(requests):
        fields = dict(fields)
        prompt = [chance.randrange(2, WORDS - 1) for _ in range(fields.pop("length"))]
        asked.append((prompt, fields))
        request = bench.ask(number, prompt, chance.choice([A, B]), batch_max, **fields)
        for _ in range(chance.randrange(8)):
            bench.compute.turn()
        if number in bench.open and chance.random() < 0.2:
            request.cancelled.set()
            left.add(number)
    bench.run()
    assert bench.open == {}
    for model in bench.models.values():
        assert model.decoder.cache_bytes([]) == 0
    for number, (prompt, fields) in enumerate(asked):
        assert isinstance(bench.end(number), End)
        if number not in left:
            said, counts = alone(made, prompt, **fields)
            last = bench.headers(number)[-1]
            assert bench.said(number) == said
            assert (last["prompt_tokens"], last["completion_tokens"]) == counts


def test_a_long_text_does_not_hold_up_a_short_one(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    bench.ask(1, prompts(5)[0], max_tokens=60)
    for _ in range(5):
        bench.compute.turn()
    bench.ask(2, prompts(6)[0], max_tokens=4)
    bench.run()
    assert bench.sent.index((bench.end(2), b"")) < bench.sent.index((bench.end(1), b""))
    assert set(bench.models[A].decoder.passes) == {1}


def test_a_long_text_does_not_hold_up_another_model(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    bench.ask(1, prompts(5)[0], max_tokens=60)
    bench.ask(2, prompts(6)[0], B, max_tokens=4)
    for _ in range(2 * 4):
        bench.compute.turn()
    assert isinstance(bench.end(2), End)
    assert 1 in bench.open


def test_texts_share_passes_where_their_model_says_so(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    for number, prompt in enumerate(prompts(5, 9, 3, 7, 4, 6)):
        bench.ask(number, prompt, batch_max=4, max_tokens=6)
    bench.run()
    assert max(bench.models[A].decoder.passes) == 4
    assert len(bench.models[A].decoder.passes) < 6 * 6


def test_what_is_read_stays_within_the_room(made: PreTrainedModel) -> None:
    """Nobody says how long these will be, and together they would take five times the room."""
    bench = TextBench(made)
    given = prompts(*[10] * 6)
    for number, prompt in enumerate(given):
        bench.ask(number, prompt, max_tokens=80)
    bench.run()
    assert bench.models[A].decoder.most_held <= ROOM
    for number, prompt in enumerate(given):
        assert bench.said(number) == alone(made, prompt, max_tokens=80)[0]


@pytest.mark.parametrize("batch_max", [1, 4])
@pytest.mark.parametrize("length", [40, 60, 86])
def test_choices_of_a_long_prompt_stay_within_the_room(
    made: PreTrainedModel, length: int, batch_max: int
) -> None:
    """What was read of a prompt is kept for the choices to come only where it may be there twice."""
    bench = TextBench(made)
    decoder = bench.models[A].decoder
    long, short = prompts(length, 12)
    bench.ask(1, long, batch_max=batch_max, max_tokens=10, n=3, temperature=1.0, seed=5)
    bench.ask(2, short, batch_max=batch_max, max_tokens=30, n=2)
    most_bytes = 0
    while bench.compute.turn() is not None:
        lane = bench.compute._lanes.get(A)
        answers = [begun.answer for begun in lane.begun] if lane is not None else []
        open_texts = [writing for answer in answers if isinstance(answer, Text) for writing in answer.open]
        most_bytes = max(most_bytes, decoder.cache_bytes(open_texts))
    assert most_bytes <= ROOM * TOKEN_BYTES
    assert bench.said(1) == alone(made, long, max_tokens=10, n=3, temperature=1.0, seed=5)[0]
    assert bench.said(2) == alone(made, short, max_tokens=30, n=2)[0]


def test_a_prompt_does_not_wait_for_all_texts_nor_texts_for_all_prompts(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    order: list[bool] = []
    bench.models[A].decoder.passing = lambda writings: order.append(not writings[0].read)
    bench.models[A].decoder.tokens_max = 10_000
    for number, prompt in enumerate(prompts(*[4] * 5)):
        bench.ask(number, prompt, max_tokens=30)
    bench.run()
    assert order[:9] == [True, False, True, False, True, False, True, False, True]


def test_who_leaves_is_let_go_with_all_that_was_read(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    bench.models[A].decoder.tokens_max = 1_000
    leaving = bench.ask(1, prompts(9)[0], batch_max=4, max_tokens=60, n=3)
    bench.ask(2, prompts(5)[0], batch_max=4)
    for _ in range(9):
        bench.compute.turn()
    assert bench.held[A].users == 2
    leaving.cancelled.set()
    said = len(bench.pieces(1))
    bench.run()
    assert isinstance(bench.end(1), End)
    assert len(bench.pieces(1)) == said
    assert bench.held[A].users == 0
    assert bench.said(2) == alone(made, prompts(5)[0])[0]


@pytest.mark.parametrize("batch_max", [1, 4])
def test_what_one_breaks_the_others_do_not_pay_for(made: PreTrainedModel, batch_max: int) -> None:
    bench = TextBench(made)
    good, other = prompts(5, 8)
    bench.ask(1, good, batch_max=batch_max)
    bench.ask(2, [3, BROKEN, 4], batch_max=batch_max)
    bench.ask(3, other, batch_max=batch_max)
    bench.ask(4, [], batch_max=batch_max)
    bench.run()
    assert isinstance(bench.end(2), Broke)
    assert isinstance(bench.end(4), Fault)
    assert (bench.said(1), bench.said(3)) == (alone(made, good)[0], alone(made, other)[0])


def test_a_pass_over_several_that_fails_is_made_up_for(made: PreTrainedModel) -> None:
    bench, failed = TextBench(made), list[int]()
    given = prompts(5, 8, 6)

    def fail_together(writings: Sequence[Writing]) -> None:
        if len(writings) > 1 and not failed:
            failed.append(len(writings))
            raise MemoryError

    bench.models[A].decoder.passing = fail_together
    for number, prompt in enumerate(given):
        bench.ask(number, prompt, batch_max=4)
    bench.run()
    assert failed != []
    for number, prompt in enumerate(given):
        assert bench.said(number) == alone(made, prompt)[0]


@pytest.mark.parametrize("seed", range(5))
def test_failures_of_what_is_shared_cost_nobody_a_token(
    made: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Memory that is short in the middle of a pass, or while caches are put together or taken apart."""
    chance, failures = random.Random(seed), list[str]()
    asked: list[tuple[list[int], dict[str, Any]]] = [
        (
            prompt,
            {"max_tokens": chance.randrange(3, 16), "temperature": 1.1, "seed": number, "n": 1 + number % 2},
        )
        for number, prompt in enumerate(prompts(5, 8, 6, 3, 9))
    ]
    wanted = [alone(made, prompt, **fields) for prompt, fields in asked]

    def failing(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if len(failures) < 3 and chance.random() < 0.1:
                failures.append(what)
                raise MemoryError
            return work(*arguments)

        return run

    bench = TextBench(made)
    bench.models[A].decoder.tokens_max = 1_000
    monkeypatch.setattr(Decoder, "_step_together", failing("pass", Decoder._step_together))
    monkeypatch.setattr(Decoder, "_put_together", failing("before", Decoder._put_together))
    monkeypatch.setattr(Decoder, "_take_row", staticmethod(failing("apart", Decoder._take_row)))
    monkeypatch.setattr("agent.engines.decoding._some", failing("amid", decoding._some))
    for number, (prompt, fields) in enumerate(asked):
        bench.ask(number, prompt, batch_max=4, **fields)
        for _ in range(chance.randrange(4)):
            bench.compute.turn()
    bench.run()
    assert failures
    for number, (said, counts) in enumerate(wanted):
        assert isinstance(bench.end(number), End)
        last = bench.headers(number)[-1]
        assert bench.said(number) == said
        assert (last["prompt_tokens"], last["completion_tokens"]) == counts
    assert bench.models[A].decoder.cache_bytes([]) == 0


def test_who_is_left_of_a_shared_pass_is_not_at_fault_when_it_can_not_be_taken_out(
    made: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, failed = TextBench(made), list[int]()
    take_row = Decoder._take_row

    def failing(*arguments: Any) -> None:
        if not failed:
            failed.append(1)
            raise MemoryError
        take_row(*arguments)

    monkeypatch.setattr(Decoder, "_take_row", staticmethod(failing))
    first, second = prompts(5, 8)
    bench.ask(1, first, batch_max=4, max_tokens=4)
    bench.ask(2, second, batch_max=4, max_tokens=12)
    bench.run()
    assert failed
    assert bench.said(1) == alone(made, first, max_tokens=4)[0]
    assert bench.said(2) == alone(made, second, max_tokens=12)[0]


@pytest.mark.parametrize("where", ["draw", "emit"])
def test_what_one_can_not_be_told_ends_it_alone_with_all_its_choices(
    made: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    bench = TextBench(made)
    bench.models[A].decoder.tokens_max = 1_000
    good, bad, other = prompts(5, 8, 6)
    bench.ask(1, good, batch_max=8)
    bench.ask(2, bad, batch_max=8, n=3, temperature=1.0, seed=1)
    bench.ask(3, other, batch_max=8)
    for _ in range(9):
        bench.compute.turn()
    assert max(bench.models[A].decoder.passes) >= 4, "they share passes by now"
    begun = next(begun for begun in bench.compute._lanes[A].begun if begun.request.run.id == 2)
    assert isinstance(begun.answer, Text)

    def broken(*arguments: object) -> None:
        raise ArithmeticError("the model's output is not a number")

    if where == "draw":
        monkeypatch.setattr(begun.answer.open[-1].choice._sampler, "pick", broken)
    else:
        monkeypatch.setattr(begun.answer.answer, "_emit", broken)
    bench.run()
    assert isinstance(bench.end(2), Broke)
    assert (bench.said(1), bench.said(3)) == (alone(made, good)[0], alone(made, other)[0])
    assert bench.held[A].users == 0
    assert bench.models[A].decoder.cache_bytes([]) == 0


def test_who_leaves_in_the_pass_of_its_last_token_is_ended_once(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    decoder = bench.models[A].decoder
    decoder.tokens_max = 1_000
    leaving = bench.ask(1, prompts(5)[0], batch_max=4, max_tokens=6)
    bench.ask(2, prompts(8)[0], batch_max=4, max_tokens=9)

    def passing(writings: Sequence[Writing]) -> None:
        if any(writing.left == 1 and len(writing.text.answer.prompt) == 5 for writing in writings):
            leaving.cancelled.set()

    decoder.passing = passing
    bench.run()
    assert isinstance(bench.end(1), End)
    assert not any("finish_reason" in header for header in bench.headers(1))
    assert bench.said(2) == alone(made, prompts(8)[0], max_tokens=9)[0]
    assert decoder.cache_bytes([]) == 0


def test_a_setting_counts_from_the_next_pass_on(made: PreTrainedModel) -> None:
    bench = TextBench(made)
    first, second, third = prompts(5, 8, 6)
    bench.ask(1, first, batch_max=4)
    bench.ask(2, second, batch_max=4)
    for _ in range(8):
        bench.compute.turn()
    assert bench.models[A].decoder.passes[-1] == 2
    bench.ask(3, third, batch_max=1)
    before = len(bench.models[A].decoder.passes)
    bench.run()
    assert set(bench.models[A].decoder.passes[before:]) == {1}
    for number, prompt in ((1, first), (2, second), (3, third)):
        assert bench.said(number) == alone(made, prompt)[0]


def test_the_time_of_a_pass_is_shared_by_its_texts(
    made: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, clock_s = TextBench(made), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock_s[0])

    def passing(writings: Sequence[Writing]) -> None:
        clock_s[0] += 1.0

    bench.models[A].decoder.passing = passing
    for number, prompt in enumerate(prompts(5, 8, 6)):
        bench.ask(number, prompt, batch_max=2)
    bench.run()
    busy_us = [bench.end(number).busy_us for number in range(3)]
    assert sum(busy_us) == len(bench.models[A].decoder.passes) * 1_000_000
    assert min(busy_us) > 1_000_000
