"""Measuring this box in a process of its own: ``python -m agent.calibrate --data-dir D``.

Covers: every rate of ``packer.estimate.Rates``, each measured the way the restore pipeline works (its
codecs, its pieces, its threads), bounded in time, memory and disk. Does not cover: when to measure and
where results are kept (``agent/calibration.py``), or the line to control, which the agent times itself.

Prints one JSON document. The temporary file lies where packs lie, because only that file system's speed
counts, and has no name: however this process ends, the file is gone with it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import mmap
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.calibration import FILE_BYTES, fingerprint
from agent.codec_probes import FAMILIES, STEPS, decode_probes
from agent.packs import DISK_FREE_FLOOR_BYTES
from agent.probes import PIECE_BYTES, CanNotMeasure, Probe, measure_probes, pieces
from packer import codec, kernels
from packer.estimate import DecodeRates, Rates, dump_rates
from packer.layout import CHUNK_BYTES
from packer.mapping import LargePages, map_over, populate_read
from packer.pack_file import page_memory
from packer.seal import TAG_BYTES, ChunkSeal, Part, PartKind, new_key
from packer.tiers import DECODE_THREADS_MAX, IO_THREADS, TIER_THREADS
from packer.types import GIB, MIB, BadValue, parse_bytes

# Memory to copy from and to, each: far larger than any cache of one core, small enough for a small box.
SPAN_BYTES = 64 * MIB
# Every rate is the median of this many rounds.
PASSES = 7
PASSES_MAX = 1000
# Half a second of writing says how fast a disk is; a slow one is not kept busy for longer.
WRITE_S_MAX = 0.6
# One round of reading should take about this long, as far as writing tells.
READ_S = 0.1
READ_BYTES_MIN = 2 * IO_THREADS * PIECE_BYTES
# Planes are sealed and opened in parts of about this size.
PART_BYTES = 2 * MIB
# A process that everybody else goes before; used while the node serves.
NICE_BACKGROUND = 15

_MADV_POPULATE_WRITE = 23
_HUGE_PAGE_BYTES = 2 * MIB
_PAGE_BYTES = 4096
_PR_SET_PDEATHSIG = 1

U8: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What measuring may take."""

    file_bytes: int = FILE_BYTES
    span_bytes: int = SPAN_BYTES
    passes: int = PASSES
    # As many as a restore has for opening and decoding here.
    threads: int = min(max(TIER_THREADS, len(os.sched_getaffinity(0))), DECODE_THREADS_MAX)

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= PASSES_MAX:
            raise BadValue("--passes", f"must be 1 to {PASSES_MAX}")
        least = CHUNK_BYTES * self.threads
        if not least <= self.span_bytes <= GIB or not PIECE_BYTES <= self.file_bytes <= GIB:
            raise BadValue("--span-bytes, --file-bytes", f"must be {least} to {GIB} bytes")


# --- disk -----------------------------------------------------------------------------------------


@contextmanager
def _unnamed_file(directory: Path) -> Iterator[int]:
    """A file that is gone when its descriptor is, in this file system."""
    try:
        descriptor = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        # Not every file system knows files without a name (overlays, network file systems).
        descriptor, path = tempfile.mkstemp(prefix=".calibrate-", dir=directory)
        os.unlink(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _room_bytes(directory: Path, bounds: Bounds) -> int:
    """How large the temporary file may be. Raises ``CanNotMeasure``."""
    room = os.statvfs(directory)
    free_bytes = room.f_bavail * room.f_frsize - DISK_FREE_FLOOR_BYTES
    limit_bytes = min(bounds.file_bytes, free_bytes) // PIECE_BYTES * PIECE_BYTES
    if limit_bytes < PIECE_BYTES:
        raise CanNotMeasure(
            f"{directory}: {max(free_bytes, 0)} bytes are free above the floor of {DISK_FREE_FLOOR_BYTES}, "
            f"measuring needs {PIECE_BYTES}: free some, or give another --data-dir"
        )
    return limit_bytes


def write_file(descriptor: int, limit_bytes: int) -> tuple[int, int]:
    """(bytes, bytes per second) of writing until the limit or the time is reached, made durable."""
    piece = secrets.token_bytes(PIECE_BYTES)
    written, started = 0, time.perf_counter()
    while written < limit_bytes and time.perf_counter() - started < WRITE_S_MAX:
        written += os.pwrite(descriptor, piece, written)
    os.fdatasync(descriptor)
    return written, max(1, round(written / (time.perf_counter() - started)))


def _open_direct(descriptor: int) -> int | None:
    """The same file past the page cache; None where it lies in memory or O_DIRECT is refused."""
    try:
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _PAGE_BYTES) as page:
            os.preadv(direct, [page], 0)
    except OSError:
        os.close(direct)
        return None
    return direct


