"""Timing the codecs on chunks that look like weights, in every direction a restore or an ingest uses.

Covers: sample chunks by family, and one probe per direction. Does not cover: anything else that is
measured (``agent/calibrate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.probes import CanNotMeasure, Probe
from packer import codec
from packer.layout import CHUNK_BYTES

U8: TypeAlias = NDArray[np.uint8]

# Distinct chunks per family, so that a thread does not find the last one in its cache.
CHUNKS = 2
# The families of the estimate and the dtype that stands for each.
FAMILIES = (("bf16", "BF16"), ("fp32", "F32"), ("other", "F16"))
STEPS = ("stored_to_wire", "wire_to_final", "stored_to_final", "encode")


def sample_chunks(dtype: str) -> list[bytes]:
    """Chunks that look like weights: normal, with a scale of their own."""
    chance = np.random.default_rng(3)
    chunks = []
    for number in range(CHUNKS):
        count = CHUNK_BYTES // (4 if dtype == "F32" else 2)
        wide = chance.standard_normal(count, dtype=np.float32) * np.float32(0.01 * (number + 1))
        if dtype == "BF16":
            chunks.append((wide.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        elif dtype == "F16":
            chunks.append(wide.astype(np.float16).tobytes())
        else:
            chunks.append(wide.tobytes())
    return chunks


@dataclass(frozen=True, slots=True)
class Form:
    """A chunk in one form: what ``codec.decode_into`` takes."""

    codec_id: int
    planes: tuple[bytes, ...]


def _wire(stored: Form, raw: bytes, space: codec.Workspace) -> Form:
    """A chunk as a host segment in wire form holds it."""
    if not codec.has_wire_form(stored.codec_id):
        return Form(codec.CodecId.RAW, (raw,))
    sizes = codec.wire_sizes(stored.codec_id, [len(plane) for plane in stored.planes], len(raw))
    out = bytearray(sum(sizes))
    sizes = codec.to_wire(stored.codec_id, stored.planes, len(raw), memoryview(out), space)
    planes, start = [], 0
    for size in sizes:
        planes.append(bytes(out[start : start + size]))
        start += size
    return Form(stored.codec_id, tuple(planes))


def decode_probes(family: str, dtype: str, target: U8, spaces: Sequence[codec.Workspace]) -> list[Probe]:
    """One family's codec in all directions. What each form decodes to is compared first, byte for byte."""
    raws, threads = sample_chunks(dtype), len(spaces)
    stored = []
    for raw in raws:
        encoded = codec.encode(dtype, memoryview(raw), spaces[0])
        stored.append(Form(encoded.codec_id, tuple(bytes(plane) for plane in encoded.planes)))
    wires = [_wire(form, raw, spaces[0]) for form, raw in zip(stored, raws, strict=True)]
    slots = [
        memoryview(target)[start : start + CHUNK_BYTES]  # type: ignore[arg-type]  # arrays are buffers
        for start in range(0, len(target) - CHUNK_BYTES + 1, CHUNK_BYTES)
    ]
    for name, forms in (("stored", stored), ("wire", wires)):
        for form, raw in zip(forms, raws, strict=True):
            codec.decode_into(form.codec_id, form.planes, slots[0], spaces[0])
            if slots[0] != raw:
                raise CanNotMeasure(f"{dtype} does not come back from its {name} form: the codec is broken")

    def decode(form: Form, out: memoryview, space: codec.Workspace) -> None:
        codec.decode_into(form.codec_id, form.planes, out, space)

    def to_wire(form: Form, out: memoryview, space: codec.Workspace) -> None:
        if codec.has_wire_form(form.codec_id):
            codec.to_wire(form.codec_id, form.planes, CHUNK_BYTES, out, space)
        else:
            decode(form, out, space)

    def probe(step: str, forms: list[Form], do: Callable[[Form, memoryview, codec.Workspace], None]) -> Probe:
        def work(number: int) -> None:
            for at in range(number, len(slots), threads):
                do(forms[at % CHUNKS], slots[at], spaces[number])

        return Probe(f"{family}_{step}", len(slots) * CHUNK_BYTES, work, threads)

    def encode(number: int) -> None:
        codec.encode(dtype, memoryview(raws[number % CHUNKS]), spaces[number])

    return [
        probe("stored_to_wire", stored, to_wire),
        probe("wire_to_final", wires, decode),
        probe("stored_to_final", stored, decode),
        Probe(f"{family}_encode", CHUNK_BYTES * threads, encode, threads),
    ]
