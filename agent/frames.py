"""What crosses between the agent, its nursery and its workers, and how.

Covers: the messages on the two sockets of a worker and on the nursery's socket, their encoding and
their limits. ``orders`` sockets (SOCK_SEQPACKET) carry one small JSON message each, with descriptors;
``data`` sockets (SOCK_STREAM) carry frames: u32 header length, u32 body length, JSON header, body.
Does not cover: who sends what when (``workers``, ``nursery``, ``worker``).

Imported by the agent process, so it imports neither torch nor numpy.
"""

from __future__ import annotations

import array
import hashlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from packer.gangs import run_ends
from packer.types import KIB, MIB, HostForm, HostSizes, ModelRef, ModelSpec, OriginFile, Task, parse_ref

# 256 files of 200-character paths and their hashes take 80 KiB; the kernel's default socket buffer
# (208 KiB) must hold a whole message.
ORDER_BYTES_MAX = 128 * KIB
# The kernel passes at most 253 descriptors in one message; the rest goes ahead in ``MoreFds``.
FDS_PER_MESSAGE_MAX = 200
# Every file of a model directory (256) beside a pack and a host segment; more is a mistake.
FDS_PER_ORDER_MAX = 300
# The gateway takes bodies of 1 MiB; JSON of the same text may be a few times longer.
FRAME_HEADER_BYTES_MAX = 8 * MIB
# 2,048 inputs of 8,192 dimensions in float32.
FRAME_BODY_BYTES_MAX = 64 * MIB
# A body up to this size is joined with its header, so that it is one write; a larger one is not copied.
JOINED_BYTES_MAX = 64 * KIB
# Bodies of requests that one worker holds, arriving or waiting; whoever comes beyond that waits before it.
BODIES_BYTES_MAX = FRAME_BODY_BYTES_MAX
# Longest error text that travels; the rest is cut.
MESSAGE_CHARS_MAX = 2000

# Bytes and milliseconds that a worker states of its own work: a PiB, or 35,000 years. A larger integer is
# a lie, and neither the estimates, which count in floats, nor the journal, which has 64 bits, could hold it.
STATED_MAX = 2**50
Stated = Annotated[int, msgspec.Meta(ge=0, le=STATED_MAX)]

_LENGTHS = struct.Struct("<II")
LENGTHS_BYTES = _LENGTHS.size


class BadFrame(ValueError):
    """The other side broke the protocol: a limit, the JSON or the descriptors."""


# --- orders: agent -> worker ----------------------------------------------------------------------


class WireSpec(msgspec.Struct, frozen=True):
    """What a worker must know of a version. ``chunks_sha256`` stands for the sizes of all chunks,
    whose list may be too long for one message."""

    ref: str
    engine: str
    task: Task
    image_bytes: int
    chunks_sha256: str
    # For each device of a gang the chunk behind its last one; one or none: all on the one device.
    run_ends: tuple[int, ...] = ()


def wire_spec(spec: ModelSpec, devices: int = 1) -> WireSpec:
    """For a worker that has so many devices."""
    return WireSpec(
        str(spec.ref),
        spec.engine,
        spec.task,
        spec.image_bytes,
        chunks_sha256(spec.chunk_bytes),
        run_ends(spec.chunk_bytes, spec.cuts, devices) if devices > 1 else (),
    )


def chunks_sha256(chunk_bytes: Sequence[int]) -> str:
    """One fingerprint of the sizes of all chunks, in order."""
    return hashlib.sha256(",".join(map(str, chunk_bytes)).encode()).hexdigest()


class MoreFds(msgspec.Struct, frozen=True, tag=True):
    """Descriptors of the message that follows."""


class BaseOffer(msgspec.Struct, frozen=True):
    """A pack of the same tenant in which chunks of a new one are looked for. Descriptors: its file, then
    ``bases`` files that extents of it lie in."""

    ref: str
    data_key: bytes
    bases: int


