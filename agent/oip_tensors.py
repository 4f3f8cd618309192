"""Tensors in the bodies of the Open Inference Protocol v2, as JSON and as raw bytes.

Covers: taking a request's body apart against what its model takes, with every limit. Does not cover: which
model (``agent/oip.py``), what is done with the tensors (``agent/oip_models.py``), or writing an answer
(``agent/oip_answers.py``).

Everything is checked by the model's signature before a tensor's data is looked at, and no Python object per
element is made of what came as raw bytes. Nothing here imports numpy: this runs in the agent's process.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent.openai_shapes import INPUTS_MAX, bad_field
from packer.http import ECHO_CHARS_MAX, JSON_BYTES_MAX, ApiError, decode_json
from packer.json_words import told
from packer.oip import TENSOR_BODY_BYTES_MAX, TENSOR_JSON_BYTES_MAX, json_too_large
from packer.types import (
    DATATYPE_BYTES,
    FREE_DIMENSION,
    PORT_DIMS_MAX,
    PORT_SIZE_MAX,
    PORTS_MAX,
    TensorPort,
    TensorSignature,
)

# Letters of ``struct`` and ``memoryview.cast``. FP16 and BF16 have none: JSON can not carry them.
LETTERS: Mapping[str, str] = {
    **{"BOOL": "?", "UINT8": "B", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"},
    **{"FP32": "f", "FP64": "d"},
}
_KINDS: Mapping[str, Any] = {"BOOL": list[bool], "FP32": list[float], "FP64": list[float]}
JSON_DATATYPES = frozenset({*LETTERS, "BYTES"})
# Every element of a BYTES tensor follows its length.
LENGTH = struct.Struct("<I")
ID_CHARS_MAX = 256
PARAMETERS_MAX = 64
# Parameters that would change what is computed or when. Ignoring one would answer something else than asked.
_REFUSED_PARAMETERS: Mapping[str, str] = {
    "sequence_id": "sequences of requests are not supported",
    "sequence_start": "sequences of requests are not supported",
    "sequence_end": "sequences of requests are not supported",
    "priority": "priorities belong to a tenant's quota",
    "timeout": "a request's time is not limited by itself; close the connection to give up",
}
_REFUSED_OUTPUT_PARAMETERS: Mapping[str, str] = {
    "classification": "the classification extension is not supported; ask for the scores",
}

Parameter: TypeAlias = bool | int | float | str | None
Parameters: TypeAlias = Annotated[dict[str, Parameter], Meta(max_length=PARAMETERS_MAX)] | None
Name: TypeAlias = Annotated[str, Meta(max_length=ID_CHARS_MAX)]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=PORT_SIZE_MAX)]


class InputAsk(msgspec.Struct, frozen=True):
    name: Name
    shape: Annotated[list[Size], Meta(max_length=PORT_DIMS_MAX)]
    datatype: Annotated[str, Meta(max_length=16)]
    parameters: Parameters = None
    data: msgspec.Raw | UnsetType = UNSET


class OutputAsk(msgspec.Struct, frozen=True):
    name: Name
    parameters: Parameters = None


class InferAsk(msgspec.Struct, frozen=True):
    inputs: Annotated[list[InputAsk], Meta(min_length=1, max_length=PORTS_MAX)]
    id: Annotated[str, Meta(max_length=ID_CHARS_MAX)] | None = None
    parameters: Parameters = None
    outputs: Annotated[list[OutputAsk], Meta(max_length=PORTS_MAX)] | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """``data``: little-endian elements in row-major order; of BYTES each after its length."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """``binary``: as raw bytes, not as JSON."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class Inference:
    """A request that fits its model."""

    id: str | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[WantedOutput, ...]


# --- reading ----------------------------------------------------------------------------------------------


def header_length(values: Sequence[str]) -> int | None:
    """The length of the JSON as the header states it; None without the header: all is JSON."""
    if not values:
        return None
    text = values[0].strip()
    if len(values) > 1 or not text.isascii() or not text.isdecimal() or len(text) > 10:
        raise ApiError(
            400,
            "invalid_header",
            "Inference-Header-Content-Length: must be given once, as the number of bytes of the JSON.",
        )
    if int(text) == 0:
        raise ApiError(
            400,
            "not_supported",
            "Inference-Header-Content-Length: 0 asks for a raw binary request, which is not supported; send "
            "the JSON that names the tensors before their bytes.",
        )
    if int(text) > TENSOR_JSON_BYTES_MAX:
        raise json_too_large()
    return int(text)


