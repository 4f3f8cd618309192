"""What a model directory may contain, and what can be read off it before a byte of weights moves.

Covers: the allow-list of file names, the refusal of everything that could run code, the allow-list of
architectures, the facts a node needs (``inspect``), and the version digest. Does not cover:
safetensors headers (``layout``) or fetching and hashing files (control's uploads, ``agent/origin.py``).

Pure: no I/O. Symbolic links and special files are refused by whoever lists a directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packer import tensor_model
from packer.gangs import cuts_of
from packer.layout import BadLayout, ImageLayout, TensorInfo, first_workspace_estimate, lay_out
from packer.tensor_model import CONFIG_FILE, EXPORT_ENGINE, PROGRAM_FILE, BadTensorModel
from packer.types import MIB, VERSION_CHARS, OriginFile, Task, TensorSignature

# A large sharded model has about 200 files.
FILES_MAX = 256
# Everything but the weights travels inside the pack and through memory.
SIDE_BYTES_MAX = 64 * MIB
# Side files that are parsed here; real ones are below 2 MiB (tokenizer_config.json with many added tokens).
JSON_BYTES_MAX = 8 * MIB
# "1_Pooling/config.json" is the deepest that the layout of Hugging Face needs.
PATH_PARTS_MAX = 2
PATH_CHARS_MAX = 200

ENGINE = "transformers"

_PATH_PART = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*")
_PLAIN_NAMES = frozenset(
    {
        "README.md",
        "LICENSE",
        "LICENSE.md",
        "LICENSE.txt",
        "NOTICE",
        "NOTICE.md",
        "USE_POLICY.md",
        ".gitattributes",
        ".gitignore",
        "chat_template.jinja",
    }
)
_PLAIN_ENDINGS = (".json", ".txt", ".model", ".jsonl")
_WEIGHT_ENDING = ".safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# Named one by one only to say why; whatever is on no list is refused as well.
_CODE_ENDINGS = (".py", ".pyc", ".so", ".sh", ".ipynb", ".js", ".exe", ".dll", ".jar")
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill")
_FOREIGN_ENDINGS = (
    ".h5",
    ".onnx",
    ".msgpack",
    ".ot",
    ".tflite",
    ".gguf",
    ".ggml",
    ".mlmodel",
    ".keras",
    ".pb",
)

# Not parsed here: large, and only ever read by the tokenizer's own parser.
_BULK_JSON = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})
# With it transformers reads another file of the directory in place of config.json, one that nobody checked.
_OTHER_CONFIG_KEY = "configuration_files"
# What transformers hands to a tokenizer's constructor as arguments.
TOKENIZER_SETTINGS = frozenset({"tokenizer_config.json", "special_tokens_map.json"})
# Arguments that are paths, or that stand for others which are: see ``is_path_setting``.
_PATH_SETTINGS = frozenset(
    {"vocab", "merges", "init_inputs", "tokenizer_object", "sp_model_kwargs", "name_or_path", "cache_dir"}
)
# Tokenizers that are data for one well-known parser. Others are Python programs of many authors, some
# with files, native libraries or processes of their own; a model keeps its own by saving tokenizer.json.
TOKENIZER_CLASSES = frozenset(
    {
        "AlbertTokenizer",
        "BartTokenizer",
        "BarthezTokenizer",
        "BertTokenizer",
        "BigBirdTokenizer",
        "CamembertTokenizer",
        "CodeGenTokenizer",
        "CodeLlamaTokenizer",
        "CohereTokenizer",
        "DebertaTokenizer",
        "DebertaV2Tokenizer",
        "DistilBertTokenizer",
        "ElectraTokenizer",
        "FNetTokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "GemmaTokenizer",
        "HerbertTokenizer",
        "LlamaTokenizer",
        "MPNetTokenizer",
        "MobileBertTokenizer",
        "PegasusTokenizer",
        "PreTrainedTokenizer",
        "Qwen2Tokenizer",
        "RemBertTokenizer",
        "RobertaTokenizer",
        "SqueezeBertTokenizer",
        "T5Tokenizer",
        "XGLMTokenizer",
        "XLMRobertaTokenizer",
        "XLNetTokenizer",
        "TokenizersBackend",
    }
)
_ATTENTION_KEYS = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})
_ATTENTION_ALLOWED = frozenset({"eager", "sdpa"})
_JSON_DEPTH_MAX = 32

# The greatest values of config.json's sizes: above every published model, and small enough that
# building a module on the meta device ends.
_CONFIG_LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 512,
    "n_layer": 512,
    "n_layers": 512,
    "num_layers": 512,
    "hidden_size": 65_536,
    "n_embd": 65_536,
    "dim": 65_536,
    "d_model": 65_536,
    "intermediate_size": 1_048_576,
    "n_inner": 1_048_576,
    "hidden_dim": 1_048_576,
    "vocab_size": 4_194_304,
    "max_position_embeddings": 16_777_216,
    "n_positions": 16_384,  # GPT-2 and its kind build a square mask of this size
    "n_ctx": 16_384,
    "num_attention_heads": 4096,
    "n_head": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 65_536,
    "type_vocab_size": 65_536,
    "num_labels": 1_000_000,
}
# These models build a square mask or bias of max_position_embeddings, whatever the tensors say.
_SQUARE_MASK_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj"})

_MODULE_TYPE = re.compile(
    r"sentence_transformers\.(?:models|base\.modules|sentence_transformer\.modules)"
    r"(?:\.[A-Za-z_]+)*\.(Transformer|Pooling|Normalize)"
)


def _family(model_type: str, stem: str) -> dict[str, tuple[str, Task]]:
    """The base model as an embedding model and its classifier."""
    return {
        f"{stem}Model": (model_type, Task.EMBEDDING),
        f"{stem}ForSequenceClassification": (model_type, Task.CLASSIFICATION),
    }


# architecture -> (model_type, task). Only what transformers 5 has, and whose tensors in a file are the
# module's own parameters (mixtures of experts are fused on load, so they wait for their own support).
ARCHITECTURES: Mapping[str, tuple[str, Task]] = {
    **_family("bert", "Bert"),
    **_family("roberta", "Roberta"),
    **_family("xlm-roberta", "XLMRoberta"),
    **_family("camembert", "Camembert"),
    **_family("distilbert", "DistilBert"),
    **_family("mpnet", "MPNet"),
    **_family("albert", "Albert"),
    **_family("electra", "Electra"),
    **_family("deberta", "Deberta"),
    **_family("deberta-v2", "DebertaV2"),
    **_family("modernbert", "ModernBert"),
    "GPT2LMHeadModel": ("gpt2", Task.GENERATION),
    "GPTNeoForCausalLM": ("gpt_neo", Task.GENERATION),
    "GPTNeoXForCausalLM": ("gpt_neox", Task.GENERATION),
    "GPTJForCausalLM": ("gptj", Task.GENERATION),
    "OPTForCausalLM": ("opt", Task.GENERATION),
    "BloomForCausalLM": ("bloom", Task.GENERATION),
    "FalconForCausalLM": ("falcon", Task.GENERATION),
    "LlamaForCausalLM": ("llama", Task.GENERATION),
    "MistralForCausalLM": ("mistral", Task.GENERATION),
    "Qwen2ForCausalLM": ("qwen2", Task.GENERATION),
    "Qwen3ForCausalLM": ("qwen3", Task.GENERATION),
    "PhiForCausalLM": ("phi", Task.GENERATION),
    "Phi3ForCausalLM": ("phi3", Task.GENERATION),
    "GemmaForCausalLM": ("gemma", Task.GENERATION),
    "Gemma2ForCausalLM": ("gemma2", Task.GENERATION),
    "Gemma3ForCausalLM": ("gemma3_text", Task.GENERATION),
    "SmolLM3ForCausalLM": ("smollm3", Task.GENERATION),
    "OlmoForCausalLM": ("olmo", Task.GENERATION),
    "Olmo2ForCausalLM": ("olmo2", Task.GENERATION),
    "GraniteForCausalLM": ("granite", Task.GENERATION),
    "Starcoder2ForCausalLM": ("starcoder2", Task.GENERATION),
    "StableLmForCausalLM": ("stablelm", Task.GENERATION),
    "CohereForCausalLM": ("cohere", Task.GENERATION),
}


class BadDirectory(ValueError):
    """A model directory holds something that is not allowed. Names the file and the way out."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a node must know before it has seen a byte of the weights."""

    engine: str
    task: Task
    architecture: str
    image_bytes: int
    chunk_bytes: tuple[int, ...]
    workspace_bytes: int
    signature: TensorSignature | None = None
    cuts: tuple[int, ...] = ()  # chunks before which a gang may be cut


