"""The disk tier as files: packs by name.

Covers: their names, creating, renaming, dropping, and sweeping what a crash left behind. Does not
cover: what is in them (``packer/pack.py``), which to keep (``packer/residency.py``), their keys
(``agent/journal.py``), or the host tier (``segments``). The agent hands descriptors to workers and never
reads a byte of weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from itertools import takewhile
from pathlib import Path

from packer.index import BASES_MAX, up_to_page
from packer.pack_file import FileFds, base_name
from packer.types import MIB, ModelRef

# Free bytes of the file system that packs never take, so that logs, the journal and other programs
# go on working when a disk is nearly full.
DISK_FREE_FLOOR_BYTES = 256 * MIB


class PackDirectory:
    """``<root>/<tenant>/<name>@<version>.pack``; a name that ends in ``.tmp`` was never finished, and one
    that ends in ``.part`` says how far it got. ``….pack.base-<n>`` is another link to the file of a pack in
    which extents of this one lie: so that file stays for as long as somebody needs it, whatever becomes of
    the pack that it was written for."""

    def __init__(self, root: Path, reads_past_cache: Callable[[], bool] = lambda: False) -> None:
        self._root = root
        # Whether a restore should read past the page cache what is in it, too.
        self.reads_past_cache = reads_past_cache
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Some file systems have no links; there every pack holds all of its chunks itself.
        self.has_links = _has_links(root)

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

    def base_path(self, ref: ModelRef, number: int) -> Path:
        path = self.path(ref)
        return path.with_name(base_name(path.name, number))

    def base_paths(self, ref: ModelRef) -> list[Path]:
        """The files that extents of this pack lie in, beside its own, in the order of its index."""
        paths = (self.base_path(ref, number) for number in range(BASES_MAX))
        return list(takewhile(Path.exists, paths))

    def publish(self, ref: ModelRef, bases: Sequence[Path] = ()) -> None:
        """Give the finished, fsynced temporary file its name, and the files in which extents of it lie theirs
        beside it, durably."""
        path = self.path(ref)
        self._unlink_bases(ref)
        for number, base in enumerate(bases):
            os.link(base, self.base_path(ref, number))
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

    def open_base(self, ref: ModelRef, number: int) -> int:
        """The same of a file that extents of the pack lie in."""
        return os.open(self.base_path(ref, number), os.O_RDONLY | os.O_CLOEXEC)

    def open_direct(self, ref: ModelRef) -> int | None:
        """A second descriptor, for reads past the page cache; None where that is not possible."""
        with suppress(OSError):
            return os.open(self.path(ref), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        return None

    def open_bases(self, ref: ModelRef, held: ExitStack, flags: int = os.O_RDONLY) -> list[FileFds]:
        """Descriptors of the files that extents of this pack lie in, beside its own; ``held`` closes them.
        To read only they are there for direct reads too, where that is possible. Raises ``OSError``."""
        found: list[FileFds] = []
        for path in self.base_paths(ref):
            descriptor = os.open(path, flags | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            direct = None
            if flags == os.O_RDONLY:
                with suppress(OSError):
                    direct = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
                    held.callback(os.close, direct)
            found.append(FileFds(descriptor, direct))
        return found

    def open_to_mend(self, ref: ModelRef) -> int:
        """A descriptor to read and write; raises ``OSError``."""
        return os.open(self.path(ref), os.O_RDWR | os.O_CLOEXEC)

    def drop(self, ref: ModelRef) -> None:
        """Remove a pack's own name, then its links to others. Raises ``OSError``."""
        with suppress(FileNotFoundError):
            self.path(ref).unlink()
        self._unlink_bases(ref)

    def _unlink_bases(self, ref: ModelRef) -> None:
        for number in range(BASES_MAX):
            with suppress(FileNotFoundError):
                self.base_path(ref, number).unlink()

    def strangers(self, known: Iterable[ModelRef], partial: Iterable[ModelRef] = ()) -> list[Path]:
        """Every file that is of no pack in ``known`` or, half made, in ``partial``."""
        kept = {name(self.path(ref)) for ref in partial for name in (_temporary, _progress)}
        for ref in known:
            if self.path(ref).exists():
                kept |= {self.path(ref), *self.base_paths(ref)}
        return [path for path in sorted(self._root.glob("*/*")) if path not in kept]

    def sweep(self, known: Iterable[ModelRef], partial: Iterable[ModelRef] = ()) -> list[ModelRef]:
        """Remove every file that the journal does not know, complete or ``partial``; return the known whose
        file is missing."""
        known = list(known)
        for path in self.strangers(known, partial):
            path.unlink()
        return [ref for ref in known if not self.path(ref).exists()]


def _has_links(root: Path) -> bool:
    """Try it: no call tells."""
    probe, link = root / ".link-probe", root / ".link-probe.2"
    try:
        probe.touch(mode=0o600)
        with suppress(FileNotFoundError):
            link.unlink()
        os.link(probe, link)
    except OSError:
        return False
    finally:
        for path in (probe, link):
            with suppress(OSError):
                path.unlink()
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _progress(path: Path) -> Path:
    return path.with_name(path.name + ".part")
