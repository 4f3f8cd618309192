"""What a request for a model would meet at this moment: the answer to ``bunk plan``.

Covers: asking the deciding code, ``choice`` and what comes before it, without acting on what it says. Does
not cover: the past (``explain``). It is a pure question, and the next request meets what it says unless
something else happens first.
"""

from __future__ import annotations

from dataclasses import replace

from packer import admission, choice, explain, gang_room, gangs, queueing, room, victims
from packer.choice import Promises, Turn
from packer.decisions import DeviceRoom, Forecast, Outcome
from packer.events import Requested
from packer.intensity import Intensity
from packer.ledger import Device, Model, Node, State
from packer.turns import startable
from packer.types import ModelRef, Tier

# The request that is thought of waits this long for its turn: longer than any rate makes it wait.
PATIENCE_MS = 600_000
_UNDER_RESERVES = "held under other tenants' reserves"


def forecast(node: Node, ref: ModelRef, now_ms: int) -> Forecast:
    """What a request for this model would meet; the state is afterwards what it was before."""
    asked = node.models.get(ref)
    known = [model for device in node.devices.values() for model in device.models.values()]
    known += [asked] if asked is not None else []
    # What is worked out on the way and remembered, the deed works out as well, and in its own order.
    kept = [(model, model.gains, model.shade.price, _memo(model.reuse)) for model in known]
    try:
        return _forecast(node, ref, now_ms)
    finally:
        for model, gains, price, memo in kept:
            model.gains, model.shade.price, use = gains, price, model.reuse
            use.epoch_ms, use.factors, use.due, use.rated_ms, use.per_ms = memo


def _memo(use: Intensity) -> tuple[int, tuple[float, ...], float, int, float]:
    return use.epoch_ms, use.factors, use.due, use.rated_ms, use.per_ms


def _forecast(node: Node, ref: ModelRef, now_ms: int) -> Forecast:
    model = node.models.get(ref)
    request = Requested("", ref, now_ms + PATIENCE_MS)
    refusal = admission.refusal_of(node, request, model, now_ms)
    if model is None or not model.planned or refusal is not None:
        assert refusal is not None
        return _refused(node, ref, model, refusal, now_ms)
    if model.state is State.RESIDENT or model.serving:
        return _resident(node, model)
    if model.state is State.RESTORING:
        assert model.device is not None
        left_ms = max(model.expected_ms - (now_ms - model.started_ms), 0)
        return _with_source(
            node, model, Outcome.RESTORING, "it is on its way", model.device.name, restore_ms=left_ms
        )
    return _startable(node, model, now_ms)


def _resident(node: Node, model: Model) -> Forecast:
    assert model.device is not None
    if queueing.grantable(node, model):
        why = "it may be used at once"
        if model.serving:
            why += ", while the rest of it comes"
        return Forecast(model.name, Outcome.RESIDENT, why, model.device.name)
    wanted = node.condemned.get(model.ref)
    if wanted is None:
        return Forecast(model.name, Outcome.WAITS, f"{model.device.name} is unhealthy", model.device.name)
    why = "its room was wanted for too long; new requests wait"
    return Forecast(model.name, Outcome.WAITS, why, model.device.name, by=str(wanted))


def _startable(node: Node, model: Model, now_ms: int) -> Forecast:
    """Nothing of it is under way, or what is left of it is still leaving."""
    if model.state is State.EVICTING:
        return _with_source(node, model, Outcome.WAITS, "its bytes are just being evicted")
    if not startable(model, now_ms):
        wait_ms = model.not_before_ms - now_ms
        return _with_source(node, model, Outcome.WAITS, f"its last restore failed; next try in {wait_ms} ms")
    rate = model.tenant.rates.restores
    if not model.counted and rate.limit is not None and (wait_ms := rate.wait_ms(now_ms, 1)):
        why = f"its tenant's restores per minute are used up for {wait_ms} ms"
        return _with_source(node, model, Outcome.WAITS, why)
    promises = choice.standing(node, now_ms)
    promises.lay_down(model)
    chosen = choice.choose(node, model, promises, now_ms)
    if chosen.hope is not None:
        return _refused(node, model.ref, model, chosen.hope, now_ms)
    return _chosen(node, model, chosen, promises, now_ms)


