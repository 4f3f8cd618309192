"""The loaders that other projects offer, each as they say it is used, in a fresh child per load.

Covers: safetensors (with a clone, so that the tensors are the caller's own), fastsafetensors, the run:ai
model streamer and tensorizer, on cpu and, where there is one, on a GPU. Does not cover: installing them
(``peers_venv``), choosing their settings, or judging them (``bench_restore``).

Runs in the peers' virtualenv, started by ``fresh_child``. A loader that is not installed is
reported when it is asked for. Every load is compared with the file, byte for byte, after the clock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

# The streamer's log lines are not wanted, and asking for its module reads the level.
os.environ.setdefault("RUNAI_STREAMER_LOG_LEVEL", "ERROR")

import torch
from fresh_child import Reference, Settings, Stopwatch, read_every_byte, serve

Tensors = Mapping[str, torch.Tensor]


def _warm_up(settings: Settings) -> str:
    """Start CUDA before the clock, so that nobody pays for the first context."""
    device = str(settings.get("device", "cpu"))
    if device != "cpu":
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    return device


def _finish(device: str, tensors: Tensors, settings: Settings) -> None:
    """Until everything is there; ``touch``: and was read once."""
    if device != "cpu":
        torch.cuda.synchronize()
    elif settings.get("touch"):
        read_every_byte((tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values())


def load_safetensors(settings: Settings, clock: Stopwatch) -> Tensors:
    from safetensors.torch import load_file

    device = _warm_up(settings)
    with clock:
        loaded: dict[str, torch.Tensor] = load_file(settings["path"], device=device)
        # Without the clone a cpu tensor is a page of the file: the first use pays, and memory pressure
        # takes it away again. On a GPU it is the caller's own already.
        tensors = {name: tensor.clone() for name, tensor in loaded.items()} if device == "cpu" else loaded
        _finish(device, tensors, settings)
    return tensors


def load_fastsafetensors(settings: Settings, clock: Stopwatch) -> Tensors:
    loader_class = import_module("fastsafetensors").SafeTensorsFileLoader
    device = _warm_up(settings)
    with clock:
        loader = loader_class(
            None,
            device,
            bbuf_size_kb=settings.get("bbuf_size_kb", 16 * 1024),
            max_threads=settings.get("max_threads", 16),
            nogds=True,
        )
        loader.add_filenames({0: [settings["path"]]})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        _finish(device, tensors, settings)
    _KEPT.append((loader, buffers))
    return tensors


def load_runai(settings: Settings, clock: Stopwatch) -> Tensors:
    streamer_class = import_module("runai_model_streamer").SafetensorsStreamer
    device = _warm_up(settings)
    with clock, streamer_class() as streamer:
        streamer.stream_file(settings["path"], device=device)
        tensors = dict(streamer.get_tensors())
        _finish(device, tensors, settings)
    return tensors


def load_tensorizer(settings: Settings, clock: Stopwatch) -> Tensors:
    deserializer_class = import_module("tensorizer").TensorDeserializer
    device = _warm_up(settings)
    with clock:
        loaded = deserializer_class(
            settings["tensorizer_path"],
            device=device,
            num_readers=settings.get("num_readers"),
            verify_hash=settings.get("verify_hash", False),
        )
        tensors = dict(loaded.items())
        _finish(device, tensors, settings)
    _KEPT.append(loaded)
    return tensors


_LOADERS = {
    "safetensors": load_safetensors,
    "fastsafetensors": load_fastsafetensors,
    "runai_model_streamer": load_runai,
    "tensorizer": load_tensorizer,
}
_KEPT: list[object] = []  # what a loader's tensors need to stay valid until they are compared


def run_loader(settings: Settings, clock: Stopwatch) -> Mapping[str, Any]:
    """Load, then compare every tensor with the file."""
    tensors = _LOADERS[settings["loader"]](settings, clock)
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    spans = [(name, tensor.data_ptr(), tensor.nbytes) for name, tensor in held.items()]
    return {"compared_bytes": Reference(settings["reference"]).check(spans)}


def write_tensorizer(settings: Settings, clock: Stopwatch) -> Mapping[str, Any]:
    """Bring the model into tensorizer's own format; not measured."""
    from safetensors.torch import load_file

    with clock:
        serializer = import_module("tensorizer").TensorSerializer(settings["tensorizer_path"])
        serializer.write_state_dict(load_file(settings["path"]))
        serializer.close()
    return {}


def list_loaders(settings: Settings, clock: Stopwatch) -> Mapping[str, Any]:
    """Which loaders are here, with their versions."""
    return {name: version(name.replace("_", "-")) for name in _LOADERS if find_spec(name) is not None}


def _import_all() -> None:
    """Imports do not count, so they come before the fork."""
    logging.disable(logging.WARNING)
    for name in _LOADERS:
        if find_spec(name) is not None:
            import_module(name)
    if find_spec("safetensors") is not None:
        import_module("safetensors.torch")


if __name__ == "__main__":
    _import_all()
    serve({"load": run_loader, "write_tensorizer": write_tensorizer, "list": list_loaders})
