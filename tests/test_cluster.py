"""The cluster core: liveness, who is sent a plan, and where a request goes.

Covers: scenarios as lists of events, on a clock that only the test moves. Does not cover: delivery
(``test_control``).
"""

from __future__ import annotations

from dataclasses import replace

from running_control import empty_report, model_report

from control.choosing import choose_near, choose_node, equally_good, is_there
from control.cluster import (
    AVOID_MS,
    EXPECTED_MAX,
    EXPECTED_MS,
    SILENT_AFTER_MS,
    TURN_MS,
    TURNS_MAX,
    Answered,
    AnswerSource,
    Changed,
    Cloned,
    Cluster,
    EndPoll,
    Event,
    NodeBeat,
    NodeJoined,
    NodeRemoved,
    NoteBack,
    NoteSilent,
    Pointed,
    PollEnded,
    Routed,
    SendPlan,
    SourceAsked,
    Ticked,
    WakeSources,
    check,
    knows,
    step,
)
from control.rooms import LOAD_BAND
from packer.types import MIB, ModelRef
from packer.wire import PEERS_TRIED_MAX, DeviceReport, ModelReport

REF = ModelRef("acme", "minilm", "a" * 16)
OTHER = ModelRef("acme", "other", "b" * 16)


def beat(
    node: str,
    *models: ModelReport,
    have: tuple[int, int] = (1, 5),
    waits: bool = False,
    used: int = 0,
    draining: bool = False,
    peer_url: str = "",
) -> NodeBeat:
    device = DeviceReport("cpu:0", "cpu", "cpu", 96 * MIB, used, 0, True)
    report = empty_report(f"http://{node}:1", models, devices=(device,), draining=draining, peer_url=peer_url)
    return NodeBeat(node, report, *have, waits)


def cluster_of(*events: Event) -> Cluster:
    """Nodes a, b and c, all up to date with plan (1, 5); then ``events`` at time 0."""
    cluster = Cluster(newest=(1, 5))
    for node in "abc":
        step(cluster, NodeJoined(node, f"http://{node}:1"), 0)
        step(cluster, beat(node), 0)
    for event in events:
        step(cluster, event, 0)
    return cluster


def order(cluster: Cluster, ref: ModelRef = REF, now_ms: int = 0) -> list[str]:
    """The whole order; what the short cut says must be its beginning."""
    nodes = list(choose_node(cluster, ref, 10 * MIB, now_ms))
    near = choose_near(cluster, ref, now_ms)
    assert near == nodes[: len(near)]
    check(cluster)
    return nodes


# --- plans ----------------------------------------------------------------------------------------


def test_a_beat_that_is_behind_is_answered_with_the_plan() -> None:
    cluster = cluster_of()
    for have in ((0, 0), (1, 4), (0, 99)):
        for waits in (False, True):
            assert step(cluster, beat("a", have=have, waits=waits), 1) == [SendPlan("a", 1, 5)]
    assert step(cluster, beat("a", waits=True), 1) == []


def test_a_change_answers_exactly_the_polls_that_wait() -> None:
    cluster = cluster_of(beat("a", waits=True), beat("c", waits=True))
    assert step(cluster, Changed(1, 6), 1) == [SendPlan("a", 1, 6), SendPlan("c", 1, 6)]
    assert step(cluster, Changed(1, 7), 2) == []


def test_a_short_beat_does_not_end_the_long_poll() -> None:
    cluster = cluster_of(beat("a", waits=True), beat("a"))
    assert step(cluster, Changed(1, 6), 1) == [SendPlan("a", 1, 6)]


def test_a_late_beat_is_answered_and_changes_nothing() -> None:
    """Beats overtake each other; a report that comes late hid a newer one for up to a poll's time. Found by
    ``cluster_simulation``."""
    here, gone = model_report(str(REF), "resident"), model_report(str(REF))
    cluster = cluster_of(replace(beat("a", here), life="x", number=2))
    late = replace(beat("a", gone, have=(1, 4)), life="x", number=1)
    assert step(cluster, late, 1) == [SendPlan("a", 1, 5)]
    assert cluster.nodes["a"].by_ref[str(REF)].state == "resident"
    assert cluster.nodes["a"].have == (1, 5)
    # Another process of the node counts from 1.
    step(cluster, replace(beat("a", gone), life="y", number=1), 2)
    assert cluster.nodes["a"].by_ref[str(REF)].state == "absent"
    # A late word of the one before, and the next of the newer: nobody is shut out for good.
    step(cluster, replace(beat("a", here), life="x", number=3), 3)
    step(cluster, replace(beat("a", gone), life="y", number=2), 4)
    assert cluster.nodes["a"].by_ref[str(REF)].state == "absent"
    step(cluster, beat("a", here), 5)  # a node of an earlier release states neither
    assert cluster.nodes["a"].by_ref[str(REF)].state == "resident"


