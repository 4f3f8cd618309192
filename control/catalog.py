"""Everything control must not forget, as values in memory, and the changes that may be made to it.

Covers: the rows (tenants, keys, models, uploads, nodes, tokens), the closed list of changes, how a
change acts on the copy in memory, and the pure questions asked of it (versions of a model, what a
tenant's removal takes with it, the parts of a plan). Does not cover: how changes become durable
(``control.store``), or who may ask for one (``control.routes``).

The copy is owned by the event loop: ``control.server`` makes a list of changes durable first and
applies it here afterwards, so nothing is ever visible that a crash could take back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec

from packer.gangs import run_ends
from packer.types import KeySpec, ModelName, ModelRef, ModelSpec, OriginFile, TenantQuota, TenantSpec
from packer.wire import PeerSpec

# Bounds of one cluster. A plan names every tenant, key and version, and must stay far below
# packer.wire.MESSAGE_BYTES_MAX; these keep the counts, PLAN_BYTES_MAX keeps the sum.
TENANTS_MAX = 10_000
KEYS_PER_TENANT_MAX = 256
KEYS_MAX = 50_000
VERSIONS_PER_TENANT_MAX = 2_000
VERSIONS_MAX = 20_000
UPLOADS_PER_TENANT_MAX = 16  # open at once; an abandoned one is swept after config's upload life
NODES_MAX = 10_000  # twice what one control process was seen to keep up with (scripts/bench_control.py)
ROUTERS_MAX = 64  # every plan names them; one carries thousands of requests a second
# Where nodes are whose tokens name no pool.
POOL_DEFAULT = "default"
TOKENS_MAX = 10_000  # join tokens alive at once: a whole fleet may join within the hour of its tokens
# Answers kept for repetitions; beyond it the oldest of the same owner go. A tenant declares and commits
# uploads, operators set up a cluster's tenants in one go. Sealed, most have 1 KB, none more than 64 KiB.
REPLAYS_PER_TENANT_MAX = 256
REPLAYS_OF_OPERATORS_MAX = 20_000
# Leaves room below the 64 MiB of a message for the tenants and keys, 250 bytes each at most.
PLAN_MODEL_BYTES_MAX = 48 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TenantRow:
    tenant: str
    created_ms: int


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An API key; ``tenant`` is None for an operator's. Only the hash of the secret is kept."""

    key_id: str
    secret_sha256: str
    tenant: str | None
    label: str
    created_ms: int
    expires_ms: int | None


@dataclass(frozen=True, slots=True)
class UploadRow:
    """A declared upload. ``version`` is the digest of the declaration, known before any byte comes.

    ``committed`` uploads are kept for a while, so that a commit whose answer was lost can be repeated.
    """

    upload_id: str
    tenant: str
    name: str
    version: str
    files: tuple[OriginFile, ...]
    created_ms: int
    committed: bool = False

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.tenant, self.name, self.version)

    @property
    def declared_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A joined node. ``incarnation`` differs when a removed node joins again under the same name."""

    node: str
    incarnation: str
    key_sha256: str  # of the SubjectPublicKeyInfo that its certificates carry
    gateway_url: str  # as told at the join; the newest is in its report
    joined_ms: int
    acked_seq: int = 0  # highest spooled record stored, of those that ``spool`` counts
    spool: str = ""  # as told by the node; empty: a node of an earlier release
    pool: str = POOL_DEFAULT  # as the token said that it last joined with
    draining: bool = False  # its plan tells it to take no more requests


@dataclass(frozen=True, slots=True)
class RouterRow:
    """A joined router that is a process of its own. ``incarnation`` differs when it joins again."""

    router: str
    incarnation: str
    key_sha256: str
    joined_ms: int


class Joiner(StrEnum):
    """What a join token is for."""

    NODE = "node"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A join token. ``used_key_sha256`` is the public key that redeemed it, which may do so again. ``node``
    and ``used_node`` are names of whatever it is for."""

    token_id: str
    secret_sha256: str
    node: str | None  # the only node name it may be redeemed for
    created_ms: int
    expires_ms: int
    used_key_sha256: str | None = None
    used_node: str | None = None
    pool: str = POOL_DEFAULT
    joiner: Joiner = Joiner.NODE


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """A kept answer (see ``control.idempotency``). Only in the database, never in memory."""

    slot: str
    owner: str  # the tenant it is counted for; empty: operators
    fingerprint: str
    made_ms: int
    sealed: bytes


