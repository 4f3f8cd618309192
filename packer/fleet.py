"""What the simulator's fleet is made of: boxes, devices, tiers, rates, tenants' quotas.

Covers: the one-line form (``4x8x141GB,ram=2TB,disk=8TB``), the TOML form, their limits and every complaint,
which names the field. Does not cover: opening files or replaying a trace (``simulate``).

One line: ``[BOXESx]DEVICESxSIZE`` and then settings, separated by commas. The same words are keys of
``[fleet]`` in TOML (beside ``shape``), which also takes ``[tenants.NAME]`` (quotas) and ``[models]``::

    fleet = "4x8x141GB,ram=2TB,disk=8TB,ratio=0.67"

    [tenants.acme]
    device = {reserved = "80GB", max = "200GB"}
    concurrency = 64

    [models]
    "acme/chat" = "16GB"
    "acme/large" = {size = "200GB", devices = 2}
    "acme/busy" = {size = "16GB", replicas = 3}
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from packer.policies import POLICY_NAMES
from packer.traces import Sized, Sizes
from packer.types import (
    BATCH_INPUTS_MAX,
    DEVICES_PER_MODEL_MAX,
    GIB,
    REPLICAS_PER_MODEL_MAX,
    BadValue,
    ByteQuota,
    TenantQuota,
    TenantSpec,
    parse_bytes,
)

BOXES_MAX = 1_000
DEVICES_MAX = 64


@dataclass(frozen=True, slots=True)
class Fleet:
    """Equal boxes. Rates in GB/s are of raw weights as they lie in the tier: what a tier keeps smaller
    moves faster. All defaults are assumptions and are printed with every result."""

    boxes: int
    devices: int
    device_bytes: int
    ram_bytes: int = 0
    disk_bytes: int = 16_000_000_000_000
    # Pinned memory to a device (PCIe 5 x16 gives some 50), each device its own; a fast NVMe drive; a line of
    # 10 Gbit/s.
    host_gbps: float = 45.0
    disk_gbps: float = 7.0
    origin_gbps: float = 1.0
    # What a restore costs whatever its size, parked workers assumed; an engine's cold boot is some 25,000.
    fixed_ms: int = 100
    # Bytes on disk, and in RAM, per byte of weights; bf16 compresses to 0.67 and to 0.75 in the form that a
    # GPU decodes itself.
    ratio: float = 1.0
    ram_ratio: float = 1.0
    # How long a request uses its model where the trace does not say; what a token takes where it has tokens.
    service_ms: int = 500
    token_ms: float = 0.0
    # Where models are at the start: their packs on every disk, or nowhere but at their origin.
    packs: bool = True
    # Callers who wait longer than this are turned away.
    deadline_s: int = 600
    # What goes when room is needed: ours, or a well-known policy to compare with (``policies``).
    policy: str = "keep"
    # Whether RAM is filled from disk ahead of need, as nodes do. It changes little but after a restart, and
    # takes the simulator as long as everything else.
    prefetch: bool = False
    # Boxes that may hold a copy each, of models of which the list does not say it, and how many requests for
    # one model a box works on at once; 0: any number, so that nobody ever waits for others.
    replicas: int = 1
    together: int = 0
    tenants: tuple[TenantSpec, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return self.boxes * self.devices * self.device_bytes

    def __str__(self) -> str:
        return (
            f"{self.boxes} x {self.devices} x {self.device_bytes / 1e9:g} GB, "
            f"{self.ram_bytes / 1e9:g} GB RAM and {self.disk_bytes / 1e12:g} TB disk each"
        )


@dataclass(frozen=True, slots=True)
class FleetFile:
    """A fleet, and the sizes of models that were named beside it."""

    fleet: Fleet
    sizes: Sizes = field(default_factory=Sizes)


_SHAPE = re.compile(r"(?:(\d{1,6})x)?(\d{1,6})x(\d[\d.]*\s*[KMGT]i?B?)", re.IGNORECASE)
_SIZES = {"ram": "ram_bytes", "disk": "disk_bytes"}
_RATES = {"host_gbps": "host_gbps", "disk_gbps": "disk_gbps", "origin_gbps": "origin_gbps"}
_MILLISECONDS = {"fixed_ms": 600_000, "service_ms": 86_400_000}
SETTINGS = (
    "boxes",
    *_SIZES,
    *_RATES,
    *_MILLISECONDS,
    "token_ms",
    "ratio",
    "ram_ratio",
    "packs",
    "deadline_s",
    "policy",
    "prefetch",
    "replicas",
    "together",
)


def parse_fleet(text: str, where: str = "--fleet") -> Fleet:
    """The one-line form. Raises ``BadValue`` that names the setting."""
    shape, *settings = [part.strip() for part in text.split(",")]
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise BadValue(
            where,
            f"{shape[:60]!r} does not say what a box is: write DEVICESxSIZE or BOXESxDEVICESxSIZE, for "
            "example 8x141GB or 4x8x141GB, and settings behind it: 8x141GB,ram=2TB,disk=8TB",
        )
    fleet = Fleet(
        _count(match[1] or "1", f"{where}: boxes", BOXES_MAX),
        _count(match[2], f"{where}: devices", DEVICES_MAX),
        _bytes(match[3], f"{where}: size of a device", 1),
    )
    seen: dict[str, None] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip()
        if not equals or name not in SETTINGS:
            raise BadValue(
                f"{where}: {name[:40] or 'setting'}",
                f"{setting[:60]!r} is not one of {', '.join(f'{each}=' for each in SETTINGS)}",
            )
        if name in seen:
            raise BadValue(f"{where}: {name}", "is there twice")
        seen[name] = None
        fleet = _with(fleet, name, value.strip(), f"{where}: {name}")
    return fleet


def _with(fleet: Fleet, name: str, value: str, where: str) -> Fleet:
    if name == "boxes":
        return replace(fleet, boxes=_count(value, where, BOXES_MAX))
    if name in _SIZES:
        nbytes = _bytes(value, where, 0)
        return replace(fleet, ram_bytes=nbytes) if name == "ram" else replace(fleet, disk_bytes=nbytes)
    if name == "policy":
        if value not in POLICY_NAMES:
            raise BadValue(where, f"{value[:40]!r} is not one of {', '.join(POLICY_NAMES)}")
        return replace(fleet, policy=value)
    if name in ("packs", "prefetch"):
        if value not in ("yes", "no"):
            raise BadValue(where, f"{value[:40]!r} is not yes or no")
        yes = value == "yes"
        return replace(fleet, packs=yes) if name == "packs" else replace(fleet, prefetch=yes)
    if name == "ratio":
        return replace(fleet, ratio=_real(value, where, 0.01, 1.0))
    if name == "ram_ratio":
        return replace(fleet, ram_ratio=_real(value, where, 0.01, 1.0))
    if name == "replicas":
        return replace(fleet, replicas=_count(value, where, REPLICAS_PER_MODEL_MAX))
    if name == "together":
        return replace(fleet, together=_count(value, where, BATCH_INPUTS_MAX))
    if name == "token_ms":
        return replace(fleet, token_ms=_real(value, where, 0.0, 60_000.0))
    if name == "deadline_s":
        return replace(fleet, deadline_s=_count(value, where, 86_400))
    if name == "fixed_ms":
        return replace(fleet, fixed_ms=round(_real(value, where, 0.0, _MILLISECONDS[name])))
    if name == "service_ms":
        return replace(fleet, service_ms=round(_real(value, where, 0.0, _MILLISECONDS[name])))
    rate = _real(value, where, 0.001, 10_000.0)
    if name == "host_gbps":
        return replace(fleet, host_gbps=rate)
    return replace(fleet, disk_gbps=rate) if name == "disk_gbps" else replace(fleet, origin_gbps=rate)


def _count(text: str, where: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise BadValue(where, f"{text[:40]!r} is not a whole number from 1 to {most}")
    return int(text)


def _real(text: str, where: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise BadValue(where, f"{text[:40]!r} is not a number from {least:g} to {most:g}")
    return value


def _bytes(text: str, where: str, least: int) -> int:
    nbytes = parse_bytes(text, where)
    if not least <= nbytes <= 1024 * 1024 * GIB:
        raise BadValue(where, f"{text[:40]!r} must be from {least} bytes to 1024 TiB")
    return nbytes


# --- TOML -----------------------------------------------------------------------------------------

_TENANT_NUMBERS = ("requests_per_minute", "concurrency", "weight", "priority")
_TIERS = ("device", "host", "disk")


def parse_fleet_file(text: str, file: str) -> FleetFile:
    """The TOML form. Raises ``BadValue`` that names the field."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadValue(file, f"is not TOML: {error}") from None
    for name in content:
        if name not in ("fleet", "tenants", "models"):
            raise BadValue(f"{file}: {name[:40]}", "is unknown; there are fleet, tenants and models")
    fleet = _fleet_of(content.get("fleet"), file)
    tenants = _table(content.get("tenants", {}), f"{file}: tenants")
    specs = tuple(_tenant(name, value, f"{file}: tenants.{name[:40]}") for name, value in tenants.items())
    sizes = Sizes()
    for name, size in _table(content.get("models", {}), f"{file}: models").items():
        where = f"{file}: models.{name[:80]}"
        tenant, slash, rest = name.partition("/")
        if not slash or not tenant or not rest:
            raise BadValue(where, 'name it by its tenant: "tenant/name" = "16GB"')
        sizes.known[tenant, rest] = _sized(tenant, rest, size, where)
    return FleetFile(replace(fleet, tenants=specs), sizes)


