"""A POST that is sent again has no second effect: the first answer is kept, sealed, and given again.

Covers: the ``Idempotency-Key`` header, telling a repetition from another request, duplicates at one time,
sealing kept answers, and the order in which all of that happens. Does not cover: the table
(``control.store``), or which transaction an answer goes into (each handler puts it beside its effect with
``Caller.remembering``, so a crash leaves both or neither).

Only successes are kept, and refusals that had an effect. Any other refusal did nothing and is decided anew:
a quota may have been raised meanwhile.

A kept answer may hold the one copy of a new key's text. It is sealed under a key that is made of the
caller's own API key and the Idempotency-Key, and found under a name made of the same: control stores
neither, so that who has the database can open none, however short the Idempotency-Key was, and no caller
can name what another caller kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from control.catalog import PutReplay, ReplayRow
from control.operations import IDEMPOTENCY_HEADER, REPLAYED_HEADER
from packer.http import ApiError, bearer_text
from packer.types import KIB

# Clients use random names of 16 to 64 characters; the limit is that of the Internet draft's implementers.
KEY_PATTERN = re.compile(r"[!-~]{1,255}")
# After this a repetition is a new request. Retries come within minutes; people come back the next morning.
LIFE_MS = 24 * 3600 * 1000
# A duplicate waits so long for the first to end, and then is told to come back.
WAIT_S = 10.0
RETRY_MS = 1_000
# The answer about a version of 256 files is less. A larger one is not kept; what makes such an answer
# (uploads, commits, registrations) finds its own effect again without.
ANSWER_BYTES_MAX = 64 * KIB
# Of an answer's headers those that mean something later.
KEPT_HEADERS = ("ETag", "Location")
_NONCE_BYTES = 12

BODY: web.RequestKey[bytes] = web.RequestKey("body", bytes)


class Kept(msgspec.Struct):
    """An answer as it is sealed."""

    status: int
    content_type: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Claim:
    """One request with an Idempotency-Key. Holds keys: never log it. ``kept``: its answer is stored, or is
    in a transaction that is under way."""

    owner: str
    slot: str
    fingerprint: str
    seal_key: bytes = field(repr=False)
    kept: bool = False

    def keep(self, answer: web.Response, now_ms: int) -> list[PutReplay]:
        """The change that stores the answer; none if it is too large."""
        body = answer.body if isinstance(answer.body, bytes) else b""
        headers = {name: answer.headers[name] for name in KEPT_HEADERS if name in answer.headers}
        plain = msgspec.msgpack.encode(Kept(answer.status, answer.content_type, headers, body))
        if len(plain) > ANSWER_BYTES_MAX:
            return []
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + AESGCM(self.seal_key).encrypt(nonce, plain, self.slot.encode())
        self.kept = True
        return [PutReplay(ReplayRow(self.slot, self.owner, self.fingerprint, now_ms, sealed))]

    def again(self, row: ReplayRow) -> web.Response:
        """The kept answer. Raises ``ApiError`` when it was another request's."""
        if not hmac.compare_digest(row.fingerprint, self.fingerprint):
            raise ApiError(
                422,
                "idempotency_key_reused",
                f"This {IDEMPOTENCY_HEADER} was used for another request; take a new one for each.",
                field=IDEMPOTENCY_HEADER,
            )
        nonce, sealed = row.sealed[:_NONCE_BYTES], row.sealed[_NONCE_BYTES:]
        try:
            plain = AESGCM(self.seal_key).decrypt(nonce, sealed, self.slot.encode())
        except InvalidTag:
            raise OSError("a kept answer in control's database was changed") from None
        kept = msgspec.msgpack.decode(plain, type=Kept)
        headers = {**kept.headers, REPLAYED_HEADER: "true"}
        if not kept.body:
            return web.Response(status=kept.status, headers=headers)
        return web.Response(
            status=kept.status, body=kept.body, content_type=kept.content_type, headers=headers
        )


def claim_of(request: web.Request, owner: str, body: bytes) -> Claim:
    """What a request with the header claims. Raises ``ApiError`` 400 when it is no key."""
    given = request.headers.getall(IDEMPOTENCY_HEADER, [])
    if len(given) != 1 or not KEY_PATTERN.fullmatch(given[0]):
        raise ApiError(
            400,
            "invalid_value",
            f"{IDEMPOTENCY_HEADER}: give it once, with 1 to 255 printable ASCII characters and no space.",
            field=IDEMPOTENCY_HEADER,
        )
    # The caller's key was checked already, so it has 256 random bits: enough for all that is made of it.
    secret = (bearer_text(request) or "").encode()
    root = hmac.digest(secret, b"bunkhouse idempotency\0" + given[0].encode(), "sha256")
    said = f"{request.method}\0{request.raw_path}\0{hashlib.sha256(body).hexdigest()}"
    return Claim(
        owner,
        hmac.digest(root, b"slot", "sha256").hex()[:32],
        hmac.digest(root, b"request\0" + said.encode("utf-8", "surrogateescape"), "sha256").hex()[:32],
        hmac.digest(root, b"seal", "sha256"),
    )


class Turns:
    """Requests under way by their slot: one at a time, so that two of the same can not both find nothing."""

    def __init__(self) -> None:
        self._ends: dict[str, asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, slot: str) -> AsyncIterator[None]:
        """Held while the request is answered. Raises ``ApiError`` 409 when another has it for too long."""
        try:
            async with asyncio.timeout(WAIT_S):
                while (other := self._ends.get(slot)) is not None:
                    await other.wait()
        except TimeoutError:
            raise ApiError(
                409,
                "request_in_progress",
                f"A request with this {IDEMPOTENCY_HEADER} is still being answered; send it again later.",
                field=IDEMPOTENCY_HEADER,
                retry_ms=RETRY_MS,
                should_retry=True,
            ) from None
        end = self._ends[slot] = asyncio.Event()
        try:
            yield
        finally:
            del self._ends[slot]
            end.set()
