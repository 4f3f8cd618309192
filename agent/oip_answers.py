"""Answers of the Open Inference Protocol v2, as JSON and as raw bytes.

Covers: writing the outputs that were asked for, in order, within limits. Does not cover: reading requests
(``agent/oip_tensors.py``), or where outputs come from (``agent/oip_models.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from agent.oip_tensors import LENGTH, LETTERS, Tensor, WantedOutput
from agent.openai_shapes import bad_field

# Elements of all tensors of an answer that are written as JSON: 80 MB of text. 2,048 embeddings of 2,048 fit.
ANSWER_JSON_ELEMENTS_MAX = 4 * 1024 * 1024
# Elements that are Python objects at one time while an answer is written.
WRITE_ELEMENTS = 64 * 1024


class OutputParameters(msgspec.Struct, frozen=True):
    binary_data_size: int


class OutputAnswer(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: OutputParameters | UnsetType = UNSET
    data: msgspec.Raw | UnsetType = UNSET


class InferAnswer(msgspec.Struct, frozen=True):
    model_name: str
    model_version: str
    outputs: list[OutputAnswer]
    id: str | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class Answer:
    """``header_bytes``: the length of the JSON in ``body``; None when nothing follows it."""

    body: bytes
    header_bytes: int | None


def write_answer(
    model: str,
    version: str,
    request_id: str | None,
    outputs: Sequence[WantedOutput],
    tensors: Sequence[Tensor],
) -> Answer:
    """The outputs in the order they were asked for. Raises ``ApiError`` when JSON can not carry them."""
    by_name = {tensor.name: tensor for tensor in tensors}
    wanted = [(by_name[output.name], output.binary) for output in outputs]
    if sum(math.prod(tensor.shape) for tensor, binary in wanted if not binary) > ANSWER_JSON_ELEMENTS_MAX:
        raise bad_field(
            "outputs",
            f"more than {ANSWER_JSON_ELEMENTS_MAX} elements are not written as JSON; ask for raw bytes with "
            "the parameter binary_data_output true.",
        )
    answers = [_answer(tensor, binary) for tensor, binary in wanted]
    whole = InferAnswer(model, version, answers, UNSET if request_id is None else request_id)
    head = msgspec.json.encode(whole)
    raw = [tensor.data for tensor, binary in wanted if binary]
    return Answer(b"".join([head, *raw]), len(head) if raw else None)


def _answer(tensor: Tensor, binary: bool) -> OutputAnswer:
    if binary:
        return OutputAnswer(
            tensor.name, tensor.datatype, tensor.shape, parameters=OutputParameters(len(tensor.data))
        )
    return OutputAnswer(tensor.name, tensor.datatype, tensor.shape, data=_to_json(tensor))


def _to_json(tensor: Tensor) -> msgspec.Raw:
    data = memoryview(tensor.data)
    if tensor.datatype == "BYTES":
        return msgspec.Raw(msgspec.json.encode([str(one, "utf-8") for one in _elements(data)]))
    letter: Any = LETTERS[tensor.datatype]
    values = data.cast("B").cast(letter)
    pieces: list[bytes] = []
    for at in range(0, len(values), WRITE_ELEMENTS):
        part = values[at : at + WRITE_ELEMENTS].tolist()
        if tensor.datatype in ("FP32", "FP64") and not all(map(math.isfinite, part)):
            raise bad_field(
                "outputs",
                f"{tensor.name!r} holds a NaN or an infinity, which JSON can not carry; ask for it with the "
                "parameter binary_data true.",
                "unsupported_value",
            )
        pieces.append(msgspec.json.encode(part)[1:-1])
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def _elements(data: memoryview) -> Iterator[memoryview]:
    """Of a BYTES tensor that was written here."""
    at = 0
    while at < len(data):
        size = LENGTH.unpack(data[at : at + LENGTH.size])[0]
        at += LENGTH.size + size
        yield data[at - size : at]


def bytes_tensor(name: str, values: Sequence[str]) -> Tensor:
    packed = (value.encode() for value in values)
    return Tensor(name, "BYTES", (len(values),), b"".join(LENGTH.pack(len(one)) + one for one in packed))
