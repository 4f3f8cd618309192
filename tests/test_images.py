"""Images on every kind of device: the same bytes by every way in, memory given back in part and whole.

Covers: both kinds of image through the same tests (the GPU's kind also where there is no GPU, on torch's cpu
device, and with the mark ``gpu`` on one), the exact memory of cpu images, and kernels that lack what the
arena asks for. Does not cover: images inside workers (``test_worker_moves``).
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from pack_samples import (
    KEY,
    every_codec_model,
    image_of,
    memory_file,
    model_of,
    pack_bytes,
    small_model,
    write_pack,
)
from process_memory import read_worker

import agent.arena
import agent.cuda_image
import packer.mapping
from agent.arena import DTYPES, CpuImage, Image, allocate_image
from agent.cuda_image import CudaImage
from agent.gang_image import allocate
from agent.nursery import _data_bytes
from packer.gangs import cuts_of, run_ends
from packer.host_segment import HostWriter
from packer.layout import CHUNK_BYTES, ImageLayout
from packer.mapping import MADV_POPULATE_WRITE, LargePages, advise
from packer.pack import PackReader
from packer.tiers import restore
from packer.types import KIB, MIB, HostForm

PAGE = 4 * KIB

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = {
    "arena": lambda layout: allocate_image("cpu", layout),
    "device class on cpu": lambda layout: CudaImage(layout, "cpu"),
    "gang": lambda layout: allocate("cpu", layout, run_ends(layout.chunk_bytes, cuts_of(layout, False), 3)),
    "gpu": lambda layout: allocate_image("cuda", layout),
}


@pytest.fixture(
    params=["arena", "device class on cpu", "gang", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])]
)
def make(request: pytest.FixtureRequest) -> Callable[[ImageLayout], Image]:
    return KINDS[request.param]


@cache
def large_model() -> tuple[bytes, ImageLayout]:
    """Several chunks of several dtypes, one tensor across three of them, small ones behind it."""
    draw = torch.Generator().manual_seed(1)

    def drawn(name: str, dtype: str, *shape: int) -> tuple[str, str, list[int], bytes]:
        values = torch.randn(shape, generator=draw).mul_(0.02).to(DTYPES[dtype])
        return name, dtype, list(shape), values.view(torch.uint8).numpy().tobytes()

    return model_of(
        [
            drawn("embed.weight", "BF16", 2500, 2048),
            drawn("h.0.weight", "F32", 1024, 512),
            drawn("h.0.bias", "F32", 512),
            drawn("h.1.weight", "F16", 512, 512),
            drawn("head.weight", "BF16", 3, 5),
        ]
    )


def fill(image: Image, data: bytes, layout: ImageLayout, first_chunk: int = 0) -> None:
    """Every chunk of the image from ``data``, by two threads."""

    def one(number: int) -> None:
        chunk = layout.chunks[number]
        with image.filling(chunk.image_offset, chunk.nbytes) as view:
            view[:] = data[chunk.image_offset : chunk.image_offset + chunk.nbytes]

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(one, range(first_chunk, len(layout.chunks))))
    image.settle()


def content(image: Image, layout: ImageLayout, chunks: int | None = None) -> bytes:
    data = b""
    for chunk in layout.chunks[:chunks]:
        with image.reading(chunk.image_offset, chunk.nbytes) as view:
            data += bytes(view)
    return data


@pytest.mark.parametrize("model", [small_model, every_codec_model, large_model])
def test_what_a_pack_restores_is_what_was_packed(
    make: Callable[[ImageLayout], Image], model: Callable[[], tuple[bytes, ImageLayout]]
) -> None:
    """Placed by restore threads in every codec; tensors are views of exactly these bytes."""
    file, layout = model()
    wanted = image_of(file, layout)
    image = make(layout)
    with memory_file() as fd:
        write_pack(fd, layout, wanted)
        restore(PackReader(fd, KEY), image)
    image.settle()
    assert content(image, layout) == wanted
    for placed in layout.tensors:
        tensor, info = image.tensor(placed), placed.info
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[info.dtype], info.shape)
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        data = bytes(flat.cpu().numpy()) if tensor.numel() else b""
        assert data == file[info.file_offset : info.file_offset + info.nbytes]
    image.close()


@pytest.mark.parametrize("segment_bytes", [1, 6 * MIB, 1 << 40])
def test_a_part_that_was_given_back_can_be_filled_again(
    make: Callable[[ImageLayout], Image], segment_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the image is cut: the kept chunks stay as they are, the others come back."""
    monkeypatch.setattr(agent.cuda_image, "SEGMENT_BYTES", segment_bytes)
    file, layout = large_model()
    wanted = bytes(image_of(file, layout))
    image = make(layout)
    fill(image, wanted, layout)
    for keep in (*reversed(range(1, len(layout.chunks))), 2):
        kept_bytes = layout.chunks[keep].image_offset
        image.release(kept_bytes)
        assert content(image, layout, keep) == wanted[:kept_bytes]
        image.grow()
        fill(image, wanted, layout, keep)
        assert content(image, layout) == wanted
        assert bytes(image.tensor(layout.tensors[-1]).reshape(-1).view(torch.uint8).cpu().numpy())
    assert image.close()
    assert image.close()