def _chosen(node: Node, model: Model, chosen: choice.Choice, promises: Promises, now_ms: int) -> Forecast:
    who = explain.victims_of(node, chosen.takings, now_ms)
    name = chosen.device.name if chosen.device is not None else ""
    busy = sum(victim.in_use for victim in who)
    moving = sum(bool(victim.moves_to) for victim in who)
    if chosen.turn is Turn.START:
        what = "is the device" if chosen.device is None or not chosen.device.members else "are the devices"
        outcome, why = Outcome.FITS, f"{name} {what} with the least room that is enough"
    elif chosen.turn is Turn.HOLD:
        why = f"it needs {model.spec.devices} devices, and others than {name} are claimed by models before it"
        outcome = Outcome.WAITS
    elif chosen.turn is Turn.GIVE_UP:
        outcome, why = Outcome.WAITS, "its first chunks lie where the rest can not come; they go first"
    elif chosen.turn is Turn.WAIT:
        outcome, why = Outcome.WAITS, "every device that it could go to is claimed by models before it"
    elif busy:
        outcome, why = Outcome.WAITS, f"{busy} of {_models(len(who))} that must go are in use"
    elif moving:
        others = f"{_models(len(who) - moving)} must give bytes and " if len(who) > moving else ""
        outcome, why = Outcome.EVICTS, f"{others}{_models(moving)} must move, which costs less than evicting"
    elif who:
        outcome, why = Outcome.EVICTS, f"{_models(len(who))} must give bytes, the least valuable first"
    else:
        outcome, why = Outcome.WAITS, f"what is leaving {name} already is enough"
    found = _with_source(node, model, outcome, why, name)
    before = sum(1 for other in node.queue.values() if other is not model and other.startable)
    rooms = _rooms(node, model, promises, name, now_ms)
    return replace(found, victims=who, devices=rooms, waiting_before=before)


def _models(count: int) -> str:
    return f"{count} model" if count == 1 else f"{count} models"


def _refused(
    node: Node, ref: ModelRef, model: Model | None, refusal: victims.Hopeless, now_ms: int
) -> Forecast:
    rooms: tuple[DeviceRoom, ...] = ()
    if model is not None:
        rooms = _rooms(node, model, choice.standing(node, now_ms), "", now_ms)
    reason = refusal.reason.value
    return Forecast(str(ref), Outcome.REFUSED, refusal.detail, devices=rooms, refusal=reason)


def _with_source(
    node: Node,
    model: Model,
    outcome: Outcome,
    why: str,
    device: str = "",
    restore_ms: int | None = None,
) -> Forecast:
    source = model.source if model.state is State.RESTORING else room.source_tier(model) or Tier.ORIGIN
    nbytes = model.moving_bytes if model.state is State.RESTORING else room.moved_bytes(model, source)
    expected_ms = room.restore_ms(node, model) if restore_ms is None else restore_ms
    return Forecast(model.name, outcome, why, device, source.value, nbytes, expected_ms)


def _rooms(node: Node, model: Model, promises: Promises, chosen: str, now_ms: int) -> tuple[DeviceRoom, ...]:
    return tuple(
        DeviceRoom(
            device.name,
            device.account.limit_bytes or 0,
            device.account.used_bytes,
            victims.need_on(model, device),
            "chosen"
            if device.name in gangs.devices_in(chosen)
            else _verdict(node, model, device, promises, now_ms),
        )
        for device in node.devices.values()
    )


def _verdict(node: Node, model: Model, device: Device, promises: Promises, now_ms: int) -> str:
    """Why this device is not the one."""
    need = victims.need_on(model, device)
    if not device.healthy:
        return "unhealthy"
    if need > (device.account.limit_bytes or 0):
        return "too small, even empty"
    if model.device is not None and model.device is not device:
        return f"the first chunks are on {model.device.name}"
    claim = promises.claims.get(device.name)
    if claim is not None:
        return f"claimed by {claim.ref}"
    if model.spec.devices > 1:
        return _verdict_of_share(node, model, device, promises, now_ms)
    if victims.fits_now(model, device, promises.earlier):
        return "has room, and would have more left over"
    if victims.device_victims(node, model, device, promises.earlier, False, False, now_ms) is not None:
        return "would have to evict more"
    if victims.device_victims(node, model, device, promises.earlier, True, True, now_ms) is not None:
        return "would have to wait for models in use"
    return _UNDER_RESERVES


def _verdict_of_share(node: Node, model: Model, device: Device, promises: Promises, now_ms: int) -> str:
    """Why this device is not one of a gang's."""
    for busy, why in ((False, "would have to evict more"), (True, "would have to wait for models in use")):
        takings = gang_room.takings_on(node, model, (device,), promises.earlier, busy, busy, now_ms)
        if takings is not None:
            return why if takings else "has room for a share"
    return _UNDER_RESERVES
