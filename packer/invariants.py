"""The proof, after every step, that the node's books add up and its promises hold.

Covers: ``check(node)`` and the rules of DESIGN section 4 that can be read off one state. Does not cover:
rules about sequences (each request answered exactly once, liveness): the simulation in the tests
watches those.

Every ledger is compared with sums made from the models alone, never from other ledgers. ``check`` looks
at the models that the step touched and at a few others in turn, and carries the sums over from the step
before, so that its time does not grow with the number of models; a change that forgot to say what it
touched is found within one turn around. ``check(node, full=True)`` makes all sums anew and recounts the
requests; facts that may touch everything (a plan, a device, a budget) cause it by themselves.

``check_after(node, event, actions)`` is what a running node calls. After a request that was granted at once,
or an end of a lease, from which nothing else follows, it looks at what such a step alone changes: the lease,
what it stands for, and the counts of requests. The models that these steps touched are proven by ``check``
with the next step of any other kind, or after ``QUIET_STEPS_MAX`` of them. The simulations call ``check``
after every step.
"""

from __future__ import annotations

from packer import gangs, queueing
from packer.chosen import Chosen
from packer.events import Action, Event, Finished, Grant, Requested
from packer.ledger import Copy, CopyState, Device, Lease, Model, Node, State, prefix_bytes
from packer.lending import MARGIN_PERCENT
from packer.proof import Proof, Shares, Sums
from packer.quota import Account, InvariantBroken, Tenant
from packer.types import ModelRef, Tier

__all__ = ["InvariantBroken", "check", "check_after"]

# Untouched models looked at per step. A thousand models are gone round in 500 steps.
ROUND_MODELS = 2
# Grants at once and quiet ends in a row before everything that they touched is looked at: some ten requests,
# and far fewer steps than the ring of the loop keeps.
QUIET_STEPS_MAX = 32
NOTHING = Shares()


def check_after(node: Node, event: Event, actions: list[Action]) -> None:
    """``check`` after a step that took in the event, put off while steps only grant requests at once and end
    leases. Raises ``InvariantBroken``."""
    kind, proof = type(event), node.proof
    quiet = (kind is Requested and len(actions) == 1 and type(actions[0]) is Grant) or (
        kind is Finished and not actions
    )
    if not quiet or proof is None or node.unproven or proof.quiet_steps >= QUIET_STEPS_MAX:
        check(node)
        return
    proof.quiet_steps += 1
    assert isinstance(event, Requested | Finished)
    _check_request(node, event.request, granted=kind is Requested)


def check(node: Node, full: bool = False) -> None:
    """Raises ``InvariantBroken`` when the state contradicts itself or a promise."""
    if full or node.unproven or node.proof is None:
        node.proof = Proof()
        node.unproven = False
        refs = list(node.models)
        _check_requests(node)
    else:
        refs = list(node.touched)
        refs += [ref for ref in _next_round(node, node.proof) if ref not in node.touched]
    node.touched.clear()
    proof = node.proof
    proof.quiet_steps = 0
    tenants: dict[str, Tenant] = dict(node.tenants) if full else {}
    for ref in refs:
        model = node.models.get(ref)
        before = proof.shares.get(ref, NOTHING)
        now = NOTHING if model is None else _shares(node, model)
        if now != before:
            _replace(proof, ref, before, now)
        if model is None:
            proof.shares.pop(ref, None)
        else:
            proof.shares[ref] = now
            tenants[ref.tenant] = model.tenant
    for name, tenant in tenants.items():
        _check_tenant(node, name, tenant, proof)
        _check_slice(node, name, tenant)
    for name, tenant in node.tenants.items() if full else ():
        _recount_slice(node, name, tenant)
    _check_budgets(node, proof)
    _check_removed(node)
    _check_waiting(node, proof)
    _check_moves(node)


