"""How long a restore will take on this machine, and in which form the host tier should keep weights.

Covers: the rates that a node measured of itself, the model of a restore made of them, the rule that
chooses the host form, and learning from real restores how far the model is off. Does not cover:
measuring (``agent/calibrate.py``), or what an expected time is used for (``keep``, ``residency``).

The model: a restore is a pipeline, so it takes as long as its slowest stage, plus what every restore
costs whatever its size. What the restore threads do one after another adds up to one stage: reading out
of the page cache, opening, decoding, filling in fresh pages, writing a host segment on the way.
What the model does not know (other work on the machine, a cold cache, the memory bus) is learned as one
factor per model and tier, and until that model was restored, as one factor per tier of the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from packer.types import HostForm, Tier

_T = TypeVar("_T")

# What a restore costs whatever its size: orders, wake-ups, building the module.
FIXED_MS = 20
# Threads that open and decode on the smallest machines, where no rate was measured.
RESTORE_THREADS = 2
# A host form that is at most a tenth slower than the fastest is worth its smaller size.
FORM_RATE_SHARE_MIN = 0.9
# Reading a cached pack past the cache must save a tenth to be worth a disk that others may want as well.
PAST_CACHE_SHARE_MAX = 0.9
# Restores kept per model and tier: what is likeliest of five survives two odd ones.
SAMPLES_MAX = 5
# Restores kept per tier of the node, over all models: enough for a figure that one tenant's odd model
# does not set.
TIER_SAMPLES_MAX = 15
# A measured factor outside of this comes from a stall or a clock, not from the machine.
FACTOR_MIN, FACTOR_MAX = 1 / 32, 32.0
# Below this much moving a restore says what the fixed part is, above it says how fast bytes move.
SMALL_MOVING_MS = 40.0
# A rate above this is a broken clock: ten times what the memory of the largest machines moves.
RATE_MAX = 10**14
RATES_BYTES_MAX = 16 * 1024

# Bytes per byte of raw weights, by family: what N12 makes of bf16 and of the top halves of fp32, on the
# wire and stored. Everything else travels raw; stored it is between fp8's 0.83 and int8's 0.91.
WIRE_SHARES = (0.75, 0.875, 1.0)
STORED_SHARES = (0.667, 0.833, 0.87)
# Between the stored shares of neighbouring families.
_BF16_STORED_MAX, _FP32_STORED_MAX = 0.75, 0.842


class BadRates(ValueError):
    """A stored or received calibration can not be used; measure again."""


@dataclass(frozen=True, slots=True)
class DecodeRates:
    """Raw weights per second, of all restore threads together, into memory that is there already."""

    stored_to_wire: int
    wire_to_final: int
    stored_to_final: int
    encode: int = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """What one node measured of itself: every figure is bytes per second, of ``threads`` together.

    0 is "not there": ``link`` until something was fetched, ``device_copy`` without a GPU, ``map_image`` where
    it was not measured: then a raw segment is copied.
    """

    disk_direct: int  # O_DIRECT; what the disk gives when nothing is cached
    disk_cached: int  # out of the page cache into a buffer that a core has in its own cache
    disk_write: int
    memcpy: int  # warm to warm
    memcpy_1: int  # the same on one thread
    populate: int  # fresh pages of an arena, huge where the kernel grants them
    map_in: int  # pages of a host segment into a new mapping
    segment_write: int  # into a new host segment
    open: int  # AES-256-GCM, authenticated and decrypted in place
    sha256_1: int  # one thread: a file's digest can not be shared
    bf16: DecodeRates
    fp32: DecodeRates
    other: DecodeRates
    link: int = 0  # the line that origins are fetched over
    device_copy: int = 0  # pinned memory to the GPU
    map_image: int = 0  # a raw host segment becoming the image of a cpu device
    threads: int = RESTORE_THREADS
    cores: int = RESTORE_THREADS
    measured_ms: int = 0  # wall clock; 0: nobody measured, the figures are assumptions
    took_ms: int = 0
    fingerprint: str = ""  # of the hardware and the software that were measured
    kernels: bool = False  # the compiled decoder was there
    huge_pages: bool = False  # the kernel granted huge pages to the arena
    others_percent: int = 0  # of the cores' time, used by others while this was measured


# Before anything was measured: deliberately slow figures, so that the first retry hint is not too short.
_FIRST_DECODE = DecodeRates(1_000_000_000, 1_000_000_000, 1_000_000_000, 200_000_000)
FIRST_RATES = Rates(
    disk_direct=500_000_000,
    disk_cached=1_000_000_000,
    disk_write=250_000_000,
    memcpy=2_000_000_000,
    memcpy_1=2_000_000_000,
    populate=2_000_000_000,
    map_in=4_000_000_000,
    segment_write=1_000_000_000,
    open=1_000_000_000,
    sha256_1=400_000_000,
    bf16=_FIRST_DECODE,
    fp32=_FIRST_DECODE,
    other=_FIRST_DECODE,
    link=100_000_000,
)
# A line that was not measured yet is taken for a gigabit's.
LINK_FIRST = FIRST_RATES.link


def named_rates(rates: Rates) -> dict[str, int]:
    """Every rate by its name, as metrics and tables show them."""
    named = {name: getattr(rates, name) for name in _PLAIN}
    for family in ("bf16", "fp32", "other"):
        decode: DecodeRates = getattr(rates, family)
        named |= {f"{family}_{name}": getattr(decode, name) for name in _DECODE}
    return named


_PLAIN = (
    *("disk_direct", "disk_cached", "disk_write", "memcpy", "memcpy_1", "populate", "map_in"),
    *("segment_write", "open", "sha256_1", "link", "device_copy", "map_image"),
)
_DECODE = ("stored_to_wire", "wire_to_final", "stored_to_final", "encode")
_MAY_BE_ZERO = ("link", "device_copy", "map_image")


def dump_rates(rates: Rates) -> str:
    return msgspec.json.encode(rates).decode()


def load_rates(text: str) -> Rates:
    """Rates from outside: a child process, a journal, a report. Raises ``BadRates``."""
    if len(text) > RATES_BYTES_MAX:
        raise BadRates(f"a calibration of {len(text)} characters is above the limit of {RATES_BYTES_MAX}")
    try:
        rates = msgspec.json.decode(text, type=Rates)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise BadRates(f"calibration: {error}; measure again") from None
    for name, rate in named_rates(rates).items():
        least = 0 if name in _MAY_BE_ZERO else 1
        if not least <= rate <= RATE_MAX:
            raise BadRates(f"calibration: {name} is {rate}, it must be {least} to {RATE_MAX}; measure again")
    if not 1 <= rates.threads <= 4096 or not 1 <= rates.cores <= 65_536:
        raise BadRates("calibration: threads or cores are out of range; measure again")
    return rates


# --- the model of a restore -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mix:
    """Raw bytes by what their decoding costs."""

    bf16_bytes: int = 0
    fp32_bytes: int = 0
    other_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RestoreShape:
    """One restore of a whole model. ``stored_bytes`` is what is read from ``tier`` in its form: the pack
    (always stored form), the host segment in ``form``, the origin's files. From disk ``form`` is that of the
    segment that is filled on the way."""

    tier: Tier
    image_bytes: int
    stored_bytes: int
    mix: Mix
    form: HostForm = HostForm.STORED
    cached: bool = False  # disk and origin: the file is in the page cache
    on_cuda: bool = False
    remote: bool = False  # origin: fetched over the line
    # Made on the way: a host segment from a pack, a pack from an origin.
    fill_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stages:
    """What each stage of a restore takes; the longest is its limit."""

    read_ms: float  # the disk or the line
    cores_ms: float  # everything that needs a core
    device_ms: float  # the copy to a GPU

    @property
    def moving_ms(self) -> float:
        return max(self.read_ms, self.cores_ms, self.device_ms)

    @property
    def limit(self) -> str:
        """What sets the pace."""
        if self.moving_ms == self.read_ms:
            return "read"
        return "cores" if self.moving_ms == self.cores_ms else "device"


def guess_mix(image_bytes: int, stored_bytes: int) -> Mix:
    """The family that a pack's size gives away, when nobody has looked into its index."""
    share = stored_bytes / max(image_bytes, 1)
    if share < _BF16_STORED_MAX:
        return Mix(bf16_bytes=image_bytes)
    if share < _FP32_STORED_MAX:
        return Mix(fp32_bytes=image_bytes)
    return Mix(other_bytes=image_bytes)


