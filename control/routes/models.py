"""Models: list, show, delete, and register an origin that control only points at.

Covers also what uploads share with it: examining a directory off the loop, building the spec of a new
version, and the limits on versions. Does not cover: uploads (``control.routes.uploads``) or how
models are called (``control.routes.router``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from control import etags
from control.catalog import (
    CONTROL_ORIGIN,
    PLAN_MODEL_BYTES_MAX,
    VERSIONS_MAX,
    VERSIONS_PER_TENANT_MAX,
    PutModel,
    arriving,
    model_arrival,
    model_removal,
    plan_bytes,
)
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.model_store import Directory, Examined, ModelStoreError, WrongDigest, examine, open_origin
from control.operations import Given, NameText, Operation, Result, TenantText
from control.pages import PAGED, Page, Position, asked_page, falling, page_of
from control.routes.access import (
    Access,
    Caller,
    Route,
    check_still,
    not_found,
    own_tenant_filter,
    read_json,
    tenant_of,
)
from control.routes.tenants import drop_files
from control.routing import wall_ms
from control.state import Control
from packer.directory import BadDirectory, manifest_digest
from packer.gangs import check_devices
from packer.http import ApiError, json_response
from packer.layout import BadHeader
from packer.types import (
    BATCH_DELAY_MS_MAX,
    BATCH_INPUTS_MAX,
    DEVICES_PER_MODEL_MAX,
    REPLICAS_PER_MODEL_MAX,
    BadValue,
    Batching,
    ModelName,
    ModelRef,
    ModelSpec,
    OriginFile,
    check_batching,
    check_replicas,
    parse_model,
)

# A directory whose content is not acceptable: sending the same again can not help.
REFUSED_CODE = "model_refused"
# A file whose bytes are not what was declared.
WRONG_CODE = "wrong_sha256"


class OriginAsk(msgspec.Struct, forbid_unknown_fields=True):
    name: NameText
    origin: str


def _ranged(low: int, high: int) -> msgspec.Meta:
    """For the document: ``check_batching`` checks it, and says more."""
    return msgspec.Meta(extra_json_schema={"minimum": low, "maximum": high})


class SettingsAsk(msgspec.Struct, forbid_unknown_fields=True):
    """The settings to change; see ``packer.types.Batching``, of ``devices`` ``packer.gangs`` and of
    ``replicas`` ``control.copies``."""

    batch_max: Annotated[int, _ranged(1, BATCH_INPUTS_MAX)] | UnsetType = UNSET
    batch_delay_ms: Annotated[int, _ranged(0, BATCH_DELAY_MS_MAX)] | UnsetType = UNSET
    devices: Annotated[int, _ranged(1, DEVICES_PER_MODEL_MAX)] | UnsetType = UNSET
    replicas: Annotated[int, _ranged(1, REPLICAS_PER_MODEL_MAX)] | UnsetType = UNSET

    @property
    def empty(self) -> bool:
        settings = (self.batch_max, self.batch_delay_ms, self.devices, self.replicas)
        return all(isinstance(each, UnsetType) for each in settings)


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    ref: str
    tenant: str
    name: str
    version: str
    latest: bool
    task: str
    engine: str
    image_bytes: int
    workspace_bytes: int
    origin: str
    created_ms: int
    batch_max: int
    batch_delay_ms: int
    devices: int
    replicas: int
    files: Sequence[OriginFile]
    warnings: Sequence[str] = ()  # about a change that was made, in its answer alone


def model_answer(spec: ModelSpec) -> ModelAnswer:
    return ModelAnswer(
        str(spec.ref),
        spec.ref.tenant,
        spec.ref.name,
        spec.ref.version,
        spec.latest,
        spec.task.value,
        spec.engine,
        spec.image_bytes,
        spec.workspace_bytes,
        spec.origin,
        spec.created_ms,
        spec.batching.inputs_max,
        spec.batching.delay_ms,
        spec.devices,
        spec.replicas,
        spec.files,
    )


# --- shared with uploads --------------------------------------------------------------------------


async def examine_off_loop(
    control: Control,
    directory: Directory,
    declared: Mapping[str, OriginFile] | None = None,
) -> Examined:
    """``examine`` on a thread, a few at a time; what it refuses becomes a 422 that names the file: by
    ``WRONG_CODE`` one that is not what was declared, and can be sent again."""
    async with control.examinations:
        try:
            return await asyncio.to_thread(examine, directory, declared)
        except (BadDirectory, BadHeader) as error:
            path = error.path if isinstance(error, BadDirectory) else error.file
            raise ApiError(422, REFUSED_CODE, str(error), field=path) from None
        except WrongDigest as error:
            raise ApiError(
                422, WRONG_CODE, f"{error}; send this file again from byte 0.", field=error.path
            ) from None
        except (OSError, ModelStoreError) as error:
            control.log_fault("examine", error)
            raise ApiError(
                409, "files_changed", "The files could not be read to their end; are they being changed?"
            ) from None


def new_spec(ref: ModelRef, origin: str, examined: Examined, now_ms: int) -> ModelSpec:
    facts = examined.facts
    return ModelSpec(
        ref=ref,
        origin=origin,
        files=examined.files,
        engine=facts.engine,
        task=facts.task,
        image_bytes=facts.image_bytes,
        chunk_bytes=facts.chunk_bytes,
        workspace_bytes=facts.workspace_bytes,
        created_ms=now_ms,
        signature=facts.signature,
        cuts=facts.cuts,
    )


def check_room(control: Control, spec: ModelSpec) -> None:
    """Refuse a version that would make plans too large. The caller holds ``writing``."""
    catalog = control.catalog
    if len(catalog.of_tenant.get(spec.ref.tenant, {})) >= VERSIONS_PER_TENANT_MAX:
        raise ApiError(
            507,
            "too_many_versions",
            f"This tenant has {VERSIONS_PER_TENANT_MAX} versions, the limit; delete some first.",
            should_retry=False,
        )
    wanted = catalog.plan_model_bytes + plan_bytes(spec)
    if len(catalog.models) >= VERSIONS_MAX or wanted > PLAN_MODEL_BYTES_MAX:
        raise ApiError(
            507,
            "cluster_full",
            f"With this version plans would have {len(catalog.models) + 1} versions and {wanted} bytes, the "
            f"limits are {VERSIONS_MAX} and {PLAN_MODEL_BYTES_MAX}; delete versions first.",
            should_retry=False,
        )


# --- routes ---------------------------------------------------------------------------------------


async def register(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
    ask = await read_json(control, request, caller, OriginAsk)
    name = own_name(tenant, ask.name)
    try:
        url, directory = await asyncio.to_thread(open_origin, ask.origin, control.config.origin_roots)
    except BadDirectory as error:
        raise ApiError(422, REFUSED_CODE, str(error), field=error.path) from None
    examined = await examine_off_loop(control, directory)
    spec = new_spec(ModelRef(tenant, name, manifest_digest(examined.files)), url, examined, wall_ms())
    async with control.writing:
        tenant_of(control, caller, tenant)  # it may have been deleted meanwhile
        check_still(control, caller)  # hashing takes minutes
        known = control.catalog.models.get(spec.ref)
        if known is None:
            check_room(control, spec)
        else:
            # The same content: the version stays what it is, but a registered origin may have moved.
            origin = known.origin if known.origin == CONTROL_ORIGIN else url
            spec = replace(known, origin=origin, cuts=spec.cuts)
        spec = arriving(control.catalog, spec)
        answer = json_response(model_answer(spec), 201 if known is None else 200)
        await control.write([*model_arrival(control.catalog, spec), *caller.remembering(answer)])
    control.record("model_registered", tenant=tenant, model=str(spec.ref), detail=url)
    return answer


def own_name(tenant: str, name: str) -> str:
    """A model's name without tenant and version. Raises ``BadValue``."""
    if "@" in name or "/" in name:
        raise BadValue("name", "is a model's own name, without tenant and version")
    return parse_model(f"{tenant}/{name}", "name")[0].name


