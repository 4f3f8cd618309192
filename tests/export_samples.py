"""Small real models for tests of the export engine, as programs and as model directories.

Covers: the models, writing and describing their directories, and asking a built one. Does not cover: tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from export_model import write_model
from safetensors.torch import save_file
from tiny_models import described_files, opened
from torch import nn

from agent.arena import Image, allocate_image
from agent.engines.export import ExportModel, build
from agent.engines.operations import TORCH_DTYPES
from agent.facade import JSON, EngineFrame, EngineRequest
from packer.directory import inspect, json_paths
from packer.ingest import Ingest
from packer.layout import header_bytes, parse_header
from packer.operators import DTYPE_NAMES
from packer.sources import FileSource
from packer.types import ModelRef, ModelSpec, Task

DATATYPES = {dtype: datatype for datatype, dtype in TORCH_DTYPES.items()}
REF = ModelRef("acme", "net", "0" * 16)


class Mlp(nn.Module):
    """Dynamic batch, an activation in place, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(inplace=True), nn.LayerNorm(32), nn.Linear(32, 4), nn.Softmax(-1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


class ConvNet(nn.Module):
    """Convolutions with running statistics, pooling, a residual connection in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.group = nn.GroupNorm(2, 8)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm(self.first(image)))
        x = x + nn.functional.gelu(self.group(self.second(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        result: torch.Tensor = self.head(self.up(self.pool(x)).flatten(1))
        return result


class Attention(nn.Module):
    """A transformer layer over tokens, two inputs, a dictionary of outputs, tied weights, a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        length = ids.shape[1]
        places = torch.arange(length, device=ids.device) / math.sqrt(16)
        x = self.words(ids) + places[None, :, None]
        q = k = v = x.view(ids.shape[0], length, 2, 8).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + seen.transpose(1, 2).reshape(ids.shape[0], length, 16)
        x = self.layer(x, src_key_padding_mask=~mask)
        best = self.head(x).topk(3, dim=-1)
        return {"scores": best.values, "tokens": best.indices, "any": mask.any(dim=1)}


class Cell(nn.Module):
    """A recurrent cell by hand, with a constant, buffers of both kinds, and one input that is also an
    output."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(12, 16)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 8))
        self.register_buffer("shift", torch.full((8,), 0.25), persistent=False)
        self.bias = torch.arange(8.0)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for _ in range(3):
            update, candidate = self.gates(torch.cat([x, state], dim=1)).chunk(2, dim=1)
            update = torch.sigmoid(update)
            state = update * state + (1 - update) * torch.tanh(candidate * self.scale + self.shift)
        limited = torch.where(state > 0.5, state, torch.tensor([-1.5])).clamp(-1, float("inf"))
        return state, limited + self.bias, x


class Selection(nn.Module):
    """Results as large as the values say: masks and places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = x * self.weight
        return scaled[scaled > 0], torch.nonzero(x > 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """A model and how it is exported; ``inputs`` makes inputs for a batch."""

    module: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    free: Sequence[int] = (0,)  # dimensions that are free, in every input


def _tokens(batch: int) -> tuple[torch.Tensor, ...]:
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[0, 5:] = False
    return torch.randint(0, 50, (batch, 7)), mask


SAMPLES: Mapping[str, Sample] = {
    "mlp": Sample(Mlp, lambda batch: (torch.randn(batch, 16),)),
    "conv": Sample(ConvNet, lambda batch: (torch.randn(batch, 3, 8, 8),)),
    "attention": Sample(Attention, _tokens),
    "cell": Sample(Cell, lambda batch: (torch.randn(batch, 4), torch.randn(batch, 8))),
    "selection": Sample(Selection, lambda batch: (torch.randn(batch, 6),)),
}


@cache
def program_of(name: str, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    sample = SAMPLES[name]
    torch.manual_seed(1)
    module = sample.module().to(dtype).eval()
    inputs = cast_inputs(sample.inputs(3), dtype)
    batch = torch.export.Dim("batch")
    shapes = tuple(dict.fromkeys(sample.free, batch) for _ in inputs)
    return torch.export.export(module, inputs, dynamic_shapes=shapes)


def cast_inputs(inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)


def write_sample(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    return write_model(program_of(name, dtype), directory)


# --- directories ------------------------------------------------------------------------------------


def describe_program(directory: Path, ref: ModelRef = REF) -> ModelSpec:
    """The version that control would register. Raises ``BadDirectory``."""
    files = described_files(directory)
    paths = [file.path for file in files]
    headers = {}
    for path in paths:
        if path.endswith(".safetensors"):
            data = (directory / path).read_bytes()
            size = header_bytes(data[:8], len(data), path)
            headers[path] = parse_header(data[8 : 8 + size], path, len(data))
    facts = inspect(paths, {path: (directory / path).read_bytes() for path in json_paths(paths)}, headers)
    return ModelSpec(
        ref,
        directory.as_uri(),
        tuple(files),
        facts.engine,
        facts.task,
        facts.image_bytes,
        facts.chunk_bytes,
        facts.workspace_bytes,
        created_ms=0,
        signature=facts.signature,
    )


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def infer_request(
    names: Sequence[str], inputs: Sequence[torch.Tensor], outputs: Sequence[str] = ()
) -> EngineRequest:
    described: list[JSON] = [
        {"name": name, "datatype": DATATYPES[each.dtype], "shape": list(each.shape)}
        for name, each in zip(names, inputs, strict=True)
    ]
    fields: dict[str, JSON] = {"inputs": described, "outputs": list(outputs)}
    return EngineRequest("infer", fields, b"".join(raw(each) for each in inputs))


def tensors_of(frame: EngineFrame) -> dict[str, torch.Tensor]:
    """The tensors of an answer, by name."""
    found: dict[str, torch.Tensor] = {}
    at = 0
    described = frame.header["outputs"]
    assert isinstance(described, list)
    for each in described:
        dtype, shape = TORCH_DTYPES[each["datatype"]], each["shape"]
        nbytes = math.prod(shape) * dtype.itemsize
        data = bytearray(frame.body[at : at + nbytes])
        found[each["name"]] = (
            torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
        ).reshape(shape)
        at += nbytes
    assert at == len(frame.body)
    return found


@dataclass
class Loaded:
    """A program with its weights in an image, as a worker has it."""

    model: ExportModel
    image: Image
    spec: ModelSpec

    def ask(self, inputs: Sequence[torch.Tensor], outputs: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        assert self.spec.signature is not None
        return self.send(infer_request([port.name for port in self.spec.signature.inputs], inputs, outputs))

    def send(self, request: EngineRequest) -> dict[str, torch.Tensor]:
        frames: list[EngineFrame] = []
        self.model.run(request, frames.append, lambda: False)
        (frame,) = frames
        return tensors_of(frame)


def load_program(directory: Path) -> Loaded:
    spec = describe_program(directory)
    with opened(directory, spec) as fds:
        sources = [(file, FileSource(fds[file.path])) for file in spec.files]
        source = Ingest(sources, REF, spec.engine, spec.task, None)
        source.open()
        assert source.layout.chunk_bytes == spec.chunk_bytes
        model = build(Task.TENSORS, source.side_files, source.layout, "cpu")
        image = allocate_image("cpu", source.layout)
        source.fill(image)
    model.attach(image)
    return Loaded(model, image, spec)


# --- programs by hand -------------------------------------------------------------------------------

FREE = {"as_expr": {"expr_str": "Symbol('s0', positive=True, integer=True)", "hint": {"as_int": 2}}}


def tensor_meta(dtype: int, *sizes: int | None) -> dict[str, object]:
    """As torch writes it; None: a free size."""
    return {"dtype": dtype, "sizes": [FREE if size is None else {"as_int": size} for size in sizes]}


def node(target: str, outputs: Sequence[str], **arguments: object) -> dict[str, object]:
    """One node; arguments are torch's unions, a text stands for a tensor's name."""
    inputs = [
        {"name": name, "arg": {"as_tensor": {"name": arg}} if isinstance(arg, str) else arg, "kind": 1}
        for name, arg in arguments.items()
    ]
    made = [{"as_tensor": {"name": name}} for name in outputs]
    return {"target": target, "inputs": inputs, "outputs": made, "metadata": {}}


def aten(name: str, output: str, **arguments: object) -> dict[str, object]:
    return node(f"torch.ops.aten.{name}", [output], **arguments)


def forge(
    directory: Path,
    nodes: Sequence[Mapping[str, object]],
    shape: Sequence[int | None] = (None, 4),
    dtype: int = 7,
) -> Path:
    """A directory whose program has an input ``x`` (FP32 [-1, 4]), a weight ``p_w`` (FP32 [4]), these nodes,
    and the output ``y``, which one of them makes. Nothing is checked."""
    values = {"x": tensor_meta(7, None, 4), "p_w": tensor_meta(7, 4), "y": tensor_meta(dtype, *shape)}
    inputs = [
        {"parameter": {"arg": {"name": "p_w"}, "parameter_name": "w"}},
        {"user_input": {"arg": {"as_tensor": {"name": "x"}}}},
    ]
    outputs = [{"user_output": {"arg": {"as_tensor": {"name": "y"}}}}]
    graph = {"nodes": nodes, "tensor_values": values}
    module = {"graph": graph, "signature": {"input_specs": inputs, "output_specs": outputs}}
    bounds = {"s0": {"min_val": 0, "max_val": None}}
    program = {"graph_module": module, "schema_version": {"major": 8}, "range_constraints": bounds}
    free = [-1 if size is None else size for size in shape]
    config = {
        "engine": "export",
        "format": 1,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": DTYPE_NAMES[dtype], "shape": free}],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "program.json").write_text(json.dumps(program))
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.arange(4.0)}, directory / "model.safetensors")
    return directory
