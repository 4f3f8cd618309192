"""Text generation with one model: requests, and the choices that they become.

Covers: the fields of a ``generate`` request and their limits, one choice from logits to frames (its tokens,
its draws, its stops, its log probabilities), and the logits that follow one text. Does not cover: whose next
token it is (``decoding``), weights and tokenizers (``transformers``), chat templates (``chat``), which token
is next (``sampling``) or text pieces (``text``).

A choice knows nothing of other choices, nor how its logits came to be: whoever computes them, for one choice
or for many at a time, calls ``take`` with its row until ``reason`` is set, and then ``close``.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache as remembered
from typing import cast

import msgspec
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from agent.engines.chat import render
from agent.engines.sampling import (
    REPETITION_MAX,
    REPETITION_MIN,
    TEMPERATURE_MAX,
    TOP_K_MAX,
    Likely,
    Sampler,
    Sampling,
    likely,
)
from agent.engines.text import TextStream
from agent.engines.vocabulary import Vocabulary
from agent.facade import JSON, EngineError, EngineFrame

# OpenAI allows 4; agents send a few more. Each is searched for after every token.
STOPS_MAX = 16
STOP_CHARS_MAX = 256
# A conversation of more turns does not fit a body of 1 MiB in any useful way.
MESSAGES_MAX = 4096
# Each choice is a whole answer's work; they share nothing but the reading of the prompt.
CHOICES_MAX = 8
# OpenAI's limit for chat; each is a number, a token and its bytes in every frame.
TOP_LOGPROBS_MAX = 20
PENALTY_MAX = 2.0
BIAS_MAX = 100.0
# OpenAI's limit.
BIASES_MAX = 1024
SEED_MAX = 2**63 - 1
_TOKEN_NAME = re.compile(r"[0-9]{1,9}")


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str


class GenerateFields(msgspec.Struct, frozen=True):
    """The fields of a ``generate`` request; exactly one of the first three is given.

    ``n``: how many choices. ``logprobs``: for each token, its log probability and those of so many likeliest.
    """

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tokens: list[int] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    n: int = 1
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """What the requests to one model have in common."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    context: int
    vocabulary: int
    device: torch.device


# --- reading a request ------------------------------------------------------------------------------


