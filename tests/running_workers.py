"""What tests of workers share: a device, and waiting for processes that may not be our children.

Covers: values and waits. Does not cover: any test.
"""

from __future__ import annotations

import asyncio
import os
import select

from agent.devices import DeviceConfig
from packer.types import GIB

DEVICE = DeviceConfig("cpu:0", "cpu", "cpu", GIB)
# Long enough for a loaded machine; every wait ends as soon as the event is there.
PATIENCE_S = 60


async def until_gone(pid: int) -> None:
    """Wait until a process that may not be our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert await asyncio.to_thread(poll.poll, PATIENCE_S * 1000), f"process {pid} is still there"
    finally:
        os.close(descriptor)
