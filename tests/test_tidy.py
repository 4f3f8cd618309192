"""The rules of the house that a machine can check: imports, purity of the deciding modules, sizes, names.

Covers: who may import whom, what a deciding module may touch, the length of functions and files, file
names, sleeps in tests, and that torch stays out of the processes that must not load it. Does not cover:
style (ruff) or types (mypy).

Every rule is a function from a parsed file to its findings, and each has a planted offence below that it
must find: a rule that can not fail protects nothing.
"""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import LONGEST_FILES

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES_MAX = 70  # one screen; the docstring is not counted, so that nobody saves on it
FILE_LINES_MAX = 600
VAGUE_NAMES = frozenset({"utils", "util", "helpers", "helper", "manager", "service", "common", "misc"})

# What each part may not import. Their own names are what they are imported as.
FORBIDDEN_IMPORTS = {
    "packer": {"agent", "control", "bunkhouse"},
    "agent": {"control", "bunkhouse"},
    "control": {"agent", "bunkhouse", "torch", "transformers", "safetensors"},
    "sdk/bunkhouse": {"agent", "packer", "control", "torch", "numpy", "transformers", "safetensors"},
}
# The only files of the server that may know of tensors: they run in a worker or in the nursery.
TENSOR_PACKAGES = {"torch", "numpy", "transformers", "safetensors", "tokenizers"}
TENSOR_FILES = {
    "packer/codec.py",
    "packer/device_decode.py",
    "packer/kernels.py",
    "packer/transforms.py",
    "packer/tiers.py",
    "agent/arena.py",
    "agent/gang_image.py",
    "agent/calibrate.py",
    "agent/codec_probes.py",
    "agent/cuda_image.py",
    "agent/nursery.py",
    "agent/peak.py",
    "agent/worker.py",
    "agent/compute.py",
    "agent/lanes.py",
    "agent/text_turns.py",
    "agent/vector_turns.py",
}
TENSOR_FOLDERS = ("agent/engines/",)

# Decide, and touch nothing: the same events give the same actions on every machine and in every replay.
PURE_FILES = (
    "packer/types.py",
    "packer/events.py",
    "packer/wire.py",
    "packer/residency.py",
    "packer/ledger.py",
    "packer/admission.py",
    "packer/queueing.py",
    "packer/hits.py",
    "packer/turns.py",
    "packer/rates.py",
    "packer/shares.py",
    "packer/room.py",
    "packer/facts.py",
    "packer/footprint.py",
    "packer/victims.py",
    "packer/gangs.py",
    "packer/places.py",
    "packer/gang_room.py",
    "packer/giving.py",
    "packer/views.py",
    "packer/upkeep.py",
    "packer/invariants.py",
    "packer/proof.py",
    "packer/quota.py",
    "packer/lending.py",
    "packer/keep.py",
    "packer/intensity.py",
    "packer/policies.py",
    "packer/chosen.py",
    "packer/regret.py",
    "packer/remember.py",
    "packer/shortlist.py",
    "packer/estimate.py",
    "packer/traces.py",
    "packer/json_words.py",
    "packer/simulated_turns.py",
    "packer/fleet.py",
    "packer/outcome.py",
    "packer/simulate.py",
    "packer/simulated_box.py",
    "packer/layout.py",
    "packer/directory.py",
    "packer/aten.py",
    "packer/operators.py",
    "packer/exported.py",
    "packer/program.py",
    "packer/tensor_model.py",
    "packer/placement.py",
    "agent/batching.py",
    "agent/cache_room.py",
    "control/cluster.py",
    "control/choosing.py",
    "control/copies.py",
    "control/events.py",
    "control/feed.py",
    "control/waits.py",
    "control/share_book.py",
    "control/rooms.py",
    "control/shares.py",
    "control/vacancy.py",
    "control/lives.py",
    "packer/usage.py",
)
# Clocks, input and output, chance, threads: all that makes a second run differ from the first.
IMPURE_IMPORTS = {
    *("time", "datetime", "random", "secrets", "uuid", "os", "io", "pathlib", "tempfile", "shutil", "glob"),
    *("socket", "select", "selectors", "asyncio", "threading", "multiprocessing", "subprocess", "signal"),
    *("concurrent", "contextvars", "logging", "sqlite3", "urllib", "http", "mmap", "fcntl", "ctypes"),
}
IMPURE_CALLS = {"open", "input", "print", "exec", "eval", "id", "__import__"}
# These look at every element and give the same answer in any order.
ORDER_FREE_CALLS = {"sorted", "set", "frozenset", "len", "any", "all", "sum"}
# These take the elements one after another, so the order of a set would leak out of them.
ORDERED_CALLS = {"list", "tuple", "enumerate", "iter", "next", "zip", "map", "filter", "reversed", "dict"}


