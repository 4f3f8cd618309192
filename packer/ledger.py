"""The state of one node and its exact books: who holds which bytes where, who waits, who runs.

Covers: the mutable records that ``residency`` steps over, and the only functions that move bytes
between accounts. Does not cover: when to move them (``residency``), whom to evict (``room``), or proving
that the books add up (``invariants``).

Every byte on a device is in three places at once: the device's account, its tenant's account and the
model's own figure. Only ``hold_device``/``leave_device``/``release_device`` and their ``_copy`` sisters
write them, so that they can not drift apart. A model that needs several devices (``gangs``) lies at a
**place**: a ``Device`` with ``members``, whose account counts all that lies there, while each member is
charged its share.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from packer import estimate, gangs
from packer.ahead import Prefetching
from packer.chosen import Chosen
from packer.decisions import Decision
from packer.estimate import History, Learned
from packer.events import RefusalReason
from packer.intensity import Intensity, Shared
from packer.lending import Shade, Terms, shade_of
from packer.proof import Proof
from packer.quota import Account, InvariantBroken, Tenant
from packer.shares import NodeShares
from packer.shortlist import Shortlist
from packer.types import MIB, ModelRef, ModelSpec, Tier


class State(StrEnum):
    """Where a model stands on its device."""

    ABSENT = "absent"
    RESTORING = "restoring"
    RESIDENT = "resident"
    EVICTING = "evicting"
    PARTIAL = "partial"  # its first chunks are there, and nothing else of it: it can not run


class CopyState(StrEnum):
    """Where a model stands in the host or disk tier."""

    ABSENT = "absent"
    FILLING = "filling"  # bytes are reserved: a pack is being written or a segment filled
    BEGUN = "begun"  # what an interrupted load left of a pack: it takes room and restores nothing
    HELD = "held"
    DROPPING = "dropping"


@dataclass(slots=True, eq=False)
class Copy:
    """A model's copy in the host or disk tier. ``readers`` running restores read it: not droppable."""

    state: CopyState = CopyState.ABSENT
    held_bytes: int = 0
    readers: int = 0
    order: int = 0


@dataclass(frozen=True, slots=True)
class Gains:
    """What one use of a model would cost more, in milliseconds, without its copy in a tier.

    ``fixed_ms`` of ``device_ms`` do not depend on how many bytes are missing there. ``epoch``: what the
    node knew of itself when this was worked out.
    """

    epoch: int
    device_ms: float
    fixed_ms: float
    host_ms: float
    disk_ms: float


@dataclass(slots=True, eq=False)
class Device:
    """A device, its byte account, what is on it in order of arrival, and who may evict from it.

    With ``members`` it is a place: these devices together, in the order of a gang's shares. It has no limit
    of its own and nobody claims it: they do that of its members."""

    name: str
    healthy: bool
    account: Account = field(default_factory=Account)
    models: dict[ModelRef, Model] = field(default_factory=dict)
    claim: Claim | None = None
    partial: bool = True  # can give memory back chunk by chunk
    short: Shortlist[Model] = field(default_factory=Shortlist)
    members: tuple[Device, ...] = ()

    @property
    def parts(self) -> tuple[Device, ...]:
        """The devices that it is."""
        return self.members or (self,)


@dataclass(slots=True, eq=False)
class Claim:
    """The one waiting model that may evict from a device, and since when it waits for room there. A gang
    claims each of its devices."""

    ref: ModelRef
    since_ms: int


@dataclass(frozen=True, slots=True)
class Moving:
    """An idle model that goes to ``target`` as soon as it is evicted, to make room for another one.
    ``payer`` pays for its restore."""

    target: str
    payer: Tenant


@dataclass(frozen=True, slots=True)
class Failure:
    """Why requests for a model are refused without trying, and until when."""

    reason: RefusalReason
    message: str
    until_ms: int


