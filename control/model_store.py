"""Files of models: control's own store, origins that operators register, and what is read off both.

Covers: reading a model directory wherever it lies (``Directory``), hashing and inspecting it
(``examine``), which origin URLs may be registered, and keeping the files of pushed versions through
``obstore``. Does not cover: what a directory may contain (``packer.directory``, ``packer.layout``) or
uploads in progress (``control.routes.uploads``).

Everything here blocks; ``control.server`` calls it on threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from packer.directory import FILES_MAX, BadDirectory, ModelFacts, check_paths, inspect, json_paths
from packer.layout import TensorInfo, header_bytes, parse_header
from packer.types import KIB, MIB, BadValue, ModelRef, OriginFile

# One read while hashing: large enough to keep a disk busy, small enough for many at a time.
READ_BYTES = 4 * MIB
# One piece of a file sent to a node.
PIECE_BYTES = 256 * KIB
# Reads of files at once. Every read that is waiting occupies a thread of the file reader's pool, and more of
# them than this make no disk faster.
READS_MAX = 16
# Directory entries looked at below a file:// origin; a model directory has fewer than 300.
ENTRIES_MAX = 2_000
ORIGIN_URL_CHARS_MAX = 1_024


class ModelStoreError(Exception):
    """The store or an origin could not be read or written. The text is for operators."""


class WrongDigest(ValueError):
    """A file is not what was declared."""

    def __init__(self, path: str, declared: str, found: str) -> None:
        super().__init__(f"{path}: sha256 is {found}, declared was {declared}")
        self.path = path


class Directory(Protocol):
    """A model directory that can be read, wherever it lies."""

    def sizes(self) -> Mapping[str, int]: ...
    def read(self, path: str, start: int, nbytes: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Examined:
    """A directory whose every byte was read: its exact files, and the facts of its headers."""

    files: tuple[OriginFile, ...]
    facts: ModelFacts


def examine(directory: Directory, declared: Mapping[str, OriginFile] | None = None) -> Examined:
    """Check names, read and hash every file, check headers and configuration.

    Raises ``BadDirectory``, ``BadHeader``, ``WrongDigest`` or ``ModelStoreError``. Cheap refusals come
    first: nothing is hashed of a directory whose names, headers or configuration are wrong.
    """
    sizes = dict(directory.sizes())
    check_names(list(sizes.items()))
    headers = {
        path: _header(directory, path, size) for path, size in sizes.items() if path.endswith(".safetensors")
    }
    jsons = {path: directory.read(path, 0, sizes[path]) for path in json_paths(list(sizes))}
    facts = inspect(list(sizes), jsons, headers)
    files = []
    for path in sorted(sizes):
        digest = _sha256(directory, path, sizes[path])
        if declared is not None and digest != declared[path].sha256:
            raise WrongDigest(path, declared[path].sha256, digest)
        files.append(OriginFile(path, sizes[path], digest))
    return Examined(tuple(files), facts)


def check_names(files: Sequence[tuple[str, int]]) -> None:
    """Every (path, size) may be part of a model directory, and no file is another's folder."""
    check_paths(files)
    paths = {path.lower() for path, _ in files}
    for path, _ in files:
        folder = path.rpartition("/")[0]
        if folder.lower() in paths:
            raise BadDirectory(folder, "is a file and a folder at once; remove one of them")


def _header(directory: Directory, path: str, size: int) -> tuple[TensorInfo, ...]:
    count = header_bytes(directory.read(path, 0, min(8, size)), size, path)
    return parse_header(directory.read(path, 8, count), path, size)


def _sha256(directory: Directory, path: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, READ_BYTES):
        digest.update(directory.read(path, start, min(READ_BYTES, size - start)))
    return digest.hexdigest()


# --- where directories lie ------------------------------------------------------------------------


class PartFiles:
    """The files of an upload: numbered part files, named only by its declaration."""

    def __init__(self, parts: Mapping[str, Path]) -> None:
        self._parts = parts

    def sizes(self) -> Mapping[str, int]:
        return {path: part.stat().st_size for path, part in self._parts.items()}

    def read(self, path: str, start: int, nbytes: int) -> bytes:
        with open(self._parts[path], "rb") as file:
            file.seek(start)
            return file.read(nbytes)


