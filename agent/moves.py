"""Carrying out the orders of a worker: weights in, weights out, packs.

Covers: one method per kind of order, its checks against the plan, what a failure leaves behind, and what
the reply says. Does not cover: who sends orders (``worker``), the pipelines (``packer/tiers.py``,
``packer/ingest.py``), or the models that are here (``shelf``).
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from agent.arena import Image
from agent.early import EARLY_BYTES_MIN, EarlyStart, Gate, Watched
from agent.engines.model import BrokenModel, Model, build
from agent.frames import (
    BadFrame,
    BaseOffer,
    Done,
    EvictModel,
    Failed,
    FillSegment,
    LoadOrigin,
    RepairPack,
    Reply,
    RestorePack,
    Serving,
    Spawn,
    WireSpec,
    WritePack,
    chunks_sha256,
    close_fds,
    cut,
    parse_wire_ref,
)
from agent.gang_image import allocate
from agent.shelf import Held, NotResident, Shelf
from packer.bases import BasePack, Bases
from packer.host_segment import HostWriter
from packer.index import PackError
from packer.ingest import Ingest
from packer.layout import ImageLayout
from packer.origin_headers import ORIGIN_HEADERS, origin_digests, unpack_headers
from packer.pack import PackReader
from packer.pack_file import FileFds
from packer.pack_writer import PackSummary, PackWriter
from packer.packing import PackTarget, write_pack
from packer.repair import repair_chunks
from packer.sources import open_source
from packer.tiers import RestoreFacts, TierError, fill, restore
from packer.types import ModelRef, OriginFile

log = logging.getLogger("bunk.worker")

# The lowest priority there is.
FILL_NICE = 19

Move = LoadOrigin | RestorePack | FillSegment | WritePack | RepairPack | EvictModel


@dataclass(frozen=True, slots=True)
class Incoming:
    """A model on its way in: ``fill`` brings its bytes, ``stop`` ends all that still reads them."""

    ref: ModelRef
    spec: WireSpec
    layout: ImageLayout
    side_files: Mapping[str, bytes]
    fill: Callable[[Image], object]
    stop: Callable[[], object] = lambda: None
    # What ``fill`` tells of itself, and whom to tell that requests may come before it is done.
    watched: Watched | None = None
    serving: Callable[[], None] = lambda: None


class _Coming:
    """A model that is on its way: its image, and its skeleton, parked or being built."""

    def __init__(self, new: Incoming, parked: Held | None, image: Image) -> None:
        self.new = new
        self.image = image
        self.building: Future[Model] | None = None
        self._held = parked
        self._lock = threading.Lock()

    def held(self) -> Held:
        """Waits for a skeleton that is being built. Raises what building it did."""
        with self._lock:
            if self._held is None:
                assert self.building is not None
                new = self.new
                model = self.building.result()
                self._held = Held(model, new.layout, new.spec.engine, new.spec.task, new.side_files)
            return self._held

    def begin(self, gate: Gate) -> Sequence[int] | None:
        model = self.held().model
        model.attach(self.image)
        return model.serve_behind(gate, self.new.layout)

    def forget(self) -> None:
        """Nothing of the image is to be used any more."""
        if self.building is not None:
            self.building.cancel()
        if self._held is not None:
            self._held.model.detach()


class Moves:
    """The orders of one worker. ``carry_out`` may be called from several threads at once."""

    def __init__(self, identity: Spawn, shelf: Shelf, private: Path) -> None:
        self._kind = identity.kind
        self._torch_device = "cuda" if identity.kind == "cuda" else "cpu"
        self._shelf = shelf
        self._private = private
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="bunk-build")
        # By order: those that bring a model in, from the moment that they are known, run or not.
        self._coming: dict[int, tuple[ModelRef, threading.Event]] = {}
        self._coming_lock = threading.Lock()

    def cancel(self, ref: ModelRef) -> None:
        """Stop bringing a model in, begun or waiting for its turn; from any thread, at once."""
        with self._coming_lock:
            for coming, cancelled in self._coming.values():
                if coming == ref:
                    cancelled.set()

    def expect(self, order: Move) -> None:
        """Called once before ``carry_out``: from now on the order can be cancelled."""
        if isinstance(order, LoadOrigin | RestorePack):
            with self._coming_lock:
                self._coming[order.id] = (parse_wire_ref(order.spec.ref), threading.Event())

    def carry_out(self, order: Move, fds: list[int], reply: Callable[[Reply], None]) -> None:
        """Do it and say how it went; raises only what ``reply`` does. Closes the descriptors."""
        try:
            with self._failures(order.id, reply):
                self._do(order, fds, reply)
        finally:
            with self._coming_lock:
                self._coming.pop(order.id, None)
            close_fds(fds)

    @contextmanager
    def _failures(self, number: int, reply: Callable[[Reply], None]) -> Iterator[None]:
        """Answer an order that fails inside."""
        try:
            yield
            return
        except TierError as error:
            failed = Failed(
                number, cut(error.message), error.corrupt, error.broken, error.chunks, error.cancelled
            )
        except PackError as error:
            failed = Failed(number, cut(str(error)), error.corrupt)
        except BrokenModel as error:
            failed = Failed(number, cut(str(error)), broken=True)
        except (MemoryError, OSError, NotResident, BadFrame) as error:
            failed = Failed(number, cut(f"{type(error).__name__}: {error}"))
        except Exception as error:
            log.error("order failed in an unforeseen way: %s", where(error))
            failed = Failed(number, cut(f"{type(error).__name__}: {error}"))
        reply(failed)

    def _do(self, order: Move, fds: list[int], reply: Callable[[Reply], None]) -> None:
        match order:
            case LoadOrigin():
                self._load_origin(order, fds, reply)
            case RestorePack():
                reply(self._restore(order, fds, reply))
            case FillSegment():
                reply(self._fill(order, fds))
            case WritePack():
                reply(self._pack(order, fds))
            case RepairPack():
                reply(self._repair(order, fds))
            case EvictModel():
                self._evict(parse_wire_ref(order.ref), order.keep_chunks)
                reply(Done(order.id))

    # --- in ---------------------------------------------------------------------------------------

    def _load_origin(self, order: LoadOrigin, fds: list[int], reply: Callable[[Reply], None]) -> None:
        """The model answers as soon as every hash is right; its pack is finished after that."""
        started = time.monotonic()
        ref, spec, pack = parse_wire_ref(order.spec.ref), order.spec, order.pack
        rest = fds[len(order.files) :]
        if len(fds) < len(order.files) or (len(rest) < 2 if pack is not None else rest):
            raise BadFrame(f"{len(order.files)} files with {len(fds)} descriptors")
        sources = [(file, open_source(fd)) for file, fd in zip(order.files, fds, strict=False)]
        target = None
        if pack is not None:
            target = PackTarget(
                rest[0],
                rest[1],
                pack.data_key,
                pack.limit_bytes,
                pack.resume,
                pack.floor_bytes,
                _base_packs(pack.offers, rest[2:]),
            )
        ingest = Ingest(sources, ref, spec.engine, spec.task, target)
        with self._arriving(order) as (parked, cancelled):
            ingest.open()
            _check_layout(spec, ingest.layout, "the origin", TierError("", broken=True))
            fill = partial(ingest.fill, cancelled=cancelled)
            incoming = Incoming(ref, spec, ingest.layout, ingest.side_files, fill, ingest.abandon)
            held = self._bring_in(incoming, parked, pinned=pack is not None)
        # The origin is read; whoever hears that the model is there may count on it being closed.
        close_fds(fds[: len(order.files)])
        del fds[: len(order.files)]
        reply(Done(order.id, _since_ms(started), restored_bytes=ingest.layout.image_bytes))
        if pack is not None:
            try:
                with self._failures(pack.id, reply):
                    reply(_packed(pack.id, ingest.finish_pack()))
            finally:
                self._shelf.let_go(held)

    def _restore(self, order: RestorePack, fds: list[int], reply: Callable[[Reply], None]) -> Done | Failed:
        started = time.monotonic()
        ref, first = parse_wire_ref(order.spec.ref), order.first_chunk
        if len(fds) != (1 + order.bases) * (1 + order.direct) + (order.host_form is not None):
            raise BadFrame(f"a restore with {len(fds)} descriptors")
        facts = RestoreFacts(0, 0, 0, False)

        def bring(image: Image) -> None:
            nonlocal facts
            facts = restore(
                reader,
                image,
                first_chunk=first,
                host=host,
                cancelled=cancelled,
                watch=watched,
                past_cache=order.past_cache,
            )
            if order.proof:
                _prove(reader, image, order.proof)

        with self._arriving(order) as (parked, cancelled):
            own, *bases = _files(fds, 1 + order.bases, order.direct)
            reader = PackReader(own.fd, order.data_key, ref, own.direct_fd, bases)
            index = reader.index
            if (index.engine, index.task) != (order.spec.engine, order.spec.task):
                raise TierError(f"the copy is for {index.engine} {index.task}", corrupt=True)
            _check_layout(order.spec, index.layout, "the copy", TierError("", corrupt=True))
            # A parked skeleton has the same files already: a version never changes.
            side_files = parked.side_files if parked else {path: reader.file(path) for path, _ in index.files}
            host = HostWriter(fds[-1], index, side_files, order.host_form) if order.host_form else None
            moved_bytes = sum(index.layout.chunk_bytes[first:])
            # Bytes of a GPU's image are on their way to it when they are placed, not there.
            may = order.early and self._kind == "cpu" and moved_bytes >= EARLY_BYTES_MIN
            watched = Watched(index.layout, first) if may else None
            incoming = Incoming(
                ref,
                order.spec,
                index.layout,
                side_files,
                bring,
                watched=watched,
                serving=lambda: reply(Serving(order.id, moved_bytes)),
            )
            try:
                self._bring_in(incoming, parked, first)
            except TierError as error:
                if not error.chunks:
                    raise
                bad = [index.chunks[number] for number in error.chunks]
                extents = tuple(
                    (chunk.offset, chunk.extent_bytes) if chunk.base is None else (-1, 0) for chunk in bad
                )
                message = cut(error.message)
                return Failed(order.id, message, True, False, error.chunks, False, reader.salt, extents)
        cached = 2 * facts.direct_bytes < facts.read_bytes if facts.read_bytes else None
        taken_ms = _since_ms(started)
        return Done(order.id, taken_ms, facts.host_filled, facts.mapped, moved_bytes, cached)

    def _fill(self, order: FillSegment, fds: list[int]) -> Done:
        """A whole segment without an image: no model is built, nobody waits."""
        started = time.monotonic()
        if len(fds) != (1 + order.bases) * (1 + order.direct) + 1:
            raise BadFrame(f"a segment to fill with {len(fds)} descriptors")
        # This thread and those that it starts: whoever answers a request comes first.
        os.setpriority(os.PRIO_PROCESS, 0, FILL_NICE)
        own, *bases = _files(fds, 1 + order.bases, order.direct)
        reader = PackReader(own.fd, order.data_key, parse_wire_ref(order.spec.ref), own.direct_fd, bases)
        _check_layout(order.spec, reader.index.layout, "the copy", TierError("", corrupt=True))
        side_files = {path: reader.file(path) for path, _ in reader.index.files}
        fill(reader, HostWriter(fds[-1], reader.index, side_files, order.host_form))
        return Done(order.id, _since_ms(started), host_filled=True)

    @contextmanager
    def _arriving(self, order: LoadOrigin | RestorePack) -> Iterator[tuple[Held | None, threading.Event]]:
        """Announce a model; gives what is here of it, and what is set when it is not wanted any more."""
        with self._coming_lock:
            ref, cancelled = self._coming[order.id]
        if cancelled.is_set():
            raise TierError("the restore was cancelled before its turn came", cancelled=True)
        with self._shelf.arriving(ref) as parked:
            yield parked, cancelled

    def _bring_in(
        self, new: Incoming, parked: Held | None, first_chunk: int = 0, pinned: bool = False
    ) -> Held:
        """Fill an image from a chunk on while the skeleton is built beside it, then put both together.

        ``pinned``: with one user from the start. On a failure exactly the chunks before ``first_chunk``
        are here again.
        """
        spec, layout = new.spec, new.layout
        early: EarlyStart | None = None
        image = self._room(new, parked, first_chunk)
        coming = _Coming(new, parked, image)
        try:
            if parked is None:
                own = {path: data for path, data in new.side_files.items() if path != ORIGIN_HEADERS}
                coming.building = self._builder.submit(
                    build, spec.engine, spec.task, own, layout, self._private, self._torch_device
                )
            if new.watched is not None:
                early = EarlyStart(new.watched, coming.begin, partial(self._admit, coming))
            new.fill(image)
            image.settle()
            if early is not None and early.join():
                return coming.held()
            parked = coming.held()
            parked.model.attach(image)
        except BaseException:
            if early is not None and new.watched is not None:
                new.watched.gate.fail()
                if early.join():
                    self._shelf.withdraw(coming.held(), first_chunk)
            coming.forget()
            new.stop()  # nobody reads the image any more
            if first_chunk:
                image.release(layout.chunks[first_chunk].image_offset)
            else:
                image.close()
            raise
        parked.image, parked.kept_chunks = image, len(layout.chunks)
        parked.users += pinned
        self._shelf.put(new.ref, parked)
        return parked

    def _admit(self, coming: _Coming) -> None:
        held, new = coming.held(), coming.new
        held.image, held.kept_chunks = coming.image, len(new.layout.chunks)
        self._shelf.put(new.ref, held)
        new.serving()

    def _room(self, new: Incoming, parked: Held | None, first_chunk: int) -> Image:
        """An image of which the chunks before ``first_chunk`` are filled, and only they."""
        ref, layout = new.ref, new.layout
        image = parked.image if parked is not None else None
        if first_chunk == 0:
            if parked is not None and image is not None:
                parked.image, parked.kept_chunks = None, 0
                image.close()
            return allocate(self._kind, layout, new.spec.run_ends)
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
        if not fds:
            raise BadFrame("a pack without a descriptor")
        bases = Bases(_base_packs(order.offers, fds[1:]), ref)
        with self._shelf.using(ref) as (held, image):
            writer = PackWriter(
                fds[0],
                ref,
                held.engine,
                held.task,
                held.layout,
                order.data_key,
                order.limit_bytes,
                order.floor_bytes,
                bases=bases,
            )
            write_pack(writer, image, held.layout, held.side_files)
        return _packed(order.id, writer.finish())

    def _repair(self, order: RepairPack, fds: list[int]) -> Done:
        packs = 1 + order.bases
        if len(fds) != packs + len(order.files):
            raise BadFrame(f"a repair from {len(order.files)} files with {len(fds)} descriptors")
        sources = {file.path: open_source(fd) for file, fd in zip(order.files, fds[packs:], strict=True)}
        own, *bases = _files(fds, packs, direct=False)
        ref = parse_wire_ref(order.ref)
        left = repair_chunks(own.fd, order.data_key, ref, order.chunks, sources, bases)
        return Done(order.id, bad_chunks=left)

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


def _files(fds: Sequence[int], count: int, direct: bool) -> list[FileFds]:
    """The first ``count`` files of an order, each with a second descriptor if there are ``direct`` ones."""
    step = 1 + direct
    return [FileFds(fds[at], fds[at + 1] if direct else None) for at in range(0, count * step, step)]


def _base_packs(offers: Sequence[BaseOffer], fds: Sequence[int]) -> tuple[BasePack, ...]:
    if len(fds) != sum(1 + offer.bases for offer in offers):
        raise BadFrame(f"{len(offers)} packs to look in with {len(fds)} descriptors")
    left = iter(FileFds(fd) for fd in fds)
    return tuple(
        BasePack(parse_wire_ref(offer.ref), offer.data_key, next(left), tuple(islice(left, offer.bases)))
        for offer in offers
    )


def _packed(number: int, summary: PackSummary) -> Done:
    return Done(
        number,
        disk_bytes=summary.disk_bytes,
        host=summary.host,
        deduplicated_bytes=summary.deduplicated_bytes,
        bases=summary.bases,
    )


def _prove(reader: PackReader, image: Image, files: Sequence[OriginFile]) -> None:
    """A pack that another node made must hold the weights that were registered: its tags say only who had
    the key. Raises ``TierError`` (corrupt)."""
    wanted = {file.path: file.sha256 for file in files}
    if ORIGIN_HEADERS not in dict(reader.index.files):
        raise TierError("the pack can not be proven: it has no headers of the origin", corrupt=True)
    try:
        headers = unpack_headers(reader.file(ORIGIN_HEADERS))
        found = origin_digests(reader.index.layout, headers, image)
    except PackError as error:
        raise TierError(f"the pack can not be proven: {error}", corrupt=True) from None
    if found != wanted:
        raise TierError("the pack does not hold the weights that were registered", corrupt=True)


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
