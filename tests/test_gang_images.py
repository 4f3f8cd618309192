"""Weights on several devices: an image in parts, and computing over it, without a second device.

Covers: cuts that are refused, hooks that bring activations to where the weights are, and the arguments of
single operations: real modules on devices that exist by name only, of which two may not be mixed in one
operation, as torch has it with real ones. Does not cover: GPUs, on which nobody has tried this yet; what
every image does (``test_images``); real workers (``test_gang_box``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engines import Loaded, load
from tiny_models import tiny_classifier, tiny_gpt2, tiny_llama
from torch.overrides import TorchFunctionMode

from agent.engines import spanning
from agent.gang_image import layouts
from packer.layout import TensorInfo, lay_out
from packer.tiers import TierError
from packer.types import MIB, Task

TEXT = "Hello, what is the weather on the range today?"


def tensors_in(values: object) -> Iterable[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


class Named(TorchFunctionMode):
    """Devices by name: what comes out of an operation is where its arguments were; what is made of nothing is
    on the first."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, tuple[torch.Tensor, str]] = {}
        self.carried: list[tuple[str, str]] = []

    def put(self, tensor: torch.Tensor, name: str) -> None:
        self._of[id(tensor)] = (tensor, name)

    def where(self, tensor: torch.Tensor) -> str:
        return self._of[id(tensor)][1] if id(tensor) in self._of else "first"

    def carry(self, tensor: torch.Tensor, place: object) -> torch.Tensor:
        assert isinstance(place, str)
        if self.where(tensor) == place:
            return tensor
        with torch._C.DisableTorchFunction():
            copy = tensor.clone()
        self.carried.append((self.where(tensor), place))
        self.put(copy, place)
        return copy

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Numbers travel with any kernel, as torch has it; an empty tensor is made where it is needed.
        values = args[:1] if func is torch.Tensor.__deepcopy__ else [args, kwargs or {}]
        given = [tensor for tensor in tensors_in(values) if tensor.dim() and tensor.numel()]
        names = {self.where(tensor): None for tensor in given}
        assert len(names) < 2, f"{func} mixes tensors of {list(names)}"
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if id(tensor) not in self._of or not any(tensor is each for each in given):
                self.put(tensor, next(iter(names), "first"))
        return result


def divided(loaded: Loaded, layers_on_first: int) -> Named:
    """The model's weights on two devices: the first layers and what comes before them on one."""
    model, named = loaded.model, Named()
    layers = list(model._layers() or ())
    second = {id(part): None for layer in layers[layers_on_first:] for part in layer.parameters()}
    inside = {id(part): None for layer in layers for part in layer.parameters()}
    for name, parameter in model._module.named_parameters():
        tail = id(parameter) not in inside and not any(word in name for word in ("embed", "wte", "wpe"))
        named.put(parameter, "second" if id(parameter) in second or tail else "first")
    model._span = spanning.span(model._module, layers, named.where, named.carry)
    return named


@pytest.mark.parametrize(
    ("make", "task", "op", "fields"),
    [
        (tiny_llama, Task.GENERATION, "generate", {"prompt": TEXT, "max_tokens": 5, "temperature": 0}),
        (tiny_gpt2, Task.GENERATION, "generate", {"prompt": TEXT, "max_tokens": 5, "temperature": 0, "n": 2}),
        (tiny_classifier, Task.CLASSIFICATION, "classify", {"inputs": [TEXT[:20]]}),
    ],
)
def test_a_model_on_two_devices_answers_as_on_one_and_mixes_them_nowhere(
    tmp_path: Path, make: Callable[[Path], Path], task: Task, op: str, fields: dict[str, Any]
) -> None:
    (tmp_path / "private").mkdir()
    loaded = load(make(tmp_path / "model"), task, tmp_path / "private")
    wanted = loaded.run(op, **fields)
    named = divided(loaded, 1)
    assert loaded.model._span
    with named:
        found = loaded.run(op, **fields)
    assert [(frame.header, frame.body) for frame in found] == [(frame.header, frame.body) for frame in wanted]
    assert ("first", "second") in named.carried
    assert ("second", "first") in named.carried
    loaded.model.detach()
    assert not loaded.model._span


def test_without_the_hooks_devices_are_mixed(tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    (tmp_path / "private").mkdir()
    loaded = load(tiny_llama(tmp_path / "model"), Task.GENERATION, tmp_path / "private")
    named = divided(loaded, 1)
    loaded.model._stop_spanning()
    with named, pytest.raises(AssertionError, match="mixes tensors of"):
        loaded.run("generate", prompt=TEXT, max_tokens=2)


def test_weights_on_one_device_have_no_hooks_and_a_layer_on_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    model = load(tiny_llama(tmp_path / "model"), Task.GENERATION, tmp_path / "private").model
    assert not model._span
    named, layers = Named(), list(model._layers() or ())
    named.put(next(layers[1].parameters()), "second")
    with pytest.raises(spanning.SplitLayer, match="layer 1 lie on 2 devices"):
        spanning.span(model._module, layers, named.where, named.carry)


def test_the_arguments_of_an_operation_meet_at_its_largest_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    named = Named()
    monkeypatch.setattr(spanning, "where", named.where)
    weight, bias, given, other = torch.ones(4, 4), torch.ones(4), torch.ones(100, 4), torch.ones(100, 4)
    for tensor, name in ((weight, "second"), (bias, "first"), (given, "first"), (other, "second")):
        named.put(tensor, name)
    (moved, same, small), more = spanning.met(
        [given, weight, bias], {"alpha": 2}, [weight, bias], named.carry
    )
    assert same is weight
    assert (named.where(moved), named.where(small), more) == ("second", "second", {"alpha": 2})
    (left, right), _ = spanning.met([given, other], {}, [weight], named.carry)
    assert left is given
    assert named.where(right) == "first"
    both = [given, [bias, 3]]
    assert spanning.met(both, {}, [], named.carry)[0] is both


# --- images -----------------------------------------------------------------------------------------


def test_a_cut_through_a_tensor_or_outside_of_the_image_is_refused() -> None:
    sizes = (2 * MIB, 9 * MIB)
    layout = lay_out(
        [TensorInfo(f"layers.{at}.w", "U8", (size,), "m", 0, size) for at, size in enumerate(sizes)]
    )
    assert len(layout.chunks) == 4
    first, second = layouts(layout, (1, 4))
    assert (first[0], first[1].image_bytes, second[0], second[1].image_bytes) == (
        0,
        sizes[0],
        sizes[0],
        sizes[1],
    )
    assert [placed.image_offset for placed in second[1].tensors] == [0]
    with pytest.raises(TierError, match=r"within tensor layers\.1\.w") as caught:
        layouts(layout, (2, 4))
    assert caught.value.broken
    for ends in ((1, 5), (1, 3), (2, 1, 4)):
        with pytest.raises(TierError, match="can not be cut at"):
            layouts(layout, ends)
