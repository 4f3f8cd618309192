"""The export engine: a program of ``torch.export``, run node by node as the data that it is.

Covers: building the steps of a checked program, attaching weights, reading the tensors of a request, the run
with its limits, and the answer. Does not cover: checking a program (``packer/program.py``), single operations
(``operations``) or where the weights' memory is (``agent/arena.py``).

Nothing of a directory is ever unpickled, evaluated or looked up as code: operations come from an allow-list
of ours, none of which writes to its arguments, so that no program can change its weights, nor give out memory
that it did not fill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from agent.arena import Image
from agent.early import Gate, chunks_of
from agent.engines.model import BrokenModel, WholeRequests
from agent.engines.operations import (
    TORCH_DTYPES,
    Environment,
    Refusal,
    Step,
    Value,
    check_bytes,
    check_size,
    checked_number,
    has_mask,
    prepared,
    step_of,
    tensors_in,
)
from agent.engines.spanning import met
from agent.facade import JSON, EngineError, EngineFrame, EngineRequest
from agent.frames import FRAME_BODY_BYTES_MAX
from packer.layout import ImageLayout, PlacedTensor
from packer.operators import NUMBERS_FROM_DATA, SIZED_BY_VALUES
from packer.program import Node, Program, TensorFacts, symbol_of
from packer.tensor_model import BadTensorModel, TensorModel, check_weights, read_tensor_model
from packer.types import DATATYPE_BYTES, FREE_DIMENSION, Task, TensorPort

# Combinations of input shapes whose sizes were found to be within the limits; the oldest is forgotten first.
SHAPES_KNOWN_MAX = 256
_DATATYPES = {dtype: datatype for datatype, dtype in TORCH_DTYPES.items()}


class InferTensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]


class InferFields(msgspec.Struct, frozen=True):
    """The fields of an ``infer`` request."""

    inputs: list[InferTensor]
    outputs: list[str] = []


def build(task: Task, files: Mapping[str, bytes], layout: ImageLayout, device: str) -> ExportModel:
    """A program without its weights. Raises ``BrokenModel``."""
    if task is not Task.TENSORS:
        raise BrokenModel(f"a program is not a model for {task}")
    try:
        model = read_tensor_model(files)
        check_weights(model, [placed.info for placed in layout.tensors])
        steps = _steps(model.program)
    except BadTensorModel as error:
        raise BrokenModel(str(error)) from None
    except KeyError as error:
        raise BrokenModel(f"{error} is not an operation of torch {torch.__version__} on this node") from None
    placed = {each.info.name: each for each in layout.tensors}
    weights = {name: placed[stored] for name, stored in model.stored.items()}
    return ExportModel(model, steps, weights, torch.device(device))


def _steps(program: Program) -> tuple[Step, ...]:
    """Every node with the names that nobody reads after it."""
    kept = {port.name for port in program.weights} | set(program.outputs)
    steps: list[Step] = []
    later: set[str] = set()
    for node in reversed(program.nodes):
        ends = [name for name in dict.fromkeys((*node.reads, *node.writes)) if name not in later]
        steps.append(step_of(node, tuple(name for name in ends if name not in kept)))
        later.update(ends)
    return tuple(reversed(steps))


class ExportModel(WholeRequests):
    """A built program; see ``agent.engines.model.Model``."""

    task = Task.TENSORS

    def __init__(
        self,
        model: TensorModel,
        steps: tuple[Step, ...],
        placed: Mapping[str, PlacedTensor],
        device: torch.device,
    ) -> None:
        self._model = model
        self._steps = steps
        self._placed = placed
        self._device = device
        self._weights: Environment = {}
        self._spans = False  # the weights lie on several devices
        self._gate: Gate | None = None  # of a restore that may still bring weights
        self._chunks: Mapping[str, frozenset[int]] = {}
        self._is_sized_by_values = any(
            step.node.target in SIZED_BY_VALUES | NUMBERS_FROM_DATA for step in steps
        )
        # Shapes of inputs with which every node stayed within the limits.
        self._known: dict[tuple[tuple[int, ...], ...], None] = {}

    def attach(self, image: Image) -> None:
        for port in self._model.program.weights:
            weight = image.tensor(self._placed[port.name])
            # No gradient is ever computed, but torch chooses its kernels by whether one could be: without
            # this, results would differ from those of the program in their last bits.
            is_trained = port.facts.is_trained and weight.is_floating_point()
            self._weights[port.name] = nn.Parameter(weight) if is_trained else weight
        self._spans = len({weight.device: None for weight in tensors_in(list(self._weights.values()))}) > 1

    def detach(self) -> None:
        self._stop_waiting()
        self._weights = {}

    def serve_behind(self, gate: Gate, layout: ImageLayout) -> Sequence[int] | None:
        """Every node waits for the weights that it reads, so none must be there from the start."""
        self._chunks = {
            name: frozenset(chunks_of(layout, placed.image_offset, placed.info.nbytes))
            for name, placed in self._placed.items()
        }
        self._gate = gate
        return []

    @property
    def is_gated(self) -> bool:
        gate = self._gate
        return gate is not None and gate.may_wait

    def _stop_waiting(self) -> None:
        self._gate = None
        self._chunks = {}

    # --- a request --------------------------------------------------------------------------------

    def run(
        self,
        request: EngineRequest,
        emit: Callable[[EngineFrame], None],
        cancelled: Callable[[], bool],
    ) -> None:
        if self._gate is not None and self._gate.is_open:
            self._stop_waiting()  # here, because no other thread runs the program now
        if request.op != "infer":
            raise EngineError(
                "invalid_request",
                "this is a model of tensors: call /v2/models/{model}/infer of the Open Inference Protocol",
                "model",
            )
        try:
            fields = msgspec.convert(request.fields, InferFields)
        except msgspec.ValidationError as error:
            raise EngineError("invalid_request", str(error)[:500]) from None
        wanted = self._wanted(fields.outputs)
        with torch.inference_mode():
            inputs = _Inputs(self._model).read(fields.inputs, request.body, self._device)
            results = self._results(inputs, cancelled)
            if results is not None:
                emit(_answer([(port, results[name]) for port, name in wanted]))

    def _wanted(self, names: Sequence[str]) -> list[tuple[TensorPort, str]]:
        """The outputs that are asked for, in that order, and their names in the program."""
        ports = self._model.signature.outputs
        known = {
            port.name: (port, name) for port, name in zip(ports, self._model.program.outputs, strict=True)
        }
        for name in names:
            if name not in known:
                raise EngineError(
                    "invalid_request", f"{name[:80]!r} is not one of {', '.join(known)[:500]}", "outputs"
                )
        if len(set(names)) != len(names):
            raise EngineError("invalid_request", "an output is named twice", "outputs")
        return [known[name] for name in names or known]

    def _results(self, inputs: Environment, cancelled: Callable[[], bool]) -> Environment | None:
        """All values that are left at the end; None: nobody waits for them any more."""
        if len(self._weights) != len(self._placed):
            raise RuntimeError("the program has no weights here")
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        meter = _Meter(self._weights.values()) if shapes not in self._known else None
        environment = {**self._weights, **inputs}
        if meter is not None:
            meter.made(inputs.values())
        for number, step in enumerate(self._steps):
            if cancelled():
                return None
            if self._gate is not None:
                self._gate.wait(frozenset().union(*(self._chunks.get(name, ()) for name in step.node.reads)))
            try:
                self._take(step, environment, meter)
            except EngineError:
                raise
            except Exception as error:
                raise _at_fault(error, number, step.node) from None
        if meter is not None and not self._is_sized_by_values:
            self._known[shapes] = None
            if len(self._known) > SHAPES_KNOWN_MAX:
                del self._known[next(iter(self._known))]
        return environment

    def _take(self, step: Step, environment: Environment, meter: _Meter | None) -> None:
        positional, keywords = step.arguments(environment, self._device)
        if self._spans:
            positional, keywords = met(positional, keywords, self._weights.values())
        if step.makes_tensors:
            # The same at every run of this program, because it is a matter of dtypes.
            self._is_sized_by_values |= meter is not None and has_mask(step, positional)
            positional = prepared(step, positional, keywords)
            if meter is not None:
                check_size(step, positional, keywords, meter.alive_bytes)
        result = step.call(*positional, **keywords)
        _bind(step, result, environment)
        if meter is not None:
            meter.made(environment[name] for name in step.node.writes)
            meter.ended(environment[name] for name in step.ends)
        for name in step.ends:
            del environment[name]


def _bind(step: Step, result: Value, environment: Environment) -> None:
    outputs = step.node.outputs
    results = result if len(outputs) != 1 else (result,)
    for output, value in zip(outputs, results, strict=True):
        if isinstance(output, str):
            environment[output] = value if isinstance(value, torch.Tensor) else checked_number(value)
        else:
            if len(value) != len(output):
                raise Refusal(f"gave {len(value)} tensors, the program expects {len(output)}")
            environment.update(zip(output, value, strict=True))


def _at_fault(error: Exception, number: int, node: Node) -> Exception:
    """What a failed node means: torch says of most mistakes no more than that something does not fit."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return MemoryError()
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        return error  # the device itself: nothing that this process does will work any more
    text = str(error).split("\n")[0][:300]
    return EngineError(
        "invalid_request", f"node {number} ({node.target}): {text or type(error).__name__}", "inputs"
    )


