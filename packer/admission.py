"""May a request come in: what is refused at the door, and in which order that is looked at.

Covers: every check of a new request before it is granted or waits, and the words of each refusal. Does
not cover: the arithmetic of rates (``rates``), waiting and granting (``queueing``), or HTTP.

Only a request that is let in counts: a refusal costs the node next to nothing. Concurrency comes first, as
its answer is soonest good again; then requests, tokens and device time; the queue's bounds last.
"""

from __future__ import annotations

from packer import queueing
from packer.events import RefusalReason, Requested
from packer.ledger import Model, Node, State
from packer.quota import Tenant
from packer.rates import BURST_PARTS, SECOND_MS, burst_of, span_text
from packer.victims import Hopeless

# When a draining node refuses, another node should be asked soon.
DRAINING_RETRY_MS = 1_000
_WAY_OUT = "come back after Retry-After, or ask the operator to raise the limit"


def refusal_of(node: Node, event: Requested, model: Model | None, now_ms: int) -> Hopeless | None:
    """Why the request may not come in, or None."""
    if node.draining:
        detail = "this node is leaving; ask another one"
        return Hopeless(RefusalReason.DRAINING, detail, DRAINING_RETRY_MS)
    if model is None or not model.planned:
        return Hopeless(RefusalReason.UNKNOWN_MODEL, f"there is no model {event.ref}", None)
    tenant = model.tenant
    refusal = _concurrency(tenant) or _rates(tenant, now_ms)
    if refusal is not None or queueing.grantable(node, model):
        return refusal
    return queueing.waiting_refusal(node, model, now_ms) or _restore_rate(node, event, model, now_ms)


def _concurrency(tenant: Tenant) -> Hopeless | None:
    rates = tenant.rates
    if rates.slots is None or tenant.in_flight < rates.slots:
        return None
    here = (
        ""
        if rates.slots == rates.concurrency
        else f"{rates.slots} of them here now, as others use the rest; "
    )
    detail = (
        f"{tenant.in_flight} requests of tenant {tenant.spec.tenant} are in flight here, and it may have "
        f"{rates.concurrency} (concurrency); {here}wait for answers before sending more, or ask the operator "
        "to raise it"
    )
    return Hopeless(RefusalReason.CONCURRENCY, detail, queueing.clamp_retry_ms(tenant.use_ms))


def _rates(tenant: Tenant, now_ms: int) -> Hopeless | None:
    rates, name = tenant.rates, tenant.spec.tenant
    if wait_ms := rates.requests.wait_ms(now_ms):
        detail = (
            f"tenant {name} may send {rates.requests.limit} requests per minute, "
            f"{burst_of(rates.requests.limit or 0, BURST_PARTS)} of them at once (requests_per_minute); "
            f"{_WAY_OUT}"
        )
        return Hopeless(RefusalReason.RATE, detail, wait_ms)
    if wait_ms := rates.tokens.wait_ms(now_ms):
        detail = (
            f"tenant {name} may use {rates.tokens.limit} tokens per minute (tokens_per_minute); what it used "
            f"and what its requests in flight may take is above that for {span_text(wait_ms)}; {_WAY_OUT}"
        )
        return Hopeless(RefusalReason.TOKENS, detail, wait_ms)
    # What is in flight is expected to take as long as this tenant's requests do on average.
    if wait_ms := rates.device.wait_ms(now_ms, 1 + tenant.in_flight * tenant.use_ms):
        seconds = (rates.device.limit or 0) // SECOND_MS
        detail = (
            f"tenant {name} may use {seconds} device seconds per day (device_seconds_per_day) and has used "
            f"them; there are some again in {span_text(wait_ms)}, all in "
            f"{span_text(rates.device.reset_ms(now_ms))}; come back then, or ask the operator to raise the "
            "limit"
        )
        return Hopeless(RefusalReason.DEVICE_TIME, detail, wait_ms)
    return None


def _restore_rate(node: Node, event: Requested, model: Model, now_ms: int) -> Hopeless | None:
    """A request that would need a restore waits for the tenant's rate, unless it could only time out."""
    tenant = model.tenant
    rate = tenant.rates.restores
    if rate.limit is None or model.counted or model.waiters or model.state is State.RESIDENT:
        return None
    before = 0
    if tenant.waiting:
        before = sum(1 for other in node.queue.values() if other.tenant is tenant and not other.counted)
    wait_ms = rate.wait_ms(now_ms, 1 + before)
    if now_ms + wait_ms < event.deadline_ms:
        return None
    detail = (
        f"{event.ref} is not on a device, and tenant {tenant.spec.tenant} may cause {rate.limit} restores "
        f"per minute (restores_per_minute); {before} of its models wait for one already, so this one's turn "
        f"comes in {span_text(wait_ms)}, after the request's deadline; models that are on a device "
        f"answer; {_WAY_OUT}"
    )
    return Hopeless(RefusalReason.RESTORE_RATE, detail, wait_ms)