class PackBeside(msgspec.Struct, frozen=True):
    """Write a pack beside a load. ``id``: of a second answer, which comes after that of the load and says
    what became of the pack. See ``packer.packing.PackTarget`` for the rest."""

    id: int
    data_key: bytes
    limit_bytes: int
    floor_bytes: int
    resume: bool
    offers: tuple[BaseOffer, ...] = ()


class LoadOrigin(msgspec.Struct, frozen=True, tag=True):
    """Read the model from its origin. Descriptors: one per file, in order (files or feeds); with ``pack``
    then its file, the file of its progress, and those of its offers."""

    id: int
    spec: WireSpec
    files: tuple[OriginFile, ...]
    pack: PackBeside | None = None


class RestorePack(msgspec.Struct, frozen=True, tag=True):
    """Restore the chunks from ``first_chunk`` on from a pack (``data_key`` given) or a host segment.

    Descriptors: it; with ``direct`` the same file opened with ``O_DIRECT``; the same of each of the ``bases``
    that extents of it lie in; with ``host_form`` an empty memory file, to be filled with a host segment of
    that form. ``early``: requests may come, and be told of with ``Serving``, before all is there.
    ``past_cache``: read directly what is in the page cache too.
    """

    id: int
    spec: WireSpec
    data_key: bytes | None
    first_chunk: int = 0
    direct: bool = False
    host_form: HostForm | None = None
    bases: int = 0
    early: bool = False
    # Weight files of the origin whose digests the restored bytes must have: the pack is another node's work.
    proof: tuple[OriginFile, ...] = ()
    past_cache: bool = False


class FillSegment(msgspec.Struct, frozen=True, tag=True):
    """Fill a host segment of the form from a pack, on no device. Descriptors: as of ``RestorePack``."""

    id: int
    spec: WireSpec
    data_key: bytes
    host_form: HostForm
    direct: bool = False
    bases: int = 0


class WritePack(msgspec.Struct, frozen=True, tag=True):
    """Write a pack of a resident model. Descriptors: its file, then those of the offers."""

    id: int
    ref: str
    data_key: bytes
    limit_bytes: int
    floor_bytes: int = 0
    offers: tuple[BaseOffer, ...] = ()


class RepairPack(msgspec.Struct, frozen=True, tag=True):
    """Make bad chunks of a pack again from the origin. Descriptors: the pack to read and write, each of its
    ``bases`` likewise, then one per file. Answered by ``Done`` with the chunks that are still bad."""

    id: int
    ref: str
    data_key: bytes
    chunks: tuple[int, ...]
    files: tuple[OriginFile, ...]
    bases: int = 0


class EvictModel(msgspec.Struct, frozen=True, tag=True):
    """Give the bytes of a model's chunks from ``keep_chunks`` on back. Answered by ``Done`` when they are
    free."""

    id: int
    ref: str
    keep_chunks: int = 0


class CancelMove(msgspec.Struct, frozen=True, tag=True):
    """Stop bringing a model in: that order fails soon. Harmless when there is none; answered at once."""

    id: int
    ref: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered with ``Done`` by the thread that reads the sockets: the process runs at all."""

    id: int


class Bind(msgspec.Struct, frozen=True, tag=True):
    """A worker that was forked ahead of need gets its tenant: once, before any other order but ``Ping``."""

    id: int
    tenant: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """An order is carried out; the fields that its kind does not have are 0."""

    id: int
    restore_ms: Stated = 0
    host_filled: bool = False
    mapped: bool = False  # the whole image lies in the host segment of this order
    restored_bytes: Stated = 0
    cached: bool | None = None  # most of what was read was in the page cache; None: no file was read
    disk_bytes: Stated = 0
    host: HostSizes | None = None
    deduplicated_bytes: Stated = 0
    bases: tuple[bytes, ...] = ()  # salts of the files that extents of the pack lie in
    bad_chunks: tuple[int, ...] = ()


class Serving(msgspec.Struct, frozen=True, tag=True):
    """The model of this order takes requests already; ``Done`` or ``Failed`` follows. ``restored_bytes``:
    what it will have moved."""

    id: int
    restored_bytes: Stated


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An order failed and left things as they were. See ``packer.tiers.TierError`` for the flags.

    With ``chunks`` also the salt of their pack and where their extents (offset, length) lie in it; of an
    extent in another file (-1, 0).
    """

    id: int
    message: str
    corrupt: bool = False
    broken: bool = False
    chunks: tuple[int, ...] = ()
    cancelled: bool = False
    salt: bytes = b""
    extents: tuple[tuple[int, int], ...] = ()


