"""What the core knows of host copies that are filled ahead of need.

Covers: the state. Does not cover: what changes it (``prefetch``, ``queueing``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packer.types import ModelRef

if TYPE_CHECKING:
    from packer.ledger import Model


@dataclass(slots=True, eq=False)
class Prefetching:
    """Host copies that are filled ahead of need, one at a time; see ``prefetch``."""

    on: bool = False
    filling: Model | None = None
    stopping: bool = False
    started_ms: int = 0
    not_before_ms: int = 0
    wakes: bool = False  # somebody will look again then
    looked: int = 0  # how far what is on disk was gone through; 0: to its end
    # What stays free, as last worked out, and of a tier of which size; -1: what is on disk has changed.
    spare_bytes: int = 0
    spare_of: int = -1
    # Copies that no restore has read yet.
    ahead: dict[ModelRef, Model] = field(default_factory=dict)
