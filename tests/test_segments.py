"""Host segments as the agent owns them: their memory is there exactly as long as somebody is charged for it.

Does not cover what is in a segment (test_host_segment) or images that lie in one (test_images).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from agent.segments import HostSegments
from packer.index import HEADER_BYTES
from packer.layout import PAGE_BYTES
from packer.types import MIB, ModelRef

REF = ModelRef("acme", "tiny", "0" * 16)
OTHER = ModelRef("rival", "tiny", "0" * 16)
CPU = "cpu:0"


@pytest.fixture
def segments() -> Iterator[HostSegments]:
    segments = HostSegments()
    yield segments
    segments.close()


def filled(segments: HostSegments, ref: ModelRef, size: int = MIB) -> int:
    descriptor = segments.create(ref, size)
    os.pwrite(descriptor, b"x" * size, 0)
    assert segments.seal(ref)
    return descriptor


def drop(segments: HostSegments, ref: ModelRef) -> None:
    freeing = segments.drop(ref)
    assert freeing is not None
    freeing.free()


def test_a_sealed_segment_can_not_be_changed_or_grow(segments: HostSegments) -> None:
    descriptor = filled(segments, REF)
    assert segments.allocated_bytes() == MIB
    assert segments.get(REF) == descriptor
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 2 * MIB)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_what_is_dropped_is_free_whoever_still_has_it(segments: HostSegments) -> None:
    """A worker that keeps its descriptor or a mapping keeps no memory."""
    descriptor = os.dup(filled(segments, REF))
    with mmap.mmap(descriptor, MIB, mmap.MAP_PRIVATE, mmap.PROT_READ) as kept:
        assert kept[:1] == b"x"
        drop(segments, REF)
        assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)
    assert segments.get(REF) is None
    assert segments.drop(REF) is None
    assert segments.allocated_bytes() == segments.lent_bytes() == 0


def test_what_an_image_lies_in_outlives_the_drop(segments: HostSegments) -> None:
    """Exactly as far as the device is charged for it, chunk by chunk, and the page before the image."""
    image = MIB - 8 * PAGE_BYTES
    descriptor = filled(segments, REF)
    with mmap.mmap(descriptor, MIB, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert segments.lend(REF, CPU, image) is None
        assert segments.give_back(REF, image - PAGE_BYTES) is None, "the host tier is charged for it still"
        assert segments.allocated_bytes() == MIB
        drop(segments, REF)
        assert segments.allocated_bytes() == 0
        assert segments.lent_bytes() == HEADER_BYTES + image - PAGE_BYTES
        freeing = segments.give_back(REF, 5 * PAGE_BYTES)
        assert freeing is not None
        freeing.free()
        assert segments.lent_bytes() == HEADER_BYTES + 5 * PAGE_BYTES
        assert mapped[: HEADER_BYTES + 5 * PAGE_BYTES] == b"x" * (HEADER_BYTES + 5 * PAGE_BYTES)
        freeing = segments.give_back(REF, 0)
        assert freeing is not None
        freeing.free()
        assert segments.lent_bytes() == 0
        assert segments.give_back(REF, 0) is None


def test_an_image_that_moves_to_a_new_segment_frees_the_old_one(segments: HostSegments) -> None:
    filled(segments, REF)
    segments.lend(REF, CPU, MIB - HEADER_BYTES)
    drop(segments, REF)
    assert segments.lent_bytes() == MIB
    filled(segments, REF)
    freeing = segments.lend(REF, CPU, MIB - HEADER_BYTES)
    assert freeing is not None
    freeing.free()
    assert (segments.allocated_bytes(), segments.lent_bytes()) == (MIB, 0)


def test_a_new_segment_that_no_image_lies_in_is_freed_whole(segments: HostSegments) -> None:
    """Although the old one still has the model's image."""
    filled(segments, REF)
    segments.lend(REF, CPU, PAGE_BYTES)
    drop(segments, REF)
    descriptor = os.dup(filled(segments, REF))
    drop(segments, REF)
    assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)
    assert segments.lent_bytes() == HEADER_BYTES + PAGE_BYTES


def test_the_end_of_a_process_gives_back_all_that_it_held_on_its_device(segments: HostSegments) -> None:
    for ref, device in ((REF, CPU), (OTHER, CPU)):
        filled(segments, ref)
        segments.lend(ref, device, MIB - HEADER_BYTES)
        drop(segments, ref)
    assert segments.give_all_back(REF.tenant, "cpu:1") == []
    for freeing in segments.give_all_back(REF.tenant, CPU):
        freeing.free()
    assert segments.lent_bytes() == MIB
    assert segments.give_back(REF, 0) is None


def test_freeing_late_never_brings_bytes_back(segments: HostSegments) -> None:
    """The drop and the eviction are carried out in threads, in any order."""
    filled(segments, REF)
    segments.lend(REF, CPU, MIB - HEADER_BYTES)
    dropping = segments.drop(REF)
    evicting = segments.give_back(REF, PAGE_BYTES)
    assert dropping is not None
    assert evicting is not None
    evicting.free()
    dropping.free()
    assert segments.lent_bytes() == HEADER_BYTES + PAGE_BYTES


def test_without_a_descriptor_left_what_is_dropped_is_free_all_the_same(
    segments: HostSegments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error here would end the agent, for all tenants."""

    def full(descriptor: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    image = MIB - 8 * PAGE_BYTES
    filled(segments, REF)
    assert segments.lend(REF, CPU, image) is None
    monkeypatch.setattr(os, "dup", full)
    assert segments.drop(REF) is None
    assert segments.allocated_bytes() == 0
    assert segments.lent_bytes() == HEADER_BYTES + image
    assert segments.give_back(REF, 5 * PAGE_BYTES) is None
    assert segments.lent_bytes() == HEADER_BYTES + 5 * PAGE_BYTES
    freeing = segments.give_back(REF, 0)
    assert freeing is not None
    freeing.free()
    assert segments.lent_bytes() == 0