# --- agent <-> nursery ----------------------------------------------------------------------------


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Fork a worker. Descriptors: its orders socket, its data socket. ``tenant`` empty: a standby, which
    ``Bind`` gives its tenant.

    ``heap_bytes``: private memory it may take beyond what it is born with; 0: no limit.
    """

    id: int
    tenant: str
    device: str
    kind: str
    uuid: str
    compute_threads: int
    heap_bytes: int = 0


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The nursery has imported everything and can fork in milliseconds."""


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """A worker lives. Descriptor: its pidfd, taken before anybody could have reaped it."""

    id: int
    pid: int


class SpawnFailed(msgspec.Struct, frozen=True, tag=True):
    id: int
    message: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A worker ended; ``status`` as ``waitstatus_to_exitcode`` gives it (negative: killed by a signal)."""

    pid: int
    status: int


Order = (
    MoreFds
    | LoadOrigin
    | RestorePack
    | FillSegment
    | WritePack
    | RepairPack
    | EvictModel
    | CancelMove
    | Ping
    | Bind
)
Reply = Done | Failed | Serving
NurseryOrder = MoreFds | Spawn
NurseryReply = Ready | Spawned | SpawnFailed | Exited
Message = Order | Reply | NurseryOrder | NurseryReply

orders_decoder: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
replies_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
nursery_orders_decoder: msgspec.json.Decoder[NurseryOrder] = msgspec.json.Decoder(NurseryOrder)
nursery_replies_decoder: msgspec.json.Decoder[NurseryReply] = msgspec.json.Decoder(NurseryReply)

# --- data frames ----------------------------------------------------------------------------------


class Run(msgspec.Struct, frozen=True, tag=True):
    """Answer a request with a resident model. The frame's body is the request's."""

    id: int
    ref: str
    op: str
    fields: msgspec.Raw
    # See ``packer.types.Batching``: with each request, so that a change needs no order of its own.
    batch_max: int = 1
    batch_delay_ms: int = 0


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this answer any more."""

    id: int


class Piece(msgspec.Struct, frozen=True, tag=True):
    """One frame of an answer; its bytes are the frame's body."""

    id: int
    header: msgspec.Raw


class End(msgspec.Struct, frozen=True, tag=True):
    """The answer is complete (or was cancelled). ``busy_us``, here and below: its share of the time that the
    worker computed."""

    id: int
    busy_us: Stated = 0


class Last(msgspec.Struct, frozen=True, tag=True):
    """The last ``Piece`` of an answer together with its ``End``: most answers are this one frame."""

    id: int
    header: msgspec.Raw
    busy_us: Stated = 0


class Fault(msgspec.Struct, frozen=True, tag=True):
    """The request is at fault: becomes an ``EngineError``."""

    id: int
    code: str
    message: str
    field: str | None = None
    busy_us: Stated = 0


class Broke(msgspec.Struct, frozen=True, tag=True):
    """The engine is at fault, or (``gone``) the model is not here: becomes a ``WorkerFailure``."""

    id: int
    message: str
    gone: bool = False
    busy_us: Stated = 0


class Measured(msgspec.Struct, frozen=True, tag=True):
    """What the request took beside the weights; comes after its end, when it was measured."""

    id: int
    ref: str
    workspace_bytes: Stated


ToWorker = Run | Cancel
FromWorker = Piece | Last | End | Fault | Broke | Measured

to_worker_decoder: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
from_worker_decoder: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)

_encoder = msgspec.json.Encoder()
T = TypeVar("T")