def test_a_late_beat_that_waits_still_gets_the_next_plan() -> None:
    cluster = cluster_of(replace(beat("a"), life="x", number=2))
    assert step(cluster, replace(beat("a", waits=True), life="x", number=1), 1) == []
    assert step(cluster, Changed(1, 6), 2) == [SendPlan("a", 1, 6)]


def test_a_poll_that_ended_is_not_answered() -> None:
    cluster = cluster_of(beat("a", waits=True), PollEnded("a"))
    assert step(cluster, Changed(1, 6), 1) == []


def test_a_removed_node_loses_its_poll_and_is_not_heard_any_more() -> None:
    cluster = cluster_of(beat("a", waits=True))
    assert step(cluster, NodeRemoved("a"), 1) == [EndPoll("a")]
    assert step(cluster, NodeRemoved("a"), 1) == []
    assert step(cluster, beat("a", have=(0, 0)), 1) == []
    assert order(cluster) == [node for node in order(cluster_of()) if node != "a"]


def test_a_new_epoch_makes_every_plan_stale() -> None:
    cluster = cluster_of(beat("a", waits=True, have=(1, 5)))
    assert step(cluster, Changed(2, 5), 1) == [SendPlan("a", 2, 5)]
    assert not knows(cluster, "a", 0)
    step(cluster, beat("a", have=(2, 5)), 2)
    assert knows(cluster, "a", 5)
    assert not knows(cluster, "a", 6)
    assert not knows(cluster, "nobody", 0)


# --- liveness -------------------------------------------------------------------------------------


def test_silence_is_noted_once_and_so_is_the_return() -> None:
    cluster = cluster_of()
    assert step(cluster, Ticked(), SILENT_AFTER_MS) == []
    later = SILENT_AFTER_MS + 1
    assert step(cluster, Ticked(), later) == [NoteSilent(node, later) for node in "abc"]
    assert step(cluster, Ticked(), later + 1) == []
    assert order(cluster) == []
    assert step(cluster, beat("b"), later + 2) == [NoteBack("b")]
    assert order(cluster) == ["b"]


def test_a_node_that_holds_its_poll_open_is_not_silent() -> None:
    cluster = cluster_of(beat("a", waits=True))
    assert step(cluster, Ticked(), 10 * SILENT_AFTER_MS) == [
        NoteSilent(node, 10 * SILENT_AFTER_MS) for node in "bc"
    ]


def test_two_boxes_that_both_fell_silent_are_not_there() -> None:
    """The poll that ended when the copy was found out is none that is open."""
    cluster = cluster_of(beat("a", waits=True))
    assert step(cluster, Cloned("a", True), 0) == [EndPoll("a")]
    check(cluster)
    later = SILENT_AFTER_MS + 1
    assert NoteSilent("a", later) in step(cluster, Ticked(), later)
    assert step(cluster, Cloned("a", False), later) == []
    assert "a" not in order(cluster)


def test_a_node_that_is_only_remembered_has_time_to_report() -> None:
    cluster = Cluster()
    step(cluster, NodeJoined("a", "http://a:1"), 0)
    assert step(cluster, Ticked(), 1_000_000) == []
    assert step(cluster, Ticked(), 1_000_000 + SILENT_AFTER_MS) == []
    assert step(cluster, Ticked(), 1_000_001 + SILENT_AFTER_MS) == [NoteSilent("a", SILENT_AFTER_MS + 1)]


# --- routing --------------------------------------------------------------------------------------


def test_bytes_decide_first() -> None:
    """Device before on its way, before host, before disk, before nothing."""
    cluster = cluster_of(
        NodeJoined("d", "http://d:1"),
        NodeJoined("e", "http://e:1"),
        beat("e"),
        beat("a", model_report(str(REF), "absent", disk_bytes=1)),
        beat("b", model_report(str(REF), "resident", device_bytes=1, leases=50)),
        beat("c", model_report(str(REF), "absent", host_bytes=1, disk_bytes=1)),
        beat("d", model_report(str(REF), "restoring", device_bytes=1)),
    )
    assert order(cluster) == ["b", "d", "c", "a", "e"]


