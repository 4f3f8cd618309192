"""The tour's memory watch: it reads the kernel's books right and is not fooled by models on the move."""

from __future__ import annotations

import mmap
import os

import process_memory
import pytest
from process_memory import MemoryWatch, WorkerMemory

MIB = 1024 * 1024
SMAPS = """\
7f00-7f10 rw-p 00000000 00:06 5                          /dev/zero
Size:               2048 kB
Rss:                1024 kB
Pss:                1024 kB
Private_Dirty:      1024 kB
7f20-7f30 r-xp 00000000 08:01 99   /usr/lib/libtorch.so
Rss:                 300 kB
Private_Dirty:        40 kB
7f30-7f40 rw-s 00000000 00:01 12                         /dev/zero (deleted)
Rss:                  20 kB
Private_Dirty:        20 kB
7f40-7f50 r--p 00200000 00:06 5                          /dev/zero
Rss:                  76 kB
Private_Dirty:        76 kB
7f50-7f60 r--p 00001000 00:01 13                         /memfd:bunk-host (deleted)
Rss:                 500 kB
7f60-7f70 rw-s 00001000 00:01 13                         /memfd:bunk-host (deleted)
Rss:                  50 kB
Private_Dirty:        50 kB
7f70-7f80 r--s 00001000 00:01 13                         /memfd:bunk-host (deleted)
Rss:                   5 kB
VmFlags: rd wr
"""


def test_smaps_are_split_into_arena_and_rest() -> None:
    """Shared anonymous memory looks almost like an arena and is not one; a host segment is one when an image
    lies in it."""
    assert process_memory.parse_smaps(7, "bunk@cpu:1", SMAPS) == WorkerMemory(
        7, "cpu:1", rss_bytes=1975 * 1024, arena_bytes=1650 * 1024, private_bytes=60 * 1024
    )


def test_arena_of_a_process_with_another_name_is_still_an_arena() -> None:
    memory = process_memory.parse_smaps(7, "python", SMAPS)
    assert memory is not None
    assert (memory.device, memory.arena_bytes) == ("", 1650 * 1024)


def test_arena_bytes_of_a_real_process_follow_what_it_touches() -> None:
    """Reads this process: a mapped but untouched arena is nothing, touched pages are counted exactly."""
    fd = os.open("/dev/zero", os.O_RDWR)
    with mmap.mmap(fd, 8 * MIB, flags=mmap.MAP_PRIVATE) as arena:
        before = process_memory.read_worker(os.getpid())
        arena[: 3 * MIB] = b"x" * (3 * MIB)
        after = process_memory.read_worker(os.getpid())
    os.close(fd)
    assert before is not None
    assert after is not None
    assert (before.arena_bytes, after.arena_bytes) == (0, 3 * MIB)


def test_process_that_is_gone_has_no_memory_and_no_children() -> None:
    gone = 2**22 + 1  # above the kernel's greatest process id
    assert process_memory.read_worker(gone) is None
    assert process_memory.read_rss(gone) == 0
    assert process_memory.children(gone) == []


def watch_of(monkeypatch: pytest.MonkeyPatch, looks: list[dict[int, WorkerMemory]]) -> MemoryWatch:
    """A watch that sees ``looks`` one after another, below a nursery of 10 MiB."""
    remaining = iter(looks)
    monkeypatch.setattr(process_memory, "find_nurseries", lambda pid: [1])
    monkeypatch.setattr(process_memory, "read_rss", lambda pid: 10 * MIB)
    monkeypatch.setattr(process_memory, "_look", lambda nurseries: next(remaining))
    return MemoryWatch(agent_pid=0)


def memory(pid: int, arena_mib: int, device: str = "cpu:0") -> WorkerMemory:
    return WorkerMemory(pid, device, (arena_mib + 12) * MIB, arena_mib * MIB, 3 * MIB)


def test_peaks_are_sums_over_the_workers_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    look = {5: memory(5, 40), 6: memory(6, 30), 7: memory(7, 90, "cpu:1")}
    watch = watch_of(monkeypatch, [look, look])
    watch.sample()
    peaks = watch.stop()
    assert peaks.arena_bytes_by_device == {"cpu:0": 70 * MIB, "cpu:1": 90 * MIB}
    assert peaks.arena_bytes == 160 * MIB
    assert peaks.worker_arena_bytes == 90 * MIB
    assert peaks.worker_private_bytes == 3 * MIB
    assert peaks.workers_rss_bytes == (160 + 3 * 12) * MIB
    assert peaks.above_baseline_bytes == (160 + 3 * 2) * MIB
    assert (peaks.samples, peaks.workers, peaks.nursery_bytes) == (1, 3, 10 * MIB)


def test_model_that_moved_between_two_reads_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look reads worker 5 before it evicts and worker 6 after it restored; the second sees it."""
    watch = watch_of(monkeypatch, [{5: memory(5, 80), 6: memory(6, 80)}, {5: memory(5, 0), 6: memory(6, 80)}])
    watch.sample()
    assert watch.stop().arena_bytes_by_device == {"cpu:0": 80 * MIB}


def test_what_one_worker_held_counts_though_it_was_gone_at_the_second_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = [{5: memory(5, 80), 6: memory(6, 20)}, {5: memory(5, 0), 6: memory(6, 20)}]
    watch = watch_of(monkeypatch, looks)
    watch.sample()
    peaks = watch.stop()
    assert peaks.arena_bytes_by_device == {"cpu:0": 80 * MIB}
    assert (peaks.arena_bytes, peaks.worker_arena_bytes) == (80 * MIB, 80 * MIB)


def test_watch_that_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(pid: int) -> list[int]:
        raise PermissionError("no /proc here")

    monkeypatch.setattr(process_memory, "find_nurseries", broken)
    watch = MemoryWatch(agent_pid=0).start()
    assert watch._thread is not None
    watch._thread.join()
    with pytest.raises(PermissionError, match="no /proc here"):
        watch.stop()