def test_device_buffers_are_cut_where_no_tensor_lies_across(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is given back frees whole buffers and the rest of one, and no tensor is torn."""
    monkeypatch.setattr(agent.cuda_image, "SEGMENT_BYTES", 1)
    _, layout = large_model()
    image = CudaImage(layout, "cpu")
    starts = [segment.start for segment in image._segments]
    assert len(starts) > 1
    assert starts == [0, *(at for at in [c.image_offset for c in layout.chunks[1:]] if at in starts)]
    assert sum(segment.nbytes for segment in image._segments) == layout.image_bytes
    for placed in layout.tensors:
        segment = image._at(placed.image_offset)
        assert placed.image_offset + placed.info.nbytes <= segment.start + segment.nbytes
    # In the middle of the tensor that spans three chunks: only what is kept of it is held.
    image.release(layout.chunks[1].image_offset)
    held = [len(segment.buffer) for segment in image._segments if segment.buffer is not None]
    assert held == [layout.chunks[1].image_offset]
    with pytest.raises(AssertionError, match="given back"):
        content(image, layout, 2)


def test_a_device_without_room_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("2 GiB asked for")

    _, layout = small_model()
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MemoryError, match="no room"):
        CudaImage(layout, "cpu")


# --- cpu images -----------------------------------------------------------------------------------


def arena_bytes() -> int:
    memory = read_worker(os.getpid())
    assert memory is not None
    return memory.arena_bytes


@pytest.mark.parametrize("nbytes", [PAGE, 2 * MIB - PAGE, 2 * MIB + PAGE, 9 * MIB + 3 * PAGE])
def test_memory_is_exact_while_filled_and_gone_when_released(nbytes: int) -> None:
    """Never a page more than the image has, whatever huge pages would like."""
    image = CpuImage(nbytes)
    assert arena_bytes() == 0
    for at in range(0, nbytes, MIB):
        with image.filling(at, min(MIB, nbytes - at)) as view:
            view[:] = b"\x5a" * len(view)
    assert arena_bytes() == nbytes
    keep = nbytes // 2 // PAGE * PAGE
    image.release(keep)
    assert arena_bytes() == keep
    with image.reading(keep, nbytes - keep) as view:
        assert bytes(view) == bytes(nbytes - keep), "what was given back reads as zeros"
    image.grow()
    with image.filling(keep, nbytes - keep) as view:
        assert bytes(view) == bytes(nbytes - keep), "and is zeros when it comes again"
    assert arena_bytes() == nbytes
    assert image.close()
    assert arena_bytes() == 0


def test_a_view_that_somebody_keeps_holds_no_memory() -> None:
    image = CpuImage(4 * MIB)
    with image.filling(0, 4 * MIB) as view:
        view[:] = b"\x5a" * len(view)
    placed = replace(large_model()[1].tensors[-1], image_offset=0)
    kept = image.tensor(placed)
    assert bool(kept.reshape(-1).view(torch.uint8).any())
    assert not image.close()
    assert arena_bytes() == 0
    assert not bool(kept.reshape(-1).view(torch.uint8).any()), "a stray read finds zeros"
    del kept
    assert image.close()


def test_tensors_start_where_vectors_like_it() -> None:
    image = CpuImage(CHUNK_BYTES)
    with image.filling(0, PAGE) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert address % (2 * MIB) == 0
    image.close()


def test_a_kernel_without_huge_pages_or_populating_is_only_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints that fail are ignored; giving memory back must not fail silently."""

    def refuse(address: int, nbytes: int, advice: int) -> bool:
        ctypes.set_errno(errno.EINVAL)
        return False

    monkeypatch.setattr(agent.arena, "advise", refuse)
    monkeypatch.setattr(packer.mapping, "advise", refuse)
    file, layout = large_model()
    wanted = bytes(image_of(file, layout))
    image = CpuImage(layout.image_bytes)
    fill(image, wanted, layout)
    assert content(image, layout) == wanted
    image.release(layout.chunks[1].image_offset)
    assert arena_bytes() == layout.chunks[1].image_offset
    image.close()
    with pytest.raises(OSError, match="giving 4096 bytes"):
        agent.arena._give_back(PAGE + 1, PAGE)


# --- cpu images in host segments ------------------------------------------------------------------


@contextmanager
def raw_segment(model: tuple[bytes, ImageLayout], large: bool = True) -> Iterator[tuple[int, CpuImage]]:
    """A raw segment that a restore filled, the image lying in it, as agent and worker make them."""
    data = pack_bytes(model=model)
    fd = os.memfd_create("bunk-host", os.MFD_ALLOW_SEALING)
    try:
        with memory_file(data) as pack, pytest.MonkeyPatch.context() as patch:
            if not large:
                patch.setattr(packer.mapping, "_MADV_COLLAPSE", -1)
            reader = PackReader(pack, KEY)
            side_files = {path: reader.file(path) for path, _ in reader.index.files}
            os.ftruncate(fd, reader.host_sizes.raw_bytes)
            image = CpuImage(model[1].image_bytes)
            facts = restore(reader, image, host=HostWriter(fd, reader.index, side_files, HostForm.RAW))
        assert (facts.host_filled, facts.mapped) == (True, True)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        yield fd, image
        image.close()
    finally:
        os.close(fd)
    assert arena_bytes() == 0


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("model", [small_model, every_codec_model, large_model])
def test_a_raw_segment_is_the_image(
    model: Callable[[], tuple[bytes, ImageLayout]], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled in place and mapped again: every bit, no memory of its own, with large pages and without; small
    ones are mapped by several threads."""
    if not large:
        monkeypatch.setattr(packer.mapping, "_TRIAL_BYTES", PAGE)
        monkeypatch.setattr(packer.mapping, "_TRIAL_S", 0)
    file, layout = model()
    wanted = bytes(image_of(file, layout))
    with raw_segment((file, layout), large) as (fd, filled):
        assert content(filled, layout) == wanted
        assert os.fstat(fd).st_blocks * 512 == os.fstat(fd).st_size
        image = CpuImage(layout.image_bytes)
        before = private_bytes()
        facts = restore(PackReader(fd, None), image)
        assert (facts.mapped, facts.read_bytes, facts.chunks) == (True, 0, len(layout.chunks))
        # Code that is loaded with the first restore takes some megabytes, a copy of the large model 15.
        assert private_bytes() - before < layout.image_bytes // 2 + 4 * MIB
        assert arena_bytes() == 2 * layout.image_bytes
        assert content(image, layout) == wanted
        for placed in layout.tensors:
            tensor, at = image.tensor(placed), placed.info.file_offset
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert data == file[at : at + placed.info.nbytes]
        image.close()


def test_what_lies_in_a_segment_is_given_back_and_comes_back_from_anywhere() -> None:
    """Any part of it: by mapping all of it again, or as memory of the image's own behind what stayed."""
    file, layout = large_model()
    wanted = bytes(image_of(file, layout))
    with raw_segment((file, layout)) as (fd, image), memory_file(pack_bytes(model=(file, layout))) as pack:
        last = len(layout.chunks) - 1
        for first, source in ((last, fd), (1, fd), (last, pack), (1, pack), (last, pack), (2, fd)):
            start = layout.chunks[first].image_offset
            image.release(start)
            # A large page that is cut is mapped again when it is touched.
            assert arena_bytes() <= start
            assert content(image, layout, first) == wanted[:start]
            assert arena_bytes() == start
            with image.reading(start, layout.image_bytes - start) as view:
                assert bytes(view) == bytes(layout.image_bytes - start), "what was given back reads as zeros"
            assert arena_bytes() == start
            image.grow()
            restore(PackReader(source, KEY if source == pack else None), image, first_chunk=first)
            assert content(image, layout) == wanted
            assert arena_bytes() == layout.image_bytes


def test_weights_in_a_segment_can_not_be_written() -> None:
    """A write ends the process that tries; the segment and everybody else's image stay as they are."""
    file, layout = small_model()
    wanted = bytes(image_of(file, layout))
    with raw_segment((file, layout)) as (_, image):
        with image.reading(0, PAGE) as view:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            ctypes.memset(address, 1, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
        assert content(image, layout) == wanted


def test_a_view_that_somebody_keeps_of_a_segment_holds_no_memory() -> None:
    file, layout = large_model()
    with raw_segment((file, layout)) as (_, image):
        kept = image.tensor(layout.tensors[-1])
        assert not image.close()
        assert arena_bytes() == 0
        assert not bool(kept.reshape(-1).view(torch.uint8).any()), "a stray read finds zeros"
        del kept
        assert image.close()


def test_a_segment_without_memory_fails_the_restore_and_not_the_process() -> None:
    """A write where the kernel has no page for it would end the worker, and all its tenant's models. Pages
    behind the end of a file, which its own worker has cut, are refused in the same way."""
    fd = os.memfd_create("bunk-host", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4 * MIB)
        image = CpuImage(3 * MIB)
        assert image.lay_in(fd, PAGE)
        with image.filling(0, PAGE) as view:
            view[:] = b"x" * PAGE
        os.ftruncate(fd, 0)
        probe = mmap.mmap(-1, PAGE)
        if not advise(ctypes.addressof(ctypes.c_char.from_buffer(probe)), PAGE, MADV_POPULATE_WRITE):
            pytest.skip("this kernel can not tell beforehand")
        with pytest.raises(OSError, match="no memory for"), image.filling(MIB, PAGE):
            pass
        image.close()
    finally:
        os.close(fd)


def test_large_pages_of_a_segment_count_as_nobody_s_private_memory() -> None:
    """A worker's private memory is limited, and a segment may be larger than that; so may an image."""
    fd = os.memfd_create("bunk-host")
    os.ftruncate(fd, 2**40)
    before = _data_bytes()
    pages = LargePages(fd, 2**40)
    assert _data_bytes() - before < 64 * MIB
    pages.prepare(0, PAGE)
    pages.close()
    pages.close()
    os.close(fd)


def test_a_segment_shorter_than_the_image_is_refused() -> None:
    """Mapped, its missing end would kill whoever touches it."""
    file, layout = large_model()
    with raw_segment((file, layout)) as (fd, image):
        os.ftruncate(fd, layout.image_bytes)
        with pytest.raises(OSError, match="shorter"):
            image.map_from(fd, PAGE)
        image.release(0)


def private_bytes() -> int:
    memory = read_worker(os.getpid())
    assert memory is not None
    return memory.private_bytes
