"""Devices and the agent's options: what is accepted, and what a wrong value is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import config, devices
from packer.types import MIB, BadValue


def test_cpu_devices_are_numbered_and_exact() -> None:
    """Each --device cpu:SIZE is a device of its own with exactly that budget."""
    found = devices.inventory(["cpu:96MiB", "cpu:1GB"])
    assert [(device.device, device.budget_bytes) for device in found] == [
        ("cpu:0", 96 * MIB),
        ("cpu:1", 1_000_000_000),
    ]


@pytest.mark.parametrize(
    ("wish", "part"),
    [
        ("cpu:1MiB", "the least is 16MiB"),
        ("cpu:lots", "is not a size"),
        ("tpu:0", "write cpu:SIZE"),
        ("", "write cpu:SIZE"),
    ],
)
def test_bad_devices_are_told_the_way_out(wish: str, part: str) -> None:
    with pytest.raises(BadValue, match=part) as error:
        devices.inventory([wish])
    assert error.value.field == "--device"


def test_cuda_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a GPU that NVML does not list is an error at start, not a surprise later."""
    monkeypatch.setattr(devices, "nvml_devices", lambda: ())
    with pytest.raises(BadValue, match="NVML finds no GPU"):
        devices.inventory(["cuda:0"])


def test_without_wishes_a_box_without_gpu_is_one_cpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "nvml_devices", lambda: ())
    (only,) = devices.inventory([])
    assert only.kind == "cpu"
    assert only.budget_bytes > 0


def test_gpus_are_chosen_by_index_or_uuid_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(
        devices.DeviceConfig(f"cuda:GPU-{name}", "cuda", "H200", 1000 * MIB, f"GPU-{name}") for name in "ab"
    )
    monkeypatch.setattr(devices, "nvml_devices", lambda: gpus)
    assert devices.inventory([]) == gpus
    assert devices.inventory(["cuda"]) == gpus
    assert devices.inventory(["cuda:1"]) == gpus[1:]
    assert devices.inventory(["cuda:GPU-a"]) == gpus[:1]
    with pytest.raises(BadValue, match="named twice"):
        devices.inventory(["cuda:0", "cuda:GPU-a"])
    with pytest.raises(BadValue, match="the highest is 1"):
        devices.inventory(["cuda:2"])


def test_options_become_one_value(tmp_path: Path) -> None:
    line = (
        "--device cpu:64MiB --listen 127.0.0.1:0 --host-bytes 1GiB --disk-bytes 2GiB --name box-1 --threads 3"
    )
    loaded = config.load(["run", "--data-dir", str(tmp_path), *line.split()])
    assert (loaded.listen_host, loaded.listen_port, loaded.name, loaded.threads) == (
        "127.0.0.1",
        0,
        "box-1",
        3,
    )
    assert (loaded.host_budget_bytes, loaded.disk_budget_bytes) == (1024 * MIB, 2048 * MIB)
    assert loaded.control_url is None
    assert loaded.policy == "keep"
    chosen = config.load(["run", "--data-dir", str(tmp_path), *line.split(), "--policy", "sieve"])
    assert chosen.policy == "sieve"


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--control", "http://127.0.0.1:1", "TLS only"),
        ("--listen", "nowhere", "HOST:PORT"),
        ("--listen", "127.0.0.1:99999", "HOST:PORT"),
        ("--name", "Box_1", "host name"),
        ("--host-bytes", "many", "not a size"),
        ("--host-bytes", "64", "write 64MiB or 64GiB, or 64B"),
        ("--disk-bytes", "1.5", "has no unit"),
        ("--device", "cpu:96", "has no unit"),
        ("--request-timeout", "0", "1 to 3600"),
        ("--threads", "-1", "0 \\(all cores\\)"),
    ],
)
def test_bad_options_name_the_option(tmp_path: Path, option: str, value: str, part: str) -> None:
    with pytest.raises(BadValue, match=part) as error:
        config.load(["run", "--data-dir", str(tmp_path), "--device", "cpu:64MiB", option, value])
    assert error.value.field == option


def test_contexts_are_taken_off_a_gpu_as_measured_where_a_process_holds_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVML's own answers are stood in for: no driver is here."""

    class Process:
        def __init__(self, pid: int, used: int | None) -> None:
            self.pid, self.usedGpuMemory = pid, used

    class Memory:
        used = 5000 * MIB

    listed = [Process(1, 3000 * MIB), Process(2, 400 * MIB), Process(9, 1000 * MIB)]
    gpu = devices.DeviceConfig("cuda:GPU-a", "cuda", "H200", 10_000 * MIB, "GPU-a")
    monkeypatch.setattr(devices.pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(devices.pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: Memory)
    monkeypatch.setattr(devices.pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: listed)
    # Our processes are 1, which holds models, and 2, a standby.
    seen = devices.look(gpu, [1, 2], [2])
    assert (seen.foreign_bytes, seen.contexts_bytes) == (1600 * MIB, 800 * MIB)
    unmeasured = devices.look(gpu, [1, 2], [])
    assert unmeasured.contexts_bytes == 2 * devices.CONTEXT_BYTES_FIRST
    assert devices.used_bytes(gpu, 1) == 3000 * MIB
    assert devices.used_bytes(gpu, 7) is None