def _check_request(node: Node, request: str, granted: bool) -> None:
    """What a grant or an end of a lease changes: the request is counted once, and granted what is there."""
    lease = node.requests.get(request)
    if len(node.requests) != node.waiting + node.granted or node.granted < 0:
        raise InvariantBroken(
            f"{node.waiting} requests count as waiting and {node.granted} as granted; "
            f"{len(node.requests)} are known"
        )
    if not granted:
        _require(lease is None, f"{request} has ended and is known")
        return
    if type(lease) is not Lease:
        raise InvariantBroken(f"{request} was granted and holds no lease")
    model, tenant = lease.model, lease.model.tenant
    device, slots = model.device, tenant.rates.slots
    there = model.state is State.RESIDENT or model.serving
    if not there or device is None or device.models.get(model.ref) is not model or not device.healthy:
        raise InvariantBroken(f"{model.ref} is {model.state} and was granted to {request}")
    if lease.residency != model.residency or model.leases < 1 or tenant.granted < 1:
        raise InvariantBroken(f"{request} is granted {model.ref} and does not count")
    _require(slots is None or tenant.in_flight <= slots, f"{model.ref.tenant} is above its {slots} requests")
    _require(tenant.rates.tokens.reserved >= lease.tokens, f"the tokens of {request} are reserved for nobody")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)


def _next_round(node: Node, proof: Proof) -> list[ModelRef]:
    """The next few models in turn; a new turn starts from the models there are then."""
    if proof.place >= len(proof.round):
        proof.round, proof.place = list(node.models), 0
    refs = proof.round[proof.place : proof.place + ROUND_MODELS]
    proof.place += ROUND_MODELS
    return refs


# --- one model ------------------------------------------------------------------------------------


def _shares(node: Node, model: Model) -> Shares:
    """What the model adds to every sum; raises if it contradicts itself."""
    state, device = model.state, model.device
    if device is None:
        held = model.device_bytes or model.leaving_bytes or model.resident_chunks or model.kept_chunks
        held = held or len(model.shares) or model.wanted is not None
        if state is not State.ABSENT or held or model.leases or model.packing:
            raise InvariantBroken(f"{model.ref} is {state} on no device")
    else:
        _check_on_device(node, model)
    for tier, copy in ((Tier.HOST, model.host), (Tier.DISK, model.disk)):
        if copy.state is not CopyState.ABSENT or copy.readers or copy.held_bytes:
            _check_copy(node, model, tier, copy)
    if node.chosen is not None:
        _check_chosen(node, node.chosen, model)
    _check_shade(model)
    if model.waiters:
        _require(model.ref in node.queue, f"{model.ref} has waiters and is not in the queue")
        _require(not queueing.grantable(node, model), f"{model.ref} is there and requests wait for it")
    leaving = CopyState.DROPPING
    return Shares(
        device=device.name if device is not None else "",
        device_bytes=model.device_bytes,
        device_leaving=model.leaving_bytes,
        host_bytes=model.host.held_bytes,
        host_leaving=model.host.held_bytes if model.host.state is leaving else 0,
        disk_bytes=model.disk.held_bytes,
        disk_leaving=model.disk.held_bytes if model.disk.state is leaving else 0,
        waiting=len(model.waiters),
        models=1,
        shares=_runs(device, model) if device is not None and (device.members or model.shares) else (),
    )


def _runs(place: Device, model: Model) -> tuple[tuple[str, int], ...]:
    return tuple(zip((member.name for member in place.members), model.shares, strict=True))


def _check_shade(model: Model) -> None:
    """The private slice knows what is really there, and what lacks in comparison."""
    shade = model.shade
    whole = model.state is State.RESTORING or model.state is State.RESIDENT
    real_bytes = shade.size_bytes if whole else model.device_bytes - model.leaving_bytes
    if shade.real_bytes != real_bytes or shade.gap_ms != shade.gap_with(real_bytes):
        raise InvariantBroken(
            f"{model.ref}: its slice believes that {shade.real_bytes} bytes are there and {shade.gap_ms} ms "
            f"lack; it is {model.state} with {real_bytes} bytes and {shade.gap_with(real_bytes)} ms"
        )
    if shade.slice_bytes and (not model.planned or shade not in model.tenant.slice.shades):
        raise InvariantBroken(f"{model.ref}: {shade.slice_bytes} bytes of it are in a slice and not counted")


