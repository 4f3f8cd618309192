"""The workers of a node: who is there, who is forked next and who is closed.

Covers: one worker for each tenant and device, or place of several; forking it when an order needs it,
which models it was ordered to hold, parking it when it holds none, killing one that hangs, and closing those
of tenants that are no more. Does not cover: what a worker is told (``agent/orders.py``), how it is told
(``agent/workers.py``) or how it comes to be (``agent/spawning.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from agent.background import Background
from agent.devices import DeviceConfig, at_place
from agent.segments import HostSegments, freed
from agent.spawning import Nursery
from agent.workers import WorkerDead, WorkerFailure, WorkerHandle
from packer.events import Event, TookLate, WorkerDied
from packer.gangs import devices_in
from packer.types import ModelRef

log = logging.getLogger("bunk.roster")

# A parked worker keeps its module skeletons and costs some 60 MiB of private memory; beyond this many
# on one node the one that has been empty longest is closed.
WORKERS_PARKED_MAX = 16


class Roster:
    """``post`` hears of a worker's death and of device time that it tells of after its answer."""

    def __init__(
        self,
        nursery: Nursery,
        devices: Mapping[str, DeviceConfig],
        segments: HostSegments,
        post: Callable[[Event], None],
    ) -> None:
        self._nursery = nursery
        self._devices = devices
        self._segments = segments
        self._post = post
        # Told of each measured request: model, device, the worker's process, bytes beside the weights.
        self.on_workspace: Callable[[ModelRef, str, int, int], None] = lambda *seen: None
        self.workers: dict[tuple[str, str], WorkerHandle] = {}
        self._spawning: dict[tuple[str, str], asyncio.Task[WorkerHandle]] = {}
        # What each worker holds, oldest-emptied first: only for choosing which parked worker to close.
        self._held: dict[tuple[str, str], set[ModelRef]] = {}
        # None before the first plan.
        self._tenants: frozenset[str] | None = None
        self._background = Background()

    def pids(self, idle: bool = False) -> dict[str, list[int]]:
        """Process ids by device, standbys included. ``idle``: of those that hold no model."""
        pids = {device: self._nursery.standby_pids(device) for device in self._devices}
        for at, worker in self.workers.items():
            if not idle or not self._held.get(at):
                for device in devices_in(at[1]):
                    pids[device].append(worker.pid)
        return pids

    # --- finding and forking ----------------------------------------------------------------------

    def find(self, ref: ModelRef, device: str) -> WorkerHandle | None:
        """The worker of the model's tenant, if there is one."""
        return self.workers.get((ref.tenant, device))

    async def find_or_fork(self, ref: ModelRef, device: str) -> WorkerHandle:
        """The worker of the model's tenant on a device, or on a place of several. Raises ``WorkerDead``."""
        at = (ref.tenant, device)
        if at in self.workers:
            return self.workers[at]
        if at not in self._spawning:
            self._spawning[at] = asyncio.create_task(self._spawn(at))
        return await asyncio.shield(self._spawning[at])

    async def _spawn(self, at: tuple[str, str]) -> WorkerHandle:
        try:
            await self._close_parked()
            worker = await self._nursery.spawn(at[0], at_place(self._devices, at[1]))
            worker.on_workspace = lambda ref, nbytes: self.on_workspace(ref, at[1], worker.pid, nbytes)
            worker.on_late = lambda device_ms: self._post(TookLate(at[0], device_ms))
            self.workers[at] = worker
            self._background.start(self._watch(at, worker))
            return worker
        finally:
            del self._spawning[at]

    async def _watch(self, at: tuple[str, str], worker: WorkerHandle) -> None:
        await worker.died.wait()
        if self.workers.get(at) is worker:
            del self.workers[at]
            self._held.pop(at, None)
            for freeing in self._segments.give_all_back(*at):
                await freed(freeing)
        self._post(WorkerDied(*at))

    @asynccontextmanager
    async def in_time(self, worker: WorkerHandle, timeout_s: float) -> AsyncIterator[None]:
        """Kill a worker that does not answer in time. Raises ``WorkerDead``."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            log.error("worker %d of %s hangs; killing it", worker.pid, worker.tenant)
            worker.kill()
            raise WorkerDead(f"worker {worker.pid} did not answer in {timeout_s:g} s") from None

    # --- what they hold ---------------------------------------------------------------------------

    def hold(self, ref: ModelRef, device: str) -> None:
        """From now on, so that a worker that is just being forked for it is not taken for a parked one."""
        self._held.setdefault((ref.tenant, device), set()).add(ref)

    def let_go(self, ref: ModelRef, device: str) -> None:
        at = (ref.tenant, device)
        held = self._held.get(at)
        if held is None:
            return
        held.discard(ref)
        if not held:
            # Re-insert so that the dictionary's order is the order of becoming empty.
            self._held[at] = self._held.pop(at)
            if at in self.workers and self._is_orphaned(at):
                self._background.start(self.workers[at].close())

    def keep_only(self, planned: frozenset[ModelRef]) -> None:
        """Have the workers stop bringing in what is not in the plan any more."""
        for at, held in self._held.items():
            worker = self.workers.get(at)
            for ref in held:
                if worker is not None and ref not in planned:
                    self._background.start(_cancel(worker, ref))

    # --- closing ----------------------------------------------------------------------------------

    async def _close_parked(self) -> None:
        parked = [at for at, held in self._held.items() if not held and at in self.workers]
        for at in parked[: max(0, len(parked) - WORKERS_PARKED_MAX + 1)]:
            # What was parked may be gone or wanted again since another one was closed.
            if at in self.workers and not self._held.get(at):
                await self.workers[at].close()

    async def close_tenants(self, kept: frozenset[str]) -> None:
        """Close the workers of tenants that are no more: the empty ones now, others once they are."""
        self._tenants = kept
        for at in [at for at in self.workers if self._is_orphaned(at)]:
            await self.workers[at].close()

    def _is_orphaned(self, at: tuple[str, str]) -> bool:
        return self._tenants is not None and at[0] not in self._tenants and not self._held.get(at)

    async def close(self) -> None:
        for worker in list(self.workers.values()):
            await worker.close()
        await self._background.close()


async def _cancel(worker: WorkerHandle, ref: ModelRef) -> None:
    with suppress(WorkerDead, WorkerFailure):
        await worker.cancel(ref)