def test_a_restore_that_takes_less_comes_before_load_and_after_residency() -> None:
    """A tier says little about a slow box: what the node expects decides between host memory and disk."""
    far, near = (
        model_report(str(REF), "absent", disk_bytes=1, restore_ms_estimate=ms) for ms in (4_000, 400)
    )
    busy = model_report(str(OTHER), "resident", leases=5 * LOAD_BAND)
    slow = model_report(str(REF), "absent", host_bytes=1, disk_bytes=1, restore_ms_estimate=3_000)
    cluster = cluster_of(beat("a", far), beat("b", near, busy), beat("c", slow))
    assert order(cluster) == ["b", "c", "a"]
    # Differences within a power of two are noise: then the tier counts, and then load.
    alike = model_report(str(REF), "absent", disk_bytes=1, restore_ms_estimate=2_100)
    step(cluster, beat("a", alike), 0)
    assert order(cluster) == ["b", "c", "a"]
    step(cluster, beat("c", alike), 0)
    step(cluster, beat("a", alike, busy), 0)
    assert order(cluster) == ["b", "c", "a"]
    step(cluster, beat("a", model_report(str(REF), "resident", leases=1)), 0)
    assert order(cluster)[0] == "a"


def test_callers_of_one_moment_do_not_all_go_to_the_least_loaded() -> None:
    """Between two reports the router's own count: what it sent since adds to what the node said."""

    def resident(node: str, leases: int) -> NodeBeat:
        return beat(node, model_report(str(REF), "resident", leases=leases))

    cluster = cluster_of(resident("a", 10), resident("b", 4), resident("c", 4))
    sent = []
    for _ in range(12):
        sent.append(order(cluster)[0])
        step(cluster, Routed(sent[-1], REF), 0)
    assert {node: sent.count(node) for node in "abc"} == {"a": 0, "b": 6, "c": 6}
    # Their reports have those requests in them; they are not counted twice.
    step(cluster, resident("b", 10), 1)
    step(cluster, resident("c", 10), 1)
    step(cluster, Routed(order(cluster)[0], REF), 1)
    step(cluster, Routed(order(cluster)[0], REF), 1)
    step(cluster, Routed(order(cluster)[0], REF), 1)
    assert [view.in_flight for view in cluster.nodes.values()] == [1, 7, 7]
    # What ends after a report takes off what the node said.
    for _ in range(7):
        step(cluster, Answered("c", True), 2)
    assert order(cluster)[0] == "c"


def test_broken_devices_get_nothing() -> None:
    """A node whose every device is given up can not answer; with one left it can, after a restore."""

    def quarantined(node: str, healthy: bool) -> NodeBeat:
        known = model_report(str(REF), "resident", device="cpu:0", disk_bytes=1)
        event = beat(node, known)
        broken = replace(event.report.devices[0], healthy=False)
        other = replace(event.report.devices[0], device="cpu:1", healthy=healthy)
        return replace(event, report=replace(event.report, devices=(broken, other)))

    cluster = cluster_of(
        quarantined("a", False),
        quarantined("b", True),
        beat("c", model_report(str(REF), "absent", host_bytes=1)),
    )
    assert order(cluster) == ["c", "b"]


def test_among_equals_the_less_loaded_wins() -> None:
    def resident(node: str, leases: int) -> NodeBeat:
        return beat(node, model_report(str(REF), "resident", leases=leases))

    cluster = cluster_of(resident("a", 3), resident("b", 1), resident("c", 2))
    assert order(cluster) == ["b", "c", "a"]


def test_what_this_router_sent_counts_before_the_node_says_so() -> None:
    cluster = cluster_of(*(beat(node, model_report(str(REF), "resident")) for node in "abc"))
    first, second, third = order(cluster)
    for node in (first, first, second):
        step(cluster, Routed(node, REF), 0)
    assert order(cluster) == [third, second, first]
    for node in (first, first, second):
        step(cluster, Answered(node, True), 0)
    assert order(cluster) == [first, second, third]


def test_callers_of_a_cold_model_follow_the_first() -> None:
    cluster = cluster_of()
    target = order(cluster)[-1]
    step(cluster, Routed(target, REF), 0)
    step(cluster, Answered(target, True), 0)
    assert order(cluster)[0] == target
    assert choose_near(cluster, REF, 0) == [target]
    assert order(cluster, now_ms=EXPECTED_MS)[0] != target


