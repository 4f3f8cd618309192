"""Planted bugs of what is filled into host memory ahead of need.

Covers: the list of changes. Does not cover: loading a changed copy (``mutants``) or running it
(``test_simulation``).
"""

from __future__ import annotations

from mutants import Mutant

PREFETCH_MUTANTS = (
    Mutant(
        "a copy is filled while somebody needs the disk",
        "prefetch",
        "        for device in node.devices.values()\n        for model in device.models.values()\n",
        "        for device in ()\n        for model in device.models.values()\n",
    ),
    Mutant(
        "a copy is filled while somebody waits",
        "prefetch",
        "    if node.waiting or node.draining",
        "    if node.draining",
    ),
    Mutant(
        "what is filled ahead of need goes on beside a restore",
        "queueing",
        "    else:\n        stop_fill(node, out)\n",
        "",
    ),
    Mutant(
        "a stop is ordered again and again",
        "queueing",
        "        state.stopping = True\n",
        "",
    ),
    Mutant(
        "copies that nobody asked for take the room of the next restore",
        "prefetch",
        "    short = node.host.short_bytes(_spare_bytes(node))\n",
        "    short = 0\n",
    ),
    Mutant(
        "what stays free is not worked out anew",
        "ledger",
        "[model.ref] = model\n    node.prefetch.spare_of = -1\n",
        "[model.ref] = model\n",
    ),
    Mutant(
        "a pack that is being opened ahead of need may go",
        "prefetch",
        "    model.disk.readers += 1\n",
        "",
    ),
    Mutant(
        "a restore ends what is filled beside it",
        "residency",
        "    if model.host.state is CopyState.FILLING and not model.host.order:\n",
        "    if model.host.state is CopyState.FILLING:\n",
    ),
    Mutant(
        "what left the plan is filled on",
        "prefetch",
        "return node.prefetch.on and model.planned and not node.draining",
        "return node.prefetch.on and not node.draining",
    ),
    Mutant(
        "the room of what could not be filled stays taken",
        "prefetch",
        "        release_copy(node, model, Tier.HOST)\n",
        "        pass\n",
    ),
)
