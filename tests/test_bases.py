"""Chunks of a new pack that lie in packs of the same tenant already.

Covers: finding and comparing them, references that never form a chain, restoring from several files, host
segments, repair where an extent lies, an interrupted ingest, and giving back what nobody refers to. Does not
cover: which packs are offered and how long they stay (``test_holdings``), forged references
(``tests/attacks``).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from base_samples import KEYS, base, pack_file, reader, ref, version_of, write
from origin_samples import Tensor, big, expected_image, file_sources, weight_files
from pack_samples import SIDE, MemoryImage, image_of, memory_file, read_image

from packer import bases as bases_module
from packer.bases import Bases
from packer.holes import allocated_bytes, holes, joined, punch, ranges_in
from packer.host_segment import HostWriter
from packer.index import BASES_MAX, HEADER_BYTES, PackError
from packer.ingest import Ingest
from packer.pack import PackReader, main, verify
from packer.pack_file import FileFds, base_name
from packer.pack_writer import PackWriter
from packer.packing import PackTarget
from packer.progress import ProgressLog
from packer.repair import repair_chunks
from packer.seal import Fingerprints
from packer.tiers import TierError, restore
from packer.types import KIB, MIB, HostForm, Task


def test_a_version_that_differs_in_one_tensor_stores_that_alone() -> None:
    first, second = version_of(1, 2, 3, 4), version_of(1, 2, 9, 4)
    with pack_file() as fd, pack_file() as new:
        alone = write(fd, first, "a")
        summary = write(new, second, "b", [base(fd, "a")])
        assert (alone.bases, alone.deduplicated_bytes) == ((), 0)
        index = reader(new, "b", [fd]).index
        assert [chunk.base for chunk in index.chunks].count(None) == 1
        assert summary.bases == (reader(fd, "a").salt,)
        assert summary.deduplicated_bytes == second[1].image_bytes - MIB
        assert summary.disk_bytes == os.fstat(new).st_size < MIB
        # What a restore reads, and a host segment takes, is as if all were in one file.
        assert abs(summary.host.stored_bytes - alone.host.stored_bytes) <= 64 * KIB
        assert read_image(reader(new, "b", [fd])) == image_of(*second)
        assert verify(reader(new, "b", [fd])) == second[1].image_bytes


def test_a_reference_is_always_to_the_file_that_holds_the_extent() -> None:
    """The third version finds chunks in the second, which has them in the first."""
    versions = version_of(1, 2, 3), version_of(1, 2, 8), version_of(1, 7, 8)
    with pack_file() as a, pack_file() as b, pack_file() as c:
        write(a, versions[0], "a")
        write(b, versions[1], "b", [base(a, "a")])
        summary = write(c, versions[2], "c", [base(b, "b", [a])])
        assert summary.bases == (reader(a, "a").salt, PackReader(b, KEYS["b"], bases=None).salt)
        files = reader(c, "c", [a, b])
        assert [file.ref for file in files.index.bases] == [ref("a"), ref("b")]
        assert read_image(files) == image_of(*versions[2])
        # Neither the order of the files nor another one in place of one is taken.
        for wrong in ([b, a], [a, a], [a], [], [a, b, b]):
            with pytest.raises(PackError) as caught:
                reader(c, "c", wrong)
            assert caught.value.corrupt


def test_equal_chunks_of_one_version_refer_to_one_extent_of_another() -> None:
    """In any order in which they come, also when the last one comes first."""
    twins = version_of(5, 5, 6, 5)
    with pack_file() as fd, pack_file() as new:
        write(fd, version_of(4, 5), "a")
        assert write(new, twins, "b", [base(fd, "a")]).deduplicated_bytes >= 3 * MIB
        chunks = reader(new, "b", [fd]).index.chunks
        assert [chunk.same_as for chunk in chunks[:4]].count(None) == 2
        assert read_image(reader(new, "b", [fd])) == image_of(*twins)
    with pack_file() as fd, pack_file() as new:
        write(fd, version_of(4, 5), "a")
        layout, image = twins[1], memoryview(image_of(*twins))
        writer = PackWriter(
            new,
            ref("b"),
            "e",
            Task.EMBEDDING,
            layout,
            KEYS["b"],
            64 * MIB,
            bases=Bases([base(fd, "a")], ref("b")),
        )
        for number in reversed(range(len(layout.chunks))):
            span = layout.chunks[number]
            writer.add_chunk(number, image[span.image_offset : span.image_offset + span.nbytes])
        writer.finish()
        assert read_image(reader(new, "b", [fd])) == image_of(*twins)


def test_bytes_are_compared_before_they_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fingerprints that are all the same, nothing but equal chunks is shared."""
    first, second = version_of(1, 2, 3), version_of(3, 1, 4)
    with pack_file() as fd, pack_file() as new:
        write(fd, first, "a")
        monkeypatch.setattr(Fingerprints, "of", lambda self, raw: bytes(15) + bytes([raw[0] & 0]))
        monkeypatch.setattr("packer.pack_writer.PackWriter._is_duplicate", lambda self, i, fingerprint: False)
        found = Bases([base(fd, "a")], ref("b"))
        found._tables[found.own.key] = {
            (dtype, nbytes, bytes(16)): place
            for (dtype, nbytes, _), place in found._tables[found.own.key].items()
        }
        monkeypatch.setattr("base_samples.Bases", lambda *arguments: found)
        write(new, second, "b", [base(fd, "a")])
        assert read_image(reader(new, "b", [fd])) == image_of(*second)