def prompt_tokens(fields: GenerateFields, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Raises ``EngineError``."""
    given = [name for name in ("prompt", "messages", "tokens") if getattr(fields, name) is not None]
    if len(given) != 1:
        raise EngineError("invalid_request", f"give exactly one of prompt, messages and tokens, not {given}")
    if fields.tokens is not None:
        return list(fields.tokens)
    if fields.messages is None:
        return list(tokenizer(fields.prompt)["input_ids"])
    if not 0 < len(fields.messages) <= MESSAGES_MAX:
        raise EngineError("invalid_request", f"must hold 1 to {MESSAGES_MAX} messages", "messages")
    turns = [{"role": message.role, "content": message.content} for message in fields.messages]
    if tokenizer.chat_template is None:
        raise EngineError(
            "invalid_request",
            "this model has no chat template, so it can not answer messages: use /v1/completions, or push "
            "the model with a chat_template.jinja",
            "messages",
        )
    text = render(tokenizer, turns)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stops(fields: GenerateFields) -> list[str]:
    stops = [fields.stop] if isinstance(fields.stop, str) else list(fields.stop or ())
    if len(stops) > STOPS_MAX or any(len(stop) > STOP_CHARS_MAX for stop in stops):
        raise EngineError(
            "invalid_request", f"at most {STOPS_MAX} stop strings of {STOP_CHARS_MAX} characters", "stop"
        )
    return stops


def _tokens_max(fields: GenerateFields, prompt_count: int, context: int) -> int:
    """How many tokens may be generated. Raises ``EngineError``."""
    if prompt_count >= context:
        raise EngineError(
            "context_length_exceeded",
            f"the prompt has {prompt_count} tokens and the model's context is {context}: shorten the prompt",
            "messages" if fields.messages is not None else "prompt",
        )
    if fields.max_tokens is None:
        return context - prompt_count
    if fields.max_tokens < 1:
        raise EngineError("invalid_request", "must be at least 1", "max_tokens")
    if prompt_count + fields.max_tokens > context:
        raise EngineError(
            "context_length_exceeded",
            f"the prompt has {prompt_count} tokens and max_tokens is {fields.max_tokens}, together more than "
            f"the model's context of {context}: lower max_tokens or shorten the prompt",
            "max_tokens",
        )
    return fields.max_tokens


def _within(name: str, value: float | None, low: float, high: float, default: float) -> float:
    """The value that a request gives for a field, or the default. Raises ``EngineError``."""
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high:
        raise EngineError("invalid_request", f"must be from {low:g} to {high:g}", name)
    return value


def _asked_sampling(fields: GenerateFields, sampling: Sampling, vocabulary: int) -> Sampling:
    """What the directory says, with what the request says instead. Raises ``EngineError``."""
    top_p = sampling.top_p if fields.top_p is None else fields.top_p
    if not 0 < top_p <= 1:
        raise EngineError("invalid_request", "must be above 0 and at most 1", "top_p")
    presence, frequency = fields.presence_penalty, fields.frequency_penalty
    return replace(
        sampling,
        temperature=_within("temperature", fields.temperature, 0.0, TEMPERATURE_MAX, sampling.temperature),
        top_p=top_p,
        top_k=int(_within("top_k", fields.top_k, 0, TOP_K_MAX, sampling.top_k)),
        repetition_penalty=_within(
            "repetition_penalty",
            fields.repetition_penalty,
            REPETITION_MIN,
            REPETITION_MAX,
            sampling.repetition_penalty,
        ),
        presence_penalty=_within("presence_penalty", presence, -PENALTY_MAX, PENALTY_MAX, 0.0),
        frequency_penalty=_within("frequency_penalty", frequency, -PENALTY_MAX, PENALTY_MAX, 0.0),
        bias=_bias(fields.logit_bias or {}, vocabulary),
    )


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    """Raises ``EngineError``."""
    if len(given) > BIASES_MAX:
        raise EngineError(
            "invalid_request", f"holds {len(given)} tokens, the limit is {BIASES_MAX}", "logit_bias"
        )
    bias: dict[int, float] = {}
    for name, value in given.items():
        if not _TOKEN_NAME.fullmatch(name) or int(name) >= vocabulary:
            raise EngineError(
                "invalid_request",
                f"names {name[:40]!r}, which is no token number from 0 to {vocabulary - 1}",
                "logit_bias",
            )
        bias[int(name)] = _within("logit_bias", value, -BIAS_MAX, BIAS_MAX, 0.0)
    return bias


# --- writing an answer ------------------------------------------------------------------------------


class Choice:
    """One of a request's answers while it is written: its tokens, its draws, its text.

    ``reason`` is None until nothing more can come.
    """

    def __init__(
        self,
        index: int,
        sampler: Sampler,
        stream: TextStream,
        end_tokens: frozenset[int],
        tokens_max: int,
        top: int | None,
    ) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.reason: str | None = None
        self._sampler = sampler
        self._stream = stream
        self._end_tokens = end_tokens
        self.tokens_max = tokens_max
        self._top = top
        self._likely: list[Likely] = []  # of the tokens that are text, from the first on
        self._likely_given = 0

    def take(self, logits: torch.Tensor) -> None:
        """Add the token that follows by ``logits`` ([vocabulary] of the last position, float32)."""
        token = self._sampler.pick(logits)
        self.tokens.append(token)
        if token in self._end_tokens:
            self.reason = "stop"
            return
        if self._top is not None:
            self._likely.append(likely(logits, token, self._top))
        self._stream.push(token)
        if self._stream.stopped:
            self.reason = "stop"
        elif len(self.tokens) >= self.tokens_max:
            self.reason = "length"

    def close(self) -> None:
        """Show what was held back; what is left may hold a stop string."""
        self._stream.finish()
        if self._stream.stopped:
            self.reason = "stop"

    def shown(self) -> list[tuple[int, Likely]]:
        """The tokens that lie wholly in the shown text and were not given before, with where each begins:
        of a stop string no token is among them, not even one that begins before it."""
        if self._top is None:
            return []
        since, self._likely_given = self._likely_given, self._stream.tokens_shown
        return [(self._stream.begins_at(i), self._likely[i]) for i in range(since, self._likely_given)]


class Answer:
    """All choices of one request, and the frames that they become."""

    def __init__(
        self,
        writer: Writer,
        fields: GenerateFields,
        tokens: list[int],
        emit: Callable[[EngineFrame], None],
    ) -> None:
        """Checks the whole request before anything is computed. Raises ``EngineError``."""
        self.prompt = tokens
        self._emit = emit
        self._vocabulary = Vocabulary(writer.tokenizer)
        tokens_max = _tokens_max(fields, len(tokens), writer.context)
        if not 1 <= fields.n <= CHOICES_MAX:
            raise EngineError("invalid_request", f"must be from 1 to {CHOICES_MAX}", "n")
        if fields.logprobs is not None and not 0 <= fields.logprobs <= TOP_LOGPROBS_MAX:
            raise EngineError("invalid_request", f"must be from 0 to {TOP_LOGPROBS_MAX}", "logprobs")
        if fields.seed is not None and not -SEED_MAX - 1 <= fields.seed <= SEED_MAX:
            raise EngineError("invalid_request", "must fit in 64 bits", "seed")
        sampling = _asked_sampling(fields, writer.sampling, writer.vocabulary)
        stops = _stops(fields)

        def decode(ids: list[int]) -> str:
            return str(
                writer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )

        def choice(index: int) -> Choice:
            # Each choice is what a request of its own with the next seed would be.
            seed = None if fields.seed is None else fields.seed + index
            return Choice(
                index,
                Sampler(sampling, tokens, writer.vocabulary, seed, writer.device),
                TextStream(decode, stops, lambda text: self._say(index, text)),
                frozenset(sampling.end_tokens),
                tokens_max,
                fields.logprobs,
            )

        self.choices = tuple(choice(index) for index in range(fields.n))

    def end(self, choice: Choice) -> None:
        """Emit what a choice held back and why it ended."""
        choice.close()
        self._say(choice.index, "")
        self._frame(choice.index, {"finish_reason": choice.reason or "length"})

    def _say(self, index: int, text: str) -> None:
        figures = self._figures(self.choices[index])
        if text or figures:
            self._frame(index, {"delta": text, **({"logprobs": figures} if figures else {})})

    def _frame(self, index: int, header: dict[str, JSON]) -> None:
        # Counted in every frame, over all choices: a caller that leaves has used what was read and written
        # by then.
        written = sum(len(choice.tokens) for choice in self.choices)
        counts: dict[str, JSON] = {"prompt_tokens": len(self.prompt), "completion_tokens": written}
        if index:
            header["choice"] = index
        self._emit(EngineFrame({**header, **counts}))

    def _figures(self, choice: Choice) -> list[JSON]:
        name = self._vocabulary.bytes_of
        return [
            {
                "at": at,
                "bytes": name(one.token).hex(),
                "logprob": one.logprob,
                "top": [[name(token).hex(), logprob] for token, logprob in one.top],
            }
            for at, one in choice.shown()
        ]


# --- computing --------------------------------------------------------------------------------------


def last_logits(module: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """What may follow after ``tokens``, which follow what the cache holds; they are in it afterwards.

    [vocabulary] in float32.
    """
    ids = torch.tensor([tokens], dtype=torch.long, device=module.device)
    # transformers' own ``generate`` gives it too, and some architectures compute positions from it.
    seen = torch.ones(1, cache.get_seq_length() + len(tokens), dtype=torch.long, device=module.device)
    more = {"logits_to_keep": 1} if _keeps_logits(type(module).forward) else {}
    # Typed as a tensor by the stubs of torch, because modules look attributes up at run time.
    run = cast("Callable[..., object]", module)
    output = run(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True, **more)
    logits: torch.Tensor = output.logits  # type: ignore[attr-defined]
    return logits[0, -1].to(torch.float32)


@remembered
def _keeps_logits(forward: Callable[..., object]) -> bool:
    """Whether it can compute the logits of the last position only, which for a long prompt is most of it."""
    return "logits_to_keep" in inspect.signature(forward).parameters