def test_cold_models_spread_and_stay_home() -> None:
    cluster = cluster_of()
    homes = {}
    for number in range(200):
        ref = ModelRef("acme", f"m{number}", "a" * 16)
        homes[ref] = order(cluster, ref)[0]
    assert all(40 < list(homes.values()).count(node) < 100 for node in "abc")
    step(cluster, NodeRemoved("a"), 0)
    assert all(order(cluster, ref)[0] == home for ref, home in homes.items() if home != "a")


def test_room_decides_between_nodes_that_have_nothing() -> None:
    cluster = cluster_of(beat("a", used=90 * MIB), beat("b", used=90 * MIB), beat("c", used=20 * MIB))
    assert order(cluster)[0] == "c"


def test_a_cold_model_goes_where_it_fits_best_among_nodes_as_busy() -> None:
    """The smallest hole that is enough, so that a large model finds a large one later."""
    cluster = cluster_of(beat("a", used=10 * MIB), beat("b", used=80 * MIB), beat("c", used=90 * MIB))
    assert order(cluster) == ["b", "a", "c"]
    for _ in range(LOAD_BAND):
        step(cluster, Routed("b", ModelRef("acme", "busy", "a" * 16)), 0)
    assert order(cluster) == ["a", "b", "c"], "a node that has much to do is not the place for more"


def test_what_is_on_its_way_to_a_node_takes_its_room_until_a_report_has_it() -> None:
    cluster = cluster_of(beat("a", used=10 * MIB), beat("b", used=80 * MIB), beat("c", used=90 * MIB))
    other = ModelRef("acme", "other", "a" * 16)
    step(cluster, Routed("b", other, 10 * MIB), 0)
    assert order(cluster)[0] == "a", "the hole of b is taken"
    step(cluster, beat("b", model_report(str(other), "resident", device_bytes=10 * MIB), used=80 * MIB), 0)
    assert order(cluster)[0] == "b"
    step(cluster, Routed("b", other, 10 * MIB), 0)
    assert order(cluster, now_ms=EXPECTED_MS)[0] == "b"


def test_draining_and_silent_nodes_get_nothing() -> None:
    cluster = cluster_of(beat("a", draining=True))
    assert sorted(order(cluster)) == ["b", "c"]


def test_a_node_that_could_not_be_reached_is_asked_last_until_it_speaks() -> None:
    cluster = cluster_of(beat("a", model_report(str(REF), "resident")))
    step(cluster, Routed("a", REF), 0)
    step(cluster, Answered("a", False), 0)
    assert order(cluster, now_ms=1)[-1] == "a"
    step(cluster, beat("a", model_report(str(REF), "resident")), 2)
    assert order(cluster, now_ms=3)[0] == "a"


def test_one_request_finds_out_whether_a_node_is_back() -> None:
    """When the time to avoid it is over, the others do not wait for it as well."""
    cluster = cluster_of(beat("a", model_report(str(REF), "resident")))
    step(cluster, Routed("a", REF), 0)
    step(cluster, Answered("a", False), 0)
    assert order(cluster, now_ms=AVOID_MS)[0] == "a"
    step(cluster, Routed("a", REF), AVOID_MS)
    assert order(cluster, now_ms=AVOID_MS)[-1] == "a"
    step(cluster, Answered("a", True), AVOID_MS + 1)
    assert order(cluster, now_ms=AVOID_MS + 1)[0] == "a"


def test_who_was_told_of_a_node_brings_the_model_there() -> None:
    """A program that calls the node itself is not in flight here, but the model is most likely soon there."""
    cluster = cluster_of()
    target = order(cluster)[-1]
    step(cluster, Pointed(target, REF, 10 * MIB), 0)
    assert order(cluster)[0] == target
    assert cluster.in_flight == 0
    assert order(cluster, now_ms=EXPECTED_MS)[0] != target


def test_nodes_that_are_as_good_share_the_calls() -> None:
    cluster = cluster_of()
    nodes = order(cluster)
    assert equally_good(cluster, nodes, REF, 0) == nodes[:1]
    step(cluster, beat("a", model_report(str(REF), "resident", leases=9)), 0)
    step(cluster, beat("c", model_report(str(REF), "resident")), 0)
    assert equally_good(cluster, order(cluster), REF, 0) == ["c", "a"]
    assert equally_good(cluster, ["b", "a"], REF, 0) == ["a"]
    step(cluster, Routed("c", REF), 0)
    step(cluster, Answered("c", False), 0)
    assert equally_good(cluster, order(cluster), REF, 1) == ["a"]
    assert equally_good(cluster, [], REF, 0) == equally_good(cluster, ["z"], REF, 0) == []


