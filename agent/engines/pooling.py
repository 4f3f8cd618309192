"""From token vectors to one vector per input, as a directory's sentence-transformers files declare.

Covers: reading ``modules.json``, the pooling configuration, ``sentence_bert_config.json`` and the
default prompt, the pooling itself for one input alone (no padding, so no mask), and which shorter lengths
an embedding may have. Does not cover:
tokens or the model's forward pass (``transformers``). A directory without these files gets mean
pooling and no normalisation, as sentence-transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from agent.facade import EngineError

# Of the lengths that a configuration lists, in an error's text.
LISTED_MAX = 32
_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# The older spelling, in the order in which several of them are concatenated.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Smaller than any real sum of weights; only keeps a division from being by zero.
_TINY = 1e-9


class BadPooling(ValueError):
    """The directory declares something that can not be done; names the file and the way out."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How one directory turns token vectors into an embedding."""

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    tokens_max: int | None = None
    lower_case: bool = False
    prompt: str = ""

    def apply(self, tokens: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
        """``tokens``: [length, hidden] of one input. Returns float32 [dimensions]: all, or the first ones."""
        # The same operations in the same order as sentence-transformers on a batch of one, so that the
        # result is the same to the last bit.
        batch = tokens.unsqueeze(0)
        wide = torch.float32 if tokens.dtype in (torch.float16, torch.bfloat16) else tokens.dtype
        parts = [_pool(mode, batch, wide) for mode in self.modes]
        vector = torch.cat(parts, dim=-1)[:, :dimensions]
        if self.normalize:
            vector = torch.nn.functional.normalize(vector, p=2.0, dim=1)
        return vector[0].to(torch.float32)


def _pool(mode: str, batch: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    length = batch.shape[1]
    if mode == "cls":
        return batch[:, 0]
    if mode == "lasttoken":
        return batch[:, -1]
    if mode == "max":
        return batch.max(dim=1).values
    if mode == "weightedmean":
        weights = torch.arange(1, length + 1, device=batch.device, dtype=wide).view(1, -1, 1)
        total = torch.clamp(weights.sum(dim=1), min=_TINY)
        return ((batch * weights).sum(dim=1) / total).to(batch.dtype)
    summed = batch.sum(dim=1, dtype=wide)
    count = torch.full((1, 1), float(length), dtype=wide, device=batch.device)
    if mode == "mean_sqrt_len_tokens":
        count = count.sqrt()
    return (summed / count).to(batch.dtype)


def check_dimensions(asked: int, own: int, config: object) -> None:
    """Whether an embedding may be cut to so many numbers: a model says so by the two fields of its
    config.json that inference servers read. Raises ``EngineError``."""
    if asked == own:
        return
    if getattr(config, "is_matryoshka", False) is not True:
        raise EngineError(
            "invalid_request",
            f"this model gives {own} and can not be shortened; leave the field out "
            "(a model that was trained for it says so with is_matryoshka in its config.json)",
            "dimensions",
        )
    listed = getattr(config, "matryoshka_dimensions", None)
    allowed = listed if isinstance(listed, list) else range(1, own)
    if asked not in allowed or not 0 < asked < own:
        shown = ", ".join(map(str, listed[:LISTED_MAX])) if isinstance(listed, list) else f"1 to {own}"
        raise EngineError("invalid_request", f"of this model must be one of {shown}, or {own}", "dimensions")


def read_pooling(files: Mapping[str, bytes]) -> Pooling:
    """Raises ``BadPooling``."""
    modules = _load_modules(files)
    sentence = _load_object(files, "sentence_bert_config.json")
    top = _load_object(files, "config_sentence_transformers.json")
    modes: tuple[str, ...] = ("mean",)
    normalize, include_prompt = False, True
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            path = f"{module.get('path', '')}/config.json".lstrip("/")
            config = _load_object(files, path)
            modes = _modes(config, path)
            include_prompt = bool(config.get("include_prompt", True))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise BadPooling(
                f"modules.json: module {kind[:80]!r} is not one of Transformer, Pooling and Normalize"
            )
    prompt = _default_prompt(top)
    if prompt and not include_prompt:
        raise BadPooling(
            "a default prompt with include_prompt false is not supported; remove default_prompt_name from "
            "config_sentence_transformers.json and send the prompt with the input"
        )
    tokens_max = sentence.get("max_seq_length")
    return Pooling(
        modes,
        normalize,
        tokens_max if type(tokens_max) is int and tokens_max > 0 else None,
        sentence.get("do_lower_case") is True,
        prompt,
    )


def _modes(config: Mapping[str, object], path: str) -> tuple[str, ...]:
    declared = config.get("pooling_mode")
    if declared is None:
        flags = tuple(mode for flag, mode in _FLAGS.items() if config.get(flag))
        return flags or ("mean",)
    modes = (declared,) if isinstance(declared, str) else declared
    if not isinstance(modes, (list, tuple)) or not modes or any(mode not in _MODES for mode in modes):
        raise BadPooling(f"{path}: pooling_mode must be one or more of {', '.join(_MODES)}")
    return tuple(str(mode) for mode in modes)


def _default_prompt(top: Mapping[str, object]) -> str:
    name, prompts = top.get("default_prompt_name"), top.get("prompts")
    if not isinstance(name, str) or not isinstance(prompts, dict):
        return ""
    prompt = prompts.get(name, "")
    return prompt if isinstance(prompt, str) else ""


def _load(files: Mapping[str, bytes], path: str) -> object:
    """The parsed file; an empty object when there is none."""
    if path not in files:
        return {}
    try:
        value: object = json.loads(files[path])
    except (ValueError, RecursionError) as error:
        raise BadPooling(f"{path}: not JSON: {str(error)[:200]}") from None
    return value


def _load_object(files: Mapping[str, bytes], path: str) -> Mapping[str, object]:
    value = _load(files, path)
    if not isinstance(value, dict):
        raise BadPooling(f"{path}: is not a JSON object")
    return value


def _load_modules(files: Mapping[str, bytes]) -> list[Mapping[str, object]]:
    value = _load(files, "modules.json")
    modules = value if isinstance(value, list) else []
    if (value and modules != value) or not all(isinstance(module, dict) for module in modules):
        raise BadPooling("modules.json: is not a list of JSON objects")
    return modules