@dataclass(slots=True, eq=False)
class Model:
    """One version on this node.

    ``resident_chunks`` of its chunks, counted from the first, are on the device (or coming, or going):
    eviction takes chunks from the tail, so a prefix describes every state. ``kept_chunks`` of them stay
    when the running restore fails or the running eviction ends; ``leaving_bytes`` are what that frees.
    ``residency`` numbers the stays on a device: a lease of an earlier one pins nothing.
    ``source`` is the tier that the running restore reads, ``moving_bytes`` how much of the image it reads
    there, for the device or for a host copy. Of a gang on its place, ``shares`` are the bytes on each member,
    and ``device_bytes`` their sum. ``wanted``: what the plan says by now, where that is another number of
    devices than it came to; it counts from its next stay on.
    """

    spec: ModelSpec
    tenant: Tenant
    planned: bool = True
    state: State = State.ABSENT
    device: Device | None = None
    device_bytes: int = 0
    shares: tuple[int, ...] = ()
    resident_chunks: int = 0
    kept_chunks: int = 0
    leaving_bytes: int = 0
    source: Tier = Tier.ORIGIN
    moving_bytes: int = 0
    order: int = 0
    started_ms: int = 0
    residency: int = 0
    leases: int = 0
    serving: bool = False  # requests may run although its restore is still under way
    packing: bool = False  # a pack is being written from this stay on the device, or from its load
    host: Copy = field(default_factory=Copy)
    disk: Copy = field(default_factory=Copy)
    opened_bytes: int = 0  # what the pack takes in the host tier; 0 until there was a pack
    read_bytes: int = 0  # what a restore from the pack reads, where its bytes are charged or not
    waiters: dict[str, Waiter] = field(default_factory=dict)
    tries: dict[Tier, int] = field(default_factory=dict)
    not_before_ms: int = 0
    failure: Failure | None = None
    pack_not_before_ms: int = 0
    fill_not_before_ms: int = 0
    reuse: Intensity = field(default_factory=Intensity)
    history: History = field(default_factory=History)
    expected_ms: int = 0  # what the running restore will take, and what that is of its tenant's turns
    pending_us: int = 0
    payer: Tenant | None = None  # of the running restore, where it is a move for another tenant
    counted: bool = False  # of the restores per minute; one that is tried again is not counted again
    gains: Gains | None = None  # as last worked out; None: something that it depends on changed
    shade: Shade = field(init=False)
    name: str = ""  # the ref as text, which breaks ties
    measured_bytes: int | None = None  # what requests need beside the weights, once that was measured
    run_bytes: tuple[int, ...] = ()  # of a gang: the weights of each share
    wanted: ModelSpec | None = None

    def __post_init__(self) -> None:
        self.run_bytes = _run_bytes(self.spec)
        self.name = str(self.spec.ref)
        self.shade = _shade(self, partial=True)

    @property
    def ref(self) -> ModelRef:
        return self.spec.ref

    @property
    def workspace_bytes(self) -> int:
        """What requests need beside the weights: as measured, before that the first estimate. On each of
        its devices."""
        return self.spec.workspace_bytes if self.measured_bytes is None else self.measured_bytes

    @property
    def need_bytes(self) -> int:
        """Bytes it holds on its devices when all of it is there."""
        return self.spec.image_bytes + self.workspace_bytes * self.spec.devices

    @property
    def share_bytes(self) -> int:
        """Bytes that it needs on one device: of a gang, the largest of its shares, so that it does not matter
        which device gets which."""
        if self.spec.devices == 1:
            return self.need_bytes
        return max(self.run_bytes, default=self.spec.image_bytes) + self.workspace_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes it must be given besides those that it holds, to be there as a whole."""
        return self.need_bytes - self.device_bytes

    @property
    def idle(self) -> bool:
        """On a device and in nobody's use: it may be evicted now."""
        state = self.state
        return (state is State.RESIDENT and not self.leases and not self.packing) or state is State.PARTIAL

    @property
    def tier_now(self) -> Tier:
        """Where the weights are as a new request sees it, if it may use the model."""
        return self.source if self.serving else Tier.DEVICE

    @property
    def startable(self) -> bool:
        """Nothing is under way, and not all of it is there: a restore may start."""
        return self.state is State.ABSENT or self.state is State.PARTIAL

    @property
    def empty(self) -> bool:
        """It holds no byte anywhere, so its record may be forgotten."""
        return (
            self.state is State.ABSENT
            and self.host.state is CopyState.ABSENT
            and self.disk.state is CopyState.ABSENT
        )

    def copy(self, tier: Tier) -> Copy:
        return self.host if tier is Tier.HOST else self.disk


