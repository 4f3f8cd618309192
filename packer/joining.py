"""How a box gets its certificate from control, and another one in time: nodes and routers alike.

Covers: the join with a token, whose pin is checked first, renewal over a session that is open, renewal of a
certificate that has ended, and beginning anew after any of them. Does not cover: keys and files
(``packer.identity``), whom control certifies (``control.routes``), or what is said afterwards
(``agent.uplink``, ``control.router_line``).
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from packer.control_answers import Answer, read_answer, refusal_of, text_of
from packer.durable import write_private
from packer.identity import (
    TOKEN_CHARS_MAX,
    BadIdentity,
    Identity,
    check_pin,
    read_token,
    unverified_context,
    verified_context,
)
from packer.wire import (
    WIRE_VERSION,
    BadMessage,
    JoinAnswer,
    JoinAsk,
    LateRenewAsk,
    RenewAsk,
    decode,
    encode,
)

log = logging.getLogger("bunk.joining")

# Pauses between tries while control is away double, with jitter: a fleet must not come back in one wave.
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 10.0
# An answer that takes longer than this, beyond what it was asked to wait, is a dead connection.
ANSWER_TIMEOUT_S = 15.0
# Before a certificate that control has just given and does not accept is asked for again.
REFUSED_PAUSE_S = 1.0
# One that ends so soon may have ended by control's clock; it is renewed as one that has (``CLOCK_SKEW``).
EXPIRY_MARGIN_S = 1_800.0
CAS_BYTES_MAX = 64 * 1024  # two CAs while they overlap, 700 bytes each
JSON = {"Content-Type": "application/json"}


class Forgotten(Exception):
    """Control does not know this box: it was removed."""


class Refused(Exception):
    """Control does not accept the certificate."""


class Renewed(Exception):
    """The session must be made anew with another certificate."""


class Removed(BadIdentity):
    """An operator removed this box: it must stop serving."""


@dataclass(frozen=True, slots=True)
class Joiner:
    """What joins: ``what`` as in `bunk WHAT token create`, ``prefix`` of its routes at control, ``command``
    as a person starts it."""

    what: str
    prefix: str
    command: str


class Joining:
    """Of one box. ``token_file`` None: it must have joined before."""

    def __init__(
        self, joiner: Joiner, identity: Identity, control_url: str, name: str, token_file: Path | None
    ) -> None:
        self._joiner = joiner
        self._identity = identity
        self._url = control_url.rstrip("/")
        self._name = name
        self._token_file = token_file

    @property
    def has_token(self) -> bool:
        return self._token_file is not None and self._token_file.exists()

    async def run(
        self,
        talk: Callable[[], Awaitable[None]],
        joined: Callable[[], Awaitable[None]] | None = None,
        gateway_url: str = "",
    ) -> None:
        """Join if need be, then ``talk`` with a certificate that control may accept, for ever. ``talk`` ends
        by raising ``Renewed``, ``Refused`` or ``Forgotten``; ``joined`` is called after a join. Raises
        ``BadIdentity`` when only a person can help, of which ``Removed`` means that the box must stop serving
        as well."""
        what, refused = self._joiner.what, False
        while True:
            try:
                if await self._certified(refused, gateway_url) and joined is not None:
                    await joined()
                refused = False
                await talk()
            except Renewed:
                log.info("certificate or CAs renewed")
            except Refused as error:
                # The box may exist still: its certificate ended by control's clock, or its CA was replaced.
                log.warning("control does not accept this %s's certificate: %s", what, error)
                refused = True
                await pause(REFUSED_PAUSE_S)
            except Forgotten as error:
                aside = self._identity.forget()
                kept = f"; its former identity is kept in {aside}" if aside else ""
                if not self.has_token:
                    raise Removed(
                        f"control removed this {what} ({error}){kept}; join again with a new token from "
                        f"`bunk {what} token create`, in the same --data-dir if you like"
                    ) from None
                log.warning(
                    "control removed this %s (%s); joining afresh with the token%s", what, error, kept
                )

    async def _certified(self, refused: bool, gateway_url: str) -> bool:
        """Returns with a certificate that control may accept: True after a join. ``refused``: the present one
        it does not."""
        late = refused or self._identity.expired(EXPIRY_MARGIN_S)
        if self._identity.answer is None or (late and not await self.renew_late()):
            await self.join(gateway_url)
            return True
        return False

    def check(self) -> None:
        """Raises ``BadIdentity`` where it never joined and has no token to join with: before anything else is
        started in vain."""
        if self._identity.answer is None:
            read_token(self._token(), self._joiner.what)

    def _token(self) -> Path:
        if self._token_file is None:
            what, command = self._joiner.what, self._joiner.command
            made = f"bunk {what} token create --save-to FILE"
            raise BadIdentity(
                f"this {what} has not joined: make a token ({made}), and start {command} with "
                "--join-token-file FILE"
            )
        return self._token_file

    async def join(self, gateway_url: str = "") -> None:
        """Until control has let it in, however long it is away. Raises ``BadIdentity`` when only a person can
        help."""
        token_file, pause_s = self._token(), RETRY_FIRST_S
        while True:
            try:
                return await self._join(token_file, gateway_url)
            except aiohttp.ClientConnectorCertificateError as error:
                hint = "start control with --node-host and the name or address in --control"
                log.warning(
                    "join: control at %s is not certified under this name; %s: %s", self._url, hint, error
                )
            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:
                log.warning("join: control at %s does not answer: %s", self._url, error)
            pause_s = await pause(pause_s)

    async def _join(self, token_file: Path, gateway_url: str) -> None:
        token = read_token(token_file, self._joiner.what)
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.get(f"{self._url}/node/v1/ca", ssl=unverified_context()) as answer:
                shown = await read_answer(answer, CAS_BYTES_MAX)
            pinned_pem = check_pin(token, shown.body)
            csr_pem = self._identity.csr_pem(self._name)
            ask = JoinAsk(WIRE_VERSION, token.token_id, token.secret, csr_pem, self._name, gateway_url)
            async with session.post(
                f"{self._url}{self._joiner.prefix}/join",
                data=encode(ask),
                ssl=verified_context(pinned_pem),
                headers=JSON,
            ) as answer:
                got = await read_answer(answer)
        if got.status >= 500:
            raise aiohttp.ClientError(f"control answered {got.status}")
        if got.status >= 300:
            what = self._joiner.what
            raise BadIdentity(f"control refused to let this {what} join ({got.status}): {text_of(got.body)}")
        joined = decode(got.body, JoinAnswer)
        self._identity.save(joined)
        # A spent token is of no use to anybody but a thief.
        if token_file.is_file() and not token_file.is_symlink():  # and not /dev/stdin
            token_file.unlink(missing_ok=True)
        log.info("joined cluster %s as %s", joined.cluster, joined.node)

    # --- a certificate that has ended -------------------------------------------------------------

    async def renew_late(self) -> bool:
        """Until control gives a certificate to whose own has ended, however long it is away; False when a
        join must follow instead. Raises ``Forgotten`` and ``BadIdentity``."""
        pause_s, said = RETRY_FIRST_S, False
        while True:
            try:
                answer = await self._ask_late()
                if answer.status == 200:
                    self._identity.save(decode(answer.body, JoinAnswer))
                    log.info("the certificate had ended; control gave a new one")
                    return True
                code, text = refusal_of(answer.body)
                if code == f"{self._joiner.what}_removed":
                    raise Forgotten(text)
                if code == "renewal_refused":
                    if self.has_token:
                        return False
                    what, command = self._joiner.what, self._joiner.command
                    raise BadIdentity(
                        f"this {what}'s certificate has ended and control gives no other ({text}): make a "
                        f"join token with `bunk {what} token create` and start {command} with "
                        "--join-token-file"
                    )
                raise aiohttp.ClientError(f"control answered {answer.status}: {text}")
            except aiohttp.ClientConnectorCertificateError as error:
                hint = (
                    f"if its CA was replaced while this {self._joiner.what} was away, join with a new token"
                )
                log.warning(
                    "control at %s shows a certificate of another CA (%s); %s", self._url, error, hint
                )
            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:
                if not said:
                    log.warning("the certificate has ended and control does not renew it yet: %s", error)
                said = True
            pause_s = await pause(pause_s)

    async def _ask_late(self) -> Answer:
        """Without the certificate: TLS would refuse it. Control checks what the message shows instead."""
        mine = self._identity.answer
        assert mine is not None
        ask = LateRenewAsk(WIRE_VERSION, self._identity.csr_pem(mine.node), mine.certificate_pem)
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(
                f"{self._url}{self._joiner.prefix}/renew-late",
                data=encode(ask),
                ssl=verified_context(mine.ca_pem),
                headers=JSON,
            ) as answer,
        ):
            return await read_answer(answer)

    # --- in time ----------------------------------------------------------------------------------

    async def renew(self, post: Callable[[str, object], Awaitable[Answer]]) -> bool:
        """Asked again later when it fails; control is there, it just answered something else."""
        try:
            ask = RenewAsk(WIRE_VERSION, self._identity.csr_pem(self._name))
            answer = await post(f"{self._joiner.prefix}/renew", ask)
            if answer.status != 200:
                raise aiohttp.ClientError(f"control answered {answer.status}: {text_of(answer.body)}")
            self._identity.save(decode(answer.body, JoinAnswer))
        except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:
            left_s = self._identity.expires_s() - self._identity.now_s()
            log.warning("the certificate, which ends in %d s, is not renewed yet: %s", left_s, error)
            return False
        return True


def token_of_input(token_file: Path | None, data_dir: Path) -> Path | None:
    """``--join-token-file -``: what standard input brings lies in a private file until it is spent, since a
    join may have to be tried more than once."""
    if token_file != Path("-"):
        return token_file
    path = data_dir / "join.token"
    write_private(path, sys.stdin.readline(TOKEN_CHARS_MAX).encode())
    return path


async def pause(pause_s: float) -> float:
    """Wait about ``pause_s``; returns the next, longer pause."""
    await asyncio.sleep(pause_s * jitter())
    return min(RETRY_MAX_S, pause_s * 2)


def jitter() -> float:
    """The share of a pause that is waited; tests make it the same every time."""
    return random.uniform(0.5, 1.5)
