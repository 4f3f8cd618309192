"""Running one node of a program: arithmetic of sizes, torch's operations, and what each may take.

Covers: calling the allowed operations and nothing else, the bytes that one would take before it runs, and the
arguments for which torch's own kernels do not look. Does not cover: which operations are allowed
(``packer/operators.py``) or the run of a whole program (``export``).

The size of a result is found by running the operation on tensors without memory ("meta") first. So a node
that asks for a terabyte is refused before a byte is taken.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from packer.operators import OPERATORS, SIZED_BY_VALUES, Kind
from packer.program import ITEMS_MAX, Argument, Dtype, Here, MemoryFormat, Node, Ref
from packer.types import GIB

# What one request may hold in intermediate results, and as how much any one of them may pass: an expanded
# view takes no memory, but whoever reads it takes its time.
RUN_BYTES_MAX = 2 * GIB
# Of a pooling's window or result; they are walked over in half a second. An image of 16,384 by 16,384 has so
# many.
WINDOW_PLACES_MAX = 2**28
# Of a transposed convolution: places of its result before the padding is cut off, times the steps of its
# strides. Some kernels walk over so much whatever the input is; these take a second. A stride of 8 by 8 may
# make 8,192 by 8,192 places.
STRIDE_STEPS_MAX = 2**32
# Powers and shifts of sizes: none that fits 64 bits needs more.
_EXPONENT_MAX = 64

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
_MEMORY_FORMATS: Mapping[int, torch.memory_format] = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}

# A value of a name while a program runs: a tensor or a number; in arguments also lists of them.
Value: TypeAlias = Any
Environment: TypeAlias = dict[str, Value]
Call: TypeAlias = Callable[..., Value]


class Refusal(Exception):
    """A node can not be run with these values; the request or the program is at fault."""


# --- numbers ------------------------------------------------------------------------------------------


def _power(base: Value, exponent: Value) -> Value:
    if abs(exponent) > _EXPONENT_MAX or abs(base) > 2**63:
        raise Refusal("a power is too great")
    return base**exponent


def _shift(value: int, by: int) -> int:
    if not 0 <= by <= _EXPONENT_MAX:
        raise Refusal("a shift is too wide")
    return value << by


NUMBER_CALLS: Mapping[str, Call] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "rshift", "neg", "pos")
    },
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    "pow": _power,
    "lshift": _shift,
    "trunc": math.trunc,
    "sym_max": max,
    "sym_min": min,
    "sym_not": operator.not_,
    "sym_int": int,
    "sym_float": float,
    "sym_ite": lambda condition, then, otherwise: then if condition else otherwise,
}


def checked_number(value: Value) -> Value:
    """Integers of a program have 64 bits, whatever Python's have."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise Refusal("a number does not fit in 64 bits")
    return value


def _assert(condition: Value, message: str) -> tuple[()]:
    if not condition:
        raise Refusal(f"the model refuses these inputs: {message[:200]}")
    return ()


def _in_range(size: Value, *, min: int | None = None, max: int | None = None) -> tuple[()]:
    if (min is not None and size < min) or (max is not None and size > max):
        raise Refusal(f"a size of {size} is outside of {min} to {max}")
    return ()


# Operations that give numbers or nothing; torch's own would give symbols or trust the file.
_OWN_CALLS: Mapping[str, Call] = {
    "aten.sym_size.int": lambda tensor, dim: int(tensor.shape[dim]),
    "aten.sym_numel.default": lambda tensor: tensor.numel(),
    "aten.item.default": lambda tensor: tensor.item(),
    "aten._local_scalar_dense.default": lambda tensor: tensor.item(),
    "aten._assert_scalar.default": _assert,
    # Says what the dtypes and devices were when the program was exported, on another machine.
    "aten._assert_tensor_metadata.default": lambda *arguments, **options: (),
    "aten.sym_constrain_range.default": _in_range,
    "aten.sym_constrain_range_for_size.default": _in_range,
}


# --- one step -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """A node, ready to run. ``ends``: names that nobody reads afterwards."""

    node: Node
    call: Call
    positional: tuple[Argument, ...]
    keywords: Mapping[str, Argument]
    makes_tensors: bool
    ends: tuple[str, ...]

    def arguments(
        self, environment: Environment, device: torch.device
    ) -> tuple[list[Value], dict[str, Value]]:
        positional = [_resolved(value, environment, device) for value in self.positional]
        return positional, {
            name: _resolved(value, environment, device) for name, value in self.keywords.items()
        }