class _Meter:
    """The bytes of intermediate results that are alive. Memory that several share is counted once."""

    def __init__(self, weights: Iterable[Value]) -> None:
        self.alive_bytes = 0
        self._users: dict[int, int] = {}
        self._weights = {_memory(tensor) for tensor in tensors_in(list(weights))}

    def made(self, values: Iterable[Value]) -> None:
        for tensor in tensors_in(list(values)):
            memory = _memory(tensor)
            if memory in self._weights:
                continue
            if memory not in self._users:
                self.alive_bytes += tensor.untyped_storage().nbytes()
            self._users[memory] = self._users.get(memory, 0) + 1
        check_bytes(self.alive_bytes)

    def ended(self, values: Iterable[Value]) -> None:
        for tensor in tensors_in(list(values)):
            memory = _memory(tensor)
            if memory in self._weights:
                continue
            self._users[memory] -= 1
            if not self._users[memory]:
                del self._users[memory]
                self.alive_bytes -= tensor.untyped_storage().nbytes()


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# --- tensors of a request -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    tensor: InferTensor
    start: int
    nbytes: int


class _Inputs:
    """Reads the inputs of one request."""

    def __init__(self, model: TensorModel) -> None:
        self._model = model
        self._sizes: dict[str, int] = {}  # of free dimensions, by their expressions

    def read(self, given: Sequence[InferTensor], body: bytes, device: torch.device) -> Environment:
        """Tensors by their names in the program. Raises ``EngineError``."""
        found = self._placed(given, body)
        program, signature = self._model.program, self._model.signature
        inputs: Environment = {}
        for port, source in zip(signature.inputs, program.inputs, strict=True):
            if port.name not in found:
                raise _wrong("inputs", f"{port.name!r} is missing")
            place = found.pop(port.name)
            self._check(port, source.facts, place.tensor)
            data = bytearray(body[place.start : place.start + place.nbytes])
            inputs[source.name] = _tensor(data, port.datatype, place.tensor.shape).to(device)
        if found:
            known = ", ".join(port.name for port in signature.inputs)
            raise _wrong("inputs", f"{min(found)[:80]!r} is not one of {known[:500]}")
        return inputs

    def _placed(self, given: Sequence[InferTensor], body: bytes) -> dict[str, _Given]:
        found: dict[str, _Given] = {}
        start = 0
        for tensor in given:
            if tensor.name in found:
                raise _wrong("inputs", f"{tensor.name[:80]!r} is given twice")
            if any(size < 0 for size in tensor.shape) or tensor.datatype not in DATATYPE_BYTES:
                raise _wrong(
                    "inputs", f"{tensor.name[:80]!r}: {tensor.datatype[:20]} {tensor.shape[:8]} is no tensor"
                )
            nbytes = math.prod(tensor.shape) * DATATYPE_BYTES[tensor.datatype]
            found[tensor.name] = _Given(tensor, start, nbytes)
            start += nbytes
        if start != len(body):
            raise _wrong("inputs", f"the tensors take {start} bytes, {len(body)} were sent")
        return found

    def _check(self, port: TensorPort, facts: TensorFacts, given: InferTensor) -> None:
        shown = [size for size in port.shape]
        if given.datatype != port.datatype or len(given.shape) != len(port.shape):
            raise _wrong(
                "inputs",
                f"{port.name!r} must be {port.datatype} {shown}, not {given.datatype} {given.shape[:8]}",
            )
        for dim, (size, wanted) in enumerate(zip(given.shape, facts.shape, strict=True)):
            if isinstance(wanted, str):
                self._check_free(port, dim, size, wanted)
            elif size != wanted:
                raise _wrong("inputs", f"{port.name!r} must have shape {shown}, not {given.shape[:8]}")

    def _check_free(self, port: TensorPort, dim: int, size: int, expression: str) -> None:
        """Free sizes are alike where the program was exported with the same symbol, and in its bounds."""
        other = self._sizes.setdefault(expression, size)
        if other != size:
            raise _wrong(
                "inputs",
                f"{port.name!r}: size {size} of dimension {dim} must be {other}, as in another tensor",
            )
        least, greatest = self._model.program.bounds.get(symbol_of(expression) or "", (0, None))
        if size < least or (greatest is not None and size > greatest):
            bound = f"at least {least}" if greatest is None else f"{least} to {greatest}"
            raise _wrong("inputs", f"{port.name!r}: size {size} of dimension {dim} must be {bound}")


