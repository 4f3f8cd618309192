"""Planted bugs outside of the node's own core: control's core, the wire, both edges, rates, placement, keep.

Covers: the list; ``module`` is a full name here. Does not cover: bugs of the residency core (``mutants``),
planting (``planted``) or running them (``scripts/mutation.py``).
"""

from __future__ import annotations

from mutants import Mutant

CHOOSING, ROOMS = "control.choosing", "control.rooms"
CLUSTER, WIRE, UPLINK, KEEPER = "control.cluster", "packer.wire", "agent.uplink", "agent.keeper"
STATE, ROUTES, STORE, SOURCES = "control.state", "control.routes.nodes", "control.store", "agent.sources"
RATES, PLACEMENT, INTENSITY, KEEP = "packer.rates", "packer.placement", "packer.intensity", "packer.keep"
ROUTER, JOURNAL, REPORTS = "control.routes.forwarding", "agent.journal", "agent.reports"

FLEET_MUTANTS = (
    # --- control's core
    Mutant(
        "a node that is behind is not sent the plan",
        CLUSTER,
        "    if (event.have_epoch, event.have_seq) < cluster.newest:\n",
        "    if event.have_epoch < cluster.newest[0]:\n",
    ),
    Mutant(
        "a poll that waits is not answered when the plan changes",
        CLUSTER,
        "            cluster.newest = (epoch, seq)\n            return _answer_polls(cluster)",
        "            cluster.newest = (epoch, seq)\n            return []",
    ),
    Mutant(
        "a late report replaces a newer one",
        CLUSTER,
        "event.life == view.life and event.number <= view.number",
        "event.life == view.life and event.number < 0",
    ),
    Mutant(
        "no word of a node's next life is believed",
        CLUSTER,
        "event.life == view.life and event.number <= view.number",
        "event.number <= view.number",
    ),
    Mutant(
        "a removed node keeps its turn at the origin",
        CLUSTER,
        "            return ended + _end_turns(cluster, node)\n",
        "            return ended\n",
    ),
    Mutant(
        "a silent node keeps its turn at the origin",
        CLUSTER,
        "            actions += _end_turns(cluster, view.node)\n",
        "            pass\n",
    ),
    Mutant(
        "a turn at the origin never ends by itself",
        CLUSTER,
        "for ref, (_, until_ms) in cluster.turns.items() if until_ms <= now_ms]",
        "for ref, (_, until_ms) in cluster.turns.items() if until_ms <= 0]",
    ),
    Mutant(
        "two nodes get a turn at one origin",
        CLUSTER,
        '    if holder not in ("", node) and until_ms > now_ms:\n',
        '    if holder not in ("", node) and until_ms > now_ms + TURN_MS:\n',
    ),
    Mutant(
        "a pack in the making is offered to others",
        CLUSTER,
        "        if known is not None and known.packed:\n            spread",
        "        if known is not None and known.disk_bytes:\n            spread",
    ),
    Mutant(
        "a node is sent to itself for a pack",
        CLUSTER,
        "        if view.node == event.node or view.node in event.failed:\n",
        "        if view.node in event.failed:\n",
    ),
    Mutant(
        "peers that failed are offered again",
        CLUSTER,
        "        if view.node == event.node or view.node in event.failed:\n",
        "        if view.node == event.node:\n",
    ),
    Mutant(
        "who waits for a pack is not woken when it is there",
        CLUSTER,
        "        if holder == view.node or view.peer_url:\n            actions.append(WakeSources(ref))\n",
        "",
    ),
    Mutant(
        "a routed call counts for ever",
        CLUSTER,
        "        view.in_flight -= 1\n        cluster.in_flight -= 1\n",
        "        pass\n",
    ),
    Mutant(
        "an expectation never ends",
        CLUSTER,
        "        if oldest.until_ms > now_ms:\n            break\n        _expect_no_more(cluster, ref)",
        "        break",
    ),
    Mutant(
        "a node that holds its poll open is taken for silent",
        CLUSTER,
        "        elif view.waits:\n            continue  # its connection is open: it is there\n",
        "",
    ),
    Mutant(
        "a silent node is never noted",
        CLUSTER,
        "now_ms - view.heard_ms > SILENT_AFTER_MS:",
        "now_ms - view.heard_ms > SILENT_AFTER_MS << 20:",
    ),
    Mutant(
        "a silent node that speaks stays silent",
        CLUSTER,
        "    view.silent = False\n    view.heard_ms = now_ms\n",
        "    view.heard_ms = now_ms\n",
    ),
    Mutant(
        "draining nodes are sent requests",
        ROOMS,
        "report is None or report.draining or",
        "report is None or",
    ),
    Mutant(
        "what was sent since a report does not count",
        ROOMS,
        "view.load_said + view.in_flight - view.in_flight_then",
        "view.load_said",
    ),
    Mutant(
        "a node that can be reached again is avoided on",
        CLUSTER,
        "    view.avoid_until_ms = 0 if event.reached else now_ms + AVOID_MS\n",
        "    view.avoid_until_ms = view.avoid_until_ms if event.reached else now_ms + AVOID_MS\n",
    ),
    # --- the wire
    Mutant(
        "messages of another release are believed",
        WIRE,
        "    if version != WIRE_VERSION:\n",
        "    if version < WIRE_VERSION:\n",
    ),
    Mutant(
        "plans of one epoch are all equal",
        WIRE,
        "        return PlanNumber(self.epoch, self.seq, self.start)\n",
        "        return PlanNumber(self.epoch, 1, self.start)\n",
    ),
    Mutant(
        "a message without bound is decoded",
        WIRE,
        "    if len(data) > MESSAGE_BYTES_MAX:\n",
        "    if len(data) > MESSAGE_BYTES_MAX << 20:\n",
    ),
    # --- the node's edge
    Mutant(
        "an older plan replaces a newer one",
        KEEPER,
        "            if same and plan.number <= self.number:\n                return\n",
        "",
    ),
    Mutant(
        "a plan is in force before it is on disk",
        KEEPER,
        "            saved = await self.save(self._journal.journal.save_plan, plan)\n",
        "            saved = True\n",
    ),
    Mutant(
        "a plan that the disk did not take is not kept later",
        KEEPER,
        "                self._kept = saved\n",
        "                self._kept = True\n",
    ),
    Mutant(
        "records that the journal did not take are lost",
        KEEPER,
        "            self._counters.put_back(records)\n",
        "            pass\n",
    ),
    Mutant(
        "records are given up before control has them",
        UPLINK,
        "            await self._owner.acknowledge(got.acked_seq)\n",
        "            await self._owner.acknowledge(records[-1].seq)\n",
    ),
    Mutant(
        "records are never given up",
        UPLINK,
        "            await self._owner.acknowledge(got.acked_seq)\n",
        "            pass\n",
    ),
    Mutant(
        "records that control did not take wait for the next change",
        UPLINK,
        "        if records and got.acked_seq < records[-1].seq:\n            return _Left.STUCK\n",
        "",
    ),
    Mutant(
        "a push that failed is forgotten",
        UPLINK,
        "                left = _Left.STUCK\n",
        "                left = _Left.NOTHING\n",
    ),
    Mutant(
        "one lost answer ends the uplink",
        "packer.control_line",
        "            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:\n",
        "            except (aiohttp.ClientError, OSError) as error:\n",
    ),
    Mutant(
        "an answer that is cut short ends a join",
        "packer.joining",
        "            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:\n"
        '                log.warning("join: control',
        "            except (aiohttp.ClientError, TimeoutError, OSError) as error:\n"
        '                log.warning("join: control',
    ),
    Mutant(
        "a deleted node keeps its identity",
        "packer.joining",
        "                aside = self._identity.forget()\n",
        "                aside = None\n",
    ),
    Mutant(
        "a plan in an answer is dropped",
        UPLINK,
        "        if got.plan is not None:\n            await self._consider(got.plan)\n",
        "        if got.plan is not None and records:\n            await self._consider(got.plan)\n",
    ),
    Mutant(
        "a turn at the origin is held after a load that failed",
        SOURCES,
        "REPORTED_S if packed else 0.0",
        "REPORTED_S if packed else TURN_S_MAX",
    ),
    Mutant(
        "a turn whose pack was dropped at once runs out",
        SOURCES,
        "            self._background.start(self._give_back(ref, REPORTED_S if packed else 0.0))\n",
        "            if not packed:\n                self._background.start(self._give_back(ref, 0.0))\n",
    ),
    Mutant(
        "a turn at the origin is given back before the report",
        SOURCES,
        "REPORTED_S if packed else 0.0",
        "0.0",
    ),
    Mutant(
        "a turn at the origin is renewed for ever",
        SOURCES,
        "            holding.cancel()\n",
        "",
    ),
    Mutant(
        "peers that failed are asked again",
        SOURCES,
        "            failed += [peer.node for peer in answer.peers]\n",
        "            pass\n",
    ),
    Mutant(
        "every device is reported as healthy",
        REPORTS,
        "        healthy=known is None or known.healthy,\n",
        "        healthy=True,\n",
    ),
    Mutant(
        "acknowledged records stay in the spool",
        JOURNAL,
        '        self._db.table("spool").delete_where("seq <= ?", [acked_seq])',
        '        self._db.table("spool").delete_where("seq < ?", [acked_seq])',
    ),
    # --- control's edge
    Mutant(
        "a lost backup's plans are not overtaken",
        STATE,
        '        return have.seq > self.meta.seq or have.start not in ("", self.start_name)\n',
        "        return False\n",
    ),
    Mutant(
        "a plan that another start counted is taken for ours",
        STATE,
        '        return have.seq > self.meta.seq or have.start not in ("", self.start_name)\n',
        "        return have.seq > self.meta.seq\n",
    ),
    Mutant(
        "an earlier poll is left hanging by the next",
        STATE,
        "            if self._polls.get(node) is poll:\n                del self._polls[node]\n",
        "            if self._polls.pop(node, None) is not None:\n",
    ),
    Mutant(
        "a change is visible before it is kept",
        STATE,
        "        await self._on(self._writer, lambda: self._store.write(changes, seq))\n"
        "        for change in changes:\n            self.catalog.apply(change, seq)\n",
        "        for change in changes:\n            self.catalog.apply(change, seq)\n"
        "        await self._on(self._writer, lambda: self._store.write(changes, seq))\n",
    ),
    Mutant(
        "a change makes no new plan",
        STATE,
        "        seq = self.meta.seq + 1 if news else self.meta.seq\n",
        "        seq = self.meta.seq\n",
    ),
    Mutant(
        "a full disk of control's makes its nodes silent",
        ROUTES,
        "        with suppress(TooManyRecords, StoreUnavailable):\n",
        "        with suppress(TooManyRecords):\n",
    ),
    Mutant(
        "a removed node is answered",
        ROUTES,
        "    if current is None or current.incarnation != row.incarnation:\n",
        "    if current is None:\n        current = row\n    if current.node != row.node:\n",
    ),
    Mutant(
        "records count anew when a node joins again",
        STORE,
        'return f"{self.node}/{self.spool}" if self.spool else self.incarnation',
        "return self.incarnation",
    ),
    Mutant(
        "records that came twice are stored twice",
        STORE,
        "                counted_by,\n                record.seq,",
        "                counted_by,\n                -record.seq - self._until_prune % 1000,",
    ),
    Mutant(
        "an epoch is counted twice",
        STORE,
        'epoch = max(int(known.get("epoch", "0")) + 1, epoch_least)',
        'epoch = max(int(known.get("epoch", "1")), epoch_least)',
    ),
    Mutant(
        "the plan's number is forgotten at a restart",
        STORE,
        '            self._put_meta("seq", str(seq))\n\n    def _write_one',
        '            self._put_meta("seq", "1")\n\n    def _write_one',
    ),
    Mutant(
        "a routed call that could not be sent stays in flight",
        ROUTER,
        "        if not answered:\n",
        "        if not answered and reached:\n",
    ),
    Mutant(
        "a refusal that another node makes up for stays in flight",
        ROUTER,
        "    ended = fleet.Answered(node, True, spec.ref, answer.status)\n",
        '    ended = fleet.Answered("", True, spec.ref, answer.status)\n',
    ),
    Mutant(
        "a body that was begun is sent again",
        ROUTER,
        "while len(asked) < TRIES_MAX and call.sendable:",
        "while len(asked) < TRIES_MAX:",
    ),
    Mutant(
        "a model that left a device is looked for there",
        CLUSTER,
        "            del nodes[node]\n",
        "            pass\n",
    ),
    Mutant(
        "a model that is on its way somewhere is not looked for there",
        CHOOSING,
        "        names[sent.node] = None\n",
        "        pass\n",
    ),
    # --- rates, placement, keep
    Mutant("a burst is one too large", RATES, "(self.burst - units)", "(self.burst - units + 1)"),
    Mutant(
        "reserved tokens do not count",
        RATES,
        " + self.reserved * self.span_ms",
        "",
    ),
    Mutant(
        "what is owed is forgotten when a limit changes",
        RATES,
        "self.due = 0 if limit is None else now_ms * self.speed + owed",
        "self.due = 0 if limit is None else now_ms * self.speed",
    ),
    Mutant(
        "what was owed before a restart never drains",
        RATES,
        "        left = owed * self.span_ms - max(ago_ms, 0) * self.speed\n",
        "        left = owed * self.span_ms\n",
    ),
    Mutant(
        "a silent tenant saves up without end",
        RATES,
        "            self.due = max(self.due, now_ms * self.speed) + amount * self.span_ms\n",
        "            self.due = self.due + amount * self.span_ms\n",
    ),
    Mutant(
        "worst fit instead of best fit",
        PLACEMENT,
        "        return Placing(min(fits)[1])\n",
        "        return Placing(max(fits)[1])\n",
    ),
    Mutant(
        "moves may cost more than they are worth",
        PLACEMENT,
        "        if nbytes > self.bytes_max or cost >= self.cost_max:\n",
        "        if nbytes > self.bytes_max:\n",
    ),
    Mutant(
        "a gang's shares lie on one device",
        PLACEMENT,
        "            if target in self.taken or moves_max < 1:\n",
        "            if moves_max < 1:\n",
    ),
    Mutant(
        "the dearest moves are chosen",
        PLACEMENT,
        "    return min(plans, key=_rank) if plans else None",
        "    return max(plans, key=_rank) if plans else None",
    ),
    Mutant(
        "bytes do not count when models are ranked",
        KEEP,
        "/ max(held_bytes, 1)",
        "",
    ),
    Mutant(
        "uses do not decay",
        INTENSITY,
        "    d0 = l0 * exp(passed_ms * _PACE0)\n",
        "    d0 = l0\n",
    ),
    Mutant(
        "nothing is learned from a use",
        INTENSITY,
        "        known.explained = (x0 + s0, x1 + s1, x2 + s2,",
        "        _ = (x0 + s0, x1 + s1, x2 + s2,",
    ),
    Mutant(
        "a model that has stopped keeps its rate",
        INTENSITY,
        "goes_on = exp(-silence) * known.uses",
        "goes_on = float(known.uses)",
    ),
    Mutant(
        "what a silence says is not learned",
        INTENSITY,
        "        _note_silence(known, shared, passed_ms)\n    l0",
        "        pass\n    l0",
    ),
    Mutant(
        "only this moment of a silence counts",
        INTENSITY,
        "CORRECTED_USES = 1.0",
        "CORRECTED_USES = 1e-9",
    ),
    Mutant(
        "a busy model speaks for all",
        INTENSITY,
        " and (known.uses * _GOLDEN % 1.0) ** 2 * known.uses < 1.0",
        "",
    ),
    Mutant(
        "silences of the past are never outweighed",
        INTENSITY,
        "    if sum(shared.ended) > SILENCES_MAX:\n",
        "    if sum(shared.ended) > 1e300:\n",
    ),
    Mutant(
        "silences do not survive a journal",
        INTENSITY,
        "        shared.heard = True\n    _learn_shared",
        "        shared.ended = [0.0] * SILENCES\n    _learn_shared",
    ),
)