def _check_slice(node: Node, name: str, tenant: Tenant) -> None:
    """A slice is within the reserve, and what may be taken of it is paid for beforehand."""
    slice_ = tenant.slice
    if slice_.reserved_bytes != tenant.device.reserved_bytes or slice_.held_bytes > slice_.reserved_bytes:
        raise InvariantBroken(
            f"{name}: its slice has {slice_.held_bytes} of {slice_.reserved_bytes} bytes, "
            f"{tenant.device.reserved_bytes} are reserved"
        )
    if slice_.reserved_bytes and node.terms.margin_percent >= MARGIN_PERCENT:
        covered = slice_.debt_ms + slice_.gap_ms <= 0
        _require(covered, f"{name} owes {slice_.debt_ms} ms, and {slice_.gap_ms} ms more may follow")


def _recount_slice(node: Node, name: str, tenant: Tenant) -> None:
    """The sums of a slice, from its models alone; part of the full check only."""
    slice_ = tenant.slice
    held_bytes = sum(shade.slice_bytes for shade in slice_.shades)
    gap_ms = sum(m.shade.gap_ms for m in node.models.values() if m.tenant is tenant)
    _require(held_bytes == slice_.held_bytes, f"{name}: its slice counts {slice_.held_bytes} bytes wrongly")
    _require(gap_ms == slice_.gap_ms, f"{name}: its slice counts {slice_.gap_ms} ms of gaps, not {gap_ms}")


def _check_on_device(node: Node, model: Model) -> None:
    device, ref, state = model.device, model.ref, model.state
    assert device is not None
    known = node.places if device.members else node.devices
    if state is State.ABSENT or device.models.get(ref) is not model or known.get(device.name) is not device:
        raise InvariantBroken(f"{ref} is {state} and {device.name} does not agree")
    loading = state is State.RESTORING and model.source is Tier.ORIGIN
    if model.serving and state is not State.RESTORING:
        raise InvariantBroken(f"{ref} is {state} and serves as if it were coming")
    leased = model.leases and not model.serving
    if state is not State.RESIDENT and (leased or (model.packing and not loading)):
        raise InvariantBroken(f"{ref} is {state} with {model.leases} leases, packing: {model.packing}")
    _check_chunks(model)
    if device.members or model.shares or model.spec.devices > 1:
        _check_gang(model, device)
    if model.packing and model.disk.state is not CopyState.FILLING:
        raise InvariantBroken(f"{ref} is being packed and has no room reserved for it")
    if state is State.RESTORING and model.source is not Tier.ORIGIN:
        copy = model.copy(model.source)
        filled = model.source is Tier.DISK and node.prefetch.filling is model
        if copy.state is not CopyState.HELD or copy.readers != 1 + filled:
            raise InvariantBroken(f"{ref} is restored from a {model.source} copy that is {copy.state}")


def _check_gang(model: Model, place: Device) -> None:
    """All of it is there, on as many devices as it needs, and each holds its run and the workspace."""
    members, spec = place.members, model.spec
    runs = [share - run for share, run in zip(model.shares, gangs.run_bytes(spec), strict=True)]
    right = (
        len(dict.fromkeys(members)) == spec.devices == len(model.shares)
        and model.state is not State.PARTIAL
        and not model.kept_chunks
        and sum(model.shares) == model.device_bytes
        and len(dict.fromkeys(runs)) == 1  # the same workspace on each
        and runs[0] >= 0
        and all(member.models.get(model.ref) is model for member in members)
    )
    if not right:
        raise InvariantBroken(
            f"{model.ref}, {model.state}, is to be on {spec.devices} devices and has {model.shares} bytes on "
            f"{place.name}, {model.device_bytes} in all"
        )


