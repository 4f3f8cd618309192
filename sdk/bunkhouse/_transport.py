"""Moves requests and answers over HTTP, with retries: once blocking, once async.

Covers: the two senders over httpx2, the mapping of its exceptions, limits on what is read. Does not
cover: what to send (``_calls``), whether to retry (``_retry``). Imported on the first client, not
with the package: httpx2 costs about 100 ms to import.
"""

from __future__ import annotations

import asyncio
import platform
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache

import httpx2

from bunkhouse._direct import NODE_CONNECT_TIMEOUT_S, Ask, DirectWays, Way
from bunkhouse._errors import BadAnswer, TimedOut, Unreachable
from bunkhouse._request import ANSWER_BYTES_MAX, Address, Answer, Request, error_of, once
from bunkhouse._retry import RetryBudget, RetryPolicy, Tries
from bunkhouse._version import __version__

# A server that does not accept a connection in this time is away; its answers may take far longer.
CONNECT_TIMEOUT_S = 5.0
# Connections kept open per client; one per concurrent call is enough, idle ones cost the server.
CONNECTIONS_MAX = 100
CONNECTIONS_IDLE_MAX = 20
USER_AGENT = f"bunkhouse-python/{__version__} python/{platform.python_version()}"


def _headers(address: Address) -> dict[str, str]:
    headers = {
        "user-agent": USER_AGENT,
        "accept": "application/json",
        # Answers are read against a limit in bytes; compression would let a small one grow past it.
        "accept-encoding": "identity",
    }
    if address.api_key:
        headers["authorization"] = f"Bearer {address.api_key}"
    return headers


@cache
def _trusted(trust_env: bool) -> ssl.SSLContext:
    """Whom TLS trusts, read once per process: reading takes 27 ms of processor time, for each client anew and
    where nothing is encrypted too."""
    return httpx2.create_ssl_context(trust_env=trust_env)


def _limits() -> httpx2.Limits:
    return httpx2.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_IDLE_MAX)


def _timeout(request: Request, timeout_s: float | None, way: Way | None) -> httpx2.Timeout:
    limit_s = request.timeout_s if timeout_s is None else timeout_s
    connect_s = CONNECT_TIMEOUT_S if way is None else NODE_CONNECT_TIMEOUT_S
    return httpx2.Timeout(limit_s, connect=min(connect_s, limit_s))


def _target(request: Request, way: Way | None) -> tuple[str, dict[str, str]]:
    """Where a request goes and with which headers: a node's ticket takes the place of the API key."""
    if way is None:
        return request.path, dict(request.headers)
    return way.url + request.path, {**request.headers, "authorization": f"Bearer {way.ticket}"}


def _where(address: Address, error: httpx2.HTTPError) -> str:
    try:
        url = error.request.url
    except RuntimeError:
        return address.base_url
    return f"{url.scheme}://{url.netloc.decode()}"


def _unreachable(address: Address, error: httpx2.HTTPError) -> Unreachable:
    """What an exception of httpx2 means to a caller."""
    where = _where(address, error)
    reason = str(error) or type(error).__name__
    if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError)):
        return Unreachable(f"cannot reach {where}: {reason}", sent=False)
    if isinstance(error, httpx2.ConnectTimeout):
        return TimedOut(f"cannot reach {where}: no connection within {CONNECT_TIMEOUT_S:g} s", sent=False)
    if isinstance(error, httpx2.PoolTimeout):
        return TimedOut(f"all {CONNECTIONS_MAX} connections of this client are busy", sent=False)
    if isinstance(error, httpx2.TimeoutException):
        return TimedOut(f"no answer from {where} in time: {reason}", sent=True)
    return Unreachable(f"the connection to {where} broke: {reason}", sent=True)


def _answer_head(response: httpx2.Response) -> Answer:
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()})


