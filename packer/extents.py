"""Reading extents of a file by the faster of two ways: out of the page cache, or past it.

Covers: asking the kernel which pages of a range are cached, buffered and direct reads of whole pages,
and falling back to buffered reads where direct ones are refused. Does not cover: what an extent holds
(``pack``), or how many reads are under way (``tiers``).

A cached extent is copied at memory speed and would be read from the disk again by a direct read. A cold
one costs half the processor time when it is read directly, and leaves the cache to those who need it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress

from packer.layout import PAGE_BYTES
from packer.mapping import resident_bytes
from packer.pack_file import read_all

# The number of cachestat (Linux 6.5) on every architecture that Linux has gained in this century.
_CACHESTAT = 451
# A range is read from the cache when at most one page in this many is missing there: buffered reads
# fetch a few missing pages on the way, while a direct read would fetch all of them again.
MISSING_SHARE = 8


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def cached_pages(fd: int, offset: int, nbytes: int) -> int | None:
    """How many pages of a range that starts on a page are in the page cache; None when the kernel does
    not tell. The answer may be old when it arrives: only speed may depend on it."""
    if nbytes == 0:
        return 0
    wanted, found = _Range(offset, nbytes), _CacheStat()
    status = _libc.syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_long(fd),
        ctypes.byref(wanted),
        ctypes.byref(found),
        ctypes.c_long(0),
    )
    if status == 0:
        return int(found.cached)
    resident = resident_bytes(fd, offset, nbytes)  # on kernels before 6.5
    return None if resident is None else resident // PAGE_BYTES


class ExtentReader:
    """Reads extents of one file from any number of threads. ``direct_fd`` is a second descriptor of the
    same file, opened with ``O_DIRECT``, or None. Both stay the caller's."""

    def __init__(self, fd: int, direct_fd: int | None = None) -> None:
        self._fd = fd
        self._direct_fd = direct_fd

    def is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether to read this extent out of the cache. Where nobody knows, it is worth a try."""
        pages = cached_pages(self._fd, offset, nbytes)
        return pages is None or (nbytes // PAGE_BYTES - pages) * MISSING_SHARE <= nbytes // PAGE_BYTES

    def read(self, out: memoryview, offset: int, cold: bool) -> int:
        """Fill ``out`` (whole pages, at a page in memory); returns the bytes that were read directly.

        A cold extent is read directly if that can be. A file system may refuse direct reads only when the
        first one comes, and a device may want other blocks than pages (``EINVAL``): then this and all later
        extents are read through the cache. Raises ``PackError``.
        """
        descriptor = self._direct_fd if cold else None
        if descriptor is not None:
            try:
                got = os.preadv(descriptor, [out], offset)
                if got == len(out):
                    return got
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    self._direct_fd = None
            # Refused, cut short or failed: the buffered read completes it, or says what is wrong.
        if cold:
            # Asked for as a whole, an extent comes nearly twice as fast as by the kernel's read-ahead.
            with suppress(OSError):
                os.posix_fadvise(self._fd, offset, len(out), os.POSIX_FADV_WILLNEED)
        read_all(self._fd, out, offset)
        return 0
