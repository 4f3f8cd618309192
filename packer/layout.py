"""Where a model's bytes are: in its safetensors files, and in its image on a device.

Covers: the strict parser of safetensors headers with every limit, the deterministic layout of the
tensors in the image (execution order, alignment, chunks), the check of a layout that comes from
outside, and the first estimate of the workspace. Does not cover: which files a model directory may
hold (``directory``) or how chunks are stored (``pack``).

Pure: standard library only, no I/O. Nothing here allocates in proportion to a number that a file
merely claims.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packer.types import GIB, KIB, MIB, Task

# A header of 50,000 tensors with long names stays below 10 MiB; safetensors itself allows 100 MB,
# which costs seconds and hundreds of MiB to parse.
HEADER_BYTES_MAX = 16 * MIB
# The largest open models have some 20,000 tensors when experts are stored apart.
TENSORS_MAX = 50_000
# Convolutions have 5; 8 leaves room and keeps the product of the sizes cheap to check.
DIMS_MAX = 8
# Longest tensor name in bytes; deep multi-modal models reach about 120.
TENSOR_NAME_CHARS_MAX = 256
# One model on one device; also bounds the chunk table of a pack.
IMAGE_BYTES_MAX = 512 * GIB
# Brackets and commas beyond what the tensors need, for ``__metadata__``.
METADATA_MARKS_MAX = 10_000

# Every tensor starts on a cache line, which is also enough for every vector load.
TENSOR_ALIGN_BYTES = 64
# A chunk starts on a page, so that it can be read by direct I/O, mapped and released on its own.
PAGE_BYTES = 4 * KIB
# One chunk of bf16 gives 1 MiB of packed exponent nibbles: frames below 256 KiB cost thread scaling.
CHUNK_BYTES = 4 * MIB
# A tensor from this size on has its chunks for itself, so that equal tensors are equal chunks and can be
# stored once. Below it a chunk of its own would cost more than it could save.
OWN_CHUNK_BYTES = MIB

# Bits of each dtype that a device tensor can have. The 4 and 6 bit codes of newer safetensors
# are left out: no engine here can use them.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_\-])?")
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e\.")
# Requests before a model's footprint is measured are taken to be at most this long, in tokens.
WORKSPACE_TOKENS_MAX = 2048
WORKSPACE_ENCODER_TOKENS_MAX = 512
# Small buffers, the tokenizer's output, the answer.
WORKSPACE_FIXED_BYTES = 512 * KIB


class BadHeader(ValueError):
    """A safetensors header breaks the format or a limit. Names the file, the limit and the way out."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(f"{file}: {message}")
        self.file = file
        self.message = message


