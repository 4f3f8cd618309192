"""The export engine against the programs themselves, in this process.

Covers: equality with ``program.module()`` to the bit for several small real models in three dtypes and with
other batches than the one of the export, what a request may get wrong, weights that come and go, and the order
in which they are laid out. Does not cover: hostile programs (``test_hostile_programs``), the checks of a
directory (``test_program``) or processes (``test_program_worker``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from export_samples import (
    SAMPLES,
    Loaded,
    cast_inputs,
    load_program,
    program_of,
    write_sample,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def loaded(root: Path) -> Mapping[str, Loaded]:
    return {name: load_program(write_sample(name, root / name)) for name in SAMPLES}


def flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values()) if isinstance(result, dict) else list(result)  # type: ignore[call-overload]


def plain(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return flat(program.module()(*inputs))


def same(ours: Mapping[str, torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours.values(), theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- fidelity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_batch_is_equal_to_the_program_to_the_bit(
    loaded: Mapping[str, Loaded], name: str, batch: int
) -> None:
    torch.manual_seed(batch)
    inputs = SAMPLES[name].inputs(batch)
    for _ in range(2):  # with sizes looked at and without
        same(loaded[name].ask(inputs), plain(program_of(name), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_equal_to_the_bit(root: Path, dtype: torch.dtype) -> None:
    model = load_program(write_sample("mlp", root / f"mlp-{dtype}", dtype))
    inputs = cast_inputs(SAMPLES["mlp"].inputs(4), dtype)
    same(model.ask(inputs), plain(program_of("mlp", dtype), inputs))
