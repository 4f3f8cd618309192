"""One process at a time works on a data directory: packs, journal and keys have one writer.

Covers: taking the directory for this process, and saying who has it. Does not cover: what lies in it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "agent.pid"


class DataDirInUse(OSError):
    """Another process works on the directory."""


@contextmanager
def hold_data_dir(data_dir: Path) -> Iterator[None]:
    """Make the directory if there is none and have it alone. Raises ``DataDirInUse``.

    The kernel lets go of the lock when this process ends, however it ends, and no child inherits it, so a
    nursery that outlives a killed agent by a moment does not keep the next agent out.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace")
            raise DataDirInUse(f"{data_dir} is in use by process {pid or 'unknown'}; stop it first") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