class BadLayout(ValueError):
    """A layout that came from outside does not describe one image."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of an origin file. ``file_offset`` is absolute in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    file_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and where it starts in the image."""

    info: TensorInfo
    image_offset: int


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """A run of the image with one dtype; starts and ends on a page."""

    image_offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The raw weights as they lie on a device. The chunks tile the image; padding is zero."""

    image_bytes: int
    tensors: tuple[PlacedTensor, ...]
    chunks: tuple[ChunkSpan, ...]

    @property
    def chunk_bytes(self) -> tuple[int, ...]:
        return tuple(chunk.nbytes for chunk in self.chunks)


# --- safetensors headers --------------------------------------------------------------------------


def header_bytes(prefix8: bytes, file_size: int, file: str = "model.safetensors") -> int:
    """Size of the JSON header that follows the first 8 bytes of a safetensors file.

    Raises ``BadHeader`` before anything of that size is read or allocated.
    """
    if len(prefix8) != 8:
        raise BadHeader(file, f"has {len(prefix8)} bytes of the 8 that every safetensors file starts with")
    size = int.from_bytes(prefix8, "little")
    if size > HEADER_BYTES_MAX:
        raise BadHeader(
            file,
            f"declares a header of {size} bytes, the limit is {HEADER_BYTES_MAX}; is it a safetensors file?",
        )
    if size < 2 or 8 + size > file_size:
        raise BadHeader(file, f"declares a header of {size} bytes in a file of {file_size} bytes; cut short?")
    return size


def parse_header(header: bytes, file: str, file_size: int) -> tuple[TensorInfo, ...]:
    """Parse the JSON header of a safetensors file, in the order of the bytes in the file.

    Stricter than safetensors itself: refuses duplicate keys, names outside the grammar, too many
    tensors or dimensions, sizes that do not multiply to the bytes, overlaps, holes and trailing
    bytes. Raises ``BadHeader``.
    """
    if len(header) > HEADER_BYTES_MAX or 8 + len(header) > file_size:
        raise BadHeader(file, f"header of {len(header)} bytes does not fit the file or the limit")
    _check_marks(header, file)
    try:
        loaded = json.loads(
            header.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise BadHeader(file, f"header is not strict JSON: {str(error)[:200]}") from None
    if not isinstance(loaded, dict):
        raise BadHeader(file, "header is not a JSON object")
    _check_metadata(loaded.pop("__metadata__", {}), file)
    if len(loaded) > TENSORS_MAX:
        raise BadHeader(file, f"has {len(loaded)} tensors, the limit is {TENSORS_MAX}")
    base = 8 + len(header)
    tensors = [_tensor(name, entry, file, base) for name, entry in loaded.items()]
    tensors.sort(key=lambda tensor: (tensor.file_offset, tensor.nbytes, tensor.name))
    _check_tiling(tensors, file, base, file_size)
    return tuple(tensors)


def _check_marks(header: bytes, file: str) -> None:
    """Bound what parsing can allocate: each bracket or comma can make at most one small object."""
    limits = (
        (b"{", TENSORS_MAX),
        (b"[", 2 * TENSORS_MAX),
        (b",", (DIMS_MAX + 4) * TENSORS_MAX),
        (b":", 4 * TENSORS_MAX),
    )
    for mark, limit in limits:
        count = header.count(mark)
        if count > limit + METADATA_MARKS_MAX:
            raise BadHeader(
                file,
                f"header has {count} of {mark.decode()!r}, more than {TENSORS_MAX} tensors (the limit) need",
            )


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _check_metadata(metadata: object, file: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader(file, "__metadata__ is not a map of text to text")


def _is_size(value: object) -> bool:
    # bool is an int in Python, and true is not a size.
    return type(value) is int and 0 <= value <= IMAGE_BYTES_MAX


def check_tensor_name(name: str) -> bool:
    """Whether ``name`` may name a tensor: plain words joined by dots, no path tricks."""
    return len(name) <= TENSOR_NAME_CHARS_MAX and ".." not in name and _NAME.fullmatch(name) is not None


def _tensor(name: str, entry: object, file: str, base: int) -> TensorInfo:
    if not check_tensor_name(name):
        raise BadHeader(
            file,
            f"{name[:80]!r} is not a tensor name: use 1 to {TENSOR_NAME_CHARS_MAX} of letters, digits, "
            "'_', '-' and '.', without '..'",
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadHeader(file, f"tensor {name}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadHeader(
            file, f"tensor {name}: dtype {str(dtype)[:20]!r} is not one of {' '.join(DTYPE_BITS)}"
        )
    if not isinstance(shape, list) or len(shape) > DIMS_MAX or not all(_is_size(size) for size in shape):
        raise BadHeader(
            file, f"tensor {name}: shape must be at most {DIMS_MAX} sizes up to {IMAGE_BYTES_MAX}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise BadHeader(file, f"tensor {name}: data_offsets must be two sizes up to {IMAGE_BYTES_MAX}")
    nbytes = shape_bytes(dtype, shape)
    begin, end = offsets
    if nbytes != end - begin:
        raise BadHeader(file, f"tensor {name}: {dtype}{shape} does not take the {end - begin} bytes declared")
    return TensorInfo(name, dtype, tuple(shape), file, base + begin, nbytes)


def shape_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. At most ``DIMS_MAX`` sizes below 2^40, so the product stays small enough."""
    count = 1
    for size in shape:
        count *= size
    return count * DTYPE_BITS[dtype] // 8


def _check_tiling(tensors: Sequence[TensorInfo], file: str, base: int, file_size: int) -> None:
    at = base
    for tensor in tensors:
        if tensor.file_offset != at:
            what = "overlaps the one before" if tensor.file_offset < at else "leaves a hole before it"
            raise BadHeader(
                file, f"tensor {tensor.name}: starts at byte {tensor.file_offset - base} and {what}"
            )
        at += tensor.nbytes
    if at != file_size:
        raise BadHeader(
            file, f"tensors end at byte {at} of {file_size}; the file is cut short or has extra bytes"
        )


