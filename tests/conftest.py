"""What all tests start from: no compiled kernels, unless a module asks for them; the longest files first.

Covers: the switch, the order in which files start, examples without a deadline, and collecting without
garbage collection. Does not cover: anything else; fixtures live beside the tests that use them.

A node compiles its kernels for two seconds at each start, and most tests of nodes do not depend on them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

from packer.kernels import SWITCH

os.environ.setdefault(SWITCH, "off")
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

# In this order, before all others: a file runs in one process from end to end, so that a long one that starts
# last leaves the other cores idle. Worth a place from some ten seconds on.
LONGEST_FILES = (
    "test_end_to_end.py",
    "test_simulation.py",
    "test_crash.py",
    "test_soak.py",
    "test_failures.py",
    "test_shares_running.py",
    "test_cluster_simulation.py",
    "test_peer_boxes.py",
    "test_openapi_clients.py",
    "test_worker_moves.py",
    "test_bench_restore.py",
    "test_regret_meter.py",
    "test_vectors.py",
    "test_remember.py",
    "test_rates_running.py",
    "test_control_crash.py",
    "test_rotate.py",
    "test_worker_ends.py",
    "test_worker.py",
    "test_openai_client.py",
    "test_oip_clients.py",
    "test_running_stack.py",
    "test_turns.py",
    "test_mutation.py",
    "test_lending.py",
    "test_hits.py",
    "test_calibrate.py",
    "test_export_engine.py",
    "test_shared_versions.py",
    "test_gang_box.py",
    "test_forged_mends.py",
    "test_moving.py",
    "test_node_disk.py",
    "test_fuzz_operators.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; otherwise the order stays."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Parsing and importing 200 files makes a million objects that stay: looking for garbage among them
    again and again would take a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module")
def compiled_kernels() -> Iterator[None]:
    """Nodes and workers that this module starts have compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SWITCH)
        yield
