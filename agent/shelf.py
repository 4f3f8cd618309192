"""The models that a worker holds, resident or not, and who may touch them when.

Covers: skeletons and images by model, requests that hold a model in place, models that come and go one move
at a time, and models of which only the first chunks are there. Does not cover: moving bytes (``moves``) or
answering (``worker``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from agent.arena import Image
from agent.engines.model import Model
from packer.layout import ImageLayout
from packer.tiers import TierError
from packer.types import ModelRef, Task

# Skeletons (module tree, tokenizer, side files) kept of models that are not resident; a tokenizer of
# 128,000 words takes some 100 MiB, a small one 2.
SKELETONS_PARKED_MAX = 16


class NotResident(Exception):
    """The model's weights are not in this worker (any more), or not all of them."""


@dataclass(slots=True)
class Held:
    """A built model and, while any of its weights are here, its image.

    ``kept_chunks``: the chunks from the first on that are here; with fewer than all of them the model can
    not answer. ``users``: answers and packs in progress.
    """

    model: Model
    layout: ImageLayout
    engine: str
    task: Task
    side_files: Mapping[str, bytes]
    image: Image | None = None
    kept_chunks: int = 0
    users: int = 0

    @property
    def resident_image(self) -> Image | None:
        """The image if every chunk of it is here."""
        return self.image if self.kept_chunks == len(self.layout.chunks) else None

    def released_from(self, chunk: int) -> int:
        """Where chunk ``chunk`` starts in the image; the image's end behind the last one."""
        chunks = self.layout.chunks
        return chunks[chunk].image_offset if chunk < len(chunks) else self.layout.image_bytes


class Shelf:
    """The models of this worker. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[ModelRef, Held] = {}
        # Being brought in or taken away: nobody else may start either.
        self._moving: set[ModelRef] = set()

    @contextmanager
    def arriving(self, ref: ModelRef) -> Iterator[Held | None]:
        """Announce that a model is being brought in; gives what is here of it, a parked skeleton at least."""
        with self._changed:
            held = self._held.get(ref)
            if ref in self._moving or (held is not None and held.resident_image is not None):
                raise TierError(f"{ref} is here already")
            self._moving.add(ref)
        try:
            yield held
        finally:
            with self._changed:
                self._moving.discard(ref)

    def put(self, ref: ModelRef, held: Held) -> None:
        with self._changed:
            # Re-inserted, so that the dictionary's order is the order of last arrival.
            self._held.pop(ref, None)
            self._held[ref] = held
            parked = [name for name, other in self._held.items() if other.image is None]
            for name in parked[: max(0, len(parked) - SKELETONS_PARKED_MAX)]:
                del self._held[name]

    @contextmanager
    def using(self, ref: ModelRef) -> Iterator[tuple[Held, Image]]:
        """Hold a resident model in place. Raises ``NotResident``."""
        with self._changed:
            held = self._held.get(ref)
            image = held.resident_image if held is not None else None
            if held is None or image is None:
                raise NotResident(f"{ref} is not resident in this worker")
            held.users += 1
        try:
            yield held, image
        finally:
            self.let_go(held)

    def awaits(self, ref: ModelRef) -> bool:
        """Whether weights of a model that may be used are still on their way."""
        with self._changed:
            held = self._held.get(ref)
            return held is not None and held.model.is_gated

    def let_go(self, held: Held) -> None:
        """The end of a use that began before the model was put here."""
        with self._changed:
            held.users -= 1
            self._changed.notify_all()

    def withdraw(self, held: Held, keep_chunks: int) -> None:
        """The rest of a model that was served from early will not come: nobody new gets in, and those who are
        there have left when this returns."""
        with self._changed:
            held.kept_chunks = keep_chunks
            if not keep_chunks:
                held.image = None
            self._changed.wait_for(lambda: held.users == 0)

    @contextmanager
    def leaving(self, ref: ModelRef, keep_chunks: int) -> Iterator[Held | None]:
        """Take the chunks from ``keep_chunks`` on off a model once nobody uses it; the skeleton stays.

        Gives what to release the memory of; None when that much is not here. With no chunk kept the image
        belongs to the caller.
        """
        with self._changed:
            held = self._held.get(ref)
            if held is None or held.image is None or held.kept_chunks <= keep_chunks or ref in self._moving:
                held = None
            else:
                # From here on nobody new gets in, so a stream of requests can not hold the weights for ever.
                held.kept_chunks = keep_chunks
                self._moving.add(ref)
                self._changed.wait_for(lambda: held is None or held.users == 0)
                held.model.detach()
        try:
            yield held
        finally:
            with self._changed:
                if held is not None:
                    self._moving.discard(ref)
