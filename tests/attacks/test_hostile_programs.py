"""Programs that are meant to do harm: run code, take memory, change weights, or read what is not theirs.

Covers: operations and names that must be refused when a directory is pushed, files that could run code, bombs
of sizes, of nesting and of text, weights after every kind of write, and memory that nobody filled. Does not
cover: mistakes (``test_program``), or what one worker process can reach at all (``test_worker``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export_samples import Loaded, aten, describe_program, forge, load_program, node

from agent.engines import operations
from agent.engines.export import build
from agent.engines.model import BrokenModel
from agent.engines.operations import RUN_BYTES_MAX
from agent.facade import EngineError
from packer.directory import BadDirectory, check_paths
from packer.layout import lay_out
from packer.operators import OPERATORS
from packer.program import NODES_MAX, BadProgram, parse
from packer.types import GIB, Task

X = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])


def copy(output: str = "y", source: str = "x") -> dict[str, object]:
    return aten("clone.default", output, self=source)


def refused(directory: Path) -> str:
    with pytest.raises(BadDirectory) as error:
        describe_program(directory)
    return str(error.value)


# --- operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.add_.Tensor",
        "torch.ops.aten.relu_.default",
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.aten.resize_.default",
        "torch.ops.aten.copy_.default",
        "torch.ops.aten.clone.out",
        "torch.ops.aten.native_batch_norm.default",
        "torch.ops.aten.as_strided.default",
        "torch.ops.aten.empty.memory_format",
        "torch.ops.aten.empty_like.default",
        "torch.ops.aten.new_empty.default",
        "torch.ops.aten.empty_strided.default",
        "torch.ops.aten._embedding_bag.default",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.repeat_interleave.Tensor",
        "torch.ops.aten.one_hot.default",
        "torch.ops.aten.bincount.default",
        "torch.ops.aten.__class__.mro",
        "torch.ops.aten.clone.__call__",
        "torch.ops.higher_order.cond",
        "torch.ops.mine.run.default",
        "torch.ops.load_library",
        "torch.load",
        "torch.hub.load",
        "os.system",
        "builtins.eval",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "_operator.call",
        "math.factorial",
        "",
        "\0",
    ],
)
def test_what_is_not_on_the_list_is_refused_by_its_name(tmp_path: Path, target: str) -> None:
    message = refused(forge(tmp_path, [node(target, ["y"], self="x")]))
    assert message.startswith("program.json: node 0 (")
    assert repr(target)[1:-1] in message
    assert "not supported" in message


def test_no_operation_of_torch_that_writes_or_hands_out_memory_is_on_the_list() -> None:
    checked = 0
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        base, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, base, None) if namespace == "aten" else None
        if packet is None or (overload or "default") not in packet.overloads():
            continue
        schema = getattr(packet, overload or "default")._schema
        if schema.is_mutable or re.search(r"empty|as_strided|resize|storage|from_file|pin_memory", base):
            checked += 1
            assert f"aten.{base}.{overload or 'default'}" not in OPERATORS
    assert checked > 500


def test_a_worker_refuses_what_control_did_not_see(tmp_path: Path) -> None:
    good = describe_program(forge(tmp_path, [copy()]))
    assert good.engine == "export"
    layout = load_program(tmp_path).model._placed["p_w"]
    forge(tmp_path, [node("torch.ops.aten.copy_.default", ["y"], self="p_w", src="x")])
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    with pytest.raises(BrokenModel, match=r"aten\.copy_\.default"):
        build(Task.TENSORS, files, lay_out([layout.info]), "cpu")


# --- names, kinds and values ----------------------------------------------------------------------


WRONG_GRAPHS: Mapping[str, tuple[Sequence[dict[str, object]], str]] = {
    "a name that nobody made": ([copy("y", "z")], "'z' is not a tensor that was made before"),
    "a name that is made later": ([copy("y", "z"), copy("z", "x")], "'z' is not a tensor"),
    "a node that reads itself": ([copy("y", "y")], "'y' is not a tensor"),
    "a name made twice": ([copy("a"), copy("a"), copy("y")], "'a' is defined twice"),
    "a weight made again": ([copy("p_w"), copy("y")], "'p_w' is defined twice"),
    "a name without letters": ([copy(""), copy("y")], "must have 1 to 256 characters"),
    "a name without end": ([copy("a" * 257), copy("y")], "must have 1 to 256 characters"),
    "a tensor for a number": (
        [aten("select.int", "y", self="x", dim="x", index={"as_int": 0})],
        "argument dim: must be int, not as_tensor",
    ),
    "a number for a tensor": ([aten("relu.default", "y", self={"as_int": 1})], "must be Tensor, not as_int"),
    "a tensor where a size is named": (
        [aten("select.int", "y", self="x", dim={"as_sym_int": {"as_name": "x"}}, index={"as_int": 0})],
        "'x' is not a number",
    ),
    "a graph inside": (
        [aten("relu.default", "y", self={"as_graph": {"name": "g", "graph": {}}})],
        "must be Tensor, not as_graph",
    ),
    "an object": (
        [aten("relu.default", "y", self={"as_custom_obj": {"name": "o", "class_fqn": "os.system"}})],
        "not as_custom_obj",
    ),
    "a number beyond 64 bits": (
        [aten("select.int", "y", self="x", dim={"as_int": 2**63}, index={"as_int": 0})],
        "as_int|64 bits",
    ),
    "a float of text": ([aten("clamp.default", "y", self="x", min={"as_float": "1e9"})], "not a number"),
    "a dtype that is no number": (
        [aten("to.dtype", "y", self="x", dtype={"as_scalar_type": 10})],
        "dtype 10 is not one of",
    ),
    "a layout that is not dense": (
        [aten("zeros_like.default", "y", self="x", layout={"as_layout": 1})],
        "only dense",
    ),
    "training": (
        [
            aten(
                "batch_norm.default",
                "y",
                input="x",
                weight="p_w",
                bias="p_w",
                running_mean="p_w",
                running_var="p_w",
                training={"as_bool": True},
                momentum={"as_float": 1.0},
                eps={"as_float": 1e-5},
                cudnn_enabled={"as_bool": False},
            )
        ],
        "argument training: must be false",
    ),
    "statistics that would change": (
        [
            aten(
                "instance_norm.default",
                "y",
                input="x",
                weight={"as_none": True},
                bias={"as_none": True},
                running_mean="p_w",
                running_var="p_w",
                use_input_stats={"as_bool": True},
                momentum={"as_float": 1.0},
                eps={"as_float": 1e-5},
                cudnn_enabled={"as_bool": False},
            )
        ],
        "would change its running statistics",
    ),
    "a mode that kernels do not know": (
        [
            aten(
                "grid_sampler_2d.default",
                "y",
                input="x",
                grid="x",
                interpolation_mode={"as_int": 7},
                padding_mode={"as_int": 0},
                align_corners={"as_bool": False},
            )
        ],
        "interpolation_mode: must be 0 to 2",
    ),
    "an equation that is a program": (
        [
            aten(
                "einsum.default",
                "y",
                equation={"as_string": "__import__('os')"},
                tensors={"as_tensors": [{"name": "x"}]},
            )
        ],
        "not an equation",
    ),
    "a list without end": (
        [aten("cat.default", "y", tensors={"as_tensors": [{"name": "x"}] * 1025})],
        "a list has 1025 members, the limit is 1024",
    ),
}


@pytest.mark.parametrize("what", WRONG_GRAPHS)
def test_a_graph_that_does_not_hold_together_is_refused(tmp_path: Path, what: str) -> None:
    nodes, message = WRONG_GRAPHS[what]
    assert re.search(message, refused(forge(tmp_path, nodes)))


def test_too_many_nodes_are_refused(tmp_path: Path) -> None:
    nodes = [copy(f"a{number}") for number in range(NODES_MAX)]
    assert "nodes" in refused(forge(tmp_path, [*nodes, copy()]))


# --- text -----------------------------------------------------------------------------------------


def test_expressions_of_sizes_are_never_evaluated(tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    attack = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    directory = forge(tmp_path / "model", [copy()])
    program = json.loads((directory / "program.json").read_bytes())
    graph = program["graph_module"]["graph"]
    for name in ("x", "y"):
        graph["tensor_values"][name]["sizes"][0]["as_expr"]["expr_str"] = attack
    graph["sym_int_values"] = {"s0": {"as_expr": {"expr_str": attack}}}
    program["range_constraints"] = {attack: {"min_val": 0, "max_val": None}}
    program["guards_code"] = [attack]
    program["verifiers"] = [attack]
    program["graph_module"]["module_call_graph"] = [{"fqn": attack, "signature": None}]
    (directory / "program.json").write_text(json.dumps(program))
    assert torch.equal(load_program(directory).ask([X])["y"], X)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 1_000_000, '{"graph_module":' + "[" * 1_000_000])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(BadProgram):
        parse(text.encode())


def test_deep_nesting_inside_an_argument_is_refused(tmp_path: Path) -> None:
    directory = forge(tmp_path, [copy()])
    text = (directory / "program.json").read_text()
    deep = '{"as_graph":' * 1000 + "1" + "}" * 1000
    (directory / "program.json").write_text(text.replace('{"as_tensor": {"name": "x"}}', deep, 1))
    assert "recursion depth" in refused(directory)


def test_a_program_of_very_many_objects_is_refused_before_they_are_made() -> None:
    with pytest.raises(BadProgram, match="the limits are"):
        parse(b'{"a":[' + b"{}," * 500_000 + b"{}]}")


@pytest.mark.parametrize("size", ["1" + "0" * 4000, "-1"])
@pytest.mark.parametrize("form", ['{"as_int":%s}', '{"as_expr":{"expr_str":"s0","hint":{"as_int":%s}}}'])
def test_sizes_of_thousands_of_digits_are_refused(tmp_path: Path, size: str, form: str) -> None:
    directory = forge(tmp_path, [copy()])
    program = json.loads((directory / "program.json").read_bytes())
    program["graph_module"]["graph"]["tensor_values"]["y"]["sizes"] = ["here"]
    text = json.dumps(program).replace('"here"', form % size)
    with pytest.raises(BadProgram, match=r"'y': a size is not a number from 0 to"):
        parse(text.encode())


@pytest.mark.parametrize(
    "name",
    ["model.pt2", "weights.pt", "data.pkl", "model.pth", "weights.bin", "constants.npz", "model.py", "a.so"],
)
def test_files_that_could_run_code_do_not_get_in(name: str) -> None:
    files = [("config.json", 1), ("program.json", 1), ("model.safetensors", 1), (name, 1)]
    with pytest.raises(BadDirectory, match=re.escape(name)):
        check_paths(files)


# --- memory ---------------------------------------------------------------------------------------


def ones(*sizes: int) -> dict[str, object]:
    return aten("full.default", "big", size={"as_ints": list(sizes)}, fill_value={"as_float": 1.0})


HUGE = 10**12
BOMBS: Mapping[str, Sequence[dict[str, object]]] = {
    "a terabyte of ones": [ones(HUGE), copy()],
    "sizes whose product is beyond 64 bits": [ones(2**40, 2**40), copy()],
    "a range": [aten("arange.default", "big", end={"as_int": HUGE}), copy()],
    "a square": [aten("eye.default", "big", n={"as_int": 10**6}), copy()],
    "repeats": [aten("repeat.default", "big", self="x", repeats={"as_ints": [10**6, 10**6]}), copy()],
    "an expanded view": [aten("expand.default", "big", self="p_w", size={"as_ints": [HUGE, 4]}), copy()],
    "padding": [aten("constant_pad_nd.default", "big", self="x", pad={"as_ints": [HUGE, 0]}), copy()],
    "an outer product": [
        aten("arange.default", "long", end={"as_int": 10**5}, dtype={"as_scalar_type": 7}),
        aten("outer.default", "big", self="long", vec2="long"),
        copy(),
    ],
    "a picture": [
        aten("reshape.default", "picture", self="x", shape={"as_ints": [1, 1, 2, 4]}),
        aten(
            "upsample_nearest2d.vec",
            "big",
            input="picture",
            output_size={"as_ints": [10**6, 10**6]},
            scale_factors={"as_none": True},
        ),
        copy(),
    ],
}


@pytest.mark.parametrize("what", BOMBS)
def test_memory_is_refused_before_it_is_taken(tmp_path: Path, what: str) -> None:
    model = load_program(forge(tmp_path, BOMBS[what]))
    # A kernel that had tried to take it would have ended in MemoryError, if the machine had noticed at all.
    with pytest.raises(EngineError, match=r"would take \d{10,} bytes beside \d+|calculation overflowed"):
        model.ask([X])


def test_results_that_are_alive_at_once_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "RUN_BYTES_MAX", 100_000)
    small = {"size": {"as_ints": [10_000]}, "fill_value": {"as_float": 1.0}}
    kept = [aten("full.default", f"part{number}", **small) for number in range(3)]
    whole = aten("cat.default", "all", tensors={"as_tensors": [{"name": f"part{n}"} for n in range(3)]})
    with pytest.raises(EngineError, match=r"node 2 .* would take 40000 bytes beside 80032"):
        load_program(forge(tmp_path / "kept", [*kept, whole, copy()])).ask([X])
    # One after the other, each is gone when the next comes.
    ended = [aten("full.default", f"part{number}", **small) for number in range(3)]
    read = [aten("sum.default", f"sum{number}", self=f"part{number}") for number in range(3)]
    in_turn = [each for pair in zip(ended, read, strict=True) for each in pair]
    assert torch.equal(load_program(forge(tmp_path / "ended", [*in_turn, copy()])).ask([X])["y"], X)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("split.Tensor", {"split_size": {"as_int": 1}}),
        ("unsafe_split.Tensor", {"split_size": {"as_int": 1}}),
        ("unbind.int", {}),
        ("chunk.default", {"chunks": {"as_int": 10**9}}),
        ("tensor_split.sections", {"sections": {"as_int": 10**9}}),
    ],
)
def test_pieces_are_counted_before_they_are_made(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    cut = aten(name, "part", self="wide", **options)
    cut["outputs"] = [{"as_tensors": [{"name": "part"}]}]
    wide = aten("expand.default", "wide", self="one", size={"as_ints": [10**8]})
    one = aten("select.int", "one", self="p_w", dim={"as_int": 0}, index={"as_int": 0})
    model = load_program(forge(tmp_path, [one, wide, cut, copy()]))
    with pytest.raises(EngineError, match=r"would give \d+ pieces|may give 1 to"):
        model.ask([X])


@pytest.mark.parametrize("exponent", [65, 10**9])
def test_numbers_of_a_program_do_not_grow(tmp_path: Path, exponent: int) -> None:
    number = {"as_sym_int": {"as_name": "n"}}
    size = aten("sym_size.int", "", self="x", dim={"as_int": 1})
    power = node("_operator.pow", [], a=number, b={"as_int": exponent})
    size["outputs"], power["outputs"] = [number], [{"as_sym_int": {"as_name": "m"}}]
    model = load_program(forge(tmp_path, [size, power, copy()]))
    with pytest.raises(EngineError, match=r"a power is too great|64 bits"):
        model.ask([X])


def test_a_result_that_is_too_large_to_send_is_refused(tmp_path: Path) -> None:
    nodes = [aten("repeat.default", "y", self="x", repeats={"as_ints": [10**6, 10]})]
    model = load_program(forge(tmp_path, nodes, (None, 40)))
    with pytest.raises(EngineError, match="the outputs take 320000000 bytes"):
        model.ask([X])


# --- weights and other people's memory ------------------------------------------------------------


def image_bytes(model: Loaded) -> bytes:
    with model.image.reading(0, model.image.nbytes) as view:
        return bytes(view)


def test_no_operation_changes_a_weight_whatever_it_is_given(tmp_path: Path) -> None:
    """Every allowed operation that can be called with the weight alone, or twice, leaves it as it was."""
    model = load_program(forge(tmp_path, [copy()]))
    before = image_bytes(model)
    ran = 0
    for name, each in OPERATORS.items():
        _, base, overload = name.split(".")
        required = [parameter for parameter in each.parameters if parameter.required]
        if any(parameter.kind.value != "Tensor" for parameter in required) or not required:
            continue
        call = getattr(getattr(torch.ops.aten, base), overload)
        weight = model.model._weights["p_w"]
        try:
            with torch.inference_mode():
                call(*(weight for _ in required))
        except (RuntimeError, IndexError, ValueError, NotImplementedError):
            continue  # not for a tensor of this shape
        ran += 1
        assert image_bytes(model) == before, name
    assert ran > 150


def test_a_view_of_a_weight_that_is_given_out_is_a_copy(tmp_path: Path) -> None:
    model = load_program(forge(tmp_path, [aten("alias.default", "y", self="p_w")], (4,)))
    before = image_bytes(model)
    answer = model.ask([X])["y"]
    answer.zero_()
    assert image_bytes(model) == before
    assert torch.equal(model.ask([X])["y"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((None, 5), 7), ((4,), 7), ((None, 4), 8)],
)
def test_an_output_that_is_not_as_it_was_declared_is_refused(
    tmp_path: Path, shape: Sequence[int | None], dtype: int
) -> None:
    model = load_program(forge(tmp_path, [copy()], shape, dtype))
    with pytest.raises(EngineError, match="the signature says"):
        model.ask([X])


def test_statistics_of_another_size_are_not_read_past_their_end(tmp_path: Path) -> None:
    norm = node(
        "torch.ops.aten._native_batch_norm_legit_no_training.default",
        ["y", "a", "b"],
        input="wide",
        weight="p_w",
        bias="p_w",
        running_mean="p_w",
        running_var="p_w",
        momentum={"as_float": 0.1},
        eps={"as_float": 1e-5},
    )
    wide = aten("repeat.default", "wide", self="x", repeats={"as_ints": [1, 1000]})
    model = load_program(forge(tmp_path, [wide, norm]))
    with pytest.raises(EngineError, match="one value per channel"):
        model.ask([X])


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_weights_of_recurrent_layers_are_not_read_past_their_end(tmp_path: Path, repeats: int) -> None:
    small = aten("repeat.default", "small", self="p_w", repeats={"as_ints": [16, repeats]})
    data = aten("reshape.default", "data", self="x", shape={"as_ints": [1, 2, 4]})
    state = aten("zeros_like.default", "state", self="data")
    layer = node(
        "torch.ops.aten.lstm.input",
        ["y", "h", "c"],
        input="data",
        hx={"as_tensors": [{"name": "state"}, {"name": "state"}]},
        params={"as_tensors": [{"name": "small"}, {"name": "p_w"}, {"name": "p_w"}, {"name": "p_w"}]},
        has_biases={"as_bool": True},
        num_layers={"as_int": 1},
        dropout={"as_float": 0.0},
        train={"as_bool": False},
        bidirectional={"as_bool": False},
        batch_first={"as_bool": False},
    )
    model = load_program(forge(tmp_path, [small, data, state, layer], (1, 2, 4)))
    with pytest.raises(EngineError, match=r"weight \d of a recurrent layer has another size"):
        model.ask([X])


@pytest.mark.parametrize("dim", [0, 1, -1, 2, 2**40])
def test_norms_of_weights_are_not_read_past_their_end(tmp_path: Path, dim: int) -> None:
    norm = aten("_weight_norm.default", "y", v="wide", g="p_w", dim={"as_int": dim})
    wide = aten("repeat.default", "wide", self="x", repeats={"as_ints": [100_000, 1]})
    model = load_program(forge(tmp_path, [wide, norm]))
    with pytest.raises(EngineError, match=r"one value per row|has no dimension"):
        model.ask([X])


@pytest.mark.parametrize(("sides", "fills"), [([-1, 1], False), ([1, -2], False), ([1, 2], True)])
def test_a_circle_that_is_cut_gives_out_no_memory_that_nobody_filled(
    tmp_path: Path, sides: Sequence[int], fills: bool
) -> None:
    """Torch leaves places of the result as they were before: what another request had there."""
    row = aten("reshape.default", "row", self="x", shape={"as_ints": [1, 2, 4]})
    pad = aten("pad.default", "y", self="row", pad={"as_ints": sides}, mode={"as_string": "circular"})
    model = load_program(forge(tmp_path, [row, pad], (1, 2, None)))
    if fills:
        wanted = torch.nn.functional.pad(X.reshape(1, 2, 4), tuple(sides), mode="circular")
        assert torch.equal(model.ask([X])["y"], wanted)
        return
    with pytest.raises(EngineError, match="in a circle"):
        model.ask([X])


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "sizes"),
    [
        ("adaptive_max_pool2d.default", [1, 2, 4], ["y", "at"], {"output_size": [2**31, 0]}),
        ("adaptive_avg_pool3d.default", [1, 2, 2, 2], ["y"], {"output_size": [2**20, 2**20, 0]}),
        ("max_pool1d.default", [1, 2, 4], ["y"], {"kernel_size": [2**32 + 1]}),
        # Given by its name, because the stride before it is left out.
        ("max_pool1d.default", [1, 2, 4], ["y"], {"kernel_size": [2], "dilation": [2**40]}),
    ],
)
def test_a_window_is_not_walked_over_for_hours(
    tmp_path: Path, name: str, shape: list[int], outputs: Sequence[str], sizes: Mapping[str, list[int]]
) -> None:
    image = aten("reshape.default", "image", self="x", shape={"as_ints": shape})
    given = {what: {"as_ints": each} for what, each in sizes.items()}
    pool = node(f"torch.ops.aten.{name}", list(outputs), self="image", **given)
    model = load_program(forge(tmp_path, [image, pool]))
    with pytest.raises(EngineError, match=r"sides of .* are \d+ places"):
        model.ask([X])


FAR: Mapping[str, tuple[bool, Mapping[str, list[int]]]] = {
    "a stride": (True, {"stride": [32_768, 32_768]}),
    "one stride for all sides": (True, {"stride": [32_768]}),
    "a result that is cut off": (True, {"stride": [32_768, 32_768], "padding": [16_384, 16_384]}),
    "a dilation": (True, {"dilation": [2**30, 2**30]}),
    "what is added": (True, {"stride": [8_192, 8_192], "output_padding": [8_000, 8_000]}),
    "a usual one": (False, {"stride": [512, 2]}),
}


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("refused", "sizes"), FAR.values(), ids=FAR)
def test_a_transposed_convolution_does_not_walk_over_its_strides_for_minutes(
    tmp_path: Path, refused: bool, sizes: Mapping[str, list[int]], in_order: bool
) -> None:
    """Of BF16 a stride of 32,768 takes minutes, and one with a padding ended the process."""
    image = aten("reshape.default", "image", self="x", shape={"as_ints": [1, 1, 2, 4]})
    kernel = aten("reshape.default", "kernel", self="p_w", shape={"as_ints": [1, 1, 2, 2]})
    before = {"stride": [1, 1], "padding": [0, 0], "output_padding": [0, 0]} if in_order else {}
    given: dict[str, Any] = {what: {"as_ints": each} for what, each in {**before, **sizes}.items()}
    given |= {"bias": {"as_none": True}, "groups": {"as_int": 1}} if in_order else {}
    up = node("torch.ops.aten.conv_transpose2d.input", ["up"], input="image", weight="kernel", **given)
    rows = aten("reshape.default", "y", self="up", shape={"as_ints": [-1, 4]})
    model = load_program(forge(tmp_path, [image, kernel, up, rows]))
    if refused:
        with pytest.raises(EngineError, match="places before padding"):
            model.ask([X])
        return
    weights = torch.arange(4.0).reshape(1, 1, 2, 2)
    wanted = torch.nn.functional.conv_transpose2d(X.reshape(1, 1, 2, 4), weights, stride=(512, 2))
    assert torch.equal(model.ask([X])["y"], wanted.reshape(-1, 4))


def test_a_norm_per_row_is_taken(tmp_path: Path) -> None:
    g = aten("reshape.default", "g", self="p_w", shape={"as_ints": [1, 4]})
    model = load_program(
        forge(tmp_path, [g, aten("_weight_norm.default", "y", v="x", g="g", dim={"as_int": 1})])
    )
    with torch.inference_mode():
        wanted = torch._weight_norm(X, torch.arange(4.0).reshape(1, 4), 1)
    assert torch.equal(model.ask([X])["y"], wanted)


@pytest.mark.parametrize(
    "name", ["div.Tensor_mode", "divide.Tensor_mode", "div.Scalar_mode", "divide.Scalar_mode"]
)
def test_a_division_that_a_processor_can_not_do_is_refused(tmp_path: Path, name: str) -> None:
    """It ends a process at once."""
    long = {"as_scalar_type": 5}
    least = aten("full_like.default", "least", self="x", fill_value={"as_int": -(2**63)}, dtype=long)
    by = aten("to.dtype", "by", self="x", dtype=long)
    other: object = {"as_int": -1} if "Scalar" in name else "by"
    divide = aten(name, "y", self="least", other=other, rounding_mode={"as_string": "trunc"})
    model = load_program(forge(tmp_path, [least, by, divide], (None, 4), 5))
    with pytest.raises(EngineError, match=r"the least integer and -1"):
        model.ask([-X])
    if "Tensor" in name:
        assert torch.equal(
            model.ask([X])["y"], torch.full((2, 4), -(2**63)).div(X.long(), rounding_mode="trunc")
        )


def test_limits_are_what_this_file_says() -> None:
    assert RUN_BYTES_MAX == 2 * GIB
