"""A thief of join tokens: a server that poses as control must not get to see a token's secret."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path

import pytest
from aiohttp import web

from agent.uplink import Uplink
from control.authority import Authority, make_token
from packer.identity import BadIdentity, Identity, read_token
from packer.wire import Plan, PlanNumber, Record, Report


class NoNode:
    """A node that must never be asked anything, because joining fails first."""

    def report(self) -> Report:
        raise AssertionError("nothing may be reported before joining")

    spool_id = ""

    def have_plan(self) -> PlanNumber:
        raise AssertionError("no beat before joining")

    async def accept_plan(self, plan: Plan) -> None:
        raise AssertionError("no plan before joining")

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        raise AssertionError("no beat before joining")

    async def acknowledge(self, acked_seq: int) -> None:
        raise AssertionError("no beat before joining")


async def impostor(folder: Path, ca_pem: bytes | None) -> tuple[web.AppRunner, str, list[bytes]]:
    """A TLS server that records everything it is sent. ``ca_pem``: what it claims its CA to be; None:
    its own."""
    authority = Authority(folder, "other")
    seen: list[bytes] = []

    async def anything(request: web.Request) -> web.Response:
        seen.append(str(request.rel_url).encode() + repr(request.raw_headers).encode() + await request.read())
        return web.Response(body=ca_pem if ca_pem is not None else (folder / "ca.pem").read_bytes())

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", anything)
    context = authority.server_context(["127.0.0.1"])
    context.verify_mode = ssl.CERT_NONE
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    return runner, f"https://127.0.0.1:{runner.addresses[0][1]}", seen


@pytest.mark.parametrize("lies", ["", "right", "right+own", "own+right"])
async def test_a_secret_is_never_sent_to_a_server_of_another_ca(tmp_path: Path, lies: str) -> None:
    """Neither a server that shows its own CA nor one that replays the right CA gets the secret: the
    first fails the pin, the second the handshake. Its own CA beside the right one does not help it."""
    for name in ("real", "impostor"):
        (tmp_path / name).mkdir()
    real = Authority(tmp_path / "real", "mine")
    right_ca = (tmp_path / "real" / "ca.pem").read_bytes()
    Authority(tmp_path / "impostor", "other")
    cas = {"right": right_ca, "own": (tmp_path / "impostor" / "ca.pem").read_bytes()}
    shown = b"".join(cas[which] for which in lies.split("+")) if lies else None
    runner, url, seen = await impostor(tmp_path / "impostor", shown)
    token = make_token(real.pin)
    (tmp_path / "join.token").write_text(token.text)
    identity = Identity(tmp_path / "identity")
    uplink = Uplink(NoNode(), identity, url, "box", tmp_path / "join.token")
    try:
        if lies:
            # A failed handshake looks like control being away, so the node would go on trying; one try
            # is enough to see what it sends.
            with pytest.raises(ssl.SSLError):
                await join_once(uplink, tmp_path / "join.token")
        else:
            with pytest.raises(BadIdentity, match="The token's secret was not sent"):
                await uplink.run("http://127.0.0.1:9")
    finally:
        await runner.cleanup()
    assert seen, "the impostor was never asked; the test proves nothing"
    assert not any(token.secret.encode() in line for line in seen)
    assert identity.answer is None
    assert (tmp_path / "join.token").exists()


async def join_once(uplink: Uplink, token_file: Path) -> None:
    import aiohttp

    try:
        await uplink.joining._join(token_file, "")
    except aiohttp.ClientConnectorCertificateError as error:
        raise ssl.SSLError(str(error)) from error


@pytest.mark.parametrize("data", [b"", b"one.two", b"a.b.c.d", b"..", b"x" * 5000, b"a.b.\xff"])
def test_a_file_that_holds_no_token_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "join.token"
    path.write_bytes(data)
    with pytest.raises(BadIdentity, match=r"join\.token"):
        read_token(path)


def test_the_pin_is_the_whole_hash(tmp_path: Path) -> None:
    """A token whose pin is a prefix of the right one does not pass."""
    from packer.identity import JoinToken, check_pin

    authority = Authority(tmp_path, "mine")
    ca_pem = (tmp_path / "ca.pem").read_bytes()
    check_pin(JoinToken(authority.pin, "id", "secret"), ca_pem)
    assert len(base64.urlsafe_b64decode(authority.pin + "=" * (-len(authority.pin) % 4))) == 32
    for wrong in (authority.pin[:-1], authority.pin[:10], "", authority.pin.swapcase()):
        with pytest.raises(BadIdentity, match="pin"):
            check_pin(JoinToken(wrong, "id", "secret"), ca_pem)
