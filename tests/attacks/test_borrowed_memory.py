"""A tenant that wants others' reserved memory: by scanning, by asking and leaving, by asking for the huge.

Covers: what it takes from a tenant without credit, and what it can make of its own books. Does not cover: the
guarantee over arbitrary histories (``test_lending``).
"""

from __future__ import annotations

import pytest
from scene import Scene, device_quota, model, of

from packer.events import Cancelled, Evict, Refuse

HOME = model("acme/home", 50)
SCANNED = tuple(model(f"mallory/m{i}", 30) for i in range(6))


def scene(mallory_mib: int) -> Scene:
    quotas = {"acme": device_quota(50), "mallory": device_quota(mallory_mib)}
    made = Scene(HOME, *SCANNED, devices_mib=(100,), quotas=quotas)
    made.warm(HOME)
    return made


@pytest.mark.parametrize("mallory_mib", [0, 50])
def test_a_scan_never_reaches_what_a_slice_has(mallory_mib: int) -> None:
    made = scene(mallory_mib)
    for _ in range(3):
        for spec in SCANNED:
            made.later(10).warm(spec)
            assert made.state(HOME) == "resident"
    assert made.node.tenants["acme"].slice.debt_ms == 0


def test_asking_and_leaving_earns_nothing_and_takes_nothing() -> None:
    made = scene(50)
    made.warm(SCANNED[0])
    for spec in (*SCANNED[1:], *SCANNED[1:]):
        actions = made.later(10).ask(spec)
        assert all(order.ref.tenant == "mallory" for order in of(actions, Evict))
        made.settle(actions + made.feed(Cancelled(f"r{made.requests}")))
    assert made.node.tenants["mallory"].slice.debt_ms == 0
    assert made.state(HOME) == "resident"


def test_a_model_that_needs_others_reserved_bytes_is_refused_at_once() -> None:
    huge = model("mallory/huge", 80)
    made = Scene(HOME, huge, devices_mib=(100,), quotas={"acme": device_quota(50)})
    made.warm(HOME)
    assert of(made.ask(huge), Refuse)
    assert made.state(HOME) == "resident"
