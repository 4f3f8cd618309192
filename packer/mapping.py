"""Memory at fixed places: mapping files over reserved addresses, and large pages for memory files.

Covers: the calls of the kernel that Python's ``mmap`` does not have, without the interpreter's lock, and
making a memory file's pages large just before they are written. Does not cover: what lies in an image
(``agent/arena.py``) or in a host segment (``host_segment``).

A memory file gets pages of 4 KiB unless the administrator says otherwise: they are filled at 3 GB/s, mapped
at 20 and freed at 5. ``MADV_COLLAPSE`` (Linux 6.1) joins 512 of them to one of 2 MiB whatever the
administrator's default is; asked for when the first of them is there and nothing else, it costs no copy.
Where the kernel refuses, everything works with small pages, only slower.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from packer.types import MIB

# A huge page of x86-64 and arm64 with 4 KiB pages; elsewhere the alignment does no harm.
HUGE_PAGE_BYTES = 2 * MIB
# Linux 5.14; they fill page tables in one call instead of one fault per page.
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
# Linux 6.1.
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_PROT_NONE = 0
# A range is populated by several threads if its start shows that it has small pages: 64 MiB of these take
# some 5 ms, of large ones 0.1.
_TRIAL_BYTES = 64 * MIB
_TRIAL_S = 0.002
_POPULATE_THREADS = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_over(address: int, nbytes: int, fd: int, offset: int, protection: int, shared: bool) -> None:
    """Map a file over addresses that are the caller's; what was there is given back. Raises ``OSError``."""
    flags = _MAP_FIXED | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    if _libc.mmap(address, nbytes, protection, flags, fd, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {nbytes} bytes: {os.strerror(number)}")


def advise(address: int, nbytes: int, advice: int) -> bool:
    """A hint: what an older kernel does not know is slower, never wrong."""
    return bool(_libc.madvise(address, nbytes, advice) == 0)


def populate_write(address: int, nbytes: int) -> None:
    """Have the memory of a range before it is written. Raises ``OSError`` where there is none: writing would
    end the process. An older kernel refuses; then every page faults on its own."""
    if not advise(address, nbytes, MADV_POPULATE_WRITE):
        number = ctypes.get_errno()
        if number in (errno.EFAULT, errno.ENOMEM, errno.ENOSPC):
            raise OSError(errno.ENOMEM, f"no memory for {nbytes} bytes")


def drop_mapped(address: int, nbytes: int) -> None:
    """Take pages of a shared file mapping out of this process; the file keeps them. Unlike the method of
    mmap objects this lets other threads run meanwhile."""
    advise(address, nbytes, mmap.MADV_DONTNEED)


def resident_bytes(fd: int, offset: int, nbytes: int) -> int | None:
    """How much of a range that starts on a page is in the page cache; None: the kernel does not tell. It may
    answer "all" to a process that does not own the file."""
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        return None
    try:
        flags = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
        if _libc.mincore(address, nbytes, flags) != 0:
            return None
        return sum(flag & 1 for flag in flags.raw) * mmap.PAGESIZE
    finally:
        _libc.munmap(address, nbytes)


def populate_read(address: int, nbytes: int) -> None:
    """Make a mapped range readable without another fault."""
    first = min(nbytes, _TRIAL_BYTES)
    started_s = time.perf_counter()
    advise(address, first, MADV_POPULATE_READ)
    address, nbytes = address + first, nbytes - first
    if time.perf_counter() - started_s < _TRIAL_S:
        # Large pages: starting a thread could take longer than all the rest.
        advise(address, nbytes, MADV_POPULATE_READ)
        return
    step = -(-nbytes // _POPULATE_THREADS // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    threads = [
        threading.Thread(target=advise, args=(address + at, min(step, nbytes - at), MADV_POPULATE_READ))
        for at in range(0, nbytes, max(step, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class LargePages:
    """Large pages for the first ``nbytes`` of a memory file. ``prepare`` may be called from any thread."""

    def __init__(self, fd: int, nbytes: int) -> None:
        whole = nbytes // HUGE_PAGE_BYTES
        self._states = bytearray(whole)  # _NEW, _BUSY or _READY by page
        self._changed = threading.Condition()
        self._refused = True
        self._give_back: Callable[[], object] = lambda: None
        if not whole:
            return
        # Addresses that start on a large page, which the kernel does not choose for a file of small ones. Not
        # to be touched, or a worker's limit of private memory would count them.
        length = (whole + 1) * HUGE_PAGE_BYTES
        start = _libc.mmap(None, length, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if start == _MAP_FAILED:
            return
        self._give_back = weakref.finalize(self, _libc.munmap, start, length)
        self._address = start + -start % HUGE_PAGE_BYTES
        with suppress(OSError):
            map_over(self._address, whole * HUGE_PAGE_BYTES, fd, 0, mmap.PROT_READ, shared=True)
            self._refused = False

    def prepare(self, offset: int, nbytes: int) -> None:
        """Before a range is written for the first time."""
        last = min(-(-(offset + nbytes) // HUGE_PAGE_BYTES), len(self._states))
        for number in range(offset // HUGE_PAGE_BYTES, last):
            self._prepare(number)

    def _prepare(self, number: int) -> None:
        with self._changed:
            # Two threads meet where one's bytes end and the other's begin.
            self._changed.wait_for(lambda: self._states[number] != _BUSY)
            if self._refused or self._states[number] == _READY:
                return
            self._states[number] = _BUSY
        at = self._address + number * HUGE_PAGE_BYTES
        # The kernel joins nothing where there is nothing yet.
        joined = advise(at, mmap.PAGESIZE, MADV_POPULATE_READ) and advise(at, HUGE_PAGE_BYTES, _MADV_COLLAPSE)
        with self._changed:
            self._states[number] = _READY
            # No free large page, or a kernel without: not asked again for this file.
            self._refused = self._refused or not joined
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the file: it can not be sealed while it is mapped. Nobody may be preparing."""
        with self._changed:
            self._refused = True
        self._give_back()


_NEW, _BUSY, _READY = range(3)
