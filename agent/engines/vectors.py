"""Embeddings and classifications: from texts to tokens, a forward pass over some, and the rows that come out.

Covers: reading a request, padding, pooling and scores, and the frame that an answer becomes. Does not cover:
which inputs share a pass (``agent/batching.py``), weights (``transformers``), or the pooling (``pooling``).

An input alone is computed as plain transformers computes it, to the last bit. Inputs that share a pass are
padded on the right and masked: no row reads another's, but a matrix product over more rows may sum in another
order, so that last bits differ.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agent.engines.pooling import Pooling, check_dimensions
from agent.facade import EngineError, EngineFrame
from packer.layout import WORKSPACE_ENCODER_TOKENS_MAX
from packer.types import Task

# OpenAI's limit for one embeddings request.
INPUTS_MAX = 2048


class EmbedFields(msgspec.Struct, frozen=True):
    """The fields of ``embed`` and ``classify``; ``dimensions``: only so many of each embedding."""

    inputs: list[str | list[int]]
    dimensions: int | None = None


class VectorAnswer:
    """A request's inputs as tokens, and the rows that are there of them."""

    def __init__(self, inputs: Sequence[Sequence[int]], dimensions: int | None = None) -> None:
        self.inputs = inputs
        self.dimensions = dimensions
        self._rows: list[torch.Tensor | None] = [None] * len(inputs)
        # In order; a pass takes any of them. A plain dict would be read over all that are gone to its first.
        self.missing = OrderedDict.fromkeys(range(len(inputs)))

    def put(self, place: int, row: torch.Tensor) -> None:
        self._rows[place] = row
        del self.missing[place]

    @property
    def rows(self) -> list[torch.Tensor]:
        return [row for row in self._rows if row is not None]


@dataclass(frozen=True, slots=True)
class Vectors:
    """One model's inputs and rows. ``context``: the tokens that an input may have."""

    task: Task
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    context: int
    vocabulary: int

    @property
    def tokens_max(self) -> int:
        """Tokens of a pass that needs no more memory than one longest input, for which the ledger holds."""
        return min(self.context, WORKSPACE_ENCODER_TOKENS_MAX)

    def begin(self, fields: EmbedFields) -> VectorAnswer:
        """Raises ``EngineError``; nothing is computed for a request of which one input is at fault."""
        count = len(fields.inputs)
        if not 0 < count <= INPUTS_MAX:
            raise EngineError("invalid_request", f"must hold 1 to {INPUTS_MAX} inputs, not {count}", "input")
        dimensions = fields.dimensions if self.task is Task.EMBEDDING else None
        if dimensions is not None:
            own = self.module.config.hidden_size * len(self.pooling.modes)
            check_dimensions(dimensions, own, self.module.config)
        inputs = [self._input_tokens(text, index, count) for index, text in enumerate(fields.inputs)]
        return VectorAnswer(inputs, dimensions)

    def compute(self, parts: Sequence[tuple[VectorAnswer, int]]) -> None:
        """One forward pass over inputs of any answers; puts their rows."""
        inputs = [answer.inputs[place] for answer, place in parts]
        ids, mask = self._padded(inputs)
        output = self.module(input_ids=ids, attention_mask=mask)
        if self.task is Task.EMBEDDING:
            hidden = output.last_hidden_state
            rows = [
                self.pooling.apply(hidden[i, : len(tokens)], parts[i][0].dimensions)
                for i, tokens in enumerate(inputs)
            ]
        else:
            logits = output.logits.to(torch.float32)
            rows = [self._scores(logits[i]) for i in range(len(inputs))]
        alike = all(row.shape == rows[0].shape for row in rows)
        for part, row in zip(parts, torch.stack(rows).cpu() if alike else rows, strict=True):
            # What is no number may have come from the padding, whose weights may be anything.
            if len(parts) > 1 and not bool(torch.isfinite(row).all()):
                self.compute([part])
            else:
                answer, place = part
                # A copy: a view would keep the rows of all the others in memory until its own request ends.
                answer.put(place, row.cpu().clone())

    def _padded(self, inputs: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, inputs))
        # Some models count positions by what is not this token.
        pad = self.module.config.pad_token_id
        pad = pad if type(pad) is int and 0 <= pad < self.vocabulary else 0
        ids = torch.tensor([[*tokens, *[pad] * (longest - len(tokens))] for tokens in inputs])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in inputs])
        device = self.module.device
        return ids.to(device), mask.to(device)

    def frame(self, answer: VectorAnswer) -> EngineFrame:
        """The answer, once no row is missing."""
        rows = torch.stack(answer.rows)
        body = rows.numpy().tobytes()
        count = sum(map(len, answer.inputs))
        if self.task is Task.EMBEDDING:
            return EngineFrame(
                {"count": len(rows), "dimensions": rows.shape[1], "prompt_tokens": count}, body
            )
        return EngineFrame({"labels": self._labels(rows.shape[1]), "prompt_tokens": count}, body)

    def _input_tokens(self, text: str | list[int], index: int, count: int) -> list[int]:
        field = "input" if count == 1 else f"input[{index}]"
        if isinstance(text, str):
            if self.task is Task.EMBEDDING:
                text = self.pooling.prompt + text
                text = text.lower() if self.pooling.lower_case else text
            tokens = list(self.tokenizer(text)["input_ids"])
        else:
            tokens = text
        check_tokens(tokens, self.vocabulary, field)
        if len(tokens) > self.context:
            raise EngineError(
                "context_length_exceeded",
                f"has {len(tokens)} tokens and the model takes at most {self.context}: shorten it",
                field,
            )
        return tokens

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        problem = self.module.config.problem_type
        if problem == "regression":
            return logits
        if problem == "multi_label_classification" or len(logits) == 1:
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=-1)

    def _labels(self, count: int) -> list[str]:
        names = {int(index): str(name) for index, name in (self.module.config.id2label or {}).items()}
        return [names.get(index, f"LABEL_{index}") for index in range(count)]


def check_tokens(tokens: Sequence[int], vocabulary: int, field: str) -> None:
    """Raises ``EngineError``."""
    if not tokens:
        raise EngineError("invalid_request", "has no tokens", field)
    # On a GPU a token outside the vocabulary kills the context, and the worker with it.
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise EngineError("invalid_request", f"holds a token outside of 0 to {vocabulary - 1}", field)
