"""Programs as data: the allowed operations, and what control refuses of a directory before it is a version.

Covers: the table of operations against torch's own, each check of a program and of its directory, the order
of first use, the first estimate of the workspace. Does not cover: running one (``test_export_engine``) or
what is meant to do harm (``test_hostile_programs``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_samples import describe_program, write_sample
from safetensors.torch import load_file, save_file

from agent.engines.operations import _OWN_CALLS, NUMBER_CALLS
from packer.aten import SCHEMAS
from packer.directory import BadDirectory
from packer.layout import CHUNK_BYTES, OWN_CHUNK_BYTES, TensorInfo, lay_out
from packer.operators import NUMBERS_FROM_DATA, OPERATORS, SIZED_BY_VALUES, Kind
from packer.program import NUMBER_OPERATORS, parse
from packer.tensor_model import WORKSPACE_MIN_BYTES, first_uses, first_workspace_estimate, read_tensor_model
from packer.types import MIB, Task

Change = Callable[[dict[str, Any]], object]


def op_of(name: str) -> torch._ops.OpOverload:
    _, base, overload = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, base), overload)
    return found


# --- the table ------------------------------------------------------------------------------------


def test_every_line_is_torchs_own_signature() -> None:
    lines = SCHEMAS.strip().splitlines()
    assert [f"aten::{line}" for line in lines] == [str(op_of(name)._schema) for name in OPERATORS]
    assert len(lines) == len(set(lines)) > 300


def test_no_allowed_operation_writes_to_an_argument_or_leaves_memory_as_it_was() -> None:
    for name in OPERATORS:
        assert not op_of(name)._schema.is_mutable, name
        assert not re.search(r"empty|strided|resize|set_|storage|file", name), name


def test_every_allowed_operation_can_be_sized_without_memory() -> None:
    unsized = []
    for name in sorted(OPERATORS.keys() - _OWN_CALLS.keys() - SIZED_BY_VALUES):
        # What has a kernel of its own for tensors without memory, or is made of others that have.
        plain = name.removesuffix(".default").replace("aten.", "aten::", 1)
        composite = [f"Composite{kind}Autograd" for kind in ("Implicit", "Explicit")]
        keys = ("Meta", *composite, "CompositeExplicitAutogradNonFunctional")
        own = any(torch._C._dispatch_has_kernel_for_dispatch_key(plain, key) for key in keys)
        if not own and op_of(name) not in torch._decomp.global_decomposition_table["meta"]:
            unsized.append(name)
    assert unsized == []


def test_operations_that_give_numbers_are_our_own() -> None:
    numbers = {
        name for name, each in OPERATORS.items() if not set(each.returns) & {Kind.TENSOR, Kind.TENSORS}
    }
    assert numbers == _OWN_CALLS.keys()
    assert numbers >= NUMBERS_FROM_DATA
    assert NUMBER_OPERATORS.keys() == NUMBER_CALLS.keys()


# --- directories ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample("cell", tmp_path_factory.mktemp("cell"))


def copied(source: Path, to: Path, file: str = "", change: Change = lambda loaded: None) -> Path:
    to.mkdir(exist_ok=True)
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    if file:
        loaded = json.loads((to / file).read_bytes())
        change(loaded)
        (to / file).write_text(json.dumps(loaded))
    return to


def test_a_directory_becomes_a_version_with_its_signature(cell: Path) -> None:
    spec = describe_program(cell)
    assert (spec.engine, spec.task) == ("export", Task.TENSORS)
    assert spec.signature is not None
    assert [(port.name, port.datatype, port.shape) for port in spec.signature.inputs] == [
        ("x", "FP32", (-1, 4)),
        ("state", "FP32", (-1, 8)),
    ]
    assert [(port.name, port.shape) for port in spec.signature.outputs] == [
        ("output_0", (-1, 8)),
        ("output_1", (-1, 8)),
        ("output_2", (-1, 4)),
    ]
    assert spec.workspace_bytes == WORKSPACE_MIN_BYTES


def _node(loaded: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = loaded["graph_module"]["graph"]["nodes"][number]
    return found


BROKEN: dict[str, tuple[str, Change, str]] = {
    "another engine's format": ("config.json", lambda c: c.update(format=2), "format 1"),
    "no outputs": ("config.json", lambda c: c.update(outputs=[]), "outputs: must hold 1 to 64"),
    "a missing input": ("config.json", lambda c: c["inputs"].pop(), "has 1 tensors, the program 2"),
    "another datatype": (
        "config.json",
        lambda c: c["inputs"][0].update(datatype="FP16"),
        "'x' is FP16 .* the program has FP32",
    ),
    "a datatype that does not exist": (
        "config.json",
        lambda c: c["inputs"][0].update(datatype="BYTES"),
        "is not one of BOOL",
    ),
    "another shape": ("config.json", lambda c: c["outputs"][0].update(shape=[-1, 9]), r"\[-1, 8\]"),
    "a fixed size where it is free": (
        "config.json",
        lambda c: c["inputs"][0].update(shape=[3, 4]),
        r"the program has FP32 \[-1, 4\]",
    ),
    "a shape of text": ("config.json", lambda c: c["inputs"][0].update(shape="-1"), "Expected `array`"),
    "a weight tied to nothing": (
        "config.json",
        lambda c: c.update(tied={"bias": "x"}),
        "has no tensor for x",
    ),
    "a tie that is no weight": ("config.json", lambda c: c.update(tied={"no": "bias"}), "'no' is no weight"),
    "another schema": (
        "program.json",
        lambda p: p["schema_version"].update(major=9),
        "schema version 9, read is 8",
    ),
    "no graph": ("program.json", lambda p: p.pop("graph_module"), "missing required field `graph_module`"),
    "an argument of another name": (
        "program.json",
        lambda p: _node(p)["inputs"][0].update(name="sizes"),
        r"node 0 .*: argument \w+ is missing",
    ),
    "an argument too many": (
        "program.json",
        lambda p: _node(p)["inputs"].append({"name": "more", "arg": {"as_int": 1}, "kind": 1}),
        "has no argument 'more'",
    ),
    "an argument twice": (
        "program.json",
        lambda p: _node(p)["inputs"].append(_node(p)["inputs"][0]),
        "given twice",
    ),
    "an argument of another kind": (
        "program.json",
        lambda p: _node(p)["inputs"][0].update(arg={"as_string": "x"}),
        "must be Tensor.*, not as_string",
    ),
    "two values in one": (
        "program.json",
        lambda p: _node(p)["inputs"][0]["arg"].update(as_int=1),
        "is expected, not",
    ),
    "a result too many": (
        "program.json",
        lambda p: _node(p)["outputs"].append({"as_tensor": {"name": "more"}}),
        "gives 1 results, not 2",
    ),
    "an output that was never made": (
        "program.json",
        lambda p: p["graph_module"]["signature"]["output_specs"][0]["user_output"]["arg"]["as_tensor"].update(
            name="nobody"
        ),
        "'nobody' is not a tensor that was made before",
    ),
    "an output that changes a buffer": (
        "program.json",
        lambda p: (
            p["graph_module"]["signature"]["output_specs"][0].update(
                user_output=None, buffer_mutation={"arg": {"name": "x"}, "buffer_name": "scale"}
            )
            or p["graph_module"]["signature"]["output_specs"][0].pop("user_output")
        ),
        "weights are never written",
    ),
    "an unsupported dtype": (
        "program.json",
        lambda p: p["graph_module"]["graph"]["tensor_values"]["x"].update(dtype=10),
        "dtype 10 .* is not supported",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_directory_that_does_not_fit_together_is_refused_by_its_file(
    cell: Path, tmp_path: Path, what: str
) -> None:
    file, change, message = BROKEN[what]
    with pytest.raises(BadDirectory, match=message) as refused:
        describe_program(copied(cell, tmp_path, file, change))
    assert refused.value.path in (file, "model.safetensors")


@pytest.mark.parametrize("file", ["program.json", "config.json", "model.safetensors"])
def test_a_missing_file_is_named(cell: Path, tmp_path: Path, file: str) -> None:
    directory = copied(cell, tmp_path)
    (directory / file).unlink()
    with pytest.raises(BadDirectory, match=file):
        describe_program(directory)


def test_stored_tensors_are_exactly_the_weights_of_the_program(cell: Path, tmp_path: Path) -> None:
    weights = load_file(cell / "model.safetensors")
    for changed, message in (
        ({**weights, "more": torch.ones(1)}, "does not use: more"),
        ({name: each for name, each in weights.items() if name != "scale"}, "no tensor for scale"),
        ({**weights, "scale": torch.ones(9)}, r"scale is F32 \[9\], the program has FP32 \[8\]"),
        ({**weights, "scale": weights["scale"].half()}, r"scale is F16 \[8\], the program has FP32"),
    ):
        directory = copied(cell, tmp_path)
        save_file(changed, directory / "model.safetensors")
        with pytest.raises(BadDirectory, match=message):
            describe_program(directory)


# --- order and estimate ---------------------------------------------------------------------------


def test_weights_lie_in_the_order_in_which_a_run_needs_them(cell: Path) -> None:
    model = read_tensor_model({path.name: path.read_bytes() for path in cell.glob("*.json")})
    order = first_uses(model)
    assert set(order) == set(model.stored.values())
    assert order.index("gates.weight") < order.index("scale") < order.index("shift") < order.index("bias")


def test_large_weights_are_laid_out_by_use_and_small_ones_share_chunks() -> None:
    names = [f"t{number}" for number in range(12)]
    sizes = {name: 2 * MIB if number % 2 else 64 for number, name in enumerate(names)}
    infos = [TensorInfo(name, "U8", (size,), "f", 0, size) for name, size in sizes.items()]
    uses = [*reversed(names)]
    layout = lay_out(infos, uses)
    placed = [each.info.name for each in layout.tensors]
    large = [name for name in placed if sizes[name] >= OWN_CHUNK_BYTES]
    assert large == [name for name in uses if sizes[name] >= OWN_CHUNK_BYTES]
    assert len(layout.chunks) < len(names)
    assert lay_out([*reversed(infos)], uses) == layout
    stage = sum(size for size in sizes.values()) // CHUNK_BYTES
    assert abs(placed.index("t0") - uses.index("t0")) <= len(names) // stage


def test_the_workspace_is_what_is_alive_at_once_with_room_for_larger_batches(cell: Path) -> None:
    text = (cell / "program.json").read_bytes()
    program = parse(text)
    assert first_workspace_estimate(program) == WORKSPACE_MIN_BYTES
    loaded = json.loads(text)
    for meta in loaded["graph_module"]["graph"]["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["hint"] = {"as_int": 1 << 16}
    large = first_workspace_estimate(parse(json.dumps(loaded).encode()))
    assert 64 * MIB < large < 1024 * MIB
