"""One request's stay at its model: let in, counted while it runs, and out again.

Covers: the order of everything that a request begins and ends at the node. Does not cover: who is let in when
(``shares``, ``loop``), or what is counted of it (``metering``, ``usage_meter``, ``counters``).
"""

from __future__ import annotations

from typing import Protocol

from agent.calibration import Calibrator
from agent.counters import Counters
from agent.loop import Leasing, Loop
from agent.metering import MeteredLease
from agent.shares import Shares
from agent.usage_meter import Running, UsageMeter
from packer.types import ModelSpec


class Host(Protocol):
    """The node, as a stay sees it."""

    @property
    def loop(self) -> Loop: ...
    @property
    def shares(self) -> Shares: ...
    @property
    def usage(self) -> UsageMeter: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def calibrator(self) -> Calibrator: ...


class Stay:
    """What ``NodeFacade.lease`` gives. A class and no generator: every request comes by here."""

    __slots__ = (
        "_host",
        "_key_id",
        "_leasing",
        "_metered",
        "_request",
        "_running",
        "_spec",
        "_timeout_ms",
        "_tokens",
    )

    def __init__(
        self, host: Host, spec: ModelSpec, request: str, timeout_ms: int, tokens: int, key_id: str = ""
    ) -> None:
        self._host = host
        self._spec = spec
        self._request = request
        self._timeout_ms = timeout_ms
        self._tokens = tokens
        self._key_id = key_id

    async def __aenter__(self) -> MeteredLease:
        host, ref = self._host, self._spec.ref
        try:
            await host.shares.until_let_in(ref.tenant, self._timeout_ms)
            self._leasing: Leasing = host.loop.lease(
                self._spec, self._request, self._timeout_ms, self._tokens
            )
            host.calibrator.disturb()
            try:
                self._metered = MeteredLease(await self._leasing.__aenter__())
            except BaseException:
                host.calibrator.leave()
                raise
        except BaseException:
            host.counters.done(self._request)
            raise
        self._running: Running = host.usage.counting(ref, self._metered, self._key_id)
        return self._metered

    async def __aexit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        host, well = self._host, kind is None
        try:
            host.counters.ended(self._spec.ref, self._metered, well)
            self._running.ended(well)
            await self._leasing.__aexit__()
        finally:
            host.calibrator.leave()
            host.counters.done(self._request)