def test_a_damaged_base_is_not_shared() -> None:
    model = version_of(1, 2)
    with pack_file() as fd, pack_file() as new:
        write(fd, model, "a")
        chunk = reader(fd, "a").index.chunks[0]
        os.pwrite(fd, b"\xff" * 8, chunk.offset + 100)
        summary = write(new, model, "b", [base(fd, "a")])
        files = reader(new, "b", [fd] if summary.bases else [])
        assert files.index.chunks[0].base is None
        assert [chunk.base for chunk in files.index.chunks[1:]] == [0, 0]
        assert read_image(files) == image_of(*model)


def test_packs_that_can_not_be_looked_into_cost_nothing_but_room() -> None:
    """Of another tenant, with another key, cut off, without the files it needs, or too many to remember."""
    model = version_of(1, 2)
    with pack_file() as fd, pack_file() as other, pack_file() as b, memory_file(b"short") as cut:
        write(fd, model, "a")
        write(other, model, "a", tenant="bank")
        write(b, version_of(1, 3), "b", [base(fd, "a")])
        for offered in (
            base(other, "a", tenant="bank"),
            base(fd, "c"),
            base(cut, "a"),
            base(b, "b"),  # without the first file
            base(b, "b", [other]),
        ):
            with pack_file() as new:
                summary = write(new, model, "d", [offered])
                assert (summary.bases, summary.deduplicated_bytes) == ((), 0)
                assert read_image(reader(new, "d")) == image_of(*model)


def test_indexes_are_looked_into_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pack_file() as a, pack_file() as b, pack_file() as new:
        write(a, version_of(1, 2), "a")
        write(b, version_of(1, 3), "b")
        monkeypatch.setattr(bases_module, "INDEXES_BYTES_MAX", 1000)
        summary = write(new, version_of(1, 3), "c", [base(a, "a"), base(b, "b")])
        assert summary.bases == (reader(a, "a").salt,)


def test_packs_with_fingerprints_of_their_own_are_looked_into_too() -> None:
    """Both were made without knowing of the other; the newer keys of one do not hide the other."""
    with pack_file() as a, pack_file() as b, pack_file() as new:
        write(a, version_of(1, 2), "a")
        write(b, version_of(3, 4), "b")
        keys = {reader(a, "a").index.fingerprint_key, reader(b, "b").index.fingerprint_key}
        assert len(keys) == 2
        model = version_of(1, 3)
        summary = write(new, model, "c", [base(a, "a"), base(b, "b")])
        assert set(summary.bases) == {reader(a, "a").salt, reader(b, "b").salt}
        assert reader(new, "c", [a, b]).index.fingerprint_key == reader(a, "a").index.fingerprint_key
        assert read_image(reader(new, "c", [a, b])) == image_of(*model)