# --- the image ------------------------------------------------------------------------------------


def _stages(tensors: Sequence[TensorInfo], uses: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Stage and place of each tensor: those that are used one after the other, together as large as a chunk,
    are one stage."""
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    stages: dict[str, tuple[int, int]] = {}
    before = 0
    for name in uses:
        stages[name] = (before // CHUNK_BYTES, len(stages))
        before += sizes.get(name, 0)
    return stages


def _order(
    tensor: TensorInfo, stages: Mapping[str, tuple[int, int]]
) -> tuple[int, int, str, bool, int, str, str]:
    """Execution order: by stage, or embeddings, layers by number, tail; one dtype after the other within
    each, the small tensors first, because together they are one chunk."""
    if stages:
        stage, place = stages.get(tensor.name, (len(stages), len(stages)))
        return (0, stage, tensor.dtype, tensor.nbytes >= OWN_CHUNK_BYTES, place, tensor.name, tensor.file)
    group, layer = layer_of(tensor.name)
    own = tensor.nbytes >= OWN_CHUNK_BYTES
    return (group, layer, tensor.dtype, own, 0, tensor.name, tensor.file)


def layer_of(name: str) -> tuple[int, int]:
    """Which part of a model a tensor is of, as its name says: embeddings, a layer by its number, or tail."""
    layer = next((part for part in name.split(".") if re.fullmatch("[0-9]{1,6}", part)), None)
    if layer is not None:
        return (1, int(layer))
    return (0 if _EMBEDDING.search(name.lower()) else 2, 0)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def lay_out(tensors: Sequence[TensorInfo], uses: Sequence[str] = ()) -> ImageLayout:
    """Place tensors in the image and cut it into chunks. The same tensors give the same layout in any
    order of the argument. ``uses``: their names in execution order where that is known; else it is guessed
    from the names. Raises ``BadLayout`` on a name used twice or an image above the limit."""
    stages = _stages(tensors, uses)
    placed: list[PlacedTensor] = []
    runs: list[tuple[int, int, str]] = []  # start, end, dtype; each starts and ends on a page
    at, start, dtype, closed = 0, 0, "", False
    for tensor in sorted(tensors, key=lambda tensor: _order(tensor, stages)):
        if tensor.nbytes == 0:
            # An empty tensor takes no place and must not break a run of one dtype.
            placed.append(PlacedTensor(tensor, _up(at, TENSOR_ALIGN_BYTES)))
            continue
        own = tensor.nbytes >= OWN_CHUNK_BYTES
        if tensor.dtype != dtype or own or closed:
            if at > start:
                runs.append((start, _up(at, PAGE_BYTES), dtype))
            start = at = _up(at, PAGE_BYTES)
            dtype, closed = tensor.dtype, own
        at = _up(at, TENSOR_ALIGN_BYTES)
        placed.append(PlacedTensor(tensor, at))
        at += tensor.nbytes
    if at > start:
        runs.append((start, _up(at, PAGE_BYTES), dtype))
    chunks = tuple(chunk for run in runs for chunk in _cut(*run))
    layout = ImageLayout(_up(at, PAGE_BYTES), tuple(placed), chunks)
    check_layout(layout)
    return layout


def _cut(start: int, end: int, dtype: str) -> list[ChunkSpan]:
    """Cut a run into as few chunks as possible, of nearly the same size: a short one at the end would
    cost as many calls as a long one."""
    count = -(-(end - start) // CHUNK_BYTES)
    step = _up(-(-(end - start) // count), PAGE_BYTES)
    return [ChunkSpan(at, min(step, end - at), dtype) for at in range(start, end, step)]


def check_layout(layout: ImageLayout) -> None:
    """Raise ``BadLayout`` unless chunks tile the image and every tensor lies inside chunks of its dtype.

    What ``lay_out`` makes always passes; a pack's index is checked with it before it is believed.
    """
    if not 0 <= layout.image_bytes <= IMAGE_BYTES_MAX or len(layout.tensors) > TENSORS_MAX:
        raise BadLayout(
            f"image of {layout.image_bytes} bytes with {len(layout.tensors)} tensors: the limits are "
            f"{IMAGE_BYTES_MAX} bytes and {TENSORS_MAX} tensors"
        )
    at = 0
    for chunk in layout.chunks:
        if chunk.image_offset != at or not 0 < chunk.nbytes <= CHUNK_BYTES or chunk.nbytes % PAGE_BYTES:
            raise BadLayout(f"chunk at {chunk.image_offset} of {chunk.nbytes} bytes does not tile the image")
        if chunk.dtype not in DTYPE_BITS:
            raise BadLayout(f"chunk at {chunk.image_offset}: unknown dtype {chunk.dtype[:20]!r}")
        at += chunk.nbytes
    if at != layout.image_bytes:
        raise BadLayout(f"chunks end at {at}, the image at {layout.image_bytes}")
    _check_placed(layout)


def _check_placed(layout: ImageLayout) -> None:
    names: set[str] = set()
    at, index = 0, 0
    for placed in layout.tensors:
        info, end = placed.info, placed.image_offset + placed.info.nbytes
        if info.name in names:
            raise BadLayout(f"tensor {info.name} appears twice (in {info.file} too)")
        names.add(info.name)
        if not check_tensor_name(info.name) or info.dtype not in DTYPE_BITS or len(info.shape) > DIMS_MAX:
            raise BadLayout(f"tensor {info.name[:80]!r}: bad name, dtype or shape")
        if (
            any(not _is_size(size) for size in info.shape)
            or shape_bytes(info.dtype, info.shape) != info.nbytes
        ):
            raise BadLayout(f"tensor {info.name}: {info.dtype}{list(info.shape)} is not {info.nbytes} bytes")
        if info.file_offset < 0 or placed.image_offset % TENSOR_ALIGN_BYTES or end > layout.image_bytes:
            raise BadLayout(f"tensor {info.name}: misaligned or outside the image")
        if placed.image_offset < at:
            raise BadLayout(f"tensor {info.name}: overlaps the one before")
        if info.nbytes == 0:
            continue
        at = end
        index = _check_dtype(layout.chunks, index, placed)


def _check_dtype(chunks: Sequence[ChunkSpan], index: int, placed: PlacedTensor) -> int:
    """Return the index of the last chunk that the tensor reaches into."""
    while chunks[index].image_offset + chunks[index].nbytes <= placed.image_offset:
        index += 1
    end = placed.image_offset + placed.info.nbytes
    while True:
        if chunks[index].dtype != placed.info.dtype:
            raise BadLayout(f"tensor {placed.info.name}: lies in a chunk of {chunks[index].dtype}")
        if end <= chunks[index].image_offset + chunks[index].nbytes:
            return index
        index += 1


# --- workspace ------------------------------------------------------------------------------------


def _size(config: Mapping[str, object], *names: str) -> int:
    """The first positive integer among these keys, else 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
    return 0


def first_workspace_estimate(task: Task, config: Mapping[str, object], image_bytes: int) -> int:
    """Bytes that requests need beside the weights, until the real footprint is measured.

    One request at a time: for encoders the widest layer of one input of the greatest length; for
    generation also the whole key-value cache and one row of logits. Reads the keys of ``config.json``
    under both their common spellings; a config without them gets an eighth of the image.
    """
    hidden = _size(config, "hidden_size", "n_embd", "dim", "d_model")
    layers = _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if not hidden or not layers:
        return _up(min(max(image_bytes // 8, MIB), GIB), PAGE_BYTES)
    inner = _size(config, "intermediate_size", "n_inner", "hidden_dim", "ffn_dim") or 4 * hidden
    length = _size(config, "max_position_embeddings", "n_positions", "n_ctx") or WORKSPACE_TOKENS_MAX
    if task is not Task.GENERATION:
        length = min(length, WORKSPACE_ENCODER_TOKENS_MAX)
        return _up(length * (inner + 3 * hidden) * 4 + WORKSPACE_FIXED_BYTES, PAGE_BYTES)
    length = min(length, WORKSPACE_TOKENS_MAX)
    heads = _size(config, "num_attention_heads", "n_head") or 1
    head = _size(config, "head_dim") or hidden // heads
    kv_heads = _size(config, "num_key_value_heads") or heads
    element = 2 if str(config.get("dtype", config.get("torch_dtype"))) in ("bfloat16", "float16") else 4
    cache = 2 * layers * kv_heads * head * length * element
    logits = 2 * _size(config, "vocab_size") * 4
    return _up(cache + logits + length * (inner + 3 * hidden) * 4 + WORKSPACE_FIXED_BYTES, PAGE_BYTES)
