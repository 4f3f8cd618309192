"""Model directories for tests, small enough to make in a fraction of a second.

Covers: the sizes that tests use, and describing a directory as control would. Does not cover: how the
directories are made, which is ``scripts/make_models.py`` (shared with the tour and the benches).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from make_models import copy_minilm, find_minilm, make_classifier, make_gpt2, make_llama

from packer.directory import ENGINE
from packer.gangs import cuts_of
from packer.layout import TensorInfo, header_bytes, lay_out, parse_header
from packer.types import MIB, ModelRef, ModelSpec, OriginFile, Task

__all__ = [
    "copy_minilm",
    "describe",
    "described_files",
    "find_minilm",
    "opened",
    "tiny_classifier",
    "tiny_gpt2",
    "tiny_llama",
]


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


def described_files(directory: Path) -> list[OriginFile]:
    """Every file of a directory, as a version lists it."""
    files: list[OriginFile] = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        data = path.read_bytes()
        name = path.relative_to(directory).as_posix()
        files.append(OriginFile(name, len(data), hashlib.sha256(data).hexdigest()))
    return files


def describe(directory: Path, ref: ModelRef, task: Task) -> ModelSpec:
    """The version that control would register for a directory."""
    files = described_files(directory)
    tensors: list[TensorInfo] = []
    for name in (file.path for file in files if file.path.endswith(".safetensors")):
        data = (directory / name).read_bytes()
        size = header_bytes(data[:8], len(data), name)
        tensors.extend(parse_header(data[8 : 8 + size], name, len(data)))
    layout = lay_out(tensors)
    return ModelSpec(
        ref,
        directory.as_uri(),
        tuple(files),
        ENGINE,
        task,
        layout.image_bytes,
        layout.chunk_bytes,
        MIB,
        created_ms=0,
        cuts=cuts_of(layout, by_layer=True),
    )


@contextmanager
def opened(directory: Path, spec: ModelSpec) -> Iterator[dict[str, int]]:
    """Descriptors of every file, closed on leaving."""
    descriptors: dict[str, int] = {}
    try:
        for file in spec.files:
            descriptors[file.path] = os.open(directory / file.path, os.O_RDONLY)
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