def restore_stages(rates: Rates, shape: RestoreShape) -> Stages:
    """What the pipeline's stages take for one whole restore, as far as the rates say."""
    if shape.tier is Tier.DEVICE:
        return Stages(0.0, 0.0, 0.0)
    read_s, copy_s = _reading(rates, shape)
    cores_s = copy_s + _decode_threads_s(rates, shape)
    device_s = _wire_bytes(shape) / rates.device_copy if shape.on_cuda and rates.device_copy else 0.0
    return Stages(read_s * 1000, cores_s * 1000, device_s * 1000)


def _reading(rates: Rates, shape: RestoreShape) -> tuple[float, float]:
    """Seconds that the source itself takes, and seconds in which the restore threads copy from it."""
    nbytes = shape.stored_bytes
    if shape.tier is Tier.HOST:
        return 0.0, 0.0
    if shape.tier is Tier.ORIGIN and shape.remote:
        return nbytes / (rates.link or LINK_FIRST), 0.0
    if shape.cached:
        return 0.0, nbytes / rates.disk_cached
    return nbytes / rates.disk_direct, 0.0


def _decode_threads_s(rates: Rates, shape: RestoreShape) -> float:
    """Seconds that the restore threads need, working together, one stage after another."""
    in_segment = shape.form is HostForm.RAW and not shape.on_cuda and rates.map_image > 0
    if shape.tier is Tier.HOST and in_segment:
        return shape.image_bytes / rates.map_image
    fresh_s = 0.0 if shape.on_cuda else shape.image_bytes / rates.populate
    match shape.tier:
        case Tier.ORIGIN:
            # One thread per file hashes and places; most models are one file.
            return fresh_s + shape.stored_bytes / rates.sha256_1 + shape.image_bytes / rates.memcpy_1
        case Tier.DISK:
            # The image may lie in the segment: then its fresh pages are the segment's.
            fill_s = 0.0 if in_segment else shape.fill_bytes / rates.segment_write
            return fresh_s + fill_s + shape.stored_bytes / rates.open + _decode_s(rates, shape)
        case _:
            return fresh_s + shape.stored_bytes / rates.map_in + _decode_s(rates, shape)