@dataclass(frozen=True, slots=True)
class Finding:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file; ``path`` is relative to the repository, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @staticmethod
    def of(path: str, text: str) -> Source:
        return Source(path, text, ast.parse(text, path))


def python_files(*folders: str) -> Iterator[Source]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" not in path.parts:
                yield Source.of(path.relative_to(ROOT).as_posix(), path.read_text())


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, wherever it stands, but not those for types only."""
    skipped = {id(node) for block in ast.walk(tree) if _is_typing_block(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def _is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


# --- rules ----------------------------------------------------------------------------------------


def find_imports(source: Source) -> Iterator[Finding]:
    """Imports that cross a border between the parts, or bring tensors where none may be."""
    part = next((part for part in FORBIDDEN_IMPORTS if source.path.startswith(part + "/")), None)
    if part is None:
        return
    tensors = source.path in TENSOR_FILES or source.path.startswith(TENSOR_FOLDERS)
    for line, name in imported(source.tree):
        top = name.split(".")[0]
        if name.startswith("."):
            yield Finding(source.path, line, "relative import: write the whole name")
        elif top in FORBIDDEN_IMPORTS[part]:
            yield Finding(source.path, line, f"{part} must not import {top}")
        elif top in TENSOR_PACKAGES and not tensors:
            yield Finding(source.path, line, f"{top} belongs in a worker's files, not here")


def find_impurity(source: Source) -> Iterator[Finding]:
    """Clocks, I/O, chance and the order of sets in a deciding module."""
    for line, name in imported(source.tree):
        if name.split(".")[0] in IMPURE_IMPORTS:
            yield Finding(source.path, line, f"a deciding module must not import {name}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            yield Finding(source.path, node.lineno, f"a deciding module must not call {node.func.id}()")
    yield from find_set_order(source)


def find_set_order(source: Source) -> Iterator[Finding]:
    """Places where the order of a set could decide something, as far as the syntax tells."""
    # A name means something else in another function; an attribute seldom does.
    attributes, _ = _names_of_sets(source.tree)
    *functions, rest = _scopes(source.tree)
    _, constants = _names_of_sets(rest)
    yield from _find_set_order_in(rest, attributes | constants, source.path)
    for scope in functions:
        _, names = _names_of_sets(scope)
        parameters = {node.arg for node in ast.walk(scope) if isinstance(node, ast.arg)}
        yield from _find_set_order_in(scope, attributes | names | (constants - parameters), source.path)


def _scopes(tree: ast.Module) -> Iterator[ast.Module]:
    """Each outermost function or method alone, then the rest of the module without them."""
    rest: list[ast.stmt] = []
    for statement in tree.body:
        inside = statement.body if isinstance(statement, ast.ClassDef) else [statement]
        for node in inside:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.Module([node], [])
            else:
                rest.append(node)
    yield ast.Module(rest, [])


def _find_set_order_in(scope: ast.Module, sets: frozenset[str], path: str) -> Iterator[Finding]:
    harmless = {
        id(argument)
        for call in ast.walk(scope)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ORDER_FREE_CALLS
        for argument in call.args
    }
    for node in ast.walk(scope):
        for taken in _taken_in_order(node):
            if id(node) not in harmless and _is_set(taken, sets):
                yield Finding(
                    path,
                    taken.lineno,
                    f"the order of the set {ast.unparse(taken)!r} is chance: use sorted() or a dict",
                )


def _taken_in_order(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose elements ``node`` takes one after another."""
    if isinstance(node, ast.For):
        yield node.iter
    elif isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp):
        yield from (generator.iter for generator in node.generators)
    elif isinstance(node, ast.Starred):
        yield node.value
    elif isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in ORDERED_CALLS or method in {"join", "extend"}:
            yield from node.args
        elif isinstance(node.func, ast.Attribute) and method == "pop" and not node.args:
            yield node.func.value


def _names_of_sets(tree: ast.Module) -> tuple[frozenset[str], frozenset[str]]:
    """What is annotated as, or assigned, a set: attributes (of any object), and plain names."""
    attributes: set[str] = set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            attributes |= {_last_name(f.target) for f in fields if _is_set_annotation(f.annotation)}
        elif isinstance(node, ast.arg) and node.annotation is not None:
            names |= {node.arg} if _is_set_annotation(node.annotation) else set()
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            annotated = isinstance(node, ast.AnnAssign) and _is_set_annotation(node.annotation)
            if annotated or (node.value is not None and _is_set(node.value, frozenset())):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
                attributes |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    return frozenset(attributes), frozenset(names)


