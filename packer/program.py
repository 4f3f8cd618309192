"""A ``torch.export`` program as data: what control checks at push time and a worker runs.

Covers: reading torch's own JSON of a program (``models/*.json`` of a .pt2 file) within limits, and checking
every node against the allowed operations: names defined before they are used, kinds of arguments, values.
Does not cover: which operations those are (``operators``), the weights and the signature (``tensor_model``),
or running it (``agent/engines/export.py``).

Pure, and torch is not needed. Nothing in a program is ever evaluated: sizes that torch writes as expressions
are only compared as texts; what a node needs of them the program computes itself, with nodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Raw

from packer.exported import (
    Exported,
    InputSpec,
    MaybeTensor,
    Named,
    Number,
    TensorMeta,
    Union,
)
from packer.exported import Node as NodeJson
from packer.operators import (
    CONSTANT_ONLY,
    DTYPE_NAMES,
    MEMORY_FORMATS,
    OPERATORS,
    STRIDED_LAYOUT,
    Kind,
    Operator,
    Parameter,
    refused_value,
)
from packer.types import MIB

# A transformer of 100 layers without torch's own remarks takes 2 MiB.
PROGRAM_BYTES_MAX = 8 * MIB
# The largest models of Hugging Face have some 10,000 nodes.
NODES_MAX = 20_000
# Parameters, buffers, constants and inputs of a program.
PORTS_MAX = 20_000
# Members of one list: tensors that are concatenated, pieces that one is split into.
ITEMS_MAX = 1024
NAME_CHARS_MAX = 256
# Objects in the JSON; each becomes one here of some 300 bytes.
OBJECTS_MAX = 400_000
# The major version of torch's serialization that is read here; torch 2.4 to 2.13 write it.
SCHEMA_MAJOR = 8
# In exported programs it stands for detaching a constant that was just copied; its result is its argument.
_SPELLINGS = {"aten.detach_.default": "aten.detach.default"}

# Numbers of the program: sizes and what is computed from them. Operator -> how many arguments.
NUMBER_OPERATORS: Mapping[str, int] = {
    **dict.fromkeys(("add", "sub", "mul", "floordiv", "mod", "truediv", "pow", "lshift", "rshift"), 2),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "sym_max", "sym_min"), 2),
    **dict.fromkeys(("neg", "pos", "trunc", "sym_not", "sym_int", "sym_float"), 1),
    "sym_ite": 3,
}
_NUMBER_TARGET = re.compile(r"(?:_operator|math|torch)\.(\w+)")
# torch takes a plain number for the second tensor of an addition and its like, and exports it so.
_NUMBER_AS_TENSOR = "other"
_SYMBOL = re.compile(r"Symbol\('(\w{1,64})'[^()]*\)")


T = TypeVar("T")


class BadProgram(ValueError):
    """A program is not one that can be run here. Says where, why, and the way out."""


# --- the program ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of a name at run time."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    datatype: str


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    code: int


@dataclass(frozen=True, slots=True)
class Here:
    """The device of whoever runs the program, whatever it was exported on."""


Argument: TypeAlias = (
    bool | int | float | str | Ref | Dtype | MemoryFormat | Here | tuple["Argument", ...] | None
)


@dataclass(frozen=True, slots=True)
class Node:
    """One step. ``operator`` None: arithmetic of numbers, named ``target``. An output that is a tuple takes
    the members of a list."""

    target: str
    operator: Operator | None
    positional: tuple[Argument, ...]
    keywords: tuple[tuple[str, Argument], ...]
    outputs: tuple[str | tuple[str, ...], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(_refs([*self.positional, *(value for _, value in self.keywords)]))

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(
            name for output in self.outputs for name in ((output,) if isinstance(output, str) else output)
        )


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What torch knew of a tensor: its datatype, and sizes; a free size is its expression, as opaque text.
    ``hint``: the elements that it had when the program was exported. ``is_trained``: it had a gradient."""

    datatype: str
    shape: tuple[int | str, ...]
    hint: int
    is_trained: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor that comes from outside. ``stored``: the weight's own name; empty for an input."""

    name: str
    stored: str
    facts: TensorFacts


