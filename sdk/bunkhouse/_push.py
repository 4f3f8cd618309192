"""Pushing a model directory: what is taken, hashing, and the resumable upload.

Covers: listing a directory under the rules below, hashing each file once, and ``push_steps``, which
yields requests and is sent answers, so that both clients drive the same logic. Does not cover:
sending (``_transport``). Control checks everything again; refusing early only saves the upload.

Rules: links that leave the directory, files that could run code and pickles are refused by name;
hidden files are left out; kinds that no engine reads are left out and reported.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlencode

from bunkhouse import _decode
from bunkhouse._errors import BadAnswer, BadDirectory, BunkhouseError, NotFound, Unavailable, Unreachable
from bunkhouse._request import (
    COMMIT_TIMEOUT_S,
    PIECE_TIMEOUT_S,
    Answer,
    Request,
    error_of,
    json_request,
    segment,
    split_model,
)
from bunkhouse._types import Model, Progress, ProgressCallback

# Control's limit on files per version.
FILES_MAX = 256
# Control takes a file at the top or in one directory, as in 1_Pooling/config.json.
DEPTH_MAX = 1
# Entries looked at, hidden and skipped ones too: stops a push of a home directory before it hashes.
ENTRIES_MAX = 10_000
# One request's body. Large enough to hide a round trip, small enough to lose little to a broken link.
PIECE_BYTES = 8 * 1024 * 1024
HASH_BYTES = 1024 * 1024
# Times in a row that a push finds its place again without any progress in between.
RESUMES_MAX = 5
# Wait before the first of them; doubles: 6 s in all.
RESUME_WAIT_S = 0.2
# Times that a push declares its files anew because the server forgot the upload.
DECLARES_MAX = 3

# Kinds that an engine reads, or that belong to a model for people to read: control's own list.
TAKEN_SUFFIXES = frozenset({".safetensors", ".json", ".jsonl", ".txt", ".model"})
TAKEN_NAMES = frozenset(
    {"README.md", "LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md", "USE_POLICY.md", "chat_template.jinja"}
)
# Kinds that run code when they are loaded, or are code.
REFUSED_SUFFIXES = frozenset(
    {
        ".bin", ".ckpt", ".dill", ".dll", ".dylib", ".exe", ".h5", ".hdf5", ".ipynb", ".jar", ".joblib",
        ".js", ".keras", ".npy", ".npz", ".pickle", ".pkl", ".ps1", ".pt", ".pt2", ".pth", ".py", ".pyc",
        ".pyd", ".pyx", ".sh", ".so", ".whl",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that will be pushed. ``changed`` compares the rest, to notice a write during the push."""

    path: str  # relative, with "/"
    location: Path
    size_bytes: int
    modified_ns: int

    def changed(self, now: os.stat_result) -> bool:
        return (now.st_size, now.st_mtime_ns) != (self.size_bytes, self.modified_ns)


@dataclass(frozen=True, slots=True)
class Listing:
    """What of a directory is pushed, and what is left out because no engine reads it."""

    files: tuple[LocalFile, ...]
    skipped: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def list_directory(directory: str | os.PathLike[str], ignore: Iterable[str] = ()) -> Listing:
    """Apply the rules to a directory, in a fixed order. Raises ``BadDirectory``."""
    root = Path(directory)
    if not root.is_dir():
        raise BadDirectory(str(directory), "is not a directory: give a Hugging Face style model directory")
    patterns = tuple(ignore)
    files: list[LocalFile] = []
    skipped: list[str] = []
    for path, entry in _walk(root, patterns):
        if path.endswith("/"):
            skipped.append(path)
            continue
        suffix = PurePosixPath(path).suffix.lower()
        if suffix in REFUSED_SUFFIXES:
            raise BadDirectory(
                path,
                f"{suffix} files can run code and are never loaded: convert weights to safetensors, and "
                f"remove the file or leave it out (ignore={path!r}, or --ignore)",
            )
        if suffix not in TAKEN_SUFFIXES and entry.name not in TAKEN_NAMES:
            skipped.append(path)
            continue
        files.append(_local_file(root, path))
    _check_listing(str(directory), files)
    return Listing(tuple(files), tuple(skipped))


