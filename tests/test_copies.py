"""Versions that may have copies: which holder is asked, when a further node is, and which one.

Covers: the pure rules, driven by callers that come again as soon as they are answered. Does not cover: how
the setting gets here (``test_model_settings``), real routes and nodes (``test_copies_running``), or many
strange histories (``test_cluster_simulation``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from running_control import model_report
from test_cluster import OTHER, REF, beat, cluster_of

from control import copies
from control.choosing import choose_near
from control.cluster import (
    EXPECTED_MS,
    Answered,
    Cluster,
    NodeBeat,
    NodeRemoved,
    Pointed,
    Routed,
    Ticked,
    check,
    step,
)
from control.waits import (
    DECLINED_MAX,
    DECLINED_MS,
    FLOWS_IDLE_MAX,
    OWED_MAX,
    REPORTS_APART_MS_MAX,
    WAITED_HALF_MS,
    Flow,
    Owed,
    count,
    end,
)
from packer.gangs import share_bytes
from packer.types import MIB, Batching, ModelRef, ModelSpec, Task

SPEC = ModelSpec(REF, "control:", (), "e", Task.EMBEDDING, 10 * MIB, (10 * MIB,), 0, 1, replicas=2)
SERVICE_MS = 100
RESTORE_MS = 3_000


def holds(node: str, *others: str, state: str = "resident", used: int = 0, **report: int) -> NodeBeat:
    near = [model_report(other, "resident") for other in others]
    return beat(node, model_report(str(REF), state, **report), *near, used=used)


def lacks(node: str, *others: str, used: int = 0) -> NodeBeat:
    return holds(node, *others, state="absent", used=used, restore_ms_estimate=RESTORE_MS)


@dataclass(slots=True)
class World:
    """Nodes that answer one request after the other, and callers who come again at once."""

    cluster: Cluster
    spec: ModelSpec = SPEC
    now_ms: int = 0
    queues: dict[str, int] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)

    def send(self) -> str:
        node = copies.choose_all(self.cluster, self.spec, self.now_ms)[0]
        self.route(node)
        return node

    def route(self, node: str) -> None:
        wait_ms = copies.wait_ms(self.cluster, self.spec, node, self.now_ms)
        routed = Routed(node, REF, share_bytes(self.spec), self.spec.devices, wait_ms)
        step(self.cluster, routed, self.now_ms)
        self.queues[node] = self.queues.get(node, 0) + 1
        self.sent[node] += 1
        check(self.cluster)

    def end(self, node: str, reached: bool = True, status: int = 200) -> None:
        self.queues[node] -= 1
        step(self.cluster, Answered(node, reached, REF, status), self.now_ms)
        check(self.cluster)

    def run(self, callers: int, rounds: int) -> Counter[str]:
        """Who was asked, while nodes that have the version on a device answer one request each per round."""
        self.sent.clear()
        while sum(self.queues.values()) < callers:
            self.send()
        for _ in range(rounds):
            self.now_ms += SERVICE_MS
            ready = [n for n in self.cluster.near.get(str(REF), ()) if self.queues.get(n)]
            for node in ready:
                self.end(node)
            for _ in ready:
                self.send()
        return Counter(self.sent)

    def rest(self) -> None:
        for node, left in self.queues.items():
            for _ in range(left):
                self.end(node)


def world(*events: NodeBeat, spec: ModelSpec = SPEC) -> World:
    return World(cluster_of(*events), spec)


def test_one_replica_stays_where_it_is_however_long_its_callers_wait() -> None:
    one = world(holds("a"), lacks("b"), lacks("c"), spec=replace(SPEC, replicas=1))
    assert set(one.run(callers=16, rounds=100)) == {"a"}


def test_a_copy_is_sent_for_once_what_was_waited_has_paid_for_it_and_then_both_answer() -> None:
    two = world(holds("a"), lacks("b"), lacks("c"))
    # Three others are before each, who are done in 300 ms: the tenth or so has paid for 3,000 ms.
    assert set(two.run(callers=4, rounds=9)) == {"a"}
    sent = two.run(callers=4, rounds=40)
    (further,) = set(sent) - {"a"}
    assert sent[further] == 1, "all others go on at the holder until the copy is there"
    step(two.cluster, holds(further), two.now_ms)
    shared = two.run(callers=4, rounds=40)
    assert set(shared) == {"a", further}
    assert abs(shared["a"] - shared[further]) <= 2
    # Both are as busy as may be: there are as many as were ordered.
    assert set(two.run(callers=60, rounds=200)) == {"a", further}


def test_more_replicas_come_one_at_a_time() -> None:
    three = world(holds("a"), lacks("b"), lacks("c"), spec=replace(SPEC, replicas=3))
    three.run(callers=20, rounds=60)
    (first,) = set(three.queues) - {"a"}
    step(three.cluster, holds(first), three.now_ms)
    three.run(callers=20, rounds=60)
    assert set(three.queues) == {"a", "b", "c"}


def test_callers_who_never_meet_make_no_copy_and_use_one_of_two() -> None:
    alone = world(holds("a"), lacks("b"), lacks("c"))
    assert set(alone.run(callers=1, rounds=200)) == {"a"}
    both = world(holds("a"), holds("b"), lacks("c"))
    assert len(both.run(callers=1, rounds=50)) == 1
    assert set(both.run(callers=2, rounds=50)) == {"a", "b"}
    both.rest()
    assert len(both.run(callers=1, rounds=50)) == 1, "the other one ages out"


def test_waves_with_pauses_between_them_make_a_copy_as_well() -> None:
    waves = world(holds("a"), lacks("b"), lacks("c"))
    for _ in range(8):
        for _ in range(8):
            waves.send()
        for _ in range(8):
            waves.now_ms += SERVICE_MS
            if waves.queues["a"]:
                waves.end("a")
        waves.now_ms += SERVICE_MS
    assert len(waves.queues) == 2
    flow = waves.cluster.nodes["a"].flows[str(REF)]
    assert flow.busy_ms == flow.answers * SERVICE_MS, "pauses are no work"


def test_requests_that_share_a_pass_do_not_wait_for_each_other() -> None:
    together = replace(SPEC, batching=Batching(8))
    assert set(world(holds("a"), lacks("b"), spec=together).run(callers=8, rounds=200)) == {"a"}
    assert len(world(holds("a"), lacks("b"), spec=together).run(callers=16, rounds=200)) == 2


def test_waiting_that_comes_too_thinly_makes_no_copy() -> None:
    thin = world(holds("a"), lacks("b"), lacks("c"))
    for _ in range(100):
        thin.run(callers=4, rounds=3)
        thin.rest()
        thin.now_ms += 2 * WAITED_HALF_MS
        for event in (Ticked(), holds("a"), lacks("b"), lacks("c")):
            step(thin.cluster, event, thin.now_ms)
    assert set(thin.queues) == {"a"}
    thin.now_ms += 20 * WAITED_HALF_MS
    step(thin.cluster, Ticked(), thin.now_ms)
    assert not thin.cluster.waits.owed, "and is forgotten"


def test_a_cold_version_and_one_on_its_way_are_waited_for_at_one_node() -> None:
    cold = world(lacks("a"), lacks("b"), lacks("c"))
    first = cold.send()
    assert {cold.send() for _ in range(20)} == {first}
    step(cold.cluster, holds(first, state="restoring"), 1)
    assert {cold.send() for _ in range(20)} == {first}


def overdue(*events: NodeBeat, spec: ModelSpec = SPEC) -> World:
    """A further copy is due at the next request."""
    found = world(*events, spec=spec)
    for _ in range(4):
        found.route("a")
    for _ in range(2):
        found.now_ms += SERVICE_MS
        found.end("a")
    found.cluster.waits.add(REF, 10 * RESTORE_MS, found.now_ms)
    return found


def test_a_node_that_refuses_a_copy_is_not_asked_again_for_a_while_and_another_is() -> None:
    due = overdue(holds("a"), lacks("b"), lacks("c"))
    first = due.send()
    assert first != "a"
    due.end(first, status=429)
    assert due.send() == "a", "it has to be paid for anew"
    due.cluster.waits.add(REF, 10 * RESTORE_MS, due.now_ms)
    second = due.send()
    assert second not in ("a", first)
    due.end(second, reached=False)
    due.cluster.waits.add(REF, 10 * RESTORE_MS, due.now_ms)
    assert due.send() == "a"
    due.now_ms += DECLINED_MS
    due.cluster.waits.add(REF, 10 * RESTORE_MS, due.now_ms)
    assert due.send() in "bc"


def test_no_copy_is_sent_for_where_there_are_enough_or_one_is_on_its_way() -> None:
    enough = overdue(holds("a"), holds("b"), lacks("c"))
    for _ in range(4):
        enough.route("b")
    assert enough.send() in "ab"
    three = replace(SPEC, replicas=3)
    assert overdue(holds("a"), holds("b", state="restoring"), lacks("c"), spec=three).send() == "a"
    assert overdue(holds("a"), lacks("b"), lacks("c"), spec=three).send() in "bc"


def test_while_a_copy_is_on_its_way_no_other_is_saved_for() -> None:
    due = overdue(holds("a"), holds("b", state="restoring"), spec=replace(SPEC, replicas=3))
    before = due.cluster.waits.owed[REF].waited_ms
    due.route("a")
    assert due.cluster.waits.owed[REF].waited_ms == before
    step(due.cluster, lacks("b"), due.now_ms)
    due.route("a")
    assert due.cluster.waits.owed[REF].waited_ms > before


def test_a_node_that_could_not_be_reached_is_sent_no_copy() -> None:
    due = overdue(holds("a"), lacks("b"), lacks("c"))
    for node in "bc":
        step(due.cluster, Routed(node, OTHER, MIB), due.now_ms)
        step(due.cluster, Answered(node, False, OTHER), due.now_ms)
    assert due.send() == "a"


def test_how_it_stands_can_be_told() -> None:
    due = overdue(holds("a"), lacks("b"), lacks("c"))
    now = copies.stand(due.cluster, SPEC, due.now_ms)
    assert (now.replicas, now.holders, now.restore_ms) == (2, ("a",), RESTORE_MS)
    assert now.waited_ms >= 10 * RESTORE_MS
    assert due.send() == now.next_node
    due.end(now.next_node, status=507)
    after = copies.stand(due.cluster, SPEC, due.now_ms)
    assert (after.declined, after.waited_ms) == ((now.next_node,), 0)
    assert after.next_node not in ("a", now.next_node, None)
    full = copies.stand(cluster_of(holds("a"), holds("b")), SPEC, 0)
    assert (full.holders, full.next_node, full.waited_ms, full.declined) == (("a", "b"), None, 0, ())


def test_refusals_say_nothing_of_the_pace() -> None:
    slow = world(holds("a"), lacks("b"))
    for _ in range(6):
        slow.route("a")
    for status in (200, 503, 429, 200):
        slow.now_ms += SERVICE_MS
        slow.end("a", status=status)
    flow = slow.cluster.nodes["a"].flows[str(REF)]
    assert (flow.busy_ms, flow.answers) == (3 * SERVICE_MS, 1)


def test_a_bad_request_is_no_refusal_of_the_copy() -> None:
    due = overdue(holds("a"), lacks("b"), lacks("c"))
    due.end(due.send(), status=400)
    assert not due.cluster.waits.owed[REF].declined


def test_where_a_restore_takes_longer_than_was_waited_nobody_goes() -> None:
    due = overdue(holds("a"), *(holds(n, state="absent", restore_ms_estimate=99_000) for n in "bc"))
    assert due.send() == "a"
    due.cluster.waits.add(REF, 99_000, due.now_ms)
    assert due.send() != "a"


def test_the_next_copy_goes_where_least_of_its_tenant_is_but_first_where_its_bytes_are() -> None:
    mine = [str(ModelRef("acme", f"m{i}", "a" * 16)) for i in range(3)]
    foreign = [str(ModelRef("globex", f"m{i}", "a" * 16)) for i in range(9)]
    # The fullest would be the best fit.
    assert overdue(holds("a"), lacks("b", *mine, used=50 * MIB), lacks("c", *foreign)).send() == "c"
    assert overdue(holds("a"), lacks("b", *foreign, used=50 * MIB), lacks("c", *mine)).send() == "b"
    on_disk = holds("b", *mine, state="absent", disk_bytes=1, restore_ms_estimate=RESTORE_MS)
    assert overdue(holds("a"), on_disk, lacks("c")).send() == "b"
    # Not where there is no room for it.
    assert overdue(holds("a"), lacks("b", *mine), lacks("c", used=90 * MIB)).send() == "b"
    # What was sent there a moment ago counts, though no report has it.
    due = overdue(holds("a"), lacks("b", mine[0]), lacks("c", *mine[1:]))
    for name in ("x", "y"):
        step(due.cluster, Routed("b", ModelRef("acme", name, "a" * 16), MIB), 0)
    assert due.send() == "c"


def test_a_copy_of_a_gang_goes_where_there_are_enough_devices() -> None:
    gang = replace(SPEC, devices=2, chunk_bytes=(5 * MIB, 5 * MIB), cuts=(1,))
    two = lacks("c")
    device = two.report.devices[0]
    pair = replace(two, report=replace(two.report, devices=(device, replace(device, device="cpu:1"))))
    assert overdue(holds("a"), lacks("b"), pair, spec=gang).send() == "c"
    assert overdue(holds("a"), lacks("b"), lacks("c"), spec=gang).send() == "a"


def test_when_a_holder_is_lost_the_other_answers_and_a_lost_copy_may_be_replaced() -> None:
    both = world(holds("a"), holds("b"), lacks("c"))
    assert set(both.run(callers=8, rounds=20)) == {"a", "b"}
    both.end("a", reached=False)
    assert copies.choose(both.cluster, SPEC, both.now_ms)[0] == "b"
    step(both.cluster, NodeRemoved("a"), both.now_ms)
    del both.queues["a"]
    assert "c" in both.run(callers=8, rounds=100)


def test_a_copy_on_its_way_is_still_expected_while_the_holder_answers() -> None:
    due = overdue(holds("a"), lacks("b"), lacks("c"))
    further = due.send()
    due.route("a")
    assert due.cluster.expected[REF].node == further
    assert set(choose_near(due.cluster, REF, due.now_ms)) == {"a", further}
    due.now_ms += EXPECTED_MS
    due.route("a")
    assert due.cluster.expected[REF].node == "a", "it never came"


def test_holders_above_the_number_answer_and_no_more_are_made() -> None:
    above = world(holds("a"), holds("b"), lacks("c"), spec=replace(SPEC, replicas=2))
    above.spec = replace(SPEC, replicas=1)
    assert set(above.run(callers=9, rounds=99)) == {"a", "b"}


def test_what_is_remembered_is_bounded() -> None:
    cluster = cluster_of(*(beat(n, model_report(str(OTHER), "resident")) for n in "abc"))
    for number in range(OWED_MAX + 5):
        cluster.waits.add(ModelRef("acme", f"m{number}", "a" * 16), 5, number)
    check(cluster)
    flows: dict[str, Flow] = {}
    for number in range(FLOWS_IDLE_MAX + 5):
        count(flows, f"m{number}")
    assert len(flows) == FLOWS_IDLE_MAX + 5, "requests are in flight"
    for number in range(3, FLOWS_IDLE_MAX + 5):
        assert end(flows, f"m{number}", True, 0)
    count(flows, "m0")
    assert len(flows) == FLOWS_IDLE_MAX
    assert [text for text, flow in flows.items() if flow.in_flight] == ["m1", "m2", "m0"]
    owed = Owed()
    for number in range(DECLINED_MAX + 5):
        owed.decline(f"n{number}", number)
    assert list(owed.declined) == [f"n{number}" for number in range(5, DECLINED_MAX + 5)]


@pytest.mark.parametrize("known", [True, False])
def test_the_setting_may_change_while_requests_are_in_flight(known: bool) -> None:
    """Those that were not counted end as those that were: nothing stays, and nothing goes below zero."""
    late = world(holds("a"), lacks("b"))
    for _ in range(3):
        step(late.cluster, Routed("a", REF, MIB), 0)
    late.queues["a"] = 3
    for _ in range(2 if known else 0):
        late.route("a")
    late.rest()
    assert [flow.in_flight for flow in late.cluster.nodes["a"].flows.values()] == [0] * known
    assert late.cluster.in_flight == 0


# --- requests that this router did not send -------------------------------------------------------


def report(at: World, leases: int, node: str = "a", state: str = "resident") -> None:
    """A beat of a node that has so many requests for the version, and what control makes of it."""
    event = holds(node, state=state, leases=leases) if state != "absent" else lacks(node)
    step(at.cluster, event, at.now_ms)
    for seen in copies.seen(at.cluster, [at.spec], node, at.now_ms):
        step(at.cluster, seen, at.now_ms)
    check(at.cluster)


def waited(at: World) -> int:
    return copies.stand(at.cluster, at.spec, at.now_ms).waited_ms


def reported(at: World, leases: int, seconds: int) -> None:
    for _ in range(seconds):
        at.now_ms += 1_000
        report(at, leases)


def test_callers_who_go_to_the_node_themselves_bring_a_copy_as_well() -> None:
    """Four are there all the time, three of whom wait: three seconds a second."""
    two = world(holds("a"), lacks("b"))
    reported(two, leases=4, seconds=1)
    assert waited(two) == 0  # nobody knows since when
    reported(two, leases=4, seconds=1)
    assert waited(two) == 3_000
    further, held = copies.choose(two.cluster, SPEC, two.now_ms)
    assert held == "a"
    step(two.cluster, Pointed(further, REF, share_bytes(SPEC)), two.now_ms)
    assert waited(two) == 0  # whoever was told goes there, and nobody else is told so
    reported(two, leases=4, seconds=5)
    assert waited(two) == 0
    assert copies.choose(two.cluster, SPEC, two.now_ms) == ["a", further]


def test_who_asks_again_for_a_node_that_has_the_model_pays_nothing() -> None:
    two = world(holds("a"), lacks("b"))
    reported(two, leases=4, seconds=2)
    step(two.cluster, Pointed("a", REF, share_bytes(SPEC)), two.now_ms)
    assert waited(two) == 3_000


def test_a_routers_own_requests_are_not_counted_again() -> None:
    """They are in the node's reports as well; what they waited is counted when they are sent."""
    two = world(holds("a"), lacks("b"), spec=replace(SPEC, replicas=2))
    for _ in range(4):
        two.route("a")
    reported(two, leases=4, seconds=5)
    assert (waited(two), two.cluster.nodes["a"].others) == (0, {})
    reported(two, leases=6, seconds=2)
    # Two of the six are others': of the five who wait, and the second that passed, a third is theirs.
    assert waited(two) == 5 * 1_000 * 2 // 6