# --- file names -----------------------------------------------------------------------------------


def check_paths(files: Sequence[tuple[str, int]]) -> None:
    """Raise ``BadDirectory`` unless every (path, size) may be part of a model directory."""
    if len(files) > FILES_MAX:
        raise BadDirectory(".", f"has {len(files)} files, the limit is {FILES_MAX}; merge small shards")
    seen: set[str] = set()
    side_bytes = 0
    for path, size in files:
        _check_path(path)
        # Two names that one file system can not tell apart would depend on where they are unpacked.
        if path.lower() in seen:
            raise BadDirectory(path, "appears twice (upper and lower case are not told apart)")
        seen.add(path.lower())
        if size < 0:
            raise BadDirectory(path, "has a negative size")
        if not path.endswith(_WEIGHT_ENDING):
            side_bytes += size
        if path.endswith(".json") and path not in _BULK_JSON and size > JSON_BYTES_MAX:
            raise BadDirectory(path, f"has {size} bytes, the limit for a JSON file is {JSON_BYTES_MAX}")
    if side_bytes > SIDE_BYTES_MAX:
        raise BadDirectory(
            ".", f"the files beside the weights have {side_bytes} bytes, the limit is {SIDE_BYTES_MAX}"
        )
    paths = [path for path, _ in files]
    if "config.json" not in paths:
        raise BadDirectory("config.json", "is missing; push a directory in the layout of Hugging Face")
    if not any(path.endswith(_WEIGHT_ENDING) for path in paths):
        raise BadDirectory(
            "model.safetensors", "is missing; save the model with save_pretrained(safe_serialization=True)"
        )