def _is_set_annotation(annotation: ast.expr) -> bool:
    head = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return _last_name(head) in {"set", "frozenset", "Set", "AbstractSet", "MutableSet", "FrozenSet"}


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _is_set(node: ast.expr, sets: frozenset[str]) -> bool:
    match node:
        case ast.Set() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.Call(func=ast.Attribute(attr="union" | "intersection" | "difference", value=value)):
            return _is_set(value, sets)
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor(), right=right):
            return _is_set(left, sets) or _is_set(right, sets)
        case ast.Name() | ast.Attribute():
            return _last_name(node) in sets
        case _:
            return False


def find_long(source: Source) -> Iterator[Finding]:
    """Functions and files that do not fit in a head."""
    lines = len(source.text.splitlines())
    if lines > FILE_LINES_MAX:
        yield Finding(source.path, lines, f"{lines} lines, the limit is {FILE_LINES_MAX}: split it by reason")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.body[0], node.end_lineno or node.lineno
            start = node.lineno
            if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
                start += (first.end_lineno or first.lineno) - first.lineno + 1
            length = last - start + 1
            if length > FUNCTION_LINES_MAX:
                message = f"{node.name} has {length} lines, the limit is {FUNCTION_LINES_MAX}"
                yield Finding(source.path, node.lineno, message)


def find_vague_name(source: Source) -> Iterator[Finding]:
    """File names that say nothing about what is inside, and packages among the tests."""
    path = Path(source.path)
    if path.stem in VAGUE_NAMES or VAGUE_NAMES & set(path.parts[:-1]):
        yield Finding(source.path, 1, "name the file after what it does")
    if path.parts[0] == "tests" and path.name == "__init__.py":
        yield Finding(source.path, 1, "tests are not packages: their folder is on the path")


def find_missing_docstring(source: Source) -> Iterator[Finding]:
    """Files that do not open by saying what they cover."""
    if source.tree.body and ast.get_docstring(source.tree) is None:
        yield Finding(source.path, 1, "a file opens with a docstring: what it covers and what it does not")


def find_sleep(source: Source) -> Iterator[Finding]:
    """Sleeps in tests: slow on a fast machine, wrong on a slow one. asyncio's may be on a virtual clock."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep":
            yield Finding(source.path, node.lineno, "a test must not sleep: wait for the event itself")


def report(findings: list[Finding]) -> None:
    assert not findings, "\n" + "\n".join(map(str, findings))


# --- the tree keeps the rules ----------------------------------------------------------------------

SERVER = ("agent", "packer", "control")
EVERYTHING = (*SERVER, "sdk", "scripts", "tests")


def find_swallowed_cancel(source: Source) -> Iterator[Finding]:
    """``asyncio.wait_for`` of Python 3.11 returns, and forgets that it was cancelled, when what it waits for
    happens in the same moment: a loop around it then runs for ever, and who ends it waits as long."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "asyncio.wait_for":
            yield Finding(source.path, node.lineno, "asyncio.wait_for swallows cancels: use asyncio.timeout")


RULES = (
    find_imports,
    find_long,
    find_vague_name,
    find_missing_docstring,
    find_sleep,
    find_swallowed_cancel,
)


@pytest.fixture(scope="module")
def findings() -> dict[str, list[Finding]]:
    """By rule, what it finds anywhere: each file is parsed once, and not kept."""
    found: dict[str, list[Finding]] = {rule.__name__: [] for rule in RULES}
    gc.disable()  # a syntax tree has no cycles, and looking for them takes four times as long as parsing
    try:
        for source in python_files(*EVERYTHING):
            for rule in RULES:
                found[rule.__name__] += rule(source)
    finally:
        gc.enable()
    return found


def test_parts_import_only_what_they_may(findings: dict[str, list[Finding]]) -> None:
    report(findings[find_imports.__name__])


@pytest.mark.parametrize("path", [path for path in PURE_FILES if (ROOT / path).exists()])
def test_deciding_modules_touch_nothing(path: str) -> None:
    report(list(find_impurity(Source.of(path, (ROOT / path).read_text()))))


def test_functions_and_files_are_short(findings: dict[str, list[Finding]]) -> None:
    report(findings[find_long.__name__])


def test_files_are_named_after_what_they_do(findings: dict[str, list[Finding]]) -> None:
    report(findings[find_vague_name.__name__])


def test_files_say_what_they_cover(findings: dict[str, list[Finding]]) -> None:
    report(findings[find_missing_docstring.__name__])


def test_tests_do_not_sleep(findings: dict[str, list[Finding]]) -> None:
    report([finding for finding in findings[find_sleep.__name__] if finding.path.startswith("tests/")])


def test_no_wait_swallows_a_cancel(findings: dict[str, list[Finding]]) -> None:
    report(findings[find_swallowed_cancel.__name__])


def test_the_longest_files_are_there() -> None:
    """What ``conftest`` starts first would otherwise be a list of names of the past."""
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert not set(LONGEST_FILES) - names


