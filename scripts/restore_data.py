"""The models that the restore bench moves: made once, kept in a cache directory, the same every time.

Covers: a Llama of about 2 GB (or 0.5 GB) in bf16 with normal weights whose width differs by layer and by
tensor, as that of trained ones does, in a directory that the engine loads; describing a directory as control
would; dropping files from the page cache, in part or whole, and making sure that they are gone. Does not
cover: useful models, or the real one (``make_models.copy_minilm``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import make_models
import torch

from packer.directory import ENGINE
from packer.extents import cached_pages
from packer.layout import PAGE_BYTES, ImageLayout, TensorInfo, header_bytes, lay_out, parse_header
from packer.types import MIB, ModelRef, ModelSpec, OriginFile, Task

SEED = 3
# Written anew when what is written changes.
VERSION = 1
# Weights are drawn in pieces of this many, so that no tensor is held as float32 as a whole.
DRAW_WEIGHTS = 4 * 1024 * 1024
# A dropped file may keep some pages that were in use just then.
COLD_SHARE_MAX = 0.001
DROPS_MAX = 5
_HEAD = 64


class NotCold(RuntimeError):
    """The kernel keeps pages of a file that was to be read from the disk."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama. Its weights are bf16, its embeddings are not tied."""

    name: str
    hidden: int
    inner: int
    layers: int
    key_value_heads: int
    tokens: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], float]]:
        """Name, shape and sigma of every tensor; sigma 0 is a norm, which trains to around one."""
        hidden, inner, narrow = self.hidden, self.inner, self.key_value_heads * _HEAD
        yield "model.embed_tokens.weight", (self.tokens, hidden), 0.02
        for layer in range(self.layers):
            # Deeper layers of trained models are wider, and no two tensors have the same width.
            wide = 0.012 + 0.016 * layer / self.layers
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,), 0.0
            yield f"{prefix}.mlp.down_proj.weight", (hidden, inner), wide * 0.9
            yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden), wide * 1.1
            yield f"{prefix}.mlp.up_proj.weight", (inner, hidden), wide
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,), 0.0
            yield f"{prefix}.self_attn.k_proj.weight", (narrow, hidden), wide * 1.6
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden), wide * 0.8
            yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden), wide * 1.5
            yield f"{prefix}.self_attn.v_proj.weight", (narrow, hidden), wide * 0.7
        yield "model.norm.weight", (hidden,), 0.0
        yield "lm_head.weight", (self.tokens, hidden), 0.02


FULL = Shape("llama-2GB", 2048, 8192, 15, 8, 32_000)
QUICK = Shape("llama-0.5GB", 1024, 4096, 12, 8, 32_000)
# For tests, and for swaps that are counted instead of timed.
SMALL = Shape("llama-small", 256, 512, 4, 2, 1024)


def model_directory(cache: Path, shape: Shape) -> Path:
    """The directory of this model, made if no run before has made it."""
    directory = cache / f"{shape.name}-v{VERSION}"
    if directory.exists():
        return directory
    beside = directory.with_name(directory.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    # Configuration and tokenizer of a tiny one, of which only the sizes are then changed.
    make_models.make_llama(beside, SEED, hidden=_HEAD * 2, layers=1, heads=2, dtype="bfloat16")
    config = json.loads((beside / "config.json").read_text())
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // _HEAD,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": _HEAD,
        "vocab_size": shape.tokens,
    }
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_weights(beside / "model.safetensors", shape)
    beside.rename(directory)
    return directory


def write_weights(path: Path, shape: Shape) -> None:
    """Draw the weights and write them as one safetensors file, piece by piece."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    tensors = sorted(shape.tensors())
    for name, sizes, _ in tensors:
        nbytes = 2 * _count(sizes)
        entries[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    chance = torch.Generator().manual_seed(SEED)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, sizes, sigma in tensors:
            left = _count(sizes)
            while left:
                count = min(left, DRAW_WEIGHTS)
                drawn = torch.randn(count, generator=chance)
                drawn = drawn * sigma if sigma else 1 + drawn * 0.05
                file.write(drawn.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
                left -= count
        file.flush()
        os.fsync(file.fileno())


def _count(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def describe(directory: Path, ref: ModelRef, task: Task) -> ModelSpec:
    """The version that control would register for a directory, read in pieces."""
    files: list[OriginFile] = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(OriginFile(path.relative_to(directory).as_posix(), path.stat().st_size, digest))
    layout = layout_of(directory)
    sizes = layout.chunk_bytes
    return ModelSpec(
        ref, directory.as_uri(), tuple(files), ENGINE, task, layout.image_bytes, sizes, 64 * MIB, created_ms=0
    )


def layout_of(directory: Path) -> ImageLayout:
    """Where the tensors of a directory lie in an image."""
    tensors: list[TensorInfo] = []
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(header_bytes(file.read(8), size, path.name))
        tensors.extend(parse_header(header, path.name, size))
    return lay_out(tensors)


# --- the page cache --------------------------------------------------------------------------------


def cached_share(path: Path) -> float:
    """Which part of a file is in the page cache. Raises ``NotCold`` when the kernel does not tell."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        pages = cached_pages(fd, 0, -(-size // PAGE_BYTES) * PAGE_BYTES)
    finally:
        os.close(fd)
    if pages is None:
        raise NotCold(f"{path}: the kernel does not tell what is cached, so nothing can be called cold")
    return pages * PAGE_BYTES / max(size, 1)


def drop(path: Path) -> None:
    """Take a file out of the page cache. Raises ``NotCold`` if it does not go."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # what is dirty can not be dropped
        for _ in range(DROPS_MAX):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            share = cached_share(path)
            if share <= COLD_SHARE_MAX:
                return
    finally:
        os.close(fd)
    raise NotCold(f"{path}: {share:.1%} of it stay in the page cache; does another process use it?")


def warm(path: Path, stride_bytes: int = 0) -> None:
    """Bring a file into the page cache: all of it, or every second stretch of ``stride_bytes``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        step = stride_bytes or 4 * MIB
        # Without this the kernel would read ahead into what is to stay cold.
        if stride_bytes:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        buffer = bytearray(step)
        for start in range(0, size, step * (2 if stride_bytes else 1)):
            os.preadv(fd, [buffer], start)
    finally:
        os.close(fd)