def _check_path(path: str) -> None:
    parts = path.split("/")
    if len(path) > PATH_CHARS_MAX or not all(_PATH_PART.fullmatch(part) for part in parts):
        raise BadDirectory(
            path[:PATH_CHARS_MAX],
            f"is not a plain relative path of at most {PATH_CHARS_MAX} letters, digits, '_', '-' and '.'",
        )
    if any(".." in part or part == "." for part in parts):
        raise BadDirectory(path, "steps outside of the directory")
    name = parts[-1]
    lower = name.lower()
    if lower.endswith(_CODE_ENDINGS):
        raise BadDirectory(path, "is code, and no code from a model directory is ever run; remove it")
    if lower.endswith(_PICKLE_ENDINGS):
        raise BadDirectory(
            path, "may run code when it is opened; convert the weights to safetensors and remove it"
        )
    if lower.endswith(_FOREIGN_ENDINGS):
        raise BadDirectory(path, "is a format that no engine here uses; remove it and keep the safetensors")
    if len(parts) > PATH_PARTS_MAX:
        raise BadDirectory(path, f"lies deeper than {PATH_PARTS_MAX - 1} folder; move or remove it")
    if name.endswith(_WEIGHT_ENDING):
        if len(parts) > 1:
            raise BadDirectory(path, "weights outside of the top folder are not supported; remove them")
        if name.startswith("adapter_"):
            raise BadDirectory(path, "is an adapter; merge it into the base model and push the result")
        return
    if name in _PLAIN_NAMES or name.endswith(_PLAIN_ENDINGS):
        return
    raise BadDirectory(
        path,
        "is not a kind of file that a model directory may hold (safetensors, JSON, tokenizer); remove it",
    )


def json_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """The side files that ``inspect`` wants to see."""
    return tuple(sorted(path for path in paths if path.endswith(".json") and path not in _BULK_JSON))


# --- contents -------------------------------------------------------------------------------------


def inspect(
    paths: Sequence[str], json_files: Mapping[str, bytes], headers: Mapping[str, tuple[TensorInfo, ...]]
) -> ModelFacts:
    """Facts about a directory whose names passed ``check_paths``.

    ``json_files`` holds the contents of all ``json_paths(paths)``; ``headers`` the parsed header of
    each safetensors file. Raises ``BadDirectory``.
    """
    for path in json_paths(paths):
        if path not in json_files:
            raise BadDirectory(path, "was not read")
    config = _load(CONFIG_FILE, json_files.get(CONFIG_FILE, b"null"))
    if not isinstance(config, dict):
        raise BadDirectory(CONFIG_FILE, "is missing or not a JSON object")
    is_program = config.get("engine") == EXPORT_ENGINE
    # A program has its own strict reader, which builds nothing that it does not know.
    plain = {path: data for path, data in json_files.items() if not (is_program and path == PROGRAM_FILE)}
    loaded = {path: _load(path, data) for path, data in sorted(plain.items())}
    for path, value in loaded.items():
        _refuse_code(path, value)
    if is_program:
        return _inspect_program(paths, json_files, headers, loaded.get(_INDEX_FILE))
    architecture, task = _architecture(config)
    _check_sizes(config)
    _check_tokenizer(loaded)
    _check_modules(loaded.get("modules.json"), paths, task)
    layout = _layout(paths, headers, loaded.get(_INDEX_FILE))
    return ModelFacts(
        engine=ENGINE,
        task=task,
        architecture=architecture,
        image_bytes=layout.image_bytes,
        chunk_bytes=layout.chunk_bytes,
        workspace_bytes=first_workspace_estimate(task, config, layout.image_bytes),
        cuts=cuts_of(layout, by_layer=True),
    )


