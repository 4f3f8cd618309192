"""What changed in control, on its way to routers that are processes of their own.

Covers: noting what may be out of date, bringing the feed up to date when somebody listens, and long polls.
Does not cover: numbers and pieces (``control.feed``), or who may ask (``control.routes.routers``).

Without routers nothing is kept and noting costs a look at an empty table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice

from control import feed as core
from control.catalog import Catalog, Change, DropKey, DropModel, DropNode, PutKey, PutModel, PutNode
from control.cluster import Cluster
from control.router_wire import KEY, MODEL, NODE, PLACES, key_told, model_told, node_told, places_told
from packer.types import parse_ref

# Things looked at in one go: 10 ms. A fleet of thousands with its models has a hundred thousand.
SLICE = 250


class FeedDesk:
    """One for all routers. ``catalog`` is asked anew each time: control replaces it at its start."""

    def __init__(self, catalog: Callable[[], Catalog], cluster: Cluster, now_ms: Callable[[], int]) -> None:
        self._catalog = catalog
        self._cluster = cluster
        self._now_ms = now_ms
        self._feed = core.Feed()
        self._stale: dict[str, None] = {}
        self._open = False
        self._shuts = 0
        self._changed = asyncio.Event()
        self._closed = False

    # --- notes ---

    def note(self, changes: Iterable[Change]) -> None:
        """These were made."""
        if not self._open:
            return
        for change in changes:
            match change:
                case PutKey(row):
                    self._note(f"{KEY}/{row.key_id}", there=True)
                case DropKey(key_id):
                    self._note(f"{KEY}/{key_id}", there=False)
                case PutModel(spec):
                    self._note(f"{MODEL}/{spec.ref}", there=True)
                case DropModel(ref):
                    self._note(f"{MODEL}/{ref}", there=False)
                case PutNode(row):
                    self.note_node(row.node)
                case DropNode(node):
                    self.note_node(node)
        self._wake()

    def note_node(self, node: str) -> None:
        """Something was heard of it, or it is gone."""
        if self._open:
            there = node in self._catalog().nodes
            self._note(f"{NODE}/{node}", there)
            self._note(f"{PLACES}/{node}", there)
            self._wake()

    def _note(self, name: str, there: bool) -> None:
        """What is no more and was never told is nothing to anybody: so what waits to be told is not more than
        what is so and what was, however long nobody asks."""
        if there or name in self._feed.told:
            self._stale[name] = None
        else:
            self._stale.pop(name, None)

    def wake(self) -> None:
        """Answer everybody who waits now: one of them may be no more, or is to be told something else."""
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Nobody waits from now on."""
        self._closed = True
        self._wake()

    def shut(self) -> None:
        """There is no router any more."""
        self._open = False
        self._shuts += 1
        self._stale.clear()
        core.forget(self._feed)

    def behind(self, have: int) -> int:
        """Words that somebody has not heard who has heard up to ``have``."""
        return self._feed.number - have

    # --- polls ---

    async def piece(self, have: int, wait_ms: int, may_wait: Callable[[], bool]) -> core.Piece:
        """What somebody must hear who has heard up to ``have``; while that is nothing, waits for ``wait_ms``
        as long as ``may_wait`` holds."""
        until_ms, shuts = self._now_ms() + wait_ms, self._shuts
        while True:
            if shuts != self._shuts:
                return core.Piece(have, have, (), False)  # to a router that is no more
            if not self.settle(SLICE):
                await asyncio.sleep(0)  # nodes and operators are answered meanwhile
                continue
            piece = core.since(self._feed, have)
            left_ms = until_ms - self._now_ms()
            if piece.words or piece.base != have or left_ms <= 0 or self._closed or not may_wait():
                return piece
            with suppress(TimeoutError):
                async with asyncio.timeout(left_ms / 1000):
                    await self._changed.wait()

    def settle(self, most: int) -> bool:
        """Say anew what may be out of date, so many things at most; all of it for the first who listens.
        Whether nothing is left."""
        catalog, cluster = self._catalog(), self._cluster
        if not self._open:
            self._open = True
            self._stale = dict.fromkeys(f"{KEY}/{key_id}" for key_id in catalog.keys)
            self._stale |= dict.fromkeys(f"{MODEL}/{ref}" for ref in catalog.models)
            for kind in (NODE, PLACES):
                self._stale |= dict.fromkeys(f"{kind}/{node}" for node in cluster.nodes)
        for name in list(islice(self._stale, most)):
            del self._stale[name]
            text = self._text(name)
            if text is None:
                core.drop(self._feed, name)
            else:
                core.put(self._feed, name, text)
        return not self._stale

    def _text(self, name: str) -> bytes | None:
        """What is so now; None: there is no such thing, or it is nothing to routers."""
        kind, _, rest = name.partition("/")
        catalog = self._catalog()
        if kind == KEY:
            row = catalog.keys.get(rest)
            return key_told(row, catalog.key_seq.get(rest, 0)) if row is not None and row.tenant else None
        if kind == MODEL:
            ref = parse_ref(rest)
            spec = catalog.models.get(ref)
            return model_told(spec, catalog.model_seq.get(ref, 0)) if spec is not None else None
        node, view = catalog.nodes.get(rest), self._cluster.nodes.get(rest)
        if node is None or view is None:
            return None
        if kind == NODE:
            return node_told(view, node.key_sha256)
        return places_told(view.report.models) if view.report is not None else None