def _run_bytes(spec: ModelSpec) -> tuple[int, ...]:
    return gangs.run_bytes(spec) if spec.devices > 1 else ()


def _shade(model: Model, partial: bool) -> Shade:
    spec, alone = model.spec, model.spec.devices == 1
    return shade_of(
        spec.image_bytes, model.workspace_bytes * spec.devices, spec.chunk_bytes, partial and alone
    )


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that was neither granted nor refused yet."""

    request: str
    model: Model
    arrived_ms: int
    deadline_ms: int
    tokens: int = 0  # reserved of the tenant's rate, by the estimate


@dataclass(slots=True, eq=False)
class Lease:
    """A granted request. It pins its model only during the stay that it was granted in."""

    request: str
    model: Model
    residency: int
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Node:
    """All state of one node. Created empty; the first events tell it devices, budgets and the plan."""

    now_ms: int = 0
    has_plan: bool = False
    draining: bool = False
    devices: dict[str, Device] = field(default_factory=dict)
    # Devices together, where gangs lie now, by ``gangs.place_name``.
    places: dict[str, Device] = field(default_factory=dict)
    # The host and disk tiers; their limit is None until it was seen, and nothing is put there before.
    host: Account = field(default_factory=Account)
    disk: Account = field(default_factory=Account)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    # This node's part of the tenants' limits.
    shares: NodeShares = field(default_factory=NodeShares)
    models: dict[ModelRef, Model] = field(default_factory=dict)
    requests: dict[str, Waiter | Lease] = field(default_factory=dict)
    waiting: int = 0
    granted: int = 0
    # Models with waiters, in the order in which their first waiter came.
    queue: dict[ModelRef, Model] = field(default_factory=dict)
    # Models that a claim with no patience left wants gone: leased ones finish, new requests wait.
    condemned: dict[ModelRef, ModelRef] = field(default_factory=dict)
    # Models that left the plan and still hold something.
    removed: dict[ModelRef, Model] = field(default_factory=dict)
    # Models without a pack, resident or coming from their origin: candidates for one.
    unpacked: dict[ModelRef, Model] = field(default_factory=dict)
    # Models with bytes in the host or disk tier.
    in_host: dict[ModelRef, Model] = field(default_factory=dict)
    in_disk: dict[ModelRef, Model] = field(default_factory=dict)
    short_host: Shortlist[Model] = field(default_factory=Shortlist)
    short_disk: Shortlist[Model] = field(default_factory=Shortlist)
    learned: Learned = field(default_factory=Learned)
    # What uses of all models have in common; see ``intensity``.
    shared: Shared = field(default_factory=Shared)
    # Counts up when estimates of models that were never restored themselves have moved; see ``room.gains``.
    gains_epoch: int = 0
    probes_ms: dict[Tier, int] = field(default_factory=dict)
    probe_not_before_ms: int = 0
    # Evict by chunks, as few as are needed; False: whole models only.
    partial: bool = True
    # The policy that an operator chose instead of the keep-index.
    chosen: Chosen | None = None
    # How reserved bytes are lent; see ``lending``.
    terms: Terms = field(default_factory=Terms)
    prefetch: Prefetching = field(default_factory=Prefetching)
    virtual_us: int = 0
    # Tenants with requests in flight, and some that had some lately; each once.
    busy: list[Tenant] = field(default_factory=list)
    order: int = 0
    # (at_ms, sequence, request or "" for a plain wake-up); entries of answered requests go stale.
    timers: list[tuple[int, int, str]] = field(default_factory=list)
    timer_sequence: int = 0
    wake_ms: int | None = None
    # Something changed that may let a waiting model move; cleared when all were looked at.
    dirty: bool = False
    # Models on their way to another device: being evicted, then restored there. To where, and for whom.
    moves: dict[ModelRef, Moving] = field(default_factory=dict)
    # What the last whole step decided and why; nothing here reads it again.
    why: list[Decision] = field(default_factory=list)
    # For ``invariants.check``: what changed since it last looked, and whether everything may have.
    touched: dict[ModelRef, None] = field(default_factory=dict)
    unproven: bool = True
    proof: Proof | None = None

    def account(self, tier: Tier) -> Account:
        return self.host if tier is Tier.HOST else self.disk

    def copies(self, tier: Tier) -> dict[ModelRef, Model]:
        return self.in_host if tier is Tier.HOST else self.in_disk


def next_order(node: Node) -> int:
    node.order += 1
    return node.order


# Raw weights may grow a little when they are sealed: headers, tags, incompressible chunks. A sixteenth
# plus 1 MiB is above what the pack format can ever add.
PACK_GROWTH_PARTS = 16
PACK_FIXED_BYTES = MIB


def pack_room_bytes(model: Model) -> int:
    """What must still be free on disk for a pack of this model to be reserved: its file may be begun."""
    begun_bytes = model.disk.held_bytes if model.disk.state is CopyState.BEGUN else 0
    return max(pack_reservation_bytes(model.spec) - begun_bytes, 0)


def pack_reservation_bytes(spec: ModelSpec) -> int:
    """The most that a pack of this version may take on disk."""
    side = sum(file.size_bytes for file in spec.files if not file.path.endswith(".safetensors"))
    return spec.image_bytes + spec.image_bytes // PACK_GROWTH_PARTS + PACK_FIXED_BYTES + side


def renew_shade(node: Node, model: Model) -> None:
    """The model has other bytes now, or divides differently: the private slice knows nothing of it."""
    model.tenant.slice.forget(model.shade)
    model.shade = shade = _shade(model, node.partial)
    whole = model.state is State.RESTORING or model.state is State.RESIDENT
    shade.real_bytes = shade.size_bytes if whole else model.device_bytes - model.leaving_bytes


def take_spec(node: Node, model: Model, spec: ModelSpec) -> None:
    """What the plan says of a version now. What is on a device is counted by the chunks that it came in, and
    stays on as many devices as it came to."""
    before = model.spec
    if model.device is not None and before.chunk_bytes != spec.chunk_bytes:
        return
    model.wanted = None
    regrouped = before.devices != spec.devices or (spec.devices > 1 and before.cuts != spec.cuts)
    if model.device is not None and regrouped:
        model.wanted = spec
        spec = replace(spec, devices=before.devices, cuts=before.cuts)
    model.spec, model.run_bytes = spec, _run_bytes(spec)
    same = before.chunk_bytes == spec.chunk_bytes and before.image_bytes == spec.image_bytes
    if not same or before.devices != spec.devices:
        renew_shade(node, model)


# --- device bytes ---------------------------------------------------------------------------------


def prefix_bytes(spec: ModelSpec, chunks: int) -> int:
    """Bytes of the first chunks of a version."""
    return sum(spec.chunk_bytes[:chunks])


def hold_device(node: Node, model: Model, device: Device) -> None:
    """Take all bytes of a model on a device, besides those that it holds there, before the order that
    brings them."""
    if model.device not in (None, device):
        raise InvariantBroken(f"{model.ref} has chunks on another device than {device.name}")
    nbytes = model.missing_bytes
    device.account.hold(nbytes)
    model.tenant.device.hold(nbytes)
    model.tenant.slice.pay(model.shade, node.terms)
    if device.members:
        _hold_shares(node, model, device)
    model.device = device
    model.device_bytes += nbytes
    model.resident_chunks = len(model.spec.chunk_bytes)
    device.models[model.ref] = model
    _changed(node, model)


def _hold_shares(node: Node, model: Model, place: Device) -> None:
    node.places[place.name] = place
    model.shares = tuple(nbytes + model.workspace_bytes for nbytes in model.run_bytes)
    for member, share in zip(place.members, model.shares, strict=True):
        member.account.hold(share)
        member.models[model.ref] = model


def leave_device(node: Node, model: Model, keep_chunks: int) -> None:
    """Note that the bytes behind the first chunks were ordered away; held until ``release_device``."""
    assert model.device is not None
    nbytes = model.device_bytes - prefix_bytes(model.spec, keep_chunks)
    model.device.account.leaving_bytes += nbytes
    model.tenant.device.leaving_bytes += nbytes
    for member, share in zip(model.device.members, model.shares, strict=True):
        member.account.leaving_bytes += share
    model.kept_chunks, model.leaving_bytes = keep_chunks, nbytes
    if node.chosen is not None and not keep_chunks:
        node.chosen.note_gone(Tier.DEVICE, model.ref, node.now_ms)
    model.tenant.slice.keep(model.shade, model.device_bytes - nbytes)
    _changed(node, model)


def release_device(node: Node, model: Model, kept_chunks: int) -> None:
    """The bytes behind the first chunks are gone, ordered away before or not: the model is partial, or,
    with none kept, absent."""
    device = model.device
    assert device is not None
    kept_bytes = prefix_bytes(model.spec, kept_chunks)
    surprising_bytes = model.device_bytes - kept_bytes - model.leaving_bytes
    for account in (device.account, model.tenant.device):
        account.release(model.leaving_bytes, leaving=True)
        account.release(surprising_bytes, leaving=False)
    if surprising_bytes:
        model.tenant.slice.lose(model.shade, kept_bytes)
    for member, share in zip(device.members, model.shares, strict=True):
        member.account.release(share, leaving=model.leaving_bytes > 0)
        del member.models[model.ref]
    model.shares = ()
    model.device_bytes, model.resident_chunks = kept_bytes, kept_chunks
    model.kept_chunks = model.leaving_bytes = model.order = 0
    model.state = State.PARTIAL if kept_chunks else State.ABSENT
    if not kept_chunks:
        del device.models[model.ref]
        model.device = None
        if device.members and not device.models:
            del node.places[device.name]
        if node.chosen is not None:
            node.chosen.note_gone(Tier.DEVICE, model.ref, node.now_ms)
        if model.wanted is not None:
            take_spec(node, model, model.wanted)
    _changed(node, model)


def measure_workspace(node: Node, ref: ModelRef, workspace_bytes: int) -> None:
    """Correct what requests of a model need beside its weights, at once where it is held and fits.

    What does not fit is held from the next stay on: the request that took it has ended, and no budget is
    ever exceeded in the books.
    """
    model = node.models.get(ref)
    if model is None or workspace_bytes < 0:
        return
    device = model.device
    model.measured_bytes = workspace_bytes
    model.tenant.slice.measure(model.shade, model.need_bytes)
    node.dirty = True
    if device is None or model.state not in (State.RESTORING, State.RESIDENT):
        return  # a part holds no workspace, and what leaves goes as it was held
    # Against what it holds: a plan may have changed the estimate since it came.
    more_bytes = model.missing_bytes
    shares = tuple(nbytes + workspace_bytes for nbytes in model.run_bytes) if device.members else ()
    changes = [(device.account, more_bytes), (model.tenant.device, more_bytes)]
    for member, share, before in zip(device.members, shares, model.shares, strict=True):
        changes.append((member.account, share - before))
    if more_bytes > 0 and not all(account.fits(nbytes) for account, nbytes in changes):
        return
    for account, nbytes in changes:
        if nbytes > 0:
            account.hold(nbytes)
        else:
            account.release(-nbytes, leaving=False)
    model.device_bytes += more_bytes
    model.shares = shares
    _changed(node, model)


def _changed(node: Node, model: Model) -> None:
    """Whatever was worked out from the model's bytes and copies is out of date."""
    model.gains = None
    node.touched[model.ref] = None


