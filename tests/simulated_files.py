"""Pack files of the simulated node that several versions have parts in.

Covers: what each file really takes, who needs how much of it, and what the agent charges to whom. Does not
cover: when packs come and go (``simulated_hands``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from packer.types import ModelRef


@dataclass(slots=True, eq=False)
class File:
    """``owner`` None: the version that it was written for is gone. ``parts``: what others need of it."""

    nbytes: int
    owner: ModelRef | None
    parts: dict[ModelRef, int] = field(default_factory=dict)

    @property
    def tenant(self) -> str:
        return (self.owner or next(iter(self.parts))).tenant

    @property
    def payer(self) -> ModelRef:
        return self.owner or next(iter(self.parts))


class Files:
    """The pack files on the simulated disk."""

    def __init__(self, seed: int) -> None:
        # Of its own, so that what is shared changes no other draw.
        self.rng = random.Random(-1 - seed)
        self.files: list[File] = []

    @property
    def used_bytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def write(self, ref: ModelRef, nbytes: int) -> int:
        """A new pack, with luck a small one that has the rest in files of its tenant; returns its bytes."""
        others = [file for file in self.files if file.tenant == ref.tenant]
        if others and self.rng.random() < 0.4:
            for file in self.rng.sample(others, min(len(others), 2)):
                file.parts[ref] = self.rng.randrange(1, file.nbytes + 1)
            nbytes //= 8
        self.files.append(File(nbytes, ref))
        return nbytes

    def charge(self, ref: ModelRef) -> int:
        return sum(file.nbytes for file in self.files if file.payer == ref)

    def drop(self, ref: ModelRef) -> tuple[tuple[ModelRef, int], ...]:
        """Give back what nobody else needs; who is charged what from now on."""
        payers: dict[ModelRef, None] = {}
        for file in list(self.files):
            if ref not in (file.owner, *file.parts):
                continue
            file.parts.pop(ref, None)
            if file.owner == ref:
                file.owner = None
            if file.owner is None and not file.parts:
                self.files.remove(file)
            elif file.owner is None:
                file.nbytes = min(file.nbytes, sum(file.parts.values()))
                payers[file.payer] = None
        return tuple((payer, self.charge(payer)) for payer in payers)