def test_what_is_near_is_forgotten_with_its_report_and_its_node() -> None:
    cluster = cluster_of(
        beat("a", model_report(str(REF), "resident"), model_report(str(OTHER), "restoring")),
        beat("b", model_report(str(REF), "evicting")),
    )
    assert (choose_near(cluster, REF, 0), choose_near(cluster, OTHER, 0)) == (["a"], ["a"])
    step(cluster, beat("a", model_report(str(OTHER), "resident")), 1)
    assert (choose_near(cluster, REF, 1), choose_near(cluster, OTHER, 1)) == ([], ["a"])
    step(cluster, NodeRemoved("a"), 2)
    assert cluster.near == {}
    check(cluster)


def test_where_a_model_is() -> None:
    cluster = cluster_of(
        beat("a", model_report(str(REF), "resident")),
        beat("b", model_report(str(REF), "absent", disk_bytes=1), model_report(str(OTHER), "absent")),
    )
    assert [is_there(cluster, node, REF) for node in "abcz"] == [True, True, False, False]
    assert not is_there(cluster, "b", OTHER)


def test_expectations_are_bounded_and_end() -> None:
    cluster = cluster_of()
    for number in range(EXPECTED_MAX + 50):
        step(cluster, Routed("a", ModelRef("acme", f"m{number}", "a" * 16)), number)
    assert len(cluster.expected) == EXPECTED_MAX
    step(cluster, Ticked(), EXPECTED_MS + EXPECTED_MAX + 50)
    assert cluster.expected == {}


def test_the_gateway_moves_with_the_report() -> None:
    cluster = cluster_of()
    report = empty_report("http://a:2")
    step(cluster, NodeBeat("a", report, 1, 5, False), 0)
    assert cluster.nodes["a"].gateway_url == "http://a:2"


# --- sources of packs -----------------------------------------------------------------------------


def sharing(node: str, *refs: ModelRef, draining: bool = False) -> NodeBeat:
    """A node that gives packs to others and has those of ``refs``."""
    models = [model_report(str(ref), "absent", disk_bytes=1, packed=True) for ref in refs]
    return beat(node, *models, draining=draining, peer_url=f"https://{node}:2")


def sharing_cluster(*events: Event) -> Cluster:
    return cluster_of(*(sharing(node) for node in "abc"), *events)