def step_of(node: Node, ends: tuple[str, ...]) -> Step:
    """Raises ``KeyError`` for an operation that this release of torch does not have."""
    keywords = dict(node.keywords)
    if node.operator is None:
        return Step(node, NUMBER_CALLS[node.target], node.positional, keywords, False, ends)
    own = _OWN_CALLS.get(node.target)
    if own is not None:
        return Step(node, own, node.positional, keywords, False, ends)
    kinds = {parameter.kind for parameter in node.operator.parameters}
    if Kind.DEVICE in kinds and not kinds & {Kind.TENSOR, Kind.TENSORS}:
        keywords["device"] = Here()  # without it torch would make the tensor on the processor
    return Step(node, _torch_call(node.operator.name), node.positional, keywords, True, ends)


def _torch_call(name: str) -> Call:
    """``name`` is a key of ``packer.operators.OPERATORS``, never a text of a file."""
    _, base, overload = name.split(".")
    packet = getattr(torch.ops.aten, base, None)
    if packet is None or overload not in packet.overloads():
        raise KeyError(name)
    call: Call = getattr(packet, overload)
    return call


def _resolved(value: Argument, environment: Environment, device: torch.device) -> Value:
    match value:
        case Ref():
            return environment[value.name]
        case tuple():
            return [_resolved(item, environment, device) for item in value]
        case Dtype():
            return TORCH_DTYPES[value.datatype]
        case MemoryFormat():
            return _MEMORY_FORMATS[value.code]
        case Here():
            return device
        case _:
            return value


