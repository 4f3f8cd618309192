"""Texts that are written beside others: the same tokens as alone, on every architecture.

Covers: passes of one and of several, texts that join, leave, stop and are read again in any order, and what
is no number. Does not cover: which texts run (``test_cache_room``), requests (``test_text_turns``), or tokens
and draws of one text (``test_generation``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from tiny_texts import ENDS, NAMES, WORDS, alone, decoder_of, module, prompts, text, tokens

from agent.engines.decoding import Decoder, Text, Writing
from packer.directory import ARCHITECTURES

PROMPTS = (3, 11, 7, 24)
# In passes of one alone the computing is the same whatever the architecture.
PLAIN = ("LlamaForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Such small models only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def take(decoder: Decoder, writings: Sequence[Writing]) -> None:
    """A pass, and what follows from it."""
    logits = decoder.step(writings) if writings[0].read else [decoder.read(writings[0], keeps=True)]
    for writing, row in zip(writings, logits, strict=True):
        if row is not None:
            writing.choice.take(row)
        if writing.choice.reason is not None:
            decoder.forget(writing)
            writing.text.end(writing)


@torch.inference_mode()
def beside_others(decoder: Decoder, texts: Sequence[Text], chance: random.Random, joined: bool) -> None:
    """Write all in a random order; texts start, stop and go on at random, in passes of one or of several."""
    while writings := [writing for each in texts for writing in each.open]:
        idle = [writing for writing in writings if not writing.read]
        running = [writing for writing in writings if writing.read]
        if idle and (not running or chance.random() < 0.3):
            take(decoder, [chance.choice(idle)])
        elif chance.random() < 0.05:
            decoder.forget(chance.choice(running))
        elif joined:
            together = [writing for writing in running if decoder.joins(writing)]
            together = together[: chance.randint(1, len(together))] if together else []
            take(decoder, together or [running[0]])
        else:
            take(decoder, [chance.choice(running)])


@pytest.mark.parametrize(
    ("name", "joined"), [*((name, True) for name in NAMES), *((name, False) for name in PLAIN)]
)
def test_a_text_beside_others_is_what_it_is_alone(name: str, joined: bool) -> None:
    made = module(name)
    given = prompts(*PROMPTS)
    decoder = decoder_of(made)
    texts = [text(decoder, prompt) for prompt in given]
    beside_others(decoder, texts, random.Random(name), joined)
    assert [tokens(each) for each in texts] == [alone(made, prompt) for prompt in given]


def test_most_architectures_share_passes_and_sliding_windows_do_not() -> None:
    shares = {}
    for name in NAMES:
        made = module(name)
        decoder = decoder_of(made)
        one = text(decoder, prompts(12)[0])
        with torch.inference_mode():
            decoder.read(one.open[0], keeps=True)
        shares[ARCHITECTURES[name][0]] = decoder.joins(one.open[0])
    assert {kind for kind, joins in shares.items() if not joins} == {"mistral", "gemma2", "gemma3_text"}


@pytest.mark.parametrize("joined", [False, True])
def test_draws_are_the_same_beside_others(joined: bool) -> None:
    made = module("LlamaForCausalLM")
    given: list[tuple[list[int], dict[str, Any]]] = [
        (prompt, {"temperature": 1.2, "seed": 100 + at, "n": 1 + at})
        for at, prompt in enumerate(prompts(5, 9, 6))
    ]
    decoder = decoder_of(made)
    texts = [text(decoder, prompt, **fields) for prompt, fields in given]
    beside_others(decoder, texts, random.Random(1), joined)
    assert [tokens(each) for each in texts] == [alone(made, prompt, **fields) for prompt, fields in given]


def test_passes_of_one_are_plain_generate_to_the_token() -> None:
    made = module("LlamaForCausalLM")
    given = prompts(*PROMPTS)
    decoder = decoder_of(made)
    texts = [text(decoder, prompt) for prompt in given]
    beside_others(decoder, texts, random.Random(2), joined=False)
    generate = cast(Any, made).generate
    for prompt, each in zip(given, texts, strict=True):
        ids = torch.tensor([prompt])
        plain = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(ENDS),
        )
        assert tokens(each) == [plain[0, len(prompt) :].tolist()]


@torch.inference_mode()
def test_what_is_no_number_in_one_text_is_in_no_other() -> None:
    made = module("LlamaForCausalLM")
    bad = WORDS - 1
    made.get_parameter("model.embed_tokens.weight")[bad] = float("nan")
    clean, poisoned = prompts(6)[0], [5, bad, 7, 8]
    wanted = alone(made, clean)
    decoder = decoder_of(made)
    good, evil = text(decoder, clean), text(decoder, poisoned)
    take(decoder, good.open)
    take(decoder, evil.open)
    while good.open:
        take(decoder, [*good.open, *evil.open])
    assert tokens(good) == wanted


@torch.inference_mode()
def test_a_text_that_ends_leaves_nothing_behind() -> None:
    made = module("GPT2LMHeadModel")
    decoder = decoder_of(made)
    texts = [text(decoder, prompt, n=2) for prompt in prompts(4, 8)]
    beside_others(decoder, texts, random.Random(4), joined=True)
    assert decoder.cache_bytes([]) == 0
    assert all(each.shared is None for each in texts)


@torch.inference_mode()
def test_texts_that_could_not_be_taken_apart_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("LlamaForCausalLM")
    given = prompts(6, 9, 4)
    wanted = [alone(made, prompt) for prompt in given]
    decoder = decoder_of(made)
    texts = [text(decoder, prompt) for prompt in given]
    rows = [each.open[0] for each in texts]
    for writing in rows:
        take(decoder, [writing])
    take(decoder, rows)
    parts: list[int] = []
    take_row = Decoder._take_row

    def failing(*arguments: Any) -> None:
        parts.append(1)
        if len(parts) == 4:  # in the second layer
            raise MemoryError
        take_row(*arguments)

    monkeypatch.setattr(Decoder, "_take_row", staticmethod(failing))
    with pytest.raises(MemoryError):
        decoder.step(rows[:1])
    assert all(writing.cache is None and not writing.read for writing in rows)
    beside_others(decoder, texts, random.Random(4), joined=False)
    assert [tokens(each) for each in texts] == wanted
