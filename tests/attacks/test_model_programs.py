"""What a model's side files can make a worker do: read foreign files, compute for ever, take all memory.

Covers: tokenizer settings that name files of the node, a second configuration, tokenizer classes that are
programs, and chat templates that loop, repeat, raise to powers or try to leave the sandbox. Does not cover:
the same through the whole stack (``test_running_stack``) or names of files (``test_uploads``).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny_models import tiny_classifier, tiny_llama

from agent.engines import chat
from agent.engines.chat import render
from agent.engines.side_files import BadSideFile, harmless, written
from agent.facade import EngineError
from packer.directory import BadDirectory, inspect, json_paths
from packer.layout import header_bytes, parse_header

CANARY = "bk_canaryline_of_a_foreign_file"
TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


# --- files of the node ------------------------------------------------------------------------------


def secret_of(tmp_path: Path) -> str:
    secret = tmp_path / "secret"
    secret.write_text(f"{CANARY}\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    return str(secret)


BORROWED: dict[str, Callable[[str], Mapping[str, object]]] = {
    "vocab": lambda path: {"vocab": path},
    "vocab_file": lambda path: {"vocab_file": path},
    "init_inputs": lambda path: {"init_inputs": [path]},
    "tokenizer_file": lambda path: {"tokenizer_file": path},
    "merges_file": lambda path: {"merges": path, "merges_file": path},
}


@pytest.mark.parametrize("settings_file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("how", BORROWED)
def test_a_tokenizer_can_not_borrow_a_file_of_the_node(
    classifier: Path, tmp_path: Path, how: str, settings_file: str
) -> None:
    """Without this any file that the worker can read becomes a vocabulary, and comes out as tokens."""
    from transformers import AutoTokenizer

    settings: dict[str, dict[str, object]] = {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}
    settings.setdefault(settings_file, {}).update(BORROWED[how](secret_of(tmp_path)))
    files = {"config.json": (classifier / "config.json").read_bytes()}
    files |= {name: json.dumps(value).encode() for name, value in settings.items()}
    with written(files, tmp_path) as directory:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception:
            return  # without a vocabulary of its own it may as well not load
        assert CANARY not in tokenizer.get_vocab()
        assert CANARY not in tokenizer.decode(list(range(len(tokenizer))))


def test_plain_settings_are_kept() -> None:
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 32, "pad_token": "[PAD]"}
    assert json.loads(harmless(json.dumps(settings).encode(), "tokenizer_config.json")) == settings


@pytest.mark.parametrize("data", [b"[]", b"{", b"[" * 100_000])
def test_settings_that_are_no_object_are_refused(data: bytes) -> None:
    with pytest.raises(BadSideFile, match=r"^tokenizer_config\.json: "):
        harmless(data, "tokenizer_config.json")


# --- at registration --------------------------------------------------------------------------------


def inspected(directory: Path) -> None:
    paths = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    weights = (directory / "model.safetensors").read_bytes()
    count = header_bytes(weights[:8], len(weights), "model.safetensors")
    header = parse_header(weights[8 : 8 + count], "model.safetensors", len(weights))
    jsons = {path: (directory / path).read_bytes() for path in json_paths(paths)}
    inspect(paths, jsons, {"model.safetensors": header})


def changed(source: Path, target: Path, name: str, **values: object) -> Path:
    """A copy whose JSON file has other values."""
    shutil.copytree(source, target)
    file = target / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))
    return target


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class"),
        ("tokenizer_config.json", {"tokenizer_class": ["../x.py", None]}, "tokenizer_class"),
        ("config.json", {"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer"}, "tokenizer_class"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
        ("special_tokens_map.json", {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}, "auto_map"),
    ],
)
def test_a_directory_that_asks_for_other_code_or_another_config_is_refused(
    classifier: Path, tmp_path: Path, name: str, values: dict[str, object], told: str
) -> None:
    inspected(classifier)
    with pytest.raises(BadDirectory, match=told) as refused:
        inspected(changed(classifier, tmp_path / "m", name, **values))
    assert refused.value.path == name


# --- chat templates ---------------------------------------------------------------------------------

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": (ENDLESS, "took more than"),
    "recursion": ("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}", "chat template"),
    "folded power": ("{{ 9**(9**9) }}", "too great"),
    "power": ("{% set n = messages|length + 8 %}{{ n**(n**n) }}", "too great"),
    "squares": (
        "{% set s = namespace(x=9) %}{% for i in range(9999) %}{% set s.x = s.x * s.x %}{% endfor %}",
        "too great",
    ),
    "repetition": ("{{ 'a' * 10000000000 }}", "too long"),
    "list": ("{{ ([0] * 10000000000)|length }}", "too long"),
    "width": ("{{ '%2000000000d' % 1 }}", "too great a width"),
    "width by argument": ("{{ '%*d' % (2000000000, 1) }}", "too great a width"),
    "range": ("{{ range(1000000000)|list }}", "chat template"),
    "text": ("{% for a in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", "wrote more than"),
    "length": ("{#" + "x" * chat.TEMPLATE_CHARS_MAX + "#}", "has"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
    "globals": ("{{ raise_exception.__globals__['sys'] }}", "chat template"),
    "attr filter": ("{{ (''|attr('__class__'))|attr('__mro__') }}", None),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}", "chat template"),
    "include": ("{% include '/etc/passwd' %}", "chat template"),
    "import": ("{% import 'os' as os %}", "chat template"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_chat_template_ends_soon_with_an_error(
    llama: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    # What is bounded by its size must not meet the bound of time before that, however busy the machine.
    monkeypatch.setattr(chat, "RENDER_SECONDS_MAX", 10 if attack == "text" else 0.3)
    tokenizer = AutoTokenizer.from_pretrained(llama, local_files_only=True)
    tokenizer.chat_template, told = HOSTILE[attack]
    started = time.monotonic()
    if told is None:
        assert "class" not in render(tokenizer, TURNS)
        return
    with pytest.raises(EngineError, match=told) as refused:
        render(tokenizer, TURNS)
    assert time.monotonic() - started < 20  # for a busy machine; it is 0.3 s and a little
    assert refused.value.field == "messages"


def test_a_plain_chat_template_renders_and_leaves_no_trace(llama: Path) -> None:
    import sys

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama, local_files_only=True)
    before = sys.gettrace()
    assert render(tokenizer, TURNS * 500).count("hello") == 500
    tokenizer.chat_template = "{{ '-' * 40 }}{{ '%5d' % 7 }}{{ 2**10 }}"
    assert render(tokenizer, TURNS) == "-" * 40 + "    71024"
    assert sys.gettrace() is before
