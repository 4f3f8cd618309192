"""The transformers engine: a module skeleton to which an image's tensors are attached, and its answers.

Covers: building the module with its parameters on the meta device, matching stored tensors to
parameters (strictly, with the known spellings), attaching and detaching, and which part answers a request:
``vectors`` (embeddings and classification) or ``generation``. Does not cover: where the tensors' memory is
(``agent/arena.py``) or how it was filled (``packer/tiers.py``).

Nothing from a model directory is ever run: architectures come from an allow-list, remote code is off,
kernels and quantizers named by a configuration are not loaded.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agent.arena import DTYPES, Image
from agent.early import Gate, chunks_of
from agent.engines.decoding import Decoder, Text, write
from agent.engines.generation import Answer, GenerateFields, Writer, prompt_tokens
from agent.engines.model import BrokenModel
from agent.engines.pooling import BadPooling, Pooling, read_pooling
from agent.engines.sampling import Sampling, read_sampling
from agent.engines.side_files import BadSideFile, written
from agent.engines.spanning import SplitLayer, span
from agent.engines.vectors import EmbedFields, VectorAnswer, Vectors, check_tokens
from agent.facade import EngineError, EngineFrame, EngineRequest
from packer.directory import ARCHITECTURES
from packer.layout import WORKSPACE_TOKENS_MAX, ImageLayout, PlacedTensor
from packer.types import Task

# For models that declare no greatest length (ALiBi): what the workspace estimate assumes.
CONTEXT_TOKENS_DEFAULT = 2048
# Names in an error message; a wrong directory may miss thousands.
NAMES_SHOWN_MAX = 5

# Positions of these models start after the padding token's, so the last ones can not be used.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
# Buffers that older versions saved and that every module computes for itself.
_COMPUTED = re.compile(
    r"(?:^|\.)(?:position_ids|token_type_ids|inv_freq|masked_bias|attn\.bias|attention\.bias)$"
)
# Old spellings of the parameters of a layer norm.
_OLD_SPELLINGS = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))
_OPS = {"embed": Task.EMBEDDING, "classify": Task.CLASSIFICATION, "generate": Task.GENERATION}
_ROUTES = {
    Task.EMBEDDING: "/v1/embeddings",
    Task.CLASSIFICATION: "/v1/classify",
    Task.GENERATION: "/v1/completions or /v1/chat/completions",
    Task.TENSORS: "/v2/models/{model}/infer",
}
_Fields = TypeVar("_Fields", bound=msgspec.Struct)
# Building patches a method of every module class, so one at a time.
_building = threading.Lock()


# A list of one layer has nothing to compute while the rest of it comes.
LAYERS_MIN = 2


# --- building -------------------------------------------------------------------------------------


def warm_imports() -> None:
    """Import the code of every supported architecture, so that no first request pays for it. Runs no
    tensor operation: the nursery calls this and then forks."""
    for architecture in ARCHITECTURES:
        getattr(transformers, architecture)
    for name in (
        "PreTrainedTokenizerFast",
        "BertTokenizer",
        "GPT2Tokenizer",
        "LlamaTokenizer",
        "RobertaTokenizer",
    ):
        getattr(transformers, name)


def build(task: Task, files: Mapping[str, bytes], layout: ImageLayout, private: Path, device: str) -> Model:
    """The skeleton of a model, without weights. ``private`` is a directory (in memory where possible)
    in which the side files lie for a moment. Raises ``BrokenModel``."""
    try:
        with written(files, private) as directory:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        module = _build_module(config, task)
        pooling = read_pooling(files)
    except (BadPooling, BadSideFile) as error:
        raise BrokenModel(str(error)) from None
    except BrokenModel:
        raise
    except Exception as error:  # transformers raises anything when files do not fit together
        raise BrokenModel(
            f"transformers can not build it: {type(error).__name__}: {str(error)[:1000]}"
        ) from error
    slots = _match(module, task, layout)
    _move_buffers(module, device)
    return Model(task, module, tokenizer, slots, pooling, _sampling(files, config, tokenizer))


def _build_module(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    names = config.architectures or []
    known = ARCHITECTURES.get(names[0]) if len(names) == 1 else None
    if known is None or known != (config.model_type, task):
        raise BrokenModel(
            f"config.json: architecture {names} of {config.model_type} is not supported for {task}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise BrokenModel("config.json: quantized weights are not supported; push it in bf16, fp16 or fp32")
    model_class: type[PreTrainedModel] = getattr(transformers, names[0])
    # Whatever the file says: other names may be kernels from a registry. Some architectures have only the
    # plain form.
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    with _building, _parameters_on_meta():
        module = model_class(config)
    module.train(False)
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory and real buffers.

    Buffers must be real because those that no file holds (rotary frequencies, position numbers) are
    computed by the constructors.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _move_buffers(module: nn.Module, device: str) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def _sampling(
    files: Mapping[str, bytes], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Sampling:
    try:
        declared = json.loads(files.get("generation_config.json", b"{}"))
    except (ValueError, RecursionError):
        declared = {}
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    fallback = ends if isinstance(ends, list) else [ends]
    return read_sampling(
        declared if isinstance(declared, dict) else {}, [end for end in fallback if type(end) is int]
    )


# --- matching tensors to parameters -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in the module tree and the stored tensor that belongs there."""

    owner: nn.Module
    name: str
    stored: PlacedTensor
    is_buffer: bool

    def attach(self, image: Image) -> None:
        tensor = image.tensor(self.stored)
        if self.is_buffer:
            self.owner._buffers[self.name] = tensor
        else:
            self.owner._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)

    def detach(self) -> None:
        info = self.stored.info
        empty = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        if self.is_buffer:
            self.owner._buffers[self.name] = empty
        else:
            self.owner._parameters[self.name] = nn.Parameter(empty, requires_grad=False)