def test_a_pack_refers_to_so_many_files_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packer.pack_writer.BASES_MAX", 1)
    assert BASES_MAX > 1
    with pack_file() as a, pack_file() as b, pack_file() as new:
        write(a, version_of(1, 2), "a")
        write(b, version_of(3, 4), "b")
        model = version_of(1, 3)
        summary = write(new, model, "c", [base(a, "a"), base(b, "b")])
        assert summary.bases == (reader(a, "a").salt,)
        assert read_image(reader(new, "c", [a])) == image_of(*model)


# --- restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(HostForm))
def test_a_restore_reads_all_files_and_fills_a_whole_segment(form: HostForm, tmp_path: Path) -> None:
    """From real files, read directly where that is possible; the segment refers to nothing."""
    model = version_of(1, 9, 3)
    paths = [tmp_path / "a", tmp_path / "b"]
    with ExitStack() as files:
        a, b = (os.open(path, os.O_RDWR | os.O_CREAT) for path in paths)
        files.callback(os.close, a)
        files.callback(os.close, b)
        write(a, version_of(1, 2, 3), "a")
        write(b, model, "b", [base(a, "a")])
        direct = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
        for descriptor in direct:
            files.callback(os.close, descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        read = PackReader(b, KEYS["b"], ref("b"), direct[1], [FileFds(a, direct[0])])
        image = MemoryImage(model[1].image_bytes)
        segment = files.enter_context(memory_file())
        writer = HostWriter(segment, read.index, SIDE, form)
        facts = restore(read, image, host=writer)
        assert facts.host_filled
        assert bytes(image.bytes) == bytes(image_of(*model))
        held = PackReader(segment, None)
        assert (held.index.bases, held.index.fingerprint_key) == ((), b"")
        assert read_image(held) == image_of(*model)
        assert os.fstat(segment).st_size == read.host_sizes.of(form)


def test_a_bad_extent_in_another_file_is_named_and_mended_there() -> None:
    """The origin of the version that is restored has its bytes, whichever version they were packed for."""
    tensors: list[Tensor] = [(f"h.{at}.w", "BF16", [MIB // 2], big(MIB, at)) for at in range(3)]
    files = weight_files([tensors])
    with pack_file() as a, pack_file() as b, file_sources(files) as sources:
        for fd, version, offered in ((a, "a", ()), (b, "b", (base(a, "a"),))):
            target = PackTarget(fd, None, KEYS[version], 64 * MIB, bases=offered)
            run = Ingest(sources, ref(version), "e", Task.EMBEDDING, target)
            run.open()
            image = MemoryImage(run.layout.image_bytes)
            run.fill(image)
            run.finish_pack()
        chunk = reader(b, "b", [a]).index.chunks[1]
        assert chunk.base == 0
        os.pwrite(a, b"\x55" * 16, chunk.offset + 64)
        with pytest.raises(TierError) as caught:
            restore(reader(b, "b", [a]), image)
        assert (caught.value.corrupt, caught.value.chunks) == (True, (1,))
        weights = {file.path: source for file, source in sources if file.path.endswith(".safetensors")}
        assert repair_chunks(b, KEYS["b"], ref("b"), [1], weights, [FileFds(a)]) == ()
        verify(reader(a, "a"))
        restore(reader(b, "b", [a]), image)
        assert bytes(image.bytes) == expected_image(files, run.layout)


# --- interrupted ingests --------------------------------------------------------------------------


@pytest.mark.parametrize("still_there", [True, False])
def test_an_interrupted_ingest_goes_on_with_what_it_had_found(still_there: bool) -> None:
    """Chunks in another file are taken over if that file is still offered, and read again if it is not."""
    tensors: list[Tensor] = [(f"h.{at}.w", "BF16", [MIB // 2], big(MIB, at)) for at in range(6)]
    files = weight_files([tensors])
    with pack_file() as a, pack_file() as b, pack_file() as part, file_sources(files) as sources:
        run = Ingest(sources, ref("a"), "e", Task.EMBEDDING, PackTarget(a, None, KEYS["a"], 64 * MIB))
        run.open()
        image = MemoryImage(run.layout.image_bytes)
        run.fill(image)
        run.finish_pack()
        offered, layout = (base(a, "a"),), run.layout
        log = ProgressLog(part, KEYS["b"], ref("b"), layout)
        found = Bases(offered, ref("b"))
        writer = PackWriter(
            b, ref("b"), "e", Task.EMBEDDING, layout, KEYS["b"], 64 * MIB, log=log, bases=found
        )
        for number, span in enumerate(layout.chunks[:4]):
            with image.reading(span.image_offset, span.nbytes) as view:
                writer.add_chunk(number, view)
        # Here it dies.
        again = PackTarget(b, part, KEYS["b"], 64 * MIB, resume=True, bases=offered if still_there else ())
        run = Ingest(sources, ref("b"), "e", Task.EMBEDDING, again)
        run.open()
        image = MemoryImage(run.layout.image_bytes)
        run.fill(image)
        summary = run.finish_pack()
        assert run.resumed_bytes == (4 * MIB if still_there else 0)
        assert bool(summary.bases) == still_there
        packed = reader(b, "b", [a] if still_there else [])
        assert bytes(read_image(packed)) == expected_image(files, run.layout) == bytes(image.bytes)


# --- giving back ----------------------------------------------------------------------------------


def test_ranges_are_joined_and_their_holes_found() -> None:
    page = HEADER_BYTES
    assert list(joined([(1, 3), (3, 4), (6, 9), (7, 8)])) == [(1, 4), (6, 9)]
    assert list(joined([])) == []
    assert list(holes([], 5 * page)) == [(page, 5 * page)]
    assert list(holes([(page, 2 * page), (3 * page, 4 * page)], 5 * page)) == [
        (2 * page, 3 * page),
        (4 * page, 5 * page),
    ]
    assert list(holes([(page, 5 * page)], 5 * page)) == []


def test_what_nobody_refers_to_is_given_back(tmp_path: Path) -> None:
    """The rest restores as before, and the file is known by its header still."""
    path = tmp_path / "a"
    model = version_of(1, 9, 3)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    with pack_file() as new:
        write(descriptor, version_of(1, 2, 3, 4, 5), "a")
        write(new, model, "b", [base(descriptor, "a")])
        index = PackReader(new, KEYS["b"], bases=None).index
        kept = ranges_in(index, reader(descriptor, "a").salt)
        size, before = os.fstat(descriptor).st_size, allocated_bytes(descriptor)
        if not punch(descriptor, holes(kept, size)):
            pytest.skip("this file system can not punch holes")
        needed = sum(end - start for start, end in kept) + HEADER_BYTES
        assert os.fstat(descriptor).st_size == size
        assert needed <= allocated_bytes(descriptor) <= needed + 64 * KIB < before
        assert read_image(reader(new, "b", [descriptor])) == image_of(*model)
        with pytest.raises(PackError) as caught:
            verify(reader(descriptor, "a"))
        assert caught.value.corrupt
    os.close(descriptor)


def test_the_command_finds_the_files_beside_a_pack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / name for name in ("b.pack", base_name("b.pack", 0))}
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for path in reversed(paths.values()))
    write(first, version_of(1, 2), "a")
    write(second, version_of(1, 3), "b", [base(first, "a")])
    os.close(first)
    os.close(second)
    key = tmp_path / "key"
    key.write_bytes(KEYS["b"])
    assert main(["verify", str(tmp_path / "b.pack"), "--key-file", str(key)]) == 0
    assert str(ref("a")) in capsys.readouterr().out
    paths[base_name("b.pack", 0)].unlink()
    assert main(["verify", str(tmp_path / "b.pack"), "--key-file", str(key)]) == 1