def _check_chunks(model: Model) -> None:
    """What is held, leaving and kept are whole chunks from the first on."""
    state, chunks = model.state, model.spec.chunk_bytes
    kept_bytes = prefix_bytes(model.spec, model.kept_chunks)
    if state is State.PARTIAL:
        right = (
            0 < model.resident_chunks < len(chunks)
            and model.device_bytes == prefix_bytes(model.spec, model.resident_chunks)
            and not model.leaving_bytes
            and not model.kept_chunks
        )
    elif state is State.EVICTING:
        right = (
            model.kept_chunks < max(model.resident_chunks, 1)
            and model.leaving_bytes == model.device_bytes - kept_bytes > 0
        )
    else:
        right = (
            model.resident_chunks == len(chunks)
            and model.device_bytes >= model.spec.image_bytes
            and not model.leaving_bytes
            and (not model.kept_chunks or state is State.RESTORING)
        )
    if not right:
        raise InvariantBroken(
            f"{model.ref} is {state} with {model.resident_chunks} of {len(chunks)} chunks, "
            f"{model.kept_chunks} to be kept, {model.device_bytes} bytes, {model.leaving_bytes} leaving"
        )


def _check_copy(node: Node, model: Model, tier: Tier, copy: Copy) -> None:
    reading = model.state is State.RESTORING and model.source is tier
    ahead = node.prefetch.filling is model
    if copy.readers != reading + (ahead and tier is Tier.DISK):
        raise InvariantBroken(f"{model.ref}: {copy.readers} restores count as readers of its {tier} copy")
    filling = tier is Tier.HOST and copy.state is CopyState.FILLING
    if ahead and tier is Tier.HOST and not (filling and copy.order):
        raise InvariantBroken(f"{model.ref}: its host copy is {copy.state} and is being filled ahead of need")
    if filling and not (ahead if copy.order else model.state is State.RESTORING):
        raise InvariantBroken(f"{model.ref}: a host segment is filled by no restore")
    if copy.state is CopyState.BEGUN and (tier is not Tier.DISK or not copy.held_bytes or copy.readers):
        raise InvariantBroken(f"{model.ref}: its {tier} copy of {copy.held_bytes} bytes is called begun")
    if copy.state is CopyState.ABSENT or node.copies(tier).get(model.ref) is not model:
        raise InvariantBroken(f"{model.ref}: its {tier} copy is {copy.state} and not in the tier's list")


def _check_chosen(node: Node, chosen: Chosen, model: Model) -> None:
    """The chosen policy ranks what is there and nothing else, and its timer leaves nothing idle behind."""
    there = (
        (Tier.DEVICE, model.device is not None, model.idle),
        (Tier.HOST, model.host.state is CopyState.HELD, _droppable(model.host) and not model.leases),
        (Tier.DISK, model.disk.state is CopyState.HELD, False),
    )
    for tier, held, idle in there:
        _require(held or not chosen.counts(tier, model.ref), f"{model.ref} is ranked in {tier}, not there")
        expires_ms = chosen.expires_ms(tier, model.ref) if idle else None
        if expires_ms is not None and expires_ms <= node.now_ms:
            raise InvariantBroken(f"{model.ref} is idle in {tier} since the timer ran out at {expires_ms}")


# --- sums -----------------------------------------------------------------------------------------


def _replace(proof: Proof, ref: ModelRef, before: Shares, now: Shares) -> None:
    """Take a model's old shares out of every sum and put the new ones in."""
    _add(proof, ref.tenant, before, -1)
    _add(proof, ref.tenant, now, 1)
    proof.waiting += now.waiting - before.waiting


