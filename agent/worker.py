"""The worker: one tenant's models on one device, for the life of one process.

Covers: carrying out orders (load, restore, pack, evict), holding models and their images, answering
requests one after the other in one compute thread, cancelling, and staying alive through any bad
request. Does not cover: forking and confinement (``nursery``), the pipelines (``packer/tiers.py``), the
engine (``engines/transformers``), or any decision: the agent says what to do and trusts no answer.

Threads: the main one reads both sockets and leaves the process the moment either ends; orders run in a
few threads of their own; one thread computes.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import random
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from agent.arena import Image, allocate_image
from agent.engines.transformers import BrokenModel, Model, build
from agent.facade import JSON, EngineError, EngineFrame, EngineRequest
from agent.frames import (
    LENGTHS_BYTES,
    BadFrame,
    Broke,
    Cancel,
    Done,
    End,
    EvictModel,
    Failed,
    Fault,
    FromWorker,
    LoadOrigin,
    MoreFds,
    Order,
    Piece,
    Ping,
    Receiver,
    Reply,
    RestorePack,
    Run,
    Spawn,
    ToWorker,
    WireSpec,
    WritePack,
    chunks_sha256,
    close_fds,
    cut,
    decode,
    decode_lengths,
    encode_frame,
    encode_value,
    orders_decoder,
    parse_wire_ref,
    send_message,
    to_worker_decoder,
)
from packer.index import PackError
from packer.ingest import OriginLoad, write_pack
from packer.layout import ImageLayout
from packer.pack import PackReader
from packer.pack_writer import PackWriter
from packer.tiers import TierError, restore_image
from packer.types import ModelRef, Task

log = logging.getLogger("bunk.worker")

# Orders of each kind at once, so that none waits behind another kind: an origin may feed slowly, an
# eviction may wait for an answer in progress. Restores and packs have two threads and some 32 MiB of
# scratch each, so few of them run at a time.
ORIGIN_LOADS_MAX = 8
RESTORES_MAX = 2
PACKS_MAX = 1
EVICTIONS_MAX = 8
# Skeletons (module tree, tokenizer, side files) kept of models that are not resident; a tokenizer of
# 128,000 words takes some 100 MiB, a small one 2.
SKELETONS_PARKED_MAX = 16
# The core bounds what waits on a node (4,096); more than that here is a broken agent.
RUNS_WAITING_MAX = 8192
# Quiet time after which freed heap goes back to the system; between requests it is reused instead.
TRIM_IDLE_S = 1.0
RECEIVE_BYTES = 256 * 1024

_libc = ctypes.CDLL(None)


@dataclass(slots=True)
class Held:
    """A built model and, while it is resident, its image. ``users``: answers and packs in progress."""

    model: Model
    layout: ImageLayout
    engine: str
    task: Task
    side_files: Mapping[str, bytes]
    image: Image | None = None
    users: int = 0


class NotResident(Exception):
    """The model's weights are not in this worker (any more)."""


class Shelf:
    """The models of this worker. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[ModelRef, Held] = {}
        # Being brought in or taken away: nobody else may start either.
        self._moving: set[ModelRef] = set()

    @contextmanager
    def arriving(self, ref: ModelRef) -> Iterator[Held | None]:
        """Announce that a model is being brought in; gives its parked skeleton if there is one."""
        with self._changed:
            held = self._held.get(ref)
            if ref in self._moving or (held is not None and held.image is not None):
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
            image = held.image if held is not None else None
            if held is None or image is None:
                raise NotResident(f"{ref} is not resident in this worker")
            held.users += 1
        try:
            yield held, image
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def take_image(self, ref: ModelRef) -> Image | None:
        """Take the weights off a model once nobody uses it; the skeleton stays. None: not resident."""
        with self._changed:
            held = self._held.get(ref)
            if held is None or held.image is None:
                return None
            # From here on nobody new gets in, so a stream of requests can not hold the weights for ever.
            image, held.image = held.image, None
            self._moving.add(ref)
            try:
                self._changed.wait_for(lambda: held.users == 0)
                held.model.detach()
            finally:
                self._moving.discard(ref)
            return image


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for the compute thread, or is in it."""

    run: Run
    cancelled: threading.Event


