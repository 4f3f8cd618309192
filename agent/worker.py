"""The worker: one tenant's models on one device, or its gangs on several, for the life of one process.

Covers: reading orders and requests off its two sockets, and staying alive through any bad request. Does not
cover: forking and confinement (``nursery``), what is computed when (``compute``), what an order does
(``moves``), the models that are here (``shelf``), the engine (``engines/transformers``), or any decision: the
agent says what to do and trusts no answer.

Threads: the main one reads both sockets and leaves the process the moment either ends; orders run in a
few threads of their own; one thread computes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import selectors
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from agent.compute import Compute
from agent.frames import (
    BODIES_BYTES_MAX,
    JOINED_BYTES_MAX,
    LENGTHS_BYTES,
    BadFrame,
    Bind,
    Cancel,
    CancelMove,
    Done,
    EvictModel,
    FillSegment,
    FromWorker,
    LoadOrigin,
    MoreFds,
    Ping,
    Receiver,
    RepairPack,
    Reply,
    RestorePack,
    Spawn,
    ToWorker,
    WritePack,
    close_fds,
    decode,
    decode_lengths,
    encode_frame,
    orders_decoder,
    parse_wire_ref,
    send_message,
    to_worker_decoder,
)
from agent.lanes import Request
from agent.moves import Move, Moves, where
from agent.peak import PeakMeter
from agent.shelf import Shelf
from packer.gangs import devices_in
from packer.tiers import RESTORE_BYTES_MAX
from packer.types import MIB

log = logging.getLogger("bunk.worker")

# Orders of each kind at once, so that none waits behind another kind: an origin may feed slowly, an
# eviction may wait for an answer in progress. Restores have the largest buffers, so few run at a time.
ORIGIN_LOADS_MAX = 8
RESTORES_MAX = 2
PACKS_MAX = 1
REPAIRS_MAX = 1
EVICTIONS_MAX = 8
# Buffers of one load (four lanes of 1 MiB and two encoders of 19) and of one pack or repair, and the indexes
# of packs in which chunks are looked for.
LOAD_BYTES_MAX = (48 + 48) * MIB
PACK_BYTES_MAX = (44 + 48) * MIB
# What all orders together may take beside images and skeletons; far below what a worker may have.
SCRATCH_BYTES_MAX = 1280 * MIB
assert (
    RESTORES_MAX * RESTORE_BYTES_MAX
    + ORIGIN_LOADS_MAX * LOAD_BYTES_MAX
    + (PACKS_MAX + REPAIRS_MAX) * PACK_BYTES_MAX
    <= SCRATCH_BYTES_MAX
)
# The core bounds what waits on a node (4,096); more than that here is a broken agent.
RUNS_WAITING_MAX = 8192
RECEIVE_BYTES = 256 * 1024

_libc = ctypes.CDLL(None)


class Worker:
    """Serves one tenant on one device until a socket ends."""

    def __init__(self, identity: Spawn, orders: socket.socket, data: socket.socket, private: Path) -> None:
        self._identity = identity
        self._tenant = identity.tenant
        self._orders = orders
        self._data = data
        self._shelf = Shelf()
        self._moves = Moves(identity, self._shelf, private)
        self._order_threads: dict[type, ThreadPoolExecutor] = {
            kind: ThreadPoolExecutor(threads, thread_name_prefix="bunk-order")
            for kind, threads in (
                (LoadOrigin, ORIGIN_LOADS_MAX),
                (RestorePack, RESTORES_MAX),
                (WritePack, PACKS_MAX),
                (RepairPack, REPAIRS_MAX),
                (EvictModel, EVICTIONS_MAX),
            )
        }
        self._order_threads[FillSegment] = self._order_threads[RestorePack]  # with the same buffers
        self._reply_lock = threading.Lock()
        self._data_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._waiting: dict[int, Request] = {}
        self._received = bytearray()
        self._orders_begun = self._orders_ended = 0
        devices = len(devices_in(identity.device))
        peak = PeakMeter(identity.kind == "cuda", self._moves_seen, _trim, devices)
        self._compute = Compute(self._shelf, peak, self._send, self._forget, _trim)

    # --- sockets ----------------------------------------------------------------------------------

    def serve(self) -> None:
        threading.Thread(target=self._serve_compute, name="bunk-compute", daemon=True).start()
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
        if isinstance(order, Ping | CancelMove | Bind):
            close_fds(fds)
            if isinstance(order, Bind):
                self._bind(order.tenant)
            if isinstance(order, CancelMove):
                self._moves.cancel(parse_wire_ref(order.ref))
            self._reply(Done(order.id))
            return True
        assert not isinstance(order, MoreFds)
        if not self._tenant:
            raise BadFrame("an order for a worker that has no tenant")
        self._moves.expect(order)
        self._order_threads[type(order)].submit(self._carry_out, order, fds)
        return True

    def _bind(self, tenant: str) -> None:
        """For life: what one tenant left in a process is never near another's."""
        if self._tenant or not tenant:
            raise BadFrame(f"a worker of {self._tenant} can not become one of {tenant}")
        self._tenant = tenant
        log.info("worker of %s on %s, ready ahead of need", tenant, self._identity.device)

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
            carried = bytes(memoryview(self._received)[LENGTHS_BYTES + header : end])
            del self._received[:end]
            self._take_frame(frame, carried)
        return True

    def _take_frame(self, frame: ToWorker, body: bytes) -> None:
        if isinstance(frame, Cancel):
            waiting = self._waiting.get(frame.id)
            if waiting is not None:
                waiting.cancelled.set()
            return
        if frame.id in self._waiting or len(self._waiting) >= RUNS_WAITING_MAX:
            raise BadFrame(
                f"run {frame.id}: {len(self._waiting)} are waiting, the limit is {RUNS_WAITING_MAX}"
            )
        if (
            body
            and len(body) + sum(len(other.body) for other in [*self._waiting.values()]) > BODIES_BYTES_MAX
        ):
            raise BadFrame(f"run {frame.id}: bodies above the limit of {BODIES_BYTES_MAX} bytes are waiting")
        request = Request(frame, body, time.monotonic() * 1000)
        self._waiting[frame.id] = request
        self._compute.put(request)

    def _send(self, frame: FromWorker, body: bytes = b"") -> None:
        header, body = encode_frame(frame, body)
        joined = len(body) <= JOINED_BYTES_MAX  # as one write it wakes the agent once
        with self._data_lock:
            self._data.sendall(header + body if joined else header)
            if not joined:
                self._data.sendall(body)

    # --- orders -----------------------------------------------------------------------------------

    def _carry_out(self, order: Move, fds: list[int]) -> None:
        with self._count_lock:
            self._orders_begun += 1
        try:
            self._moves.carry_out(order, fds, self._reply)
            _trim()  # the scratch of restores and packs
        finally:
            with self._count_lock:
                self._orders_ended += 1

    def _moves_seen(self) -> tuple[int, int]:
        with self._count_lock:
            return self._orders_begun, self._orders_ended

    def _reply(self, reply: Reply) -> None:
        with self._reply_lock:
            send_message(self._orders, reply)

    # --- requests ---------------------------------------------------------------------------------

    def _serve_compute(self) -> None:
        """The one thread that runs models; its results depend on nothing that another thread does."""
        status = 1
        try:
            torch.set_num_threads(self._identity.compute_threads)
            torch.seed()
            _warm_up("cuda" if self._identity.kind == "cuda" else "cpu")
            self._compute.serve()
            status = 0
        except Exception as error:
            log.error("computing ended: %s", where(error))
        finally:
            os._exit(status)  # else the process would answer every ping and no request

    def _forget(self, number: int) -> None:
        del self._waiting[number]


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
    log.info("worker of %s on %s", identity.tenant or "nobody yet", identity.device)
    try:
        Worker(identity, orders, data, private).serve()
    except BadFrame as error:
        log.error("the agent broke the protocol: %s", error)
    except OSError as error:
        log.info("the agent is gone: %s", error)
    # Other threads may be deep in a forward pass or a read; nothing they do matters any more.
    os._exit(0)
