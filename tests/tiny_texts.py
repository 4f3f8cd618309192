"""Models of every architecture that writes, of random weights, and texts for them.

Covers: values that tests of texts share. Does not cover: any test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agent.engines.decoding import Decoder, Text, write
from agent.engines.generation import Answer, GenerateFields, Writer
from agent.engines.sampling import Sampling
from agent.facade import EngineFrame
from packer.directory import ARCHITECTURES
from packer.types import Task

WORDS = 120
CONTEXT = 96
ENDS: tuple[int, ...] = (1,)
NAMES = [name for name, (_, task) in ARCHITECTURES.items() if task is Task.GENERATION]
_SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_OF: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"num_kv_heads": 4},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
}


class Letters:
    """A tokenizer whose tokens are letters."""

    all_special_ids: Sequence[int] = ()

    def decode(self, tokens: Sequence[int], **options: object) -> str:
        return "".join(chr(0x4E00 + token) for token in tokens)


def module(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    kind, _ = ARCHITECTURES[name]
    small = {key: value for key, value in _SMALL.items() if (kind, key) != ("falcon", "head_dim")}
    config = transformers.AutoConfig.for_model(kind, **{**small, **_OF.get(kind, {})})
    model_class = getattr(transformers, name)
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    made: PreTrainedModel = model_class(config).train(False)
    # Random weights of the usual size hardly depend on what was read.
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def text(
    decoder: Decoder,
    prompt: Sequence[int],
    emit: Callable[[EngineFrame], None] = lambda frame: None,
    **fields: Any,
) -> Text:
    asked = GenerateFields(**{"tokens": list(prompt), "max_tokens": 16, "temperature": 0.0, **fields})
    tokenizer = cast(PreTrainedTokenizerBase, Letters())
    writer = Writer(tokenizer, Sampling(end_tokens=ENDS), CONTEXT, WORDS, torch.device("cpu"))
    return Text(Answer(writer, asked, list(prompt), emit), decoder)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, WORDS, (length,), generator=generator).tolist() for length in lengths]


def tokens(of: Text) -> list[list[int]]:
    return [choice.tokens for choice in of.answer.choices]


def decoder_of(made: PreTrainedModel) -> Decoder:
    return Decoder(made, CONTEXT)


def alone(made: PreTrainedModel, prompt: Sequence[int], **fields: Any) -> list[list[int]]:
    asked = text(decoder_of(made), prompt, **fields)
    write(asked, lambda: False)
    return tokens(asked)