def _read_probe(name: str, descriptor: int, nbytes: int, threads: int) -> Probe:
    """Every thread reads its pieces into a buffer of its own, which is there already: in large pages as
    that of a restore, because a direct read into small ones is less than half as fast."""
    nbytes = nbytes // PIECE_BYTES * PIECE_BYTES
    buffers = [page_memory(PIECE_BYTES) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(bytes(PIECE_BYTES))

    def read(number: int) -> None:
        for start, length in pieces(nbytes, number, threads):
            with memoryview(buffers[number]) as view, view[:length] as part:
                if os.preadv(descriptor, [part], start) != length:
                    raise CanNotMeasure("the temporary file was cut short while it was read")

    return Probe(name, nbytes, read, threads)


# --- memory ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class FreshMemory:
    """A new private mapping per round, as an arena is one per image."""

    nbytes: int
    map: mmap.mmap | None = None
    address: int = 0

    def renew(self) -> None:
        self.close()
        descriptor = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.map = mmap.mmap(
                descriptor,
                self.nbytes + _HUGE_PAGE_BYTES,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(descriptor)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = address + -address % _HUGE_PAGE_BYTES
        _libc.madvise(self.address, self.nbytes, mmap.MADV_HUGEPAGE)

    def close(self) -> None:
        if self.map is not None:
            self.map.close()
            self.map = None

    def has_huge_pages(self) -> bool:
        """Whether the kernel really granted some."""
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, _, rest = line.partition(" ")
            if first == "AnonHugePages:":
                if inside:
                    return int(rest.split()[0]) > 0
            elif "-" in first:
                start, _, end = first.partition("-")
                inside = int(start, 16) <= self.address < int(end, 16)
        return False


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _populate_probe(memory: FreshMemory, threads: int) -> Probe:
    """Fresh zeroed pages for an arena."""

    def populate(number: int) -> None:
        for start, length in pieces(memory.nbytes, number, threads):
            if _libc.madvise(memory.address + start, length, _MADV_POPULATE_WRITE):
                # Before Linux 5.14: fault the pages in one by one, as the arena then does.
                ctypes.memset(memory.address + start, 1, length)

    return Probe("populate", memory.nbytes, populate, threads, memory.renew, fresh=True)


def _copy_probe(name: str, source: U8, target: U8, threads: int) -> Probe:
    """Between two warm ranges, in pieces of a chunk."""

    def copy(number: int) -> None:
        for start, length in pieces(len(source), number, threads):
            np.copyto(target[start : start + length], source[start : start + length])

    return Probe(name, len(source), copy, threads)


def _large_segment(nbytes: int) -> int:
    """A filled memory file with large pages where the kernel makes them, as a host segment has."""
    descriptor = os.memfd_create("bunk-calibrate", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, nbytes)
    pages = LargePages(descriptor, nbytes)
    pages.prepare(0, nbytes)
    pages.close()
    os.pwrite(descriptor, bytes(nbytes), 0)
    return descriptor


def _map_image_probe(descriptor: int, nbytes: int) -> Probe:
    """A raw segment becoming an image, as the arena does it."""
    memory = FreshMemory(nbytes)

    def map_image(_: int) -> None:
        map_over(memory.address, nbytes, descriptor, 0, mmap.PROT_READ, shared=False)
        populate_read(memory.address, nbytes)

    return Probe("map_image", nbytes, map_image, 1, memory.renew)


def _map_in_probe(descriptor: int, nbytes: int, threads: int) -> Probe:
    """Pages of a filled memory file becoming readable in a new mapping, one touch per page."""
    maps: list[mmap.mmap] = []

    def renew() -> None:
        maps[:] = [mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)]

    def touch(number: int) -> None:
        octets = np.frombuffer(maps[0], dtype=np.uint8)
        for start, length in pieces(nbytes, number, threads):
            octets[start : start + length : _PAGE_BYTES].max()

    return Probe("map_in", nbytes, touch, threads, renew)


def _segment_write_probe(descriptor: int, nbytes: int, threads: int) -> Probe:
    """Into a memory file that has no pages yet."""
    piece = memoryview(secrets.token_bytes(PIECE_BYTES))
    large: list[LargePages] = []

    def renew() -> None:
        for pages in large:
            pages.close()
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, nbytes)
        large[:] = [LargePages(descriptor, nbytes)]

    def write(number: int) -> None:
        for start, length in pieces(nbytes, number, threads):
            large[0].prepare(start, length)
            os.pwrite(descriptor, piece[:length], start)

    return Probe("segment_write", nbytes, write, threads, renew, fresh=True)


