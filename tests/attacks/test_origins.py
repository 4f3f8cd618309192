"""Registered origins: only operators, only below the roots, no links, nothing that runs code.

Covers: ``file://`` URLs that try to leave the roots in every spelling, other schemes, links and special
files inside a directory, directories that are not models, and files that change while they are read.
Does not cover: pushed directories (``test_uploads``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from running_control import Answer, Running, model_files, running

from control.config import parse_config
from control.model_store import ModelStoreError, StoredDirectory, examine, open_origin
from packer.types import BadValue


@dataclass(slots=True)
class Site:
    """A control server that allows origins below ``roots`` and a good model at ``roots/model``."""

    control: Running
    key: str
    roots: Path
    outside: Path

    async def register(self, origin: str, key: str = "", name: str = "m") -> Answer:
        ask = {"name": name, "origin": origin}
        return await self.control.call("POST", "/api/v1/tenants/acme/models", ask, key=key)


def write_model(directory: Path, **more: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for path, data in {**model_files(), **more}.items():
        (directory / path).write_bytes(data)
    return directory


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    roots, outside = tmp_path / "roots", tmp_path / "outside"
    write_model(roots / "model")
    write_model(outside / "model")
    async with running(tmp_path / "control", origin_roots=(str(roots),)) as control:
        yield Site(control, await control.tenant("acme"), roots, outside)


async def refused(site: Site, answer: Answer, status: int = 400) -> None:
    assert answer.status == status, answer.body
    assert answer.error["message"]
    assert (await site.control.call("GET", "/api/v1/models")).json()["items"] == []


async def test_a_tenant_may_not_register_an_origin(site: Site) -> None:
    answer = await site.register((site.roots / "model").as_uri(), key=site.key)
    await refused(site, answer, 403)


@pytest.mark.parametrize(
    "spelling",
    [
        "file://{outside}/model",
        "file://{roots}/../outside/model",
        "file://{roots}/model/../../outside/model",
        "file://{roots}/%2e%2e/outside/model",
        "file://{roots}/%2E%2E%2Foutside%2Fmodel",
        "file://{roots}x/model",
        "file://{roots}/..",
        "file:///",
        "file:///etc",
        "file:///proc/self/root/etc",
        "file://{roots}/link-out/model",
        "file://evil.example{roots}/model",
        "file://user@localhost{roots}/model",
        "file:{roots}/../outside/model",
        "file://{roots}/model%00/../../outside",
        "file://{roots}/model?x=1",
        "file://{roots}/model#x",
        "file:roots/model",
        "{outside}/model",
        "",
        "file://[::1",
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/model",
        "s3://bucket/model",
        "gs://bucket/model",
        "memory:///",
        "javascript:alert(1)",
        "file://{roots}/\ud800",
        "file://{roots}/a\nb",
        "x" * 5_000,
    ],
    ids=ascii,
)
async def test_nothing_outside_of_the_roots_can_be_registered(site: Site, spelling: str) -> None:
    (site.roots / "link-out").symlink_to(site.outside)
    await refused(site, await site.register(spelling.format(roots=site.roots, outside=site.outside)))


async def test_without_roots_no_origin_can_be_registered(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    async with running(tmp_path / "control") as control:
        await control.tenant("acme")
        answer = await control.call(
            "POST", "/api/v1/tenants/acme/models", {"name": "m", "origin": directory.as_uri()}
        )
        assert (answer.status, answer.error["field"]) == (400, "origin")
        assert "--origin-root" in answer.error["message"]


def test_a_refused_origin_is_named_with_the_way_out(tmp_path: Path) -> None:
    for url, words in (
        ("/models/m", "write file:///"),
        ("file:///models/m", "--origin-root DIR"),
        ("s3://bucket/m", "push the directory instead"),
        ((tmp_path / "none").as_uri(), "not a directory on the control server"),
    ):
        with pytest.raises(BadValue, match=words) as refusal:
            open_origin(url, [str(tmp_path)])
        assert repr(url.removeprefix("file://")) in str(refusal.value)


def test_an_origin_root_that_is_not_there_is_said_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(["serve", "--data-dir", str(tmp_path), "--origin-root", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "--origin-root" in capsys.readouterr().err


def test_url_prefixes_are_compared_by_segment() -> None:
    for url in (
        "s3://bucket/models-evil/x",
        "s3://bucket/models/../x",
        "s3://bucket/models/%2e%2e/x",
        "s3://other/models",
    ):
        with pytest.raises(BadValue, match="not below"):
            open_origin(url, ["s3://bucket/models"])
    url, _ = open_origin("s3://bucket/models/x/", ["s3://bucket/models"])
    assert url == "s3://bucket/models/x"


@pytest.mark.parametrize("place", ["config.json", "extra.json", "1_Pooling"])
async def test_links_are_refused_with_their_name(site: Site, place: str) -> None:
    link = site.roots / "model" / place
    link.unlink(missing_ok=True)
    link.symlink_to("/etc" if place == "1_Pooling" else "/etc/passwd")
    answer = await site.register((site.roots / "model").as_uri())
    await refused(site, answer, 422)
    assert answer.error["field"] == place
    assert "link" in answer.error["message"]


async def test_special_files_are_refused_and_not_opened(site: Site) -> None:
    """Opening a FIFO would wait for ever."""
    os.mkfifo(site.roots / "model" / "tokenizer_config.json")
    await refused(site, await site.register((site.roots / "model").as_uri()), 422)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_evil.py", "x.pkl", "notes.docx"])
async def test_code_and_pickles_are_refused_with_their_name(site: Site, name: str) -> None:
    (site.roots / "model" / name).write_bytes(b"x")
    answer = await site.register((site.roots / "model").as_uri())
    await refused(site, answer, 422)
    assert answer.error["field"] == name


async def test_what_is_no_model_directory_is_refused(site: Site) -> None:
    (site.roots / "empty").mkdir()
    (site.roots / "file").write_bytes(b"x")
    for name, status in (("empty", 422), ("file", 400), ("absent", 400), ("", 422)):
        await refused(site, await site.register(f"file://{site.roots}/{name}"), status)


async def test_a_directory_with_countless_files_is_refused(site: Site) -> None:
    for number in range(3_000):
        (site.roots / "model" / f"f{number}.json").touch()
    answer = await site.register((site.roots / "model").as_uri())
    await refused(site, answer, 422)


async def test_a_file_that_shrinks_while_it_is_read_is_an_error(site: Site, tmp_path: Path) -> None:
    _, directory = open_origin((site.roots / "model").as_uri(), [str(site.roots)])
    assert isinstance(directory, StoredDirectory)
    sizes = dict(directory.sizes())

    class Shrinking:
        def sizes(self) -> dict[str, int]:
            return sizes

        def read(self, path: str, start: int, nbytes: int) -> bytes:
            (site.roots / "model" / "tokenizer.json").write_bytes(b"")
            return directory.read(path, start, nbytes)

    with pytest.raises(ModelStoreError):
        examine(Shrinking())
