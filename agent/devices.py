"""Devices of this box: NVML inventory when a driver is present, else byte-budgeted cpu devices.

Covers: parsing ``--device``, the inventory, and the bytes that foreign processes use on a GPU. Does
not cover: who may use those bytes (``packer/residency.py``) or putting tensors there
(``agent/arena.py``).

A cpu device is not a simulation: it is a budget over this machine's memory that real tensors are
held against, by the same code path as a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pynvml

from packer.gangs import devices_in
from packer.types import MIB, BadValue, parse_budget

# Left free on every GPU for the driver and for fragmentation.
CUDA_RESERVE_BYTES = 256 * MIB
# What a worker's CUDA context takes, until it was measured: 300 to 500 MiB on current drivers.
CONTEXT_BYTES_FIRST = 512 * MIB
# Smallest useful device: one chunk of 4 MiB, its workspace and the rounding of both.
DEVICE_BYTES_MIN = 16 * MIB
# NVML itself enumerates at most this many; a box with more would need a second agent anyway.
DEVICES_MAX = 64


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device of this node. ``device`` is its id everywhere: ``cpu:0``, ``cuda:GPU-…``."""

    device: str
    kind: str  # "cpu" or "cuda"
    name: str  # "cpu" or the product name
    budget_bytes: int
    uuid: str = ""  # cuda only: what CUDA_VISIBLE_DEVICES gets in the worker

    @property
    def count(self) -> int:
        """How many devices it is: more than one for the place of a gang (``at_place``)."""
        return len(devices_in(self.device))


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What NVML says now; for cpu devices the budget is always all ours.

    ``contexts_bytes``: what our own processes hold there besides weights and workspaces.
    """

    device: str
    foreign_bytes: int
    healthy: bool
    contexts_bytes: int = 0


def at_place(known: Mapping[str, DeviceConfig], place: str) -> DeviceConfig:
    """A device, or those of a place together, as its one worker sees them; they are of one kind."""
    members = [known[name] for name in devices_in(place)]
    if len(members) == 1:
        return members[0]
    return DeviceConfig(
        place,
        members[0].kind,
        members[0].name,
        sum(member.budget_bytes for member in members),
        ",".join(member.uuid for member in members),
    )


def nvml_devices() -> tuple[DeviceConfig, ...]:
    """Every GPU that NVML lists; empty when there is no driver. Bytes are exact, from NVML."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    found = []
    for index in range(min(pynvml.nvmlDeviceGetCount(), DEVICES_MAX)):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        name = str(pynvml.nvmlDeviceGetName(handle))
        found.append(DeviceConfig(f"cuda:{uuid}", "cuda", name, total - CUDA_RESERVE_BYTES, uuid))
    return tuple(found)


def _cpu_default_budget_bytes() -> int:
    """A quarter of the machine's memory: weights, host tier and the workers themselves share it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def inventory(wishes: Sequence[str]) -> tuple[DeviceConfig, ...]:
    """The devices to serve from. ``wishes`` are ``--device`` values: ``cpu:96MiB``, ``cuda`` (all
    GPUs), ``cuda:0`` (by index) or ``cuda:GPU-…`` (by UUID); none means all GPUs, or one cpu device
    of a quarter of the memory when there is no GPU. Raises ``BadValue``."""
    gpus = nvml_devices()
    if not wishes:
        return gpus or (DeviceConfig("cpu:0", "cpu", "cpu", _cpu_default_budget_bytes()),)
    if len(wishes) > DEVICES_MAX:
        raise BadValue("--device", f"given {len(wishes)} times, the limit is {DEVICES_MAX}")
    chosen: list[DeviceConfig] = []
    for wish in wishes:
        kind, _, rest = wish.partition(":")
        if kind == "cpu":
            index = sum(device.kind == "cpu" for device in chosen)
            chosen.append(_cpu_device(rest, index))
        elif kind == "cuda":
            chosen.extend(_cuda_devices(wish, rest, gpus))
        else:
            raise BadValue("--device", f"{wish!r}: write cpu:SIZE (cpu:96MiB), cuda, cuda:INDEX or cuda:UUID")
    names = [device.device for device in chosen]
    if len(set(names)) != len(names):
        raise BadValue("--device", f"a GPU is named twice: {', '.join(names)}")
    return tuple(chosen)


def _cpu_device(size: str, index: int) -> DeviceConfig:
    budget_bytes = parse_budget(size, "--device") if size else _cpu_default_budget_bytes()
    if budget_bytes < DEVICE_BYTES_MIN:
        raise BadValue("--device", f"cpu:{size}: the least is {DEVICE_BYTES_MIN // MIB}MiB")
    return DeviceConfig(f"cpu:{index}", "cpu", "cpu", budget_bytes)


def _cuda_devices(wish: str, rest: str, gpus: tuple[DeviceConfig, ...]) -> tuple[DeviceConfig, ...]:
    if not gpus:
        raise BadValue("--device", f"{wish}: NVML finds no GPU here; is the NVIDIA driver loaded?")
    if not rest:
        return gpus
    if rest.isdigit():
        if int(rest) >= len(gpus):
            raise BadValue("--device", f"{wish}: there are {len(gpus)} GPUs, the highest is {len(gpus) - 1}")
        return (gpus[int(rest)],)
    match = [gpu for gpu in gpus if gpu.uuid == rest]
    if not match:
        raise BadValue("--device", f"{wish}: no GPU has this UUID; NVML lists {[gpu.uuid for gpu in gpus]}")
    return (match[0],)


def look(device: DeviceConfig, own_pids: Sequence[int], idle_pids: Sequence[int] = ()) -> DeviceState:
    """Bytes that processes other than ``own_pids`` use on a device, what the contexts of ours take, and
    whether it answers NVML. ``idle_pids``: those of ours that hold no model, so that all they use is their
    context."""
    if device.kind != "cuda":
        return DeviceState(device.device, 0, True)
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        ours, context_bytes = 0, 0
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            # Inside a container NVML may not know a process's bytes; then it counts as foreign, which errs
            # on the side of not over-filling the device.
            if process.pid in own_pids and process.usedGpuMemory is not None:
                ours += int(process.usedGpuMemory)
                if process.pid in idle_pids:
                    context_bytes = max(context_bytes, int(process.usedGpuMemory))
    except pynvml.NVMLError:
        return DeviceState(device.device, 0, False)
    contexts_bytes = len(own_pids) * (context_bytes or CONTEXT_BYTES_FIRST)
    return DeviceState(device.device, max(0, used - ours), True, contexts_bytes)


def used_bytes(device: DeviceConfig, pid: int) -> int | None:
    """Bytes that a process holds on a GPU, of several the most; None where NVML does not say."""
    found: list[int] = []
    try:
        for uuid in device.uuid.split(","):
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == pid and process.usedGpuMemory is not None:
                    found.append(int(process.usedGpuMemory))
    except pynvml.NVMLError:
        return None
    return max(found, default=None)


def close() -> None:
    """Let go of NVML; harmless when it was never there."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()