# --- cpu work -------------------------------------------------------------------------------------


def _open_probe(nbytes: int, threads: int) -> Probe:
    """Authenticating and decrypting parts of a chunk."""
    seal = ChunkSeal(new_key(), b"calibration")
    part = Part(PartKind.CHUNK, stored_bytes=PART_BYTES, raw_bytes=PART_BYTES)
    sealed = bytearray(PART_BYTES + TAG_BYTES)
    seal.seal_into(part, memoryview(bytes(PART_BYTES)), memoryview(sealed))
    outs = [bytearray(PART_BYTES) for _ in range(threads)]
    times = max(1, nbytes // threads // PART_BYTES)

    def open_parts(number: int) -> None:
        with memoryview(sealed) as view, memoryview(outs[number]) as out:
            for _ in range(times):
                seal.open_into(part, view, out)

    return Probe("open", times * PART_BYTES * threads, open_parts, threads)


def _sha256_probe(nbytes: int) -> Probe:
    data = bytes(nbytes)

    def digest(_: int) -> None:
        hashlib.sha256(data).digest()

    return Probe("sha256_1", nbytes, digest)


# --- gpu ------------------------------------------------------------------------------------------


def _device_copy_probe(nbytes: int) -> Probe | None:
    """Pinned memory to the first GPU; None when torch finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def copy(_: int) -> None:
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    return Probe("device_copy", nbytes, copy)


# --- all together ---------------------------------------------------------------------------------


@contextmanager
def _probes(directory: Path, bounds: Bounds, gpu: bool) -> Iterator[tuple[list[Probe], int, FreshMemory]]:
    """Everything to be measured, the write rate, which is measured by preparing it, and the arena."""
    threads, nbytes = bounds.threads, bounds.span_bytes
    with ExitStack() as held:
        file = held.enter_context(_unnamed_file(directory))
        written, write_rate = write_file(file, _room_bytes(directory, bounds))
        read_bytes = (
            min(written, max(round(write_rate * READ_S), READ_BYTES_MIN)) // PIECE_BYTES * PIECE_BYTES
        )
        probes = [_read_probe("disk_cached", file, read_bytes, threads)]
        direct = _open_direct(file)
        if direct is not None:
            held.callback(os.close, direct)
            probes.append(_read_probe("disk_direct", direct, read_bytes, IO_THREADS))
        segment = _large_segment(nbytes)
        held.callback(os.close, segment)
        fresh = os.memfd_create("bunk-calibrate", os.MFD_CLOEXEC)
        held.callback(os.close, fresh)
        memory = FreshMemory(nbytes)
        held.callback(memory.close)
        source, target = np.ones(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
        spaces = [codec.Workspace() for _ in range(threads)]
        probes += [
            _copy_probe("memcpy", source, target, threads),
            _copy_probe("memcpy_1", source, target, 1),
            _populate_probe(memory, threads),
            _map_in_probe(segment, nbytes, threads),
            _map_image_probe(segment, nbytes),
            _segment_write_probe(fresh, nbytes, threads),
            _open_probe(nbytes // 2, threads),
            _sha256_probe(nbytes // 4),
        ]
        for family, dtype in FAMILIES:
            probes += decode_probes(family, dtype, target, spaces)
        copy = _device_copy_probe(nbytes) if gpu else None
        yield [*probes, *([copy] if copy else [])], write_rate, memory


def measure(directory: Path, bounds: Bounds, gpu: bool) -> Rates:
    """Everything. Raises ``CanNotMeasure`` and ``OSError``."""
    started = time.monotonic_ns()
    # Before any workspace is made; workers are born with the compiled kernels too.
    compiled = kernels.warm().ready
    busy = BusyShare()
    with _probes(directory, bounds, gpu) as (probes, write_rate, memory):
        found = measure_probes(probes, bounds.passes)
        huge_pages = memory.has_huge_pages()
    bf16, fp32, other = (
        DecodeRates(*(found[f"{family}_{step}"] for step in STEPS)) for family, _ in FAMILIES
    )
    return Rates(
        # Where files lie in memory, or there is no way past the cache, the cache is all there is.
        disk_direct=found.get("disk_direct", found["disk_cached"]),
        disk_cached=found["disk_cached"],
        disk_write=write_rate,
        memcpy=found["memcpy"],
        memcpy_1=found["memcpy_1"],
        populate=found["populate"],
        map_in=found["map_in"],
        segment_write=found["segment_write"],
        open=found["open"],
        sha256_1=found["sha256_1"],
        bf16=bf16,
        fp32=fp32,
        other=other,
        device_copy=found.get("device_copy", 0),
        map_image=found["map_image"],
        threads=bounds.threads,
        cores=len(os.sched_getaffinity(0)),
        measured_ms=time.time_ns() // 1_000_000,
        took_ms=(time.monotonic_ns() - started) // 1_000_000,
        fingerprint=fingerprint(directory),
        kernels=compiled,
        huge_pages=huge_pages,
        others_percent=busy.others_percent(),
    )


class BusyShare:
    """How much of the machine others used since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[int, int]:
        """Ticks of all cores: (all, not idle and not ours)."""
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ticks = [int(field) for field in fields]
        idle = ticks[3] + ticks[4]
        used = os.times()
        ours = round((used.user + used.system) * os.sysconf("SC_CLK_TCK"))
        return sum(ticks), sum(ticks) - idle - ours

    def others_percent(self) -> int:
        total, others = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return min(100, max(0, round(100 * others / max(total, 1))))


def main(argv: list[str] | None = None) -> int:
    """Exit 0 with rates on standard output, 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m agent.calibrate", description="Measure this box.")
    parser.add_argument("--data-dir", type=Path, required=True, help="the agent's; packs lie in it")
    parser.add_argument("--json", action="store_true", help="the only form there is; for symmetry")
    parser.add_argument("--background", action="store_true", help="let everything else go first")
    parser.add_argument("--gpu", action="store_true", help="measure the copy to the first GPU too")
    parser.add_argument("--file-bytes", default=str(FILE_BYTES), metavar="SIZE")
    parser.add_argument("--span-bytes", default=str(SPAN_BYTES), metavar="SIZE")
    parser.add_argument("--passes", type=int, default=PASSES, metavar="N")
    options = parser.parse_args(argv)
    if options.background:
        # Nobody wants the result of a measurement whose agent was killed.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with suppress(OSError):
            os.nice(NICE_BACKGROUND)
    directory = options.data_dir / "packs"
    try:
        bounds = Bounds(
            file_bytes=parse_bytes(options.file_bytes, "--file-bytes"),
            span_bytes=parse_bytes(options.span_bytes, "--span-bytes"),
            passes=options.passes,
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        print(dump_rates(measure(directory, bounds, options.gpu)))
    except (CanNotMeasure, BadValue, OSError, MemoryError) as error:
        print(f"can not measure: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
