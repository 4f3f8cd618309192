"""Writing texts with one model: what it has read of each, and the pass that gives each its next token.

Covers: reading prompts, steps of one text and of several that share a pass, and the caches. Does not cover:
tokens, draws and frames (``generation``), or which texts run (``agent/cache_room.py``, ``agent/compute.py``).

A text alone is computed as transformers' ``generate`` computes it, to the last bit. Texts that share a pass
have their caches in one, shorter ones padded on the left and masked.

transformers' own continuous batching is not used. What it computes was right where it ran, but in release 5
it draws for all requests from one random stream and is greedy for all or for none, so that a seed means
nothing; it drops repetition penalties, knows no stop strings, takes a share of the memory for a cache of its
own size, runs a thread of its own, and fails with the architectures that choose their attention themselves.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from agent.engines.generation import Answer, Choice, last_logits


@dataclass(slots=True, eq=False)
class Writing:
    """A text in the making. ``read``: its first tokens that are in the cache, of its prompt and its own."""

    text: Text
    choice: Choice
    cache: DynamicCache | None = None
    read: int = 0
    alone: bool = False  # a pass over several failed that it was part of
    passed: int = 0  # the number of its last pass, by which texts take turns

    @property
    def length(self) -> int:
        return len(self.text.answer.prompt) + len(self.choice.tokens)

    @property
    def left(self) -> int:
        return self.choice.tokens_max - len(self.choice.tokens)

    @property
    def next_token(self) -> int:
        return self.choice.tokens[self.read - len(self.text.answer.prompt)]


class Text:
    """A request's choices. ``open``: those that are not at their end, in order."""

    def __init__(self, answer: Answer, decoder: Decoder) -> None:
        self.answer = answer
        self.decoder = decoder
        self.open = [Writing(self, choice) for choice in answer.choices]
        # What was read of the prompt and what may follow it, while a choice has not begun.
        self.shared: tuple[DynamicCache, torch.Tensor] | None = None

    @property
    def shared_tokens(self) -> int:
        return len(self.answer.prompt) if self.shared is not None else 0

    def end(self, writing: Writing) -> None:
        """It has its last token."""
        self.open.remove(writing)
        self.answer.end(writing.choice)


