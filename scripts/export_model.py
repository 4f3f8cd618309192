#!/usr/bin/env python3
"""Write a model directory for the export engine from a program of torch.export.

    scripts/export_model.py my_model.pt2 DIRECTORY          # saved with torch.export.save
    scripts/export_model.py my_package.models:make DIRECTORY  # a function of yours that returns a program
    bunk model push DIRECTORY my-net

Covers: the graph as torch itself writes it without its remarks (they hold your source), weights as
safetensors with tied ones stored once, names of inputs and outputs, rewriting operations that write to their
argument, and the check that control makes at push time. Does not cover: exporting, which is yours to do:

    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))

Only run it on programs of your own: a .pt2 file may hold pickles, which a directory written by this does not.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from packer.layout import header_bytes, parse_header
from packer.program import BadProgram, parse
from packer.tensor_model import (
    CONFIG_FILE,
    EXPORT_ENGINE,
    FORMAT,
    PROGRAM_FILE,
    BadTensorModel,
    check_weights,
    read_tensor_model,
)
from packer.types import FREE_DIMENSION, BadValue

WEIGHTS_FILE = "model.safetensors"


class CanNotExport(ValueError):
    """This program can not become a model directory. Says why and the way out."""


def write_model(
    program: torch.export.ExportedProgram,
    directory: Path,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
) -> Path:
    """Write the directory. Without names inputs are called as in ``forward``, outputs by the keys of the
    dictionary that it returns, or ``output_0`` and so on. Raises ``CanNotExport``."""
    program = without_writes(program)
    outputs = list(output_names) or _output_names(program)
    graph = graph_json(program)
    try:
        checked = parse(graph)
    except BadProgram as error:
        raise CanNotExport(str(error)) from None
    weights, tied = _weights(program)
    inputs = list(input_names) or [port.name for port in checked.inputs]
    if (len(inputs), len(outputs)) != (len(checked.inputs), len(checked.outputs)):
        raise CanNotExport(
            f"{len(inputs)} input and {len(outputs)} output names for {len(checked.inputs)} inputs and "
            f"{len(checked.outputs)} outputs"
        )
    facts = [port.facts for port in checked.inputs] + [checked.facts[name] for name in checked.outputs]
    ports = [
        {
            "name": name,
            "datatype": each.datatype,
            "shape": [size if isinstance(size, int) else FREE_DIMENSION for size in each.shape],
        }
        for name, each in zip([*inputs, *outputs], facts, strict=True)
    ]
    config = {
        "engine": EXPORT_ENGINE,
        "format": FORMAT,
        "inputs": ports[: len(inputs)],
        "outputs": ports[len(inputs) :],
        "tied": tied,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PROGRAM_FILE).write_bytes(graph)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, directory / WEIGHTS_FILE)
    _check(directory)
    return directory


def _check(directory: Path) -> None:
    """What control does at push time."""
    files = {name: (directory / name).read_bytes() for name in (CONFIG_FILE, PROGRAM_FILE)}
    data = (directory / WEIGHTS_FILE).read_bytes()
    try:
        model = read_tensor_model(files)
        size = header_bytes(data[:8], len(data))
        check_weights(model, parse_header(data[8 : 8 + size], WEIGHTS_FILE, len(data)))
    except (BadTensorModel, BadValue) as error:
        raise CanNotExport(str(error)) from None


# --- the graph --------------------------------------------------------------------------------------


def graph_json(program: torch.export.ExportedProgram) -> bytes:
    """The graph as torch saves it, without source lines, examples and what else nobody here reads."""
    saved = io.BytesIO()
    try:
        torch.export.save(program, saved)
    except NotImplementedError as error:
        raise CanNotExport(
            f"torch can not save it: {error} (let forward return tensors, tuples or dictionaries)"
        ) from None
    with zipfile.ZipFile(saved) as archive:
        (name,) = [name for name in archive.namelist() if "/models/" in name and name.endswith(".json")]
        whole = json.loads(archive.read(name))
    module = whole["graph_module"]
    for node in module["graph"]["nodes"]:
        node["metadata"] = {}
    module["module_call_graph"], module["metadata"] = [], {}
    return json.dumps(whole, separators=(",", ":")).encode()


def without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with operations that write to their argument (``relu_``) replaced by their plain twins.

    Only where nobody can have seen the write: else torch's own functionalization does it, which fixes the
    strides of this machine into views.
    """
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    writing = [node for node in program.graph.nodes if _writes(node)]
    if not all(_is_private(node, order) and _twin(node) is not None for node in writing):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 about its own code
            program = program.run_decompositions({})
        writing = []
    for node in writing:
        (target, *rest), twin = node.args, _twin(node)
        with program.graph.inserting_after(node):
            new = program.graph.call_function(twin, (target, *rest), dict(node.kwargs))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        for user in [user for user in target.users if order.get(user, -1) > order[node]]:
            user.replace_input_with(target, new)
        program.graph.erase_node(node)
        _rename_output(program, node.name, new.name)
    program.graph_module.recompile()
    return program