@dataclass(frozen=True, slots=True)
class _Place:
    owner: nn.Module
    name: str
    shape: tuple[int, ...]
    is_buffer: bool


def _places(module: nn.Module) -> dict[str, _Place]:
    """Every parameter and saved buffer by its full name, tied ones under each of their names."""
    places: dict[str, _Place] = {}
    for prefix, owner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places[dot + name] = _Place(owner, name, tuple(parameter.shape), False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                places[dot + name] = _Place(owner, name, tuple(buffer.shape), True)
    return places


def _match(module: PreTrainedModel, task: Task, layout: ImageLayout) -> tuple[Slot, ...]:
    """Find the place of every stored tensor and a tensor for every place. Raises ``BrokenModel``."""
    places = _places(module)
    found: dict[str, PlacedTensor] = {}
    unexpected: list[str] = []
    ignored = [re.compile(pattern) for pattern in module._keys_to_ignore_on_load_unexpected or ()]
    for stored in layout.tensors:
        name = _place_name(stored.info.name, module.base_model_prefix, places)
        if name is None:
            if not _COMPUTED.search(stored.info.name) and not any(
                p.search(stored.info.name) for p in ignored
            ):
                unexpected.append(stored.info.name)
        elif name in found:
            raise BrokenModel(f"tensors {found[name].info.name} and {stored.info.name} are both {name}")
        else:
            found[name] = stored
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for one, other in tied.items():
        if one in places and one not in found and other in found:
            found[one] = found[other]
        elif other in places and other not in found and one in found:
            found[other] = found[one]
    missing = [name for name in places if name not in found]
    if missing and task is Task.EMBEDDING and all(name.startswith("pooler.") for name in missing):
        # Embeddings pool the token vectors; many directories leave the unused pooler out.
        setattr(module, "pooler", None)  # noqa: B010  # the stubs take every attribute for a module
        missing = []
    _refuse(missing, "has no tensor for", "is it the right architecture in config.json?")
    _refuse(unexpected, "has tensors that the architecture has no place for:", "save it with its own class")
    dtype = _check_shapes(places, found)
    module.config.dtype = DTYPES[dtype]
    return tuple(
        Slot(places[name].owner, places[name].name, found[name], places[name].is_buffer) for name in found
    )


def _place_name(stored: str, prefix: str, places: Mapping[str, _Place]) -> str | None:
    """The module's name for a stored tensor: as it is, with or without the base model's prefix, and in
    the new spelling."""
    spellings = [stored]
    for old, new in _OLD_SPELLINGS:
        if old.search(stored):
            spellings.append(old.sub(new, stored))
    for spelling in spellings:
        for name in (spelling, f"{prefix}.{spelling}", spelling.removeprefix(f"{prefix}.")):
            if name in places:
                return name
    return None


def _refuse(names: Sequence[str], what: str, hint: str) -> None:
    if names:
        shown = ", ".join(sorted(names)[:NAMES_SHOWN_MAX])
        more = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
        raise BrokenModel(f"the directory {what} {shown}{more}; {hint}")


def _check_shapes(places: Mapping[str, _Place], found: Mapping[str, PlacedTensor]) -> str:
    """The one dtype of all weights. Raises ``BrokenModel``."""
    dtypes: dict[str, str] = {}
    for name, stored in found.items():
        info = stored.info
        wanted = places[name].shape
        if info.shape != wanted:
            raise BrokenModel(
                f"tensor {info.name} has shape {list(info.shape)}, config.json asks for {list(wanted)}"
            )
        if not places[name].is_buffer:
            dtypes[info.dtype] = info.name
    if len(dtypes) != 1 or not set(dtypes) <= {"F32", "F16", "BF16", "F64"}:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise BrokenModel(
            f"weights must all be F32, F16 or BF16, alike, but they are {listed}; save it in one dtype"
        )
    return next(iter(dtypes))


# --- a model ----------------------------------------------------------------------------------------


class Model:
    """A built model. ``attach`` gives it weights, ``detach`` takes them away; in between it answers.

    ``run`` must only be called from the worker's one compute thread.
    """

    def __init__(
        self,
        task: Task,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: tuple[Slot, ...],
        pooling: Pooling,
        sampling: Sampling,
    ) -> None:
        self.task = task
        self._module = module
        self._tokenizer = tokenizer
        self._slots = slots
        self._pooling = pooling
        self._sampling = sampling
        self._context = self._context_tokens()
        self._hooks: list[RemovableHandle] = []
        self._span: list[RemovableHandle] = []  # of weights on several devices
        self._gate: Gate | None = None  # of a restore that may still bring layers
        self._vocabulary = int(getattr(module.config, "vocab_size", 0)) or len(tokenizer)
        # Caches of all texts together need no more memory than that of one longest text, for which the
        # ledger holds.
        self._decoder = Decoder(module, min(self._context, WORKSPACE_TOKENS_MAX), self._stop_waiting_if_open)
        self._vectors = Vectors(task, module, tokenizer, pooling, self._context, self._vocabulary)

    def _context_tokens(self) -> int:
        config = self._module.config
        positions = getattr(config, "max_position_embeddings", None)
        context = positions if type(positions) is int and positions > 0 else CONTEXT_TOKENS_DEFAULT
        if config.model_type in _OFFSET_POSITIONS:
            context -= int(config.pad_token_id or 0) + 1
        if self.task is Task.EMBEDDING and self._pooling.tokens_max is not None:
            context = min(context, self._pooling.tokens_max)
        return context

    def attach(self, image: Image) -> None:
        """Point every parameter into the image. Copies nothing. Raises ``BrokenModel``."""
        for slot in self._slots:
            slot.attach(image)
        self._stop_spanning()
        try:
            self._span = span(self._module, list(self._layers() or ()))
        except SplitLayer as error:
            raise BrokenModel(f"{error}; push it again, or set devices to 1") from None

    def detach(self) -> None:
        """Forget the weights; a stray use then fails instead of reading freed memory."""
        self._stop_waiting()
        self._stop_spanning()
        for slot in self._slots:
            slot.detach()

    def serve_behind(self, gate: Gate, layout: ImageLayout) -> Sequence[int] | None:
        """See ``agent.engines.model``. The layers are the members of the list of modules that holds most
        weights, as every transformer has one; what lies outside of it must be there from the start."""
        layers = self._layers()
        if layers is None:
            return None
        waits: list[tuple[nn.Module, frozenset[int]]] = []
        inside: set[int] = set()
        for layer in layers:
            members = set(layer.modules())
            slots = [slot for slot in self._slots if slot.owner in members]
            inside.update(id(slot) for slot in slots)
            waits.append((layer, _chunks_of(slots, layout)))
        outside = [slot for slot in self._slots if id(slot) not in inside]
        self._stop_waiting()
        for layer, chunks in waits:
            self._hooks.append(layer.register_forward_pre_hook(_Wait(gate, chunks)))
        self._gate = gate
        return sorted(_chunks_of(outside, layout))

    def _layers(self) -> nn.ModuleList | None:
        found = [module for module in self._module.modules() if isinstance(module, nn.ModuleList)]
        found = [module for module in found if len(module) >= LAYERS_MIN]
        return max(found, key=lambda module: sum(p.numel() for p in module.parameters()), default=None)

    def _stop_waiting(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._gate = None

    def _stop_spanning(self) -> None:
        for hook in self._span:
            hook.remove()
        self._span = []

    @property
    def is_gated(self) -> bool:
        """Whether a pass may have to wait for weights."""
        gate = self._gate
        return gate is not None and gate.may_wait

    def begin(self, request: EngineRequest, emit: Callable[[EngineFrame], None]) -> VectorAnswer | Text:
        """Read a request, of which parts may share passes with others'. ``emit`` takes the frames of a text.
        Raises ``EngineError``."""
        task = _OPS.get(request.op)
        if task is not self.task:
            raise EngineError(
                "invalid_request", f"this is a model for {self.task}: call {_ROUTES[self.task]}", "model"
            )
        if task is Task.GENERATION:
            return self._begin_text(_convert(request, GenerateFields), emit)
        return self._vectors.begin(_convert(request, EmbedFields))

    def compute(self, parts: Sequence[tuple[VectorAnswer, int]]) -> None:
        """One forward pass over inputs of any answers that ``begin`` gave."""
        self._stop_waiting_if_open()
        with torch.inference_mode():
            self._vectors.compute(parts)

    @property
    def tokens_max(self) -> int:
        return self._vectors.tokens_max

    def frame(self, answer: VectorAnswer) -> EngineFrame:
        """The answer, once no row is missing."""
        return self._vectors.frame(answer)

    def run(
        self,
        request: EngineRequest,
        emit: Callable[[EngineFrame], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Answer a whole request through ``emit``, each part of it alone. Raises ``EngineError``."""
        answer = self.begin(request, emit)
        if isinstance(answer, VectorAnswer):
            while answer.missing:
                if cancelled():
                    return
                self.compute([(answer, next(iter(answer.missing)))])
            emit(self._vectors.frame(answer))
            return
        write(answer, cancelled)

    def _stop_waiting_if_open(self) -> None:
        if self._gate is not None and self._gate.is_open:
            self._stop_waiting()  # here, because no other thread runs the module now

    def _begin_text(self, fields: GenerateFields, emit: Callable[[EngineFrame], None]) -> Text:
        tokens = prompt_tokens(fields, self._tokenizer)
        if not tokens and fields.tokens is None:
            start = self._tokenizer.bos_token_id
            tokens = [start] if type(start) is int else []
        field = "messages" if fields.messages is not None else "prompt"
        check_tokens(tokens, self._vocabulary, field)
        writer = Writer(self._tokenizer, self._sampling, self._context, self._vocabulary, self._module.device)
        return Text(Answer(writer, fields, tokens, emit), self._decoder)


@dataclass(frozen=True, slots=True)
class _Wait:
    """Holds a layer back until its weights are there."""

    gate: Gate
    chunks: frozenset[int]

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self.gate.wait(self.chunks)


def _chunks_of(slots: Sequence[Slot], layout: ImageLayout) -> frozenset[int]:
    found: set[int] = set()
    for slot in slots:
        found.update(chunks_of(layout, slot.stored.image_offset, slot.stored.info.nbytes))
    return frozenset(found)


def _convert(request: EngineRequest, kind: type[_Fields]) -> _Fields:
    try:
        return msgspec.convert(request.fields, kind)
    except msgspec.ValidationError as error:
        raise EngineError("invalid_request", str(error)[:500]) from None