def _decode_s(rates: Rates, shape: RestoreShape) -> float:
    """From the source's form to the device's: final weights for a cpu, wire planes for a GPU."""
    if shape.tier is Tier.HOST and (shape.form is HostForm.RAW or _is_wire_to_gpu(shape)):
        return shape.stored_bytes / rates.memcpy
    total_s = 0.0
    mix = shape.mix
    families = ((mix.bf16_bytes, rates.bf16), (mix.fp32_bytes, rates.fp32), (mix.other_bytes, rates.other))
    for nbytes, decode in families:
        if not nbytes:
            continue
        if shape.tier is Tier.HOST and shape.form is HostForm.WIRE:
            rate = decode.wire_to_final
        else:
            rate = decode.stored_to_wire if shape.on_cuda else decode.stored_to_final
        total_s += nbytes / rate
    return total_s


def _is_wire_to_gpu(shape: RestoreShape) -> bool:
    return shape.on_cuda and shape.form is HostForm.WIRE


def _wire_bytes(shape: RestoreShape) -> float:
    """Bytes that cross to a GPU."""
    if shape.tier is Tier.ORIGIN or (shape.tier is Tier.HOST and shape.form is HostForm.RAW):
        return float(shape.image_bytes)
    return _share(shape.mix, WIRE_SHARES)


