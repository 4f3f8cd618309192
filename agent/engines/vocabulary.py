"""The bytes that a token stands for.

Covers: byte-level tokenizers (GPT-2's and most since), sentencepiece's with its byte tokens, and a plain
decoding for any other. Does not cover: text, which is decoded from all tokens together (``text``).

OpenAI's log probabilities name tokens by their bytes, because a token may be a part of a character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# sentencepiece's sign for a space.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _byte_level_signs() -> Mapping[str, int]:
    """GPT-2's printable sign for each byte: itself where it has a shape, else one from 256 on."""
    shaped = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = {chr(byte): byte for byte in shaped}
    others = [byte for byte in range(256) if byte not in set(shaped)]
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}


_SIGNS = _byte_level_signs()


class Vocabulary:
    """Asks one model's tokenizer; holds nothing but how it writes bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
        self._special = frozenset(tokenizer.all_special_ids)

    def bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""  # the model's vocabulary is larger than its tokenizer's: padding
        if token in self._special:
            return piece.encode()
        if self._byte_level:
            # Tokens that were added to the vocabulary are written as they are.
            if all(sign in _SIGNS for sign in piece):
                return bytes(_SIGNS[sign] for sign in piece)
            return piece.encode()
        if found := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(_SPACE, " ").encode(errors="replace")
