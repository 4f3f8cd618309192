"""Planted bugs of versions that several nodes may hold a copy of.

Covers: the list; ``module`` is a full name here. Does not cover: planting (``planted``) or running them
(``scripts/mutation.py``, ``test_copies``).
"""

from __future__ import annotations

from mutants import Mutant

COPIES, WAITS = "control.copies", "control.waits"
CLUSTER, CHOOSING, ROUTER = "control.cluster", "control.choosing", "control.routes.forwarding"

COPIES_MUTANTS = (
    Mutant(
        "copies are sent for without a limit",
        COPIES,
        "    if len(held) >= spec.replicas or owed is None",
        "    if owed is None",
    ),
    Mutant(
        "a second copy is sent for while one is on its way",
        COPIES,
        " or ranked[-1][0] == COMING:\n",
        ":\n",
    ),
    Mutant(
        "a copy costs nothing",
        COPIES,
        "owed.waited(now_ms) >= price_ms else None",
        "owed.waited(now_ms) >= 0 else None",
    ),
    Mutant(
        "a copy costs twice what was waited",
        COPIES,
        "owed.waited(now_ms) >= price_ms else None",
        "owed.waited(now_ms) >= 9 * price_ms else None",
    ),
    Mutant(
        "who declined a copy is asked again at once",
        COPIES,
        "        and owed.declined.get(view.node, 0) <= now_ms\n",
        "",
    ),
    Mutant(
        "a copy is sent for at a node that could not be reached",
        COPIES,
        "        and view.avoid_until_ms <= now_ms\n        and owed",
        "        and owed",
    ),
    Mutant(
        "a copy is sent for at a node with too few devices",
        COPIES,
        "        and has_devices(view, share, spec.devices)\n",
        "",
    ),
    Mutant(
        "a holder that can not be reached is asked",
        CHOOSING,
        "not is_able(view) or view.avoid_until_ms > now_ms:\n",
        "not is_able(view):\n",
    ),
    Mutant(
        "the queue at a holder does not count",
        COPIES,
        "    return max(0, there + 1 - together)\n",
        "    return int(there > 0)\n",
    ),
    Mutant(
        "waiting adds up where there are as many copies as may be",
        COPIES,
        "    return len(held) < spec.replicas and all(",
        "    return all(",
    ),
    Mutant(
        "waiting adds up while a copy is on its way",
        COPIES,
        " and all(distance != COMING for _, distance in held)\n",
        "\n",
    ),
    Mutant(
        "a caller gets the refusal of a further copy",
        ROUTER,
        "copies.is_further(control.cluster, spec, node):\n",
        "False:\n",
    ),
    Mutant(
        "requests for copies never end",
        ROUTER,
        "fleet.Answered(begun.node, not answer.broke, begun.spec.ref, answer.status)",
        "fleet.Answered(begun.node, not answer.broke, None, answer.status)",
    ),
    Mutant(
        "what was waited never fades",
        WAITS,
        "exp2(-max(now_ms - self.at_ms, 0) / WAITED_HALF_MS)",
        "1",
    ),
    Mutant(
        "a copy leaves what was waited as it was",
        WAITS,
        "            owed.waited_ms = 0.0\n",
        "            pass\n",
    ),
    Mutant(
        "requests of one pass wait for each other",
        WAITS,
        "self.in_flight + 1 - together)",
        "self.in_flight)",
    ),
    Mutant(
        "pauses count as work",
        WAITS,
        "            self.answered_ms = None\n",
        "            self.answered_ms = now_ms\n",
    ),
    Mutant(
        "a refusal counts as an answer",
        CLUSTER,
        "event.reached and event.status < 400",
        "event.reached",
    ),
    Mutant(
        "the pace of nodes that rest is remembered without a limit",
        WAITS,
        "    if len(flows) > FLOWS_IDLE_MAX:\n",
        "    if len(flows) > 10 * FLOWS_IDLE_MAX:\n",
    ),
    Mutant(
        "the pace is forgotten while requests are in flight",
        WAITS,
        "for known, each in flows.items() if not each.in_flight]",
        "for known, each in flows.items() if each is not flow]",
    ),
    Mutant(
        "who declined is remembered without a limit",
        WAITS,
        "len(self.declined) > DECLINED_MAX:",
        "len(self.declined) > 10 * DECLINED_MAX:",
    ),
    Mutant(
        "what was waited is remembered for ever",
        CLUSTER,
        "    cluster.waits.forget(now_ms)\n",
        "",
    ),
    Mutant(
        "calls at a holder hide the copy that is on its way",
        CLUSTER,
        "        return sent is not None and sent.node != event.node and sent.until_ms > now_ms\n",
        "        return False\n",
    ),
    Mutant(
        "a copy that never came is expected for ever",
        CLUSTER,
        "        return sent is not None and sent.node != event.node and sent.until_ms > now_ms\n",
        "        return sent is not None and sent.node != event.node\n",
    ),
    Mutant(
        "a node that declined a copy is expected to have it",
        CLUSTER,
        "        if ref in cluster.expected_at.get(view.node, ()):\n",
        "        if False:\n",
    ),
    Mutant(
        "a bad request is taken for a refusal of the copy",
        CLUSTER,
        "not event.reached or event.status in REFUSED_STATUSES",
        "not served",
    ),
    Mutant(
        "copies of one tenant lie together",
        CHOOSING,
        "held_of(cluster, view, ref) if replicas > 1 and cold else 0",
        "0",
    ),
    Mutant(
        "a tenant's copies are kept apart before its bytes are looked for",
        CHOOSING,
        "                view.avoid_until_ms > now_ms,\n                _cost(",
        "                view.avoid_until_ms > now_ms,\n                held_of(cluster, view, ref),\n"
        "                _cost(",
    ),
    Mutant(
        "what was sent to a node a moment ago is none of its tenant's",
        CHOOSING,
        "    sent = cluster.expected_at.get(view.node, ())\n    there |=",
        "    sent: dict[ModelRef, None] = {}\n    there |=",
    ),
    Mutant(
        "who waits by other ways than the router brings no copy",
        "control.cluster",
        "        cluster.waits.add(event.ref, others_waited_ms",
        "        0 and cluster.waits.add(event.ref, others_waited_ms",
    ),
    Mutant(
        "a router's own requests are counted as others'",
        "control.cluster",
        "Others(known.leases - own, now_ms)",
        "Others(known.leases, now_ms)",
    ),
    Mutant(
        "others who just came have waited since the last report",
        WAITS,
        "min(before.count, now.count) if before",
        "now.count if before",
    ),
    Mutant("others who share a pass wait", WAITS, "staying + own - together)", "staying + own)"),
    Mutant(
        "everybody who asks is told of the further copy",
        "control.cluster",
        "                cluster.waits.paid(ref)  # a further copy\n",
        "                pass\n",
    ),
    Mutant(
        "who calls nodes himself is told of holders alone",
        "control.routes.direct",
        "    if nodes and copies.is_further(",
        "    if 0 and copies.is_further(",
    ),
)
