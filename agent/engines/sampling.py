"""Choosing the next token: what a directory and a request say about it, and one stream of draws.

Covers: settings and their limits, penalties and biases, greedy and drawn tokens, log probabilities. Does not
cover: where the numbers come from or what becomes of the token (``generation``).

Draws are transformers' own: the same seed gives the same tokens as its ``generate`` after ``manual_seed``.
Each stream has a generator of its own, so what else is drawn in the process changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

TEMPERATURE_MAX = 100.0
# Below it a quotient overflows; the likeliest token is all that is drawn long before.
TEMPERATURE_MIN = 1e-5
TOP_K_MAX = 1_000_000
# Beyond them a penalty is a ban, and a product overflows.
REPETITION_MIN, REPETITION_MAX = 1e-3, 1e3
# Tokens are handed to torch as 64-bit numbers; no vocabulary comes near this.
TOKEN_MAX = 2**31 - 1
# JSON has no infinity; this is what OpenAI writes for a token that can not come.
LOGPROB_MIN = -9999.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: what a directory's generation_config.json says, or a request on top of it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    end_tokens: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)


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
        int(number("top_k", 0, 0, TOP_K_MAX)) if sampled else 0,
        number("repetition_penalty", 1.0, REPETITION_MIN, REPETITION_MAX),
        end_tokens or tuple(token for token in fallback_end if 0 <= token <= TOKEN_MAX),
    )


@dataclass(frozen=True, slots=True)
class Likely:
    """How likely the model found a token, and those that it found likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def likely(logits: torch.Tensor, token: int, top: int) -> Likely:
    """From the model's own logits ([vocabulary], float32), before temperature, penalties and biases: the
    same whatever the caller asked about sampling."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = torch.topk(logprobs, min(top, len(logprobs)))
    best = zip(tokens.tolist(), map(_finite, values.tolist()), strict=True)
    return Likely(token, _finite(float(logprobs[token])), tuple(best))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOGPROB_MIN


class Sampler:
    """The draws of one sequence."""

    def __init__(
        self, how: Sampling, prompt: Sequence[int], vocabulary: int, seed: int | None, device: torch.device
    ) -> None:
        self._how = how
        self._warpers = _warpers(how)
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        # Only what a penalty needs is kept, on the device, and written to in place.
        self._seen: torch.Tensor | None = None
        if how.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt, dtype=torch.long, device=device)] = True
        self._counts: torch.Tensor | None = None
        if how.presence_penalty or how.frequency_penalty:
            self._counts = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if how.bias:
            tokens = torch.tensor(list(how.bias), dtype=torch.long, device=device)
            self._bias = tokens, torch.tensor(list(how.bias.values()), dtype=torch.float32, device=device)

    def pick(self, logits: torch.Tensor) -> int:
        """The next token after ``logits`` ([vocabulary], float32), which stay as they are."""
        scores = self._penalized(logits)
        if self._how.temperature < TEMPERATURE_MIN:
            token = int(torch.argmax(scores))
        else:
            row = scores.unsqueeze(0)
            for warper in self._warpers:
                row = warper(None, row)
            chances = torch.softmax(row, dim=-1)
            # On a GPU drawing from what is not a number ends the context, and the worker with it.
            if not bool(torch.isfinite(chances).all()):
                raise ArithmeticError("the model's output is not a number")
            token = int(torch.multinomial(chances, num_samples=1, generator=self._generator))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        scores, how = logits, self._how
        if self._bias is not None:
            scores = scores.index_add(0, *self._bias)
        if self._seen is not None:
            penalty = how.repetition_penalty
            less = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self._seen, less, scores)
        if self._counts is not None:
            scores = scores - how.frequency_penalty * self._counts
            scores = scores - how.presence_penalty * (self._counts > 0)
        return scores


_Warper = TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper


def _warpers(how: Sampling) -> tuple[_Warper, ...]:
    """transformers' own, in its own order."""
    found: list[_Warper] = []
    if how.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        found.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1.0:
        found.append(TopPLogitsWarper(how.top_p))
    return tuple(found)