def _sized(tenant: str, name: str, value: object, where: str) -> Sized:
    """A size, or a table of ``size``, ``devices`` and ``replicas``."""
    size, devices, replicas = value, 1, None
    if isinstance(value, dict):
        if unknown := [key for key in value if key not in ("size", "devices", "replicas")]:
            raise BadValue(f"{where}.{unknown[0][:40]}", "is unknown; there are size, devices and replicas")
        size, devices, replicas = value.get("size"), value.get("devices", 1), value.get("replicas")
    if not isinstance(size, str):
        raise BadValue(where, 'is not a size: write for example "16GB" or {size = "16GB", devices = 2}')
    if type(devices) is not int or not 1 <= devices <= DEVICES_PER_MODEL_MAX:
        raise BadValue(f"{where}.devices", f"must be from 1 to {DEVICES_PER_MODEL_MAX}")
    if replicas is not None and (type(replicas) is not int or not 1 <= replicas <= REPLICAS_PER_MODEL_MAX):
        raise BadValue(f"{where}.replicas", f"must be from 1 to {REPLICAS_PER_MODEL_MAX}")
    return Sized(tenant, name, _bytes(size, where, 1), devices=devices, replicas=replicas)


def _fleet_of(value: object, file: str) -> Fleet:
    if isinstance(value, str):
        return parse_fleet(value, f"{file}: fleet")
    table = _table(value, f"{file}: fleet")
    shape = table.get("shape")
    if not isinstance(shape, str):
        raise BadValue(f"{file}: fleet.shape", 'is missing: write for example shape = "8x141GB"')
    words = [shape]
    for name, each in table.items():
        if name != "shape":
            plain = "yes" if each is True else "no" if each is False else str(each)
            words.append(f"{name}={plain}")
    return parse_fleet(",".join(words), f"{file}: fleet")


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise BadValue(where, "is missing" if value is None else "is not a table")
    return value