# --- changes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutTenant:
    row: TenantRow


@dataclass(frozen=True, slots=True)
class DropTenant:
    """Removes the tenant and its quota only; ``tenant_removal`` lists everything that goes with it."""

    tenant: str


@dataclass(frozen=True, slots=True)
class PutKey:
    row: KeyRow


@dataclass(frozen=True, slots=True)
class DropKey:
    key_id: str


@dataclass(frozen=True, slots=True)
class PutQuota:
    tenant: str
    quota: TenantQuota


@dataclass(frozen=True, slots=True)
class PutModel:
    spec: ModelSpec


@dataclass(frozen=True, slots=True)
class DropModel:
    ref: ModelRef


@dataclass(frozen=True, slots=True)
class PutUpload:
    row: UploadRow


@dataclass(frozen=True, slots=True)
class DropUpload:
    upload_id: str


@dataclass(frozen=True, slots=True)
class PutNode:
    row: NodeRow


@dataclass(frozen=True, slots=True)
class DropNode:
    node: str


@dataclass(frozen=True, slots=True)
class DrainNode:
    """Or no longer. Not the whole row: what was spooled is counted in it meanwhile."""

    node: str
    draining: bool


@dataclass(frozen=True, slots=True)
class PutRouter:
    row: RouterRow


@dataclass(frozen=True, slots=True)
class DropRouter:
    router: str


@dataclass(frozen=True, slots=True)
class PutToken:
    row: TokenRow


@dataclass(frozen=True, slots=True)
class DropToken:
    token_id: str


@dataclass(frozen=True, slots=True)
class PutReplay:
    row: ReplayRow


@dataclass(frozen=True, slots=True)
class DropReplays:
    """Those that were made before."""

    before_ms: int


@dataclass(frozen=True, slots=True)
class AgeUsage:
    """What was used long ago is kept by the day, or no more; see ``control.usage_tables``."""

    now_ms: int


Change = (
    PutTenant
    | DropTenant
    | PutKey
    | DropKey
    | PutQuota
    | PutModel
    | DropModel
    | PutUpload
    | DropUpload
    | PutNode
    | DropNode
    | DrainNode
    | PutRouter
    | DropRouter
    | PutToken
    | DropToken
    | PutReplay
    | DropReplays
    | AgeUsage
)


def changes_plan(change: Change) -> bool:
    """Whether nodes must hear of it. Operator keys, uploads and join tokens are not in a plan; nodes are,
    because they give packs to each other and to nobody else, and routers, because no others may call."""
    match change:
        case PutKey(row):
            return row.tenant is not None
        case PutTenant() | DropTenant() | DropKey() | PutQuota() | PutModel() | DropModel():
            return True
        case PutNode() | DropNode() | DrainNode() | PutRouter() | DropRouter():
            return True
        case _:
            return False