def test_of_others_only_who_stays_from_one_report_to_the_next_has_waited() -> None:
    two = world(holds("a"), lacks("b"))
    for leases in (9, 1, 9, 1, 9, 0, 9):
        reported(two, leases=leases, seconds=1)
    assert waited(two) == 0
    report(two, leases=9)
    two.now_ms += 10 * REPORTS_APART_MS_MAX
    report(two, leases=2)
    assert waited(two) == REPORTS_APART_MS_MAX


def test_others_who_share_a_pass_or_wait_for_a_restore_bring_no_copy() -> None:
    together = world(holds("a"), lacks("b"), spec=replace(SPEC, batching=Batching(4, 5)))
    reported(together, leases=4, seconds=5)
    assert waited(together) == 0
    coming = world(holds("a", state="restoring"), lacks("b"))
    for _ in range(5):
        coming.now_ms += 1_000
        report(coming, leases=9, state="restoring")
    assert waited(coming) == 0


def test_others_save_for_nothing_where_there_are_enough_copies_and_go_with_the_node() -> None:
    full = world(holds("a"), holds("b"), lacks("c"))
    reported(full, leases=9, seconds=3)
    assert (waited(full), list(full.cluster.nodes["a"].others)) == (0, [str(REF)])
    assert copies.choose(full.cluster, SPEC, full.now_ms) == ["b", "a"]  # where nobody waits
    report(full, leases=0, state="absent")
    assert full.cluster.nodes["a"].others == {}
    reported(full, leases=9, seconds=1)
    step(full.cluster, NodeRemoved("a"), full.now_ms)
    assert copies.seen(full.cluster, [SPEC], "a", full.now_ms) == []
