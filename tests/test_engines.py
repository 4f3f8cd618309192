"""The transformers engine against plain transformers, in this process.

Covers: equality of answers, how tensors are matched and attached, pooling, text pieces, and every way
in which a request or a directory can be at fault. Does not cover: worker processes (``test_worker``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import describe, find_minilm, opened, tiny_classifier, tiny_gpt2, tiny_llama

from agent.arena import Image, allocate_image
from agent.engines.model import BrokenModel
from agent.engines.pooling import BadPooling, Pooling, read_pooling
from agent.engines.text import TextStream
from agent.engines.transformers import Model, build
from agent.facade import JSON, EngineError, EngineFrame, EngineRequest
from packer.ingest import Ingest
from packer.sources import FileSource
from packer.types import ModelRef, Task

REF = ModelRef("acme", "tiny", "0" * 16)
TEXT = "Hello, what is the weather on the range today?"
NEVER: Callable[[], bool] = lambda: False  # noqa: E731


@dataclass
class Loaded:
    """A model with its weights in an image, as a worker has it."""

    model: Model
    image: Image
    directory: Path

    def run(self, op: str, cancelled: Callable[[], bool] = NEVER, **fields: JSON) -> list[EngineFrame]:
        frames: list[EngineFrame] = []
        self.model.run(EngineRequest(op, fields), frames.append, cancelled)
        return frames

    def text(self, **fields: JSON) -> str:
        return "".join(str(frame.header.get("delta", "")) for frame in self.run("generate", **fields))


def load(directory: Path, task: Task, private: Path) -> Loaded:
    spec = describe(directory, REF, task)
    with opened(directory, spec) as fds:
        sources = [(file, FileSource(fds[file.path])) for file in spec.files]
        source = Ingest(sources, REF, spec.engine, task, None)
        source.open()
        model = build(task, source.side_files, source.layout, private, "cpu")
        image = allocate_image("cpu", source.layout)
        source.fill(image)
    model.attach(image)
    return Loaded(model, image, directory)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("engines")
    (root / "private").mkdir()
    tiny_gpt2(root / "gpt2")
    tiny_llama(root / "llama")
    tiny_llama(root / "llama-tied", tied=True)
    tiny_llama(root / "llama-bf16", dtype="bfloat16")
    tiny_classifier(root / "classifier")
    tiny_classifier(root / "tags", multi_label=True)
    return root


@pytest.fixture(scope="module")
def minilm(root: Path) -> Loaded:
    return load(find_minilm(), Task.EMBEDDING, root / "private")


@pytest.fixture(scope="module")
def gpt2(root: Path) -> Loaded:
    return load(root / "gpt2", Task.GENERATION, root / "private")


@pytest.fixture(scope="module")
def llama(root: Path) -> Loaded:
    return load(root / "llama", Task.GENERATION, root / "private")


def vectors(frame: EngineFrame, count: int) -> np.ndarray:
    return np.frombuffer(frame.body, dtype="<f4").reshape(count, -1)


def plain_embedding(directory: Path, text: str) -> np.ndarray:
    """What the model card of all-MiniLM-L6-v2 does with plain transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory)
    batch = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
        vector: np.ndarray = torch.nn.functional.normalize(mean, p=2, dim=1)[0].numpy()
    return vector


def plain_text(directory: Path, prompt: str, count: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    batch = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0][batch["input_ids"].shape[1] :], skip_special_tokens=True))


# --- embeddings -----------------------------------------------------------------------------------


def test_minilm_is_equal_to_plain_transformers_to_the_bit(minilm: Loaded) -> None:
    frame = minilm.run("embed", inputs=[TEXT])[0]
    assert frame.header == {"count": 1, "dimensions": 384, "prompt_tokens": 13}
    assert np.array_equal(vectors(frame, 1)[0], plain_embedding(minilm.directory, TEXT))


def test_an_input_gets_the_same_bits_in_any_company(minilm: Loaded) -> None:
    alone = vectors(minilm.run("embed", inputs=[TEXT])[0], 1)[0]
    among = vectors(minilm.run("embed", inputs=["a", "much longer " * 40, TEXT, ""])[0], 4)
    assert np.array_equal(among[2], alone)


def test_token_numbers_are_embedded_like_their_text(minilm: Loaded) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(minilm.directory)(TEXT)["input_ids"]
    assert minilm.run("embed", inputs=[tokens])[0].body == minilm.run("embed", inputs=[TEXT])[0].body


