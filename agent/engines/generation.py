"""Text generation with one model: prompt, sampling, streaming, stopping.

Covers: the fields of a ``generate`` request and their limits, the sampling settings a directory brings,
and the loop (transformers' own ``generate``). Does not cover: weights and tokenizers (``transformers``),
chat templates (``chat``) or text pieces (``text``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from agent.engines.chat import render
from agent.engines.text import TextStream
from agent.facade import EngineError, EngineFrame

# OpenAI allows 4; agents send a few more. Each is searched for after every token.
STOPS_MAX = 16
STOP_CHARS_MAX = 256
# A conversation of more turns does not fit a body of 1 MiB in any useful way.
MESSAGES_MAX = 4096
TEMPERATURE_MAX = 100.0
SEED_MAX = 2**63 - 1
# Tokens are handed to torch as 64-bit numbers; no vocabulary comes near this.
TOKEN_MAX = 2**31 - 1


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str


class GenerateFields(msgspec.Struct, frozen=True):
    """The fields of a ``generate`` request; exactly one of the first three is given."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tokens: list[int] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] | str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a directory's generation_config.json says about choosing tokens; the request overrides it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    end_tokens: tuple[int, ...] = ()


def read_sampling(config: Mapping[str, object], fallback_end: Sequence[int]) -> Sampling:
    """From the parsed generation_config.json (empty when there is none). Values of a wrong type or
    without sense are left at their defaults: they are advice, not part of the model."""
    declared = config.get("eos_token_id")
    ends = declared if isinstance(declared, list) else [declared]
    end_tokens = tuple(token for token in ends if type(token) is int and 0 <= token <= TOKEN_MAX)
    sampled = config.get("do_sample") is True

    def number(name: str, default: float, low: float, high: float) -> float:
        value = config.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        return default

    return Sampling(
        number("temperature", 1.0, 0.0, TEMPERATURE_MAX) if sampled else 1.0,
        number("top_p", 1.0, 1e-6, 1.0) if sampled else 1.0,
        int(number("top_k", 0, 0, 1_000_000)) if sampled else 0,
        number("repetition_penalty", 1.0, 1e-3, 1e3),
        end_tokens or tuple(token for token in fallback_end if 0 <= token <= TOKEN_MAX),
    )


class _Watch(StoppingCriteria):
    """Called after every token: streams its text and says whether to stop.

    It does the streaming itself, because transformers calls streamers before the criteria in some
    versions and after them in others.
    """

    def __init__(self, stream: TextStream, end_tokens: frozenset[int], cancelled: Callable[[], bool]) -> None:
        self._stream = stream
        self._end_tokens = end_tokens
        self._cancelled = cancelled
        self.tokens = 0
        self.ended = False

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        token = int(input_ids[0, -1])
        self.tokens += 1
        if token in self._end_tokens:
            self.ended = True
        else:
            self._stream.push(token)
        stop = self.ended or self._stream.stopped or self._cancelled()
        return torch.full((1,), stop, dtype=torch.bool, device=input_ids.device)


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


def _generation_config(
    fields: GenerateFields, sampling: Sampling, tokens_max: int, pad_token: int
) -> GenerationConfig:
    temperature = sampling.temperature if fields.temperature is None else fields.temperature
    top_p = sampling.top_p if fields.top_p is None else fields.top_p
    if not math.isfinite(temperature) or not 0 <= temperature <= TEMPERATURE_MAX:
        raise EngineError("invalid_request", f"must be from 0 to {TEMPERATURE_MAX:g}", "temperature")
    if not 0 < top_p <= 1:
        raise EngineError("invalid_request", "must be above 0 and at most 1", "top_p")
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens_max,
        do_sample=temperature > 0,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(sampling.end_tokens) or None,
        pad_token_id=pad_token,
        use_cache=True,
        disable_compile=True,
    )
    if temperature > 0:
        config.temperature = temperature
        config.top_p = top_p
        config.top_k = sampling.top_k
    return config


def generate(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    context: int,
    fields: GenerateFields,
    tokens: list[int],
    emit: Callable[[EngineFrame], None],
    cancelled: Callable[[], bool],
) -> None:
    """Generate after ``tokens``, emitting a frame per piece of text and a last one with the counts.

    Must run in the one compute thread: the seed is the process's. Raises ``EngineError``.
    """
    tokens_max = _tokens_max(fields, len(tokens), context)
    pad_token = sampling.end_tokens[0] if sampling.end_tokens else 0
    config = _generation_config(fields, sampling, tokens_max, pad_token)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def said(text: str) -> None:
        # Counted in every frame: a caller that leaves has used what was read and written by then.
        counts = {"prompt_tokens": len(tokens), "completion_tokens": watch.tokens}
        emit(EngineFrame({"delta": text, **counts}))

    stream = TextStream(decode, _stops(fields), said)
    watch = _Watch(stream, frozenset(sampling.end_tokens), cancelled)
    if fields.seed is None:
        torch.seed()
    elif not -SEED_MAX - 1 <= fields.seed <= SEED_MAX:
        raise EngineError("invalid_request", "must fit in 64 bits", "seed")
    else:
        torch.manual_seed(fields.seed)
    input_ids = torch.tensor([tokens], dtype=torch.long, device=module.device)
    # Typed as a tensor by the stubs of torch, because modules look attributes up at run time.
    run = cast("Callable[..., torch.Tensor]", module.generate)
    run(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    stream.finish()
    reason = "stop" if watch.ended or stream.stopped else "length"
    emit(
        EngineFrame(
            {"finish_reason": reason, "prompt_tokens": len(tokens), "completion_tokens": watch.tokens}
        )
    )
