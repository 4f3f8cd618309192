"""What a router keeps on its disk of what control said: the file, when it is written, and what is refused.

Covers: ``control.kept_view`` with a view and an identity of its own, on a moved clock. Does not cover: what
is in it (``test_feed``), a router that goes by it (``test_router_process``, and as real processes
``test_shares_running``), or strangers' files (``attacks/test_kept_views``).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
from virtual_clock import run_virtual

from control import cluster as fleet
from control import kept_view
from control.catalog import Catalog, KeyRow
from control.kept_view import AGE_MS_MAX, AHEAD_MS_MAX, FILE_NAME, BadView, ViewKeeper
from control.router_view import RouterView
from control.router_wire import KEY, RouterAnswer, Told, key_told
from packer.identity import Identity
from packer.wire import WIRE_VERSION, JoinAnswer

START_S = 1_000_000.0


class Site:
    """A router's data directory, and what it knows; all clocks stand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s, self.age_ms = folder, START_S, 0
        self.identity = Identity(self.folder / "identity", lambda: self.now_s)
        self.identity.csr_pem("r1")
        self.identity.answer = JoinAnswer(WIRE_VERSION, "cluster", "r1", "", "")
        self.view = RouterView(Catalog(), fleet.Cluster(), lambda: 5_000)
        self.keeper = self.keeper_of()

    def keeper_of(self) -> ViewKeeper:
        return ViewKeeper(self.folder, self.identity, self.view, lambda: self.age_ms, lambda: "10.0.0.9")

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    def hear(self, number: int) -> None:
        """Control says that there is one more key."""
        row = KeyRow(f"k{number}", "hash", "acme", "", 0, None)
        word = Told(f"{KEY}/{row.key_id}", key_told(row, 1))  # type: ignore[arg-type]
        base = self.view.have
        self.view.take(
            RouterAnswer(WIRE_VERSION, "cluster", "one", 1, 1, "", 0, base, base + 1, False, (word,))
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def test_what_is_kept_comes_back_whole(site: Site) -> None:
    site.hear(1)
    site.age_ms = 3_000
    await site.keeper.keep()
    assert site.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in site.folder.iterdir()] == ["identity", FILE_NAME]
    site.now_s += 60
    kept = await site.keeper.load()
    assert kept is not None
    assert (kept.cluster, kept.router, kept.control_at) == ("cluster", "r1", "10.0.0.9")
    assert (kept.heard_ms, kept.epoch, kept.seq) == (START_S * 1_000 - 3_000, 1, 1)
    assert [word.name for word in kept.words] == ["key/k1"]


@pytest.mark.parametrize(
    ("later_ms", "why"), [(AGE_MS_MAX + 1, "24 hours old, more than 24"), (-AHEAD_MS_MAX - 1, "set back")]
)
async def test_a_view_of_another_time_is_not_used(
    site: Site, later_ms: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is just young enough is."""
    site.hear(1)
    await site.keeper.keep()
    site.now_s += (later_ms - (1 if later_ms > 0 else -1)) / 1_000
    assert await site.keeper.load() is not None
    site.now_s = START_S + later_ms / 1_000
    assert await site.keeper.load() is None
    assert why in caplog.text


def written_at(
    site: Site, monkeypatch: pytest.MonkeyPatch, take_s: float, busy_s: int, calm_s: int
) -> list[float]:
    """When the file is written, on a virtual clock: control says something every second, and then nothing."""
    times: list[float] = []

    async def pass_by() -> None:
        loop = asyncio.get_running_loop()

        async def in_thread(call: Callable[[], None]) -> None:
            times.append(loop.time())
            await asyncio.sleep(take_s)

        monkeypatch.setattr(site.keeper, "_in_thread", in_thread)
        while loop.time() < busy_s + calm_s:
            if loop.time() < busy_s:
                site.hear(round(loop.time()))
            await site.keeper.look()
            await asyncio.sleep(1)
            site.now_s = START_S + loop.time()

    run_virtual(pass_by())
    return times


def test_it_is_written_soon_seldom_and_once_an_hour_when_nothing_is_new(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = written_at(site, monkeypatch, 0.01, 100, 3 * 3_600)
    busy = [at for at in times if at < 100]
    assert busy[0] == 0
    pauses = [after - before for before, after in pairwise(busy)]
    assert kept_view.KEEP_EVERY_S <= min(pauses) <= max(pauses) <= kept_view.KEEP_EVERY_S + 1.5
    calm = [at for at in times if at > 100 + kept_view.KEEP_EVERY_S]
    assert 2 <= len(calm) <= 3


def test_a_disk_that_is_slow_is_not_kept_busy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    times = written_at(site, monkeypatch, 2.0, 1_000, 0)
    assert len([at for at in times if at < 1_000]) <= 1_000 / (2 * kept_view.KEEP_SHARE) + 1


async def test_a_stop_writes_what_is_not_there_yet_and_nothing_else(site: Site) -> None:
    written: list[Path] = []
    write = partial(mock.patch.object, kept_view, "write_private")
    with write(side_effect=lambda path, data: written.append(path)):
        await site.keeper.close()  # nothing was heard
        site.keeper = site.keeper_of()
        site.hear(1)
        await site.keeper.close()
        site.keeper = site.keeper_of()
        site.view.is_kept = True  # control has said nothing since the start
        await site.keeper.close()
    assert written == [site.path]


async def test_a_disk_that_is_full_keeps_nobody_from_routing_and_is_said_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.hear(1)
    await site.keeper.keep()
    before = site.path.read_bytes()
    site.hear(2)
    with mock.patch.object(kept_view, "write_private", side_effect=OSError(28, "no space")):
        await site.keeper.keep()
        await site.keeper.keep()
    assert caplog.text.count("no space") == 1
    assert site.path.read_bytes() == before
    assert site.keeper._has_news(kept_view.STAMP_EVERY_MS)
    await site.keeper.keep()
    assert site.path.read_bytes() != before


async def test_a_view_above_the_limit_is_not_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.hear(1)
    monkeypatch.setattr(kept_view, "VIEW_BYTES_MAX", 100)
    await site.keeper.keep()
    assert not site.path.exists()
    assert "more than 100" in caplog.text


async def test_who_has_no_identity_keeps_and_uses_nothing(site: Site) -> None:
    site.hear(1)
    await site.keeper.keep()
    site.identity.answer = None
    assert await site.keeper.load() is None
    await site.keeper.forget()
    await site.keeper.keep()
    assert not site.path.exists()


def test_the_key_of_the_seal_is_the_routers_own(tmp_path: Path) -> None:
    one, other = Site(tmp_path / "one").identity, Site(tmp_path / "other").identity
    keys = {one.secret_for("kept view"), one.secret_for("another purpose"), other.secret_for("kept view")}
    assert len(keys) == 3
    assert one.secret_for("kept view") in keys


def test_a_file_of_another_release_says_so(site: Site) -> None:
    key = site.identity.secret_for("kept view")
    body = b'{"version": 99}'
    data = hmac.digest(key, body, "sha256").hex().encode() + b"\n" + body
    with pytest.raises(BadView, match="of another release"):
        kept_view.opened(data, key, "cluster", "r1", 0)