async def list_all(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = own_tenant_filter(control, request, caller)
    asked = asked_page(request, tenant, parts=4)
    names = sorted(control.catalog.tenants) if tenant is None else [tenant]
    specs = [spec for name in names for spec in control.catalog.models_of(name)]
    return json_response(page_of(asked, specs, _position, model_answer))


def _position(spec: ModelSpec) -> Position:
    ref = spec.ref
    return ref.tenant, ref.name, falling(spec.created_ms), ref.version


def named_model(
    control: Control, request: web.Request, caller: Caller
) -> tuple[ModelName, str | None, ModelSpec]:
    """The model in the path, written ``tenant/name`` or ``tenant/name@version``, ``/`` or ``%2F``."""
    text = request.match_info["ref"]
    try:
        model, version = parse_model(text)
    except BadValue:
        raise not_found("model", text) from None
    spec = control.catalog.resolve(model, version)
    if spec is None or not (caller.is_operator or caller.tenant == model.tenant):
        raise not_found("model", text)
    return model, version, spec


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    model, version, spec = named_model(control, request, caller)
    return etags.read(request, _state(control, model, version, spec), model_answer(spec))


def _state(
    control: Control, model: ModelName, version: str | None, spec: ModelSpec
) -> tuple[ModelSpec, list[tuple[ModelRef, Batching, int, int]]]:
    """What an ETag is made of: this version, and all others when the name means all of them."""
    versions = control.catalog.versions_of(model) if version is None else []
    return spec, [(each.ref, each.batching, each.devices, each.replicas) for each in versions]


async def change(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """Settings of one version when the path names it, else of all versions of the model. Nodes hear of it
    with the next plan, and running workers go by it from then on."""
    named_model(control, request, caller)  # what is not there is not there, whatever is asked of it
    ask = await read_json(control, request, caller, SettingsAsk)
    if ask.empty:
        raise BadValue("batch_max", "give at least one of batch_max, batch_delay_ms, devices and replicas")
    async with control.writing:
        model, version, spec = named_model(control, request, caller)
        state = _state(control, model, version, spec)
        etags.check_match(request, state, lambda: model_answer(spec))
        if request.match_info["ref"].endswith("@latest"):
            version = spec.ref.version
        # Two settings may only be right together, so each version is checked with both.
        changed = [
            replace(
                old,
                batching=_merged(old.batching, ask),
                devices=_devices(old, ask),
                replicas=_replicas(old, ask),
            )
            for old in ([spec] if version else control.catalog.versions_of(model))
        ]
        await control.write(
            [PutModel(new) for new in changed if new != control.catalog.models[new.ref]],
        )
        model, named, spec = named_model(control, request, caller)
        answer = model_answer(spec)
        state = _state(control, model, named, spec)
    control.record(
        "model_changed",
        tenant=model.tenant,
        model=str(spec.ref) if version else str(model),
        detail=f"batch_max {answer.batch_max}, delay {answer.batch_delay_ms} ms, devices {answer.devices}, "
        f"replicas {answer.replicas}, by key {caller.key_id}",
    )
    return etags.tagged(state, replace(answer, warnings=_warnings(control, ask)))


def _merged(old: Batching, ask: SettingsAsk) -> Batching:
    """Raises ``BadValue``."""
    return check_batching(
        Batching(
            old.inputs_max if isinstance(ask.batch_max, UnsetType) else ask.batch_max,
            old.delay_ms if isinstance(ask.batch_delay_ms, UnsetType) else ask.batch_delay_ms,
        )
    )


def _devices(old: ModelSpec, ask: SettingsAsk) -> int:
    """Raises ``BadValue``. A node takes it up when the version next comes to its devices."""
    return old.devices if isinstance(ask.devices, UnsetType) else check_devices(old, ask.devices)


def _replicas(old: ModelSpec, ask: SettingsAsk) -> int:
    """Raises ``BadValue``."""
    return old.replicas if isinstance(ask.replicas, UnsetType) else check_replicas(ask.replicas)


def _warnings(control: Control, ask: SettingsAsk) -> Sequence[str]:
    """More replicas than nodes are no mistake, since nodes come and go, but worth a word."""
    nodes = len(control.catalog.nodes)
    if isinstance(ask.replicas, UnsetType) or ask.replicas <= max(nodes, 1):
        return ()
    return (f"replicas: {ask.replicas} nodes may hold a copy each, and {nodes} joined until now",)


async def delete(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """One version when the path names it, else all versions of the model."""
    async with control.writing:
        model, version, spec = named_model(control, request, caller)
        state = _state(control, model, version, spec)
        etags.check_match(request, state, lambda: model_answer(spec))
        if request.match_info["ref"].endswith("@latest"):
            version = spec.ref.version
        changes = model_removal(control.catalog, model, version)
        before = control.catalog.versions_of(model)
        await control.write(changes)
    gone = [old for old in before if old.ref not in control.catalog.models]
    for old in gone:
        control.record(
            "model_deleted", tenant=model.tenant, model=str(old.ref), detail=f"by key {caller.key_id}"
        )
    await drop_files(control, gone)
    return web.Response(status=204)


OF_TENANT = Given("tenant", TenantText, "Only this tenant's; a tenant's key sees its own alone.")
MODEL_REFUSALS = {
    409: "The files changed while they were read, or are not complete.",
    422: "The directory is refused; `field` names the file.",
    507: "A limit on versions or on bytes is reached.",
}
ROUTES = (
    Route(
        "POST",
        "/api/v1/tenants/{tenant}/models",
        Access.OPERATOR,
        register,
        operation=Operation(
            "registerModel",
            "Register a directory that lies below an --origin-root, as a version of a model.",
            [
                Result(201, "A new version.", ModelAnswer),
                Result(200, "The version was there already and is the latest now.", ModelAnswer),
            ],
            OriginAsk,
            refusals=MODEL_REFUSALS,
        ),
    ),
    Route(
        "GET",
        "/api/v1/models",
        Access.CALLER,
        list_all,
        operation=Operation(
            "listModels",
            "All versions that the caller may see, by tenant and name, the newest first.",
            [Result(200, "A page.", Page[ModelAnswer])],
            takes=(*PAGED, OF_TENANT),
            refusals={404: "There is no such tenant, or it is not yours."},
        ),
    ),
    Route(
        "GET",
        "/api/v1/models/{ref:.+}",
        Access.CALLER,
        show,
        operation=Operation(
            "showModel",
            "One version; the latest when the reference names none.",
            [Result(200, "The version.", ModelAnswer, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "PATCH",
        "/api/v1/models/{ref:.+}",
        Access.CALLER,
        change,
        operation=Operation(
            "changeModel",
            "Change settings of one version, or of all of the model when the reference names none.",
            [Result(200, "The version, or the latest, as it is now.", ModelAnswer, headers=TAGGED)],
            SettingsAsk,
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
    Route(
        "DELETE",
        "/api/v1/models/{ref:.+}",
        Access.CALLER,
        delete,
        operation=Operation(
            "deleteModel",
            "Delete one version, or all of the model when the reference names none.",
            [Result(204, "It is gone.")],
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)
