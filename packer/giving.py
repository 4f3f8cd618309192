"""What may be taken of whom: what a choice of victims leaves of each, as their tenants' slices allow.

Covers: which bytes of a candidate may go, how far that widens its tenant's gap, and counting both over one
choice. Does not cover: the order of candidates and how many are needed (``victims``), or the books
themselves (``lending``).
"""

from __future__ import annotations

from typing import NamedTuple

from packer import room
from packer.ledger import CopyState, Model, Node
from packer.lending import Shade
from packer.quota import Tenant

# A model that may have to go: the class of its standing (least protected first), its keep-index, its name,
# the model, and its bytes that are not leaving already. A plain tuple, because there may be a thousand.
Candidate = tuple[int, float, str, Model, int]


class Given(NamedTuple):
    """A victim, how many of its bytes go, and how many stay because its tenant's slice has them too."""

    candidate: Candidate
    nbytes: int
    spared_bytes: int
    forced: bool  # beyond what its tenant's slice allows


class Choice:
    """Victims so far, and how far the gaps of their tenants may still be widened."""

    __slots__ = ("_may_open_ms", "_node", "given")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._may_open_ms: dict[str, int] = {}
        self.given: dict[Model, Given] = {}

    def take(self, candidate: Candidate, wanted_bytes: int, forced: bool = False) -> int:
        """Add a victim, or more of one; returns by how many bytes more it gives."""
        _, _, _, model, held = candidate
        before = self.given.get(model)
        spared = 0 if forced or not model.planned else self._spared_bytes(model, wanted_bytes)
        gave = before.nbytes if before is not None else 0
        if held - spared <= gave:
            return 0
        self.given[model] = Given(candidate, held - spared, spared, forced)
        return held - spared - gave

    def _spared_bytes(self, model: Model, wanted_bytes: int) -> int:
        node, tenant = self._node, model.tenant
        slice_, shade, name = tenant.slice, model.shade, tenant.spec.tenant
        if not slice_.reserved_bytes:
            return 0
        may_open_ms = self._may_open_ms.get(name)
        if may_open_ms is None:
            may_open_ms = self._may_open_ms[name] = slice_.may_open_ms(node.terms)
        if is_closed(shade, may_open_ms, wanted_bytes):
            return shade.size_bytes
        slice_.price(shade, room.price(node, model))
        spared = slice_.spared_bytes(shade, wanted_bytes, may_open_ms)
        if spared and not is_divisible(node, model):
            return shade.size_bytes
        opens_ms = shade.gap_with(spared) - shade.gap_ms
        self._may_open_ms[name] = may_open_ms - max(opens_ms, 0)
        return spared

    def kept_bytes(self, tenant: Tenant) -> int:
        """What the choice so far leaves a tenant on devices."""
        given = sum(each.nbytes for model, each in self.given.items() if model.tenant is tenant)
        return tenant.device.kept_bytes - given


def may_open_ms(node: Node, but: Tenant) -> dict[Tenant, int]:
    """How far the gaps of other tenants with a slice may be widened now."""
    others = (each for each in node.tenants.values() if each.slice.reserved_bytes and each is not but)
    return {each: each.slice.may_open_ms(node.terms) for each in others}


def is_closed(shade: Shade, may_open_ms: int, wanted_bytes: int) -> bool:
    """The usual case of a model that is protected: its slice has all of it, and what is wanted of it costs
    more than may be lent."""
    if shade.slice_bytes < shade.real_bytes or shade.gap_ms or shade.owed_ms is not None:
        return False
    price = shade.price
    return may_open_ms < price.fixed_ms or may_open_ms < price.of(wanted_bytes, shade.image_bytes)


def is_divisible(node: Node, model: Model) -> bool:
    """Can part of it go, and be brought back? The origin gives whole models only."""
    device = model.device
    return (
        node.partial
        and bool(model.spec.chunk_bytes)
        and device is not None
        and device.partial
        and (model.host.state is CopyState.HELD or model.disk.state is CopyState.HELD)
    )
