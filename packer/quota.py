"""Quotas of a tenant on one node: byte accounts, and whose turn it is.

Covers: one byte account per budget or tenant and tier (with its hard limit and reserved bytes), which
victim a tenant may take from which other, and the virtual time of fair queueing. Does not cover: rates
(``rates``), choosing victims (``room``) or the residency state (``ledger``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from packer.lending import Slice
from packer.rates import TenantRates
from packer.types import TenantQuota, TenantSpec, Tier


class InvariantBroken(AssertionError):
    """The core's own books do not add up: a defect of Bunkhouse, never of its input."""


# --- bytes ----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Account:
    """Bytes held against one budget: of a device, of a tier, or of a tenant in a tier.

    ``used`` counts from the order that brings the bytes until the answer that they are gone;
    ``leaving`` is the part whose going was ordered. ``used`` is at most ``ceiling``: the limit, or, if
    the limit was lowered below what was held, what is still held of that.
    """

    limit_bytes: int | None = None
    reserved_bytes: int = 0
    used_bytes: int = 0
    leaving_bytes: int = 0
    ceiling_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """What will still be held once everything ordered away is gone."""
        return self.used_bytes - self.leaving_bytes

    @property
    def excess_bytes(self) -> int:
        """What must still be ordered away to come back under the limit; 0 when it is kept."""
        return 0 if self.limit_bytes is None else max(self.kept_bytes - self.limit_bytes, 0)

    def set_limit(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.ceiling_bytes = max(limit_bytes or 0, self.used_bytes)

    def fits(self, nbytes: int) -> bool:
        return self.limit_bytes is None or self.used_bytes + nbytes <= self.limit_bytes

    def short_bytes(self, nbytes: int) -> int:
        """How much more must be ordered away before ``nbytes`` fit; 0 or less: nothing."""
        return -1 if self.limit_bytes is None else self.kept_bytes + nbytes - self.limit_bytes

    def hold(self, nbytes: int) -> None:
        """Take bytes for a new order; the caller made sure that they fit."""
        if not self.fits(nbytes):
            raise InvariantBroken(
                f"{nbytes} bytes more would pass the limit: {self.used_bytes} of {self.limit_bytes} are used"
            )
        self.used_bytes += nbytes

    def hold_found(self, nbytes: int) -> None:
        """Take bytes that exist already, whether they fit or not; what is too much is then shed."""
        self.used_bytes += nbytes
        self.ceiling_bytes = max(self.limit_bytes or 0, self.used_bytes)

    def release(self, nbytes: int, leaving: bool) -> None:
        self.used_bytes -= nbytes
        if leaving:
            self.leaving_bytes -= nbytes
        # What was given back is no longer excused: the ceiling only ever sinks towards the limit.
        self.ceiling_bytes = max(self.limit_bytes or 0, self.used_bytes)


def scaled_reserve(reserved_bytes: int, total_reserved_bytes: int, capacity_bytes: int) -> int:
    """A tenant's reserve on this node: as set, or its fair part when more is promised than exists."""
    if total_reserved_bytes <= capacity_bytes:
        return reserved_bytes
    return reserved_bytes * capacity_bytes // total_reserved_bytes


def may_take(victim_kept_bytes: int, victim_reserved_bytes: int, nbytes: int, entitled: bool) -> bool:
    """May another tenant take ``nbytes`` below the device of a tenant that keeps ``victim_kept_bytes`` there?

    A borrower (``entitled`` false: it would be above its own reserve) may take only what leaves the
    victim at or above its reserve. A tenant that fills its own unmet reserve may take from any tenant
    that is above its reserve, even if the last model taken reaches below it: models are indivisible,
    and borrowed bytes yield to promised ones. A tenant at or below its reserve is never taken from.
    """
    if entitled:
        return victim_kept_bytes > victim_reserved_bytes
    return victim_kept_bytes - nbytes >= victim_reserved_bytes


# --- tenants --------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Tenant:
    """Everything the core keeps about one tenant.

    ``virtual_us`` is the tenant's time in fair queueing: cost caused divided by weight, never behind
    the node's own virtual time when it comes. With ``pending_us``, what its running restores are expected
    to add, it says whose turn it is: the least is served first.
    """

    spec: TenantSpec
    planned: bool = True
    device: Account = field(default_factory=Account)
    host: Account = field(default_factory=Account)
    disk: Account = field(default_factory=Account)
    rates: TenantRates = field(default_factory=TenantRates)
    slice: Slice = field(default_factory=Slice)
    waiting: int = 0
    granted: int = 0
    models: int = 0
    virtual_us: int = 0
    pending_us: int = 0
    restores_wake_ms: int = 0  # when the core looks again whether this tenant may restore; past: never
    use_ms: int = 0  # moving mean of device time per request; the retry hint of a concurrency refusal

    @property
    def quota(self) -> TenantQuota:
        return self.spec.quota

    @property
    def in_flight(self) -> int:
        return self.waiting + self.granted

    def account(self, tier: Tier) -> Account:
        if tier is Tier.DEVICE:
            return self.device
        return self.host if tier is Tier.HOST else self.disk


def apply_quota(tenant: Tenant, spec: TenantSpec, now_ms: int) -> None:
    """Take a tenant's new description; reserves are set by ``share_reserves`` afterwards."""
    tenant.spec = spec
    tenant.planned = True
    quota = spec.quota
    tenant.device.set_limit(quota.device.max)
    tenant.host.set_limit(quota.host.max)
    tenant.disk.set_limit(quota.disk.max)
    tenant.rates.set_limits(quota, now_ms)


def share_reserves(tenants: dict[str, Tenant], tier: Tier, capacity_bytes: int) -> None:
    """Set every tenant's effective reserve in ``tier``; a tenant that left has none."""
    asked = []
    for tenant in tenants.values():
        quota = tenant.quota
        bytes_quota = (
            quota.device if tier is Tier.DEVICE else (quota.host if tier is Tier.HOST else quota.disk)
        )
        reserved = bytes_quota.reserved if tenant.planned else 0
        if bytes_quota.max is not None:
            reserved = min(reserved, bytes_quota.max)
        asked.append(reserved)
    total = sum(asked)
    for tenant, reserved in zip(tenants.values(), asked, strict=True):
        tenant.account(tier).reserved_bytes = scaled_reserve(reserved, total, capacity_bytes)


def charge(tenant: Tenant, cost_ms: int) -> None:
    """Move a tenant's virtual time by the cost that it caused, by its weight."""
    tenant.virtual_us += cost_ms * 1000 // max(tenant.quota.weight, 1)