def read_inference(body: bytes, header_bytes: int | None, signature: TensorSignature) -> Inference:
    """Take a body apart. Raises ``ApiError`` that names the field."""
    if header_bytes is not None and header_bytes > len(body):
        raise ApiError(
            400,
            "invalid_header",
            f"Inference-Header-Content-Length: {header_bytes} bytes of JSON can not be in a body of "
            f"{len(body)} bytes.",
        )
    view = memoryview(body)
    ask = _read_ask(body, header_bytes)
    raw = view[header_bytes:] if header_bytes is not None else None
    _refuse_parameters("parameters", ask.parameters, _REFUSED_PARAMETERS)
    outputs = _outputs(ask, signature)  # before the data: what can not be answered need not be read
    ports = _inputs_named(ask, signature)
    tensors: list[Tensor] = []
    at = 0
    for position, (one, port) in enumerate(zip(ask.inputs, ports, strict=True)):
        field = f"inputs[{position}]"
        shape = _shape(field, one, port)
        size = _binary_size(field, one)
        if size is None:
            tensors.append(Tensor(one.name, port.datatype, shape, _from_json(field, one, port, shape)))
            continue
        if raw is None:
            raise bad_field(
                f"{field}.parameters.binary_data_size",
                "raw bytes need the header Inference-Header-Content-Length, the number of bytes of the JSON.",
            )
        if size > len(raw) - at:
            raise bad_field(
                f"{field}.parameters.binary_data_size",
                f"{size} bytes, but {len(raw) - at} are left in the body after what comes before.",
            )
        data = raw[at : at + size]
        at += size
        _check_raw(field, port, shape, data)
        tensors.append(Tensor(one.name, port.datatype, shape, data))
    if raw is not None and at != len(raw):
        raise ApiError(
            400, "invalid_value", f"The body has {len(raw) - at} bytes that no tensor's size covers."
        )
    return Inference(ask.id, tuple(tensors), outputs)


def _read_ask(body: bytes, header_bytes: int | None) -> InferAsk:
    if header_bytes is None:
        return decode_json(body, InferAsk)
    try:
        return decode_json(body[:header_bytes], InferAsk)
    except ApiError as error:
        if error.code == "invalid_json":  # a header that is left over from another request, most often
            error.hint = f"By Inference-Header-Content-Length it is the first {header_bytes} bytes."
        raise


def _refuse_parameters(field: str, parameters: Parameters, refused: Mapping[str, str]) -> None:
    for name, why in refused.items():
        if (parameters or {}).get(name):
            raise bad_field(f"{field}.{name}", f"{why}; leave it out.", "unsupported_value")
    for name in parameters or {}:
        if name.startswith("shared_memory"):
            raise bad_field(
                f"{field}.{name[:40]}", "shared memory is not supported; send the bytes.", "unsupported_value"
            )


def _flag(field: str, parameters: Parameters, name: str, otherwise: bool) -> bool:
    value = (parameters or {}).get(name)
    if value is None:
        return otherwise
    if not isinstance(value, bool):
        raise bad_field(f"{field}.{name}", "must be true or false.")
    return value


def _outputs(ask: InferAsk, signature: TensorSignature) -> tuple[WantedOutput, ...]:
    binary = _flag("parameters", ask.parameters, "binary_data_output", False)
    known = {port.name: port for port in signature.outputs}
    wanted: list[WantedOutput] = []
    if ask.outputs:
        for position, output in enumerate(ask.outputs):
            at = f"outputs[{position}]"
            if output.name not in known:
                raise _unknown(f"{at}.name", output.name, "gives", signature.outputs)
            _refuse_parameters(f"{at}.parameters", output.parameters, _REFUSED_OUTPUT_PARAMETERS)
            raw = _flag(f"{at}.parameters", output.parameters, "binary_data", binary)
            wanted.append(WantedOutput(output.name, raw))
        names = [output.name for output in wanted]
        if len(set(names)) != len(names):
            raise bad_field("outputs", "names a tensor twice.")
    else:
        wanted = [WantedOutput(port.name, binary) for port in signature.outputs]
    for one in wanted:
        if not one.binary and known[one.name].datatype not in JSON_DATATYPES:
            raise bad_field(
                "outputs",
                f"{one.name!r} is {known[one.name].datatype}, which JSON can not carry; ask for it with the "
                "parameter binary_data true.",
                "unsupported_value",
            )
    return tuple(wanted)