def _walk(root: Path, ignore: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files below ``root`` in order, hidden and ignored ones left out. Raises on links that leave it.

    A directory that is too deep is not entered: it comes itself, with a slash at the end.
    """
    real_root = root.resolve()
    seen = 0
    pending: list[tuple[str, Path]] = [("", root)]
    while pending:
        prefix, directory = pending.pop()
        try:
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise BadDirectory(prefix or str(root), f"cannot be read: {error.strerror}") from None
        below: list[tuple[str, Path]] = []
        for entry in entries:
            seen += 1
            if seen > ENTRIES_MAX:
                raise BadDirectory(
                    str(root), f"holds more than {ENTRIES_MAX} entries: is it a model's directory?"
                )
            path = f"{prefix}{entry.name}"
            if entry.name.startswith(".") or _ignored(path, ignore):
                continue
            if entry.is_symlink():
                _check_link(path, entry, real_root)
            if entry.is_dir(follow_symlinks=False):
                if path.count("/") >= DEPTH_MAX:
                    yield f"{path}/", entry
                else:
                    below.append((f"{path}/", Path(entry.path)))
            else:
                yield path, entry
        pending.extend(reversed(below))


def _ignored(path: str, patterns: tuple[str, ...]) -> bool:
    """A pattern matches the whole relative path or the name alone, of a file or of a directory."""
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path, each) or fnmatchcase(name, each.rstrip("/")) for each in patterns)


def _check_link(path: str, entry: os.DirEntry[str], real_root: Path) -> None:
    target = Path(entry.path).resolve()
    if not target.is_relative_to(real_root):
        raise BadDirectory(
            path, "is a link that leaves the directory: push a copy with the files themselves (cp -rL)"
        )
    if target.is_dir():
        raise BadDirectory(path, "is a link to a directory: replace it by the directory itself")


def _local_file(root: Path, path: str) -> LocalFile:
    location = root / path
    try:
        path.encode()
        found = location.stat()
    except UnicodeEncodeError:
        raise BadDirectory(ascii(path), "its name is not valid UTF-8: rename it") from None
    except OSError as error:
        raise BadDirectory(path, f"cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadDirectory(path, "is not a regular file: remove it or leave it out (ignore=…)")
    return LocalFile(path, location, found.st_size, found.st_mtime_ns)


def _check_listing(directory: str, files: list[LocalFile]) -> None:
    if len(files) > FILES_MAX:
        raise BadDirectory(
            directory, f"holds {len(files)} files, the limit is {FILES_MAX}: is it a model's directory?"
        )
    paths = {file.path for file in files}
    if "config.json" not in paths:
        raise BadDirectory(
            directory, "has no config.json: give the directory that from_pretrained would take"
        )
    if not any(path.endswith(".safetensors") for path in paths):
        raise BadDirectory(
            directory, "has no *.safetensors file: save the model with save_pretrained() first"
        )


def _hash_files(listing: Listing, progress: ProgressCallback) -> dict[str, str]:
    """sha256 of each file, read once."""
    digests: dict[str, str] = {}
    done_bytes = 0
    buffer = memoryview(bytearray(HASH_BYTES))
    for file in listing.files:
        digest = hashlib.sha256()
        with _open(file) as handle:
            while count := handle.readinto(buffer):
                digest.update(buffer[:count])
                done_bytes += count
                progress(Progress("hash", file.path, done_bytes, listing.size_bytes))
            _check_unchanged(file, handle.fileno())
        digests[file.path] = digest.hexdigest()
    return digests


def _open(file: LocalFile) -> FileIO:
    try:
        return FileIO(file.location, "r")
    except OSError as error:
        raise BadDirectory(file.path, f"cannot be read: {error.strerror}") from None


def _check_unchanged(file: LocalFile, fd: int) -> None:
    if file.changed(os.fstat(fd)):
        raise BadDirectory(file.path, "changed while it was being pushed: push again when it is complete")


def _read_piece(file: LocalFile, offset: int) -> bytes:
    with _open(file) as handle:
        _check_unchanged(file, handle.fileno())
        handle.seek(offset)
        piece = bytearray()
        # An unbuffered read may return less than it was asked for.
        while len(piece) < PIECE_BYTES and (more := handle.read(PIECE_BYTES - len(piece))):
            piece += more
    if len(piece) != min(PIECE_BYTES, file.size_bytes - offset):
        raise BadDirectory(file.path, "changed while it was being pushed: push again when it is complete")
    return bytes(piece)


Steps = Generator[Request, Answer, Model]


@dataclass(frozen=True, slots=True)
class Done:
    """What ``advance`` returns when a push is over."""

    model: Model


def advance(steps: Steps, outcome: Answer | BunkhouseError | None) -> Request | Done:
    """Hand a push the outcome of its last request (None at first) and get the next one.

    May hash and read files, so that an event loop calls it in a thread.
    """
    try:
        if outcome is None:
            return next(steps)
        return steps.throw(outcome) if isinstance(outcome, BunkhouseError) else steps.send(outcome)
    except StopIteration as stop:
        model: Model = stop.value
        return Done(model)


def push_steps(
    model: str,
    directory: str | os.PathLike[str],
    ignore: Iterable[str],
    progress: ProgressCallback | None,
    **settings: int | None,
) -> Steps:
    """Push ``directory`` as a new version of ``model`` (``tenant/name``). ``settings``: devices, replicas."""
    split_model(model)
    tell = progress or (lambda _: None)
    listing = list_directory(directory, ignore)
    for path in listing.skipped:
        tell(Progress("skip", path, 0, 0, "left out: no engine reads it"))
    given = {name: value for name, value in settings.items() if value is not None}
    push = _Push(model, listing, _hash_files(listing, tell), tell, urlencode(given))
    declares = 0
    while True:
        upload_id, offsets = yield from push.declare()
        declares += 1
        try:
            yield from push.upload(upload_id, offsets)
            return (yield from push.commit(upload_id))
        except NotFound:
            # The upload expired meanwhile. Declaring again finds the version if it was committed after all.
            if declares >= DECLARES_MAX:
                raise


@dataclass(slots=True)
class _Push:
    """One push: what is local, and the requests of each step."""

    model: str
    listing: Listing
    digests: dict[str, str]
    tell: ProgressCallback
    settings: str = ""  # as a query

    def declare(self) -> Generator[Request, Answer, tuple[str, dict[str, int]]]:
        """Open the upload, or find the open one of the same files, and where each file stands."""
        tenant, name = split_model(self.model)
        files = [
            {"path": file.path, "size_bytes": file.size_bytes, "sha256": self.digests[file.path]}
            for file in self.listing.files
        ]
        body = {"name": name, "files": files}
        # Repeatable: the same declaration finds the same upload.
        answer = yield json_request(
            "POST", f"/api/v1/tenants/{segment(tenant, 'model')}/uploads", body, repeatable=True
        )
        fields = _decode.fields_of(answer)
        upload_id = fields.text("upload_id")
        return upload_id, self._offsets(fields)

    def _offsets(self, fields: _decode.Fields) -> dict[str, int]:
        offsets = {each.text("path"): each.number("offset_bytes") for each in fields.each("files")}
        for file in self.listing.files:
            if not 0 <= offsets.get(file.path, -1) <= file.size_bytes:
                raise BadAnswer(f"upload.files: no valid offset for {file.path!r}")
        return offsets

    def upload(self, upload_id: str, offsets: dict[str, int]) -> Generator[Request, Answer, None]:
        """Send what is missing of each file."""
        for file in self.listing.files:
            if file.size_bytes:
                yield from self._upload_file(upload_id, file, offsets)

    def _upload_file(
        self, upload_id: str, file: LocalFile, offsets: dict[str, int]
    ) -> Generator[Request, Answer, None]:
        path = f"{_upload_path(upload_id)}/files/{quote(file.path, safe='/')}"
        stuck = 0
        self._tell_uploaded(file, offsets)
        while (offset := offsets[file.path]) < file.size_bytes:
            piece = _read_piece(file, offset)
            headers = {"upload-offset": str(offset), "content-type": "application/octet-stream"}
            failure: BunkhouseError | None = None
            reached: int | None = None
            try:
                # Not repeatable: a piece that may have arrived is asked about, not sent again.
                answer = yield Request(
                    "PATCH", path, headers, piece, timeout_s=PIECE_TIMEOUT_S, accepts=frozenset({409})
                )
                reached = _offset_header(answer)
                if answer.status == 409:
                    failure = error_of(answer, 0.0)
                elif reached is None:
                    reached = offset + len(piece)
            except (Unreachable, Unavailable) as error:
                failure = error
            if reached is None:
                reached = yield from self._ask_offset(upload_id, file, RESUME_WAIT_S * 2**stuck)
            if reached is not None and not 0 <= reached <= file.size_bytes:
                raise BadAnswer(
                    f"the server says that {file.path!r} is at {reached} of {file.size_bytes} bytes"
                )
            stuck = 0 if reached is not None and reached > offset else stuck + 1
            if stuck > RESUMES_MAX:
                raise failure or BadAnswer(f"the server accepts pieces of {file.path!r} without storing them")
            if reached is not None:
                offsets[file.path] = reached
                self._tell_uploaded(file, offsets)

    def _ask_offset(
        self, upload_id: str, file: LocalFile, delay_s: float
    ) -> Generator[Request, Answer, int | None]:
        """Where the server stands with a file; None when it cannot be asked right now."""
        try:
            # The wait lets the server notice that the earlier request is over, or come back.
            answer = yield Request("GET", _upload_path(upload_id), repeatable=True, delay_s=delay_s)
        except (Unreachable, Unavailable):
            return None
        return self._offsets(_decode.fields_of(answer))[file.path]

    def _tell_uploaded(self, file: LocalFile, offsets: dict[str, int]) -> None:
        done_bytes = sum(offsets[each.path] for each in self.listing.files)
        self.tell(Progress("upload", file.path, done_bytes, self.listing.size_bytes))

    def commit(self, upload_id: str) -> Generator[Request, Answer, Model]:
        """Make the version visible."""
        path = f"{_upload_path(upload_id)}/commit{'?' if self.settings else ''}{self.settings}"
        answer = yield Request("POST", path, repeatable=True, timeout_s=COMMIT_TIMEOUT_S)
        return _decode.model(_decode.fields_of(answer))


def _upload_path(upload_id: str) -> str:
    return f"/api/v1/uploads/{segment(upload_id, 'upload_id')}"


def _offset_header(answer: Answer) -> int | None:
    text = answer.headers.get("upload-offset", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