def _share(mix: Mix, shares: Sequence[float]) -> float:
    bf16, fp32, other = shares
    return mix.bf16_bytes * bf16 + mix.fp32_bytes * fp32 + mix.other_bytes * other


# --- the host form --------------------------------------------------------------------------------

# What is assumed of a node's models before any is known: today's are bf16. The size only has to be
# large enough for the fixed part not to matter.
TYPICAL = Mix(bf16_bytes=1024 * 1024 * 1024)


def host_shape(mix: Mix, form: HostForm, on_cuda: bool = False) -> RestoreShape:
    """A restore from the host tier of weights like these, whose segment has the usual size."""
    image_bytes = mix.bf16_bytes + mix.fp32_bytes + mix.other_bytes
    shares = {HostForm.STORED: STORED_SHARES, HostForm.WIRE: WIRE_SHARES, HostForm.RAW: (1.0, 1.0, 1.0)}
    segment_bytes = round(_share(mix, shares[form]))
    return RestoreShape(Tier.HOST, image_bytes, segment_bytes, mix, form, on_cuda=on_cuda)


def disk_shape(mix: Mix, cached: bool, on_cuda: bool = False) -> RestoreShape:
    """A restore from a pack of weights like these, of the usual size."""
    image_bytes = mix.bf16_bytes + mix.fp32_bytes + mix.other_bytes
    pack_bytes = round(_share(mix, STORED_SHARES))
    return RestoreShape(Tier.DISK, image_bytes, pack_bytes, mix, cached=cached, on_cuda=on_cuda)


def choose_host_form(
    rates: Rates, on_cuda: bool = False, mix: Mix = TYPICAL, host_share: float = 1.0
) -> HostForm:
    """The form in which the host tier keeps weights on this node.

    A GPU decodes the wire form itself, at memory speed: fewer bytes and a faster copy, so always that.
    On a cpu device the raw form is mapped and costs next to nothing to restore, but takes half as much memory
    again as the stored one, so that fewer models are in it. What counts is how long a model takes to come
    on average: from the host tier as often as it is there, else from disk. ``host_share``: the host tier's
    budget over the raw bytes of all models; from 1 on all of them fit in every form. The smallest form is
    chosen that is at least ``FORM_RATE_SHARE_MIN`` times as fast as the fastest.
    """
    if on_cuda:
        return HostForm.WIRE
    disk_ms = restore_stages(rates, disk_shape(mix, cached=False)).moving_ms
    smallest_first = (HostForm.STORED, HostForm.WIRE, HostForm.RAW)
    expected_ms = []
    for form in smallest_first:
        shape = host_shape(mix, form)
        hits = min(1.0, host_share * shape.image_bytes / max(shape.stored_bytes, 1))
        expected_ms.append(hits * restore_stages(rates, shape).moving_ms + (1.0 - hits) * disk_ms)
    fastest_ms = min(expected_ms)
    for form, form_ms in zip(smallest_first, expected_ms, strict=True):
        if form_ms * FORM_RATE_SHARE_MIN <= fastest_ms:
            return form
    return HostForm.RAW


def reads_past_cache(rates: Rates | None, on_cuda: bool = False, mix: Mix = TYPICAL) -> bool:
    """Whether packs that are in the page cache are read past it as well: where the disk keeps up with the
    cores, reading directly spares them the copy. Not before somebody has measured that."""
    if rates is None or not rates.measured_ms:
        return False
    past_ms, through_ms = (
        restore_stages(rates, disk_shape(mix, cached=cached, on_cuda=on_cuda)).moving_ms
        for cached in (False, True)
    )
    return past_ms <= through_ms * PAST_CACHE_SHARE_MAX


# --- learning from real restores ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    shape: RestoreShape
    moved_share: float
    restore_ms: int


