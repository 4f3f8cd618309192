"""Which pack files are on disk, who has extents in which, and who pays for what.

Covers: packs offered to a new one of the same tenant, pack files that outlive the version that they were
written for, giving back the parts of them that nobody needs, and what each version is charged. Does not
cover: names and links (``packs``), the search for equal chunks (``packer/bases.py``, in the worker), or which
pack to drop (``packer/residency.py``).

All of it is read off the directory, so there is nothing that a crash could make wrong: a pack's own name and
the links beside the packs that have extents in it are one file to the file system, which keeps it until the
last is gone. A pack is charged for its own file. When it goes and others need extents of that file, the rest
of the file is given back and what stays is charged to the one of them that came first, in the same step of
the core that takes the bytes off the version that went: every byte on disk is always charged to somebody.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from agent.journal import JournalFailed, PackRow
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.workers import OfferedPack, PackDone
from packer.bases import PACKS_MAX
from packer.holes import Range, allocated_bytes, holes, punch, ranges_in
from packer.index import PackError
from packer.pack import PackReader, read_header
from packer.seal import BadSeal
from packer.types import ModelRef, ModelSpec

log = logging.getLogger("bunk.orders")

# Packs that may have extents in one file: far below what file systems allow, and each of them is looked into
# when the file's own version goes.
USERS_MAX = 256

# A file as the file system knows it, under whatever names: device and inode.
FileId = tuple[int, int]


@dataclass(slots=True)
class _File:
    """A pack file. ``owner``: the version that it was written for, while its pack is there. ``users``: packs
    that have extents in it, the first of which pays for what it takes without an owner."""

    owner: ModelRef | None = None
    users: dict[ModelRef, None] = field(default_factory=dict)
    retained_bytes: int = 0

    @property
    def payer(self) -> ModelRef | None:
        return None if self.owner is not None else next(iter(self.users), None)


@dataclass(frozen=True, slots=True)
class _Pack:
    """A complete pack: its own file, and those that extents of it lie in."""

    own: FileId
    own_bytes: int
    bases: tuple[FileId, ...]
    deduplicated_bytes: int
    number: int  # counts up: a later pack has a higher one


@dataclass(slots=True)
class Offers:
    """Packs in which chunks of a new pack may be found; they stay on disk until ``Holdings.release``.
    ``paths``: the files that hold their extents, by salt."""

    packs: tuple[OfferedPack, ...]
    paths: Mapping[bytes, Path]
    refs: tuple[ModelRef, ...]
    held: ExitStack

    def close(self) -> None:
        self.held.close()


class Holdings:
    """``find`` once, before anything else. Everything runs on the agent's loop."""

    def __init__(
        self,
        packs: PackDirectory,
        journal: JournalThread,
        spec_of: Callable[[ModelRef], ModelSpec],
    ) -> None:
        self._directory = packs
        self._journal = journal
        self._spec_of = spec_of
        self._packs: dict[ModelRef, _Pack] = {}
        self._files: dict[FileId, _File] = {}
        self._pins: dict[ModelRef, int] = {}
        self._borrowed: dict[ModelRef, list[ModelRef]] = {}
        self._leaving: set[ModelRef] = set()
        self._unpinned = asyncio.Condition()
        self._dropping = asyncio.Lock()
        self._count = 0

    # --- what is there ----------------------------------------------------------------------------

    async def find(self, rows: Sequence[PackRow], partial: Iterable[ModelRef]) -> None:
        """At start-up: take up the directory, and give back what a drop that was cut off did not."""
        for row in sorted(rows, key=lambda row: (row.created_ms, str(row.ref))):
            with suppress(OSError):
                own = _file_id(self._directory.path(row.ref))
                bases = tuple(map(_file_id, self._directory.base_paths(row.ref)))
                self._take_up(row.ref, own, bases, row.disk_bytes, row.deduplicated_bytes)
        for path in self._directory.strangers(self._packs, partial):
            with suppress(OSError):
                file = self._files.get(_file_id(path))
                if file is not None and file.owner is None:
                    await self._give_back(path, list(file.users))
        for ref, pack in self._packs.items():
            for number, base in enumerate(pack.bases):
                file = self._files[base]
                if file.payer == ref:
                    with suppress(OSError):
                        file.retained_bytes = _allocated(self._directory.base_path(ref, number))

    def add(self, ref: ModelRef, own_bytes: int, deduplicated_bytes: int) -> int:
        """A pack was published; returns what it is charged. Called in the same step in which the core hears
        of it, and before."""
        paths = self._directory.base_paths(ref)
        try:
            own, bases = _file_id(self._directory.path(ref)), tuple(map(_file_id, paths))
        except OSError:
            # Somebody removed it this instant; whoever restores it finds that out.
            own, bases = (-1, self._count), ()
        self._take_up(ref, own, bases, own_bytes, deduplicated_bytes)
        for path, base in zip(paths, bases, strict=False):
            # From a peer, without the version that it was written for.
            if self._files[base].payer == ref:
                with suppress(OSError):
                    self._files[base].retained_bytes = _allocated(path)
        return self.charge(ref)

    def borrow(self, ref: ModelRef, salt: bytes, link: Path) -> bool:
        """Give a whole file of the tenant with this salt another name, if it is here; it stays until
        ``repay``."""
        for other, pack in self._packs.items():
            if other.tenant != ref.tenant or other in self._leaving or not self._directory.has_links:
                continue
            path = self._directory.path(other)
            with suppress(OSError, PackError):
                if _salt(path) != salt or len(self._files[pack.own].users) >= USERS_MAX:
                    continue
                os.link(path, link)
                self._pins[other] = self._pins.get(other, 0) + 1
                self._borrowed.setdefault(ref, []).append(other)
                return True
        return False

    async def repay(self, ref: ModelRef) -> None:
        """What was borrowed for this version is in its books now, or is not needed."""
        await self._unpin(self._borrowed.pop(ref, []))

    def _take_up(
        self, ref: ModelRef, own: FileId, bases: tuple[FileId, ...], own_bytes: int, deduplicated_bytes: int
    ) -> None:
        self._count += 1
        self._packs[ref] = _Pack(own, own_bytes, bases, deduplicated_bytes, self._count)
        self._files.setdefault(own, _File()).owner = ref
        for base in bases:
            self._files.setdefault(base, _File()).users[ref] = None

    def charge(self, ref: ModelRef) -> int:
        """The disk bytes that a pack is to be charged for; 0 when there is none."""
        pack = self._packs.get(ref)
        if pack is None:
            return 0
        files = (self._files[base] for base in pack.bases)
        return pack.own_bytes + sum(file.retained_bytes for file in files if file.payer == ref)

    def deduplicated_bytes(self, ref: ModelRef) -> int:
        """Bytes of the image that the pack's own file does not hold, because an equal chunk is stored."""
        pack = self._packs.get(ref)
        return pack.deduplicated_bytes if pack is not None else 0

    def has_users(self, ref: ModelRef) -> bool:
        """Whether other packs have extents in this one's file."""
        pack = self._packs.get(ref)
        return pack is not None and bool(self._files[pack.own].users)

    # --- packs to look in -------------------------------------------------------------------------

    async def offer(self, spec: ModelSpec) -> Offers | None:
        """The packs of the same tenant that most likely have chunks of this version, with their keys."""
        likely = self._likely(spec) if self._directory.has_links else []
        held = ExitStack()
        packs: list[OfferedPack] = []
        paths: dict[bytes, Path] = {}
        for ref in likely:
            self._pins[ref] = self._pins.get(ref, 0) + 1
        try:
            for ref in likely:
                offered = await self._open(ref, held, paths)
                if offered is not None:
                    packs.append(offered)
        except BaseException:
            held.close()
            await self._unpin(likely)
            raise
        if not packs:
            await self._unpin(likely)
            return None
        return Offers(tuple(packs), paths, tuple(likely), held)

    def _likely(self, spec: ModelSpec) -> list[ModelRef]:
        """Versions with a weight file in common come first, then those of the same model, newest first, then
        those of the same shape."""
        weights = {file.sha256 for file in spec.files if file.path.endswith(".safetensors")}
        ranked: list[tuple[int, int, ModelRef]] = []
        for ref, pack in self._packs.items():
            if ref.tenant != spec.ref.tenant or ref == spec.ref or ref in self._leaving:
                continue
            if any(len(self._files[file].users) >= USERS_MAX for file in (pack.own, *pack.bases)):
                continue
            try:
                other = self._spec_of(ref)
            except KeyError:
                continue
            if not weights.isdisjoint(file.sha256 for file in other.files):
                ranked.append((0, -pack.number, ref))
            elif ref.name == spec.ref.name:
                ranked.append((1, -pack.number, ref))
            elif other.chunk_bytes == spec.chunk_bytes:
                ranked.append((2, -pack.number, ref))
        return [ref for *_, ref in sorted(ranked)[:PACKS_MAX]]

    async def _open(self, ref: ModelRef, held: ExitStack, paths: dict[bytes, Path]) -> OfferedPack | None:
        """None when it can not be opened now: then chunks are not looked for in it."""
        try:
            key = await self._journal.call(self._journal.journal.data_key, ref)
            if key is None:
                return None
            fds: list[int] = []
            found: dict[bytes, Path] = {}
            for path in (self._directory.path(ref), *self._directory.base_paths(ref)):
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                held.callback(os.close, fds[-1])
                found[read_header(fds[-1]).salt] = path
            if not all(path.samefile(paths.get(salt, path)) for salt, path in found.items()):
                # From other nodes the same file came twice, once in parts: the new pack would be linked to
                # one of the two, whichever its chunks were found in.
                return None
            paths.update(found)
            return OfferedPack(ref, key, tuple(fds))
        except (JournalFailed, BadSeal, PackError, OSError) as error:
            log.info("no chunks are looked for in the pack of %s: %s", ref, error)
            return None

    async def release(self, offers: Offers | None) -> None:
        """The new pack is there, or will not be."""
        if offers is None or not offers.refs:
            return
        offers.close()
        refs, offers.refs = offers.refs, ()
        await self._unpin(refs)

    async def _unpin(self, refs: Sequence[ModelRef]) -> None:
        for ref in refs:
            self._pins[ref] -= 1
            if not self._pins[ref]:
                del self._pins[ref]
        async with self._unpinned:
            self._unpinned.notify_all()

    # --- what goes --------------------------------------------------------------------------------

    async def prepare_drop(self, ref: ModelRef) -> None:
        """Wait until no pack in the making looks into this one; from here on none begins to."""
        async with self._unpinned:
            await self._unpinned.wait_for(lambda: ref not in self._pins)
            self._leaving.add(ref)

    async def drop(self, ref: ModelRef) -> tuple[tuple[ModelRef, int], ...]:
        """Remove a pack's files but for what others need of them, after ``prepare_drop`` and after its key is
        destroyed. Returns what other versions are charged from now on. Raises ``OSError``; then it can be
        called again."""
        async with self._dropping:
            pack = self._packs.get(ref)
            kept = [(base, number) for number, base in enumerate(pack.bases)] if pack is not None else []
            paths = [(pack.own, self._directory.path(ref))] if pack is not None else []
            paths += [(base, self._directory.base_path(ref, number)) for base, number in kept]
            for file_id, path in paths:
                file = self._files[file_id]
                users = [user for user in file.users if user != ref]
                if users and file.owner in (None, ref):
                    # While it still has this name: the next start finds it, if this one is cut off.
                    with suppress(FileNotFoundError):  # removed by an earlier try
                        file.retained_bytes = await self._give_back(path, users)
            await asyncio.to_thread(self._directory.drop, ref)
            # From here on nothing waits until the core hears of it.
            return self._forget(ref)

    def _forget(self, ref: ModelRef) -> tuple[tuple[ModelRef, int], ...]:
        self._leaving.discard(ref)
        pack = self._packs.pop(ref, None)
        if pack is None:
            return ()
        charged: dict[ModelRef, None] = {}
        for file_id in (pack.own, *pack.bases):
            file = self._files[file_id]
            file.users.pop(ref, None)
            file.owner = None if file.owner == ref else file.owner
            if file.payer is not None:
                charged[file.payer] = None
            elif file.owner is None:
                del self._files[file_id]
        return tuple((payer, self.charge(payer)) for payer in charged)

    async def _give_back(self, path: Path, users: Sequence[ModelRef]) -> int:
        """Punch out what none of these packs refers to; returns what the file takes then. What can not be
        told, or not be given back, stays."""
        try:
            keys = [await self._journal.call(self._journal.journal.data_key, user) for user in users]
        except (JournalFailed, BadSeal) as error:
            log.warning("%s stays as a whole: %s", path.name, error)
            keys = [None]
        packs = [
            (self._directory.path(user), key, user)
            for user, key in zip(users, keys, strict=False)
            if key is not None
        ]
        if len(packs) < len(users):
            return await asyncio.to_thread(_allocated, path)
        return await asyncio.to_thread(_punch_out, path, packs)