def _add(proof: Proof, name: str, shares: Shares, sign: int) -> None:
    tenant = proof.tenants.setdefault(name, Sums())
    for sums in (proof.devices.setdefault(shares.device, Sums()), tenant):
        sums.device_bytes += sign * shares.device_bytes
        sums.device_leaving += sign * shares.device_leaving
    for sums in (proof.tiers, tenant):
        sums.host_bytes += sign * shares.host_bytes
        sums.host_leaving += sign * shares.host_leaving
        sums.disk_bytes += sign * shares.disk_bytes
        sums.disk_leaving += sign * shares.disk_leaving
    for name_of_member, nbytes in shares.shares:
        sums = proof.devices.setdefault(name_of_member, Sums())
        sums.device_bytes += sign * nbytes
        sums.device_leaving += sign * nbytes if shares.device_leaving else 0
    tenant.waiting += sign * shares.waiting
    tenant.models += sign * shares.models


def _check_budgets(node: Node, proof: Proof) -> None:
    for name, device in node.devices.items():
        sums = proof.devices.get(name) or Sums()
        _check_account(device.account, sums.device_bytes, sums.device_leaving, name)
        if not device.healthy or device.account.excess_bytes:
            idle = any(m.idle for m in device.models.values())
            _require(not idle, f"{name} is over its budget or unhealthy and keeps an idle model")
    for name, place in node.places.items():
        sums = proof.devices.get(name) or Sums()
        _check_account(place.account, sums.device_bytes, sums.device_leaving, name)
        same = place.healthy == all(member.healthy for member in place.members)
        _require(same and bool(place.models) and place.claim is None, f"{name} is a place of its own")
    tiers = proof.tiers
    _check_account(node.host, tiers.host_bytes, tiers.host_leaving, "the host tier")
    _check_account(node.disk, tiers.disk_bytes, tiers.disk_leaving, "the disk tier")
    for tier in (Tier.HOST, Tier.DISK):
        if node.account(tier).excess_bytes:
            free = any(_droppable(m.copy(tier)) for m in node.copies(tier).values())
            _require(not free, f"the {tier} tier is over its budget and keeps a copy nobody reads")


def _check_tenant(node: Node, name: str, tenant: Tenant, proof: Proof) -> None:
    sums = proof.tenants.get(name) or Sums()
    _check_account(tenant.device, sums.device_bytes, sums.device_leaving, f"{name} on devices")
    _check_account(tenant.host, sums.host_bytes, sums.host_leaving, f"{name} in the host tier")
    _check_account(tenant.disk, sums.disk_bytes, sums.disk_leaving, f"{name} in the disk tier")
    if tenant.waiting != sums.waiting or tenant.models != sums.models:
        raise InvariantBroken(
            f"{name} counts {tenant.waiting} waiting requests and {tenant.models} models, "
            f"there are {sums.waiting} and {sums.models}"
        )
    rates = tenant.rates
    if rates.tokens.reserved < 0 or (rates.tokens.reserved and not tenant.in_flight):
        raise InvariantBroken(f"{rates.tokens.reserved} tokens of {name} are reserved for nobody")
    if tenant.waiting > queueing.WAITING_PER_TENANT_MAX:
        raise InvariantBroken(f"{tenant.waiting} requests of {name} wait, above the limit")
    if tenant.device.excess_bytes and node.has_plan:
        for device in node.devices.values():
            idle = any(m.idle for m in device.models.values() if m.tenant is tenant)
            _require(not idle, f"{name} is above its max on devices and keeps an idle model")


def _droppable(copy: Copy) -> bool:
    return copy.state is CopyState.HELD and not copy.readers


def _check_account(account: Account, used: int, leaving: int, whose: str) -> None:
    if account.used_bytes != used or account.leaving_bytes != leaving:
        raise InvariantBroken(
            f"{whose}: the account says {account.used_bytes} bytes held and {account.leaving_bytes} leaving, "
            f"the models say {used} and {leaving}"
        )
    if account.limit_bytes is not None and used > account.ceiling_bytes:
        raise InvariantBroken(f"{whose}: {used} bytes held, above the limit of {account.limit_bytes}")


# --- requests and rules over the whole node -------------------------------------------------------


