"""Going on with an interrupted ingest: what was stored is not asked of the origin again, and nothing wrong
is ever believed.

Covers: deaths between any two writes and in the middle of each, dying twice, files that somebody else left,
flipped bits, noise as progress, origins that changed in between or broke off. Does not cover: an ingest from
start to end (``test_ingest``), the agent's side (keys and files of a pack in the making).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from origin_samples import (
    CountedSource,
    Tensor,
    big,
    check_pack,
    contents,
    expected_image,
    file_sources,
    ingest,
    listed,
    load,
    weight_files,
)
from pack_samples import KEY, REF, MemoryImage, memory_file, small_model, weights

from packer import pack_file, progress
from packer.ingest import Ingest
from packer.layout import CHUNK_BYTES
from packer.pack import PackReader
from packer.packing import PackTarget
from packer.pieces import PIECE_BYTES
from packer.progress import PROGRESS_BYTES_MAX, ProgressLog
from packer.sources import SourceFailed
from packer.tiers import TierError
from packer.types import KIB, MIB, ModelRef, Task

LIMIT = 256 * MIB


def resume_shards() -> list[list[Tensor]]:
    """Some ten chunks of one page to three, two of them equal, in a file order that is not the image's."""
    return [
        [
            ("head.weight", "BF16", [700 * KIB], big(1400 * KIB, 1)),
            *[(f"h.{at}.w", ("U8", "I8")[at % 2], [5000], weights("U8", 5000, at)) for at in range(7)],
            ("embed.weight", "BF16", [700 * KIB], big(1400 * KIB, 1)),
        ]
    ]