# --- bytes of copies ------------------------------------------------------------------------------


def hold_copy(node: Node, model: Model, tier: Tier, nbytes: int) -> None:
    """Reserve so much more room for a copy that is about to be made."""
    node.account(tier).hold(nbytes)
    model.tenant.account(tier).hold(nbytes)
    copy = model.copy(tier)
    copy.state, copy.held_bytes = CopyState.FILLING, copy.held_bytes + nbytes
    node.copies(tier)[model.ref] = model
    _changed(node, model)


def settle_copy(node: Node, model: Model, tier: Tier, nbytes: int) -> None:
    """A complete copy of ``nbytes`` exists, reserved or found; what is too much is shed later."""
    copy = model.copy(tier)
    for account in (node.account(tier), model.tenant.account(tier)):
        account.release(copy.held_bytes, leaving=False)
        account.hold_found(nbytes)
    copy.state, copy.held_bytes, copy.order = CopyState.HELD, nbytes, 0
    node.copies(tier)[model.ref] = model
    node.prefetch.spare_of = -1
    _changed(node, model)


def charge_copy(node: Node, model: Model, tier: Tier, nbytes: int) -> None:
    """A copy is charged other bytes than before: it pays for what another one left behind, or for less of it.
    They are there already, so they are taken whether they fit or not."""
    copy = model.copy(tier)
    if copy.state not in (CopyState.HELD, CopyState.DROPPING):
        raise InvariantBroken(f"{model.ref} is charged {nbytes} bytes of the {tier} tier and is not in it")
    grown_bytes = nbytes - copy.held_bytes
    for account in (node.account(tier), model.tenant.account(tier)):
        account.hold_found(grown_bytes)
        if copy.state is CopyState.DROPPING:
            account.leaving_bytes += grown_bytes
    copy.held_bytes = nbytes
    _changed(node, model)


