"""Carrying out the orders of a worker: weights in, weights out, packs.

Covers: one method per kind of order, its checks against the plan, what a failure leaves behind, and what
the reply says. Does not cover: who sends orders (``worker``), the pipelines (``packer/tiers.py``,
``packer/ingest.py``), or the models that are here (``shelf``).
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from agent.arena import Image, allocate_image
from agent.engines.transformers import BrokenModel, Model, build
from agent.frames import (
    BadFrame,
    Done,
    EvictModel,
    Failed,
    LoadOrigin,
    Reply,
    RestorePack,
    Spawn,
    WireSpec,
    WritePack,
    chunks_sha256,
    close_fds,
    cut,
    parse_wire_ref,
)
from agent.shelf import Held, NotResident, Shelf
from packer.host_segment import HostWriter
from packer.index import PackError
from packer.ingest import OriginLoad, write_pack
from packer.layout import ImageLayout
from packer.pack import PackReader
from packer.pack_writer import PackWriter
from packer.tiers import TierError, restore
from packer.types import ModelRef

log = logging.getLogger("bunk.worker")

Move = LoadOrigin | RestorePack | WritePack | EvictModel


class Moves:
    """The orders of one worker. ``carry_out`` may be called from several threads at once."""

    def __init__(self, identity: Spawn, shelf: Shelf, private: Path) -> None:
        self._kind = identity.kind
        self._torch_device = "cuda" if identity.kind == "cuda" else "cpu"
        self._shelf = shelf
        self._private = private
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="bunk-build")
        self._cancelled: dict[ModelRef, threading.Event] = {}

    def cancel(self, ref: ModelRef) -> None:
        """Stop bringing a model in, if it is being brought in; from any thread, at once."""
        cancelled = self._cancelled.get(ref)
        if cancelled is not None:
            cancelled.set()

    def carry_out(self, order: Move, fds: list[int]) -> Reply:
        """Do it and say how it went; never raises. Closes the descriptors."""
        try:
            return self._do(order, fds)
        except TierError as error:
            return Failed(
                order.id, cut(error.message), error.corrupt, error.broken, error.chunks, error.cancelled
            )
        except PackError as error:
            return Failed(order.id, cut(str(error)), error.corrupt)
        except BrokenModel as error:
            return Failed(order.id, cut(str(error)), broken=True)
        except (MemoryError, OSError, NotResident, BadFrame) as error:
            return Failed(order.id, cut(f"{type(error).__name__}: {error}"))
        except Exception as error:
            log.error("order failed in an unforeseen way: %s", where(error))
            return Failed(order.id, cut(f"{type(error).__name__}: {error}"))
        finally:
            close_fds(fds)

    def _do(self, order: Move, fds: list[int]) -> Reply:
        started = time.monotonic()
        match order:
            case LoadOrigin():
                self._load_origin(order, fds)
                return Done(order.id, _since_ms(started))
            case RestorePack():
                filled, restored_bytes = self._restore(order, fds)
                return Done(order.id, _since_ms(started), filled, restored_bytes=restored_bytes)
            case WritePack():
                return self._pack(order, fds)
            case EvictModel():
                self._evict(parse_wire_ref(order.ref), order.keep_chunks)
                return Done(order.id)

    # --- in ---------------------------------------------------------------------------------------

    def _load_origin(self, order: LoadOrigin, fds: list[int]) -> None:
        ref = parse_wire_ref(order.spec.ref)
        if len(fds) != len(order.files):
            raise BadFrame(f"{len(order.files)} files with {len(fds)} descriptors")
        load = OriginLoad(list(zip(order.files, fds, strict=True)))
        with self._arriving(ref) as (parked, _):
            load.open()
            _check_layout(order.spec, load.layout, "the origin", TierError("", broken=True))
            self._bring_in(ref, order.spec, load.layout, load.side_files, parked, load.fill, 0)

    def _restore(self, order: RestorePack, fds: list[int]) -> tuple[bool, int]:
        ref = parse_wire_ref(order.spec.ref)
        if len(fds) != 1 + order.direct + (order.host_form is not None):
            raise BadFrame(f"a restore with {len(fds)} descriptors")
        first = order.first_chunk
        filled = False

        def fill(image: Image) -> None:
            nonlocal filled
            facts = restore(reader, image, first_chunk=first, host=host, cancelled=cancelled)
            filled = facts.host_filled

        with self._arriving(ref) as (parked, cancelled):
            reader = PackReader(fds[0], order.data_key, ref, fds[1] if order.direct else None)
            index = reader.index
            if (index.engine, index.task) != (order.spec.engine, order.spec.task):
                raise TierError(f"the copy is for {index.engine} {index.task}", corrupt=True)
            _check_layout(order.spec, index.layout, "the copy", TierError("", corrupt=True))
            # A parked skeleton has the same files already: a version never changes.
            side_files = parked.side_files if parked else {path: reader.file(path) for path, _ in index.files}
            host = HostWriter(fds[-1], index, side_files, order.host_form) if order.host_form else None
            self._bring_in(ref, order.spec, index.layout, side_files, parked, fill, first)
        return filled, sum(index.layout.chunk_bytes[first:])

    @contextmanager
    def _arriving(self, ref: ModelRef) -> Iterator[tuple[Held | None, threading.Event]]:
        """Announce a model; gives what is here of it, and what is set when it is not wanted any more."""
        with self._shelf.arriving(ref) as parked:
            cancelled = self._cancelled[ref] = threading.Event()
            try:
                yield parked, cancelled
            finally:
                del self._cancelled[ref]

    def _bring_in(
        self,
        ref: ModelRef,
        spec: WireSpec,
        layout: ImageLayout,
        side_files: Mapping[str, bytes],
        parked: Held | None,
        fill: Callable[[Image], object],
        first_chunk: int,
    ) -> None:
        """Fill an image from a chunk on while the skeleton is built beside it, then put both together.

        On a failure exactly the chunks before ``first_chunk`` are here again.
        """
        building: Future[Model] | None = None
        image = self._room(ref, layout, parked, first_chunk)
        try:
            if parked is None:
                building = self._builder.submit(
                    build, spec.task, side_files, layout, self._private, self._torch_device
                )
            fill(image)
            image.settle()
            if building is not None:
                parked = Held(building.result(), layout, spec.engine, spec.task, side_files)
            assert parked is not None
            parked.model.attach(image)
        except BaseException:
            if building is not None:
                building.cancel()
            if parked is not None:
                parked.model.detach()
            if first_chunk:
                image.release(layout.chunks[first_chunk].image_offset)
            else:
                image.close()
            raise
        parked.image, parked.kept_chunks = image, len(layout.chunks)
        self._shelf.put(ref, parked)

    def _room(self, ref: ModelRef, layout: ImageLayout, parked: Held | None, first_chunk: int) -> Image:
        """An image of which the chunks before ``first_chunk`` are filled, and only they."""
        image = parked.image if parked is not None else None
        if first_chunk == 0:
            if parked is not None and image is not None:
                parked.image, parked.kept_chunks = None, 0
                image.close()
            return allocate_image(self._kind, layout)
        if parked is None or image is None or not first_chunk <= parked.kept_chunks < len(layout.chunks):
            kept = parked.kept_chunks if parked is not None else 0
            raise TierError(f"{ref} has {kept} chunks here, so it can not be filled from chunk {first_chunk}")
        if first_chunk < parked.kept_chunks:
            parked.kept_chunks = first_chunk
            image.release(layout.chunks[first_chunk].image_offset)
        image.grow()
        return image

    # --- packs and out ----------------------------------------------------------------------------

    def _pack(self, order: WritePack, fds: list[int]) -> Done:
        ref = parse_wire_ref(order.ref)
        if len(fds) != 1:
            raise BadFrame(f"a pack with {len(fds)} descriptors")
        with self._shelf.using(ref) as (held, image):
            writer = PackWriter(
                fds[0], ref, held.engine, held.task, held.layout, order.data_key, order.limit_bytes
            )
            write_pack(writer, image, held.layout, held.side_files)
        summary = writer.finish()
        return Done(order.id, disk_bytes=summary.disk_bytes, host_bytes=summary.host_bytes)

    def _evict(self, ref: ModelRef, keep_chunks: int) -> None:
        with self._shelf.leaving(ref, keep_chunks) as held:
            if held is None or held.image is None:
                return
            if keep_chunks:
                held.image.release(held.released_from(keep_chunks))
                return
            image, held.image = held.image, None
            if not image.close():
                # A view that only a cycle still refers to would keep the address space, on a GPU the memory.
                gc.collect()
                image.close()


def _check_layout(spec: WireSpec, layout: ImageLayout, source: str, kind: TierError) -> None:
    """The ledger counts the plan's bytes, so what comes must be exactly that. Raises ``TierError``."""
    if layout.image_bytes != spec.image_bytes or chunks_sha256(layout.chunk_bytes) != spec.chunks_sha256:
        raise TierError(
            f"{source} lays out to {layout.image_bytes} bytes in {len(layout.chunks)} chunks, the plan says "
            f"{spec.image_bytes} bytes in other chunks; remove this version and push it again",
            kind.corrupt,
            kind.broken,
        )


def _since_ms(started: float) -> int:
    return max(1, round((time.monotonic() - started) * 1000))


def where(error: BaseException) -> str:
    """Type and place of an error without its text, which may quote a tenant's input."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"