def base_paths(done: PackDone, offers: Offers | None) -> list[Path]:
    """The files in which the new pack has extents, in its order. Raises ``OSError`` when the worker names one
    that it was not given: it is not trusted."""
    paths = offers.paths if offers is not None else {}
    if len(set(done.bases)) != len(done.bases) or not all(salt in paths for salt in done.bases):
        raise OSError("the pack refers to files that were not offered")
    return [paths[salt] for salt in done.bases]


def _file_id(path: Path) -> FileId:
    state = path.stat()
    return (state.st_dev, state.st_ino)


def _salt(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_header(descriptor).salt
    finally:
        os.close(descriptor)


def _allocated(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return allocated_bytes(descriptor)
    finally:
        os.close(descriptor)


def _punch_out(path: Path, users: Sequence[tuple[Path, bytes, ModelRef]]) -> int:
    """Runs on a thread of its own. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with suppress(PackError, OSError):
            salt = read_header(descriptor).salt
            kept: list[Range] = []
            for user, key, ref in users:
                kept += _ranges(user, key, ref, salt)
            if not punch(descriptor, holes(kept, os.fstat(descriptor).st_size)):
                log.warning("%s stays as a whole: its file system gives no part of it back", path.name)
        return allocated_bytes(descriptor)
    finally:
        os.close(descriptor)


def _ranges(path: Path, key: bytes, ref: ModelRef, salt: bytes) -> list[Range]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return ranges_in(PackReader(descriptor, key, ref, bases=None).index, salt)
    finally:
        os.close(descriptor)