class Decoder:
    """For one model and the one thread that computes. A pass gives the logits of each text's last position:
    None where they are known, because the text had stopped and is read again.

    ``tokens_max``: of all caches together. ``before_pass`` is called before each.
    """

    def __init__(
        self, module: PreTrainedModel, tokens_max: int, before_pass: Callable[[], None] = lambda: None
    ) -> None:
        self.tokens_max = tokens_max
        self._module = module
        self._before_pass = before_pass
        # Whose caches are rows of one; None: of one that was given up.
        self._together: list[Writing | None] = []
        self._rows: DynamicCache | None = None
        self._takes_positions = "position_ids" in inspect.signature(module.forward).parameters

    @torch.inference_mode()
    def read(self, writing: Writing, keeps: bool) -> torch.Tensor | None:
        """Read the prompt of a text that has no cache. ``keeps``: there is room to have it twice, so that
        the request's other choices need not read it again."""
        self._before_pass()
        text, prompt = writing.text, writing.text.answer.prompt
        if text.shared is not None:
            cache, logits = text.shared
        else:
            cache = DynamicCache(config=self._module.config)
            logits = last_logits(self._module, prompt, cache)
        others = [other for other in text.open if other is not writing]
        to_come = any(not other.read and not other.choice.tokens for other in others)
        kept = to_come and (keeps or text.shared is not None)
        text.shared = (cache, logits) if kept else None
        writing.cache = copy.deepcopy(cache) if kept else cache
        writing.read = len(prompt)
        return None if writing.choice.tokens else logits

    def is_together(self, writing: Writing) -> bool:
        return writing in self._together

    def joins(self, writing: Writing) -> bool:
        """Whether a text may share passes: its cache is whole, so that rows of it can be put side by side."""
        cache = self._rows if writing in self._together else writing.cache
        return (
            not writing.alone
            and cache is not None
            and all(type(layer) is DynamicLayer for layer in cache.layers)
        )

    @torch.inference_mode()
    def step(self, writings: Sequence[Writing]) -> list[torch.Tensor | None]:
        """Read one further token of each, all in one pass."""
        self._before_pass()
        if len(writings) == 1:
            logits = [self._step_alone(writings[0])]
        else:
            if self._together != list(writings):
                self._put_together(writings)
            logits = list(self._step_together(writings))
        for writing in writings:
            writing.read += 1
        return [
            row if writing.read == writing.length else None
            for writing, row in zip(writings, logits, strict=True)
        ]

    def forget(self, writing: Writing) -> None:
        """Give a text's cache up; it can be read again."""
        writing.cache, writing.read = None, 0
        self._together = [None if other is writing else other for other in self._together]
        if not any(self._together):
            self._together, self._rows = [], None

    def cache_bytes(self, writings: Sequence[Writing]) -> int:
        """What is held for these texts."""
        caches = [self._rows, *(writing.cache for writing in writings)]
        caches += [text.shared[0] for text in {writing.text: None for writing in writings} if text.shared]
        return sum(
            tensor.nbytes
            for cache in caches
            if cache is not None
            for number in range(len(cache.layers))
            for tensor in _layer(cache, number)
        )

    # --- one ---

    def _step_alone(self, writing: Writing) -> torch.Tensor:
        if writing in self._together:
            self._put_apart()
        assert writing.cache is not None
        return last_logits(self._module, [writing.next_token], writing.cache)

    # --- several ---

    def _step_together(self, writings: Sequence[Writing]) -> torch.Tensor:
        assert self._rows is not None
        device = self._module.device
        longest = self._rows.get_seq_length() + 1
        lengths = [writing.read + 1 for writing in writings]
        ids = torch.tensor([[writing.next_token] for writing in writings], device=device)
        mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths], device=device)
        more: dict[str, object] = {}
        if self._takes_positions:
            more["position_ids"] = torch.tensor([[length - 1] for length in lengths], device=device)
        # Typed as a tensor by the stubs of torch, because modules look attributes up at run time.
        run = cast("Callable[..., object]", self._module)
        output = run(input_ids=ids, attention_mask=mask, past_key_values=self._rows, use_cache=True, **more)
        logits: torch.Tensor = output.logits  # type: ignore[attr-defined]
        return logits[:, -1].to(torch.float32)

    def _put_together(self, writings: Sequence[Writing]) -> None:
        """One layer after the other, so that no more than one is there twice."""
        if any(writing is not None and writing not in writings for writing in self._together):
            self._put_apart()
        old, row_of = self._rows, {writing: row for row, writing in enumerate(self._together)}
        longest = max(writing.read for writing in writings)
        new = DynamicCache()
        self._together, self._rows = list(writings), new
        sources = [old if writing.cache is None else writing.cache for writing in writings]
        for number in range(len(_some(sources[0]).layers)):
            keys: list[torch.Tensor] = []
            values: list[torch.Tensor] = []
            for writing, source in zip(writings, sources, strict=True):
                row = row_of[writing] if writing.cache is None else 0
                padding = (0, 0, longest - writing.read, 0)
                for tensors, tensor in zip((keys, values), _layer(_some(source), number), strict=True):
                    tensor = tensor[row : row + 1, :, tensor.shape[-2] - writing.read :]
                    tensors.append(torch.nn.functional.pad(tensor, padding))
            new.update(torch.cat(keys), torch.cat(values), number)
            for source in sources:
                _some(source).layers[number].reset()
        for writing in writings:
            writing.cache = None

    def _put_apart(self) -> None:
        together, rows = self._together, _some(self._rows)
        self._together, self._rows = [], None
        try:
            for number in range(len(rows.layers)):
                for row, writing in enumerate(together):
                    if writing is not None:
                        self._take_row(writing, _layer(rows, number), row, number)
                rows.layers[number].reset()
        except Exception:
            # Nobody goes on with some of its layers: all are read again.
            for writing in together:
                if writing is not None:
                    self.forget(writing)
            raise

    @staticmethod
    def _take_row(writing: Writing, layer: tuple[torch.Tensor, torch.Tensor], row: int, number: int) -> None:
        if writing.cache is None:
            writing.cache = DynamicCache()
        keys, values = (
            tensor[row : row + 1, :, tensor.shape[-2] - writing.read :].clone() for tensor in layer
        )
        writing.cache.update(keys, values, number)


def _some(cache: DynamicCache | None) -> DynamicCache:
    assert cache is not None
    return cache


def _layer(cache: DynamicCache, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = cache.layers[number]
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def write(text: Text, cancelled: Callable[[], bool]) -> None:
    """All choices of a request, one after the other."""
    decoder = text.decoder
    while text.open and not cancelled():
        writing = text.open[0]
        has_room = len(text.answer.prompt) + writing.length + writing.left <= decoder.tokens_max
        logits = decoder.step([writing])[0] if writing.read else decoder.read(writing, has_room)
        if logits is not None:
            with torch.inference_mode():
                writing.choice.take(logits)
        if writing.choice.reason is not None:
            decoder.forget(writing)
            text.end(writing)
