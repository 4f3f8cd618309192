"""What a router keeps on its disk of what control said, when somebody else writes there.

Covers: files that were changed, cut, made by another router or for another cluster, made without the router's
key, that are no files or far too large; and that none of them is a word of control's. Does not cover: a view
that is too old (``test_kept_view``), or who has the router's key as well: that is the router.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from running_control import PATIENCE_S, Running, running
from running_routers import joined_router, router_config, serving

from control import kept_view
from control.config import Address
from control.kept_view import FILE_NAME, opened, sealed
from control.router_process import Router
from packer.identity import Identity

NOBODY = "https://127.0.0.1:9"
PURPOSE = "kept view"


@dataclass(slots=True)
class Site:
    """A router that is stopped, and another one of the cluster; control is of no help."""

    control: Running
    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / "r1" / FILE_NAME

    def key_of(self, router: str) -> bytes:
        return Identity(self.folder / router / "identity").secret_for(PURPOSE)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        key = await control.tenant("acme")
        for name in ("r1", "r2"):
            async with joined_router(control, tmp_path / name, name):
                pass
        yield Site(control, tmp_path, key)


async def status_of(site: Site) -> tuple[int, str]:
    """What a tenant with a good key is answered by the router, started while control is away."""
    config = replace(router_config(site.control, site.folder / "r1", "r1", None), control_url=NOBODY)
    router = Router(replace(config, listen=Address("127.0.0.1", 0)))
    async with serving(router, site.control) as again:
        async with asyncio.timeout(PATIENCE_S):
            await router.settled.wait()
        answer = await again.call("GET", "/v1/models", key=site.key)
        return answer.status, answer.error["code"] if answer.status != 200 else ""


async def test_its_own_view_is_used(site: Site) -> None:
    assert await status_of(site) == (200, "")


def flipped(site: Site) -> None:
    data = bytearray(site.path.read_bytes())
    data[len(data) // 2] ^= 1
    site.path.write_bytes(data)


def cut(site: Site) -> None:
    site.path.write_bytes(site.path.read_bytes()[:-9])


def emptied(site: Site) -> None:
    site.path.write_bytes(b"")


def of_another_router(site: Site) -> None:
    """It is true, of this cluster, and sealed as it should be, with the other one's key."""
    site.path.write_bytes((site.folder / "r2" / FILE_NAME).read_bytes())


def bent(site: Site, key: bytes, **changes: str) -> None:
    own = Identity(site.folder / "r1" / "identity")
    kept = opened(site.path.read_bytes(), site.key_of("r1"), own.cluster, "r1", round(own.now_s() * 1000))
    site.path.write_bytes(sealed(replace(kept, **changes), key))  # type: ignore[arg-type]


def made_without_the_key(site: Site) -> None:
    bent(site, bytes(32))


def of_another_cluster(site: Site) -> None:
    bent(site, site.key_of("r1"), cluster="another")


def of_another_name(site: Site) -> None:
    bent(site, site.key_of("r1"), router="r2")


def a_link(site: Site) -> None:
    site.path.rename(site.folder / "elsewhere")
    site.path.symlink_to(site.folder / "elsewhere")


def a_pipe(site: Site) -> None:
    """Opening it would wait for ever."""
    site.path.unlink()
    os.mkfifo(site.path)


def a_folder(site: Site) -> None:
    site.path.unlink()
    site.path.mkdir()


def far_too_large(site: Site) -> None:
    with site.path.open("ab") as file:
        file.truncate(kept_view.VIEW_BYTES_MAX + 66)


FORGERIES: list[tuple[Callable[[Site], None], str]] = [
    (flipped, "changed since"),
    (cut, "changed since"),
    (emptied, "changed since"),
    (of_another_router, "not written by this router"),
    (made_without_the_key, "not written by this router"),
    (of_another_cluster, "of cluster another"),
    (of_another_name, "of router r2"),
    (a_link, "symbolic link"),
    (a_pipe, "no regular file"),
    (a_folder, "directory"),
    (far_too_large, "more than"),
]


async def test_what_somebody_else_wrote_counts_as_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One router is started on each of them. It says why, and is not ready until control speaks."""
    true = site.path.read_bytes()
    monkeypatch.setattr(kept_view, "VIEW_BYTES_MAX", 1 << 20)
    for forge, why in FORGERIES:
        if site.path.is_dir():
            site.path.rmdir()
        site.path.unlink(missing_ok=True)
        site.path.write_bytes(true)
        forge(site)
        caplog.clear()
        assert await status_of(site) == (503, "router_not_ready"), forge.__name__
        assert why in caplog.text, forge.__name__