def _tenant(name: str, value: object, where: str) -> TenantSpec:
    table = _table(value, where)
    for key in table:
        if key not in (*_TIERS, *_TENANT_NUMBERS):
            known = ", ".join((*_TIERS, *_TENANT_NUMBERS))
            raise BadValue(f"{where}.{key[:40]}", f"is unknown; there are {known}")
    device, host, disk = (_byte_quota(table.get(tier, {}), f"{where}.{tier}") for tier in _TIERS)
    numbers: dict[str, int] = {}
    for key in _TENANT_NUMBERS:
        if key not in table:
            continue
        number = table[key]
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 1_000_000_000:
            raise BadValue(
                f"{where}.{key}", f"{str(number)[:40]!r} is not a whole number from 0 to 1000000000"
            )
        numbers[key] = number
    quota = TenantQuota(
        device,
        host,
        disk,
        requests_per_minute=numbers.get("requests_per_minute"),
        concurrency=numbers.get("concurrency"),
        weight=max(numbers.get("weight", 1), 1),
        priority=numbers.get("priority", 0),
    )
    return TenantSpec(name, quota)


def _byte_quota(value: object, where: str) -> ByteQuota:
    table = _table(value, where)
    found: dict[str, int] = {}
    for key, each in table.items():
        if key not in ("reserved", "max"):
            raise BadValue(f"{where}.{key[:40]}", "is unknown; there are reserved and max")
        found[key] = _bytes(str(each), f"{where}.{key}", 0)
    reserved, most = found.get("reserved", 0), found.get("max")
    if most is not None and reserved > most:
        raise BadValue(f"{where}.reserved", f"{reserved} is above max, {most}")
    return ByteQuota(reserved, most)


def check_replicas(fleet: Fleet, catalog: Sequence[Sized], where: str) -> None:
    """Raises ``BadValue`` for replicas that could never come: a copy is sent for because requests wait for
    each other."""
    if fleet.together:
        return
    for sized in catalog:
        if (sized.replicas or fleet.replicas) > 1:
            raise BadValue(
                f"{where}: together",
                f"{sized} may have replicas, which come when its requests wait for each other: say with "
                "together=8 how many of one model a box works on at once",
            )


def check_quotas(fleet: Fleet, where: str) -> None:
    """Raises ``BadValue`` when tenants are promised more of a box than it has."""
    capacities = {
        "device": fleet.devices * fleet.device_bytes,
        "host": fleet.ram_bytes,
        "disk": fleet.disk_bytes,
    }
    for tier, capacity in capacities.items():
        reserved = {t.tenant: getattr(t.quota, tier).reserved for t in fleet.tenants}
        total = sum(reserved.values())
        if total > capacity:
            most = max(reserved, key=lambda name: reserved[name])
            raise BadValue(
                f"{where}: tenants.*.{tier}.reserved",
                f"{total} bytes are promised to {len(reserved)} tenants (most to {most[:40]}), a box has "
                f"{capacity}; lower the reserves or give it more",
            )