def test_weights_are_attached_without_a_copy_and_gone_when_detached(minilm: Loaded) -> None:
    start = torch.frombuffer(minilm.image._map, dtype=torch.uint8).data_ptr()  # type: ignore[attr-defined]
    parameters = list(minilm.model._module.parameters())
    assert all(start <= p.data_ptr() < start + minilm.image.nbytes for p in parameters)
    before = minilm.run("embed", inputs=[TEXT])[0].body
    minilm.model.detach()
    assert {p.device.type for p in minilm.model._module.parameters()} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        minilm.run("embed", inputs=[TEXT])
    minilm.model.attach(minilm.image)
    assert minilm.run("embed", inputs=[TEXT])[0].body == before


def test_an_embedding_model_without_its_unused_pooler_works(root: Path, minilm: Loaded) -> None:
    copy = root / "no-pooler"
    shutil.copytree(find_minilm(), copy)
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    save_file(kept, copy / "model.safetensors")
    loaded = load(copy, Task.EMBEDDING, root / "private")
    assert loaded.run("embed", inputs=[TEXT])[0].body == minilm.run("embed", inputs=[TEXT])[0].body


@pytest.mark.parametrize(
    ("inputs", "code", "field"),
    [
        ([], "invalid_request", "input"),
        ([[]], "invalid_request", "input"),
        ([[101, 30522]], "invalid_request", "input"),
        ([[-1]], "invalid_request", "input"),
        (["fine", [101, 99999999]], "invalid_request", "input[1]"),
        (["word " * 300], "context_length_exceeded", "input"),
        (["a"] * 2049, "invalid_request", "input"),
        ("text", "invalid_request", None),
        ([1.5], "invalid_request", None),
    ],
)
def test_a_bad_input_is_named_and_the_model_lives_on(
    minilm: Loaded, inputs: JSON, code: str, field: str | None
) -> None:
    with pytest.raises(EngineError) as error:
        minilm.run("embed", inputs=inputs)
    assert (error.value.code, error.value.field) == (code, field)
    assert minilm.run("embed", inputs=["fine"])[0].header["count"] == 1


def test_a_wrong_call_names_the_right_route(minilm: Loaded) -> None:
    with pytest.raises(EngineError, match="/v1/embeddings"):
        minilm.run("generate", prompt="x")
    with pytest.raises(EngineError, match="/v1/embeddings"):
        minilm.run("explode")


def test_an_embedding_is_cut_where_the_model_says_that_it_may_be(minilm: Loaded) -> None:
    config = minilm.model._module.config
    whole = vectors(minilm.run("embed", inputs=[TEXT], dimensions=384)[0], 1)[0]
    with pytest.raises(EngineError, match="gives 384 and can not be shortened") as error:
        minilm.run("embed", inputs=[TEXT], dimensions=128)
    assert error.value.field == "dimensions"
    config.is_matryoshka = True
    try:
        frame = minilm.run("embed", inputs=[TEXT, "a"], dimensions=100)[0]
        cut = vectors(frame, 2)[0]
        assert frame.header["dimensions"] == 100
        assert np.linalg.norm(cut) == pytest.approx(1.0)
        assert cut == pytest.approx(whole[:100] / np.linalg.norm(whole[:100]), abs=1e-6)
        config.matryoshka_dimensions = [64, 128]
        assert minilm.run("embed", inputs=[TEXT], dimensions=64)[0].header["dimensions"] == 64
        for asked in (100, 385):
            with pytest.raises(EngineError, match="one of 64, 128, or 384"):
                minilm.run("embed", inputs=[TEXT], dimensions=asked)
    finally:
        del config.is_matryoshka, config.matryoshka_dimensions


# --- classification -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "squash"), [("classifier", torch.softmax), ("tags", torch.sigmoid)])
def test_scores_are_equal_to_plain_transformers(
    root: Path, name: str, squash: Callable[..., torch.Tensor]
) -> None:
    loaded = load(root / name, Task.CLASSIFICATION, root / "private")
    frame = loaded.run("classify", inputs=[TEXT, "good stew"])[0]
    assert frame.header["labels"] == ["negative", "neutral", "positive"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / name)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(root / name)
    for row, text in zip(vectors(frame, 2), [TEXT, "good stew"], strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits
            wanted = squash(logits, dim=-1) if squash is torch.softmax else squash(logits)
        assert np.array_equal(row, wanted[0].numpy())


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "llama-bf16"])
def test_greedy_text_is_equal_to_plain_transformers(root: Path, name: str) -> None:
    loaded = load(root / name, Task.GENERATION, root / "private")
    assert loaded.text(prompt="Hello, what", max_tokens=40, temperature=0) == plain_text(
        root / name, "Hello, what", 40
    )


