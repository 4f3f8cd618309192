"""Hostile arguments for the operations of pushed programs, in memory that tells who reads beyond it.

Covers: tensors between pages that nobody may touch, arguments of chance, and arguments that go together but
for some changes. Does not cover: calling anything with them (``fuzz_operators``).
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from agent.engines import operations
from packer.operators import CONSTANT_ONLY, DTYPE_NAMES, Kind, Operator, Parameter, refused_value
from packer.program import Node

PAGE_BYTES = mmap.PAGESIZE

SIZES = (0, 1, 1, 2, 2, 2, 3, 3, 4, 5)
SMALL = (0, 0, 1, 1, 1, 2, 2, 3, -1, -2)
HUGE = (5, 17, -3, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 + 1, 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, 1.0, 0.5, -1.0, 2.0, 1e-30, 1e30, -0.0, float("inf"), float("-inf"), float("nan"))
EQUATIONS = (
    "ij,jk->ik",
    "ii->i",
    "ij->",
    "i,j",
    "...i,...i",
    "ij,ij",
    "bij,bjk->bik",
    "i->ii",
    "ab,cd->abcd",
)
TEXTS: Mapping[str, Sequence[str]] = {
    "approximate": ("none", "tanh"),
    "rounding_mode": ("floor", "trunc"),
    "padding": ("valid", "same"),
    "reduce": ("sum", "prod", "mean", "amax", "amin", "add", "multiply"),
    "indexing": ("ij", "xy"),
    "mode": ("constant", "reflect", "replicate", "circular"),
    "equation": EQUATIONS,
    "assert_msg": ("no",),
}
# Arguments that go together, for operations that chance alone seldom calls: tuples are shapes of tensors,
# ``Places`` are tensors of places. Each call changes some of them.


@dataclass(frozen=True)
class Places:
    shape: tuple[int, ...]
    below: int


_LSTM = [(12, 5), (12, 3), (12,), (12,)]
_GRU = [(9, 5), (9, 3), (9,), (9,)]
FITTING: Mapping[str, Sequence[Any]] = {
    "_native_batch_norm_legit_no_training": [(2, 3, 4), (3,), (3,), (3,), (3,), 0.1, 1e-5],
    "_weight_norm": [(3, 4), (3, 1), 0],
    "adaptive_avg_pool2d": [(1, 2, 5, 5), [2, 3]],
    "adaptive_avg_pool3d": [(1, 2, 5, 5, 4), [2, 3, 2]],
    "adaptive_max_pool2d": [(1, 2, 5, 5), [2, 3]],
    "adaptive_max_pool3d": [(1, 2, 5, 5, 4), [2, 3, 2]],
    "affine_grid_generator": [(2, 2, 3), [2, 3, 4, 5], True],
    "addmm": [(2, 4), (2, 3), (3, 4)],
    "avg_pool1d": [(1, 2, 6), [2], [2], [1], True],
    "avg_pool2d": [(1, 2, 6, 6), [2, 3], [2, 1], [1, 1], True],
    "avg_pool3d": [(1, 2, 6, 6, 4), [2, 3, 2], [2, 1, 1], [1, 1, 1], True],
    "baddbmm": [(2, 3, 5), (2, 3, 4), (2, 4, 5)],
    "batch_norm": [(2, 3, 4), (3,), (3,), (3,), (3,), False, 0.1, 1e-5, False],
    "bmm": [(2, 3, 4), (2, 4, 5)],
    "bucketize": [(3, 4), (5,)],
    "cdist": [(2, 3, 4), (2, 5, 4), 2.0, None],
    "_cdist_forward": [(2, 3, 4), (2, 5, 4), 2.0, None],
    "channel_shuffle": [(2, 4, 3, 3), 2],
    "col2im": [(2, 12, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]],
    "conv1d": [(2, 4, 8), (6, 2, 3), (6,), [1], [1], [1], 2],
    "conv2d": [(2, 4, 6, 6), (6, 2, 3, 3), (6,), [1, 1], [1, 1], [1, 2], 2],
    "conv3d": [(1, 2, 4, 4, 4), (2, 2, 2, 2, 2), (2,), [1, 1, 1], [0, 1, 0], [1, 1, 1], 1],
    "conv_transpose1d": [(2, 4, 6), (4, 3, 3), (6,), [2], [1], [1], 2, [1]],
    "conv_transpose2d": [(2, 4, 3, 3), (4, 3, 3, 3), (6,), [2, 2], [1, 1], [1, 0], 2, [1, 1]],
    "conv_transpose3d": [
        (1, 2, 3, 3, 3),
        (2, 1, 2, 2, 2),
        (2,),
        [2, 2, 2],
        [0, 0, 0],
        [0, 0, 0],
        2,
        [1, 1, 1],
    ],
    "convolution": [(2, 4, 6), (6, 2, 3), (6,), [1], [1], [1], False, [0], 2],
    "cosine_similarity": [(2, 3), (2, 3), 1],
    "diagonal_scatter": [(4, 4), (3,), 1, 0, 1],
    "dot": [(4,), (4,)],
    "embedding": [(5, 3), Places((2, 3), 5), 1],
    "gather": [(4, 5), 1, Places((4, 3), 5)],
    "grid_sampler": [(1, 2, 4, 4), (1, 3, 3, 2), 0, 0, False],
    "grid_sampler_2d": [(1, 2, 4, 4), (1, 3, 3, 2), 0, 0, False],
    "group_norm": [(2, 4, 3), 2, (4,), (4,)],
    "gru": [(4, 2, 5), (1, 2, 3), _GRU, True, 1, 0.0, False, False, False],
    "im2col": [(2, 3, 6, 6), [2, 2], [1, 2], [1, 0], [2, 1]],
    "index": [(4, 5), [Places((3,), 4), Places((3,), 5)]],
    "index_add": [(4, 5), 0, Places((3,), 4), (3, 5)],
    "index_copy": [(4, 5), 0, Places((3,), 4), (3, 5)],
    "index_fill": [(4, 5), 0, Places((3,), 4), ()],
    "index_put": [(4, 5), [Places((3,), 4)], (3, 5), True],
    "index_select": [(4, 5), 0, Places((3,), 4)],
    "instance_norm": [(2, 3, 4), (3,), (3,), None, None, True, 0.1, 1e-5, False],
    "layer_norm": [(2, 3, 4), [4], (4,), (4,)],
    "linear": [(2, 3), (4, 3), (4,)],
    "lstm": [(4, 2, 5), [(1, 2, 3), (1, 2, 3)], _LSTM, True, 1, 0.0, False, False, False],
    "masked_scatter": [(3, 4), Places((3, 4), 2), (12,)],
    "matmul": [(2, 3, 4), (4, 5)],
    "max_pool1d": [(1, 2, 6), [2], [2], [1], [1], True],
    "max_pool1d_with_indices": [(1, 2, 6), [2], [2], [1], [1], True],
    "max_pool2d": [(1, 2, 6, 6), [2, 3], [2, 1], [1, 1], [1, 2], True],
    "max_pool2d_with_indices": [(1, 2, 6, 6), [2, 3], [2, 1], [1, 1], [1, 2], True],
    "max_pool3d": [(1, 2, 6, 6, 4), [2, 3, 2], [2, 1, 1], [1, 1, 1], [1, 1, 1], True],
    "max_pool3d_with_indices": [(1, 2, 6, 6, 4), [2, 3, 2], [2, 1, 1], [1, 1, 1], [1, 1, 1], True],
    "mm": [(2, 3), (3, 4)],
    "mv": [(3, 4), (4,)],
    "native_group_norm": [(2, 4, 3), (4,), (4,), 2, 4, 3, 2, 1e-5],
    "native_layer_norm": [(2, 3, 4), [4], (4,), (4,), 1e-5],
    "pad": [(1, 2, 5, 5), [1, 2, 0, 1], "reflect"],
    "pixel_shuffle": [(2, 8, 3, 3), 2],
    "pixel_unshuffle": [(2, 2, 4, 4), 2],
    "prelu": [(2, 3, 4), (3,)],
    "reflection_pad1d": [(2, 3, 5), [1, 2]],
    "reflection_pad2d": [(2, 3, 5, 5), [1, 2, 0, 1]],
    "reflection_pad3d": [(2, 3, 5, 5, 5), [1, 2, 0, 1, 1, 1]],
    "replication_pad1d": [(2, 3, 5), [1, 2]],
    "replication_pad2d": [(2, 3, 5, 5), [1, 2, 0, 1]],
    "replication_pad3d": [(2, 3, 5, 5, 5), [1, 2, 0, 1, 1, 1]],
    "scaled_dot_product_attention": [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (3, 5), 0.0, False],
    "scatter": [(4, 5), 1, Places((4, 3), 5), (4, 3)],
    "scatter_add": [(4, 5), 1, Places((4, 3), 5), (4, 3)],
    "scatter_reduce": [(4, 5), 1, Places((4, 3), 5), (4, 3), "amax"],
    "select_scatter": [(4, 5), (5,), 0, 2],
    "slice_scatter": [(4, 5), (2, 5), 0, 1, 3, 1],
    "take_along_dim": [(4, 5), Places((4, 3), 5), 1],
    "upsample_bicubic2d": [(1, 2, 4, 4), [6, 3], True, None],
    "_upsample_bicubic2d_aa": [(1, 2, 4, 4), [6, 3], True, None],
    "upsample_bilinear2d": [(1, 2, 4, 4), [6, 3], True, None],
    "_upsample_bilinear2d_aa": [(1, 2, 4, 4), None, False, [1.5, 0.5]],
    "upsample_linear1d": [(1, 2, 4), [6], True, None],
    "upsample_nearest1d": [(1, 2, 4), [6], None],
    "upsample_nearest2d": [(1, 2, 4, 4), [6, 3], None],
    "upsample_nearest3d": [(1, 2, 4, 4, 2), [6, 3, 3], None],
    "_upsample_nearest_exact1d": [(1, 2, 4), None, [2.5]],
    "_upsample_nearest_exact2d": [(1, 2, 4, 4), [6, 3], None],
    "upsample_trilinear3d": [(1, 2, 4, 4, 2), [6, 3, 3], True, None],
}
# What most calls have, and what only a hostile one would give.
DTYPES = (torch.float32, torch.float32, torch.float32, torch.int64, torch.int64, torch.bool)
RARE_DTYPES = tuple(operations.TORCH_DTYPES.values())

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass
class Fenced:
    """Memory between two pages that nobody may touch."""

    regions: list[tuple[int, int]] = field(default_factory=list)

    def tensor(self, data: torch.Tensor, at_end: bool) -> torch.Tensor:
        """The same values in such memory: no byte lies between them and the page behind, or before."""
        nbytes = data.numel() * data.element_size()
        if not nbytes:
            return data
        inner = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        length = inner + 2 * PAGE_BYTES
        start = _libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value)
        self.regions.append((start, length))
        _libc.mprotect(start + PAGE_BYTES, inner, mmap.PROT_READ | mmap.PROT_WRITE)
        address = start + PAGE_BYTES + (inner - nbytes if at_end else 0)
        memory = (ctypes.c_char * nbytes).from_address(address)
        made = torch.frombuffer(memory, dtype=data.dtype).view(data.shape)
        return made.copy_(data)

    def free(self) -> None:
        for start, length in self.regions:
            _libc.munmap(start, length)
        self.regions.clear()


class Arguments:
    """Draws arguments for one operation."""

    def __init__(self, operator: Operator, chance: random.Random, fenced: Fenced) -> None:
        self._operator = operator
        self._chance = chance
        self._fenced = fenced

    def draw(self) -> tuple[operations.Step, list[Any], dict[str, Any]]:
        """A step as a worker makes it of a node, and what it is called with."""
        chance = self._chance
        # Most kernels take tensors that go together; a call of nothing but chance seldom gets to one.
        self._dims = chance.choice((0, 1, 2, 2, 3, 3, 4, 5))
        self._shape = self._sizes(self._dims)
        self._dtype = chance.choice(DTYPES if chance.random() < 0.7 else RARE_DTYPES)
        self._alike = chance.choice((0.0, 0.5, 0.9, 1.0))
        self._hostile = chance.choice((0.0, 0.02, 0.1, 0.4))
        positional: list[Any] = []
        keywords: list[tuple[str, Any]] = []
        gap = False
        fitting = self._fitting() if chance.random() < 0.8 else []
        for number, parameter in enumerate(self._operator.parameters):
            if not parameter.required and chance.random() < 0.3:
                gap = True
                continue
            value = fitting[number] if number < len(fitting) else self._value(parameter)
            if parameter.keyword or gap:
                keywords.append((parameter.name, value))
            else:
                positional.append(value)
        node = Node(self._operator.name, self._operator, (), (), self._outputs())
        step = operations.step_of(node, ())
        here = torch.device("cpu")
        options = {name: operations._resolved(value, {}, here) for name, value in step.keywords.items()}
        return step, positional, {**options, **dict(keywords)}

    def _fitting(self) -> list[Any]:
        """Arguments that go together, some of them changed."""
        chance = self._chance
        wanted = FITTING.get(self._operator.name.split(".")[1])
        if wanted is None:
            return []
        self._dtype = torch.float32 if chance.random() < 0.8 else chance.choice(RARE_DTYPES)
        made = [self._fit(value) for value in wanted]
        kinds = self._operator.parameters
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            number = chance.randrange(min(len(made), len(kinds)))
            made[number] = self._changed(made[number], kinds[number])
        return made

    def _fit(self, value: Any) -> Any:
        match value:
            case Places():
                return self._fenced.tensor(torch.randint(0, value.below, value.shape), at_end=True)
            case tuple():
                return self._fenced.tensor(self._data(value, self._dtype), at_end=self._chance.random() < 0.8)
            case list():
                return [self._fit(each) for each in value]
        return value

    def _changed(self, value: Any, parameter: Parameter) -> Any:
        chance = self._chance
        if isinstance(value, list) and value and parameter.name not in CONSTANT_ONLY:
            changed = list(value)
            at = chance.randrange(len(changed))
            match chance.randrange(4):
                case 0:
                    del changed[at]
                case 1:
                    changed.append(changed[at])
                case _ if isinstance(changed[at], torch.Tensor):
                    changed[at] = self._resized(changed[at])
                case _:
                    changed[at] = chance.choice((*SMALL, *HUGE))
            return changed
        if isinstance(value, torch.Tensor) and chance.random() < 0.8:
            return self._resized(value)
        if parameter.kind is Kind.INT and parameter.name not in CONSTANT_ONLY:
            return chance.choice((*SMALL, *HUGE))
        return self._value(parameter)

    def _resized(self, tensor: torch.Tensor) -> torch.Tensor:
        """Another size, another number of dimensions, other values, or seen otherwise."""
        chance, shape = self._chance, list(tensor.shape)
        at = chance.randrange(len(shape) + 1)
        match chance.randrange(5):
            case 0 if at < len(shape):
                shape[at] = chance.choice((*SIZES, 7, 30))
            case 1 if at < len(shape):
                del shape[at]
            case 2:
                shape.insert(at, chance.choice((1, 1, 2)))
            case 3:
                return self._seen_otherwise(tensor)
        dtype = tensor.dtype if chance.random() < 0.8 else chance.choice(RARE_DTYPES)
        return self._fenced.tensor(self._data(shape, dtype), at_end=chance.random() < 0.8)

    def _outputs(self) -> tuple[str | tuple[str, ...], ...]:
        many = tuple("abcdefgh"[: self._chance.choice((1, 2, 3, 4))])
        return tuple(
            many if kind is Kind.TENSORS else f"r{number}"
            for number, kind in enumerate(self._operator.returns)
        )

    def _sizes(self, dims: int) -> tuple[int, ...]:
        return tuple(self._chance.choice(SIZES) for _ in range(dims))

    def _value(self, parameter: Parameter) -> Any:
        chance, name = self._chance, parameter.name
        if name in CONSTANT_ONLY:
            allowed = [
                value for value in (None, False, 0, 1, 2, True, 0.0) if refused_value(name, value) is None
            ]
            fitting = [value for value in allowed if (value is None) == parameter.optional]
            return chance.choice(fitting or allowed)
        if parameter.optional and chance.random() < 0.3:
            return None
        match parameter.kind:
            case Kind.TENSOR:
                return self._tensor()
            case Kind.TENSORS:
                return [self._tensor() for _ in range(chance.choice((0, 1, 2, 2, 3, 4, 8)))]
            case Kind.OPTIONAL_TENSORS:
                return [
                    self._tensor() if chance.random() < 0.7 else None
                    for _ in range(chance.choice((1, 1, 2, 3)))
                ]
            case Kind.INT:
                return self._integer()
            case Kind.INTS:
                if chance.random() < 0.2:
                    return list(self._shape)
                return [self._integer() for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4, 6)))]
            case Kind.FLOAT:
                return chance.choice(REALS)
            case Kind.FLOATS:
                return [chance.choice((*REALS, 1.5, 2.0, 0.1)) for _ in range(chance.choice((1, 2, 3)))]
            case Kind.SCALAR:
                return chance.choice((*SMALL, *REALS, True, False, -(2**63), 2**63 - 1))
            case Kind.BOOL:
                return chance.random() < 0.5
            case Kind.BOOLS:
                return [chance.random() < 0.5 for _ in range(3)]
            case Kind.TEXT:
                return chance.choice(TEXTS[name])
            case Kind.DTYPE:
                return operations.TORCH_DTYPES[chance.choice(list(DTYPE_NAMES.values()))]
            case Kind.MEMORY_FORMAT:
                return operations._MEMORY_FORMATS[chance.choice((1, 2, 3, 4))]
            case Kind.DEVICE:
                return torch.device("cpu")
        return None  # a layout, a generator

    def _integer(self) -> int:
        return self._chance.choice(HUGE if self._chance.random() < self._hostile else SMALL)

    def _tensor(self) -> torch.Tensor:
        chance = self._chance
        alike = chance.random() < self._alike
        shape = self._shape if alike else self._sizes(chance.choice((0, 1, 1, 2, 3, self._dims)))
        dtype = self._dtype if chance.random() < 0.8 else chance.choice(DTYPES)
        tensor = self._fenced.tensor(self._data(shape, dtype), at_end=chance.random() < 0.8)
        return self._seen_otherwise(tensor) if chance.random() < 0.3 else tensor

    def _data(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        chance = self._chance
        if dtype == torch.bool:
            return torch.rand(shape) > 0.5
        if dtype.is_floating_point:
            data = torch.randn(shape).to(dtype)
            if chance.random() < max(self._hostile, 0.05):
                data = torch.full(shape, chance.choice(REALS), dtype=torch.float64).to(dtype)
            return data
        limits = torch.iinfo(dtype)
        data = torch.randint(0, 3, shape).to(dtype)
        if chance.random() < max(self._hostile, 0.1):
            value = chance.choice((limits.min, limits.max, -1, *HUGE))
            data = torch.full(shape, min(max(value, limits.min), limits.max), dtype=dtype)
        elif chance.random() < 0.3:
            data = torch.randint(max(-3, limits.min), 9, shape).to(dtype)
        return data

    def _seen_otherwise(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view, as other operations of a program make them."""
        chance = self._chance
        match chance.randrange(4):
            case 0 if tensor.dim() > 1:
                return tensor.transpose(0, -1)
            case 1:
                return tensor.unsqueeze(0).expand(chance.choice((1, 2, 3)), *tensor.shape)
            case 2 if tensor.dim() and tensor.shape[0] > 1:
                return tensor[1:]
            case 3 if tensor.dim() and tensor.shape[-1]:
                return tensor[..., ::2]
        return tensor
