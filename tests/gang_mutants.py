"""Planted bugs of models that need several devices, which the worlds with gangs must catch.

Covers: the list. Does not cover: planting (``mutants``, ``planted``) or running (``test_gang_simulation``,
``scripts/mutation.py``).
"""

from __future__ import annotations

from mutants import Mutant

GANG_MUTANTS = (
    Mutant(
        "a gang charges its first device alone",
        "ledger",
        "        member.account.hold(share)\n",
        "        member.account.hold(share if member is place.members[0] else 0)\n",
    ),
    Mutant(
        "a gang that goes is kept in its devices' accounts",
        "ledger",
        "        member.account.release(share, leaving=model.leaving_bytes > 0)\n",
        "",
    ),
    Mutant(
        "what leaves with a gang does not count as leaving on its devices",
        "ledger",
        "        member.account.leaving_bytes += share\n",
        "        pass\n",
    ),
    Mutant(
        "only the first share grows with what requests were seen to need",
        "ledger",
        "        changes.append((member.account, share - before))\n",
        "        changes.append((member.account, share - before if member is device.members[0] else 0))\n",
    ),
    Mutant(
        "a gang on a device that became unhealthy goes on answering",
        "facts",
        "        place.healthy = all(member.healthy for member in place.members)\n",
        "        place.healthy = place.healthy or event.healthy\n",
    ),
    Mutant(
        "a worker that dies takes gangs of other workers with it",
        "residency",
        "        if model.device is not device:\n            continue  # a gang has a worker of its own\n",
        "",
    ),
    Mutant(
        "a worker of a gang dies and its bytes stay",
        "residency",
        " or node.places.get(event.device)",
        "",
    ),
    Mutant(
        "room is looked for by the smallest share",
        "ledger",
        "        return max(self.run_bytes, default=self.spec.image_bytes) + self.workspace_bytes\n",
        "        return min(self.run_bytes, default=self.spec.image_bytes) + self.workspace_bytes\n",
    ),
    Mutant(
        "a gang takes what was promised to another model",
        "gang_room",
        "    promised = earlier.devices.get(device.name, 0)\n",
        "    promised = 0\n",
    ),
    Mutant(
        "a gang evicts before it has all its devices",
        "gang_room",
        "    if len(devices) < model.spec.devices:\n        return None\n",
        "    if not devices:\n        return None\n",
    ),
    Mutant(
        "what a gang frees counts whole on one device",
        "places",
        "    return freed_bytes if at is device else bytes_on(model, device)\n",
        "    return freed_bytes\n",
    ),
    Mutant(
        "who goes for a gang goes wholly",
        "gang_room",
        "            takings.append(cut(node, given, max(min(spare), 0)))\n",
        "            takings.append(cut(node, given, 0))\n",
    ),
    Mutant(
        "a gang that can never be waits for ever",
        "gang_room",
        "    if len(large) < spec.devices:\n",
        "    if not large:\n",
    ),
    Mutant(
        "the number of devices never changes",
        "ledger",
        "        if model.wanted is not None:\n            take_spec(node, model, model.wanted)\n",
        "        model.wanted = None\n",
    ),
    Mutant(
        "part of a gang is evicted",
        "places",
        "healthy, partial=False, members",
        "healthy, partial=True, members",
    ),
)