def test_rotary_frequencies_are_real_after_building_without_memory(llama: Loaded) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama.directory)
    buffers = dict(llama.model._module.named_buffers())
    assert buffers
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_the_last_frame_counts_tokens(gpt2: Loaded) -> None:
    frames = gpt2.run("generate", prompt="Hello, what", max_tokens=7, temperature=0)
    assert frames[-1].header == {"finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 7}


def test_without_max_tokens_generation_fills_the_context(gpt2: Loaded) -> None:
    header = gpt2.run("generate", prompt="Hello, what", temperature=0)[-1].header
    assert header["finish_reason"] == "stop" or header["completion_tokens"] == 64 - 3


def test_a_seed_repeats_and_another_differs(llama: Loaded) -> None:
    def draw(seed: int) -> str:
        return llama.text(prompt="One, two", max_tokens=20, temperature=1.5, seed=seed)

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(5)}) > 1


def test_unseeded_draws_differ(llama: Loaded) -> None:
    torch.manual_seed(0)
    first = llama.text(prompt="One, two", max_tokens=20, temperature=2.0)
    torch.manual_seed(0)
    assert llama.text(prompt="One, two", max_tokens=20, temperature=2.0) != first


def test_a_stop_string_ends_the_text_before_itself(llama: Loaded) -> None:
    whole = llama.text(prompt="Hello, what", max_tokens=40, temperature=0)
    stop = whole[6:9]
    frames = llama.run("generate", prompt="Hello, what", max_tokens=40, temperature=0, stop=["nowhere", stop])
    text = "".join(str(frame.header.get("delta", "")) for frame in frames)
    assert text == whole[: whole.index(stop)]
    assert frames[-1].header["finish_reason"] == "stop"


def test_chat_uses_the_directory_s_template(llama: Loaded) -> None:
    chat: JSON = [{"role": "user", "content": "Hello"}]
    prompt = "user: Hello\nassistant:"
    assert llama.text(messages=chat, max_tokens=9, temperature=0) == llama.text(
        prompt=prompt, max_tokens=9, temperature=0
    )


def test_chat_without_a_template_is_refused_with_the_way_out(gpt2: Loaded) -> None:
    with pytest.raises(EngineError, match=r"no chat template.*/v1/completions") as error:
        gpt2.run("generate", messages=[{"role": "user", "content": "Hello"}])
    assert error.value.field == "messages"


def test_cancelling_stops_at_the_next_token(gpt2: Loaded) -> None:
    seen: list[EngineFrame] = []
    gpt2.model.run(
        EngineRequest("generate", {"prompt": "Hello", "temperature": 0}), seen.append, lambda: len(seen) >= 2
    )
    assert int(str(seen[-1].header["completion_tokens"])) < 20


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({}, "invalid_request", None),
        ({"prompt": "a", "tokens": [1]}, "invalid_request", None),
        ({"tokens": []}, "invalid_request", "prompt"),
        ({"tokens": [99999]}, "invalid_request", "prompt"),
        ({"prompt": "word " * 99}, "context_length_exceeded", "prompt"),
        ({"prompt": "a", "max_tokens": 64}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "invalid_request", "temperature"),
        ({"prompt": "a", "top_p": 0}, "invalid_request", "top_p"),
        ({"prompt": "a", "seed": 2**64}, "invalid_request", "seed"),
        ({"prompt": "a", "stop": ["x"] * 17}, "invalid_request", "stop"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"prompt": 5}, "invalid_request", None),
    ],
)
def test_a_bad_generation_is_named_and_the_model_lives_on(
    gpt2: Loaded, fields: dict[str, JSON], code: str, field: str | None
) -> None:
    with pytest.raises(EngineError) as error:
        gpt2.run("generate", **fields)
    assert error.value.code == code
    assert error.value.field == field
    assert gpt2.run("generate", prompt="a", max_tokens=1)


# --- text pieces ----------------------------------------------------------------------------------


def decode(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes: the hardest case for characters of several bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


@given(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)))
def test_pieces_join_to_the_whole_text(data: bytes) -> None:
    pieces: list[str] = []
    stream = TextStream(decode, [], pieces.append)
    for token in data:
        stream.push(token)
    stream.finish()
    assert "".join(pieces) == decode(list(data))