def _rename_output(program: torch.export.ExportedProgram, old: str, new: str) -> None:
    for spec in program.graph_signature.output_specs:
        if getattr(spec.arg, "name", None) == old:
            spec.arg.name = new


def _schema(node: torch.fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _writes(node: torch.fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable and str(node.target) != "aten.detach_.default"


def _is_view(node: torch.fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _is_private(node: torch.fx.Node, order: Mapping[torch.fx.Node, int]) -> bool:
    """Nobody but the node itself looks at the memory that it writes to."""
    target = node.args[0] if node.args else None
    if not isinstance(target, torch.fx.Node) or target.op != "call_function":
        return False
    seen = [user for user in target.users if order[user] < order[node] and _is_view(user)]
    return not seen and (_writes(target) or not _is_view(target))


def _twin(node: torch.fx.Node) -> Any:
    """``aten.relu.default`` for ``aten.relu_.default``."""
    _, base, overload = str(node.target).split(".")
    packet = getattr(torch.ops.aten, base.removesuffix("_"), None) if base.endswith("_") else None
    return getattr(packet, overload, None)


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    spec = program.call_spec.out_spec
    if spec is not None and spec.type is dict and len(spec.context) == count:
        return [str(name) for name in spec.context]
    return [f"output_{number}" for number in range(count)]


# --- weights ----------------------------------------------------------------------------------------


def _weights(program: torch.export.ExportedProgram) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every parameter, buffer and constant by its name, and the names of those that are another one."""
    stored: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        found = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if not isinstance(found, torch.Tensor):
            raise CanNotExport(f"{spec.target} is no tensor; objects can not be part of a model")
        tensor = found.detach()
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and same in seen:
            tied[spec.target] = seen[same]
            continue
        seen[same] = spec.target
        stored[spec.target] = tensor.cpu().contiguous().clone()
    if not stored:
        raise CanNotExport("has no weights; a model must have at least one")
    return stored, tied


# --- command ------------------------------------------------------------------------------------------


def load_program(source: str) -> torch.export.ExportedProgram:
    """From a .pt2 file, or from a function ``module:name`` that takes nothing."""
    if source.endswith(".pt2"):
        return torch.export.load(source)
    module, _, name = source.partition(":")
    sys.path.insert(0, "")
    found = getattr(importlib.import_module(module), name)()
    if not isinstance(found, torch.export.ExportedProgram):
        raise CanNotExport(f"{source} returned {type(found).__name__}, not a program of torch.export")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="a .pt2 file, or module:function that returns an ExportedProgram")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--inputs", default="", metavar="NAMES", help="names of the inputs, with commas")
    parser.add_argument("--outputs", default="", metavar="NAMES", help="names of the outputs, with commas")
    options = parser.parse_args()
    names = [[name for name in text.split(",") if name] for text in (options.inputs, options.outputs)]
    try:
        write_model(load_program(options.source), options.directory, *names)
    except CanNotExport as error:
        sys.exit(f"export_model: {error}")
    print(f"written: {options.directory}; push it with: bunk model push {options.directory} NAME")


if __name__ == "__main__":
    main()