class StoredDirectory:
    """A directory behind ``obstore``."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def sizes(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        with _store_errors():
            for batch in obstore.list(self._store):
                for meta in batch:
                    found[meta["path"]] = meta["size"]
                    if len(found) > FILES_MAX:
                        raise BadDirectory(
                            ".", f"has more than {FILES_MAX} files, the limit; is it a model's own directory?"
                        )
        return found

    def read(self, path: str, start: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""
        with _store_errors():
            data = bytes(obstore.get_range(self._store, path, start=start, length=nbytes))
        if len(data) != nbytes:
            raise ModelStoreError(f"{path}: {len(data)} bytes at {start}, expected {nbytes}; is it changing?")
        return data


def open_origin(url: str, roots: Sequence[str]) -> tuple[str, Directory]:
    """The origin that an operator names, in its one spelling, if it lies below one of ``roots``.

    Raises ``BadValue`` for a URL that may not be registered, ``BadDirectory`` for what is inside.
    """
    if len(url) > ORIGIN_URL_CHARS_MAX or not url.isprintable():
        raise BadValue("origin", f"must be at most {ORIGIN_URL_CHARS_MAX} printable characters")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise BadValue("origin", f"{url[:80]!r} is not a URL") from None
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise BadValue("origin", "must be a plain URL without credentials, '?' and '#'")
    if parts.scheme == "file":
        return _open_file_origin(unquote(parts.path), parts.netloc, roots)
    plain = url.rstrip("/")
    segments = unquote(parts.path).split("/")
    allowed = [root.rstrip("/") for root in roots if "://" in root]
    if ".." in segments or not any(plain == root or plain.startswith(root + "/") for root in allowed):
        raise BadValue("origin", f"{url[:80]!r} {_origin_way_out(parts.scheme)}")
    try:
        return plain, StoredDirectory(from_url(plain))
    except Exception as error:  # obstore raises several unrelated types for a URL it can not use
        raise BadValue("origin", f"can not be opened: {str(error)[:200]}") from None


def _open_file_origin(path: str, host: str, roots: Sequence[str]) -> tuple[str, Directory]:
    outside = BadValue("origin", f"{path[:ORIGIN_URL_CHARS_MAX]!r} {_origin_way_out('file')}")
    if host not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise outside
    real = os.path.realpath(path)
    allowed = [os.path.realpath(root.removeprefix("file://")) for root in roots if _is_folder_root(root)]
    if not any(os.path.commonpath((real, root)) == root for root in allowed):
        raise outside
    if not os.path.isdir(real):
        raise BadValue("origin", f"{path!r} is not a directory on the control server's machine")
    _refuse_links(real)
    return Path(real).as_uri(), StoredDirectory(LocalStore(prefix=real))


def _origin_way_out(scheme: str) -> str:
    if not scheme:
        return "is not a URL: for a directory of the control server's machine write file:///its/path"
    outside = "is not below an --origin-root of this control server; "
    if scheme == "file":
        outside += "start it with --origin-root DIR to allow file:// origins below DIR, or "
    return outside + "push the directory instead"


def _is_folder_root(root: str) -> bool:
    return root.startswith("file://") or "://" not in root


def _refuse_links(root: str) -> None:
    """``obstore`` follows links; one in a model directory could name any file of this machine."""
    seen = 0
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            seen += 1
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if seen > ENTRIES_MAX:
                raise BadDirectory(
                    ".", f"has more than {ENTRIES_MAX} entries; is it a model's own directory?"
                )
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise BadDirectory(
                    os.path.relpath(path, root),
                    "is a symbolic link or a special file; copy the directory with its links resolved "
                    "(cp -rL) and register the copy",
                )


# --- control's own store --------------------------------------------------------------------------


class ModelStore:
    """Files of pushed versions under ``<tenant>/<name>/<version>/`` in a local directory.

    Written through ``obstore``, so that an object store can take its place.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store = LocalStore(prefix=root, mkdir=True)
        self._reads = asyncio.Semaphore(READS_MAX)

    def put(self, ref: ModelRef, parts: Mapping[str, Path], sync: Callable[[int], None] = os.fsync) -> None:
        """Store every file of a version and make it durable. Raises ``ModelStoreError``."""
        with _store_errors():
            for path, part in sorted(parts.items()):
                obstore.put(self._store, _key(ref, path), part)
            self._make_durable(ref, parts, sync)

    def _make_durable(self, ref: ModelRef, parts: Mapping[str, Path], sync: Callable[[int], None]) -> None:
        # A rename is durable once its directory is; the directories above were perhaps new as well.
        folders = {self._root}
        for path in parts:
            file = self._root / _key(ref, path)
            _sync(file, sync)
            folders.update(folder for folder in file.parents if folder.is_relative_to(self._root))
        for folder in sorted(folders):
            _sync(folder, sync)

    async def stream(self, ref: ModelRef, path: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes ``start`` to ``end`` of one file. Raises ``ModelStoreError``."""
        if start == end:
            return
        with _store_errors():
            async with self._reads:
                answer = await obstore.get_async(
                    self._store, _key(ref, path), options={"range": (start, end)}
                )
            pieces = aiter(answer.stream(min_chunk_size=PIECE_BYTES))
            while True:
                # Held for one read, not for the whole stream: a slow node must not keep others waiting.
                async with self._reads:
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield bytes(piece)

    def drop(self, ref: ModelRef) -> None:
        """Remove a version's files; nothing is there afterwards, also when nothing was before."""
        shutil.rmtree(self._root / ref.tenant / ref.name / ref.version, ignore_errors=True)

    def sweep(self, known: set[ModelRef]) -> list[ModelRef]:
        """Remove files that no version claims (left by a crash) and empty folders; returns what went.

        Only before the control server serves: a put that runs meanwhile could lose its folder.
        """
        dropped = []
        for folder in sorted(self._root.glob("*/*/*")):
            tenant, name, version = folder.relative_to(self._root).parts
            ref = ModelRef(tenant, name, version)
            if ref not in known:
                self.drop(ref)
                dropped.append(ref)
        for depth in ("*/*", "*"):
            for folder in self._root.glob(depth):
                if not any(folder.iterdir()):
                    folder.rmdir()
        return dropped


def _key(ref: ModelRef, path: str) -> str:
    return f"{ref.tenant}/{ref.name}/{ref.version}/{path}"


def _sync(path: Path, sync: Callable[[int], None]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, obstore.exceptions.BaseError) as error:
        raise ModelStoreError(str(error).split("\n")[0][:300]) from error
