"""Model directories for tests, small enough to make in a fraction of a second.

Covers: the sizes that tests use. Does not cover: how the directories are made, which is
``scripts/make_models.py`` (shared with the tour and the benches).
"""

from __future__ import annotations

from pathlib import Path

from make_models import copy_minilm, find_minilm, make_classifier, make_gpt2, make_llama

__all__ = ["copy_minilm", "find_minilm", "tiny_classifier", "tiny_gpt2", "tiny_llama"]


def tiny_gpt2(directory: Path, seed: int = 1, dtype: str = "float32") -> Path:
    """Tied embeddings, no chat template, 64 positions, about 1 MB."""
    return make_gpt2(directory, seed, hidden=64, layers=2, heads=4, positions=64, dtype=dtype)


def tiny_llama(directory: Path, seed: int = 2, dtype: str = "float32", tied: bool = False) -> Path:
    """Rotary positions, grouped heads, a chat template, 96 positions, about 1 MB."""
    return make_llama(directory, seed, hidden=64, layers=2, heads=4, positions=96, dtype=dtype, tied=tied)


def tiny_classifier(
    directory: Path, seed: int = 3, dtype: str = "float32", multi_label: bool = False
) -> Path:
    """Three named labels, 32 positions, about half a megabyte."""
    return make_classifier(
        directory,
        seed,
        hidden=32,
        layers=2,
        heads=2,
        positions=32,
        dtype=dtype,
        multi_label=multi_label,
    )
