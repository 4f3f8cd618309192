"""Our loads and the limits of the machine, each as a job that runs in a fresh child.

Covers: restores from packs and host segments (whole or from a chunk on, with the read path chosen or
forced), filling host segments, an ingest with its pack, single stages of a restore on one thread, and
what the machine can do at best (copies, reads into memory that is there). Does not cover: other people's
loaders (``peer_loaders``), which of these to run and what they must reach (``bench_restore``).

Run by ``fresh_child``. Every image is compared with the origin's file, after the clock.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch
from fresh_child import Reference, Settings, Stopwatch, read_every_byte, serve

from agent.arena import CpuImage, allocate_image
from packer import kernels, tiers
from packer.codec import decode_into, has_wire_form, to_wire
from packer.device_decode import decode_on_device
from packer.extents import ExtentReader
from packer.host_segment import HostWriter
from packer.ingest import Ingest
from packer.layout import CHUNK_BYTES
from packer.pack import PackReader
from packer.pack_file import Scratch
from packer.packing import PackTarget
from packer.sources import FileSource
from packer.types import MIB, HostForm, ModelSpec

COPY_BYTES = 256 * MIB  # far larger than a cache, small enough to fault in quickly
_libc = ctypes.CDLL(None)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

Facts = Mapping[str, Any]


# --- limits ----------------------------------------------------------------------------------------


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def populated(nbytes: int) -> CpuImage:
    """An image whose pages are there, as in a process that has held one before."""
    image = CpuImage(nbytes)
    for at in range(0, nbytes, CHUNK_BYTES):
        with image.filling(at, min(CHUNK_BYTES, nbytes - at)):
            pass
    return image


def copy_memory(settings: Settings, clock: Stopwatch) -> Facts:
    """Copy as many bytes as the model has, warm to warm, on two threads."""
    source, target = populated(COPY_BYTES), populated(COPY_BYTES)
    with source.reading(0, COPY_BYTES) as left, target.reading(0, COPY_BYTES) as right:
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (right, left)]
    nbytes, threads = settings["nbytes"], settings["threads"]

    def copy(number: int) -> None:
        for start in range(number * CHUNK_BYTES, nbytes, threads * CHUNK_BYTES):
            at = start % COPY_BYTES
            _libc.memmove(addresses[0] + at, addresses[1] + at, min(CHUNK_BYTES, nbytes - start))

    with clock:
        _in_threads(threads, copy)
    return {}


def read_into_arena(settings: Settings, clock: Stopwatch) -> Facts:
    """Read a file's bytes as they are into an image: memory that is there, or (``fresh``) is not yet."""
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if settings.get("direct") else 0)
    fd = os.open(settings["path"], flags)
    nbytes = os.fstat(fd).st_size
    room = -(-nbytes // CHUNK_BYTES) * CHUNK_BYTES
    threads, piece = settings["threads"], settings["piece_bytes"]
    image = CpuImage(room) if settings.get("fresh") else populated(room)

    def read(number: int) -> None:
        for start in range(number * piece, nbytes, threads * piece):
            place = image.filling if settings.get("fresh") else image.reading
            with place(start, piece) as view:
                got = os.preadv(fd, [view], start)
            if got != min(piece, nbytes - start):
                raise OSError(f"{got} bytes read at {start}")

    with clock:
        _in_threads(threads, read)
    reference = Reference(settings["reference"])
    with image.reading(0, room) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        return {"compared_bytes": reference.check_file(address)}


# --- restores --------------------------------------------------------------------------------------


class _Buffered(ExtentReader):
    """Reads everything through the page cache."""

    def is_cached(self, offset: int, nbytes: int) -> bool:
        return True


class _Direct(ExtentReader):
    """Reads everything past the page cache."""

    def is_cached(self, offset: int, nbytes: int) -> bool:
        return False


_FORCED = {"buffered": _Buffered, "direct": _Direct}


@contextmanager
def _source(settings: Settings) -> Iterator[PackReader]:
    """The pack (``path`` and ``key``) or the host segment (``fd``), opened as the agent opens it."""
    with ExitStack() as stack:
        if "fd" in settings:
            yield PackReader(settings["fd"], None)
            return
        fd = os.open(settings["path"], os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        direct = os.open(settings["path"], os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        stack.callback(os.close, direct)
        yield PackReader(fd, bytes.fromhex(settings["key"]), direct_fd=direct)


def restore(settings: Settings, clock: Stopwatch) -> Facts:
    """One restore as a worker makes it, until every tensor is there. ``populated``: into an image whose
    pages are there before the clock starts; ``touch``: until every byte was read once, too."""
    first_chunk, kind = settings.get("first_chunk", 0), settings.get("kind", "cpu")
    if kind == "cuda":
        torch.zeros(1, device=kind)  # the first context is nobody's restore
        torch.cuda.synchronize()
    forced = _FORCED.get(settings.get("force", ""))
    with ExitStack() as stack:
        if forced is not None:
            stack.enter_context(patch.object(tiers, "ExtentReader", forced))
        there = None
        if settings.get("populated"):
            with _source(settings) as reader:
                there = populated(reader.index.layout.image_bytes)
        with clock:
            reader = stack.enter_context(_source(settings))
            layout = reader.index.layout
            image = there if there is not None else allocate_image(kind, layout)
            past_cache = settings.get("past_cache", False)
            facts = tiers.restore(reader, image, first_chunk=first_chunk, past_cache=past_cache)
            image.settle()
            tensors = [(placed, image.tensor(placed)) for placed in layout.tensors]
            if settings.get("touch"):
                read_every_byte((tensor.data_ptr(), tensor.nbytes) for _, tensor in tensors)
        start = layout.chunks[first_chunk].image_offset
        loaded = [
            (placed.info.name, tensor.cpu() if kind == "cuda" else tensor)
            for placed, tensor in tensors
            if placed.image_offset >= start
        ]
        spans = [(name, tensor.data_ptr(), tensor.nbytes) for name, tensor in loaded]
        compared = Reference(settings["reference"]).check(spans, whole=not first_chunk)
        extents = {reader.index.chunks[number].offset for number in range(first_chunk, len(layout.chunks))}
        sizes = {chunk.offset: chunk.extent_bytes for chunk in reader.index.chunks}
        return {
            "compared_bytes": compared,
            "image_bytes": layout.image_bytes,
            "read_bytes": facts.read_bytes,
            "direct_bytes": facts.direct_bytes,
            "wanted_bytes": sum(sizes[offset] for offset in extents),
            "chunks": facts.chunks,
            "mapped": facts.mapped,
        }


def fill_segment(settings: Settings, clock: Stopwatch) -> Facts:
    """Restore a pack and fill the memory file ``segment_fd`` beside, in a form."""
    form = HostForm(settings["form"])
    with _source(settings) as reader:
        side_files = {path: reader.file(path) for path, _ in reader.index.files}
        sizes = reader.host_sizes
        os.ftruncate(settings["segment_fd"], sizes.of(form))
        with clock:
            image = allocate_image("cpu", reader.index.layout)
            host = HostWriter(settings["segment_fd"], reader.index, side_files, form)
            facts = tiers.restore(reader, image, host=host)
            image.settle()
        if not facts.host_filled:
            raise RuntimeError(f"the segment in form {form} was not filled")
        return {
            "segment_bytes": sizes.of(form),
            "pack_bytes": reader.file_bytes,
            "image_bytes": reader.index.layout.image_bytes,
            "chunks": len(reader.index.chunks),
            "weights_bytes": sum(placed.info.nbytes for placed in reader.index.layout.tensors),
        }


def time_stages(settings: Settings, clock: Stopwatch) -> Facts:
    """Every stage of a restore alone, on one thread, over the whole model, in milliseconds."""
    with _source(settings) as reader:
        index = reader.index
        image = allocate_image("cpu", index.layout)
        scratch, taken = Scratch(), dict.fromkeys(("read", "open", "populate", "decode"), 0.0)
        with clock:
            for number, (span, chunk) in enumerate(zip(index.layout.chunks, index.chunks, strict=True)):
                marks = [time.perf_counter()]
                os.preadv(reader.fd, [scratch.stored[: chunk.extent_bytes]], chunk.offset)
                marks.append(time.perf_counter())
                planes = reader.open_chunk(number, scratch.stored)
                marks.append(time.perf_counter())
                with image.filling(span.image_offset, span.nbytes) as view:
                    marks.append(time.perf_counter())
                    decode_into(chunk.codec_id, planes, view, scratch.workspace)
                marks.append(time.perf_counter())
                for name, before, after in zip(taken, marks, marks[1:], strict=False):
                    taken[name] += (after - before) * 1000
        return {f"{name}_ms": round(value, 1) for name, value in taken.items()}


def evict(settings: Settings, clock: Stopwatch) -> Facts:
    """Give the memory of a full image back; the bytes that this process wrote to any file meanwhile."""
    image = populated(settings["nbytes"])
    before = _written_bytes()
    with clock:
        image.close()
    return {"written_bytes": _written_bytes() - before}


def _written_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


# --- GPU ------------------------------------------------------------------------------------------


def copy_pinned(settings: Settings, clock: Stopwatch) -> Facts:
    """As many bytes as the model has, from pinned memory to the GPU, in pieces of a chunk."""
    nbytes = settings["nbytes"]
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with clock:
        for start in range(0, nbytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, nbytes - start)
            at = start % COPY_BYTES
            target[start : start + count].copy_(source[at : at + count], non_blocking=True)
        torch.cuda.synchronize()
    if int(target.min()) != 1:
        raise RuntimeError("the copy did not arrive")
    return {}


def copy_device(settings: Settings, clock: Stopwatch) -> Facts:
    """As many bytes as the model has, from one place on the GPU to another."""
    source = torch.ones(settings["nbytes"], dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    with clock:
        target.copy_(source)
        torch.cuda.synchronize()
    return {}


def decode_device(settings: Settings, clock: Stopwatch) -> Facts:
    """Decode the whole pack on the GPU, from wire planes that are there already."""
    with _source(settings) as reader:
        scratch, parts = Scratch(), []
        for number, (span, chunk) in enumerate(
            zip(reader.index.layout.chunks, reader.index.chunks, strict=True)
        ):
            os.preadv(reader.fd, [scratch.stored[: chunk.extent_bytes]], chunk.offset)
            planes = reader.open_chunk(number, scratch.stored)
            if has_wire_form(chunk.codec_id):
                sizes = to_wire(chunk.codec_id, planes, span.nbytes, scratch.wire, scratch.workspace)
                ends = list(itertools.accumulate(sizes, initial=0))
                planes = [scratch.wire[start:end] for start, end in itertools.pairwise(ends)]
            # The last plane stays on the host: the decoder looks into the escapes (see device_decode).
            # An empty plane stands for zeros, and torch makes no tensor of an empty buffer.
            copies = [bytearray(plane) or bytearray(1) for plane in planes]
            tensors = [torch.frombuffer(copy, dtype=torch.uint8) for copy in copies]
            tensors = [tensor[: len(plane)] for tensor, plane in zip(tensors, planes, strict=True)]
            parts.append((span, chunk.codec_id, [*(tensor.cuda() for tensor in tensors[:-1]), tensors[-1]]))
        image = torch.zeros(reader.index.layout.image_bytes, dtype=torch.uint8, device="cuda")
        decodable = [part for part in parts if has_wire_form(part[1])]
        torch.cuda.synchronize()
        with clock:
            for span, codec_id, wire in decodable:
                out = image[span.image_offset : span.image_offset + span.nbytes]
                decode_on_device(codec_id, wire, out)
            torch.cuda.synchronize()
        compared = 0
        if len(decodable) == len(parts):
            held = image.cpu()
            spans = [
                (placed.info.name, held.data_ptr() + placed.image_offset, placed.info.nbytes)
                for placed in reader.index.layout.tensors
            ]
            compared = Reference(settings["reference"]).check(spans)
        return {
            "decoded_bytes": sum(span.nbytes for span, _, _ in decodable),
            "compared_bytes": compared,
        }


# --- ingest ----------------------------------------------------------------------------------------


def ingest(settings: Settings, clock: Stopwatch) -> Facts:
    """First use of a version: origin files to image and sealed pack, as a worker does both at once."""
    spec = msgspec.json.decode(settings["spec"], type=ModelSpec)
    folder = Path(settings["directory"])
    pack = os.open(settings["pack_path"], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    part = os.memfd_create("bench-part", os.MFD_CLOEXEC)
    target = PackTarget(pack, part, bytes.fromhex(settings["key"]), 2 * spec.image_bytes + 64 * MIB)
    with clock:
        started_s = time.perf_counter()
        files = [
            (file, FileSource(os.open(folder / file.path, os.O_RDONLY | os.O_CLOEXEC))) for file in spec.files
        ]
        load = Ingest(files, spec.ref, spec.engine, spec.task, target)
        load.open()
        image = allocate_image("cpu", load.layout)
        load.fill(image)
        image.settle()
        serving_ms = (time.perf_counter() - started_s) * 1000
        summary = load.finish_pack()
    loaded = [
        (placed.info.name, image.tensor(placed).data_ptr(), placed.info.nbytes)
        for placed in load.layout.tensors
    ]
    return {
        "compared_bytes": Reference(settings["reference"]).check(loaded) if settings["compare"] else 0,
        "image_bytes": load.layout.image_bytes,
        "pack_bytes": summary.disk_bytes,
        "serving_ms": serving_ms,
    }


if __name__ == "__main__":
    from packer.codec import Workspace

    # As in the nursery: everything that loads lazily loads before the fork.
    kernels.warm()
    Workspace()
    serve(
        {
            "memcpy": copy_memory,
            "read": read_into_arena,
            "restore": restore,
            "segment": fill_segment,
            "stages": time_stages,
            "evict": evict,
            "ingest": ingest,
            "pinned_copy": copy_pinned,
            "device_copy": copy_device,
            "device_decode": decode_device,
        }
    )
