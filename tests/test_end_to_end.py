"""The tour as a test: real processes, real models, the unmodified openai client, every promise checked.

Covers: the whole path of the main job. Does not cover: crashes of its parts, which have tests of their own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tour
from tour_models import MODELS, TENANTS

# Fewer than the tour's 200, still each model several times and restores from every tier.
REQUESTS = 60


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_tour_keeps_every_promise(tmp_path: Path) -> None:
    """Three tenants, ten models of three times the devices: all answered, exact, within budgets, isolated."""
    lines: list[str] = []
    result = tour.run_tour(tour.TourOptions(requests=REQUESTS, data_dir=tmp_path, say=lines.append))
    tour.print_result(result, lines.append)
    assert result.passed, "\n".join(lines)
    assert {row.model for row in result.models} == {model.ref for model in MODELS}
    assert sum(row.answers for row in result.models) == REQUESTS
    assert {row.tenant for row in result.tenants} == set(TENANTS)
    assert "nothing is left running" in {check.name for check in result.checks}
    assert json.loads(json.dumps(asdict(result)))["passed"] is True