@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    pieces: list[str] = []
    stream = TextStream(decode, stops, pieces.append)
    for token in text.encode():
        stream.push(token)
        if stream.stopped:
            break
    stream.finish()
    # The first stop string to be complete wins; the text ends before its first character.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_end = min(ends)[0] if ends else len(text)
    wanted = min(
        (text[:first_end].find(stop) for stop in stops if stop in text[:first_end]), default=len(text)
    )
    assert "".join(pieces) == text[:wanted]
    assert stream.stopped == bool(ends)


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    pieces: list[str] = []
    stream = TextStream(decode, [], pieces.append)
    for token, shown in zip("aé€".encode(), ["a", "a", "aé", "aé", "aé", "aé€"], strict=True):
        stream.push(token)
        assert "".join(pieces) == shown


# --- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("cls", [1.0, 5.0]),
        ("lasttoken", [4.0, -1.0]),
        ("max", [4.0, 5.0]),
        ("mean", [2.5, 2.0]),
        ("mean_sqrt_len_tokens", [3.5355339, 2.8284271]),
        ("weightedmean", [3.0, 1.0]),
    ],
)
def test_pooling_modes(mode: str, wanted: list[float]) -> None:
    tokens = torch.tensor([[1.0, 5.0], [4.0, -1.0]])
    assert torch.allclose(Pooling((mode,)).apply(tokens), torch.tensor(wanted))


def test_the_declared_pooling_is_read() -> None:
    module = "sentence_transformers.models."
    files = {
        "modules.json": json.dumps(
            [
                {"type": module + kind, "path": path}
                for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2"))
            ]
        ).encode(),
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}',
        "sentence_bert_config.json": b'{"max_seq_length": 99, "do_lower_case": true}',
        "config_sentence_transformers.json": b'{"prompts": {"q": "query: "}, "default_prompt_name": "q"}',
    }
    assert read_pooling(files) == Pooling(("cls", "max"), True, 99, True, "query: ")
    assert read_pooling({}) == Pooling(("mean",), False, None, False, "")
    with pytest.raises(BadPooling, match="Dense"):
        read_pooling({"modules.json": json.dumps([{"type": module + "Dense"}]).encode()})


# --- directories that do not fit together ---------------------------------------------------------


def changed(
    root: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    copy = root / f"changed-{name}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "gpt2", copy)
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors")
    return copy


def test_names_without_the_base_prefix_are_found(root: Path, gpt2: Loaded) -> None:
    """The original GPT-2 files have no ``transformer.`` before their names."""
    copy = changed(
        root, "bare", lambda weights: {k.removeprefix("transformer."): v for k, v in weights.items()}
    )
    loaded = load(copy, Task.GENERATION, root / "private")
    assert loaded.text(prompt="Hello", max_tokens=9, temperature=0) == gpt2.text(
        prompt="Hello", max_tokens=9, temperature=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "ln_f" not in k}, r"no tensor for transformer\.ln_f\.bias"),
        (lambda w: {**w, "score.weight": torch.zeros(3)}, r"no place for: score\.weight"),
        (
            lambda w: {**w, "transformer.ln_f.bias": torch.zeros(3)},
            r"shape \[3\], config.json asks for \[64\]",
        ),
        (
            lambda w: {**w, "transformer.ln_f.bias": torch.zeros(64, dtype=torch.bfloat16)},
            r"BF16 \(transformer\.ln_f\.bias\), F32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    root: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    with pytest.raises(BrokenModel, match=message):
        load(changed(root, "unfit", change), Task.GENERATION, root / "private")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["EvilModel"], "EvilModel"),
        ("model_type", "bert", "not supported"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantized"),
        ("n_embd", 65, "can not build"),
    ],
)
def test_a_configuration_that_can_not_be_built_is_named(
    root: Path, key: str, value: JSON, message: str
) -> None:
    copy = changed(root, "config", dict)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(BrokenModel, match=message):
        load(copy, Task.GENERATION, root / "private")


def test_kernels_that_a_configuration_names_are_not_loaded(root: Path) -> None:
    copy = changed(root, "kernels", dict)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attn_implementation": "kernels-community/evil"}))
    loaded = load(copy, Task.GENERATION, root / "private")
    assert loaded.model._module.config._attn_implementation == "sdpa"


def test_side_files_do_not_stay_behind(root: Path, gpt2: Loaded) -> None:
    assert list((root / "private").iterdir()) == []
