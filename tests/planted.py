"""Planting a bug in one module of the product as it is imported, so that any test can run against it.

Covers: every module that has a mutant (``mutants`` and the files like it), as a pytest
plugin (``-p planted``, the bug named by ``BUNK_PLANTED``) or by ``install``. Nothing on disk changes. Does
not cover: choosing tests or judging (``scripts/mutation.py``).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from copies_mutants import COPIES_MUTANTS
from fleet_mutants import FLEET_MUTANTS
from gang_mutants import GANG_MUTANTS
from identity_mutants import IDENTITY_MUTANTS
from mutants import MUTANTS, WORTH_MUTANTS, Mutant
from prefetch_mutants import PREFETCH_MUTANTS
from quota_mutants import LENDING_MUTANTS, RATE_MUTANTS
from router_mutants import ROUTER_MUTANTS
from share_mutants import SHARE_MUTANTS
from usage_mutants import USAGE_MUTANTS

ROOT = Path(__file__).resolve().parent.parent
EVERY_MUTANT = (
    MUTANTS
    + WORTH_MUTANTS
    + LENDING_MUTANTS
    + RATE_MUTANTS
    + PREFETCH_MUTANTS
    + GANG_MUTANTS
    + FLEET_MUTANTS
    + COPIES_MUTANTS
    + SHARE_MUTANTS
    + IDENTITY_MUTANTS
    + USAGE_MUTANTS
    + ROUTER_MUTANTS
)


def module_of(mutant: Mutant) -> str:
    """The full name: mutants of the node's core say the last part only."""
    return mutant.module if "." in mutant.module else f"packer.{mutant.module}"


def path_of(mutant: Mutant) -> Path:
    return ROOT.joinpath(*module_of(mutant).split(".")).with_suffix(".py")


def anchors(mutant: Mutant) -> int:
    """How often the text to change is in the source; anything but 1 is an error."""
    try:
        return path_of(mutant).read_text().count(mutant.old)
    except FileNotFoundError:
        return 0


def source_with(mutant: Mutant) -> str:
    """The module's text with the bug in it."""
    return path_of(mutant).read_text().replace(mutant.old, mutant.new)


def find(what: str) -> Mutant:
    return next(mutant for mutant in EVERY_MUTANT if mutant.what == what)


class Planter(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds the one module, and loads it changed; without bytecode, which would be kept for others."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = module_of(mutant)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, path_of(self.mutant), loader=self)

    def get_source(self, name: str) -> str:
        count = anchors(self.mutant)
        assert count == 1, f"mutant {self.mutant.what!r}: its text is {count} times in {self.name}"
        return source_with(self.mutant)


def install(mutant: Mutant) -> None:
    """Before the module is imported for the first time."""
    assert module_of(mutant) not in sys.modules, f"{module_of(mutant)} was imported before its bug"
    sys.meta_path.insert(0, Planter(mutant))


# A bug that never ends is ended by processor time, which a busy machine does not shorten.
if os.environ.get("BUNK_CPU_LIMIT_S"):
    limit_s = int(os.environ["BUNK_CPU_LIMIT_S"])
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))

if os.environ.get("BUNK_PLANTED"):
    install(find(os.environ["BUNK_PLANTED"]))
