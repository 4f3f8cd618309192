"""Committing an upload: a complete one becomes an immutable version of its model, the latest.

Covers: checking that every byte is there and right, keeping the files, and both in the order in which a crash
leaves either no version or a whole one. Does not cover: declaring and sending (``control.routes.uploads``),
what a directory may contain (``packer.directory``), or keeping files (``control.model_store``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from aiohttp import web
from msgspec import Meta

from control.catalog import CONTROL_ORIGIN, Change, DropUpload, PutUpload, UploadRow, arriving, model_arrival
from control.model_store import ModelStoreError, PartFiles
from control.operations import Given, Operation, Result
from control.routes.access import (
    Access,
    Caller,
    Route,
    check_still,
    not_found,
    render_error,
    whole_number,
)
from control.routes.models import (
    MODEL_REFUSALS,
    REFUSED_CODE,
    WRONG_CODE,
    ModelAnswer,
    check_room,
    examine_off_loop,
    model_answer,
    new_spec,
)
from control.routes.uploads import check_floor, offsets, part_path, upload_of
from control.routing import wall_ms
from control.state import Control
from packer.gangs import check_devices
from packer.http import ApiError, json_response
from packer.types import DEVICES_PER_MODEL_MAX, REPLICAS_PER_MODEL_MAX, ModelSpec


async def commit(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = upload_of(control, request, caller)
    async with control.ref_lock(row.ref):
        row = upload_of(control, request, caller)  # another commit of the same may have ended just now
        if row.ref in control.catalog.models:
            return await _commit_known(control, request, caller, row)
        if row.committed:
            raise ApiError(
                409, "version_deleted", f"{row.ref} was committed and then deleted; declare the upload again."
            )
        busy = [index for upload_id, index in control.busy_parts if upload_id == row.upload_id]
        missing = [
            file.path
            for file, offset in zip(row.files, await asyncio.to_thread(offsets, control, row), strict=True)
            if offset != file.size_bytes
        ]
        if busy or missing:
            name = missing[0] if missing else row.files[busy[0]].path
            raise ApiError(
                409,
                "upload_incomplete",
                f"{name} is not complete ({len(missing)} files are not); send the rest and commit again.",
                field=name,
                should_retry=False,
            )
        return await _commit_new(control, request, caller, row)


def _asked(request: web.Request, spec: ModelSpec) -> ModelSpec:
    """With the settings that the commit names. Raises ``BadValue``, before anything is a version."""
    devices = whole_number(request, "devices", spec.devices, DEVICES_PER_MODEL_MAX, 1)
    replicas = whole_number(request, "replicas", spec.replicas, REPLICAS_PER_MODEL_MAX, 1)
    if devices != spec.devices:
        check_devices(spec, devices)
    return replace(spec, devices=devices, replicas=replicas)


async def _commit_known(
    control: Control, request: web.Request, caller: Caller, row: UploadRow
) -> web.Response:
    """The version exists. A first commit of this upload makes it latest again; a repeated one does not."""
    async with control.writing:
        spec = control.catalog.models.get(row.ref)
        if spec is None:
            raise not_found("model", str(row.ref))
        if not row.committed and row.upload_id in control.catalog.uploads:
            spec = _asked(request, replace(spec, latest=True))
            answer = json_response(model_answer(spec))
            changes = [*model_arrival(control.catalog, spec), *_committed(control, row)]
            await control.write([*changes, *caller.remembering(answer)])
        else:
            answer = json_response(model_answer(spec))
    control.forget_upload(row.upload_id)
    return answer


async def _commit_new(control: Control, request: web.Request, caller: Caller, row: UploadRow) -> web.Response:
    # Part files that are empty may not exist: nothing was ever sent for them.
    parts = {file.path: part_path(control, row, index) for index, file in enumerate(row.files)}
    await asyncio.to_thread(_touch, list(parts.values()))
    declared = {file.path: file for file in row.files}

    try:
        examined = await examine_off_loop(control, PartFiles(parts), declared)
    except ApiError as error:
        if error.code == REFUSED_CODE:
            await _drop(control, row, caller.remembering(render_error(request, error)))
        if error.code == WRONG_CODE and error.field is not None:
            # The refusal is kept before its effect: between them a crash leaves a file that is refused again.
            if kept := caller.remembering(render_error(request, error)):
                async with control.writing:
                    await control.write(kept)
            await asyncio.to_thread(parts[error.field].unlink, missing_ok=True)
        raise
    spec = new_spec(row.ref, CONTROL_ORIGIN, examined, wall_ms())
    _asked(request, arriving(control.catalog, spec))
    try:
        await asyncio.to_thread(check_floor, control.upload_dir, row.declared_bytes)
        await asyncio.to_thread(control.models.put, row.ref, parts)
        async with control.writing:
            upload_of(control, request, caller)  # it, or its tenant, may have been deleted meanwhile
            check_still(control, caller)  # hashing takes minutes
            check_room(control, spec)
            spec = _asked(request, arriving(control.catalog, spec))
            answer = json_response(model_answer(spec), 201)
            changes = [*model_arrival(control.catalog, spec), *_committed(control, row)]
            await control.write([*changes, *caller.remembering(answer)])
    except BaseException as error:
        if row.ref not in control.catalog.models:
            await asyncio.to_thread(control.models.drop, row.ref)
        if isinstance(error, ModelStoreError):
            upload_of(control, request, caller)  # its parts went because it was deleted: say that
        raise
    control.record("model_pushed", tenant=row.tenant, model=str(row.ref), detail=f"by key {caller.key_id}")
    control.forget_upload(row.upload_id)
    return answer


def _committed(control: Control, row: UploadRow) -> list[Change]:
    """The upload is committed; earlier ones of the same version are no longer worth remembering."""
    earlier: list[Change] = [
        DropUpload(other.upload_id)
        for other in control.catalog.uploads_of(row.tenant)
        if other.committed and other.ref == row.ref and other.upload_id != row.upload_id
    ]
    return [*earlier, PutUpload(replace(row, committed=True))]


def _touch(parts: Sequence[Path]) -> None:
    for part in parts:
        try:
            part.touch(mode=0o600)
        except FileNotFoundError:
            return  # the upload was deleted; reading it says so


async def _drop(control: Control, row: UploadRow, remembered: Sequence[Change]) -> None:
    """Forget an upload whose content is refused: its digests are fixed, so it can never become a version.

    Kept, it would hold its bytes and one of the tenant's open uploads until it is swept.
    """
    async with control.writing:
        if row.upload_id in control.catalog.uploads:
            await control.write([DropUpload(row.upload_id), *remembered])
    control.forget_upload(row.upload_id)


ROUTES = (
    Route(
        "POST",
        "/api/v1/uploads/{upload_id}/commit",
        Access.CALLER,
        commit,
        operation=Operation(
            "commitUpload",
            "Make a complete upload a version of its model, the latest. With settings that do not do for it "
            "it becomes none; without any it has those of the latest version before it.",
            [
                Result(201, "A new version.", ModelAnswer),
                Result(200, "The version was there already.", ModelAnswer),
            ],
            takes=[
                Given("devices", Annotated[int, Meta(ge=1, le=DEVICES_PER_MODEL_MAX)], "See changeModel."),
                Given("replicas", Annotated[int, Meta(ge=1, le=REPLICAS_PER_MODEL_MAX)], "See changeModel."),
            ],
            refusals=MODEL_REFUSALS,
        ),
    ),
)
