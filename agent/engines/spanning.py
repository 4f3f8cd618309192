"""Computing with weights that lie on several devices: activations go to where the next weights are.

Covers: hooks on a module whose layers are divided among devices, and the arguments of one operation. Does not
cover: which weights lie where (``packer/gangs.py``, ``agent/gang_image.py``), or the engines.

A gang is cut between layers, so each layer is on one device. Before it runs, whatever it is given goes to
that device: hidden states, masks, positions. What it keeps of a text (its part of the key-value cache) stays
there. All that lies outside of the layers computes where its weights are and gives its results back on the
first device, where inputs come in and answers are read. On one device, or on cpu devices, which share the
machine's memory, there is no hook at all.

The hooks were tested with devices that only exist by name; on GPUs nobody has run them yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# A device; tests have others than torch's.
Place = object
Where = Callable[[torch.Tensor], Place]
Carry = Callable[[torch.Tensor, Place], torch.Tensor]
_Value = TypeVar("_Value")


class SplitLayer(Exception):
    """The weights of one layer lie on two devices."""


def where(tensor: torch.Tensor) -> Place:
    return tensor.device


def carry(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    assert isinstance(place, torch.device)
    return tensor.to(place)


def brought(values: _Value, place: Place, carry: Carry = carry) -> _Value:
    """The same, with every tensor in it on this device. Looks into tuples, lists and dictionaries."""
    if isinstance(values, torch.Tensor):
        return carry(values, place)  # type: ignore[return-value]  # a tensor for a tensor
    if type(values) in (tuple, list):
        return type(values)(brought(value, place, carry) for value in values)  # type: ignore[call-arg, attr-defined]
    if isinstance(values, dict):
        changed = {name: brought(value, place, carry) for name, value in values.items()}
        if type(values) is dict:
            return changed  # type: ignore[return-value]
        for name, value in changed.items():  # an answer of transformers, which is a dictionary with names
            values[name] = value
    return values


@dataclass(frozen=True, slots=True)
class _Bring:
    place: Place
    carry: Carry

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return brought(args, self.place, self.carry), brought(kwargs, self.place, self.carry)


@dataclass(frozen=True, slots=True)
class _GiveBack:
    place: Place
    carry: Carry

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        return brought(output, self.place, self.carry)


def span(
    module: nn.Module, layers: Sequence[nn.Module], where: Where = where, carry: Carry = carry
) -> list[RemovableHandle]:
    """Hooks on a module with its weights in place; none if they lie on one device. Raises ``SplitLayer``."""
    parameters = list(module.parameters())
    if len({where(parameter): None for parameter in parameters}) < 2:
        return []
    first = where(parameters[0])
    hooks: list[RemovableHandle] = []
    inside: dict[nn.Module, None] = {}
    for number, layer in enumerate(layers):
        places = list({where(parameter): None for parameter in layer.parameters()})
        if len(places) > 1:
            raise SplitLayer(f"the weights of layer {number} lie on {len(places)} devices")
        inside.update(dict.fromkeys(layer.modules()))
        home = places[0] if places else first
        _carry_buffers(layer.modules(), home, carry)
        hooks.append(layer.register_forward_pre_hook(_Bring(home, carry), with_kwargs=True))
    if layers:
        hooks.append(layers[-1].register_forward_hook(_GiveBack(first, carry)))
    outside = [part for part in module.modules() if part not in inside]
    _carry_buffers(outside, first, carry)
    for part in outside:
        own = next((parameter for parameter in part._parameters.values() if parameter is not None), None)
        if own is not None and where(own) != first:
            hooks.append(part.register_forward_pre_hook(_Bring(where(own), carry), with_kwargs=True))
            hooks.append(part.register_forward_hook(_GiveBack(first, carry)))
    return hooks


def _carry_buffers(parts: Iterable[nn.Module], place: Place, carry: Carry) -> None:
    for part in parts:
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = carry(buffer, place)


def met(
    positional: list[Any], keywords: dict[str, Any], weights: Iterable[object], carry: Carry = carry
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of one operation, on one device: that of the largest weight among them, which stays
    where it is, else that of the first tensor."""
    tensors = [*_tensors_in(positional), *_tensors_in(list(keywords.values()))]
    if len({where(tensor): None for tensor in tensors}) < 2:
        return positional, keywords
    known = {id(weight): None for weight in weights}
    large = [tensor for tensor in tensors if id(tensor) in known]
    chosen = max(large, key=lambda tensor: tensor.numel() * tensor.element_size(), default=tensors[0])
    place = where(chosen)
    return brought(positional, place, carry), brought(keywords, place, carry)


def _tensors_in(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors_in(value)