def keep_begun(node: Node, model: Model, nbytes: int) -> None:
    """Of the pack that was being written, or is found at start-up, so much lies on disk, unfinished."""
    settle_copy(node, model, Tier.DISK, nbytes)
    model.disk.state = CopyState.BEGUN


def leave_copy(node: Node, model: Model, tier: Tier) -> None:
    """Note that the copy was ordered away; its bytes are held until ``release_copy``."""
    copy = model.copy(tier)
    node.account(tier).leaving_bytes += copy.held_bytes
    model.tenant.account(tier).leaving_bytes += copy.held_bytes
    copy.state = CopyState.DROPPING
    if node.chosen is not None:
        node.chosen.note_gone(tier, model.ref, node.now_ms)
    _changed(node, model)


def release_copy(node: Node, model: Model, tier: Tier) -> None:
    """The copy is gone, or was never made."""
    copy = model.copy(tier)
    leaving = copy.state is CopyState.DROPPING
    node.account(tier).release(copy.held_bytes, leaving)
    model.tenant.account(tier).release(copy.held_bytes, leaving)
    copy.state, copy.held_bytes, copy.order = CopyState.ABSENT, 0, 0
    node.copies(tier).pop(model.ref, None)
    node.prefetch.spare_of = -1
    if node.chosen is not None:
        node.chosen.note_gone(tier, model.ref, node.now_ms)
    _changed(node, model)


def know_copies(node: Node, model: Model, cached: bool | None = None) -> None:
    """Tell the estimate what a restore from each tier would read now. ``cached``: the pack's file is."""
    disk_bytes = model.read_bytes if model.disk.state is CopyState.HELD else 0
    estimate.know_copies(
        node.learned,
        model.history,
        image_bytes=model.spec.image_bytes,
        disk_bytes=disk_bytes,
        host_bytes=model.opened_bytes,
        remote=not model.spec.origin.startswith("file:"),
        cached=cached,
    )