class Worker:
    """Serves one tenant on one device until a socket ends."""

    def __init__(self, identity: Spawn, orders: socket.socket, data: socket.socket, private: Path) -> None:
        self._identity = identity
        self._orders = orders
        self._data = data
        self._private = private
        self._device = "cuda" if identity.kind == "cuda" else "cpu"
        self._shelf = Shelf()
        self._order_threads: Mapping[type, ThreadPoolExecutor] = {
            kind: ThreadPoolExecutor(threads, thread_name_prefix="bunk-order")
            for kind, threads in (
                (LoadOrigin, ORIGIN_LOADS_MAX),
                (RestorePack, RESTORES_MAX),
                (WritePack, PACKS_MAX),
                (EvictModel, EVICTIONS_MAX),
            )
        }
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="bunk-build")
        self._reply_lock = threading.Lock()
        self._data_lock = threading.Lock()
        self._runs: queue.SimpleQueue[Waiting] = queue.SimpleQueue()
        self._waiting: dict[int, Waiting] = {}
        self._received = bytearray()

    # --- sockets ----------------------------------------------------------------------------------

    def serve(self) -> None:
        threading.Thread(target=self._compute, name="bunk-compute", daemon=True).start()
        receiver = Receiver(self._orders)
        with selectors.DefaultSelector() as selector:
            selector.register(self._orders, selectors.EVENT_READ)
            selector.register(self._data, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    alive = self._take_order(receiver) if key.fileobj is self._orders else self._take_frames()
                    if not alive:
                        return

    def _take_order(self, receiver: Receiver) -> bool:
        received = receiver.receive(orders_decoder)
        if received is None:
            return False
        order, fds = received
        if isinstance(order, Ping):
            close_fds(fds)
            with self._reply_lock:
                send_message(self._orders, Done(order.id))
            return True
        self._order_threads[type(order)].submit(self._carry_out, order, fds)
        return True

    def _take_frames(self) -> bool:
        piece = self._data.recv(RECEIVE_BYTES)
        if not piece:
            return False
        self._received += piece
        while len(self._received) >= LENGTHS_BYTES:
            header, body = decode_lengths(self._received[:LENGTHS_BYTES])
            end = LENGTHS_BYTES + header + body
            if len(self._received) < end:
                break
            frame = decode(to_worker_decoder, self._received[LENGTHS_BYTES : LENGTHS_BYTES + header])
            del self._received[:end]
            self._take_frame(frame)
        return True

    def _take_frame(self, frame: ToWorker) -> None:
        if isinstance(frame, Cancel):
            waiting = self._waiting.get(frame.id)
            if waiting is not None:
                waiting.cancelled.set()
            return
        if frame.id in self._waiting or len(self._waiting) >= RUNS_WAITING_MAX:
            raise BadFrame(
                f"run {frame.id}: {len(self._waiting)} are waiting, the limit is {RUNS_WAITING_MAX}"
            )
        waiting = Waiting(frame, threading.Event())
        self._waiting[frame.id] = waiting
        self._runs.put(waiting)

    def _send(self, frame: FromWorker, body: bytes = b"") -> None:
        header, body = encode_frame(frame, body)
        with self._data_lock:
            self._data.sendall(header)
            if body:
                self._data.sendall(body)

    # --- orders -----------------------------------------------------------------------------------

    def _carry_out(self, order: Order, fds: list[int]) -> None:
        assert not isinstance(order, MoreFds | Ping)
        reply: Reply
        try:
            reply = self._do(order, fds)
        except TierError as error:
            reply = Failed(order.id, cut(error.message), error.corrupt, error.broken)
        except PackError as error:
            reply = Failed(order.id, cut(str(error)), error.corrupt)
        except BrokenModel as error:
            reply = Failed(order.id, cut(str(error)), broken=True)
        except (MemoryError, OSError, NotResident, BadFrame) as error:
            reply = Failed(order.id, cut(f"{type(error).__name__}: {error}"))
        except Exception as error:
            log.error("order failed in an unforeseen way: %s", _where(error))
            reply = Failed(order.id, cut(f"{type(error).__name__}: {error}"))
        finally:
            close_fds(fds)
        with self._reply_lock:
            send_message(self._orders, reply)
        _trim()  # the scratch of restores and packs

    def _do(self, order: LoadOrigin | RestorePack | WritePack | EvictModel, fds: list[int]) -> Reply:
        started = time.monotonic()
        match order:
            case LoadOrigin():
                self._load_origin(order, fds)
                return Done(order.id, _since_ms(started))
            case RestorePack():
                filled = self._restore(order, fds)
                return Done(order.id, _since_ms(started), host_filled=filled)
            case WritePack():
                return self._pack(order, fds)
            case EvictModel():
                self._evict(parse_wire_ref(order.ref))
                return Done(order.id)

    def _load_origin(self, order: LoadOrigin, fds: list[int]) -> None:
        ref = parse_wire_ref(order.spec.ref)
        if len(fds) != len(order.files):
            raise BadFrame(f"{len(order.files)} files with {len(fds)} descriptors")
        load = OriginLoad(list(zip(order.files, fds, strict=True)))
        with self._shelf.arriving(ref) as parked:
            load.open()
            _check_layout(order.spec, load.layout, "the origin", TierError("", broken=True))
            self._bring_in(ref, order.spec, load.layout, load.side_files, parked, load.fill)

    def _restore(self, order: RestorePack, fds: list[int]) -> bool:
        ref = parse_wire_ref(order.spec.ref)
        if len(fds) != 1 + order.tee:
            raise BadFrame(f"a restore with {len(fds)} descriptors")
        filled = False

        def fill(image: Image) -> None:
            nonlocal filled
            filled = restore_image(reader, image, fds[1] if order.tee else None)

        with self._shelf.arriving(ref) as parked:
            reader = PackReader(fds[0], order.data_key, ref)
            index = reader.index
            if (index.engine, index.task) != (order.spec.engine, order.spec.task):
                raise TierError(f"the copy is for {index.engine} {index.task}", corrupt=True)
            _check_layout(order.spec, index.layout, "the copy", TierError("", corrupt=True))
            # A parked skeleton has the same files already: a version never changes.
            side_files = {} if parked else {path: reader.file(path) for path, _ in index.files}
            self._bring_in(ref, order.spec, index.layout, side_files, parked, fill)
        return filled

    def _bring_in(
        self,
        ref: ModelRef,
        spec: WireSpec,
        layout: ImageLayout,
        side_files: Mapping[str, bytes],
        parked: Held | None,
        fill: Callable[[Image], object],
    ) -> None:
        """Fill a new image while the skeleton is built beside it, then put both together."""
        building: Future[Model] | None = None
        if parked is None:
            building = self._builder.submit(build, spec.task, side_files, layout, self._private, self._device)
        image = allocate_image(self._identity.kind, self._identity.device, layout.image_bytes)
        try:
            fill(image)
            if building is not None:
                parked = Held(building.result(), layout, spec.engine, spec.task, side_files)
            assert parked is not None
            parked.model.attach(image)
            parked.image = image
        except BaseException:
            if building is not None:
                building.cancel()
            image.close()
            raise
        self._shelf.put(ref, parked)

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

    def _evict(self, ref: ModelRef) -> None:
        image = self._shelf.take_image(ref)
        if image is not None:
            # Before the image closes: on a GPU a view that only a cycle still refers to would hold it.
            gc.collect()
            image.close()
            _trim()

    # --- requests ---------------------------------------------------------------------------------

    def _compute(self) -> None:
        """The one thread that runs models; its results depend on nothing that another thread does."""
        torch.set_num_threads(self._identity.compute_threads)
        torch.seed()
        _warm_up(self._device)
        used = True
        while True:
            try:
                waiting = self._runs.get(timeout=TRIM_IDLE_S if used else None)
            except queue.Empty:
                _trim()
                used = False
                continue
            used = True
            end = self._answer(waiting)
            del self._waiting[waiting.run.id]
            try:
                self._send(end)
            except OSError:
                return  # the agent is gone; the main thread sees it too

    def _answer(self, waiting: Waiting) -> FromWorker:
        run = waiting.run

        def emit(frame: EngineFrame) -> None:
            if not waiting.cancelled.is_set():
                self._send(Piece(run.id, encode_value(frame.header)), frame.body)

        try:
            if waiting.cancelled.is_set():
                return End(run.id)
            fields: dict[str, JSON] = msgspec.json.decode(run.fields)
            with self._shelf.using(parse_wire_ref(run.ref)) as (held, _):
                held.model.run(EngineRequest(run.op, fields), emit, waiting.cancelled.is_set)
            return End(run.id)
        except EngineError as error:
            return Fault(run.id, error.code, cut(error.message), error.field)
        except NotResident as error:
            return Broke(run.id, cut(str(error)), gone=True)
        except BadFrame as error:
            return Fault(run.id, "invalid_request", cut(f"the answer is too large: {error}"))
        except (MemoryError, torch.OutOfMemoryError):
            return Broke(run.id, "the device has no memory left for this request")
        except Exception as error:
            log.error("engine failed: %s", _where(error))
            return Broke(run.id, cut(f"{type(error).__name__}: {error}"))


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


def _where(error: BaseException) -> str:
    """Type and place of an error without its text, which may quote a tenant's input."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"


def _trim() -> None:
    """Give freed heap back to the system, so that this process is as small as its ledger says."""
    _libc.malloc_trim(0)


def _warm_up(device: str) -> None:
    """Start the math libraries' threads and load their code before the first request needs them."""
    with torch.inference_mode():
        square = torch.ones(1, 2, 16, 16, device=device)
        torch.nn.functional.scaled_dot_product_attention(square, square, square)
        torch.nn.functional.linear(square, square[0, 0])
        torch.nn.functional.layer_norm(square, (16,))
        torch.nn.functional.gelu(square).sum().item()


def main(identity: Spawn, orders: socket.socket, data: socket.socket, private: Path) -> None:
    """Runs in a freshly forked child; returns when the agent closes a socket."""
    # Every fork starts with the nursery's random state; without this all workers would draw alike.
    random.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    # Read when CUDA starts, which has not happened: a worker sees its own device or none.
    os.environ["CUDA_VISIBLE_DEVICES"] = identity.uuid if identity.kind == "cuda" else ""
    log.info("worker of %s on %s", identity.tenant, identity.device)
    try:
        Worker(identity, orders, data, private).serve()
    except BadFrame as error:
        log.error("the agent broke the protocol: %s", error)
    except OSError as error:
        log.info("the agent is gone: %s", error)
    # Other threads may be deep in a forward pass or a read; nothing they do matters any more.
    os._exit(0)
