"""Directories of the ``export`` engine: ``config.json``, ``program.json`` and weights in safetensors.

Covers: reading both files, matching the signature and the stored tensors against the program, the order in
which weights are first used, and the first estimate of the workspace. Does not cover: nodes and operations
(``program``), file names (``directory``), or the run (``agent/engines/export.py``).

``config.json`` says ``"engine": "export"``, ``"format": 1``, ``"inputs"`` and ``"outputs"`` (each a list of
``name``, ``datatype`` and ``shape``, in the order of the program), and in ``"tied"`` the weights that are
stored under another one's name. It has the name that every model directory has, so that whoever pushes one
needs to know no other. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from packer.layout import PAGE_BYTES, TensorInfo
from packer.program import BadProgram, Port, Program, TensorFacts, parse
from packer.types import (
    DATATYPE_BYTES,
    FREE_DIMENSION,
    GIB,
    MIB,
    BadValue,
    TensorPort,
    TensorSignature,
    check_signature,
)

EXPORT_ENGINE = "export"
PROGRAM_FILE = "program.json"
CONFIG_FILE = "config.json"
FORMAT = 1

# What tensors of a request are called, by what safetensors calls those of a file.
DATATYPES: Mapping[str, str] = {
    "BOOL": "BOOL",
    "U8": "UINT8",
    "I8": "INT8",
    "I16": "INT16",
    "I32": "INT32",
    "I64": "INT64",
    "F16": "FP16",
    "BF16": "BF16",
    "F32": "FP32",
    "F64": "FP64",
}
# Requests may have larger free sizes than the example that the program was exported with: suppose 8 times.
FREE_PARTS = 8
WORKSPACE_MIN_BYTES = 2 * MIB
WORKSPACE_MAX_BYTES = 4 * GIB
# Names in an error message; a wrong directory may miss thousands.
NAMES_SHOWN_MAX = 5


class BadTensorModel(ValueError):
    """The files do not fit together. Names the file and the way out."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


@dataclass(frozen=True, slots=True)
class TensorModel:
    """A checked directory. ``stored``: the tensor of each weight of the program, by the weight's name in the
    graph."""

    program: Program
    signature: TensorSignature
    stored: Mapping[str, str]


class _Config(msgspec.Struct):
    engine: str
    format: int
    inputs: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]
    tied: dict[str, str] = {}


_decoder = msgspec.json.Decoder(_Config)


def read_tensor_model(files: Mapping[str, bytes]) -> TensorModel:
    """Raises ``BadTensorModel``."""
    for path in (CONFIG_FILE, PROGRAM_FILE):
        if path not in files:
            raise BadTensorModel(path, "is missing; write the directory with scripts/export_model.py")
    try:
        config = _decoder.decode(files[CONFIG_FILE])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadTensorModel(CONFIG_FILE, str(error)[:300]) from None
    if (config.engine, config.format) != (EXPORT_ENGINE, FORMAT):
        raise BadTensorModel(CONFIG_FILE, f"must say engine {EXPORT_ENGINE!r} and format {FORMAT}")
    signature = TensorSignature(config.inputs, config.outputs)
    try:
        check_signature(signature, "")
    except BadValue as error:
        raise BadTensorModel(CONFIG_FILE, str(error).lstrip(".")) from None
    try:
        program = parse(files[PROGRAM_FILE])
    except BadProgram as error:
        raise BadTensorModel(PROGRAM_FILE, str(error)) from None
    _check_ports("inputs", config.inputs, [port.facts for port in program.inputs])
    _check_ports("outputs", config.outputs, [_facts_of(program, name) for name in program.outputs])
    return TensorModel(program, signature, _stored(program, config.tied))


def _facts_of(program: Program, name: str) -> TensorFacts:
    facts = program.facts.get(name)
    if facts is None:
        raise BadTensorModel(PROGRAM_FILE, f"{name[:80]!r} has no entry in tensor_values")
    return facts


def _check_ports(side: str, ports: Sequence[TensorPort], wanted: Sequence[TensorFacts]) -> None:
    if len(ports) != len(wanted):
        raise BadTensorModel(CONFIG_FILE, f"{side} has {len(ports)} tensors, the program {len(wanted)}")
    for port, facts in zip(ports, wanted, strict=True):
        shape = tuple(size if isinstance(size, int) else FREE_DIMENSION for size in facts.shape)
        if (port.datatype, port.shape) != (facts.datatype, shape):
            raise BadTensorModel(
                CONFIG_FILE,
                f"{side} {port.name!r} is {port.datatype} {list(port.shape)}, the program has "
                f"{facts.datatype} {list(shape)}",
            )


