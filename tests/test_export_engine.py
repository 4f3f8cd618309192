"""The export engine against the programs themselves, in this process.

Covers: equality with ``program.module()`` to the bit for several small real models in four dtypes and with
other batches than the one of the export, what a request may get wrong, weights that come and go, and writing
a directory. Does not cover: hostile programs (``test_hostile_programs``), the checks of a directory
(``test_program``) or processes (``test_program_worker``).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_model import CanNotExport, write_model
from export_samples import (
    SAMPLES,
    Loaded,
    Mlp,
    cast_inputs,
    infer_request,
    load_program,
    program_of,
    write_sample,
)
from safetensors.torch import load_file
from torch import nn

from agent.early import Gate, GateFailed
from agent.facade import EngineError, EngineRequest
from packer.layout import lay_out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def loaded(root: Path) -> Mapping[str, Loaded]:
    return {name: load_program(write_sample(name, root / name)) for name in SAMPLES}


def flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values()) if isinstance(result, dict) else list(result)  # type: ignore[call-overload]


def plain(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return flat(program.module()(*inputs))


def same(ours: Mapping[str, torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours.values(), theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- fidelity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_batch_is_equal_to_the_program_to_the_bit(
    loaded: Mapping[str, Loaded], name: str, batch: int
) -> None:
    torch.manual_seed(batch)
    inputs = SAMPLES[name].inputs(batch)
    wanted = plain(program_of(name), inputs)
    for _ in range(2):  # with sizes looked at and without
        same(loaded[name].ask(inputs), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_equal_to_the_bit(root: Path, dtype: torch.dtype) -> None:
    model = load_program(write_sample("mlp", root / f"mlp-{dtype}", dtype))
    inputs = cast_inputs(SAMPLES["mlp"].inputs(4), dtype)
    same(model.ask(inputs), plain(program_of("mlp", dtype), inputs))


def test_an_empty_batch_is_answered_with_empty_tensors(loaded: Mapping[str, Loaded]) -> None:
    assert loaded["mlp"].ask([torch.zeros(0, 16)])["output_0"].shape == (0, 4)


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
def test_recurrent_layers_and_reductions_of_torch_are_equal_to_the_bit(root: Path) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(12, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen, _ = self.gru(self.lstm(x)[0])
            return seen.std(dim=1) / (seen.norm(dim=1) + 1e-6), seen.cumsum(1).argmax(-1)

    torch.manual_seed(2)
    inputs = (torch.randn(2, 5, 4),)
    program = torch.export.export(Layers().eval(), inputs)
    model = load_program(write_model(program, root / "layers"))
    same(model.ask(inputs), plain(program, inputs))


# --- requests -------------------------------------------------------------------------------------


def test_outputs_come_as_asked_for(loaded: Mapping[str, Loaded]) -> None:
    inputs = SAMPLES["attention"].inputs(2)
    everything = loaded["attention"].ask(inputs)
    some = loaded["attention"].ask(inputs, ["any", "scores"])
    assert list(everything) == ["scores", "tokens", "any"]
    assert list(some) == ["any", "scores"]
    assert torch.equal(some["scores"], everything["scores"])


def test_inputs_may_come_in_any_order(loaded: Mapping[str, Loaded]) -> None:
    x, state = SAMPLES["cell"].inputs(2)
    turned = loaded["cell"].send(infer_request(["state", "x"], [state, x]))
    assert torch.equal(turned["output_0"], loaded["cell"].ask([x, state])["output_0"])


def test_any_byte_but_zero_is_true(loaded: Mapping[str, Loaded]) -> None:
    ids, mask = SAMPLES["attention"].inputs(2)
    request = infer_request(["ids", "mask"], [ids, mask])
    odd = replace(request, body=request.body[: -mask.numel()] + bytes(7 * each for each in mask.flatten()))
    assert torch.equal(
        loaded["attention"].send(odd)["scores"], loaded["attention"].ask([ids, mask])["scores"]
    )


def wrong_requests() -> Mapping[str, tuple[EngineRequest, str]]:
    x, state = torch.zeros(2, 4), torch.zeros(2, 8)
    good = infer_request(["x", "state"], [x, state])
    return {
        "another op": (replace(good, op="embed"), "Open Inference Protocol"),
        "no inputs": (replace(good, fields={}), "missing required field `inputs`"),
        "inputs of text": (replace(good, fields={"inputs": "x"}), "Expected `array`"),
        "one missing": (infer_request(["x"], [x]), "'state' is missing"),
        "one unknown": (infer_request(["x", "state", "z"], [x, state, x]), "'z' is not one of x, state"),
        "one twice": (infer_request(["x", "x"], [x, x]), "'x' is given twice"),
        "an unknown output": (infer_request(["x", "state"], [x, state], ["y"]), "'y' is not one of output_0"),
        "an output twice": (infer_request(["x", "state"], [x, state], ["output_0"] * 2), "named twice"),
        "another datatype": (infer_request(["x", "state"], [x.double(), state]), "must be FP32"),
        "a datatype of no tensor": (
            replace(good, fields={"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}]}),
            "is no tensor",
        ),
        "a negative size": (
            replace(good, fields={"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -4]}]}),
            "is no tensor",
        ),
        "another rank": (
            infer_request(["x", "state"], [x[0], state]),
            r"must be FP32 \[-1, 4\], not FP32 \[4\]",
        ),
        "another size": (
            infer_request(["x", "state"], [torch.zeros(2, 5), state]),
            r"must have shape \[-1, 4\]",
        ),
        "two batches": (
            infer_request(["x", "state"], [x, torch.zeros(3, 8)]),
            "size 3 of dimension 0 must be 2",
        ),
        "too few bytes": (replace(good, body=good.body[:-1]), "take 96 bytes, 95 were sent"),
        "too many bytes": (replace(good, body=good.body + b"\0"), "take 96 bytes, 97 were sent"),
    }


@pytest.mark.parametrize("what", wrong_requests())
def test_a_wrong_request_is_told_what_is_wrong(loaded: Mapping[str, Loaded], what: str) -> None:
    request, message = wrong_requests()[what]
    with pytest.raises(EngineError, match=message) as refused:
        loaded["cell"].send(request)
    assert refused.value.code == "invalid_request"


def test_bounds_of_a_free_size_hold(root: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=4)
    program = torch.export.export(Mlp().eval(), (torch.randn(3, 16),), dynamic_shapes=({0: batch},))
    model = load_program(write_model(program, root / "bounded"))
    model.ask([torch.zeros(4, 16)])
    for size in (1, 5):
        with pytest.raises(EngineError, match="must be 2 to 4"):
            model.ask([torch.zeros(size, 16)])


def test_what_does_not_fit_inside_is_told_with_its_node(loaded: Mapping[str, Loaded]) -> None:
    ids, mask = SAMPLES["attention"].inputs(2)
    with pytest.raises(EngineError, match=r"node \d+ \(aten.embedding.default\): index out of range"):
        loaded["attention"].ask([ids + 50, mask])


def test_nobody_waits_for_an_answer_that_was_cancelled(loaded: Mapping[str, Loaded]) -> None:
    request = infer_request(["x"], SAMPLES["mlp"].inputs(1))
    frames: list[object] = []
    loaded["mlp"].model.run(request, frames.append, lambda: True)
    assert frames == []


# --- weights come and go --------------------------------------------------------------------------


def test_weights_are_views_that_go_and_come_back(root: Path) -> None:
    model = load_program(write_sample("mlp", root / "moving"))
    inputs = SAMPLES["mlp"].inputs(2)
    before = model.ask(inputs)
    model.model.detach()
    with pytest.raises(RuntimeError, match="no weights"):
        model.ask(inputs)
    assert model.image.close()  # nothing refers to the weights any more
    again = load_program(root / "moving")
    assert torch.equal(again.ask(inputs)["output_0"], before["output_0"])


def test_a_node_waits_for_the_weights_that_it_reads(root: Path) -> None:
    model = load_program(write_sample("mlp", root / "gated"))
    inputs = SAMPLES["mlp"].inputs(2)
    expected = model.ask(inputs)["output_0"]
    chunks = len(model.spec.chunk_bytes)
    layout = lay_out([placed.info for placed in model.model._placed.values()])
    gate = Gate(chunks, 0)
    assert list(model.model.serve_behind(gate, layout) or ()) == []
    answers: list[torch.Tensor] = []
    asking = threading.Thread(target=lambda: answers.append(model.ask(inputs)["output_0"]))
    asking.start()
    for number in range(chunks):
        assert not answers
        gate.placed(number)
    asking.join()
    assert torch.equal(answers[0], expected)
    failed = Gate(chunks, 0)
    model.model.serve_behind(failed, layout)
    failed.fail()
    with pytest.raises(GateFailed):
        model.ask(inputs)


# --- writing a directory --------------------------------------------------------------------------


def test_tied_weights_are_stored_once(loaded: Mapping[str, Loaded], root: Path) -> None:
    config = json.loads((root / "attention" / "config.json").read_bytes())
    assert config["tied"] in ({"head.weight": "words.weight"}, {"words.weight": "head.weight"})
    stored = load_file(root / "attention" / "model.safetensors")
    assert len(stored) == len(loaded["attention"].model._placed) - 1


def test_a_directory_holds_nothing_of_the_source(loaded: Mapping[str, Loaded], root: Path) -> None:
    text = (root / "attention" / "program.json").read_text()
    assert "export_samples" not in text
    assert ".py" not in text
    written = {path.name for path in (root / "attention").iterdir()}
    assert written == {"config.json", "program.json", "model.safetensors"}


def test_names_can_be_given_and_must_be_enough(root: Path) -> None:
    program = program_of("cell")
    model = load_program(write_model(program, root / "named", ["a", "b"], ["new", "limited", "same"]))
    assert list(model.ask(SAMPLES["cell"].inputs(1))) == ["new", "limited", "same"]
    with pytest.raises(CanNotExport, match="1 input and 3 output names for 2 inputs"):
        write_model(program, root / "misnamed", ["a"])


def test_a_model_that_changes_its_buffers_is_refused(root: Path) -> None:
    program = torch.export.export(nn.BatchNorm1d(4).train(), (torch.randn(3, 4),))
    with pytest.raises(CanNotExport, match=r"batch_norm.*not supported"):
        write_model(program, root / "training")


def test_an_unsupported_operation_is_refused_by_its_name(root: Path) -> None:
    class Transform(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.fft.rfft(x).abs()
            return result

    program = torch.export.export(Transform(), (torch.randn(3, 4),))
    with pytest.raises(CanNotExport, match="fft"):
        write_model(program, root / "transform")