class _BodyBuffer:
    """Collects a body up to the limit."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, chunk: bytes) -> None:
        if len(self.data) + len(chunk) > ANSWER_BYTES_MAX:
            raise BadAnswer(
                f"the answer is above the limit of {ANSWER_BYTES_MAX} bytes: ask for less at once"
            )
        self.data += chunk


class Sender:
    """Blocking. Safe to share between threads."""

    def __init__(
        self,
        address: Address,
        timeout_s: float | None,
        retry: RetryPolicy,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        direct: bool | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry
        self._budget = RetryBudget()
        # Whoever brings a transport of their own decides where connections go.
        self._ways = DirectWays(address, False if direct is None and transport is not None else direct)
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=address.base_url,
            headers=_headers(address),
            limits=_limits(),
            transport=transport,
            # A proxy set for the office network must not stand between us and this machine.
            trust_env=not address.loopback,
            verify=_trusted(not address.loopback),
        )

    def close(self) -> None:
        self._http.close()

    def send(self, request: Request) -> Answer:
        """Send until the outcome is final; raise it unless it is a success or accepted."""
        if request.delay_s:
            self._sleep(request.delay_s)
        tries = Tries(self._retry, self._budget)
        request = once(request)
        way = self._way(request)
        while True:
            try:
                outcome: Answer | Unreachable = self._read(self._open(request, way))
            except Unreachable as error:
                outcome = error
            if way is not None and self._ways.falls_back(request, way, outcome, time.monotonic()):
                way = None
                continue
            delay_s = tries.wait_s(request, outcome, time.time())
            if delay_s is None:
                return _final(request, outcome, tries)
            self._sleep(delay_s)

    def open(self, request: Request) -> tuple[Answer, httpx2.Response]:
        """Like ``send``, but returns as soon as the head of a success is there; the caller closes it."""
        tries = Tries(self._retry, self._budget)
        way = self._way(request)
        while True:
            outcome: Answer | Unreachable
            try:
                response = self._open(request, way)
                head = _answer_head(response)
                if 200 <= head.status < 300:
                    tries.wait_s(request, head, 0.0)
                    return head, response
                outcome = self._read(response)
            except Unreachable as error:
                outcome = error
            if way is not None and self._ways.falls_back(request, way, outcome, time.monotonic()):
                way = None
                continue
            delay_s = tries.wait_s(request, outcome, time.time())
            if delay_s is None:
                _final(request, outcome, tries)
                raise BadAnswer("the server answered a stream with an empty status")
            self._sleep(delay_s)

    def broken(self, error: httpx2.HTTPError) -> Unreachable:
        """The exception for an error while a stream is read."""
        return _unreachable(self.address, error)

    def _way(self, request: Request) -> Way | None:
        """The node to call directly, if there is one; asks the server for it now and then."""
        way = self._ways.way(request, time.monotonic())
        if not isinstance(way, Ask):
            return way
        answer: Answer | None = None
        try:
            answer = self._read(self._open(way.request, None))
        except (Unreachable, BadAnswer):
            pass
        finally:
            way = self._ways.told(way.model, answer, time.monotonic())
        return way

    def _open(self, request: Request, way: Way | None) -> httpx2.Response:
        path, headers = _target(request, way)
        try:
            built = self._http.build_request(
                request.method,
                path,
                content=request.body,
                headers=headers,
                timeout=_timeout(request, self._timeout_s, way),
            )
            return self._http.send(built, stream=True)
        except httpx2.HTTPError as error:
            raise _unreachable(self.address, error) from error

    def _read(self, response: httpx2.Response) -> Answer:
        body = _BodyBuffer()
        try:
            for chunk in response.iter_bytes():
                body.add(chunk)
        except httpx2.HTTPError as error:
            raise _unreachable(self.address, error) from error
        finally:
            response.close()
        return replace(_answer_head(response), body=bytes(body.data))


class AsyncSender:
    """The same on asyncio."""

    def __init__(
        self,
        address: Address,
        timeout_s: float | None,
        retry: RetryPolicy,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        direct: bool | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry
        self._budget = RetryBudget()
        # Whoever brings a transport of their own decides where connections go.
        self._ways = DirectWays(address, False if direct is None and transport is not None else direct)
        self._sleep = sleep
        self._http = httpx2.AsyncClient(
            base_url=address.base_url,
            headers=_headers(address),
            limits=_limits(),
            transport=transport,
            trust_env=not address.loopback,
            verify=_trusted(not address.loopback),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, request: Request) -> Answer:
        """Send until the outcome is final; raise it unless it is a success or accepted."""
        if request.delay_s:
            await self._sleep(request.delay_s)
        tries = Tries(self._retry, self._budget)
        request = once(request)
        way = await self._way(request)
        while True:
            try:
                outcome: Answer | Unreachable = await self._read(await self._open(request, way))
            except Unreachable as error:
                outcome = error
            if way is not None and self._ways.falls_back(request, way, outcome, time.monotonic()):
                way = None
                continue
            delay_s = tries.wait_s(request, outcome, time.time())
            if delay_s is None:
                return _final(request, outcome, tries)
            await self._sleep(delay_s)

    async def open(self, request: Request) -> tuple[Answer, httpx2.Response]:
        """Like ``send``, but returns as soon as the head of a success is there; the caller closes it."""
        tries = Tries(self._retry, self._budget)
        way = await self._way(request)
        while True:
            outcome: Answer | Unreachable
            try:
                response = await self._open(request, way)
                head = _answer_head(response)
                if 200 <= head.status < 300:
                    tries.wait_s(request, head, 0.0)
                    return head, response
                outcome = await self._read(response)
            except Unreachable as error:
                outcome = error
            if way is not None and self._ways.falls_back(request, way, outcome, time.monotonic()):
                way = None
                continue
            delay_s = tries.wait_s(request, outcome, time.time())
            if delay_s is None:
                _final(request, outcome, tries)
                raise BadAnswer("the server answered a stream with an empty status")
            await self._sleep(delay_s)

    def broken(self, error: httpx2.HTTPError) -> Unreachable:
        """The exception for an error while a stream is read."""
        return _unreachable(self.address, error)

    async def _way(self, request: Request) -> Way | None:
        """The node to call directly, if there is one; asks the server for it now and then."""
        way = self._ways.way(request, time.monotonic())
        if not isinstance(way, Ask):
            return way
        answer: Answer | None = None
        try:
            answer = await self._read(await self._open(way.request, None))
        except (Unreachable, BadAnswer):
            pass
        finally:
            way = self._ways.told(way.model, answer, time.monotonic())
        return way

    async def _open(self, request: Request, way: Way | None) -> httpx2.Response:
        path, headers = _target(request, way)
        try:
            built = self._http.build_request(
                request.method,
                path,
                content=request.body,
                headers=headers,
                timeout=_timeout(request, self._timeout_s, way),
            )
            return await self._http.send(built, stream=True)
        except httpx2.HTTPError as error:
            raise _unreachable(self.address, error) from error

    async def _read(self, response: httpx2.Response) -> Answer:
        body = _BodyBuffer()
        try:
            async for chunk in response.aiter_bytes():
                body.add(chunk)
        except httpx2.HTTPError as error:
            raise _unreachable(self.address, error) from error
        finally:
            await response.aclose()
        return replace(_answer_head(response), body=bytes(body.data))


def _final(request: Request, outcome: Answer | Unreachable, tries: Tries) -> Answer:
    """The answer, if the caller wants it; else the exception it stands for."""
    if isinstance(outcome, Unreachable):
        raise outcome
    if request.method == "DELETE" and outcome.status == 404 and tries.unclear:
        # A try whose answer was lost may have deleted it, and gone is what the caller wants it to be.
        return replace(outcome, status=204)
    if 200 <= outcome.status < 300 or outcome.status in request.accepts:
        return outcome
    raise error_of(outcome, time.time())
