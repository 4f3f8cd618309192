"""Written answers token for token: against plain ``generate``, alone and several at a time.

Covers: greedy and drawn tokens, seeds of several choices, penalties and biases, log probabilities, stop
strings and what is cut along with them, counts, and the allow-listed architectures that have a form of
attention of their own. Does not cover: directories and weights (``test_engines``), or HTTP
(``test_choices``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_gpt2, tiny_llama

from agent.engines.decoding import Decoder, Text, write
from agent.engines.generation import Answer, GenerateFields, Writer, prompt_tokens
from agent.engines.sampling import LOGPROB_MIN, Sampler, Sampling, likely
from agent.engines.text import TextStream
from agent.engines.transformers import _build_module
from agent.engines.vocabulary import Vocabulary
from agent.facade import JSON, EngineError, EngineFrame
from packer.directory import ARCHITECTURES
from packer.types import Task

PROMPT = "Hello, what"
NEVER: Callable[[], bool] = lambda: False  # noqa: E731
# transformers' ``generate`` is typed as a tensor by its stubs.
Generate = Callable[..., torch.Tensor]


class Plain:
    """A directory as plain transformers loads it."""

    def __init__(self, directory: Path) -> None:
        self.module = transformers.AutoModelForCausalLM.from_pretrained(directory)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.ends = (int(self.tokenizer.eos_token_id),)
        names = Vocabulary(self.tokenizer)
        # Models of random weights write halves of characters, whose text depends on what follows.
        self.ascii = {
            str(token): -100.0
            for token in range(len(self.tokenizer))
            if not names.bytes_of(token).isascii() or token in self.ends
        }

    def answer(
        self, sampling: Sampling | None = None, cancelled: Callable[[], bool] = NEVER, **fields: Any
    ) -> tuple[Answer, list[EngineFrame]]:
        frames: list[EngineFrame] = []
        asked = GenerateFields(**{"prompt": PROMPT, "max_tokens": 24, "temperature": 0.0, **fields})
        tokens = prompt_tokens(asked, self.tokenizer)
        how = sampling or Sampling(end_tokens=self.ends)
        context = self.module.config.max_position_embeddings
        writer = Writer(self.tokenizer, how, context, self.module.config.vocab_size, self.module.device)
        answer = Answer(writer, asked, tokens, frames.append)
        write(Text(answer, Decoder(self.module, context)), cancelled)
        return answer, frames

    def generate(self, count: int = 24, seed: int | None = None, **options: Any) -> list[int]:
        """What ``generate`` of transformers writes after the same prompt."""
        batch = self.tokenizer(PROMPT, return_tensors="pt")
        if seed is not None:
            torch.manual_seed(seed)
        out = cast("Generate", getattr(self.module, "generate"))(  # noqa: B009  # its stubs are wrong
            **batch, max_new_tokens=count, do_sample=seed is not None, pad_token_id=0, **options
        )
        return [int(token) for token in out[0][batch["input_ids"].shape[1] :]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made = tiny_gpt2 if request.param == "gpt2" else tiny_llama
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small models only wait for each other's threads
    yield Plain(made(tmp_path_factory.mktemp(request.param)))
    torch.set_num_threads(threads)


def text_of(frames: list[EngineFrame], choice: int = 0) -> str:
    mine = [frame.header for frame in frames if frame.header.get("choice", 0) == choice]
    return "".join(str(header.get("delta", "")) for header in mine)


def figures_of(frames: list[EngineFrame], choice: int = 0) -> list[dict[str, Any]]:
    mine = [frame.header for frame in frames if frame.header.get("choice", 0) == choice]
    return [
        cast("dict[str, Any]", one)
        for header in mine
        for one in cast("list[JSON]", header.get("logprobs", []))
    ]


# --- tokens ---------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_plain_generate(plain: Plain) -> None:
    answer, _ = plain.answer()
    assert answer.choices[0].tokens == plain.generate()


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3},
    ],
)
def test_drawn_tokens_are_those_of_plain_generate_with_the_same_seed(
    plain: Plain, how: dict[str, Any]
) -> None:
    """Whatever else is drawn in this process."""
    wanted = plain.generate(seed=11, **{"top_k": 0, **how})
    torch.manual_seed(3)
    answer, _ = plain.answer(seed=11, **how)
    assert answer.choices[0].tokens == wanted


def test_choices_are_what_requests_of_their_own_with_the_next_seeds_are(plain: Plain) -> None:
    answer, frames = plain.answer(n=3, seed=5, temperature=1.5, logprobs=2, stop=["qu"])
    assert len({tuple(choice.tokens) for choice in answer.choices}) == 3
    for choice in answer.choices:
        alone, alone_frames = plain.answer(seed=5 + choice.index, temperature=1.5, logprobs=2, stop=["qu"])
        assert (choice.tokens, choice.reason) == (alone.choices[0].tokens, alone.choices[0].reason)
        assert text_of(frames, choice.index) == text_of(alone_frames)
        assert figures_of(frames, choice.index) == figures_of(alone_frames)


def test_greedy_choices_are_alike(plain: Plain) -> None:
    answer, _ = plain.answer(n=2)
    assert answer.choices[0].tokens == answer.choices[1].tokens == plain.generate()


def test_unseeded_choices_differ(plain: Plain) -> None:
    answer, _ = plain.answer(n=2, temperature=2.0)
    assert answer.choices[0].tokens != answer.choices[1].tokens


def test_a_prompt_is_counted_once_and_what_is_written_by_all_choices(plain: Plain) -> None:
    answer, frames = plain.answer(n=3, temperature=1.5, seed=1)
    prompt = len(plain.tokenizer(PROMPT)["input_ids"])
    assert {frame.header["prompt_tokens"] for frame in frames} == {prompt}
    counts = [int(str(frame.header["completion_tokens"])) for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == sum(len(choice.tokens) for choice in answer.choices)
    reasons = [frame.header.get("choice", 0) for frame in frames if "finish_reason" in frame.header]
    assert reasons == [0, 1, 2]


def test_cancelling_begins_no_other_choice(plain: Plain) -> None:
    calls = iter([False, False, False])
    answer, _ = plain.answer(n=3, cancelled=lambda: next(calls, True))
    assert [len(choice.tokens) for choice in answer.choices] == [3, 0, 0]


# --- penalties and biases -------------------------------------------------------------------------


def test_a_frequency_penalty_ends_repetition(plain: Plain) -> None:
    free, _ = plain.answer(max_tokens=40)
    bound, _ = plain.answer(max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0)

    def distinct(answer: Answer) -> int:
        return len(set(answer.choices[0].tokens))

    assert bound.choices[0].tokens[0] == free.choices[0].tokens[0], "nothing is written yet"
    assert distinct(bound) > distinct(free)


def test_a_bias_forbids_and_forces(plain: Plain) -> None:
    first = plain.generate()[0]
    forbidden, _ = plain.answer(max_tokens=1, logit_bias={str(first): -100})
    assert forbidden.choices[0].tokens != [first]
    forced, _ = plain.answer(max_tokens=3, logit_bias={"70": 100})
    assert forced.choices[0].tokens == [70, 70, 70]


# --- log probabilities ----------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(plain: Plain) -> None:
    """Of every token, before temperature and penalties; equal to one forward pass over the whole text."""
    answer, frames = plain.answer(temperature=1.5, seed=2, logprobs=4, frequency_penalty=1.0)
    written = answer.choices[0].tokens
    with torch.inference_mode():
        logits = plain.module(torch.tensor([[*answer.prompt, *written]])).logits[0].float()
    rows = torch.log_softmax(logits[len(answer.prompt) - 1 : -1], dim=-1)
    figures = figures_of(frames)
    names = Vocabulary(plain.tokenizer)
    assert len(figures) == len([token for token in written if token not in plain.ends])
    for row, token, one in zip(rows, written, figures, strict=False):
        assert one["bytes"] == names.bytes_of(token).hex()
        assert one["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        best, _ = torch.topk(row, 4)
        assert [logprob for _, logprob in one["top"]] == pytest.approx(best.tolist(), abs=1e-4)


def test_tokens_join_to_the_text_and_say_where_they_begin(plain: Plain) -> None:
    _, frames = plain.answer(temperature=1.5, seed=4, logprobs=0, max_tokens=40, logit_bias=plain.ascii)
    figures, text = figures_of(frames), text_of(frames)
    pieces = [bytes.fromhex(one["bytes"]).decode() for one in figures]
    assert "".join(pieces) == text
    assert [one["top"] for one in figures] == [[]] * 40
    assert [one["at"] for one in figures] == [len("".join(pieces[:i])) for i in range(40)]


def test_numbers_that_json_has_not_are_given_as_openai_gives_them() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0])
    found = likely(logits, 1, 3)
    assert found.logprob == LOGPROB_MIN
    assert [token for token, _ in found.top] == [2, 0, 1]
    assert found.top[-1][1] == LOGPROB_MIN
    broken = likely(torch.full((3,), torch.nan), 0, 1)
    assert (broken.logprob, broken.top[0][1]) == (LOGPROB_MIN, LOGPROB_MIN)


def test_output_that_is_no_number_fails_before_it_is_drawn_from(plain: Plain) -> None:
    with torch.no_grad():
        weight = next(plain.module.parameters())
        kept = weight.clone()
        weight.fill_(torch.nan)
    try:
        with pytest.raises(ArithmeticError):
            plain.answer(temperature=1.0)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


# --- stops ----------------------------------------------------------------------------------------


def test_every_stop_string_cuts_text_and_log_probabilities_at_itself(plain: Plain) -> None:
    """Pieces of up to four characters of an answer, also such that begin or end inside a token."""
    how: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 9, "logit_bias": plain.ascii}
    _, frames = plain.answer(logprobs=0, **how)
    whole, all_figures = text_of(frames), figures_of(frames)
    assert len(whole) > 12
    ends = [one["at"] + len(bytes.fromhex(one["bytes"])) for one in all_figures]
    for begin in range(0, len(whole) - 4, 3):
        stop = whole[begin : begin + 1 + begin % 4]
        answer, frames = plain.answer(logprobs=0, stop=[stop], **how)
        cut = whole.index(stop)
        assert (text_of(frames), answer.choices[0].reason) == (whole[:cut], "stop")
        assert figures_of(frames) == all_figures[: len([end for end in ends if end <= cut])]
        # Nothing is written, and paid for, after the token that completes the stop string.
        needed = len([end for end in ends if end < cut + len(stop)]) + 1
        assert len(answer.choices[0].tokens) == needed
        assert frames[-1].header["completion_tokens"] == needed


def decode(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes, and 256 a sign without text."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(alphabet="abé€", max_size=20),
    st.lists(st.text(alphabet="abé€", min_size=1, max_size=3), max_size=2),
    st.sets(st.integers(0, 30), max_size=3),
)
def test_the_tokens_of_the_shown_text_are_told_exactly(text: str, stops: list[str], silent: set[int]) -> None:
    tokens = [token for i, byte in enumerate(text.encode()) for token in ([256] * (i in silent) + [byte])]
    shown: list[str] = []
    stream = TextStream(decode, stops, shown.append)
    for count, token in enumerate(tokens, 1):
        stream.push(token)
        assert stream.tokens_shown <= count
        if stream.stopped:
            break
    stream.finish()
    said = "".join(shown)
    whole = decode(tokens[: stream.tokens_shown])
    assert said.startswith(whole)
    if not stream.stopped:
        assert (whole, stream.tokens_shown) == (said, len(tokens))
    begins = [stream.begins_at(i) for i in range(stream.tokens_shown)]
    assert begins == sorted(begins)
    for i, begin in enumerate(begins):
        assert (
            decode(tokens[:i]).rstrip("\ufffd") == said[:begin] or tokens[i] == 256 or begin == begins[i - 1]
        )


# --- bytes of tokens ------------------------------------------------------------------------------


def test_bytes_of_every_token_of_a_byte_level_vocabulary(plain: Plain) -> None:
    names = Vocabulary(plain.tokenizer)
    text = "Grüße, 你好 🤠 — \t\n done"
    tokens = plain.tokenizer(text)["input_ids"]
    assert b"".join(map(names.bytes_of, tokens)) == text.encode()
    assert names.bytes_of(plain.ends[0]) == b"<|endoftext|>"
    assert names.bytes_of(10**6) == b""


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    from tokenizers import Tokenizer, decoders, models

    pieces: dict[str, int] = {"<unk>": 0, "<0xE2>": 1, "\u2581horse": 2, "s": 3}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    kind: Callable[..., Any] = transformers.PreTrainedTokenizerFast
    fast = kind(tokenizer_object=tokenizer, unk_token="<unk>")
    names = Vocabulary(fast)
    assert [names.bytes_of(token) for token in range(4)] == [b"<unk>", b"\xe2", b" horse", b"s"]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {"99999": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"٣": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias"),
        ({"logit_bias": {str(i): 0.0 for i in range(1025)}}, "logit_bias"),
    ],
)
def test_what_is_beyond_a_limit_is_named_before_anything_is_computed(
    plain: Plain, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(EngineError) as error:
        plain.answer(**fields)
    assert (error.value.code, error.value.field) == ("invalid_request", field)


# --- architectures --------------------------------------------------------------------------------

# Those without fused attention, as small as they can be made.
_PLAIN_ATTENTION: dict[str, dict[str, Any]] = {
    "MPNetModel": {"num_hidden_layers": 1},
    "DebertaV2Model": {"num_hidden_layers": 1},
    "GPTNeoForCausalLM": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTJForCausalLM": {"n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_embd": 32},
    "BloomForCausalLM": {"n_layer": 1, "n_head": 2},
    "Gemma2ForCausalLM": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
}


@pytest.mark.parametrize("name", sorted(_PLAIN_ATTENTION))
def test_an_architecture_without_fused_attention_is_built(name: str) -> None:
    model_type, task = ARCHITECTURES[name]
    small = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(model_type, **{**small, **_PLAIN_ATTENTION[name]})
    config.architectures = [name]
    module = _build_module(config, task)
    assert type(module).__name__ == name
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert task in (Task.EMBEDDING, Task.GENERATION)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-20, 1e-6])
def test_a_temperature_near_zero_draws_the_likeliest(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), [0], 4, 1, torch.device("cpu"))
    assert [sampler.pick(torch.tensor([1.0, 30.0, 29.0, -5.0])) for _ in range(5)] == [1] * 5
