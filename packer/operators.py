"""What may be given to each operation that a pushed program may use.

Covers: reading torch's signatures (``aten``), the kinds of their parameters, and the values of parameters
that are allowed although the type would allow more. Does not cover: programs (``program``).

Pure: no torch, so that control refuses at push time what a node would refuse at load time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from packer.aten import SCHEMAS


class Kind(StrEnum):
    """What a parameter takes. A sized list and a symbolic integer are lists and integers."""

    TENSOR = "Tensor"
    TENSORS = "Tensor[]"
    OPTIONAL_TENSORS = "Tensor?[]"
    INT = "int"
    INTS = "int[]"
    FLOAT = "float"
    FLOATS = "float[]"
    SCALAR = "Scalar"
    BOOL = "bool"
    BOOLS = "bool[]"
    TEXT = "str"
    DTYPE = "ScalarType"
    LAYOUT = "Layout"
    DEVICE = "Device"
    MEMORY_FORMAT = "MemoryFormat"
    GENERATOR = "Generator"


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    kind: Kind
    optional: bool  # takes None
    required: bool
    keyword: bool  # only by name


@dataclass(frozen=True, slots=True)
class Operator:
    """One operation. ``returns``: a kind per result. ``is_view``: results may share an argument's memory."""

    name: str
    parameters: tuple[Parameter, ...]
    returns: tuple[Kind, ...]
    is_view: bool


_ARGUMENT = re.compile(
    r"(?P<type>[A-Za-z]+)(?P<alias>\([a-z](?: -> \*)?\))?(?P<inner>\?)?(?P<list>\[\d*\])?(?P<optional>\?)?"
    r"(?: (?P<name>\w+))?(?P<default>=.*)?"
)
_SCHEMA = re.compile(r"(?P<name>[a-z0-9_]+)(?:\.(?P<overload>\w+))?\((?P<arguments>.*)\) -> (?P<returns>.*)")

# Results as large as the data say (never more than their arguments are), or numbers that are the data.
SIZED_BY_VALUES = frozenset({"aten.nonzero.default", "aten.masked_select.default"})
NUMBERS_FROM_DATA = frozenset({"aten.item.default", "aten._local_scalar_dense.default"})

# Scalar types of torch's own serialization that a program may name: those a tensor of a request can have.
DTYPE_NAMES: Mapping[int, str] = {
    1: "UINT8",
    2: "INT8",
    3: "INT16",
    4: "INT32",
    5: "INT64",
    6: "FP16",
    7: "FP32",
    8: "FP64",
    12: "BOOL",
    13: "BF16",
}
STRIDED_LAYOUT = 7
MEMORY_FORMATS = frozenset({1, 2, 3, 4})

# Whatever a parameter of one of these names is given must be among these.
_TEXTS: Mapping[str, frozenset[str]] = {
    "approximate": frozenset({"none", "tanh"}),
    "rounding_mode": frozenset({"floor", "trunc"}),
    "padding": frozenset({"valid", "same"}),
    "reduce": frozenset({"sum", "prod", "mean", "amax", "amin", "add", "multiply"}),
    "indexing": frozenset({"ij", "xy"}),
    "mode": frozenset({"constant", "reflect", "replicate", "circular"}),
}
_EQUATION = re.compile(r"[A-Za-z., >\-]{1,200}")
_MESSAGE_CHARS_MAX = 4096
_NONE_ONLY = frozenset({"generator", "path", "stride_order"})
# In training these operations change the running statistics that they are given, which are weights, and
# their signatures do not say so; the others would be random.
_FALSE_ONLY = frozenset({"training", "train", "pin_memory", "half_to_float"})
_ENUMERATED = frozenset({"interpolation_mode", "padding_mode"})
_ENUMERATED_MAX = 2


def refused_value(name: str, value: object) -> str | None:
    """Why a parameter of this name may not be given this value; None: it may. References to values that
    are only known when the program runs never reach here."""
    if name in _NONE_ONLY and value is not None:
        return "must be left out"
    if name in _FALSE_ONLY and value not in (None, False):
        return "must be false: export the model in eval mode"
    if name in _ENUMERATED and not (type(value) is int and 0 <= value <= _ENUMERATED_MAX):
        return f"must be 0 to {_ENUMERATED_MAX}"
    if name == "dropout_p" and value != 0:
        return "must be 0: export the model in eval mode"
    if not isinstance(value, str):
        return None
    if name == "equation":
        return None if _EQUATION.fullmatch(value) else "is not an equation of letters"
    if name == "assert_msg":
        return None if len(value) <= _MESSAGE_CHARS_MAX else f"is longer than {_MESSAGE_CHARS_MAX}"
    allowed = _TEXTS.get(name, frozenset())
    return None if value in allowed else f"must be one of {', '.join(sorted(allowed)) or 'nothing'}"


# Parameters that are about values and must not be computed by the program itself.
CONSTANT_ONLY = _NONE_ONLY | _FALSE_ONLY | _ENUMERATED | {"dropout_p", "use_input_stats"}


def _split(text: str) -> list[str]:
    """At the commas outside of any bracket."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _kind(match: re.Match[str]) -> Kind:
    name = {"SymInt": "int"}.get(match["type"], match["type"])
    return Kind(name + ("?" if match["inner"] and match["list"] else "") + ("[]" if match["list"] else ""))


def parse_schema(line: str) -> Operator:
    """One line of ``aten.SCHEMAS``, which are ours: a line that does not parse is a mistake here."""
    schema = _SCHEMA.fullmatch(line)
    assert schema is not None, line
    parameters: list[Parameter] = []
    keyword = False
    for text in _split(schema["arguments"]):
        if text == "*":
            keyword = True
            continue
        match = _ARGUMENT.fullmatch(text)
        assert match is not None, line
        optional = bool(match["optional"] or (match["inner"] and not match["list"]))
        parameters.append(Parameter(match["name"], _kind(match), optional, not match["default"], keyword))
    returned = schema["returns"]
    results = _split(returned[1:-1] if returned.startswith("(") else returned)
    matches = [_ARGUMENT.fullmatch(text) for text in results]
    return Operator(
        f"aten.{schema['name']}.{schema['overload'] or 'default'}",
        tuple(parameters),
        tuple(_kind(match) for match in matches if match is not None),
        any(match is not None and match["alias"] for match in matches),
    )


OPERATORS: Mapping[str, Operator] = {
    operator.name: operator for operator in map(parse_schema, SCHEMAS.strip().splitlines())
}
