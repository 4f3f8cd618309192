"""Answering while the weights still come: a request computes on the layers that are there.

Covers: which chunks have been placed, waiting for those of a layer, and bringing a model into service before
its restore ends. Does not cover: the restore itself (``packer/tiers.py``), which layers a model has
(``engines/transformers.py``), or what the core makes of it (``packer/residency.py``).

Nothing is computed on bytes that are not there: every chunk that holds any tensor outside of the layers comes
first, and each layer waits for all of its own. A restore that fails wakes whoever waits; no token was written
by then, because the first one needs the last layer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence

from packer.layout import ImageLayout
from packer.types import MIB

# A restore of less than this takes a few tens of milliseconds, about as long as a request's own first steps.
EARLY_BYTES_MIN = 64 * MIB
# "encoder.layer.3.output.dense.weight" belongs to layer 3 of something; "embeddings.word.weight" to none.
_IN_A_LAYER = re.compile(r"\.\d+\.")


class GateFailed(Exception):
    """The bytes that a request waits for will not come."""


class Gate:
    """Which of a model's chunks are in its image. Every method may be called from any thread."""

    def __init__(self, chunks: int, first_chunk: int) -> None:
        self._changed = threading.Condition()
        self._missing = set(range(first_chunk, chunks))
        self._failed = False

    @property
    def is_open(self) -> bool:
        return not self._missing and not self._failed

    @property
    def may_wait(self) -> bool:
        return bool(self._missing) and not self._failed

    def placed(self, number: int) -> None:
        with self._changed:
            self._missing.discard(number)
            self._changed.notify_all()

    def fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def wait(self, chunks: Collection[int]) -> None:
        """Returns when all these chunks are in the image. Raises ``GateFailed``."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._missing.isdisjoint(chunks))
            if self._failed:
                raise GateFailed("the weights could not be restored")


def outside_layers(layout: ImageLayout) -> frozenset[int]:
    """Chunks to bring first: those that hold a tensor of no layer, going by its name."""
    outside = [t for t in layout.tensors if not _IN_A_LAYER.search(t.info.name)]
    found: set[int] = set()
    for tensor in outside:
        found.update(chunks_of(layout, tensor.image_offset, tensor.info.nbytes))
    return frozenset(found)


def chunks_of(layout: ImageLayout, offset: int, nbytes: int) -> range:
    """The chunks that hold this range of the image."""
    chunks = layout.chunks
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if chunks[middle].image_offset + chunks[middle].nbytes <= offset:
            low = middle + 1
        else:
            high = middle
    end = low
    while end < len(chunks) and chunks[end].image_offset < offset + nbytes:
        end += 1
    return range(low, end)


class Watched:
    """What a restore tells of itself while it fills an image; see ``packer.tiers.Watch``."""

    def __init__(self, layout: ImageLayout, first_chunk: int) -> None:
        self.gate = Gate(len(layout.chunks), first_chunk)
        self.urgent = outside_layers(layout)
        self.lies = threading.Event()

    def laid(self) -> None:
        self.lies.set()

    def placed(self, number: int) -> None:
        self.gate.placed(number)


class EarlyStart:
    """A thread that brings one model into service as soon as it may.

    ``begin`` finds the model, points it into the image and sets it behind the gate; it returns the chunks
    that must be there before the first request, or None: this model can not. ``admit`` lets requests in.
    """

    def __init__(
        self, watched: Watched, begin: Callable[[Gate], Sequence[int] | None], admit: Callable[[], None]
    ) -> None:
        self._watched = watched
        self._begin = begin
        self._admit = admit
        self._over = False
        self._admitted = False
        self._thread = threading.Thread(target=self._run, name="bunk-early")
        self._thread.start()

    def join(self) -> bool:
        """The restore is over, well or badly (then the gate was told): are requests in already?"""
        self._over = True
        self._watched.lies.set()
        self._thread.join()
        return self._admitted

    def _run(self) -> None:
        self._watched.lies.wait()
        if self._over:
            return
        try:
            before = self._begin(self._watched.gate)
            if before is None:
                return
            self._watched.gate.wait(before)
        except Exception:
            return  # whoever restores the model meets the same error, and says it
        if not self._over:
            self._admit()
            self._admitted = True