# --- torch stays where it belongs ------------------------------------------------------------------


def loaded_after(statement: str, unwanted: set[str]) -> list[str]:
    """Which of ``unwanted`` a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.argv[1:]) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(unwanted)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sdk")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", ["agent.__main__", "agent.gateway", "agent.loop", "control.server"])
def test_agent_and_control_processes_load_no_torch(module: str) -> None:
    """The agent and control must start fast and stay small: only workers and the nursery hold torch."""
    assert loaded_after(f"import {module}", {"torch", "numpy", "transformers"}) == []


def test_pack_index_is_readable_without_torch() -> None:
    assert loaded_after("import packer.pack", {"torch", "transformers"}) == []


def test_sdk_loads_neither_torch_nor_numpy() -> None:
    assert loaded_after("import bunkhouse", {"torch", "numpy", "click", "rich", "agent", "packer"}) == []


# --- the rules can fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("packer/x.py", "import agent.loop"),
        ("packer/x.py", "def f():\n    from control import store"),
        ("agent/loop.py", "import torch"),
        ("agent/loop.py", "from control.store import Store"),
        ("agent/loop.py", "from . import gateway"),
        ("control/x.py", "import torch.nn"),
        ("sdk/bunkhouse/x.py", "from packer.types import Tier"),
    ],
)
def test_forbidden_import_is_found(path: str, text: str) -> None:
    assert list(find_imports(Source.of(path, text)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("packer/codec.py", "import torch"),
        ("agent/engines/transformers.py", "import torch"),
        ("agent/loop.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("control/x.py", "import packer.types"),
    ],
)
def test_allowed_import_is_not_found(path: str, text: str) -> None:
    assert not list(find_imports(Source.of(path, text)))


@pytest.mark.parametrize(
    "text",
    [
        "import time",
        "from os import path",
        "import random",
        "import asyncio",
        "from urllib.request import urlopen",
        "open('x')",
        "for x in {1, 2}: f(x)",
        "y = [x for x in set(z)]",
        "y = list(frozenset(z))",
        "def f(a: set[int]):\n    for x in a: g(x)",
        "class N:\n    idle: set[str]\ndef f(n):\n    return [*n.idle]",
        "seen = set()\nfor x in seen | other: f(x)",
        "y = ','.join({'a', 'b'})",
        "seen = set()\nseen.pop()",
        "for i, x in enumerate({1, 2}): f(x)",
        "y = {k: 1 for k in {1, 2}}",
        "KNOWN = frozenset('ab')\ndef f(): return list(KNOWN)",
    ],
)
def test_impurity_is_found(text: str) -> None:
    assert list(find_impurity(Source.of("packer/residency.py", text)))


@pytest.mark.parametrize(
    "text",
    [
        "for x in sorted({1, 2}): f(x)",
        "y = sum(x for x in set(z))",
        "if x in {1, 2}: f(x)",
        "y = {x for x in set(z)}",
        "y = len({1, 2})",
        "for x in {1: 2}: f(x)",
        "import re",
        "stack = []\nstack.pop()",
        "def f(a: set[int]): return 1 in a\ndef g(a: list[int]): return [*a]",
    ],
)
def test_purity_is_not_accused(text: str) -> None:
    assert not list(find_impurity(Source.of("packer/residency.py", text)))


def test_long_function_and_file_are_found() -> None:
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES_MAX))
    assert list(find_long(Source.of("x.py", f"def f():\n{body}")))
    assert list(find_long(Source.of("x.py", "x = 1\n" * (FILE_LINES_MAX + 1))))
    prose = "\n".join("    word" for _ in range(FUNCTION_LINES_MAX))
    assert not list(find_long(Source.of("x.py", f'def f():\n    """{prose}"""\n    return 1')))


def test_vague_names_and_test_packages_are_found() -> None:
    assert list(find_vague_name(Source.of("agent/utils.py", "")))
    assert list(find_vague_name(Source.of("agent/common/x.py", "")))
    assert list(find_vague_name(Source.of("tests/attacks/__init__.py", "")))


def test_missing_docstring_and_sleep_are_found() -> None:
    assert list(find_missing_docstring(Source.of("x.py", "x = 1")))
    assert list(find_sleep(Source.of("tests/test_x.py", "import time\ntime.sleep(1)")))
    assert not list(find_sleep(Source.of("tests/test_x.py", "import asyncio\nasyncio.sleep(1)")))


def test_a_wait_that_swallows_cancels_is_found() -> None:
    assert list(find_swallowed_cancel(Source.of("agent/x.py", "asyncio.wait_for(event.wait(), 1)")))
    assert not list(find_swallowed_cancel(Source.of("agent/x.py", "condition.wait_for(bool)")))
