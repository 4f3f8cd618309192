"""What a node's devices have room for besides what other processes take of them.

Covers: looking now and then, and telling the core what changed. Does not cover: how a device is asked
(``agent/devices.py``) or what the core does about it (``packer/residency.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from agent import devices
from agent.devices import DeviceConfig, DeviceState
from agent.roster import Roster
from packer.events import DeviceSeen, Event

# GPUs are asked this often for foreign processes' bytes; NVML answers in about a millisecond.
DEVICE_LOOK_S = 2.0


class DeviceWatch:
    """``roster`` knows which processes are the node's own."""

    def __init__(
        self, devices_: Mapping[str, DeviceConfig], roster: Roster, post: Callable[[Event], None]
    ) -> None:
        self._devices = devices_
        self._roster = roster
        self._post = post
        self._seen: dict[str, DeviceState] = {}

    def look(self) -> None:
        pids, idle_pids = self._roster.pids(), self._roster.pids(idle=True)
        for name, device in self._devices.items():
            state = devices.look(device, pids[name], idle_pids[name])
            if self._seen.get(name) != state:
                self._seen[name] = state
                budget_bytes = max(0, device.budget_bytes - state.foreign_bytes - state.contexts_bytes)
                # Giving back a part of an image has not been seen on a GPU yet: there models leave whole.
                partial = device.kind == "cpu"
                self._post(DeviceSeen(name, budget_bytes, state.healthy, partial))

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(DEVICE_LOOK_S)
            self.look()

    def foreign_bytes(self, device: str) -> int:
        return self._seen[device].foreign_bytes

    def contexts_bytes(self, device: str) -> int:
        return self._seen[device].contexts_bytes
