"""The disk tier as files: packs by name.

Covers: their names, creating, renaming, dropping, and sweeping what a crash left behind. Does not
cover: what is in them (``packer/pack.py``), which to keep (``packer/residency.py``), their keys
(``agent/journal.py``), or the host tier (``segments``). The agent hands descriptors to workers and never
reads a byte of weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from packer.index import up_to_page
from packer.types import MIB, ModelRef

# Free bytes of the file system that packs never take, so that logs, the journal and other programs
# go on working when a disk is nearly full.
DISK_FREE_FLOOR_BYTES = 256 * MIB


class PackDirectory:
    """``<root>/<tenant>/<name>@<version>.pack``; a name that ends in ``.tmp`` was never finished, and one
    that ends in ``.part`` says how far it got."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, ref: ModelRef) -> Path:
        # The grammar of tenant and name admits no slash and no leading dot, so this stays below root.
        return self._root / ref.tenant / f"{ref.name}@{ref.version}.pack"

    def free_bytes(self) -> int:
        """Bytes that packs may still take on this file system."""
        return max(0, shutil.disk_usage(self._root).free - DISK_FREE_FLOOR_BYTES)

    def create_partial(self, ref: ModelRef, resumed: bool) -> tuple[int, int]:
        """Descriptors of the temporary file of a pack and of the records of its progress, empty unless
        ``resumed``. Raises ``OSError``."""
        path = self.path(ref)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resumed else os.O_TRUNC)
        pack = os.open(_temporary(path), flags, 0o600)
        try:
            return pack, os.open(_progress(path), flags, 0o600)
        except OSError:
            os.close(pack)
            raise

    def partial_bytes(self, ref: ModelRef) -> int | None:
        """What an unfinished pack and its records take on disk; None when one of the two is not there."""
        path = self.path(ref)
        try:
            states = [os.stat(_temporary(path)), os.stat(_progress(path))]
        except OSError:
            return None
        # Records are written behind what they tell of: without any there is nothing to go on from. Sizes, not
        # blocks, which a file system may still be counting: extents lie without holes.
        return sum(up_to_page(state.st_size) for state in states) if states[1].st_size else None

    def publish(self, ref: ModelRef) -> None:
        """Give the finished, fsynced temporary file its name, durably."""
        path = self.path(ref)
        os.replace(_temporary(path), path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def abandon(self, ref: ModelRef) -> None:
        """Remove what is left of a pack in the making."""
        for path in (_temporary(self.path(ref)), _progress(self.path(ref))):
            with suppress(FileNotFoundError):
                path.unlink()

    def open(self, ref: ModelRef) -> int:
        """A read-only descriptor; raises ``FileNotFoundError`` when somebody removed the file."""
        return os.open(self.path(ref), os.O_RDONLY | os.O_CLOEXEC)

    def open_direct(self, ref: ModelRef) -> int | None:
        """A second descriptor, for reads past the page cache; None where that is not possible."""
        with suppress(OSError):
            return os.open(self.path(ref), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        return None

    def open_to_mend(self, ref: ModelRef) -> int:
        """A descriptor to read and write; raises ``OSError``."""
        return os.open(self.path(ref), os.O_RDWR | os.O_CLOEXEC)

    def drop(self, ref: ModelRef) -> None:
        with suppress(FileNotFoundError):
            self.path(ref).unlink()

    def sweep(self, known: Iterable[ModelRef], partial: Iterable[ModelRef] = ()) -> list[ModelRef]:
        """Remove every file that the journal does not know, complete or ``partial``; return the known whose
        file is missing."""
        wanted = {self.path(ref): ref for ref in known}
        kept = {name(self.path(ref)) for ref in partial for name in (_temporary, _progress)}
        for path in sorted(self._root.glob("*/*")):
            if path not in wanted and path not in kept:
                path.unlink()
        return [ref for path, ref in wanted.items() if not path.exists()]


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _progress(path: Path) -> Path:
    return path.with_name(path.name + ".part")