@dataclass(slots=True, eq=False)
class History:
    """One model's restores. ``shapes``: what a whole restore from each tier is, as far as known."""

    shapes: dict[Tier, RestoreShape] = field(default_factory=dict)
    samples: dict[Tier, list[Sample]] = field(default_factory=dict)
    # Derived from the two above and the rates; thrown away when any of them changes.
    epoch: int = -1
    moving_ms: dict[Tier, float] = field(default_factory=dict)
    factors: dict[Tier, tuple[float, float] | None] = field(default_factory=dict)  # fixed ms, factor


@dataclass(slots=True, eq=False)
class Learned:
    """What the node knows: its rates, and per tier how far real restores were off them."""

    rates: Rates = FIRST_RATES
    host_form: HostForm = HostForm.STORED
    on_cuda: bool = False
    epoch: int = 0
    factors: dict[Tier, list[float]] = field(default_factory=dict)
    fixed_ms: dict[Tier, list[float]] = field(default_factory=dict)


def recalibrate(learned: Learned, rates: Rates) -> None:
    """Use new rates. What models took stays known; how far the old rates were off does not matter now."""
    if rates == learned.rates:
        return
    learned.rates = rates
    learned.epoch += 1
    learned.factors.clear()
    learned.fixed_ms.clear()


def know_shape(history: History, shape: RestoreShape) -> None:
    """State what a whole restore from ``shape.tier`` is from now on. Whether its file is cached and a host
    segment filled on the way is kept as last seen."""
    before = history.shapes.get(shape.tier)
    if before is not None:
        shape = replace(shape, cached=before.cached, fill_bytes=before.fill_bytes)
    history.shapes[shape.tier] = shape
    history.epoch = -1


def know_copies(
    learned: Learned,
    history: History,
    *,
    image_bytes: int,
    disk_bytes: int,
    host_bytes: int,
    remote: bool,
    cached: bool | None = None,
) -> None:
    """State a model's copies by their sizes, 0 for what there is none of: then the last one's shape
    stays, the next will be like it."""
    if image_bytes <= 0:
        return
    on_cuda = learned.on_cuda
    mix = guess_mix(image_bytes, disk_bytes) if disk_bytes else Mix(bf16_bytes=image_bytes)
    origin = RestoreShape(Tier.ORIGIN, image_bytes, image_bytes, mix, on_cuda=on_cuda, remote=remote)
    know_shape(history, origin)
    if disk_bytes:
        form = learned.host_form
        know_shape(history, RestoreShape(Tier.DISK, image_bytes, disk_bytes, mix, form, on_cuda=on_cuda))
        if cached is not None:
            history.shapes[Tier.DISK] = replace(history.shapes[Tier.DISK], cached=cached)
    if host_bytes:
        shape = RestoreShape(Tier.HOST, image_bytes, host_bytes, mix, learned.host_form, on_cuda=on_cuda)
        know_shape(history, shape)


def expect_fill(history: History, tier: Tier, fill_bytes: int) -> None:
    """A restore from ``tier`` is ordered that makes this much on the way; later ones will be like it until
    the next is ordered."""
    shape = history.shapes.get(tier)
    if shape is not None and shape.fill_bytes != fill_bytes:
        history.shapes[tier] = replace(shape, fill_bytes=fill_bytes)
        history.epoch = -1


def note_restore(
    learned: Learned,
    history: History,
    tier: Tier,
    moved_bytes: int,
    restore_ms: int,
    cached: bool | None = None,
) -> None:
    """Learn from one finished restore of ``moved_bytes`` of the image. ``cached`` None: nobody looked.
    The next is expected to find its file as this one did."""
    shape = _shape_from(history, tier, moved_bytes)
    if cached is not None:
        shape = replace(shape, cached=cached)
        if tier in history.shapes:
            history.shapes[tier] = shape
    moved_share = min(1.0, moved_bytes / max(shape.image_bytes, 1))
    sample = Sample(shape, moved_share, max(restore_ms, 1))
    _push(history.samples.setdefault(tier, []), sample, SAMPLES_MAX)
    history.epoch = -1
    moving_ms = restore_stages(learned.rates, shape).moving_ms * moved_share
    if moving_ms < SMALL_MOVING_MS:
        fixed_ms = max(sample.restore_ms - moving_ms, 1.0)
        _push(learned.fixed_ms.setdefault(tier, []), fixed_ms, TIER_SAMPLES_MAX)
    else:
        factor = (sample.restore_ms - _fixed_ms(learned, tier)) / moving_ms
        _push(learned.factors.setdefault(tier, []), _clamped(factor), TIER_SAMPLES_MAX)