@dataclass(frozen=True, slots=True)
class Program:
    """A checked program. ``bounds``: least and greatest value of free sizes, by symbol."""

    weights: tuple[Port, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    facts: Mapping[str, TensorFacts]
    bounds: Mapping[str, tuple[int, int | None]]


def symbol_of(expression: str) -> str | None:
    """The symbol that an expression is, when it is nothing but one."""
    match = _SYMBOL.fullmatch(expression)
    return match[1] if match else None


def _refs(values: Sequence[Argument]) -> list[str]:
    found: list[str] = []
    for value in values:
        if isinstance(value, Ref):
            found.append(value.name)
        elif isinstance(value, tuple):
            found.extend(_refs(value))
    return found


# --- reading --------------------------------------------------------------------------------------


_decoder = msgspec.json.Decoder(Exported)


def parse(data: bytes) -> Program:
    """Read and check a program. Raises ``BadProgram``."""
    if len(data) > PROGRAM_BYTES_MAX or data.count(b"{") > OBJECTS_MAX:
        raise BadProgram(
            f"has {len(data)} bytes and {data.count(b'{')} objects, the limits are {PROGRAM_BYTES_MAX} and "
            f"{OBJECTS_MAX}; write it with scripts/export_model.py, which leaves torch's remarks out"
        )
    try:
        exported = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadProgram(f"is not a program of torch.export: {str(error)[:300]}") from None
    if exported.schema_version.major != SCHEMA_MAJOR:
        raise BadProgram(
            f"has schema version {exported.schema_version.major}, read is {SCHEMA_MAJOR}: export it with "
            "another release of torch"
        )
    return _Reader(exported).read()


class _Reader:
    """Checks one program, node by node, as it would run."""

    def __init__(self, exported: Exported) -> None:
        self._graph = exported.graph_module.graph
        self._signature = exported.graph_module.signature
        self._ranges = exported.range_constraints
        self._kinds: dict[str, Kind] = {}  # of every name defined so far: a tensor or a number
        self._where = ""

    def read(self) -> Program:
        if len(self._graph.nodes) > NODES_MAX or len(self._signature.input_specs) > PORTS_MAX:
            raise BadProgram(
                f"has {len(self._graph.nodes)} nodes and {len(self._signature.input_specs)} tensors, the "
                f"limits are {NODES_MAX} and {PORTS_MAX}"
            )
        facts = {name: _facts(name, meta) for name, meta in self._graph.tensor_values.items()}
        weights, inputs = self._read_inputs(facts)
        nodes = tuple(self._read_node(number, node) for number, node in enumerate(self._graph.nodes))
        bounds = {name: (max(0, each.min_val or 0), each.max_val) for name, each in self._ranges.items()}
        return Program(weights, inputs, self._read_outputs(), nodes, facts, bounds)

    # --- what comes in and goes out ---

    def _read_inputs(self, facts: Mapping[str, TensorFacts]) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        weights: list[Port] = []
        inputs: list[Port] = []
        for number, spec in enumerate(self._signature.input_specs):
            self._where = f"input_specs[{number}]"
            if spec.constant_input is not UNSET:
                continue  # a value that the program was exported for; it is in the nodes already
            stored, name = self._input_name(spec)
            if name not in facts:
                raise self._wrong(f"{name[:80]!r} has no entry in tensor_values")
            self._define(name, Kind.TENSOR)
            (weights if stored else inputs).append(Port(name, stored, facts[name]))
        return tuple(weights), tuple(inputs)

    def _input_name(self, spec: InputSpec) -> tuple[str, str]:
        """The stored name of a weight (empty: it is an input of requests), and the name in the graph."""
        if spec.parameter is not UNSET:
            return spec.parameter.parameter_name, spec.parameter.arg.name
        if spec.buffer is not UNSET:
            return spec.buffer.buffer_name, spec.buffer.arg.name
        if spec.tensor_constant is not UNSET:
            return spec.tensor_constant.tensor_constant_name, spec.tensor_constant.arg.name
        if spec.user_input is not UNSET and "as_tensor" in spec.user_input.arg:
            return "", self._tensor_name(spec.user_input.arg)
        raise self._wrong("is neither a tensor nor a weight; objects, tokens and numbers can not be inputs")

    def _read_outputs(self) -> tuple[str, ...]:
        outputs: list[str] = []
        for number, spec in enumerate(self._signature.output_specs):
            self._where = f"output_specs[{number}]"
            if spec.user_output is UNSET:
                raise self._wrong(
                    "changes a weight or an input; export the model in eval mode and without state that "
                    "requests change, because weights are never written"
                )
            if "as_tensor" not in spec.user_output.arg:
                raise self._wrong("is not a tensor; let forward return tensors only")
            outputs.append(self._known(self._tensor_name(spec.user_output.arg), Kind.TENSOR).name)
        return tuple(outputs)

    # --- nodes ---

    def _read_node(self, number: int, node: NodeJson) -> Node:
        self._where = f"node {number} ({node.target[:120]!r})"
        name = node.target.removeprefix("torch.ops.")
        operator = OPERATORS.get(_SPELLINGS.get(name, name))
        if operator is not None:
            read = self._read_operation(operator, node)
        else:
            match = _NUMBER_TARGET.fullmatch(node.target)
            if match is None or match[1] not in NUMBER_OPERATORS:
                raise self._wrong(
                    "this operation is not supported; try program.run_decompositions() before saving, or "
                    "write the model without it"
                )
            read = self._read_arithmetic(match[1], node)
        for output in read.outputs:
            for each in (output,) if isinstance(output, str) else output:
                self._define(each, self._result_kind(read))
        return read

    def _read_arithmetic(self, name: str, node: NodeJson) -> Node:
        if len(node.inputs) != NUMBER_OPERATORS[name] or len(node.outputs) != 1:
            raise self._wrong(f"takes {NUMBER_OPERATORS[name]} numbers and gives one")
        values = tuple(self._argument(Kind.SCALAR, "number", given.arg) for given in node.inputs)
        return Node(name, None, values, (), (self._number_name(node.outputs[0]),))

    def _read_operation(self, operator: Operator, node: NodeJson) -> Node:
        given = {each.name: each.arg for each in node.inputs}
        if len(given) != len(node.inputs):
            raise self._wrong("an argument is given twice")
        positional: list[Argument] = []
        keywords: list[tuple[str, Argument]] = []
        gap = False
        for parameter in operator.parameters:
            arg = given.pop(parameter.name, None)
            if arg is None:
                if parameter.required:
                    raise self._wrong(f"argument {parameter.name} is missing")
                gap = True
                continue
            value = self._value(parameter, arg)
            if parameter.keyword or gap:
                keywords.append((parameter.name, value))
            else:
                positional.append(value)
        if given:
            raise self._wrong(f"has no argument {min(given)[:80]!r}")
        read = Node(
            operator.name, operator, tuple(positional), tuple(keywords), self._outputs(operator, node)
        )
        self._check_statistics(read)
        return read

    def _check_statistics(self, node: Node) -> None:
        """Instance norm changes the statistics that it is given when it uses those of its input."""
        if node.target == "aten.instance_norm.default":
            running, uses_input = node.positional[3:5], node.positional[5:6]
            if uses_input != (False,) and running != (None, None):
                raise self._wrong("would change its running statistics: export the model in eval mode")

    def _value(self, parameter: Parameter, arg: Union) -> Argument:
        value = self._argument(parameter.kind, parameter.name, arg, parameter.optional)
        is_known = not _refs([value])
        if not is_known and parameter.name in CONSTANT_ONLY:
            raise self._wrong(f"argument {parameter.name}: must be a constant")
        refused = refused_value(parameter.name, value) if is_known else None
        if refused is not None:
            raise self._wrong(f"argument {parameter.name}: {refused}")
        return value

    def _outputs(self, operator: Operator, node: NodeJson) -> tuple[str | tuple[str, ...], ...]:
        if len(operator.returns) != len(node.outputs):
            raise self._wrong(f"gives {len(operator.returns)} results, not {len(node.outputs)}")
        outputs: list[str | tuple[str, ...]] = []
        for kind, given in zip(operator.returns, node.outputs, strict=True):
            if kind is Kind.TENSORS:
                items = self._decoded(_NAMES, given, "as_tensors")
                self._check_count(len(items))
                outputs.append(tuple(item.name for item in items))
            elif kind is Kind.TENSOR:
                outputs.append(self._tensor_name(given))
            else:
                outputs.append(self._number_name(given))
        return tuple(outputs)

    def _tensor_name(self, given: Union) -> str:
        return self._decoded(_NAME, given, "as_tensor").name

    def _number_name(self, given: Union) -> str:
        for form in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            if form in given:
                name = self._decoded(_NUMBER, given, form).as_name
                if name is not UNSET:
                    return name
        raise self._wrong("gives a number and must name it")

    def _decoded(self, decoder: msgspec.json.Decoder[T], given: Union, form: str) -> T:
        """The value of a union that must be of this form."""
        if list(given) != [form]:
            raise self._wrong(f"{form} is expected, not {', '.join(given)[:80] or 'nothing'}")
        try:
            return decoder.decode(given[form])
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._wrong(f"{form}: {str(error)[:200]}") from None

    @staticmethod
    def _result_kind(node: Node) -> Kind:
        tensors = node.operator is not None and set(node.operator.returns) & {Kind.TENSOR, Kind.TENSORS}
        return Kind.TENSOR if tensors else Kind.SCALAR

    # --- names and values ---

    def _wrong(self, message: str) -> BadProgram:
        return BadProgram(f"{self._where}: {message}")

    def _define(self, name: str, kind: Kind) -> None:
        if not 0 < len(name) <= NAME_CHARS_MAX:
            raise self._wrong(f"a name must have 1 to {NAME_CHARS_MAX} characters")
        if name in self._kinds:
            raise self._wrong(f"{name[:80]!r} is defined twice")
        self._kinds[name] = kind

    def _known(self, name: str, kind: Kind) -> Ref:
        if self._kinds.get(name) is not kind:
            what = "a tensor" if kind is Kind.TENSOR else "a number"
            raise self._wrong(f"{name[:80]!r} is not {what} that was made before")
        return Ref(name)

    def _check_count(self, count: int) -> None:
        if count > ITEMS_MAX:
            raise self._wrong(f"a list has {count} members, the limit is {ITEMS_MAX}")

    def _argument(self, kind: Kind, name: str, arg: Union, optional: bool = False) -> Argument:
        if "as_none" in arg and (optional or kind is Kind.GENERATOR):
            return None
        form = next(iter(arg), "")
        read = _FORMS[kind].get(form)
        if kind is Kind.TENSOR and name == _NUMBER_AS_TENSOR:
            read = read or _FORMS[Kind.SCALAR].get(form)
        if read is None:
            raise self._wrong(f"argument {name}: must be {kind}, not {form[:40] or 'nothing'}")
        return read(self, arg)

    def _tensors(self, items: Sequence[Named]) -> Argument:
        self._check_count(len(items))
        return tuple(self._known(item.name, Kind.TENSOR) for item in items)

    def _maybe(self, item: MaybeTensor) -> Argument:
        return self._known(item.as_tensor.name, Kind.TENSOR) if item.as_tensor is not UNSET else None

    def _maybes(self, items: Sequence[MaybeTensor]) -> Argument:
        self._check_count(len(items))
        return tuple(self._maybe(item) for item in items)

    def _integer(self, value: int) -> int:
        if not -(2**63) <= value < 2**63:
            raise self._wrong("a number does not fit in 64 bits")
        return value

    def _integers(self, items: Sequence[int]) -> Argument:
        self._check_count(len(items))
        return tuple(self._integer(item) for item in items)

    def _number(self, item: Number) -> Argument:
        if item.as_name is not UNSET:
            return self._known(item.as_name, Kind.SCALAR)
        if item.as_int is not UNSET:
            return self._integer(item.as_int)
        if item.as_bool is not UNSET:
            return item.as_bool
        if item.as_float is not UNSET:
            return self._float(item.as_float)
        raise self._wrong("a number is empty")

    def _numbers(self, items: Sequence[Number]) -> Argument:
        self._check_count(len(items))
        return tuple(self._number(item) for item in items)

    def _float(self, value: float | str) -> float:
        if isinstance(value, str):
            if value not in ("Infinity", "-Infinity", "NaN"):
                raise self._wrong(f"{value[:40]!r} is not a number")
            return float(value.lower().replace("infinity", "inf"))
        return float(value)

    def _floats(self, items: Sequence[float]) -> Argument:
        self._check_count(len(items))
        return tuple(items)

    def _dtype(self, code: int) -> Argument:
        if code not in DTYPE_NAMES:
            raise self._wrong(f"dtype {code} is not one of {', '.join(DTYPE_NAMES.values())}")
        return Dtype(DTYPE_NAMES[code])

    def _layout(self, code: int) -> Argument:
        if code != STRIDED_LAYOUT:
            raise self._wrong("only dense tensors are supported")
        return None

    def _memory_format(self, code: int) -> Argument:
        if code not in MEMORY_FORMATS:
            raise self._wrong(f"memory format {code} is not one of {sorted(MEMORY_FORMATS)}")
        return MemoryFormat(code)


# --- what each kind of parameter takes ----------------------------------------------------------------

_Read: TypeAlias = Callable[[_Reader, Union], Argument]
_NAME = msgspec.json.Decoder(Named)
_NAMES = msgspec.json.Decoder(list[Named])
_NUMBER = msgspec.json.Decoder(Number)
_FLOAT: msgspec.json.Decoder[float | str] = msgspec.json.Decoder(float | str)


def _form(
    name: str, kind: type[T] | msgspec.json.Decoder[T], take: Callable[[_Reader, T], Argument]
) -> dict[str, _Read]:
    decoder = kind if isinstance(kind, msgspec.json.Decoder) else msgspec.json.Decoder(kind)
    return {name: lambda reader, given: take(reader, reader._decoded(decoder, given, name))}


_INTEGERS = {**_form("as_int", int, _Reader._integer), **_form("as_sym_int", Number, _Reader._number)}
_REALS = {
    **_INTEGERS,
    **_form("as_float", _FLOAT, _Reader._float),
    **_form("as_sym_float", Number, _Reader._number),
}
_TRUTHS = {
    **_form("as_bool", bool, lambda _, value: value),
    **_form("as_sym_bool", Number, _Reader._number),
}
_TENSORS = _form("as_tensors", list[Named], _Reader._tensors)
_FORMS: Mapping[Kind, Mapping[str, _Read]] = {
    Kind.TENSOR: {
        **_form("as_tensor", Named, lambda reader, item: reader._known(item.name, Kind.TENSOR)),
        **_form("as_optional_tensor", MaybeTensor, _Reader._maybe),
    },
    Kind.TENSORS: _TENSORS,
    Kind.OPTIONAL_TENSORS: {**_TENSORS, **_form("as_optional_tensors", list[MaybeTensor], _Reader._maybes)},
    Kind.INT: _INTEGERS,
    Kind.INTS: {
        **_form("as_ints", list[int], _Reader._integers),
        **_form("as_sym_ints", list[Number], _Reader._numbers),
    },
    Kind.FLOAT: _REALS,
    Kind.FLOATS: _form("as_floats", list[float], _Reader._floats),
    Kind.SCALAR: {**_REALS, **_TRUTHS},
    Kind.BOOL: _TRUTHS,
    Kind.BOOLS: _form("as_bools", list[bool], lambda _, items: tuple(items)),
    Kind.TEXT: _form("as_string", str, lambda _, value: value),
    Kind.DTYPE: _form("as_scalar_type", int, _Reader._dtype),
    Kind.LAYOUT: _form("as_layout", int, _Reader._layout),
    Kind.DEVICE: _form("as_device", Raw, lambda _, value: Here()),
    Kind.MEMORY_FORMAT: _form("as_memory_format", int, _Reader._memory_format),
    Kind.GENERATOR: {},
}


def _facts(name: str, meta: TensorMeta) -> TensorFacts:
    datatype = DTYPE_NAMES.get(meta.dtype)
    if datatype is None or len(meta.sizes) > ITEMS_MAX:
        raise BadProgram(
            f"tensor {name[:80]!r}: dtype {meta.dtype} with {len(meta.sizes)} dimensions is not supported; "
            f"use {', '.join(DTYPE_NAMES.values())}"
        )
    shape: list[int | str] = []
    hint = 1
    for size in meta.sizes:
        if size.as_int is not UNSET:
            shape.append(_size(name, size.as_int))
            hint *= size.as_int
        elif size.as_expr is not UNSET:
            shape.append(size.as_expr.expr_str)
            known = size.as_expr.hint
            if known is not None and known.as_int is not UNSET:
                hint *= max(_size(name, known.as_int), 1)
        else:
            raise BadProgram(f"tensor {name[:80]!r}: a size is empty")
    return TensorFacts(datatype, tuple(shape), hint, meta.requires_grad)


def _size(name: str, value: int) -> int:
    """JSON has integers of thousands of digits, and products of a thousand of them take minutes."""
    if not 0 <= value < 2**63:
        raise BadProgram(f"tensor {name[:80]!r}: a size is not a number from 0 to {2**63 - 1}")
    return value
