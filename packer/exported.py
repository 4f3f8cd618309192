"""The JSON in which ``torch.export`` saves a program: only the parts that are read here.

Covers: shapes and types of the objects, which are torch's (``torch/_export/serde/schema.py``, schema 8).
Does not cover: whether they make sense together (``program``). Fields that are not here are never built.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType


class Named(msgspec.Struct):
    name: str


class Number(msgspec.Struct, forbid_unknown_fields=True):
    as_name: str | UnsetType = UNSET
    as_int: int | UnsetType = UNSET
    as_float: float | str | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET


class MaybeTensor(msgspec.Struct, forbid_unknown_fields=True):
    as_tensor: Named | UnsetType = UNSET
    as_none: bool | UnsetType = UNSET


# One of torch's unions: an object with one key, which says what the value is. Decoded when it is known what
# may be there, so that nothing else is ever built.
Union: TypeAlias = dict[str, Raw]


class NamedArgument(msgspec.Struct):
    name: str
    arg: Union


class Node(msgspec.Struct):
    target: str
    inputs: list[NamedArgument]
    outputs: list[Union]


class Expression(msgspec.Struct):
    expr_str: str
    hint: Number | None = None


class Size(msgspec.Struct, forbid_unknown_fields=True):
    as_int: int | UnsetType = UNSET
    as_expr: Expression | UnsetType = UNSET


class TensorMeta(msgspec.Struct):
    dtype: int
    sizes: list[Size]
    requires_grad: bool = False


class Graph(msgspec.Struct):
    nodes: list[Node]
    tensor_values: dict[str, TensorMeta]


class UserInput(msgspec.Struct):
    arg: Union


class Parameter(msgspec.Struct):
    arg: Named
    parameter_name: str


class Buffer(msgspec.Struct):
    arg: Named
    buffer_name: str


class Constant(msgspec.Struct):
    arg: Named
    tensor_constant_name: str


class InputSpec(msgspec.Struct):
    user_input: UserInput | UnsetType = UNSET
    parameter: Parameter | UnsetType = UNSET
    buffer: Buffer | UnsetType = UNSET
    tensor_constant: Constant | UnsetType = UNSET
    constant_input: Raw | UnsetType = UNSET


class OutputSpec(msgspec.Struct):
    user_output: UserInput | UnsetType = UNSET


class Signature(msgspec.Struct):
    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]


class GraphModule(msgspec.Struct):
    graph: Graph
    signature: Signature


class Bounds(msgspec.Struct):
    min_val: int | None = None
    max_val: int | None = None


class Version(msgspec.Struct):
    major: int


class Exported(msgspec.Struct):
    graph_module: GraphModule
    schema_version: Version
    range_constraints: dict[str, Bounds] = {}