def _unknown(field: str, name: str, verb: str, ports: Sequence[TensorPort]) -> ApiError:
    known = ", ".join(port.name for port in ports)
    return bad_field(field, f"the model {verb} no {name[:ECHO_CHARS_MAX]!r}; it {verb} {known}.")


def _inputs_named(ask: InferAsk, signature: TensorSignature) -> list[TensorPort]:
    """The port of each input, in the request's order; every port exactly once."""
    known = {port.name: port for port in signature.inputs}
    found: list[TensorPort] = []
    for position, one in enumerate(ask.inputs):
        if one.name not in known:
            raise _unknown(f"inputs[{position}].name", one.name, "takes", signature.inputs)
        found.append(known[one.name])
    names = [one.name for one in ask.inputs]
    for name in known:
        if names.count(name) != 1:
            raise bad_field(
                "inputs",
                f"{name!r} is {'missing' if name not in names else 'given more than once'}; the model takes "
                f"each of {', '.join(known)} once.",
            )
    return found


def _shape(field: str, one: InputAsk, port: TensorPort) -> tuple[int, ...]:
    if one.datatype != port.datatype:
        raise bad_field(
            f"{field}.datatype",
            f"{one.datatype!r}, but the model takes {one.name!r} as {port.datatype}.",
        )
    shape = tuple(one.shape)
    # Clients write a list of texts as a column as well.
    columns = shape[:1] if port.datatype == "BYTES" and shape[1:] == (1,) else shape
    fits = len(columns) == len(port.shape) and all(
        expected in (FREE_DIMENSION, size) for size, expected in zip(columns, port.shape, strict=True)
    )
    if not fits:
        raise bad_field(
            f"{field}.shape",
            f"{list(shape)}, but the model takes {one.name!r} as {list(port.shape)} (-1: any size).",
        )
    most = INPUTS_MAX if port.datatype == "BYTES" else TENSOR_BODY_BYTES_MAX // DATATYPE_BYTES[port.datatype]
    if math.prod(shape) > most:
        raise bad_field(f"{field}.shape", f"{math.prod(shape)} elements; the limit is {most}.")
    return shape


def _binary_size(field: str, one: InputAsk) -> int | None:
    """Bytes of a tensor that follows the JSON; None when its data are in the JSON."""
    _refuse_parameters(f"{field}.parameters", one.parameters, {})
    size = (one.parameters or {}).get("binary_data_size")
    if (size is None) == isinstance(one.data, UnsetType):
        raise bad_field(field, "needs either 'data' or the parameter 'binary_data_size', and not both.")
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise bad_field(f"{field}.parameters.binary_data_size", "must be a number of bytes, 0 or more.")
    return size


def _check_raw(field: str, port: TensorPort, shape: tuple[int, ...], data: memoryview) -> None:
    if port.datatype == "BYTES":
        return  # lengths are read when the texts are
    expected = math.prod(shape) * DATATYPE_BYTES[port.datatype]
    if len(data) != expected:
        raise bad_field(
            f"{field}.parameters.binary_data_size",
            f"{len(data)} bytes, but {port.datatype} of shape {list(shape)} has {expected}.",
        )
    if port.datatype == "BOOL" and bytes(data).translate(None, b"\x00\x01"):
        raise bad_field(field, "a BOOL is one byte, 0 or 1.")


# --- JSON -------------------------------------------------------------------------------------------------


def _from_json(field: str, one: InputAsk, port: TensorPort, shape: tuple[int, ...]) -> bytes:
    assert not isinstance(one.data, UnsetType)
    raw = bytes(one.data)
    if port.datatype == "BYTES":
        return _texts_from_json(f"{field}.data", raw, shape)
    letter = LETTERS.get(port.datatype)
    if letter is None:
        raise bad_field(
            f"{field}.data",
            f"{port.datatype} can not be written as JSON; send raw bytes with binary_data_size.",
            "unsupported_value",
        )
    count = math.prod(shape)
    flat = _flattened(f"{field}.data", raw, shape)
    values = _decoded(f"{field}.data", flat, _KINDS.get(port.datatype, list[int]))
    if len(values) != count:
        raise bad_field(f"{field}.data", f"{len(values)} elements, but shape {list(shape)} has {count}.")
    try:
        return struct.pack(f"<{count}{letter}", *values)
    except (struct.error, OverflowError):
        raise bad_field(f"{field}.data", f"holds a number that {port.datatype} can not hold.") from None