def _inspect_program(
    paths: Sequence[str],
    json_files: Mapping[str, bytes],
    headers: Mapping[str, tuple[TensorInfo, ...]],
    index: object,
) -> ModelFacts:
    """A directory of the ``export`` engine: the program, its signature and its weights fit together."""
    try:
        model = tensor_model.read_tensor_model(json_files)
        layout = _layout(paths, headers, index, tensor_model.first_uses(model))
        tensor_model.check_weights(model, [placed.info for placed in layout.tensors])
    except BadTensorModel as error:
        raise BadDirectory(error.path, error.message) from None
    return ModelFacts(
        engine=EXPORT_ENGINE,
        task=Task.TENSORS,
        architecture="torch.export",
        image_bytes=layout.image_bytes,
        chunk_bytes=layout.chunk_bytes,
        workspace_bytes=tensor_model.first_workspace_estimate(model.program),
        signature=model.signature,
        cuts=cuts_of(layout, by_layer=False),
    )


def _load(path: str, data: bytes) -> object:
    if len(data) > JSON_BYTES_MAX:
        raise BadDirectory(path, f"has {len(data)} bytes, the limit for a JSON file is {JSON_BYTES_MAX}")
    try:
        value: object = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadDirectory(path, f"is not JSON: {str(error)[:200]}") from None
    return value


def _refuse_code(path: str, value: object, depth: int = 0) -> None:
    """Refuse every key, at any depth, by which transformers would fetch or run somebody's code."""
    if depth > _JSON_DEPTH_MAX:
        raise BadDirectory(path, f"is nested deeper than {_JSON_DEPTH_MAX} levels")
    if isinstance(value, list):
        for item in value:
            _refuse_code(path, item, depth + 1)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in _CODE_KEYS and item:
            raise BadDirectory(path, f"key {key!r} asks for code from the model directory; remove the key")
        if key == _OTHER_CONFIG_KEY and item:
            raise BadDirectory(
                path,
                f"key {key!r} puts another file in place of config.json; keep config.json, remove the key",
            )
        if key in _ATTENTION_KEYS and item is not None and not _plain_attention(item):
            raise BadDirectory(path, f"key {key!r} may only be eager or sdpa; remove the key")
        if key == "quantization_config" and item:
            raise BadDirectory(
                path, "quantized weights are not supported; push the model in bf16, fp16 or fp32"
            )
        _refuse_code(path, item, depth + 1)


def _plain_attention(value: object) -> bool:
    # Any other name may be a repository that kernels are downloaded from.
    return isinstance(value, str) and value in _ATTENTION_ALLOWED


def _architecture(config: Mapping[str, object]) -> tuple[str, Task]:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise BadDirectory("config.json", "architectures must be a list of one name")
    known = ARCHITECTURES.get(names[0])
    if known is None:
        raise BadDirectory(
            "config.json",
            f"architecture {names[0][:80]!r} is not supported; supported are {', '.join(ARCHITECTURES)}",
        )
    model_type, task = known
    if config.get("model_type") != model_type:
        raise BadDirectory("config.json", f"model_type must be {model_type!r} for {names[0]}")
    return names[0], task


def _check_sizes(config: Mapping[str, object]) -> None:
    limits = dict(_CONFIG_LIMITS)
    if config.get("model_type") in _SQUARE_MASK_TYPES:
        limits["max_position_embeddings"] = limits["n_positions"]
    for key, limit in limits.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value <= limit:
            raise BadDirectory("config.json", f"{key} must be a whole number from 0 to {limit}")
    labels = config.get("id2label")
    if labels is not None and (not isinstance(labels, dict) or len(labels) > limits["num_labels"]):
        raise BadDirectory(
            "config.json", f"id2label must map at most {limits['num_labels']} numbers to names"
        )