def _check_requests(node: Node) -> None:
    """Recount who waits and who holds a lease; part of the full check only."""
    leases: dict[Model, int] = {}
    granted: dict[Tenant, int] = {}
    tokens: dict[Tenant, int] = {}
    for request, known in node.requests.items():
        model = known.model
        tokens[model.tenant] = tokens.get(model.tenant, 0) + known.tokens
        if isinstance(known, Lease):
            granted[model.tenant] = granted.get(model.tenant, 0) + 1
            if known.residency == model.residency:
                leases[model] = leases.get(model, 0) + 1
        elif model.waiters.get(request) is not known:
            raise InvariantBroken(f"{request} waits for {model.ref}, which does not know it")
    for model in node.models.values():
        if model.leases != leases.get(model, 0):
            raise InvariantBroken(
                f"{model.ref} counts {model.leases} leases, {leases.get(model, 0)} are held"
            )
    pending: dict[Tenant, int] = {}
    for model in node.models.values():
        payer = model.payer or model.tenant
        pending[payer] = pending.get(payer, 0) + model.pending_us
        if model.pending_us and model.state is not State.RESTORING:
            raise InvariantBroken(f"{model.ref} is {model.state} and a restore of it is expected")
    for tenant in node.tenants.values():
        if tenant.pending_us != pending.get(tenant, 0):
            raise InvariantBroken(f"{tenant.spec.tenant} has {tenant.pending_us} us of restores pending")
        if tenant.granted != granted.get(tenant, 0):
            raise InvariantBroken(f"{tenant.spec.tenant} counts {tenant.granted} granted requests")
        reserved = tenant.rates.tokens.reserved
        if reserved != tokens.get(tenant, 0):
            raise InvariantBroken(f"{tenant.spec.tenant} has {reserved} tokens reserved for its requests")


def _check_removed(node: Node) -> None:
    """What left the plan is on its way out of every tier as soon as nobody uses it."""
    for model in node.removed.values() if node.has_plan else ():
        if model.idle or model.empty or _droppable(model.host) or _droppable(model.disk):
            raise InvariantBroken(f"{model.ref} left the plan and is kept")


def _check_moves(node: Node) -> None:
    """Whoever is to move is on its way off the device that it leaves, or waits for who makes way for it."""
    for ref, move in node.moves.items():
        model = node.models.get(ref)
        target = node.devices.get(move.target)
        leaves = model is not None and model.state is State.EVICTING and not model.kept_chunks
        waits = model is not None and model.state is State.ABSENT and not model.waiters
        waits = waits and target is not None and target.account.leaving_bytes > 0
        if not (leaves or waits) or target is None:
            raise InvariantBroken(f"{ref} is to move to {move.target} and does not leave")


def _check_waiting(node: Node, proof: Proof) -> None:
    """Whoever waits is waited for: a deadline is set, and something is under way that will end."""
    if node.waiting != proof.waiting or len(node.requests) != node.waiting + node.granted:
        raise InvariantBroken(
            f"{node.waiting} requests count as waiting and {node.granted} as granted; {proof.waiting} wait "
            f"for a model and {len(node.requests)} are known"
        )
    if not node.waiting:
        return
    _require(node.waiting <= queueing.WAITING_MAX, f"{node.waiting} requests wait, above the limit")
    _require(node.wake_ms is not None, "requests wait and nobody wakes the core at their deadline")
    _require(not node.draining, "requests wait on a draining node")
    for device in node.devices.values():
        claim = device.claim
        if claim is not None and claim.ref not in node.queue:
            raise InvariantBroken(f"{device.name} is claimed by {claim.ref}, for which nobody waits")
    if not any(device.models for device in node.devices.values()):
        paused = any(
            model.not_before_ms > node.now_ms or model.tenant.rates.restores.wait_ms(node.now_ms)
            for model in node.queue.values()
        )
        _require(paused, "requests wait, the devices are empty and nothing is under way")
