"""The agent's side of a worker: asyncio, no torch.

Covers: sending orders and requests, taking replies and frames with limits, and noticing its death. Does not
cover: where workers come from (``spawning``), when to do any of it (``orders``), or what happens on the other
side (``worker``).

A worker is not trusted: what it sends is checked against limits, and one that breaks the protocol is
killed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from agent.answers import Answer, Answers
from agent.asking import Asking
from agent.asking import WorkerDead as WorkerDead
from agent.asking import WorkerFailure as WorkerFailure
from agent.devices import DeviceConfig
from agent.facade import EngineError, EngineFrame, EngineRequest
from agent.frame_stream import FrameStream
from agent.frames import (
    STATED_MAX,
    BadFrame,
    BaseOffer,
    Bind,
    Cancel,
    CancelMove,
    Done,
    EvictModel,
    Failed,
    FillSegment,
    FromWorker,
    LoadOrigin,
    Measured,
    Message,
    PackBeside,
    Ping,
    Receiver,
    RepairPack,
    RestorePack,
    Run,
    Serving,
    ToWorker,
    WritePack,
    close_fds,
    encode_value,
    replies_decoder,
    wire_spec,
)
from agent.sending import send
from packer.pack_file import FileFds
from packer.types import ALONE, BadValue, Batching, HostForm, HostSizes, ModelRef, ModelSpec, parse_ref

log = logging.getLogger("bunk.workers")

# A worker leaves at the end of its sockets, at once; one that does not is killed.
CLOSE_TIMEOUT_S = 5.0
# A worker that runs answers a ping in microseconds, one on a machine that swaps within seconds. Several
# in a row must be missed: after a pause of the whole machine the first is, through no fault of its own.
PULSE_S = 10.0
PULSES_MISSED_MAX = 3


@dataclass(frozen=True, slots=True)
class LoadDone:
    """The model can answer. ``restored_bytes`` were moved; ``host_filled``: the segment is complete;
    ``mapped``: the image lies in the segment."""

    restore_ms: int
    restored_bytes: int
    host_filled: bool = False
    pack_id: int = 0
    cached: bool | None = None  # see ``frames.Done``
    mapped: bool = False


@dataclass(frozen=True, slots=True)
class PackCopy:
    """A pack to restore from: the file, its version's data key, and the file once more for direct reads
    where its file system has them; the same of each file that extents of it lie in. ``past_cache``: read
    directly what is in the page cache too."""

    fd: int
    data_key: bytes
    direct_fd: int | None = None
    bases: tuple[FileFds, ...] = ()
    past_cache: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A host segment: the memory file, and the form in which it holds a model."""

    fd: int
    form: HostForm


@dataclass(frozen=True, slots=True)
class PackDone:
    """Bytes of the finished pack, and of host segments of it. ``deduplicated_bytes`` of the image are not
    in its file, because an equal chunk is stored; ``bases``: salts of other files that hold some."""

    disk_bytes: int
    host: HostSizes
    deduplicated_bytes: int = 0
    bases: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class OfferedPack:
    """A pack of the same tenant in which chunks of a new one may be found, and the files of its bases."""

    ref: ModelRef
    data_key: bytes
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackFiles:
    """Where a pack is written; see ``packer.ingest.PackTarget``."""

    fd: int
    part_fd: int  # of no use for the pack of a resident model
    data_key: bytes
    limit_bytes: int
    floor_bytes: int = 0
    resume: bool = False
    offers: tuple[OfferedPack, ...] = ()

    @property
    def offer_fds(self) -> list[int]:
        return [fd for offer in self.offers for fd in offer.fds]