# All bytes but those that make the structure of nested lists.
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b"[],")


def _flattened(field: str, raw: bytes, shape: tuple[int, ...]) -> bytes:
    """Lists of numbers nested as ``shape`` says, or flat, as one flat JSON list.

    By the brackets alone: a million nested lists never become a million objects.
    """
    if b'"' in raw or b"{" in raw or not raw.startswith(b"["):
        raise bad_field(field, "must be a list of numbers, flat or nested like the shape.")
    structure = raw.translate(None, _NOT_STRUCTURE)
    depth = len(structure) - len(structure.lstrip(b"["))
    if depth > 1:
        # Sizes behind a 0 have nothing to hold, however large they are.
        filled = shape[: shape.index(0) + 1] if 0 in shape else shape
        if _nested_length(filled) != len(structure) or structure != _nested(filled):
            raise bad_field(
                field, f"is not nested like the shape {list(shape)}; nest it so, or send a flat list."
            )
        return b"[" + raw.translate(None, b"[]," if 0 in shape else b"[]") + b"]"
    if structure.count(b"[") != 1:
        raise bad_field(field, "mixes numbers and lists.")
    return raw


def _nested_length(shape: tuple[int, ...]) -> int:
    """How long ``_nested`` would be: sizes that a request only claims are never built."""
    length = 0
    for size in reversed(shape):
        length = 2 + size * length + max(size - 1, 0)
    return length


def _nested(shape: tuple[int, ...]) -> bytes:
    """The brackets and commas of lists nested like ``shape``."""
    structure = b""
    for size in reversed(shape):
        structure = b"[" + b",".join([structure] * size) + b"]"
    return structure


def _decoded(field: str, raw: bytes, kind: Any) -> list[Any]:
    try:
        values: list[Any] = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        at, said = told(str(error))
        raise bad_field(f"{field}{at}", said[: 2 * ECHO_CHARS_MAX]) from None
    return values


def _texts_from_json(field: str, raw: bytes, shape: tuple[int, ...]) -> bytes:
    texts: list[str]
    if len(shape) == 2 and raw[1:].lstrip(b" \t\r\n").startswith(b"["):
        rows = _decoded(field, raw, list[Annotated[list[str], Meta(min_length=1, max_length=1)]])
        texts = [row[0] for row in rows]
    else:
        texts = _decoded(field, raw, list[str])
    return b"".join(LENGTH.pack(len(data)) + data for data in (text.encode() for text in texts))


# --- texts --------------------------------------------------------------------------------------------------


def texts_of(tensor: Tensor) -> list[str]:
    """The elements of a BYTES tensor as texts. Raises ``ApiError``."""
    field = tensor.name
    count = math.prod(tensor.shape)
    data = memoryview(tensor.data)
    if count == 0:
        raise bad_field(field, "has no elements; send at least one text.")
    if len(data) > JSON_BYTES_MAX + count * LENGTH.size:
        raise bad_field(
            field, f"texts of {len(data)} bytes; the limit is {JSON_BYTES_MAX}. Send several requests."
        )
    texts: list[str] = []
    at = 0
    while at < len(data):
        if len(texts) == count:
            break
        end = at + LENGTH.size
        size = LENGTH.unpack(data[at:end])[0] if end <= len(data) else len(data)
        if end + size > len(data):
            raise bad_field(field, f"element {len(texts)} reaches beyond the end of the tensor's bytes.")
        try:
            texts.append(str(data[end : end + size], "utf-8"))
        except UnicodeDecodeError:
            raise bad_field(field, f"element {len(texts)} is no UTF-8 text.") from None
        at = end + size
    if len(texts) != count or at != len(data):
        raise bad_field(field, f"holds another number of elements than shape {list(tensor.shape)} has.")
    if "" in texts:
        raise bad_field(field, f"element {texts.index('')} is an empty text; leave it out.")
    return texts
