"""Versions of one model that have most of their chunks in common, and their packs in files.

Covers: making them for the tests of sharing. Holds no test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from origin_samples import big
from pack_samples import SIDE, image_of, model_of

from packer.bases import BasePack, Bases
from packer.layout import ImageLayout
from packer.pack import PackReader
from packer.pack_file import FileFds
from packer.pack_writer import PackSummary, PackWriter
from packer.types import MIB, ModelRef, Task

KEYS = {version: bytes([number]) * 32 for number, version in enumerate(("a", "b", "c", "d"), start=1)}


def ref(version: str, tenant: str = "acme", name: str = "tiny") -> ModelRef:
    return ModelRef(tenant, name, version * 16)


def version_of(*seeds: int) -> tuple[bytes, ImageLayout]:
    """A model with one tensor of a chunk of its own (1 MiB) per seed, and a small one."""
    tensors = [(f"h.{at}.weight", "BF16", [MIB // 2], big(MIB, seed)) for at, seed in enumerate(seeds)]
    return model_of([*tensors, ("z.norm", "F32", [4], bytes(range(16)))])


@contextmanager
def pack_file() -> Iterator[int]:
    descriptor = os.memfd_create("bunk-test")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(
    fd: int,
    model: tuple[bytes, ImageLayout],
    version: str,
    bases: Sequence[BasePack] = (),
    tenant: str = "acme",
) -> PackSummary:
    layout, image = model[1], memoryview(image_of(*model))
    whose = ref(version, tenant)
    writer = PackWriter(
        fd,
        whose,
        "transformers",
        Task.EMBEDDING,
        layout,
        KEYS[version],
        256 * MIB,
        bases=Bases(bases, whose),
    )
    for path, data in SIDE.items():
        writer.add_file(path, data)
    for number, span in enumerate(layout.chunks):
        writer.add_chunk(number, image[span.image_offset : span.image_offset + span.nbytes])
    return writer.finish()


def base(fd: int, version: str, bases: Sequence[int] = (), tenant: str = "acme") -> BasePack:
    return BasePack(
        ref(version, tenant), KEYS[version], FileFds(fd), tuple(FileFds(other) for other in bases)
    )


def reader(fd: int, version: str, bases: Sequence[int] = ()) -> PackReader:
    return PackReader(fd, KEYS[version], ref(version), bases=[FileFds(other) for other in bases])
