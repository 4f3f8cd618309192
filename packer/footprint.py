"""What requests of a model need beside its weights: one figure made of measured peaks.

Covers: taking a peak in, and the bytes that the ledger should hold for it. Does not cover: measuring
(``agent/peak.py``), checking what a worker claims (``agent/footprints.py``), or the ledger.

Before anything was measured the figure is the first estimate of ``layout.first_workspace_estimate``, which
supposes one input of the greatest length. It rises at once with what was seen. It sinks only where a
process that then needs more again takes it from nobody else: on a cpu device, whose budget is a share of
the machine's memory. On a GPU a long input after many short ones would find the device full.
"""

from __future__ import annotations

from dataclasses import dataclass

from packer.types import MIB

# Peaks above the greatest one seen, by how much inputs and the allocator vary from one to the next.
SPARE_PARTS = 4
SPARE_BYTES = 2 * MIB
# So many requests must have been measured before less than the estimate is held: the first few of a model
# are often tests with a word or two.
SAMPLES_MIN = 8
# And never less than this part of the estimate: the longest input may not have come yet.
ESTIMATE_PARTS_MIN = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """The greatest workspace seen, and in how many measured requests."""

    peak_bytes: int = 0
    samples: int = 0

    def seeing(self, peak_bytes: int) -> Footprint:
        return Footprint(max(self.peak_bytes, peak_bytes), self.samples + 1)


def workspace_bytes(known: Footprint, estimate_bytes: int, may_shrink: bool) -> int:
    """Bytes to hold beside the weights for requests of a model."""
    if not known.samples:
        return estimate_bytes
    seen_bytes = known.peak_bytes + known.peak_bytes // SPARE_PARTS + SPARE_BYTES
    if not may_shrink or known.samples < SAMPLES_MIN:
        return max(seen_bytes, estimate_bytes)
    return max(seen_bytes, estimate_bytes // ESTIMATE_PARTS_MIN)