def tensors_in(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


# --- what torch's kernels do not look at ----------------------------------------------------------------


def prepared(step: Step, positional: list[Value], keywords: Mapping[str, Value]) -> list[Value]:
    """Positional arguments that are safe to hand over. Raises ``Refusal``."""
    target = step.node.target
    check = _CHECKS.get(target)
    if check is not None:
        check(step, _in_order(step, positional, keywords))
    if target in ("aten.index.Tensor", "aten.index_put.default"):
        positional = [positional[0], _places(positional[1]), *positional[2:]]
    return positional


def _in_order(step: Step, positional: list[Value], keywords: Mapping[str, Value]) -> list[Value]:
    """The arguments by place, None for what was left out before one that was given by its name."""
    operation = step.node.operator
    named = (
        [parameter.name for parameter in operation.parameters if not parameter.keyword] if operation else []
    )
    last = max((at for at, name in enumerate(named) if name in keywords), default=-1)
    return [*positional, *(keywords.get(name) for name in named[len(positional) : last + 1])]


def has_mask(step: Step, positional: Sequence[Value]) -> bool:
    """Whether the size of the result is a matter of the values of a mask."""
    return step.node.target == "aten.index.Tensor" and any(
        tensor.dtype == torch.bool for tensor in tensors_in(positional[1])
    )


def _places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks as the places that they name, as torch does inside, so that sizes can be told beforehand."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            check_bytes(index.numel() * max(index.dim(), 1) * 8)
            found.extend(index.nonzero().unbind(1))
        elif index is not None and index.dtype == torch.uint8:
            raise Refusal("an index of UINT8 is ambiguous; use BOOL or INT64")
        else:
            found.append(index)
    return found


def _check_split(step: Step, positional: Sequence[Value]) -> None:
    tensor, size, *dim = positional
    if size <= 0:
        raise Refusal("the size of a piece must be positive")
    _check_pieces(step, -(-_length(tensor, *dim) // size) or 1)


def _check_unbind(step: Step, positional: Sequence[Value]) -> None:
    _check_pieces(step, _length(*positional))


def _length(tensor: torch.Tensor, dim: int = 0) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise Refusal(f"has no dimension {dim}")
    return tensor.shape[dim]


def _check_pieces(step: Step, count: int) -> None:
    (names,) = step.node.outputs
    if count != len(names):
        raise Refusal(f"would give {count} pieces, the program expects {len(names)}")


def _check_count(step: Step, positional: Sequence[Value]) -> None:
    if not 0 < positional[1] <= ITEMS_MAX:
        raise Refusal(f"may give 1 to {ITEMS_MAX} pieces")


def _check_group_norm(step: Step, positional: Sequence[Value]) -> None:
    tensor, _, _, batch, channels, inner, _, *_ = positional
    if batch * channels * inner != tensor.numel() or min(batch, channels, inner) < 0:
        raise Refusal("sizes that are not those of the tensor")


def _check_weight_norm(step: Step, positional: Sequence[Value]) -> None:
    """The kernel reads and writes one norm per row, however many there are."""
    tensor, norms, *rest = positional
    dim = rest[0] if rest else 0
    if not 0 <= dim < tensor.dim():
        raise Refusal(f"has no dimension {dim}")
    if norms.shape != tuple(size if at == dim else 1 for at, size in enumerate(tensor.shape)):
        raise Refusal("norms must have one value per row")


def _check_windows(step: Step, positional: Sequence[Value]) -> None:
    """Some kernels walk over all places of a window, or of a result that has no elements."""
    for sizes in positional[1:]:
        places = math.prod(max(abs(size), 1) for size in sizes) if isinstance(sizes, list) else 0
        if places > WINDOW_PLACES_MAX:
            raise Refusal(f"sides of {sizes} are {places} places, the limit is {WINDOW_PLACES_MAX}")


def _check_transposed(step: Step, positional: Sequence[Value]) -> None:
    given: list[Value] = [*positional, *[None] * (8 - len(positional))]
    stride, rest = given[3], given[5:]
    if step.node.target == "aten.convolution.default":
        dilation, transposed, around, _ = rest[:4]
    else:
        around, _, dilation = rest[:3]
        transposed = True
    if not transposed:
        return
    sides, kernel = positional[0].shape[2:], positional[1].shape[2:]
    places = steps = 1
    for at, (side, width) in enumerate(zip(sides[-len(kernel) :], kernel, strict=False)):
        by = _of_side(stride, at, 1)
        places *= max((side - 1) * by, 0) + max(width - 1, 0) * _of_side(dilation, at, 1) + 1
        places += _of_side(around, at, 0)
        steps *= by
    if places > WINDOW_PLACES_MAX or places * steps > STRIDE_STEPS_MAX:
        raise Refusal(
            f"strides of {steps} places in all make {places} places before padding; the limits are "
            f"{WINDOW_PLACES_MAX} places, and {STRIDE_STEPS_MAX} of places times strides"
        )


def _of_side(sizes: Value, at: int, otherwise: int) -> int:
    """Of one size for all sides, or a size for each; torch refuses negative ones itself."""
    if not isinstance(sizes, list) or not sizes:
        return otherwise
    return max(int(sizes[at] if at < len(sizes) else sizes[0]), otherwise)


def _check_pad(step: Step, positional: Sequence[Value]) -> None:
    """A side that is cut while the tensor goes on in a circle leaves places of the result unfilled."""
    if len(positional) > 2 and positional[2] == "circular" and any(size < 0 for size in positional[1]):
        raise Refusal("what goes on in a circle can not be cut at the same time")


def _check_truncated(step: Step, positional: Sequence[Value]) -> None:
    """The least integer by -1 is a trap of the processor, which ends the process."""
    number, by = positional[:2]
    if step.keywords.get("rounding_mode") != "trunc" or number.device.type != "cpu":
        return
    dtype = torch.result_type(number, by)
    if dtype in (torch.int32, torch.int64) and _holds(number, torch.iinfo(dtype).min) and _holds(by, -1):
        raise Refusal("the least integer and -1 are among what is to be divided")


def _holds(value: Value, wanted: int) -> bool:
    """Whether an integer may be among some; takes no memory for it."""
    if not isinstance(value, torch.Tensor):
        return bool(value == wanted)
    if not value.numel() or not value.dtype.is_signed:
        return False
    least, most = torch.aminmax(value)
    return bool(least <= wanted <= most)


def _check_batch_norm(step: Step, positional: Sequence[Value]) -> None:
    tensor, *statistics = positional[:5]
    channels = tensor.shape[1] if tensor.dim() > 1 else -1
    if any(each is not None and each.shape != (channels,) for each in statistics):
        raise Refusal("statistics must have one value per channel")


def _check_recurrent(step: Step, positional: Sequence[Value]) -> None:
    """Some kernels of recurrent layers take the sizes of weights for granted."""
    data, state, weights, has_biases, layers, _, _, both_ways, batch_first = positional
    gates = 4 if step.node.target == "aten.lstm.input" else 3
    states = [state] if isinstance(state, torch.Tensor) else list(state)
    ways, per_layer = 1 + both_ways, 4 if has_biases else 2
    if not states or data.dim() != 3 or any(each.dim() != 3 for each in states):
        raise Refusal("states and inputs of a recurrent layer must have 3 dimensions")
    width, batch = states[0].shape[2], data.shape[0 if batch_first else 1]
    if not 0 < layers * ways * per_layer == len(weights) or any(
        each.shape != (layers * ways, batch, width) for each in states
    ):
        raise Refusal("a recurrent layer has other states or weights than its layers need")
    for number, weight in enumerate(weights):
        layer, part = number // (ways * per_layer), number % per_layer
        taken = (data.shape[2] if layer == 0 else width * ways) if part == 0 else width
        if weight.shape != ((gates * width, taken) if part < 2 else (gates * width,)):
            raise Refusal(f"weight {number} of a recurrent layer has another size")


_CHECKS: Mapping[str, Callable[[Step, Sequence[Value]], None]] = {
    "aten.split.Tensor": _check_split,
    "aten.unsafe_split.Tensor": _check_split,
    "aten.unbind.int": _check_unbind,
    "aten.chunk.default": _check_count,
    "aten.tensor_split.sections": _check_count,
    "aten.lstm.input": _check_recurrent,
    "aten.gru.input": _check_recurrent,
    "aten.native_group_norm.default": _check_group_norm,
    "aten._native_batch_norm_legit_no_training.default": _check_batch_norm,
    "aten._weight_norm.default": _check_weight_norm,
    "aten.pad.default": _check_pad,
    "aten.convolution.default": _check_transposed,
    **dict.fromkeys((name for name in OPERATORS if "conv_transpose" in name), _check_transposed),
    **dict.fromkeys((name for name in OPERATORS if "pool" in name), _check_windows),
    **dict.fromkeys(
        (
            "aten.div.Tensor_mode",
            "aten.div.Scalar_mode",
            "aten.divide.Tensor_mode",
            "aten.divide.Scalar_mode",
        ),
        _check_truncated,
    ),
}


# --- sizes beforehand -----------------------------------------------------------------------------------


def check_bytes(nbytes: int, alive_bytes: int = 0) -> None:
    if nbytes + alive_bytes > RUN_BYTES_MAX:
        raise Refusal(
            f"would take {nbytes} bytes beside {alive_bytes}, the limit of a request is {RUN_BYTES_MAX}: "
            "send smaller inputs"
        )


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every tensor that is made inside, also by the parts of composed operations."""

    def __init__(self, alive_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive_bytes = alive_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        options = dict(kwargs or {})
        result: Value = NotImplemented
        # Its parts would be those of the slowest of its implementations, which no real device takes.
        if func is not torch.ops.aten.scaled_dot_product_attention.default and func._can_decompose():
            with self:
                result = func.decompose(*args, **options)
        if result is NotImplemented:
            result = func(*args, **options)
        for tensor in tensors_in(result):
            check_bytes(max(_logical_bytes(tensor), tensor.untyped_storage().nbytes()), self._alive_bytes)
        return result


def _logical_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_size(step: Step, positional: list[Value], keywords: Mapping[str, Value], alive_bytes: int) -> None:
    """Raise ``Refusal`` if the step would take more than a request may."""
    if step.node.target in SIZED_BY_VALUES:
        largest = max((tensor.numel() * max(tensor.dim(), 1) for tensor in tensors_in(positional)), default=0)
        if step.node.target == "aten.masked_select.default":
            shapes = [each.shape for each in tensors_in(positional)]
            largest = torch.broadcast_shapes(*shapes).numel()  # type: ignore[no-untyped-call]
        check_bytes(largest * 8, alive_bytes)
        return
    meta = torch.device("meta")
    without = [_on_meta(value) for value in positional]
    options = {name: _on_meta(value) for name, value in keywords.items()}
    if "device" in options:
        options["device"] = meta
    with _Sizes(alive_bytes):
        step.call(*without, **options)


def _on_meta(value: Value) -> Value:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list):
        return [_on_meta(item) for item in value]
    return torch.device("meta") if isinstance(value, torch.device) else value