def is_path_setting(key: str) -> bool:
    """Whether transformers could open the value of a tokenizer's setting as a file of this machine."""
    return key in _PATH_SETTINGS or key.endswith(("_file", "_files", "_path", "_dir"))


def _check_tokenizer(loaded: Mapping[str, object]) -> None:
    """Only tokenizers that are plain data, whose files are those in the directory."""
    for path in ("config.json", *sorted(TOKENIZER_SETTINGS)):
        settings = loaded.get(path)
        if settings is None and path not in loaded:
            continue
        if not isinstance(settings, dict):
            raise BadDirectory(path, "is not a JSON object")
        name = settings.get("tokenizer_class")
        if name is not None and (
            not isinstance(name, str) or name.removesuffix("Fast") not in TOKENIZER_CLASSES
        ):
            raise BadDirectory(
                path,
                f"tokenizer_class {str(name)[:80]!r} is not supported; save the tokenizer as tokenizer.json "
                "with the class PreTrainedTokenizerFast",
            )


def _check_modules(modules: object, paths: Sequence[str], task: Task) -> None:
    """Sentence-transformers: a transformer at the top, then pooling, then perhaps normalisation."""
    if modules is None:
        return
    if task is not Task.EMBEDDING:
        raise BadDirectory(
            "modules.json", f"makes an embedding model of a {task} architecture; not supported"
        )
    if not isinstance(modules, list):
        raise BadDirectory("modules.json", "is not a list")
    kinds: list[str] = []
    for module in modules:
        kind = module.get("type") if isinstance(module, dict) else None
        folder = module.get("path") if isinstance(module, dict) else None
        match = _MODULE_TYPE.fullmatch(kind) if isinstance(kind, str) else None
        if match is None or not isinstance(folder, str):
            raise BadDirectory(
                "modules.json",
                f"module {str(kind)[:80]!r} is not one of Transformer, Pooling and Normalize",
            )
        kinds.append(match[1])
        if match[1] == "Transformer" and folder != "":
            raise BadDirectory("modules.json", "the transformer must be in the top folder (path '')")
        if match[1] == "Pooling" and f"{folder}/config.json" not in paths:
            raise BadDirectory(f"{folder[:80]}/config.json", "is missing, and modules.json names it")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise BadDirectory(
            "modules.json", "must be Transformer, Pooling and perhaps Normalize, in this order"
        )


def _layout(
    paths: Sequence[str],
    headers: Mapping[str, tuple[TensorInfo, ...]],
    index: object,
    uses: Sequence[str] = (),
) -> ImageLayout:
    weights = sorted(path for path in paths if path.endswith(_WEIGHT_ENDING))
    for path in weights:
        if path not in headers:
            raise BadDirectory(path, "its header was not read")
    if index is not None:
        _check_index(index, headers)
    elif len(weights) > 1:
        raise BadDirectory(_INDEX_FILE, f"is missing, but there are {len(weights)} safetensors files")
    tensors = [tensor for path in weights for tensor in headers[path]]
    try:
        layout = lay_out(tensors, uses)
    except BadLayout as error:
        raise BadDirectory(weights[0] if weights else "model.safetensors", str(error)) from None
    if layout.image_bytes == 0:
        raise BadDirectory(weights[0] if weights else "model.safetensors", "has no weights")
    return layout


def _check_index(index: object, headers: Mapping[str, tuple[TensorInfo, ...]]) -> None:
    path = _INDEX_FILE
    wanted = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(wanted, dict):
        raise BadDirectory(path, "has no weight_map")
    found = {tensor.name: file for file, tensors in headers.items() for tensor in tensors}
    if wanted != found:
        differing = {str(name) for name, file in wanted.items() if found.get(name) != file}
        differing |= found.keys() - wanted.keys()
        name = min(differing)[:120]
        raise BadDirectory(path, f"and the safetensors files disagree about tensor {name!r}")


# --- version --------------------------------------------------------------------------------------


def manifest_digest(files: Sequence[OriginFile]) -> str:
    """The version of a model: the same files give the same version, in any order, on any machine."""
    rows = sorted((file.path, file.size_bytes, file.sha256.lower()) for file in files)
    text = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:VERSION_CHARS]
