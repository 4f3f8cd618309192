"""Damaged packs: every bit of the header, thousands of single bits of the chunks, and mending them.

Covers: flipping one bit at a time in a sealed pack of a small model, and proving for each that nothing of it
is served: reading fails before a byte is used. For a sample, that the damaged chunk is named, fetched again
from the origin and mended to the same bytes. Does not cover: how a node acts on it (``restore_swaps`` damages
packs of a running node), or forged files (``tests/attacks``).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

import restore_data
from bench_suite import Judgement, Section, Table
from restore_setup import Setup, ingest_once

from agent.arena import CpuImage
from packer import tiers
from packer.index import HEADER_BYTES, PackError
from packer.layout import CHUNK_BYTES
from packer.pack import PackReader
from packer.pack_file import Scratch
from packer.repair import repair_chunks
from packer.sources import FileSource
from packer.types import Task

CHUNK_FLIPS, CHUNK_FLIPS_QUICK = 10_000, 1_000
# Mending restores the whole model each time.
MENDED = 50
SEED = 7


def flips(setup: Setup) -> Section:
    """One bit at a time: how many are served, and how many of a sample are not mended."""
    directory = restore_data.model_directory(setup.cache, restore_data.SMALL)
    small = setup.of_model(directory, restore_data.describe(directory, setup.spec.ref, Task.GENERATION))
    pack = setup.cache / "bench-flips.pack"
    try:
        ingest_once(small, pack, compare=False)
        return _flip_all(setup, small, pack)
    finally:
        pack.unlink(missing_ok=True)


def _flip_all(setup: Setup, small: Setup, pack: Path) -> Section:
    fd = os.open(pack, os.O_RDWR | os.O_CLOEXEC)
    weights = os.open(small.weights, os.O_RDONLY | os.O_CLOEXEC)
    try:
        key = bytes.fromhex(setup.key)
        started_s = time.perf_counter()
        header = _flip_header(fd, key)
        count = CHUNK_FLIPS_QUICK if setup.quick else CHUNK_FLIPS
        served = _flip_chunks(fd, key, count)
        setup.log(f"flips: {HEADER_BYTES * 8} + {count} in {time.perf_counter() - started_s:.0f} s")
        unmended = _mend(fd, key, small, {"model.safetensors": FileSource(weights)})
    finally:
        os.close(weights)
        os.close(fd)
    rows = (
        ("header", str(HEADER_BYTES * 8), str(header)),
        ("chunks, sampled", str(count), str(served)),
    )
    notes = (f"of {MENDED} damaged chunks that were fetched again {MENDED - unmended} were mended",)
    table = Table("Single bits flipped in a sealed pack", ("where", "bits", "served"), rows, notes)
    judgements = (
        Judgement("single-bit flips that were served", header + served, 0, at_least=False),
        Judgement("damaged chunks that were not mended from the origin", unmended, 0, at_least=False),
    )
    return Section("flips", (table,), judgements)


def _flip(fd: int, bit: int) -> None:
    octet = os.pread(fd, 1, bit // 8)[0]
    os.pwrite(fd, bytes([octet ^ 1 << bit % 8]), bit // 8)


def _flip_header(fd: int, key: bytes) -> int:
    """Every bit of the first page; how many flips were not noticed."""
    missed = 0
    for bit in range(HEADER_BYTES * 8):
        _flip(fd, bit)
        try:
            PackReader(fd, key)
        except PackError:
            pass
        else:
            missed += 1
        _flip(fd, bit)
    PackReader(fd, key)  # it is whole again
    return missed


def _flip_chunks(fd: int, key: bytes, count: int) -> int:
    """Random bits of random chunks, their padding included; how many were served."""
    reader = PackReader(fd, key)
    chance, scratch = random.Random(SEED), Scratch()
    out = memoryview(bytearray(CHUNK_BYTES))
    served = 0
    for _ in range(count):
        number = chance.randrange(len(reader.index.chunks))
        chunk, span = reader.index.chunks[number], reader.index.layout.chunks[number]
        bit = 8 * chunk.offset + chance.randrange(8 * chunk.extent_bytes)
        _flip(fd, bit)
        try:
            reader.read_chunk(number, out[: span.nbytes], scratch)
        except PackError as error:
            served += not error.corrupt
        else:
            served += 1
        _flip(fd, bit)
    return served


def _mend(fd: int, key: bytes, small: Setup, sources: Mapping[str, FileSource]) -> int:
    """Flip, restore, fetch again what the restore names, restore again; how many were not mended."""
    chance = random.Random(SEED)
    whole = os.pread(fd, os.fstat(fd).st_size, 0)
    unmended = 0
    for _ in range(MENDED):
        reader = PackReader(fd, key)
        number = chance.randrange(len(reader.index.chunks))
        chunk = reader.index.chunks[number]
        _flip(fd, 8 * chunk.offset + chance.randrange(8 * chunk.extent_bytes))
        image = CpuImage(reader.index.layout.image_bytes)
        try:
            tiers.restore(reader, image)
            named: tuple[int, ...] = ()
        except tiers.TierError as error:
            named = error.chunks
        left = repair_chunks(fd, key, small.spec.ref, named, sources) if number in named else (number,)
        tiers.restore(PackReader(fd, key), image, only=named)
        same = os.pread(fd, len(whole), 0) == whole
        unmended += bool(left) or not same
        if not same:
            os.pwrite(fd, whole, 0)
        image.close()
    return unmended
