"""Models that need several devices: where they are cut, and what each device gets. Pure arithmetic.

Covers: the places at which an image may be cut, the runs of chunks that the devices of a gang hold, and the
name of the place where a whole model lies. Does not cover: choosing the devices (``gang_room``), the books
(``ledger``) or the memory (``agent/gang_image.py``).

A **gang** is a model that needs k devices of one node. Its chunks are cut into k runs that follow each other
in execution order, as equal in bytes as its layers allow: share j lies on device j, and every device also
holds the workspace. So activations cross from one device to the next k - 1 times in a pass, and no layer
lies on two devices (of a program, whose operations move what they need, no tensor).

A gang is there whole or not at all. Chunks leave other models from the tail of the execution order, which of
a gang is its last device alone: its next restore would wait for that device, and the others could not use
what they hold meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from packer.layout import ImageLayout, layer_of
from packer.types import DEVICES_PER_MODEL_MAX, BadValue, ModelSpec

# Between the names of a gang's devices; no device has it in its name.
JOIN = "+"


def place_name(devices: Sequence[str]) -> str:
    """Where a whole model lies: one device, or those of a gang in the order of its shares."""
    return JOIN.join(devices)


def devices_in(place: str) -> tuple[str, ...]:
    """The devices of a place, in the order of the shares."""
    return tuple(place.split(JOIN))


def cuts_of(layout: ImageLayout, by_layer: bool) -> tuple[int, ...]:
    """Chunks before which a gang may be cut: no tensor lies across, nor (``by_layer``) a layer, as the names
    of its tensors say. Of all of them those that are nearest to an equal part, for every number of devices
    that is allowed."""
    free: list[int] = []
    tensors = [placed for placed in layout.tensors if placed.info.nbytes]
    reach = at = 0
    for number, chunk in enumerate(layout.chunks):
        while at < len(tensors) and tensors[at].image_offset < chunk.image_offset:
            reach = max(reach, tensors[at].image_offset + tensors[at].info.nbytes)
            at += 1
        if not number or reach > chunk.image_offset:
            continue
        if not by_layer or layer_of(tensors[at - 1].info.name) != layer_of(tensors[at].info.name):
            free.append(number)
    offsets = [layout.chunks[number].image_offset for number in free]
    chosen = {
        free[place]: None
        for devices in range(2, DEVICES_PER_MODEL_MAX + 1)
        for part in range(1, devices)
        if (place := _nearest(offsets, layout.image_bytes * part / devices)) is not None
    }
    return tuple(sorted(chosen))


def _nearest(offsets: Sequence[int], wanted: float) -> int | None:
    """Place of the offset that is nearest; of two, the first."""
    if not offsets:
        return None
    after = bisect_left(offsets, wanted)
    near = [place for place in (after - 1, after) if 0 <= place < len(offsets)]
    return min(near, key=lambda place: (abs(offsets[place] - wanted), place))


def run_ends(chunk_bytes: Sequence[int], cuts: Sequence[int], devices: int) -> tuple[int, ...]:
    """For each device of a gang, the chunk behind its last one; empty: the model can not be cut so often."""
    if devices == 1:
        return (len(chunk_bytes),)
    before = [0, *accumulate(chunk_bytes)]
    known = [cut for cut in cuts if 0 < cut < len(chunk_bytes)]
    offsets = [before[cut] for cut in known]
    ends: list[int] = []
    for part in range(1, devices):
        place = _nearest(offsets, before[-1] * part / devices)
        if place is None or (ends and known[place] <= ends[-1]):
            return ()
        ends.append(known[place])
    return (*ends, len(chunk_bytes))


def run_bytes(spec: ModelSpec) -> tuple[int, ...]:
    """Bytes of the weights on each device of a gang; empty: it can not be cut so often."""
    before = [0, *accumulate(spec.chunk_bytes)]
    ends = run_ends(spec.chunk_bytes, spec.cuts, spec.devices)
    return tuple(before[end] - before[start] for start, end in zip((0, *ends), ends, strict=False))


def share_bytes(spec: ModelSpec) -> int:
    """Bytes of the weights on one device: of a gang, of its largest share."""
    # Asked for every request that is routed, and nearly all are for one device.
    return spec.image_bytes if spec.devices == 1 else max(run_bytes(spec), default=spec.image_bytes)


def check_devices(spec: ModelSpec, devices: int) -> int:
    """Returns ``devices`` if the version may have so many. Raises ``BadValue`` with the name of the
    management API."""
    if not 1 <= devices <= DEVICES_PER_MODEL_MAX:
        raise BadValue(
            "devices", f"must be from 1 to {DEVICES_PER_MODEL_MAX} devices of one node, not {devices}"
        )
    if run_ends(spec.chunk_bytes, spec.cuts, devices):
        return devices
    most = max(
        count for count in range(1, DEVICES_PER_MODEL_MAX + 1) if run_ends(spec.chunk_bytes, spec.cuts, count)
    )
    why = "" if spec.cuts else "; if an earlier release registered it, remove this version and push it again"
    raise BadValue(
        "devices",
        f"{spec.ref} has too few layers of 1 MiB or more to be cut into {devices} parts; the most is "
        f"{most}{why}",
    )
