"""Planted bugs of routers as processes: who may be one, what they are told, what they make of it.

Covers: the list; ``module`` is a full name here. Does not cover: planting (``planted``) or running them
(``scripts/mutation.py``).
"""

from __future__ import annotations

from mutants import Mutant

FEED, DESK, VIEW, TOLD = "control.feed", "control.feed_desk", "control.router_view", "control.router_wire"
KEPT, LINE = "control.kept_view", "control.router_process"
ENTERING, ROUTES = "control.routes.access", "control.routes.routers"

ROUTER_MUTANTS = (
    Mutant(
        "routers are not told what is no more",
        FEED,
        "    if base:\n        words",
        "    if 0:\n        words",
    ),
    Mutant(
        "what was forgotten is thought to be known", FEED, "have if feed.floor <= have", "have if 0 <= have"
    ),
    Mutant("a piece says that it is all", FEED, "tuple(words[:at]), True)", "tuple(words[:at]), False)"),
    Mutant(
        "routers are not told that a node was heard",
        DESK,
        '            self._note(f"{NODE}/{node}", there)\n',
        "",
    ),
    Mutant("routers are told where weights lie", TOLD, 'replace(spec, origin="", files=())', "spec"),
    Mutant("a router goes by half of a change", VIEW, "        if answer.more:\n", "        if 0:\n"),
    Mutant("a router takes any answer", VIEW, "        if answer.base and not follows:\n", "        if 0:\n"),
    Mutant(
        "a router keeps what control does not name any more",
        VIEW,
        "        if anew:\n",
        "        if 0:\n",
    ),
    Mutant(
        "a router forgets what nodes had when control was started again",
        VIEW,
        "self._report(node) if told.heard else None",
        "self._report(node)",
    ),
    Mutant(
        "a router takes time alone for a node's silence",
        "control.cluster",
        "        elif not (view.silent or view.told) and now",
        "        elif not view.silent and now",
    ),
    Mutant(
        "any certificate of a router opens nodes",
        "packer.identity",
        "known != speaker.key_sha256:",
        "not speaker.router:",
    ),
    Mutant(
        "a name is enough to be a removed router",
        ENTERING,
        "    if row is None or row.key_sha256 != identity.key_sha256:\n        raise removed(Joiner.ROUTER",
        "    if row is None:\n        raise removed(Joiner.ROUTER",
    ),
    Mutant(
        "a node's token makes a router",
        "control.authority",
        "    if token.joiner is not joiner:\n",
        "    if 0:\n",
    ),
    Mutant(
        "a router gets tickets without a tenant's key",
        ROUTES,
        "    tenant = identify_key(control, request, Access.TENANT)\n    return await show_route",
        '    tenant = Caller(request.query["model"].partition("/")[0])\n    return await show_route',
    ),
    Mutant(
        "a router believes any file",
        KEPT,
        "    if not hmac.compare_digest(seal, hmac",
        "    if 0 and not hmac.compare_digest(seal, hmac",
    ),
    Mutant(
        "a router goes by what another one kept",
        KEPT,
        "    if (kept.cluster, kept.router) != (cluster, router):\n",
        "    if 0:\n",
    ),
    Mutant("what a router kept is never too old", KEPT, "    if age_ms > AGE_MS_MAX:\n", "    if 0:\n"),
    Mutant(
        "what a router kept is as young as a clock that was set back says",
        KEPT,
        "    if age_ms < -AHEAD_MS_MAX:\n",
        "    if 0:\n",
    ),
    Mutant("a router keeps every word at once", KEPT, "begun_s >= self._next_s and ", ""),
    Mutant("a slow disk is kept busy", KEPT, "max(KEEP_EVERY_S, (loop", "min(KEEP_EVERY_S, (loop"),
    Mutant(
        "a calm view grows old on the disk", KEPT, "or heard_ms - self._kept", "or 0 * heard_ms - self._kept"
    ),
    Mutant(
        "a router keeps anew what it was started with",
        KEPT,
        "if not self._view.is_ready or self._view.is_kept:",
        "if not self._view.is_ready:",
    ),
    Mutant(
        "a stop loses what was heard last",
        KEPT,
        "        if not self._closed and self._has_news(STOP_STAMP_MS):\n",
        "        if 0:\n",
    ),
    Mutant(
        "a removed router keeps what it was told",
        LINE,
        "                await self.keeper.forget()\n",
        "                pass\n",
    ),
    Mutant(
        "what was kept counts although control answers",
        LINE,
        "            kept = None if self.view.is_ready else await self.keeper.load()\n"
        "            if kept is not None and not self.view.is_ready:\n",
        "            kept = await self.keeper.load()\n            if kept is not None:\n",
    ),
    Mutant(
        "a router that was started again hears an older control",
        VIEW,
        "        self.epoch = max(self.epoch, epoch)",
        "        self.epoch = 0",
    ),
    Mutant(
        "a router keeps nothing of nodes that a new control has not heard",
        VIEW,
        "        if node.told.heard or view.report is None:\n",
        "        if 1:\n",
    ),
    Mutant(
        "copies of a router are not found", "control.boxes", "self._turn_told(told), now_ms)", "0, now_ms)"
    ),
    Mutant(
        "any start's turn is believed",
        "control.boxes",
        "int(turn) if start == self._start() and",
        "int(turn) if",
    ),
    Mutant(
        "a copied router is told what is new",
        ROUTES,
        "        if control.routers.is_cloned(name):\n",
        "        if 0:\n",
    ),
    Mutant(
        "a copied router gets tickets",
        ROUTES,
        "    ROUTERS.refuse_copy(control, _row_of(caller).router)\n",
        "",
    ),
    Mutant(
        "a copied identity gets certificates",
        "control.routes.certifying",
        "    kind.refuse_copy(control, name)\n    late_s",
        "    late_s",
    ),
    Mutant(
        "a router stays a copy for ever",
        "control.routers_said",
        "        for router in released:\n            del self._cloned[router]\n",
        "",
    ),
    Mutant(
        "who is removed as a copy joins again as one",
        "control.routers_said",
        "        self._cloned.pop(router, None)\n",
        "",
    ),
)
