"""Uploads: declare files, send their bytes (resumable), look at them, give them up.

The declaration names every file with its exact size and sha256, so the version is known before a byte
arrives and declaring the same again finds the same open upload. Bytes go to numbered part files; a
declared path is never used as a path on disk before ``packer.directory`` has accepted it. An offset
that was acknowledged is durable. Does not cover: making a version of them (``control.routes.commits``), what
a directory may contain (``packer.directory``), checking and keeping files (``control.model_store``).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from aiohttp import web

from control import etags
from control.catalog import (
    UPLOADS_PER_TENANT_MAX,
    DropUpload,
    PutUpload,
    UploadRow,
)
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.model_store import check_names
from control.operations import Given, NameText, Operation, Result, Where
from control.pages import PAGED, Page, Position, asked_page, page_of
from control.routes.access import Access, Caller, Route, check_still, not_found, read_json, tenant_of
from control.routes.models import (
    REFUSED_CODE,
    own_name,
)
from control.routing import wall_ms
from control.state import Control
from packer.directory import FILES_MAX, BadDirectory, manifest_digest
from packer.http import ApiError, json_response
from packer.layout import IMAGE_BYTES_MAX
from packer.types import MIB, OriginFile

OFFSET_HEADER = "Upload-Offset"
# Bytes gathered before they are written: fewer, larger writes.
WRITE_BYTES = 1 * MIB
# A client that sends nothing for this long is gone; it may come back and go on.
IDLE_SECONDS = 60.0
# What must stay free on control's disk whatever is uploaded: the database needs room to live.
DISK_FREE_BYTES_MIN = 256 * MIB


class FileAsk(msgspec.Struct, forbid_unknown_fields=True):
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=IMAGE_BYTES_MAX)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class UploadAsk(msgspec.Struct, forbid_unknown_fields=True):
    name: NameText
    files: Annotated[list[FileAsk], msgspec.Meta(min_length=1, max_length=FILES_MAX)]


@dataclass(frozen=True, slots=True)
class FileAnswer:
    path: str
    size_bytes: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class UploadAnswer:
    upload_id: str
    tenant: str
    name: str
    version: str
    committed: bool
    created_ms: int
    files: Sequence[FileAnswer]


@dataclass(frozen=True, slots=True)
class UploadRowAnswer:
    """An upload in a list; ask for it to know how much of each file is here."""

    upload_id: str
    name: str
    version: str
    committed: bool
    created_ms: int
    declared_bytes: int


# --- declare --------------------------------------------------------------------------------------


async def declare(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
    ask = await read_json(control, request, caller, UploadAsk)
    name = own_name(tenant, ask.name)
    files = tuple(
        sorted(
            (OriginFile(file.path, file.size_bytes, file.sha256) for file in ask.files),
            key=lambda file: file.path,
        )
    )
    try:
        check_names([(file.path, file.size_bytes) for file in files])
    except BadDirectory as error:
        raise refused_directory(error) from None
    async with control.writing:
        tenant_of(control, caller, tenant)  # it may have been deleted while the body came in
        row = _find_open(control, tenant, name, manifest_digest(files))
        if row is None:
            row = UploadRow(secrets.token_hex(16), tenant, name, manifest_digest(files), files, wall_ms())
            _check_limits(control, row)
            await asyncio.to_thread(_make_folder, control.upload_dir / row.upload_id)
            answer = json_response(await _answer(control, row), 201)
            await control.write([PutUpload(row), *caller.remembering(answer)])
            return answer
    return json_response(await _answer(control, row), 201)


def refused_directory(error: BadDirectory) -> ApiError:
    return ApiError(422, REFUSED_CODE, str(error), field=error.path)


def _find_open(control: Control, tenant: str, name: str, version: str) -> UploadRow | None:
    """An upload of the same declaration that can go on, or was committed and is still the latest."""
    for row in control.catalog.uploads_of(tenant):
        if (row.name, row.version) != (name, version):
            continue
        if not row.committed or control.catalog.latest.get(row.ref.model) == row.ref:
            return row
    return None


def _check_limits(control: Control, row: UploadRow) -> None:
    waiting = [other for other in control.catalog.uploads_of(row.tenant) if not other.committed]
    if len(waiting) >= UPLOADS_PER_TENANT_MAX:
        raise ApiError(
            429,
            "too_many_uploads",
            f"{len(waiting)} uploads of this tenant are open, the limit is {UPLOADS_PER_TENANT_MAX}; "
            "run an interrupted push to its end, or delete one first (GET /api/v1/tenants/TENANT/uploads, "
            "DELETE /api/v1/uploads/ID).",
            should_retry=False,
        )
    if row.ref in control.catalog.models:
        return  # its bytes are here already
    held, limit = control.catalog.stored_bytes(row.tenant), control.config.tenant_store_bytes
    if held + row.declared_bytes > limit:
        raise ApiError(
            507,
            "tenant_store_full",
            f"{row.declared_bytes} bytes declared + {held} bytes of this tenant's stored versions and open "
            f"uploads = {held + row.declared_bytes}, the limit is {limit}; delete versions first.",
            should_retry=False,
        )
    # Twice: the parts, and the copy that the commit makes before they go.
    check_floor(control.upload_dir, 2 * row.declared_bytes)


def check_floor(place: Path | int, nbytes: int) -> None:
    """Refuse to write what would leave less than the floor free on control's disk.

    Asked again at every write and at the commit: uploads that were each declared when there was room may
    have none together, and other programs write as well.
    """
    disk = os.statvfs(place)
    free, wanted = disk.f_bavail * disk.f_frsize, nbytes + DISK_FREE_BYTES_MIN
    if wanted > free:
        raise ApiError(
            507,
            "disk_full",
            f"This needs {wanted} bytes free on control's disk ({DISK_FREE_BYTES_MIN} of them stay free), "
            f"there are {free}; go on when the operator has made room.",
            should_retry=False,
        )


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- look -----------------------------------------------------------------------------------------


def upload_of(control: Control, request: web.Request, caller: Caller) -> UploadRow:
    """The upload in the path, if the caller may see it; else the one 404."""
    upload_id = request.match_info["upload_id"]
    row = control.catalog.uploads.get(upload_id)
    if row is None or not (caller.is_operator or caller.tenant == row.tenant):
        raise not_found("upload", upload_id)
    return row


async def list_of(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
    rows = sorted(control.catalog.uploads_of(tenant), key=_position)
    return json_response(page_of(asked_page(request, tenant, parts=2), rows, _position, _row))


def _position(row: UploadRow) -> Position:
    return f"{row.created_ms:020d}", row.upload_id


def _row(row: UploadRow) -> UploadRowAnswer:
    return UploadRowAnswer(
        row.upload_id, row.name, row.version, row.committed, row.created_ms, row.declared_bytes
    )


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = upload_of(control, request, caller)
    return etags.read(request, row, await _answer(control, row))


async def _answer(control: Control, row: UploadRow) -> UploadAnswer:
    reached = await asyncio.to_thread(offsets, control, row)
    files = [
        FileAnswer(file.path, file.size_bytes, offset)
        for file, offset in zip(row.files, reached, strict=True)
    ]
    return UploadAnswer(
        row.upload_id, row.tenant, row.name, row.version, row.committed, row.created_ms, files
    )


def offsets(control: Control, row: UploadRow) -> list[int]:
    """How much of each file is here. A version that exists needs no byte again."""
    if row.committed or row.ref in control.catalog.models:
        return [file.size_bytes for file in row.files]
    return [_size(part_path(control, row, index)) for index in range(len(row.files))]


def part_path(control: Control, row: UploadRow, index: int) -> Path:
    return control.upload_dir / row.upload_id / f"{index:04d}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# --- send -----------------------------------------------------------------------------------------


async def send(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = upload_of(control, request, caller)
    path = request.match_info["path"]
    index = next((i for i, file in enumerate(row.files) if file.path == path), None)
    if index is None:
        raise not_found("file", path)
    if row.committed:
        raise ApiError(409, "upload_committed", "This upload is committed; declare a new one.")
    busy = (row.upload_id, index)
    if busy in control.busy_parts:
        raise ApiError(
            409,
            "file_busy",
            f"Another request is sending {path!r} now; ask for the offset and go on from there.",
        )
    control.busy_parts.add(busy)
    try:
        offset = await _receive(control, request, caller, row, index)
    finally:
        control.busy_parts.discard(busy)
        control.touched_ms[row.upload_id] = wall_ms()
    return web.Response(status=204, headers={OFFSET_HEADER: str(offset)})


async def _receive(control: Control, request: web.Request, caller: Caller, row: UploadRow, index: int) -> int:
    part, file = part_path(control, row, index), row.files[index]
    have = await asyncio.to_thread(_size, part)
    stated = request.headers.get(OFFSET_HEADER, "")
    if not stated.isascii() or not stated.isdecimal() or len(stated) > 18:
        raise ApiError(
            400,
            "invalid_value",
            f"The header {OFFSET_HEADER} must say at which byte of the file this body starts; now {have}.",
            field=OFFSET_HEADER,
            headers={OFFSET_HEADER: str(have)},
        )
    if int(stated) != have:
        raise ApiError(
            409,
            "wrong_offset",
            f"{file.path} has {have} bytes here, the body starts at {int(stated)}; go on from {have}.",
            field=OFFSET_HEADER,
            headers={OFFSET_HEADER: str(have)},
            should_retry=False,
        )
    if request.content_length is not None and have + request.content_length > file.size_bytes:
        raise _too_long(file)
    try:
        descriptor = await asyncio.to_thread(os.open, part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except FileNotFoundError:
        raise not_found("upload", row.upload_id) from None  # deleted a moment ago

    def check() -> None:
        check_still(control, caller)
        upload_of(control, request, caller)

    try:
        return await _copy(request, check, descriptor, have, file)
    finally:
        # What arrived stays, also when the client left in the middle: it goes on from there.
        await asyncio.to_thread(_sync_and_close, descriptor)


async def _copy(
    request: web.Request, check: Callable[[], None], descriptor: int, have: int, file: OriginFile
) -> int:
    """``check`` refuses who may send no more: a body takes as long as its sender likes. What came before
    that is kept, nothing after it."""
    gathered: list[bytes] = []
    held = 0
    try:
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    piece = await request.content.readany()
            except TimeoutError:
                raise ApiError(
                    408, "body_timeout", f"No byte of {file.path} came for {IDLE_SECONDS:g} s; go on later."
                ) from None
            check()
            if not piece:
                break
            if have + held + len(piece) > file.size_bytes:
                raise _too_long(file)
            gathered.append(piece)
            held += len(piece)
            if held >= WRITE_BYTES:
                data, gathered = b"".join(gathered), []
                have, held = have + held, 0
                await asyncio.to_thread(_write_all, descriptor, data)
    finally:
        if gathered:
            await asyncio.to_thread(_write_all, descriptor, b"".join(gathered))
    return have + held


def _too_long(file: OriginFile) -> ApiError:
    return ApiError(
        413,
        "file_too_long",
        f"{file.path} was declared with {file.size_bytes} bytes and the body goes beyond; declare its size "
        "as it is.",
    )


def _write_all(descriptor: int, data: bytes) -> None:
    check_floor(descriptor, len(data))
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- delete ---------------------------------------------------------------------------------------


async def delete(control: Control, request: web.Request, caller: Caller) -> web.Response:
    async with control.writing:
        row = upload_of(control, request, caller)
        shown = await _answer(control, row)
        etags.check_match(request, row, lambda: shown)
        await control.write([DropUpload(row.upload_id)])
    control.forget_upload(row.upload_id)
    return web.Response(status=204)


ROUTES = (
    Route(
        "POST",
        "/api/v1/tenants/{tenant}/uploads",
        Access.CALLER,
        declare,
        operation=Operation(
            "declareUpload",
            "Declare the files of a version; the same declaration finds the same open upload.",
            [Result(201, "The upload, and how much of each file is here.", UploadAnswer)],
            UploadAsk,
            refusals={
                422: "The files are no model directory; `field` names the file.",
                507: "There is no room for it.",
            },
        ),
    ),
    Route(
        "GET",
        "/api/v1/tenants/{tenant}/uploads",
        Access.CALLER,
        list_of,
        operation=Operation(
            "listUploads",
            "A tenant's uploads, oldest first: open ones, and committed ones for a while.",
            [Result(200, "A page.", Page[UploadRowAnswer])],
            takes=PAGED,
        ),
    ),
    Route(
        "GET",
        "/api/v1/uploads/{upload_id}",
        Access.CALLER,
        show,
        operation=Operation(
            "showUpload",
            "An upload, and how much of each file is here.",
            [Result(200, "The upload.", UploadAnswer, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "PATCH",
        "/api/v1/uploads/{upload_id}/files/{path:.*}",
        Access.CALLER,
        send,
        operation=Operation(
            "sendFile",
            "Append bytes to a declared file.",
            [Result(204, "They are durable.", headers={OFFSET_HEADER: "Bytes of the file that are here."})],
            asks_bytes=True,
            takes=[
                Given(
                    OFFSET_HEADER,
                    Annotated[int, msgspec.Meta(ge=0)],
                    "At which byte of the file the body starts: at the first one that is not here.",
                    Where.HEADER,
                    True,
                )
            ],
            refusals={
                409: "The body does not start where the file ends here, or another request is sending.",
                507: "Control's disk is full.",
            },
        ),
    ),
    Route(
        "DELETE",
        "/api/v1/uploads/{upload_id}",
        Access.CALLER,
        delete,
        operation=Operation(
            "deleteUpload",
            "Give an upload up.",
            [Result(204, "It is gone.")],
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)