def _stored(program: Program, tied: Mapping[str, str]) -> Mapping[str, str]:
    names = {port.stored for port in program.weights}
    for name, other in tied.items():
        if name not in names or other in tied:
            raise BadTensorModel(
                CONFIG_FILE, f"tied: {name[:80]!r} is no weight, or {other[:80]!r} is tied too"
            )
    return {port.name: tied.get(port.stored, port.stored) for port in program.weights}


# --- weights ----------------------------------------------------------------------------------------


def check_weights(model: TensorModel, tensors: Iterable[TensorInfo]) -> None:
    """Raise ``BadTensorModel`` unless the stored tensors are exactly the weights of the program."""
    found = {tensor.name: tensor for tensor in tensors}
    wanted = set(model.stored.values())
    _refuse(wanted - found.keys(), "has no tensor for")
    _refuse(found.keys() - wanted, "has tensors that the program does not use:")
    for port in model.program.weights:
        info = found[model.stored[port.name]]
        _check_weight(port, info)


def _check_weight(port: Port, info: TensorInfo) -> None:
    if DATATYPES.get(info.dtype) != port.facts.datatype or info.shape != port.facts.shape:
        raise BadTensorModel(
            info.file,
            f"tensor {info.name} is {info.dtype} {list(info.shape)}, the program has {port.facts.datatype} "
            f"{list(port.facts.shape)[:8]}",
        )


def _refuse(names: set[str], what: str) -> None:
    if names:
        shown = ", ".join(name[:80] for name in sorted(names)[:NAMES_SHOWN_MAX])
        more = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
        raise BadTensorModel("model.safetensors", f"{what} {shown}{more}")


def first_uses(model: TensorModel) -> tuple[str, ...]:
    """The stored tensors in the order in which a run needs them; what no node reads comes last."""
    order: dict[str, None] = {}
    for node in model.program.nodes:
        for name in node.reads:
            if name in model.stored:
                order[model.stored[name]] = None
    for port in model.program.weights:
        order.setdefault(model.stored[port.name])
    return tuple(order)


def execution_order(engine: str, files: Mapping[str, bytes]) -> tuple[str, ...]:
    """The order in which a directory's tensors are laid out, where its files say one: see ``layout.lay_out``.
    Raises ``BadTensorModel``."""
    return first_uses(read_tensor_model(files)) if engine == EXPORT_ENGINE else ()


# --- workspace --------------------------------------------------------------------------------------


def first_workspace_estimate(program: Program) -> int:
    """Bytes that a request needs beside the weights, until the real footprint is measured: the most that is
    alive at once, with free sizes ``FREE_PARTS`` times those of the example."""
    last_read: dict[str, int] = {name: len(program.nodes) for name in program.outputs}
    for number in range(len(program.nodes) - 1, -1, -1):
        for name in program.nodes[number].reads:
            last_read.setdefault(name, number)
    alive = sum(_bytes(port.facts) for port in program.inputs)
    peak = alive
    for number, node in enumerate(program.nodes):
        is_view = node.operator is not None and node.operator.is_view
        made = [name for name in node.writes if name in program.facts and not is_view]
        alive += sum(_bytes(program.facts[name]) for name in made)
        peak = max(peak, alive)
        unread = [name for name in node.writes if name not in last_read]
        ended = {name for name in (*node.reads, *unread) if last_read.get(name, number) == number}
        alive -= sum(_bytes(program.facts[name]) for name in sorted(ended) if name in program.facts)
        alive = max(alive, 0)  # views end too, although they were never counted
    bounded = min(max(2 * peak, WORKSPACE_MIN_BYTES), WORKSPACE_MAX_BYTES)
    return -(-bounded // PAGE_BYTES) * PAGE_BYTES


def _bytes(facts: TensorFacts) -> int:
    free = any(isinstance(size, str) for size in facts.shape)
    return facts.hint * DATATYPE_BYTES[facts.datatype] * (FREE_PARTS if free else 1)
