"""Images of gangs: one model's weights over several devices, each with a run of its chunks.

Covers: which part of the image lies in which memory, and doing with each part what is done with an image.
Does not cover: the memory itself (``agent/arena.py``, ``agent/cuda_image.py``) or where a model is cut
(``packer/gangs.py``).

No range that is filled or read, and no tensor, lies across two parts: a cut is where no tensor does, which is
looked at here once more, because the plan that says where was made elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from agent.arena import Image, allocate_image
from packer.layout import ChunkSpan, ImageLayout, PlacedTensor
from packer.tiers import TierError

if TYPE_CHECKING:
    from packer.codec import Workspace


class GangImage(Image):
    """Part j is an image of its own, on device j."""

    def __init__(self, starts: Sequence[int], parts: Sequence[Image], nbytes: int) -> None:
        self.nbytes = nbytes
        self._starts = list(starts)
        self._parts = list(parts)

    def _at(self, offset: int, nbytes: int = 0) -> tuple[Image, int]:
        """The part that has these bytes, and where it begins."""
        number = bisect_right(self._starts, offset) - 1
        start, part = self._starts[number], self._parts[number]
        assert offset + nbytes <= start + part.nbytes, "a range of an image lies on two devices"
        return part, start

    def filling(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        part, start = self._at(offset, nbytes)
        return part.filling(offset - start, nbytes)

    def reading(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        part, start = self._at(offset, nbytes)
        return part.reading(offset - start, nbytes)

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        part, start = self._at(span.image_offset, span.nbytes)
        part.place(replace(span, image_offset=span.image_offset - start), codec_id, planes, workspace)

    def lay_in(self, fd: int, start: int) -> bool:
        # All parts are on devices of one kind, so either all of them can or none.
        return all(part.lay_in(fd, start + at) for at, part in zip(self._starts, self._parts, strict=True))

    def map_from(self, fd: int, start: int) -> bool:
        return all(part.map_from(fd, start + at) for at, part in zip(self._starts, self._parts, strict=True))

    def settle(self) -> None:
        for part in self._parts:
            part.settle()

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        part, start = self._at(placed.image_offset, placed.info.nbytes)
        return part.tensor(replace(placed, image_offset=placed.image_offset - start))

    def release(self, offset: int) -> None:
        for at, part in zip(self._starts, self._parts, strict=True):
            if offset < at + part.nbytes:
                part.release(max(offset - at, 0))

    def grow(self) -> None:
        for part in self._parts:
            part.grow()

    def close(self) -> bool:
        return all([part.close() for part in self._parts])  # every one, whatever the first says


def allocate(kind: str, layout: ImageLayout, run_ends: Sequence[int]) -> Image:
    """An image whose runs of chunks, each up to one of ``run_ends``, are on a device each. Raises
    ``MemoryError``, ``OSError``, or ``TierError`` (broken) for a cut through a tensor."""
    if len(run_ends) <= 1:
        return allocate_image(kind, layout)
    cut = layouts(layout, run_ends)
    parts: list[Image] = []
    try:
        for number, (_, part) in enumerate(cut):
            parts.append(allocate_image(kind, part, number))
    except BaseException:
        for part_image in parts:
            part_image.close()
        raise
    return GangImage([start for start, _ in cut], parts, layout.image_bytes)


def layouts(layout: ImageLayout, run_ends: Sequence[int]) -> list[tuple[int, ImageLayout]]:
    """Of each run, where it starts in the image and the layout of what is in it. Raises ``TierError``."""
    chunks, found = layout.chunks, []
    tensors = deque(layout.tensors)
    bounds = [0, *run_ends]
    if run_ends[-1] != len(chunks) or any(first >= end for first, end in pairwise(bounds)):
        raise TierError(f"{len(chunks)} chunks can not be cut at {list(run_ends)}", broken=True)
    for first, end in pairwise(bounds):
        start, last = chunks[first].image_offset, chunks[end - 1]
        stop = last.image_offset + last.nbytes
        inside = []
        while tensors and (tensors[0].image_offset < stop or end == len(chunks)):
            placed = tensors.popleft()
            if placed.image_offset + placed.info.nbytes > stop:
                raise TierError(f"a cut lies within tensor {placed.info.name}; push it again", broken=True)
            inside.append(replace(placed, image_offset=placed.image_offset - start))
        spans = [replace(chunk, image_offset=chunk.image_offset - start) for chunk in chunks[first:end]]
        found.append((start, ImageLayout(stop - start, tuple(inside), tuple(spans))))
    return found
