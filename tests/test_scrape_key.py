"""The scraper's key and what a scrape shows with and without it.

Covers: the file over restarts, its mode, files that are none, and which families are left out. Does not
cover: who is asked for the key (``attacks/test_gateway_auth.py``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from running_control import empty_report, model_report, tenant_report

from agent.accuracy import Accuracy
from agent.counters import Counters
from agent.metrics import render
from agent.scrape_key import FILE, BadScrapeKey, scrape_key
from packer.types import HostForm


def test_the_key_is_made_once_and_for_the_own_user(tmp_path: Path) -> None:
    made = scrape_key(tmp_path)
    path = tmp_path / FILE
    text = path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.matches(text)
    assert scrape_key(tmp_path).matches(text)
    assert not any(made.matches(wrong) for wrong in (None, "", text[:-1], text + "\n", text.lower()))
    path.unlink()
    assert not scrape_key(tmp_path).matches(text)


@pytest.mark.parametrize("text", ["", "short", "x" * 257, "\u00e9" * 40])
def test_a_file_that_holds_no_key_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(BadScrapeKey, match="holds no key; delete it"):
        scrape_key(tmp_path)


def test_families_of_tenants_are_left_out() -> None:
    report = empty_report(
        "http://127.0.0.1:9",
        (model_report("acme/m@0123456789abcdef"),),
        tenants=(tenant_report("acme", requests=3),),
    )
    counters = Counters()
    counters.refusals[("acme", "rate")] = 2
    whole, without = (
        render(report, counters, Accuracy(), None, HostForm.STORED, tenants) for tenants in (True, False)
    )
    named = {line.partition("{")[0] for line in whole.splitlines() if 'tenant="acme"' in line}
    assert {"bunkhouse_requests_total", "bunkhouse_refusals_total", "bunkhouse_tenant_bytes"} <= named
    assert "acme" not in without
    left = {line for line in without.splitlines() if not line.startswith("#")}
    assert left == {line for line in whole.splitlines() if not line.startswith("#") and "tenant=" not in line}
    assert any(line.startswith("bunkhouse_device_bytes") for line in left)
