"""Small files that only their owner may read: keys, tokens, the context, ready files.

Covers: reading with a limit, and writing so that a reader sees the old or the new content, never a
part, and nobody else sees anything; whether a process still holds a lock. Does not cover: what is in them.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

# Keys, tokens and contexts are below 4 KiB; a larger file is not one of them.
PRIVATE_BYTES_MAX = 64 * 1024


class BadFile(Exception):
    """A file cannot be read or written; the text names it."""


def write_private(path: Path, text: str) -> None:
    """Write ``text`` with mode 0600, atomically. Raises ``BadFile``."""
    try:
        # mkstemp creates with 0600, whatever the umask, and never follows a planted link.
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise BadFile(f"cannot write {path}: {error.strerror}") from None


def read_private(path: Path) -> str:
    """Read a small text file. Raises ``BadFile``."""
    try:
        with open(path, "rb") as file:
            data = file.read(PRIVATE_BYTES_MAX + 1)
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror}") from None
    if len(data) > PRIVATE_BYTES_MAX:
        raise BadFile(f"{path} is larger than {PRIVATE_BYTES_MAX} bytes: is it the right file?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadFile(f"{path} is not a text file") from None


def others_may_read(path: Path) -> bool:
    """Whether accounts other than the owner may read a file. Always False where modes mean nothing."""
    if os.name != "posix":
        return False
    try:
        return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock. Never where there are no such locks, nor a ``bunk up``."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False