@dataclass(slots=True)
class Catalog:
    """The rows in memory. Every look-up on a request's path is one dictionary access."""

    tenants: dict[str, TenantRow] = field(default_factory=dict)
    keys: dict[str, KeyRow] = field(default_factory=dict)
    quotas: dict[str, TenantQuota] = field(default_factory=dict)
    models: dict[ModelRef, ModelSpec] = field(default_factory=dict)
    uploads: dict[str, UploadRow] = field(default_factory=dict)
    nodes: dict[str, NodeRow] = field(default_factory=dict)
    tokens: dict[str, TokenRow] = field(default_factory=dict)
    routers: dict[str, RouterRow] = field(default_factory=dict)
    # Derived, kept by ``apply``: the keys of each tenant, the latest version of each model, all versions
    # of each tenant, the bytes of all specs in a plan, and the plan's number at which a key or version was
    # last put.
    key_ids: dict[str, dict[str, None]] = field(default_factory=dict)
    latest: dict[ModelName, ModelRef] = field(default_factory=dict)
    of_tenant: dict[str, dict[ModelRef, None]] = field(default_factory=dict)
    spec_bytes: dict[ModelRef, int] = field(default_factory=dict)
    plan_model_bytes: int = 0
    key_seq: dict[str, int] = field(default_factory=dict)
    key_specs: dict[str, KeySpec] = field(default_factory=dict)  # what a caller's key is checked against
    model_seq: dict[ModelRef, int] = field(default_factory=dict)
    replicated: dict[ModelRef, None] = field(default_factory=dict)  # versions that may have copies

    def apply(self, change: Change, seq: int) -> None:
        """Do one change; ``seq`` is the number of the first plan that has it."""
        match change:
            case PutTenant(row):
                self.tenants[row.tenant] = row
                self.quotas.setdefault(row.tenant, TenantQuota())
            case DropTenant(tenant):
                self.tenants.pop(tenant, None)
                self.quotas.pop(tenant, None)
            case PutKey(row):
                self.keys[row.key_id] = row
                if row.tenant is not None:
                    self.key_ids.setdefault(row.tenant, {})[row.key_id] = None
                self.key_seq[row.key_id] = seq
                self.key_specs[row.key_id] = KeySpec(
                    row.key_id, row.secret_sha256, row.tenant or "", row.expires_ms
                )
            case DropKey(key_id):
                self._drop_key(key_id)
                self.key_seq.pop(key_id, None)
                self.key_specs.pop(key_id, None)
            case PutQuota(tenant, quota):
                self.quotas[tenant] = quota
            case PutModel(spec):
                self._put_model(spec, seq)
            case DropModel(ref):
                self._drop_model(ref)
            case PutUpload(row):
                self.uploads[row.upload_id] = row
            case DropUpload(upload_id):
                self.uploads.pop(upload_id, None)
            case PutNode(row):
                self.nodes[row.node] = row
            case DropNode(node):
                self.nodes.pop(node, None)
            case DrainNode(node, draining):
                self.nodes[node] = replace(self.nodes[node], draining=draining)
            case PutRouter(row):
                self.routers[row.router] = row
            case DropRouter(router):
                self.routers.pop(router, None)
            case PutToken(row):
                self.tokens[row.token_id] = row
            case DropToken(token_id):
                self.tokens.pop(token_id, None)
            case PutReplay() | DropReplays() | AgeUsage():
                pass  # asked of the database alone

    def _drop_key(self, key_id: str) -> None:
        row = self.keys.pop(key_id, None)
        if row is not None and row.tenant is not None:
            ids = self.key_ids[row.tenant]
            del ids[key_id]
            if not ids:
                del self.key_ids[row.tenant]

    def _put_model(self, spec: ModelSpec, seq: int) -> None:
        known = self.models.get(spec.ref)
        if known is not None and known != spec == replace(
            known, batching=spec.batching, devices=spec.devices, replicas=spec.replicas
        ):
            seq = self.model_seq[spec.ref]  # a node that has not heard of it yet answers as well
        self._drop_model(spec.ref)
        self.models[spec.ref] = spec
        self.model_seq[spec.ref] = seq
        self.of_tenant.setdefault(spec.ref.tenant, {})[spec.ref] = None
        self.spec_bytes[spec.ref] = plan_bytes(spec)
        self.plan_model_bytes += self.spec_bytes[spec.ref]
        if spec.replicas > 1:
            self.replicated[spec.ref] = None
        if spec.latest:
            self.latest[spec.ref.model] = spec.ref

    def _drop_model(self, ref: ModelRef) -> None:
        if self.models.pop(ref, None) is None:
            return
        self.model_seq.pop(ref, None)
        self.replicated.pop(ref, None)
        self.plan_model_bytes -= self.spec_bytes.pop(ref)
        versions = self.of_tenant[ref.tenant]
        del versions[ref]
        if not versions:
            del self.of_tenant[ref.tenant]
        if self.latest.get(ref.model) == ref:
            del self.latest[ref.model]

    # --- questions ---

    def resolve(self, model: ModelName, version: str | None) -> ModelSpec | None:
        """The version named, or the latest one."""
        ref = ModelRef(model.tenant, model.name, version) if version else self.latest.get(model)
        return self.models.get(ref) if ref else None

    def versions_of(self, model: ModelName) -> list[ModelSpec]:
        """All versions of one model, newest first."""
        refs = [ref for ref in self.of_tenant.get(model.tenant, {}) if ref.name == model.name]
        return sorted((self.models[ref] for ref in refs), key=lambda spec: -spec.created_ms)

    def models_of(self, tenant: str) -> list[ModelSpec]:
        """All versions of one tenant, by name and then newest first."""
        specs = [self.models[ref] for ref in self.of_tenant.get(tenant, {})]
        return sorted(specs, key=lambda spec: (spec.ref.name, -spec.created_ms, spec.ref.version))

    def keys_of(self, tenant: str) -> list[KeyRow]:
        rows = [self.keys[key_id] for key_id in self.key_ids.get(tenant, {})]
        return sorted(rows, key=lambda row: (row.created_ms, row.key_id))

    def uploads_of(self, tenant: str) -> list[UploadRow]:
        return [row for row in self.uploads.values() if row.tenant == tenant]

    def stored_bytes(self, tenant: str) -> int:
        """Bytes of the tenant in control's own store: its versions and what open uploads declared."""
        models = sum(
            file.size_bytes
            for spec in self.models_of(tenant)
            if spec.origin == CONTROL_ORIGIN
            for file in spec.files
        )
        return models + sum(row.declared_bytes for row in self.uploads_of(tenant) if not row.committed)

    def plan_parts(self) -> tuple[tuple[TenantSpec, ...], tuple[KeySpec, ...], tuple[ModelSpec, ...]]:
        """Tenants, keys and versions as nodes see them, in a stable order."""
        tenants = tuple(TenantSpec(name, self.quotas[name]) for name in sorted(self.tenants))
        keys = tuple(
            KeySpec(row.key_id, row.secret_sha256, row.tenant, row.expires_ms)
            for _, row in sorted(self.keys.items())
            if row.tenant is not None
        )
        return tenants, keys, tuple(spec for _, spec in sorted(self.models.items()))

    def plan_peers(self) -> tuple[PeerSpec, ...]:
        """All nodes of the cluster, in a stable order."""
        return tuple(PeerSpec(row.node, row.key_sha256) for _, row in sorted(self.nodes.items()))

    def plan_routers(self) -> tuple[PeerSpec, ...]:
        """All routers that are processes of their own, in a stable order."""
        return tuple(PeerSpec(row.router, row.key_sha256) for _, row in sorted(self.routers.items()))


