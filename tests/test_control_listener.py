"""Where an agent listens: for tenants, in plain HTTP or with an operator's certificate, and for control.

Covers: the options and opening the listeners. Does not cover: who is let in at control's
(``attacks/test_posing``).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from running_workers import config_in

from agent import __main__ as agent_main
from agent import config as configuration
from agent.config import TlsFiles
from agent.control_listener import control_listener
from control.ca import Ca, make_ca, private_pem
from packer.certificates import pem_of
from packer.identity import Identity
from packer.types import BadValue


def load(*words: str) -> configuration.AgentConfig:
    return configuration.load(["run", "--data-dir", "d", "--device", "cpu:16MiB", *words])


def test_the_options_say_where_and_how(tmp_path: Path) -> None:
    assert load("--listen", "10.0.0.1:8100").route_listen == ("10.0.0.1", 0)
    assert load("--route-listen", "0.0.0.0:9").route_listen == ("0.0.0.0", 9)
    assert load("--route-listen", "off").route_listen is None
    assert load("--route-url", "https://box:9").route_url == "https://box:9"
    assert load("--tls-cert", "c", "--tls-key", "k").tls == TlsFiles(Path("c"), Path("k"))
    assert load().tls is None


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--route-listen", "everywhere"], "--route-listen"),
        (["--route-url", "http://box:9"], "--route-url"),
        (["--tls-cert", "c"], "--tls-cert"),
        (["--tls-key", "k"], "--tls-key"),
    ],
)
def test_options_that_can_not_be_are_named(words: list[str], field: str) -> None:
    with pytest.raises(BadValue, match=field):
        load(*words)


def test_a_node_without_control_listens_for_none(tmp_path: Path) -> None:
    config = replace(config_in(tmp_path), route_listen=("127.0.0.1", 0))
    identity = Identity(tmp_path)
    assert control_listener(config, identity) is None
    assert control_listener(replace(config, control_url="https://c:1", route_listen=None), identity) is None
    assert control_listener(replace(config, control_url="https://c:1"), identity) is not None


@pytest_asyncio.fixture
async def runner() -> AsyncIterator[web.AppRunner]:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_get("/", hello)
    made = web.AppRunner(app)
    await made.setup()
    yield made
    await made.cleanup()


def operators_files(folder: Path) -> tuple[TlsFiles, Ca]:
    """A certificate for this machine as an operator has it, and its CA."""
    ca, key = make_ca("an operator's", datetime.now(UTC)), ec.generate_private_key(ec.SECP256R1())
    names, usages = [x509.DNSName("localhost")], [ExtendedKeyUsageOID.SERVER_AUTH]
    leaf = ca.sign(key.public_key(), "box", names, usages, timedelta(days=1), datetime.now(UTC))
    files = TlsFiles(folder / "chain.pem", folder / "key.pem")
    files.certificate.write_text(pem_of(leaf))
    files.key.write_bytes(private_pem(key))
    return files, ca


NO_CONTROL = cast(Any, SimpleNamespace(control_listener=None))


async def test_tenants_are_served_over_tls_with_the_operators_certificate(
    tmp_path: Path, runner: web.AppRunner
) -> None:
    files, ca = operators_files(tmp_path)
    url = await agent_main._listen(replace(config_in(tmp_path), tls=files), NO_CONTROL, runner)
    assert url is not None
    assert url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cadata=ca.pem)
    async with (
        aiohttp.ClientSession() as session,
        session.get(url.replace("127.0.0.1", "localhost"), ssl=context) as answer,
    ):
        assert await answer.text() == "hello"


async def test_files_that_are_no_certificate_keep_the_agent_from_starting(
    tmp_path: Path, runner: web.AppRunner, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x").write_text("nothing")
    for path in (tmp_path / "x", tmp_path / "absent"):
        config = replace(config_in(tmp_path), tls=TlsFiles(path, path))
        assert await agent_main._listen(config, NO_CONTROL, runner) is None
    assert caplog.text.count("--listen 127.0.0.1:0") == 2
