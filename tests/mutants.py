"""Planted bugs: copies of the core with one line changed, which the simulation must catch.

Covers: the list of changes and loading a changed copy of the deciding modules beside the real ones.
Does not cover: running them (``test_simulation``). A change whose text is no longer in the source is an
error, so that the list can not rot silently.

A bug that is not in the shortcut for hits is planted in a core without it: otherwise the shortcut, which does
the same as the step, would do it right most of the time. That the two agree is ``test_hits``' matter.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import packer

# In the order of their imports. Types and events are shared with the real core: the world speaks them.
MODULES = (
    "lending",
    "intensity",
    "keep",
    "rates",
    "quota",
    "proof",
    "ledger",
    "places",
    "room",
    "giving",
    "victims",
    "turns",
    "explain",
    "placement",
    "moving",
    "gang_room",
    "choice",
    "queueing",
    "admission",
    "forecast",
    "prefetch",
    "upkeep",
    "facts",
    "remember",
    "hits",
    "invariants",
    "residency",
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted bug: in ``module``, the text ``old`` becomes ``new``."""

    what: str
    module: str
    old: str
    new: str


# What is worth keeping is wrong with these, and nothing is broken: no history shows it, single tests do.
WORTH_MUTANTS = (
    Mutant(
        "a copy beneath a resident model counts in full",
        "room",
        "        if in_host and (model.state is resident or model.waiters):\n",
        "        if in_host and model.waiters:\n",
    ),
)
MUTANTS = (
    Mutant(
        "what outlives its version is charged to nobody",
        "residency",
        "        charge_copy(node, node.models[ref], event.tier, nbytes)",
        "        pass",
    ),
    Mutant(
        "what is charged to a copy that goes does not go with it",
        "ledger",
        "            account.leaving_bytes += grown_bytes",
        "            pass",
    ),
    Mutant(
        "what outlives its version is charged to the node and not to its tenant",
        "ledger",
        "model.tenant.account(tier)):\n        account.hold_found(grown_bytes)",
        "):\n        account.hold_found(grown_bytes)",
    ),
    Mutant(
        "leased models are evicted",
        "queueing",
        "if all(taking.model.idle for taking in takings):",
        "if all(taking.model.device is device for taking in takings):",
    ),
    Mutant(
        "a model is evicted while its pack is written",
        "ledger",
        "state is State.RESIDENT and not self.leases and not self.packing",
        "state is State.RESIDENT and not self.leases",
    ),
    Mutant(
        "bytes count as free when their eviction is ordered",
        "quota",
        "self.used_bytes + nbytes <= self.limit_bytes",
        "self.kept_bytes + nbytes <= self.limit_bytes",
    ),
    Mutant(
        "evictions under way are not counted, so too many are ordered",
        "quota",
        "-1 if self.limit_bytes is None else self.kept_bytes + nbytes",
        "-1 if self.limit_bytes is None else self.used_bytes + nbytes",
    ),
    Mutant(
        "a restored model is not leased to those who wait",
        "queueing",
        "        leave_queue(node, waiter)\n        # Whoever",
        "        if len(model.waiters) == 1:\n            continue\n"
        "        leave_queue(node, waiter)\n        # Whoever",
    ),
    Mutant(
        "a cancelled grant keeps its lease",
        "residency",
        "    else:\n        _finished(node, request, 0, 0, now_ms)",
        "    else:\n        node.requests.pop(request, None)",
    ),
    Mutant(
        "late answers count",
        "residency",
        "and order in (0, model.order)",
        "and order >= 0",
    ),
    Mutant(
        "a copy that is being dropped is read",
        "room",
        "return model.copy(tier).state is CopyState.HELD",
        "return model.copy(tier).state in (CopyState.HELD, CopyState.DROPPING)",
    ),
    Mutant(
        "a copy that is being read is dropped",
        "room",
        "        if copy.state is not held_state or copy.readers:\n",
        "        if copy.state is not held_state:\n",
    ),
    Mutant(
        "a dead worker's leases pin the next stay",
        "residency",
        "            model.leases = 0\n            model.residency += 1",
        "            model.residency += 1",
    ),
    Mutant(
        "an old lease ends a new one",
        "residency",
        "if lease.residency == model.residency:",
        "if model.leases:",
    ),
    Mutant(
        "nobody times out",
        "queueing",
        "wake_at(node, deadline_ms, request)",
        "wake_at(node, deadline_ms)",
    ),
    Mutant(
        "a wake-up that is spent is still expected",
        "residency",
        "            node.wake_ms = None",
        "            pass",
    ),
    Mutant(
        "a max is not looked at when a model starts",
        "victims",
        "        and own.fits(need)\n",
        "",
    ),
    Mutant(
        "a budget that sank sheds nothing",
        "upkeep",
        "if not device.healthy or device.account.excess_bytes:",
        "if not device.healthy:",
    ),
    Mutant(
        "reserves protect nobody",
        "lending",
        "return min(shade.real_bytes, has_bytes)\n",
        "return 0\n",
    ),
    Mutant(
        "a later model takes the room that a claim made",
        "victims",
        "promised = earlier.devices.get(device.name, 0)",
        "promised = 0",
    ),
    Mutant(
        "models in constant use are never condemned",
        "queueing",
        "elif now_ms - since_ms >= CLAIM_PATIENCE_MS:",
        "elif now_ms < 0:",
    ),
    Mutant(
        "a host reservation that was not filled is kept",
        "residency",
        "            release_copy(node, model, Tier.HOST)",
        "            pass",
    ),
    Mutant(
        "a corrupt copy is kept",
        "residency",
        "elif event.corrupt and source is not Tier.ORIGIN and",
        "elif event.corrupt and source is Tier.ORIGIN and",
    ),
    Mutant(
        "a removed model that was restoring stays",
        "upkeep",
        "            order_evict(node, model, out)\n        for tier",
        "            pass\n        for tier",
    ),
    Mutant(
        "a dead worker's pack reservation is freed while the file is written",
        "residency",
        "            model.packing = False\n            node.unpacked.pop(model.ref, None)",
        "            if model.packing:\n                release_copy(node, model, Tier.DISK)\n"
        "            model.packing = False\n            node.unpacked.pop(model.ref, None)",
    ),
    Mutant(
        "a pack beside a load pins nothing",
        "queueing",
        "    model.packing = True\n",
        "    model.packing = model.state is State.RESIDENT\n",
    ),
    Mutant(
        "a load that failed frees the room of its pack while the file is written",
        "residency",
        "    model.packing = False\n    _send_away(",
        "    if model.packing:\n        release_copy(node, model, Tier.DISK)\n"
        "    model.packing = False\n    _send_away(",
    ),
    Mutant(
        "a pack that is complete before its load is forgotten",
        "residency",
        "    model.packing = False\n    model.opened_bytes = event.host_bytes",
        "    if model.state is State.RESTORING:\n        return\n"
        "    model.packing = False\n    model.opened_bytes = event.host_bytes",
    ),
    Mutant(
        "a second pack is reserved while the first is written",
        "queueing",
        "        and model.disk.state in (CopyState.ABSENT, CopyState.BEGUN)\n",
        "        and model.disk.state in (CopyState.ABSENT, CopyState.BEGUN, CopyState.FILLING)\n",
    ),
    Mutant(
        "what is begun of a pack counts as free when the pack is gone on with",
        "ledger",
        "    begun_bytes = model.disk.held_bytes if model.disk.state is CopyState.BEGUN else 0\n",
        "    begun_bytes = 2 * model.disk.held_bytes if model.disk.state is CopyState.BEGUN else 0\n",
    ),
    Mutant(
        "what is begun of a pack is restored from",
        "room",
        "    return model.copy(tier).state is CopyState.HELD\n",
        "    return model.copy(tier).state in (CopyState.HELD, CopyState.BEGUN)\n",
    ),
    Mutant(
        "a pack beside a load needs no room",
        "queueing",
        "        or not node.disk.fits(nbytes)\n",
        "",
    ),
    Mutant(
        "a restore that failed is not tried again",
        "residency",
        "        queueing.wake_at(node, model.not_before_ms)\n        return",
        "        model.not_before_ms = 1 << 60\n        return",
    ),
    Mutant(
        "a model of which only the first chunks are there is granted",
        "queueing",
        "        (model.state is State.RESIDENT or model.serving)\n        and model.planned",
        "        (model.state in (State.RESIDENT, State.PARTIAL) or model.serving)\n"
        "        and model.planned",
    ),
    Mutant(
        "the chunks that stay are not counted",
        "ledger",
        "    kept_bytes = prefix_bytes(model.spec, kept_chunks)\n    surprising",
        "    kept_bytes = 0\n    surprising",
    ),
    Mutant(
        "what is there already is taken once more for the rest",
        "ledger",
        "    nbytes = model.missing_bytes\n",
        "    nbytes = model.need_bytes\n",
    ),
    Mutant(
        "chunks that are there are brought again",
        "queueing",
        "first_chunk = 0 if source is Tier.ORIGIN else model.resident_chunks",
        "first_chunk = 0",
    ),
    Mutant(
        "the origin is asked for missing chunks only",
        "queueing",
        "first_chunk = 0 if source is Tier.ORIGIN else model.resident_chunks",
        "first_chunk = model.resident_chunks",
    ),
    Mutant(
        "part of a model stays that no copy can complete",
        "giving",
        "        and (model.host.state is CopyState.HELD or model.disk.state is CopyState.HELD)\n",
        "",
    ),
    Mutant(
        "a chunk more goes than is needed",
        "victims",
        "    kept = bisect_right(ends, spared + spare_bytes)\n",
        "    kept = max(bisect_right(ends, spared + spare_bytes) - 1, 0)\n",
    ),
    Mutant(
        "nobody spares chunks when a budget sinks",
        "victims",
        "max(-excess_bytes, 0), 0)",
        "0, 0)",
    ),
    Mutant(
        "what a failed restore left there is forgotten",
        "residency",
        "min(max(event.kept_chunks, 0), model.kept_chunks)",
        "0",
    ),
    Mutant(
        "what a failed restore lost is still counted",
        "residency",
        "min(max(event.kept_chunks, 0), model.kept_chunks)",
        "model.kept_chunks",
    ),
    Mutant(
        "a dead worker's first chunks stay",
        "residency",
        "            release_device(node, model, kept_chunks=0)",
        "            release_device(node, model, model.kept_chunks)",
    ),
    Mutant(
        "an eviction frees what was ordered to stay",
        "residency",
        "    release_device(node, model, model.kept_chunks)\n",
        "    release_device(node, model, 0)\n",
    ),
    Mutant(
        "the rest of a model goes to whatever device has room",
        "victims",
        "    if model.device is not None and model.device is not device:\n        return False",
        "    if model.device is not None and model.device is not device and need_on(model, device) < 0:\n"
        "        return False",
    ),
    Mutant(
        "a part that comes from disk leaves no host copy",
        "queueing",
        "    if source is Tier.DISK:\n        make",
        "    if source is Tier.DISK and not first_chunk:\n        make",
    ),
    Mutant(
        "a waiting model's own chunks are evicted for it",
        "victims",
        "return None if model is wanted else int(bool(model.waiters))",
        "return int(bool(model.waiters))",
    ),
    Mutant(
        "nobody waits for the rest of a model",
        "ledger",
        "return self.state is State.ABSENT or self.state is State.PARTIAL",
        "return self.state is State.ABSENT",
    ),
    Mutant(
        "chunks of a model that left the plan stay",
        "ledger",
        " or state is State.PARTIAL\n\n    @property\n    def tier_now",
        "\n\n    @property\n    def tier_now",
    ),
    Mutant(
        "who was let in early is forgotten when the rest has come",
        "residency",
        "    if not model.serving:\n        model.residency += 1\n        model.leases = 0\n",
        "    model.residency += 1\n    model.leases = 0\n    if not model.serving:\n",
    ),
    Mutant(
        "who was let in early pins what failed to come",
        "residency",
        "model.serving, model.leases = False, 0",
        "model.serving = False",
    ),
    Mutant(
        "a model whose early answers ended is granted on",
        "residency",
        "event.device, event.order):\n        _send_away(node, model)",
        "event.device, event.order):\n        model.leases = 0",
    ),
    Mutant(
        "who was sent away counts for the next stay",
        "residency",
        "        model.serving, model.leases = False, 0\n        model.residency += 1\n",
        "        model.serving, model.leases = False, 0\n",
    ),
    Mutant(
        "a queue holds one more than its bound",
        "queueing",
        "model.tenant.waiting >= WAITING_PER_TENANT_MAX or node.waiting >= WAITING_MAX",
        "model.tenant.waiting > WAITING_PER_TENANT_MAX or node.waiting > WAITING_MAX",
    ),
    Mutant(
        "bytes are lent by whoever is in debt",
        "lending",
        "        if self.debt_ms >= 0:\n            return 0\n",
        "        if self.debt_ms >= 0:\n            return UNLIMITED_MS\n",
    ),
    Mutant(
        "the slice never evicts",
        "lending",
        "self.held_bytes > self.reserved_bytes or",
        "self.held_bytes < 0 or",
    ),
    Mutant(
        "a use that the slice pays for counts against its tenant",
        "lending",
        "self._book(-cost_ms, terms)",
        "self._book(cost_ms, terms)",
    ),
    Mutant(
        "the slice keeps what a dead worker lost",
        "lending",
        "        self._hold(shade, min(shade.slice_bytes, shade.prefix_bytes(real_bytes)))\n",
        "",
    ),
    Mutant(
        "what requests need is not counted in the slice",
        "lending",
        "            self.held_bytes += more_bytes\n",
        "",
    ),
    Mutant(
        "a claim takes from every slice",
        "giving",
        "        spared = 0 if forced or not model.planned else",
        "        spared = 0 if wanted_bytes or not model.planned else",
    ),
    Mutant(
        "the shortcut grants on a condemned model",
        "hits",
        "or (node.condemned and model.ref in node.condemned)",
        "or (node.condemned and model.ref not in node.condemned)",
    ),
    Mutant(
        "the shortcut forgets that an old lease pins nothing",
        "hits",
        "    if lease.residency == model.residency:\n        model.leases -= 1",
        "    if model.leases:\n        model.leases -= 1",
    ),
    Mutant(
        "the shortcut grants past the deadline of another",
        "hits",
        "and now_ms < wake_ms <= at_ms",
        "and wake_ms <= at_ms",
    ),
    Mutant(
        "what left the plan stays when its last lease ends quietly",
        "hits",
        "        or node.removed\n        or node.unpacked\n        or node.condemned\n",
        "        or node.unpacked\n        or node.condemned\n",
    ),
)


def load(mutant: Mutant) -> ModuleType:
    """The residency module of a core that has this bug; the real modules stay as they are."""
    saved = {name: sys.modules.get(f"packer.{name}") for name in MODULES}
    assert all(saved.values()), "import packer.residency first"
    try:
        for name in MODULES:
            path = Path(packer.__file__).with_name(f"{name}.py")
            source = path.read_text()
            if name == mutant.module:
                count = source.count(mutant.old)
                assert count == 1, f"mutant {mutant.what!r}: its text is {count} times in {path.name}"
                source = source.replace(mutant.old, mutant.new)
            module = ModuleType(f"packer.{name}")
            module.__file__ = str(path)
            sys.modules[f"packer.{name}"] = module
            setattr(packer, name, module)
            exec(compile(source, str(path), "exec"), module.__dict__)
        core = sys.modules["packer.residency"]
        if mutant.module != "hits":
            vars(core)["step"] = vars(core)["step_in_full"]
        return core
    finally:
        for name, module_before in saved.items():
            assert module_before is not None
            sys.modules[f"packer.{name}"] = module_before
            setattr(packer, name, module_before)
