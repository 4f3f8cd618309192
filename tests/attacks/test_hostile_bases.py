"""Threat: a sealed index whose references to other packs were forged with care.

Only the tenant's own worker has the keys for that, so this is a compromised worker, or a peer that was given
such a key. Nothing outside of the tenant's own files is ever read, no reference is followed further, nothing
large is allocated, and what does not open is never used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from base_samples import KEYS, base, pack_file, reader, ref, version_of, write
from pack_samples import MemoryImage, host_bytes, image_of, memory_file, read_image

from packer.bases import Bases
from packer.index import BASES_MAX, HEADER_BYTES, PackError, encode_header, up_to_page
from packer.layout import PAGE_BYTES
from packer.pack import PackReader, read_header, verify
from packer.pack_file import NO_TAG, FileFds, index_part
from packer.seal import TAG_BYTES, ChunkSeal, derive_pack_key
from packer.tiers import TierError, restore
from packer.types import HostForm

Raw = list[object]
Change = Callable[[Raw], None]
CHUNKS, BASES, FINGERPRINT_KEY = 6, 8, 9
CODEC, OFFSET, PLANES, TAGS, SAME_AS, FINGERPRINT, BASE = range(2, 9)
SHARED = 0  # the number of a chunk that lies in the other file


def reseal(fd: int, key: bytes, change: Change) -> None:
    """The pack with another index, right in every digest, tag and size."""
    header = read_header(fd)
    cipher_key = derive_pack_key(key, header.salt)
    sealed = bytearray(os.pread(fd, header.index_bytes, header.index_offset) + header.index_tag)
    plain = bytearray(header.index_bytes)
    ChunkSeal(cipher_key, header.binding()).open_into(
        index_part(len(plain)), memoryview(sealed), memoryview(plain)
    )
    index: Raw = msgspec.msgpack.decode(plain)
    change(index)
    data = msgspec.msgpack.encode(index)
    made = replace(
        header,
        index_bytes=len(data),
        file_bytes=header.index_offset + up_to_page(len(data)),
        index_tag=NO_TAG,
    )
    out = bytearray(len(data) + TAG_BYTES)
    ChunkSeal(cipher_key, made.binding()).seal_into(index_part(len(data)), memoryview(data), memoryview(out))
    body, tag = bytes(out[: len(data)]), bytes(out[len(data) :])
    made = replace(made, index_tag=tag, index_sha256=hashlib.sha256(body).digest())
    os.ftruncate(fd, made.file_bytes)
    os.pwrite(fd, body.ljust(up_to_page(len(body)), b"\0"), made.index_offset)
    os.pwrite(fd, encode_header(made), 0)


def rows(index: Raw, field: int) -> list[Raw]:
    found = index[field]
    assert isinstance(found, list)
    return found


def chunk(column: int, value: object) -> Change:
    return lambda index: rows(index, CHUNKS)[SHARED].__setitem__(column, value)


def of_base(column: int, value: object) -> Change:
    return lambda index: rows(index, BASES)[0].__setitem__(column, value)


def add_bases(count: int) -> Change:
    def change(index: Raw) -> None:
        first = rows(index, BASES)[0]
        for number in range(count):
            rows(index, BASES).append([first[0], number.to_bytes(32, "big"), first[2]])

    return change


def cut_offset(index: Raw) -> None:
    row = rows(index, CHUNKS)[SHARED]
    assert isinstance(row[OFFSET], int)
    row[OFFSET] += 512


def own_salt(index: Raw) -> None:
    # Of the file that ``forged`` makes: put in there.
    rows(index, BASES)[0][1] = b"own"


# Refused before any other file is looked at, whatever that is.
REFUSED: dict[str, Change] = {
    "a base that is not there": chunk(BASE, [1, 0]),
    "a base beyond the limit": chunk(BASE, [BASES_MAX, 0]),
    "a negative base": chunk(BASE, [-1, 0]),
    "a huge base": chunk(BASE, [2**63, 0]),
    "a base without a number": chunk(BASE, [0]),
    "a base that is a text": chunk(BASE, "0"),
    "a huge number in the base": chunk(BASE, [0, 2**40]),
    "a negative number in the base": chunk(BASE, [0, -1]),
    "an extent in the header of the base": chunk(OFFSET, 0),
    "an extent at no page": cut_offset,
    "an extent far behind": chunk(OFFSET, 2**41),
    "an extent before the file": chunk(OFFSET, -PAGE_BYTES),
    "an extent larger than the chunk": chunk(PLANES, [2**30]),
    "an extent without planes": chunk(PLANES, []),
    "an extent without tags": chunk(TAGS, b""),
    "no base at all": lambda index: index.__setitem__(BASES, []),
    "a base that nobody needs": add_bases(1),
    "more bases than may be": add_bases(BASES_MAX),
    "a hundred thousand bases": add_bases(100_000),
    "a base twice": lambda index: rows(index, BASES).append(rows(index, BASES)[0]),
    "another tenant's base": of_base(0, "bank/tiny@aaaaaaaaaaaaaaaa"),
    "a base that climbs": of_base(0, "acme/../tiny@aaaaaaaaaaaaaaaa"),
    "a base without a name": of_base(0, ""),
    "a salt too short": of_base(1, bytes(31)),
    "a key too short": of_base(2, bytes(31)),
    "a base that is this file": own_salt,
    "no fingerprint": chunk(FINGERPRINT, b""),
    "a long fingerprint": chunk(FINGERPRINT, bytes(17)),
    "no fingerprint key": lambda index: index.__setitem__(FINGERPRINT_KEY, b""),
}


def forged(fd: int, change: Change) -> None:
    own = read_header(fd).salt

    def with_salt(index: Raw) -> None:
        change(index)
        for row in rows(index, BASES):
            if row[1] == b"own":
                row[1] = own

    reseal(fd, KEYS["b"], with_salt)


@pytest.mark.parametrize("case", list(REFUSED))
def test_forged_references_are_refused(case: str) -> None:
    with pack_file() as a, pack_file() as b:
        write(a, version_of(1, 2), "a")
        write(b, version_of(1, 3), "b", [base(a, "a")])
        forged(b, REFUSED[case])
        for bases in ([FileFds(a)], None):
            with pytest.raises(PackError) as caught:
                PackReader(b, KEYS["b"], ref("b"), bases=bases)
            assert caught.value.corrupt


def test_an_extent_that_ends_behind_the_parts_of_the_base_is_refused() -> None:
    """Its index may hold keys of further files; nothing but extents is ever read."""
    with pack_file() as a, pack_file() as b:
        write(a, version_of(1, 2), "a")
        write(b, version_of(1, 3), "b", [base(a, "a")])
        forged(b, chunk(OFFSET, read_header(a).index_offset))
        with pytest.raises(PackError, match="behind the parts") as caught:
            reader(b, "b", [a])
        assert caught.value.corrupt


@pytest.mark.parametrize(
    "change",
    [
        chunk(OFFSET, HEADER_BYTES),  # another extent of the base
        chunk(BASE, [0, 0]),  # under another number
        chunk(TAGS, bytes(3 * TAG_BYTES)),
        chunk(CODEC, 0),
        of_base(2, bytes(32)),  # another key
        of_base(0, "acme/tiny@cccccccccccccccc"),  # for another version
    ],
)
def test_what_does_not_open_is_never_placed(change: Change) -> None:
    with pack_file() as a, pack_file() as b:
        write(a, version_of(2, 1), "a")
        write(b, version_of(1, 3), "b", [base(a, "a")])
        forged(b, change)
        span = version_of(1, 3)[1].chunks[SHARED]
        image = MemoryImage(version_of(1, 3)[1].image_bytes)
        with pytest.raises((PackError, TierError)) as caught:
            restore(reader(b, "b", [a]), image)
        assert caught.value.corrupt  # type: ignore[attr-defined]  # both have it
        assert span.image_offset not in image.placed


def test_files_that_are_not_the_base_are_refused() -> None:
    """Another pack of the tenant or of somebody else, a host segment, no pack at all, a short one, none."""
    with pack_file() as a, pack_file() as b, pack_file() as c, pack_file() as other:
        write(a, version_of(1, 2), "a")
        write(b, version_of(1, 3), "b", [base(a, "a")])
        write(c, version_of(1, 2), "c")
        write(other, version_of(1, 2), "a", tenant="bank")
        header = os.pread(a, HEADER_BYTES, 0)
        with (
            memory_file(host_bytes(HostForm.STORED)) as segment,
            memory_file(bytes(3 * PAGE_BYTES)) as zeros,
            memory_file(header) as short,
        ):
            for wrong in (b, c, other, segment, zeros, short):
                with pytest.raises(PackError) as caught:
                    reader(b, "b", [wrong])
                assert caught.value.corrupt


def test_packs_that_refer_to_each_other_are_not_followed() -> None:
    """A cycle: a reader looks at the other's extents and never at its index."""
    with pack_file() as a, pack_file() as b:
        write(a, version_of(1, 2), "a")
        write(b, version_of(1, 3), "b", [base(a, "a")])
        table = [str(ref("b")), read_header(b).salt, derive_pack_key(KEYS["b"], read_header(b).salt)]

        def refer_back(index: Raw) -> None:
            index[BASES] = [table]
            small = rows(index, CHUNKS)[-1]
            small[BASE] = [0, len(rows(index, CHUNKS)) - 1]

        reseal(a, KEYS["a"], refer_back)
        # The first file has a hole in its parts now, which alone condemns it.
        with pytest.raises(PackError) as caught:
            reader(a, "a", [b])
        assert caught.value.corrupt
        # The other restores from its extents as before.
        assert read_image(reader(b, "b", [a])) == image_of(*version_of(1, 3))


def test_a_pack_with_references_is_not_taken_for_a_whole_one() -> None:
    """Nor is it when it comes from a peer, alone."""
    with pack_file() as a, pack_file() as b:
        write(a, version_of(1, 2), "a")
        write(b, version_of(1, 3), "b", [base(a, "a")])
        with pytest.raises(PackError, match="other files") as caught:
            PackReader(b, KEYS["b"], ref("b"))
        assert caught.value.corrupt


def test_another_tenants_pack_is_never_looked_into() -> None:
    """Even if a broken agent offers it with its key, chunks of it are not found."""
    with pack_file() as other, pack_file() as new:
        write(other, version_of(1, 2), "a", tenant="bank")
        offered = base(other, "a", tenant="bank")
        assert len(Bases([offered], ref("b"))) == 0
        assert len(Bases([offered], ref("b", tenant="bank"))) == 3
        # Nor under a name of its own tenant: that is not what its index says.
        assert len(Bases([base(other, "a")], ref("b"))) == 0
        assert write(new, version_of(1, 2), "b", [offered]).bases == ()
        verify(reader(new, "b"))
