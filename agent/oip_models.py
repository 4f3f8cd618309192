"""What each kind of model makes of tensors: the engine's order for a request, and the tensors in its answer.

Covers: embedding and classification, which read texts, and models of tensors. Does not cover: tensors in
bodies (``agent/oip_tensors.py``), or models that generate: OpenAI's routes stream, this protocol does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from agent.facade import JSON, EngineFault, EngineFrame, EngineRequest
from agent.oip_answers import bytes_tensor
from agent.oip_tensors import Inference, Tensor, texts_of
from agent.openai_shapes import FLOAT_BYTES, integer
from packer.types import DATATYPE_BYTES, FREE_DIMENSION, ModelSpec, Task, TensorPort, TensorSignature

_OPS: Mapping[Task, str] = {Task.EMBEDDING: "embed", Task.CLASSIFICATION: "classify"}


def order_of(spec: ModelSpec, inference: Inference) -> EngineRequest:
    """Raises ``ApiError`` when the tensors' contents are at fault."""
    if spec.task is not Task.TENSORS:
        (text,) = inference.inputs
        return EngineRequest(_OPS[spec.task], {"inputs": texts_of(text)})
    described: list[JSON] = [
        {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        for tensor in inference.inputs
    ]
    fields: dict[str, JSON] = {"inputs": described, "outputs": [one.name for one in inference.outputs]}
    return EngineRequest("infer", fields, b"".join(tensor.data for tensor in inference.inputs))


def rows_of(order: EngineRequest) -> int:
    """How many inferences an order is: texts one each; a model of tensors says nothing of batches."""
    inputs = order.fields.get("inputs")
    return len(inputs) if order.op != "infer" and isinstance(inputs, Sequence) else 1


def tensors_of(
    spec: ModelSpec, signature: TensorSignature, order: EngineRequest, frame: EngineFrame
) -> tuple[Tensor, ...]:
    """The outputs that an engine gave. Raises ``EngineFault``: a worker is not trusted to count right."""
    if spec.task is Task.EMBEDDING:
        return (_floats("embedding", frame, rows_of(order), integer(frame, "dimensions")),)
    if spec.task is Task.CLASSIFICATION:
        named = frame.header.get("labels")
        if not isinstance(named, Sequence) or isinstance(named, str) or not named:
            raise EngineFault("the engine's answer has no labels")
        scores = _floats("scores", frame, rows_of(order), len(named))
        return (scores, bytes_tensor("label", _best(scores, [str(one) for one in named])))
    return tuple(_described(signature, order, frame))


def _floats(name: str, frame: EngineFrame, rows: int, columns: int) -> Tensor:
    if len(frame.body) != rows * columns * FLOAT_BYTES:
        raise EngineFault(f"the engine sent {len(frame.body)} bytes for {rows} rows of {columns} floats")
    return Tensor(name, "FP32", (rows, columns), frame.body)


def _best(scores: Tensor, labels: Sequence[str]) -> list[str]:
    rows, columns = scores.shape
    values = memoryview(scores.data).cast("B").cast("f").tolist()
    best: list[str] = []
    for row in range(rows):
        part = values[row * columns : (row + 1) * columns]
        best.append(labels[part.index(max(part))])
    return best


def _described(signature: TensorSignature, order: EngineRequest, frame: EngineFrame) -> list[Tensor]:
    ports = {port.name: port for port in signature.outputs}
    asked = order.fields["outputs"]
    given = frame.header.get("outputs")
    if not isinstance(given, Sequence) or not isinstance(asked, Sequence) or isinstance(given, str):
        raise EngineFault("the engine's answer names no outputs")
    body = memoryview(frame.body)
    tensors: list[Tensor] = []
    at = 0
    for one in given:
        port, shape = _port_of(ports, one)
        end = at + math.prod(shape) * DATATYPE_BYTES[port.datatype]
        tensors.append(Tensor(port.name, port.datatype, shape, body[at:end]))
        at = end
    if at != len(body) or sorted(tensor.name for tensor in tensors) != sorted(map(str, asked)):
        raise EngineFault(
            f"the engine sent {len(body)} bytes for {len(tensors)} outputs, {len(asked)} were asked for"
        )
    return tensors


def _port_of(ports: Mapping[str, TensorPort], given: JSON) -> tuple[TensorPort, tuple[int, ...]]:
    """An output as the engine describes it, if that is what the model gives."""
    if isinstance(given, Mapping):
        port, sizes = ports.get(str(given.get("name"))), given.get("shape")
        if port is not None and isinstance(sizes, Sequence) and given.get("datatype") == port.datatype:
            shape = tuple(size for size in sizes if isinstance(size, int) and size >= 0)
            if len(shape) == len(sizes) == len(port.shape) and all(
                expected in (FREE_DIMENSION, size) for size, expected in zip(shape, port.shape, strict=True)
            ):
                return port, shape
    raise EngineFault("the engine gave an output that its model does not have")
