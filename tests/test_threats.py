"""THREATS.md and the tests agree: what it names exists, and no attack is without a line of it.

Covers: every test file and test that ``control/THREATS.md`` names, every file in ``tests/attacks``, promises
that name no test. Does not cover: whether a test shows what its line says.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
THREATS = TESTS.parent / "control" / "THREATS.md"
# Promises that have no test of their own file or name, and why. To add one is a decision.
WITHOUT_TEST: dict[str, str] = {}
_TEST = re.compile(r"`(test_\w+)`")


@cache
def names_of_tests() -> dict[str, set[str]]:
    """The tests of each file, by its path below ``tests``."""
    return {
        str(path.relative_to(TESTS)): {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        }
        for path in sorted(TESTS.rglob("test_*.py"))
    }


def named_files(text: str) -> set[str]:
    """Files, by their path below ``tests``; a pattern stands for all that match it."""
    found = set()
    for name in re.findall(r"`tests/([\w/*]+\.py)`", text):
        matching = {str(path.relative_to(TESTS)) for path in TESTS.glob(name)}
        assert matching, f"THREATS.md names tests/{name}, which does not exist"
        found |= matching
    return found


def promises(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each paragraph that promises something: those before "Not promised"."""
    for paragraph in text.partition("## Not promised")[0].split("\n\n"):
        if (name := re.match(r"\*\*(.+?)\*\*", paragraph, re.DOTALL)) is not None:
            yield " ".join(name[1].split()).rstrip("."), paragraph


def test_every_test_that_is_named_exists() -> None:
    text = THREATS.read_text()
    assert len(named_files(text)) > 30
    every = {name for names in names_of_tests().values() for name in names}
    assert set(_TEST.findall(text)) <= every


def test_every_attack_is_named() -> None:
    attacks = {name for name in names_of_tests() if name.startswith("attacks/")}
    assert attacks - named_files(THREATS.read_text()) == set()


def test_every_promise_names_a_test() -> None:
    without = {name for name, text in promises(THREATS.read_text()) if not named_files(text)}
    assert without == set(WITHOUT_TEST)
    assert len(list(promises(THREATS.read_text()))) > 20