class WorkerHandle:
    """One worker process: one tenant, one device (or those of one place), for life."""

    def __init__(self, tenant: str, device: DeviceConfig, orders: socket.socket, data: socket.socket) -> None:
        self.tenant = tenant
        self.device = device
        self.pid = 0
        self.died = asyncio.Event()
        self.on_death: Callable[[], None] = lambda: None
        # Told of each measured request: its model, and the bytes that it took beside the weights.
        self.on_workspace: Callable[[ModelRef, int], None] = lambda ref, workspace_bytes: None
        # Told of device time that requests took whose callers had left, in milliseconds.
        self.on_late: Callable[[int], None] = lambda device_ms: None
        self._orders = orders
        self._orders_lock = asyncio.Lock()
        self._receiver = Receiver(orders)
        self._data = data
        self._pidfd = -1
        self._ids = itertools.count(1)
        self._serving: dict[int, Callable[[int], None]] = {}
        self._replies: dict[int, asyncio.Future[Done]] = {}
        self._answers = Answers(lambda device_ms: self.on_late(device_ms), self._go_on)
        self._stream: FrameStream | None = None
        self._pulse: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self, pid: int, pidfd: int) -> None:
        """Take charge of a process that was just forked."""
        loop = asyncio.get_running_loop()
        self.pid, self._pidfd = pid, pidfd
        loop.add_reader(pidfd, self._on_death)
        loop.add_reader(self._orders, self._on_reply)
        _, self._stream = await loop.create_unix_connection(
            lambda: FrameStream(self._heard, self._ended), sock=self._data
        )
        self._pulse = asyncio.create_task(self._feel_pulse())

    # --- orders -----------------------------------------------------------------------------------

    async def load_origin(
        self, spec: ModelSpec, fds: Mapping[str, int], pack: PackFiles | None = None
    ) -> LoadDone:
        """Read the model from descriptors of its files (files, or feeds as ``packer/sources.py`` says).

        With ``pack`` the worker goes on packing when this returns: ``packed`` must be awaited then.
        Raises ``WorkerFailure`` and ``WorkerDead``. The descriptors stay the caller's, here and below.
        """
        number = next(self._ids)
        descriptors = [fds[file.path] for file in spec.files]
        beside = None
        if pack is not None:
            beside = PackBeside(
                next(self._ids),
                pack.data_key,
                pack.limit_bytes,
                pack.floor_bytes,
                pack.resume,
                _offers(pack),
            )
            descriptors += [pack.fd, pack.part_fd, *pack.offer_fds]
            self._replies[beside.id] = asyncio.get_running_loop().create_future()
        try:
            order = LoadOrigin(number, wire_spec(spec, self.device.count), spec.files, beside)
            done = await self._order(number, order, descriptors)
        except BaseException:
            if beside is not None:
                self._forget_reply(beside.id)
            raise
        moved_bytes = min(done.restored_bytes, spec.image_bytes)
        return LoadDone(done.restore_ms, moved_bytes, pack_id=beside.id if beside is not None else 0)

    async def packed(self, load: LoadDone) -> PackDone:
        """The end of the pack beside a load. Raises ``WorkerFailure`` and ``WorkerDead``."""
        try:
            return _pack_done(await self._replies[load.pack_id])
        finally:
            self._forget_reply(load.pack_id)

    async def restore(
        self,
        spec: ModelSpec,
        copy: PackCopy | Segment,
        first_chunk: int = 0,
        host: Segment | None = None,
        serving: Callable[[int], None] | None = None,
        prove: bool = False,
    ) -> LoadDone:
        """Restore the chunks from ``first_chunk`` on from a pack or a host segment.

        ``host``: an empty host segment to fill on the way. ``serving`` is called, at most once, when requests
        may come although not all is there, with the bytes that will have been moved. ``prove``: the weights
        must be those that were registered, byte by byte. Raises
        ``WorkerFailure``, which leaves the chunks before ``first_chunk`` where they are, and ``WorkerDead``.
        """
        number = next(self._ids)
        descriptors, key, direct = [copy.fd], None, False
        bases, past_cache = 0, False
        if isinstance(copy, PackCopy):
            descriptors, direct = _pack_fds(copy)
            key, bases, past_cache = copy.data_key, len(copy.bases), copy.past_cache
        form = host.form if host is not None else None
        descriptors += [host.fd] if host is not None else []
        early = serving is not None
        proof = tuple(file for file in spec.files if file.path.endswith(".safetensors")) if prove else ()
        order = RestorePack(
            number,
            wire_spec(spec, self.device.count),
            key,
            first_chunk,
            direct,
            form,
            bases,
            early,
            proof,
            past_cache,
        )
        if serving is not None:
            self._serving[number] = lambda nbytes: serving(min(nbytes, spec.image_bytes))
        try:
            done = await self._order(number, order, descriptors)
        finally:
            self._serving.pop(number, None)
        moved_bytes = min(done.restored_bytes, spec.image_bytes)
        return LoadDone(
            done.restore_ms, moved_bytes, done.host_filled, cached=done.cached, mapped=done.mapped
        )

    async def fill(self, spec: ModelSpec, copy: PackCopy, host: Segment) -> None:
        """Fill a host segment from a pack; nothing comes onto the device. Raises ``WorkerFailure`` and
        ``WorkerDead``."""
        number = next(self._ids)
        descriptors, direct = _pack_fds(copy)
        order = FillSegment(number, wire_spec(spec), copy.data_key, host.form, direct, len(copy.bases))
        await self._order(number, order, [*descriptors, host.fd])

    async def pack(self, ref: ModelRef, files: PackFiles) -> PackDone:
        """Write a pack of a resident model into an empty file. Raises ``WorkerFailure``, ``WorkerDead``."""
        number = next(self._ids)
        order = WritePack(
            number, str(ref), files.data_key, files.limit_bytes, files.floor_bytes, _offers(files)
        )
        done = await self._order(number, order, [files.fd, *files.offer_fds])
        return _pack_done(done)

    async def repair(
        self,
        spec: ModelSpec,
        pack_fds: Sequence[int],
        data_key: bytes,
        chunks: Sequence[int],
        fds: Mapping[str, int],
    ) -> tuple[int, ...]:
        """Make chunks of a pack again from its origin; returns those that are still bad. ``pack_fds``: the
        pack and its bases, open to read and write. Raises ``WorkerFailure`` and ``WorkerDead``.
        """
        number = next(self._ids)
        files = tuple(file for file in spec.files if file.path.endswith(".safetensors"))
        order = RepairPack(number, str(spec.ref), data_key, tuple(chunks), files, len(pack_fds) - 1)
        done = await self._order(number, order, [*pack_fds, *(fds[file.path] for file in files)])
        return done.bad_chunks

    async def evict(self, ref: ModelRef, keep_chunks: int = 0) -> None:
        """Free the device bytes of the chunks from ``keep_chunks`` on; returns when they are free. Harmless
        when they are not there."""
        number = next(self._ids)
        await self._order(number, EvictModel(number, str(ref), keep_chunks), [])

    async def cancel(self, ref: ModelRef) -> None:
        """Have a load or restore of this model fail soon; harmless when there is none."""
        number = next(self._ids)
        await self._order(number, CancelMove(number, str(ref)), [])

    async def _order(self, number: int, order: Message, fds: Sequence[int]) -> Done:
        if self.died.is_set():
            raise WorkerDead(f"worker {self.pid} is gone")
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Done] = loop.create_future()
        self._replies[number] = reply
        started = loop.time()
        try:
            try:
                await send(self._orders, order, fds, self._orders_lock)
            except BadFrame as error:
                raise WorkerFailure(str(error)) from None
            except OSError as error:
                await self.died.wait()
                raise WorkerDead(f"worker {self.pid}: {error}") from None
            done = await reply
            # What a restore took teaches the node what to expect of all tenants' restores.
            most_ms = round((loop.time() - started) * 1000) + 1
            return msgspec.structs.replace(done, restore_ms=min(done.restore_ms, most_ms))
        finally:
            self._forget_reply(number)

    def _forget_reply(self, number: int) -> None:
        reply = self._replies.pop(number)
        if reply.done() and not reply.cancelled():
            reply.exception()  # its death was told to us by other means

    async def bind(self, tenant: str) -> None:
        """Make a standby the worker of a tenant, for life. Raises ``WorkerDead``."""
        assert not self.tenant
        number = next(self._ids)
        await self._order(number, Bind(number, tenant), [])
        self.tenant = tenant

    async def ping(self) -> None:
        """Returns when the process has answered. Raises ``WorkerDead``."""
        number = next(self._ids)
        await self._order(number, Ping(number), [])

    async def _feel_pulse(self) -> None:
        """Kill a process that does not run any more or is stuck, so that nobody waits for it for ever."""
        missed = 0
        while missed < PULSES_MISSED_MAX:
            ping = asyncio.create_task(self.ping())
            try:
                await asyncio.sleep(PULSE_S)
            finally:
                missed = 0 if ping.done() else missed + 1
                ping.cancel()
                await asyncio.gather(ping, return_exceptions=True)
            if stuck_s := self._answers.stuck_s():
                log.error("worker %d of %s: %d s in one request; killing it", self.pid, self.tenant, stuck_s)
                self.kill()
                return
        log.error("worker %d of %s hangs: %d pings unanswered; killing it", self.pid, self.tenant, missed)
        self.kill()

    def _on_reply(self) -> None:
        try:
            while (received := self._receiver.receive(replies_decoder)) is not None:
                reply, fds = received
                close_fds(fds)  # none is expected
                if isinstance(reply, Serving):
                    tell = self._serving.pop(reply.id, None)
                    if tell is not None:
                        tell(reply.restored_bytes)
                    continue
                future = self._replies.get(reply.id)
                if future is None or future.done():
                    continue
                if isinstance(reply, Failed):
                    failure = WorkerFailure(reply.message, reply.corrupt, reply.broken)
                    failure.chunks, failure.cancelled = reply.chunks, reply.cancelled
                    failure.salt, failure.extents = reply.salt, reply.extents
                    future.set_exception(failure)
                else:
                    future.set_result(reply)
        except BlockingIOError:
            return
        except OSError:
            pass  # its death follows
        except BadFrame as error:
            log.error("worker %d of %s: %s", self.pid, self.tenant, error)
        # The socket ended or carries nonsense: either way the process is of no use.
        asyncio.get_running_loop().remove_reader(self._orders)
        if not self._closing:
            self.kill()

    # --- requests ---------------------------------------------------------------------------------

    def run(
        self,
        ref: ModelRef,
        request: EngineRequest,
        took: Callable[[int], None] = lambda device_ms: None,
        batching: Batching = ALONE,
    ) -> AsyncIterator[EngineFrame]:
        """The answer, frame by frame; closing the iterator cancels inside the worker. ``took`` is told how
        many milliseconds the worker was busy with it, unless it still is: then ``on_late`` will be.

        Raises ``EngineError`` (the request is at fault), ``WorkerFailure`` (the engine is) and
        ``WorkerDead``.
        """
        return Asking(self, ref, request, took, batching)

    async def ask(self, ref: ModelRef, request: EngineRequest, batching: Batching) -> Answer:
        """Send a request; ``hang_up`` must follow."""
        answer = self._answers.open(next(self._ids))
        try:
            await self._answers.may_send(answer, len(request.body))
            try:
                await self._write(_run_frame(answer.number, ref, request, batching), request.body)
            except BadFrame as error:
                self._answers.not_sent(answer)
                raise EngineError("invalid_request", str(error)) from None
        except BaseException:
            self.hang_up(answer)
            raise
        return answer

    async def arrived(self, answer: Answer) -> deque[tuple[FromWorker, bytes]]:
        """What the worker has said since this was asked last, and at least something. Raises
        ``WorkerDead``."""
        while True:
            # Before looking: what arrives while the caller is busy with a frame is not to be slept over.
            answer.arrived.clear()
            if taken := self._answers.taken(answer):
                return taken
            if self.died.is_set():
                raise WorkerDead(f"worker {self.pid} is gone")
            await answer.arrived.wait()

    def hang_up(self, answer: Answer) -> None:
        """Nobody waits for this answer any more, or it is over."""
        if self._answers.close(answer) and self._stream is not None:
            with suppress(ConnectionResetError):  # it cares for nothing any more
                self._stream.write(Cancel(answer.number))

    async def _write(self, frame: ToWorker, body: bytes = b"") -> None:
        if self._stream is None or self.died.is_set():
            raise WorkerDead(f"worker {self.pid} is gone")
        try:
            self._stream.write(frame, body)
            if self._stream.stalled:
                await self._stream.drained()
        except OSError as error:
            raise WorkerDead(f"worker {self.pid}: {error}") from None

    def _heard(self, frame: FromWorker, body: bytes) -> None:
        if isinstance(frame, Measured):
            self._measured(frame)
        elif not self._answers.heard(frame, body) and self._stream is not None:
            self._stream.hold()

    def _go_on(self) -> None:
        if self._stream is not None:
            self._stream.go_on()

    def _ended(self, mistake: BadFrame | None) -> None:
        """Its data socket is over; unless that was wished for, its death follows."""
        if mistake is not None:
            log.error("worker %d of %s: %s", self.pid, self.tenant, mistake)
        if not self._closing:
            self.kill()

    def _measured(self, frame: Measured) -> None:
        try:
            ref = parse_ref(frame.ref)
        except BadValue as error:
            raise BadFrame(f"a measured {error}") from None
        if ref.tenant != self.tenant:
            raise BadFrame(f"a worker of {self.tenant} measured a model of {ref.tenant}")
        self.on_workspace(ref, frame.workspace_bytes)

    # --- the end ----------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process now; ``died`` is set when it is gone. Harmless when it is."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def close(self) -> None:
        """Let the process end; what it held is free afterwards."""
        self._closing = True
        if not self.died.is_set():
            with suppress(OSError):
                self._orders.shutdown(socket.SHUT_RDWR)
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self.died.wait()
            self.kill()
            await self.died.wait()

    def _on_death(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        loop.remove_reader(self._orders)
        os.close(self._pidfd)
        self._pidfd = -1
        self._orders.close()
        if self._pulse is not None:
            self._pulse.cancel()
        if self._stream is not None:
            self._stream.close()
        self.died.set()
        self.on_death()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(WorkerDead(f"worker {self.pid} is gone"))
        self._answers.end()


def _pack_fds(copy: PackCopy) -> tuple[list[int], bool]:
    """The descriptors of a pack, and whether each file is there twice."""
    files = (FileFds(copy.fd, copy.direct_fd), *copy.bases)
    # They lie on one file system, which has direct reads or not.
    direct = all(file.direct_fd is not None for file in files)
    return [fd for file in files for fd in (file.fd, file.direct_fd)[: 1 + direct] if fd is not None], direct


def _run_frame(number: int, ref: ModelRef, request: EngineRequest, batching: Batching) -> Run:
    fields = encode_value(request.fields)
    return Run(number, str(ref), request.op, fields, batching.inputs_max, batching.delay_ms)


def _pack_done(done: Done) -> PackDone:
    """Raises ``WorkerFailure``."""
    host = done.host or HostSizes(0, 0, 0)
    if not all(0 <= host.of(form) <= STATED_MAX for form in HostForm):
        raise WorkerFailure("a host segment of an impossible size")
    return PackDone(done.disk_bytes, host, done.deduplicated_bytes, done.bases)


def _offers(files: PackFiles) -> tuple[BaseOffer, ...]:
    return tuple(BaseOffer(str(offer.ref), offer.data_key, len(offer.fds) - 1) for offer in files.offers)