def encode_frame(header: ToWorker | FromWorker, body: bytes | memoryview = b"") -> tuple[bytes, bytes]:
    """The bytes before the body, and the body. Raises ``BadFrame`` above a limit."""
    text = _encoder.encode(header)
    check_lengths(len(text), len(body))
    return _LENGTHS.pack(len(text), len(body)) + text, bytes(body)


def decode_lengths(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Header and body length from the first 8 bytes. Raises ``BadFrame`` above a limit."""
    header, body = _LENGTHS.unpack(prefix)
    check_lengths(header, body)
    return header, body


def check_lengths(header: int, body: int) -> None:
    if header > FRAME_HEADER_BYTES_MAX or body > FRAME_BODY_BYTES_MAX:
        raise BadFrame(
            f"a frame of {header} + {body} bytes; the limits are "
            f"{FRAME_HEADER_BYTES_MAX} + {FRAME_BODY_BYTES_MAX}"
        )


def decode(decoder: msgspec.json.Decoder[T], text: bytes | bytearray | memoryview) -> T:
    """Raises ``BadFrame``."""
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadFrame(str(error)[:MESSAGE_CHARS_MAX]) from None


def encode_value(value: object) -> msgspec.Raw:
    """A JSON value inside a header, encoded apart so that its reader can decode it with its own type."""
    return msgspec.Raw(_encoder.encode(value))


# --- messages with descriptors --------------------------------------------------------------------


def encode_message(message: Message, fds: Sequence[int] = ()) -> list[tuple[bytes, tuple[int, ...]]]:
    """The datagrams to send, in order, each with its descriptors. Raises ``BadFrame`` above a limit."""
    text = _encoder.encode(message)
    if len(text) > ORDER_BYTES_MAX or len(fds) > FDS_PER_ORDER_MAX:
        raise BadFrame(f"a message of {len(text)} bytes with {len(fds)} descriptors is above the limit")
    more = _encoder.encode(MoreFds())
    pieces = [tuple(fds[at : at + FDS_PER_MESSAGE_MAX]) for at in range(0, len(fds), FDS_PER_MESSAGE_MAX)]
    last = pieces.pop() if pieces else ()
    return [*((more, piece) for piece in pieces), (text, last)]


def send_datagram(sock: socket.socket, text: bytes, fds: Sequence[int]) -> None:
    """Send one datagram of ``encode_message``. Raises ``BlockingIOError`` on a full non-blocking socket."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([text], ancillary)


def send_message(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send on a blocking socket. The descriptors stay open here."""
    for text, part in encode_message(message, fds):
        send_datagram(sock, text, part)


class Receiver:
    """Receives messages with their descriptors from one SOCK_SEQPACKET socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._fds: list[int] = []

    def receive(self, decoder: msgspec.json.Decoder[T]) -> tuple[T, list[int]] | None:
        """The next message and its descriptors, which are the caller's to close; None at the end.

        Raises ``BadFrame``, and ``BlockingIOError`` on a non-blocking socket with nothing to read.
        """
        while True:
            space = socket.CMSG_LEN(FDS_PER_MESSAGE_MAX * array.array("i").itemsize)
            text, ancillary, flags, _ = self._sock.recvmsg(
                ORDER_BYTES_MAX + 1, space, socket.MSG_CMSG_CLOEXEC
            )
            self._keep(ancillary)
            if not text:
                self._drop()
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(self._fds) > FDS_PER_ORDER_MAX:
                self._drop()
                raise BadFrame("a message or its descriptors are above the limit")
            try:
                message = decode(decoder, text)
            except BadFrame:
                self._drop()
                raise
            if not isinstance(message, MoreFds):
                fds, self._fds = self._fds, []
                return message, fds

    def _keep(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)

    def _drop(self) -> None:
        close_fds(self._fds)
        self._fds = []


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def parse_wire_ref(text: str) -> ModelRef:
    """Raises ``BadFrame``: only the agent sends these, so a bad one is a broken protocol."""
    try:
        return parse_ref(text)
    except ValueError as error:
        raise BadFrame(str(error)) from None


def cut(text: str) -> str:
    """An error text short enough to travel."""
    return text[:MESSAGE_CHARS_MAX]