# A version whose files lie in control's own store.
CONTROL_ORIGIN = "control:"


def plan_bytes(spec: ModelSpec) -> int:
    """Bytes that this version takes in an encoded plan."""
    return len(msgspec.json.encode(spec)) + 1


def model_arrival(catalog: Catalog, spec: ModelSpec) -> list[Change]:
    """Changes that make ``spec`` the latest version of its model."""
    older = catalog.resolve(spec.ref.model, None)
    changes: list[Change] = []
    if older is not None and older.ref != spec.ref:
        changes.append(PutModel(replace(older, latest=False)))
    changes.append(PutModel(replace(spec, latest=True)))
    return changes


def arriving(catalog: Catalog, spec: ModelSpec) -> ModelSpec:
    """``spec`` as the latest version of its model. One that is new has the settings of the latest before it:
    they were made for the model, whatever its weights; but what can not be cut into as many parts is for one
    device."""
    older = catalog.resolve(spec.ref.model, None)
    if older is not None and spec.ref not in catalog.models:
        fits = run_ends(spec.chunk_bytes, spec.cuts, older.devices)
        devices = older.devices if fits else 1
        spec = replace(spec, batching=older.batching, devices=devices, replicas=older.replicas)
    return replace(spec, latest=True)


def model_removal(catalog: Catalog, model: ModelName, version: str | None) -> list[Change]:
    """Changes that remove one version, or all when ``version`` is None.

    When the latest version goes, the newest of the others becomes latest.
    """
    versions = catalog.versions_of(model)
    gone = [spec for spec in versions if version is None or spec.ref.version == version]
    changes: list[Change] = [DropModel(spec.ref) for spec in gone]
    left = [spec for spec in versions if spec not in gone]
    if left and any(spec.latest for spec in gone):
        changes.append(PutModel(replace(left[0], latest=True)))
    return changes


def tenant_removal(catalog: Catalog, tenant: str) -> list[Change]:
    """Everything that goes with a tenant: keys, versions, uploads, and the tenant with its quota."""
    changes: list[Change] = [DropKey(row.key_id) for row in catalog.keys_of(tenant)]
    changes += [DropModel(spec.ref) for spec in catalog.models_of(tenant)]
    changes += [DropUpload(row.upload_id) for row in catalog.uploads_of(tenant)]
    changes.append(DropTenant(tenant))
    return changes