@dataclass
class Snapshots:
    """Both files as they are before each write, and with half of that write."""

    fd: int
    part_fd: int
    taken: list[tuple[bytes, bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        with self._lock:
            if fd in (self.fd, self.part_fd):
                before = (contents(self.fd), contents(self.part_fd))
                self.taken.append(before)
                real_pwrite(fd, data[: len(data) // 2], offset)
                self.taken.append((contents(self.fd), contents(self.part_fd)))
            return real_pwrite(fd, data, offset)


real_pwrite = os.pwrite


def snapshots_of(
    files: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    start: tuple[bytes, bytes] = (b"", b""),
    resume: bool = False,
) -> list[tuple[bytes, bytes]]:
    """What a killed process could leave, at every point of an ingest."""
    with file_sources(files) as sources, memory_file(start[0]) as fd, memory_file(start[1]) as part_fd:
        spy = Snapshots(fd, part_fd)
        with monkeypatch.context() as patch:
            patch.setattr(pack_file.os, "pwrite", spy.pwrite)
            ingest(sources, PackTarget(fd, part_fd, KEY, LIMIT, resume))
        return spy.taken


def go_on(files: Mapping[str, bytes], left: tuple[bytes, bytes]) -> tuple[int, int]:
    """Ingest from what was left; returns the bytes resumed, and the body bytes asked of the origin."""
    sources = {file.path: CountedSource(files[file.path]) for file in listed(files)}
    with memory_file(left[0]) as fd, memory_file(left[1]) as part_fd:
        done = ingest(
            [(file, sources[file.path]) for file in listed(files)],
            PackTarget(fd, part_fd, KEY, LIMIT, resume=True),
        )
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
        check_pack(fd, files)
        assert contents(part_fd) == b""
    asked = sum(
        sum(nbytes for _, nbytes in source.asked[1:])
        for path, source in sources.items()
        if path.endswith(".safetensors")
    )
    return done.ingest.resumed_bytes, asked


def test_an_ingest_goes_on_after_a_death_between_any_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the middle of each. What was stored is not asked of the origin again, ever more of it."""
    files = weight_files(resume_shards())
    taken = snapshots_of(files, monkeypatch)
    assert len(taken) > 40
    resumed, asked = zip(*(go_on(files, left) for left in taken), strict=True)
    assert resumed[0] == 0
    assert asked[0] > 2 * 1400 * KIB
    assert max(resumed) > 2 * 1400 * KIB
    assert min(asked) == 0
    # Extents land before their records, so what can be resumed grows but for a chunk that changes hands.
    assert sorted(resumed)[len(resumed) // 2] > 0
    for came, fetched in zip(resumed, asked, strict=True):
        assert came + fetched >= asked[0]


def test_an_ingest_goes_on_after_dying_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt moves and re-seals what the first one stored; it may die at any moment of that."""
    files = weight_files(resume_shards())
    first = snapshots_of(files, monkeypatch)
    left = first[len(first) * 2 // 3]
    whole, _ = go_on(files, left)
    assert whole > 0
    again = snapshots_of(files, monkeypatch, left, resume=True)
    resumed = [go_on(files, later)[0] for later in again]
    # A chunk that is being moved may be lost with the process, and its duplicate with it; others are not.
    assert min(resumed) >= whole - 2 * 1404 * KIB
    assert max(resumed) >= whole


def test_every_attempt_seals_with_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead attempt sealed and did not record would otherwise share a nonce with what replaces it."""
    files = weight_files(resume_shards())
    left = snapshots_of(files, monkeypatch)[-1]
    with file_sources(files) as sources, memory_file(left[0]) as fd, memory_file(left[1]) as part_fd:
        run = Ingest(
            sources, REF, "transformers", Task.EMBEDDING, PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        )
        run.open()
        first = {found.salt for found in ProgressLog(part_fd, KEY, REF, run.layout).read()}
        run.fill(MemoryImage(run.layout.image_bytes))
        second = {found.salt for found in ProgressLog(part_fd, KEY, REF, run.layout).read()}
        run.finish_pack()
        assert len(first) == len(second) == 1
        assert PackReader(fd, KEY, REF).salt in second - first


def test_what_was_left_by_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another key, another version, noise, cut and swapped files: the load is right and starts over."""
    files = weight_files(resume_shards())
    pack, part = snapshots_of(files, monkeypatch)[-1]
    for left in (
        (pack, b""),
        (b"", part),
        (pack, os.urandom(5000)),
        (os.urandom(len(pack)), part),
        (pack[::-1], part),
        (pack, part[1:]),
        (pack[4096:], part),
        (pack, (2**32 - 1).to_bytes(4, "little") + part),
    ):
        assert go_on(files, left)[0] == 0
    with file_sources(files) as sources, memory_file(pack) as fd, memory_file(part) as part_fd:
        done = ingest(sources, PackTarget(fd, part_fd, bytes(32), LIMIT, resume=True))
        assert done.ingest.resumed_bytes == 0
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
    with file_sources(files) as sources, memory_file(pack) as fd, memory_file(part) as part_fd:
        other = ModelRef(REF.tenant, REF.name, "f" * 16)
        run = Ingest(
            sources, other, "transformers", Task.EMBEDDING, PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        )
        load(run)
        assert run.resumed_bytes == 0
        run.abandon()


def test_a_flipped_bit_of_what_was_left_costs_that_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    files = weight_files(resume_shards())
    pack, part = snapshots_of(files, monkeypatch)[-1]
    whole, _ = go_on(files, (pack, part))
    for at in range(5000, len(pack), len(pack) // 23):
        flipped = bytearray(pack)
        flipped[at] ^= 1 << at % 8
        assert go_on(files, (bytes(flipped), part))[0] <= whole
    for at in range(0, len(part), len(part) // 23):
        flipped = bytearray(part)
        flipped[at] ^= 1 << at % 8
        assert go_on(files, (pack, bytes(flipped)))[0] < whole


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=3000))
def test_any_bytes_as_progress_are_harmless(noise: bytes) -> None:
    _, layout = small_model()
    with memory_file(noise) as fd:
        assert ProgressLog(fd, KEY, REF, layout).read() == []
        assert contents(fd) == b""


def test_progress_above_its_limit_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout = small_model()
    with memory_file() as fd:
        os.truncate(fd, PROGRESS_BYTES_MAX + 1)
        read: list[int] = []
        monkeypatch.setattr(progress.os, "pread", lambda *arguments: read.append(1))
        assert ProgressLog(fd, KEY, REF, layout).read() == []
        assert read == []
        assert os.fstat(fd).st_size == 0


def test_an_origin_that_changed_in_between_drops_what_was_kept() -> None:
    """The kept chunks may be the bad ones, so the next try has to read everything anew."""
    files = weight_files(resume_shards())
    name = "model-0.safetensors"
    bad = bytearray(files[name])
    bad[-1] ^= 1
    registered = listed(files)
    with memory_file() as fd, memory_file() as part_fd:
        sources = [(file, CountedSource(files[file.path])) for file in registered]
        target = PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        # The first load stores chunks of the changed file, and dies before its hash is known.
        run = Ingest(
            [(file, CountedSource(bytes(bad)) if file.path == name else source) for file, source in sources],
            REF,
            "transformers",
            Task.EMBEDDING,
            target,
        )
        run.open()
        with pytest.MonkeyPatch.context() as patch:
            # The encoders catch up before the hash is known.
            patch.setattr("packer.ingest._OriginReader.check", lambda reader: drain(run))
            run.fill(MemoryImage(run.layout.image_bytes))
        assert contents(part_fd) != b""
        with pytest.raises(TierError, match="interrupted load, which is dropped now") as refused:
            ingest(sources, target)
        assert not refused.value.corrupt
        assert contents(part_fd) == b""
        done = ingest(sources, target)
        assert done.ingest.resumed_bytes == 0
        check_pack(fd, files)


def drain(run: Ingest) -> None:
    """Let the pack get everything that is complete, and stop, as a death would."""
    pack = run._pack
    assert pack is not None
    pack._join()


def test_a_load_that_fails_keeps_what_it_has_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An origin that goes away in the middle: the second load asks only for the rest."""
    tensors: list[Tensor] = [
        (f"h.{at}.w", "BF16", [CHUNK_BYTES // 2], big(CHUNK_BYTES, at)) for at in range(4)
    ]
    files = weight_files([tensors])
    name = "model-0.safetensors"
    with memory_file() as fd, memory_file() as part_fd:
        target = PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        stored = threading.Event()
        real_add = ProgressLog.add

        def add(log: ProgressLog, *arguments: object) -> None:
            real_add(log, *arguments)  # type: ignore[arg-type]
            stored.set()

        monkeypatch.setattr(ProgressLog, "add", add)

        class Breaking(CountedSource):
            def read_into(self, offset: int, view: memoryview) -> None:
                if offset > 2 * CHUNK_BYTES + PIECE_BYTES:
                    stored.wait(30)
                    raise SourceFailed("the store is away")
                super().read_into(offset, view)

        sources = [
            (file, Breaking(files[name]) if file.path == name else CountedSource(files[file.path]))
            for file in listed(files)
        ]
        with pytest.raises(TierError, match="the store is away"):
            ingest(sources, target)
        assert contents(part_fd) != b""
        counted = {file.path: CountedSource(files[file.path]) for file in listed(files)}
        done = ingest([(file, counted[file.path]) for file in listed(files)], target)
        assert done.ingest.resumed_bytes >= CHUNK_BYTES
        body = sum(nbytes for _, nbytes in counted[name].asked[1:])
        assert body == 4 * CHUNK_BYTES - done.ingest.resumed_bytes
        check_pack(fd, files)
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