def expect_ms(learned: Learned, history: History, tier: Tier, moved_bytes: int) -> int:
    """Expected time to move ``moved_bytes`` of the image from ``tier``; 0 from the device.

    The model's own restores from this tier count when there are any, else those of other models.
    """
    if tier is Tier.DEVICE:
        return 0
    if history.epoch != learned.epoch:
        history.epoch = learned.epoch
        history.moving_ms.clear()
        history.factors.clear()
    shape = history.shapes.get(tier)
    if shape is None or shape.image_bytes <= 0:
        moving_ms = restore_stages(learned.rates, _shape_from(history, tier, moved_bytes)).moving_ms
    else:
        whole_ms = history.moving_ms.get(tier)
        if whole_ms is None:
            whole_ms = history.moving_ms[tier] = restore_stages(learned.rates, shape).moving_ms
        moving_ms = whole_ms * (moved_bytes / shape.image_bytes)
    if tier not in history.factors:
        history.factors[tier] = _own_factor(learned, history, tier)
    own = history.factors[tier]
    if own is not None:
        fixed_ms, factor = own
        return max(1, round((fixed_ms + moving_ms) * factor))
    factors = learned.factors.get(tier)
    return max(1, round(_fixed_ms(learned, tier) + moving_ms * (_likely(factors) if factors else 1.0)))


def _own_factor(learned: Learned, history: History, tier: Tier) -> tuple[float, float] | None:
    """How far this model's own restores were off, and the fixed part that this was seen against.

    Those that found the cache, and filled a host segment, as the next will, count first.
    """
    samples = history.samples.get(tier)
    if not samples:
        return None
    shape = history.shapes.get(tier)
    alike = [each for each in samples if shape is None or _is_alike(each.shape, shape)]
    fixed_ms = _fixed_ms(learned, tier)
    factors = []
    for each in alike or samples:
        moving_ms = restore_stages(learned.rates, each.shape).moving_ms * each.moved_share
        factors.append(_clamped(each.restore_ms / (fixed_ms + moving_ms)))
    return fixed_ms, _likely(factors)


def _is_alike(one: RestoreShape, other: RestoreShape) -> bool:
    same_form = one.form is other.form or (one.tier is Tier.DISK and not one.fill_bytes)
    return same_form and one.cached == other.cached and bool(one.fill_bytes) == bool(other.fill_bytes)


def _shape_from(history: History, tier: Tier, moved_bytes: int) -> RestoreShape:
    """The known shape of a restore from this tier, or one that assumes the usual of what is moved."""
    known = history.shapes.get(tier)
    if known is not None and known.image_bytes > 0:
        return known
    mix = Mix(bf16_bytes=moved_bytes)
    if tier is Tier.HOST:
        return host_shape(mix, HostForm.STORED)
    if tier is Tier.DISK:
        return disk_shape(mix, cached=False)
    return RestoreShape(Tier.ORIGIN, moved_bytes, moved_bytes, mix)


def _fixed_ms(learned: Learned, tier: Tier) -> float:
    measured = learned.fixed_ms.get(tier)
    return _likely(measured) if measured else float(FIXED_MS)


def _clamped(factor: float) -> float:
    return min(max(factor, FACTOR_MIN), FACTOR_MAX)


def _likely(values: Sequence[float]) -> float:
    """What to expect after these: up to a third of them are below it. Restores have a fastest
    time and are held up by chance, so late ones are late by more than early ones are early, and an estimate
    is off by its share of the real time: on a busy machine the median was off twice as far."""
    return sorted(values)[(len(values) - 1) // 3]


def _push(values: list[_T], value: _T, limit: int) -> None:
    values.append(value)
    if len(values) > limit:
        del values[0]
