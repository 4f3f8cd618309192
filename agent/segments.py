"""The host tier as memory files: one segment per model version, owned by the agent.

Covers: creating, sealing and dropping segments, and giving their memory back exactly when nobody is charged
for it any more. Does not cover: what is in them (``packer/host_segment.py``), which to keep
(``packer/residency.py``), or images that lie in them (``agent/arena.py``).

A segment survives the worker that filled it. It is in use by nobody but the workers of its tenant, which get
its descriptor for one restore. Once it is sealed not even they can alter a byte of it or make it larger; they
could cut its end off, and then their own tenant's restores from it fail. The agent must be able to: what it
drops is cut first, so that the memory is free even if a process still has it mapped.

The image of a cpu device may lie in a segment (``lend``). When such a segment is dropped, what the image lies
in stays until that is given back on the device: the host tier is not charged for it any more, the device is,
and the two together never hold more than they are charged for, but for the one page before the image.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass

from packer.index import HEADER_BYTES
from packer.types import ModelRef


@dataclass(frozen=True, slots=True)
class Freeing:
    """Memory to be given back, in a thread: with small pages that takes a fifth of a second per GiB."""

    fd: int
    kept_bytes: int

    def free(self) -> None:
        """Returns when the memory is free. To be called once."""
        try:
            # It may have been cut shorter meanwhile; it can not grow.
            with suppress(PermissionError):
                os.ftruncate(self.fd, self.kept_bytes)
        finally:
            os.close(self.fd)


async def freed(freeing: Freeing | None) -> None:
    """Returns when the memory is free, without holding up the loop meanwhile."""
    if freeing is not None:
        await asyncio.to_thread(freeing.free)


@dataclass(slots=True)
class _Loan:
    """An image on ``device`` lies in the first ``kept_bytes`` of a segment. ``fd``: of a segment that was
    dropped meanwhile; None: of the one that the host tier holds."""

    device: str
    kept_bytes: int
    fd: int | None = None


class HostSegments:
    """Every method returns at once; what takes longer is a ``Freeing``, for the caller to carry out."""

    def __init__(self) -> None:
        self._segments: dict[ModelRef, int] = {}
        self._loans: dict[ModelRef, _Loan] = {}

    def create(self, ref: ModelRef, size_bytes: int) -> int:
        """A new, empty segment of ``size_bytes``; replaces what was there. Raises ``OSError``."""
        if (stale := self.drop(ref)) is not None:
            stale.free()
        descriptor = os.memfd_create("bunk-host", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size_bytes)
            # Before a worker gets it: no worker can make the host tier larger than the ledger says.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        except OSError:
            os.close(descriptor)
            raise
        self._segments[ref] = descriptor
        return descriptor

    def seal(self, ref: ModelRef) -> bool:
        """Make a filled segment unchangeable; False if somebody still has it mapped to write."""
        try:
            fcntl.fcntl(self._segments[ref], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        except OSError:
            return False
        return True

    def get(self, ref: ModelRef) -> int | None:
        return self._segments.get(ref)

    def drop(self, ref: ModelRef) -> Freeing | None:
        """Take a segment out of the host tier. What is lent of it stays, for the device to be charged for."""
        descriptor = self._segments.pop(ref, None)
        if descriptor is None:
            return None
        loan = self._loans.get(ref)
        if loan is None or loan.fd is not None:
            return Freeing(descriptor, 0)
        loan.fd = descriptor
        return self._cutting(loan)

    # --- images that lie in a segment -------------------------------------------------------------

    def lend(self, ref: ModelRef, device: str, image_bytes: int) -> Freeing | None:
        """All of the model's image on ``device`` lies in its segment now, and in no other."""
        before = self._loans.get(ref)
        self._loans[ref] = _Loan(device, HEADER_BYTES + image_bytes)
        return Freeing(before.fd, 0) if before is not None and before.fd is not None else None

    def give_back(self, ref: ModelRef, image_bytes: int) -> Freeing | None:
        """Of the image on its device only the first ``image_bytes`` are left."""
        loan = self._loans.get(ref)
        if loan is None:
            return None
        loan.kept_bytes = min(loan.kept_bytes, HEADER_BYTES + image_bytes) if image_bytes else 0
        if not image_bytes:
            del self._loans[ref]
        if loan.fd is None:
            return None
        return self._cutting(loan) if image_bytes else Freeing(loan.fd, 0)

    @staticmethod
    def _cutting(loan: _Loan) -> Freeing | None:
        """To cut what is lent of a dropped segment to what is left of it."""
        assert loan.fd is not None
        try:
            return Freeing(os.dup(loan.fd), loan.kept_bytes)
        except OSError:  # no descriptor is left: here and now, although it may take long
            with suppress(PermissionError):
                os.ftruncate(loan.fd, loan.kept_bytes)
            return None

    def give_all_back(self, tenant: str, device: str) -> list[Freeing]:
        """The process that held a tenant's images on a device is gone."""
        refs = [ref for ref, loan in self._loans.items() if (ref.tenant, loan.device) == (tenant, device)]
        return [freeing for ref in refs if (freeing := self.give_back(ref, 0)) is not None]

    # --- all --------------------------------------------------------------------------------------

    def allocated_bytes(self) -> int:
        """Bytes that the kernel has really allocated to the segments of the host tier."""
        return sum(os.fstat(descriptor).st_blocks * 512 for descriptor in self._segments.values())

    def lent_bytes(self) -> int:
        """Bytes allocated to segments that were dropped and in which images still lie."""
        dropped = [loan.fd for loan in self._loans.values() if loan.fd is not None]
        return sum(os.fstat(descriptor).st_blocks * 512 for descriptor in dropped)

    def close(self) -> None:
        for descriptor in self._segments.values():
            os.close(descriptor)
        for loan in self._loans.values():
            if loan.fd is not None:
                os.close(loan.fd)
        self._segments.clear()
        self._loans.clear()