def _wrong(field: str, message: str) -> EngineError:
    return EngineError("invalid_request", message, field)


def _tensor(data: bytearray, datatype: str, shape: Sequence[int]) -> torch.Tensor:
    dtype = TORCH_DTYPES[datatype]
    if not data:
        return torch.zeros(tuple(shape), dtype=dtype)
    if dtype == torch.bool:
        # Any byte but 0 is true; torch counts on a bool to be 0 or 1.
        return torch.frombuffer(data, dtype=torch.uint8).reshape(tuple(shape)) != 0
    return torch.frombuffer(data, dtype=dtype).reshape(tuple(shape))


def _answer(outputs: Sequence[tuple[TensorPort, torch.Tensor]]) -> EngineFrame:
    """Raises ``EngineError`` for results that are not what the signature says, or too large."""
    nbytes = sum(tensor.numel() * tensor.element_size() for _, tensor in outputs)
    if nbytes > FRAME_BODY_BYTES_MAX:
        raise _wrong(
            "inputs",
            f"the outputs take {nbytes} bytes, the limit is {FRAME_BODY_BYTES_MAX}: send smaller inputs or "
            "ask for fewer outputs",
        )
    described: list[JSON] = []
    body = bytearray()
    for port, tensor in outputs:
        datatype = _DATATYPES.get(tensor.dtype, str(tensor.dtype))
        shape = list(tensor.shape)
        fits = len(shape) == len(port.shape) and all(
            wanted in (FREE_DIMENSION, size) for size, wanted in zip(shape, port.shape, strict=True)
        )
        if datatype != port.datatype or not fits:
            raise _wrong(
                "model",
                f"output {port.name!r} came out as {datatype} {shape[:8]}, the signature says "
                f"{port.datatype} {list(port.shape)}; export the model again",
            )
        described.append({"name": port.name, "datatype": datatype, "shape": shape})
        body += tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return EngineFrame({"outputs": described}, bytes(body))
