"""What all tests start from: no compiled kernels, unless a module asks for them.

Covers: the switch. Does not cover: anything else; fixtures live beside the tests that use them.

A node compiles its kernels for two seconds at each start, and most tests of nodes do not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from packer.kernels import SWITCH

os.environ.setdefault(SWITCH, "off")


@pytest.fixture(scope="module")
def compiled_kernels() -> Iterator[None]:
    """Nodes and workers that this module starts have compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SWITCH)
        yield