def granted(node: str) -> AnswerSource:
    return AnswerSource(node, (), True, TURN_MS // 3)


def test_the_first_asker_reads_the_origin_and_the_others_wait() -> None:
    cluster = sharing_cluster()
    assert step(cluster, SourceAsked("a", REF), 0) == [granted("a")]
    assert step(cluster, SourceAsked("b", REF), 10) == [AnswerSource("b", wait_ms=TURN_MS - 10)]
    # Another version has a turn of its own.
    assert step(cluster, SourceAsked("b", OTHER), 10) == [granted("b")]


def test_who_waited_gets_the_peer_as_soon_as_it_reports_the_pack() -> None:
    cluster = sharing_cluster(SourceAsked("a", REF))
    assert step(cluster, beat("a", model_report(str(REF), "restoring", disk_bytes=9)), 1) == []
    assert step(cluster, sharing("a", REF), 2) == [WakeSources(REF)]
    assert cluster.turns == {}
    assert step(cluster, SourceAsked("b", REF), 3) == [AnswerSource("b", ("a",))]
    # The one that has it is not its own peer.
    assert step(cluster, SourceAsked("a", REF), 3) == [granted("a")]


def test_a_turn_lasts_as_long_as_its_node_asks_again() -> None:
    cluster = sharing_cluster(SourceAsked("a", REF))
    for now_ms in range(0, 3 * TURN_MS, TURN_MS // 3):
        assert step(cluster, SourceAsked("a", REF), now_ms) == [granted("a")]
        for node in "abc":
            step(cluster, sharing(node), now_ms)
        assert step(cluster, Ticked(), now_ms + 1) == []
        (waits,) = step(cluster, SourceAsked("b", REF), now_ms + 1)
        assert waits == AnswerSource("b", wait_ms=TURN_MS - 1)
    end_ms = 3 * TURN_MS - TURN_MS // 3 + TURN_MS
    for node in "abc":
        step(cluster, sharing(node), end_ms)
    assert step(cluster, Ticked(), end_ms) == [WakeSources(REF)]
    assert step(cluster, SourceAsked("b", REF), end_ms) == [granted("b")]


def test_a_turn_that_ran_out_is_the_next_askers_before_any_tick() -> None:
    cluster = sharing_cluster(SourceAsked("a", REF))
    assert step(cluster, SourceAsked("b", REF), TURN_MS) == [granted("b")]
    assert cluster.turns[REF][0] == "b"


def test_a_turn_ends_with_its_node() -> None:
    """By its own word, by its removal, by its silence; another node's word ends nothing."""
    cluster = sharing_cluster(SourceAsked("a", REF))
    assert step(cluster, SourceAsked("b", REF, ended=True), 1) == [AnswerSource("b")]
    assert step(cluster, SourceAsked("a", REF, ended=True), 1) == [AnswerSource("a"), WakeSources(REF)]
    assert step(cluster, SourceAsked("b", REF), 1) == [granted("b")]
    assert step(cluster, NodeRemoved("b"), 2) == [WakeSources(REF)]
    silent_ms = SILENT_AFTER_MS + 1
    step(cluster, SourceAsked("c", REF), silent_ms - 1)
    step(cluster, sharing("a"), silent_ms)
    assert step(cluster, Ticked(), silent_ms) == [NoteSilent("c", silent_ms), WakeSources(REF)]


def test_only_complete_packs_of_living_nodes_that_share_are_offered() -> None:
    cluster = cluster_of(
        beat("a", model_report(str(REF), "absent", disk_bytes=1), peer_url="https://a:2"),
        beat("b", model_report(str(REF), "absent", disk_bytes=1, packed=True)),
        sharing("c", REF),
    )
    step(cluster, NodeJoined("z", "http://z:1"), 0)
    step(cluster, sharing("z"), 0)
    assert step(cluster, SourceAsked("z", REF), 1) == [AnswerSource("z", ("c",))]
    assert step(cluster, SourceAsked("z", REF, failed=("c",)), 1) == [granted("z")]
    later_ms = SILENT_AFTER_MS + 1
    step(cluster, sharing("z"), later_ms)
    step(cluster, Ticked(), later_ms)
    assert step(cluster, SourceAsked("z", REF), later_ms) == [granted("z")]


def test_askers_spread_over_those_who_have_it_and_spare_the_draining() -> None:
    names = [f"n{number}" for number in range(20)]
    cluster = Cluster(newest=(1, 5))
    for name in names:
        step(cluster, NodeJoined(name, f"http://{name}:1"), 0)
        step(cluster, sharing(name, REF, draining=name == "n0"), 0)
    first = [step(cluster, SourceAsked(f"asker{number}", REF), 0)[0] for number in range(200)]
    answers = [answer for answer in first if isinstance(answer, AnswerSource)]
    assert len(answers) == 200
    assert {len(answer.peers) for answer in answers} == {PEERS_TRIED_MAX}
    counts = [[answer.peers[0] for answer in answers].count(name) for name in names]
    assert counts[0] == 0
    assert max(counts) < 30
    assert min(counts[1:]) > 0


def test_nobody_waits_for_a_node_that_shares_nothing() -> None:
    cluster = cluster_of()
    assert step(cluster, SourceAsked("a", REF), 0) == [granted("a")]
    assert step(cluster, SourceAsked("b", REF), 0) == [granted("b")]
    assert cluster.turns == {}


def test_turns_are_bounded_and_nobody_waits_for_want_of_one() -> None:
    cluster = sharing_cluster()
    for number in range(TURNS_MAX + 50):
        answer = step(cluster, SourceAsked("a", ModelRef("acme", f"m{number}", "a" * 16)), 0)
        assert answer == [granted("a")]
    assert len(cluster.turns) == TURNS_MAX
    step(cluster, Ticked(), TURN_MS)
    assert cluster.turns == {}


def test_unknown_nodes_are_ignored() -> None:
    cluster = cluster_of()
    before = repr(cluster)
    for event in (PollEnded("z"), Answered("z", False), beat("z"), NodeRemoved("z")):
        assert step(cluster, event, 0) == []
    assert repr(cluster) == before
    assert OTHER not in cluster.expected
