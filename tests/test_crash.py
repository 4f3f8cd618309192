"""Kill -9 of agent, worker and control, with real processes: nothing acknowledged is lost.

Covers: what a restarted agent finds, a killed worker before and in the middle of an answer, serving while
control is away, and who is left behind. Does not cover: control's own crash tests
(``test_control_crash``) or the core's (``test_simulation``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from make_models import make_classifier, make_gpt2
from real_box import CALLER, PATIENCE_S, Box, Process, running_box, wait_gone

from control.authority import Authority
from packer.identity import Identity

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small generators of about 17 MB; two fit on a device of 48 MiB at a time."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        make_gpt2(folder / f"gen{seed}", seed, hidden=256, layers=4, heads=4)
    make_classifier(folder / "judge", 7)
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(tmp_path_factory.mktemp("box")) as box:
        yield box


@pytest.fixture
def box(started: Box, models: Path) -> Iterator[Box]:
    """The one box of this file, both processes running; its only tenant is new and has two models."""
    mend(started)
    started.add_tenant("acme")
    for name in ("gen0", "judge"):
        started.tenant("acme").push(f"acme/{name}", models / name)
    started.wait_planned(2)
    yield started
    mend(started)
    if any(tenant.tenant == "acme" for tenant in started.operator().tenants()):
        forget(started)


def mend(box: Box) -> None:
    """Start what a test left dead."""
    if box.control is None or box.control.handle.poll() is not None:
        box.start_control()
        if box.agent is not None and box.agent.handle.poll() is None:
            box.agent.wait_for("connected to control")
    if box.agent is None or box.agent.handle.poll() is not None:
        box.start_agent()


def forget(box: Box) -> None:
    """Delete the tenant, until the node holds nothing of it."""
    assert box.agent is not None
    pidfds = [os.pidfd_open(pid) for pid in box.worker_pids()]
    box.operator().delete_tenant("acme")
    box.agent.wait_for("tenant acme is gone; its keys are destroyed")
    wait_gone(pidfds)


def ask(box: Box, model: str = "acme/gen0") -> httpx2.Response:
    """One completion from the node itself."""
    return CALLER.post(
        f"{box.gateway_url}/v1/completions",
        headers={"Authorization": f"Bearer {box.keys['acme']}"},
        json={"model": model, "prompt": "the bunk", "max_tokens": 8, "temperature": 0},
        timeout=PATIENCE_S,
    )


def answer(box: Box, model: str = "acme/gen0") -> tuple[str, str]:
    """(text, tier) of a completion that must succeed."""
    got = ask(box, model)
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["text"], got.headers["x-bunkhouse-tier"]


def test_a_killed_agent_finds_its_packs_rejoins_and_serves(box: Box, models: Path) -> None:
    """Same name, same certificate, no new token; the answer is the same, from disk and not from origin;
    no worker outlives the agent."""
    # No other test packs this model: an event of theirs is not taken for its own.
    box.tenant("acme").push("acme/gen2", models / "gen2")
    box.wait_planned(3)
    before, tier = answer(box, "acme/gen2")
    assert tier == "origin"
    assert box.agent is not None
    # A pack is written beside serving, and its file has its name a moment before the journal has its key; the
    # event comes after both.
    box.events("packed", "acme/gen2")
    pids = box.worker_pids()
    assert pids
    pidfds = [os.pidfd_open(pid) for pid in pids]
    box.agent.kill()
    wait_gone(pidfds)
    box.start_agent()
    assert answer(box, "acme/gen2") == (before, "disk")
    assert [node.node for node in box.operator().nodes()] == ["box"]


def test_a_killed_worker_costs_one_retry_at_most(box: Box) -> None:
    """The next request is answered, by a new process, with the same text; nobody else notices."""
    before, _ = answer(box)
    (old,) = box.worker_pids()
    pidfd = os.pidfd_open(old)
    os.kill(old, signal.SIGKILL)
    wait_gone([pidfd])
    after = ask(box)
    if after.status_code == 503:  # it raced with the death and was told so
        assert after.headers["x-should-retry"] == "true"
        after = ask(box)
    assert after.status_code == 200, after.text
    assert after.json()["choices"][0]["text"] == before
    (new,) = box.worker_pids()
    assert new != old


def test_a_worker_killed_in_mid_stream_ends_the_stream_with_one_error(box: Box) -> None:
    """The caller sees one clear SSE error and no [DONE]; the model answers again by itself."""
    answer(box)
    body = {"model": "acme/gen0", "prompt": "x", "max_tokens": 200, "stream": True, "temperature": 0}
    headers = {"Authorization": f"Bearer {box.keys['acme']}"}
    url = f"{box.gateway_url}/v1/completions"
    lines: list[str] = []
    with CALLER.stream("POST", url, headers=headers, json=body, timeout=PATIENCE_S) as stream:
        assert stream.status_code == 200
        for line in stream.iter_lines():
            lines.append(line)
            if len(lines) == 1:
                os.kill(box.worker_pids()[0], signal.SIGKILL)
    data = [line for line in lines if line.startswith("data: ")]
    errors = [line for line in data if '"error"' in line]
    if "data: [DONE]" not in data:  # the stream was not over before the kill arrived
        assert len(errors) == 1
        assert data[-1] == errors[0]
        assert "worker_died" in errors[0]
    got = ask(box)
    assert (got if got.status_code == 200 else ask(box)).status_code == 200


def test_while_control_is_down_the_node_goes_on_serving(box: Box, models: Path) -> None:
    """Known keys, known models, cold restores from the node's own tiers; then control comes back and
    the node reconnects by itself and learns what is new."""
    before, _ = answer(box)
    assert box.control is not None
    assert box.agent is not None
    box.control.kill()
    box.agent.wait_for("control is away")
    assert answer(box) == (before, "device")
    wrong = CALLER.get(f"{box.gateway_url}/v1/models", headers={"Authorization": "Bearer bk_no"})
    assert wrong.status_code == 401
    box.start_control()
    box.agent.wait_for("connected to control")
    # A model that was pushed after the crash arrives by a plan of the new epoch.
    box.tenant("acme").push("acme/gen1", models / "gen1")
    box.wait_planned(3)
    assert ask(box, "acme/gen1").status_code == 200


def test_a_stopped_agent_leaves_nothing_running_and_serves_its_last_plan_when_started_without_control(
    box: Box,
) -> None:
    """SIGTERM ends the agent, its nursery and its workers, with status 0. Static stability: keys, models and
    packs come from the journal alone."""
    before, _ = answer(box)
    assert box.agent is not None
    assert box.control is not None
    pidfds = [os.pidfd_open(pid) for pid in box.worker_pids()]
    assert pidfds
    assert box.agent.stop() == 0
    wait_gone(pidfds)
    box.control.kill()
    box.start_agent(wait="gateway on")
    # Not from origin, which is control's store: its pack was finished before the agent stopped.
    assert answer(box) == (before, "disk")


def test_a_certificate_that_ended_while_control_was_away_stops_nothing(box: Box) -> None:
    """The node serves on, and has another certificate as soon as control is back: no token, no hands."""
    before, _ = answer(box)
    assert box.agent is not None
    assert box.control is not None
    box.control.kill()
    assert box.agent.stop() == 0
    certify_long_ago(box)
    box.start_agent(wait="the certificate has ended and control does not renew it yet")
    assert answer(box)[0] == before
    box.start_control()
    box.agent.wait_for("the certificate had ended; control gave a new one")
    box.agent.wait_for("connected to control")
    through_router = CALLER.post(
        f"{box.url}/v1/completions",
        headers={"Authorization": f"Bearer {box.keys['acme']}"},
        json={"model": "acme/gen0", "prompt": "the bunk", "max_tokens": 8, "temperature": 0},
        timeout=PATIENCE_S,
    )
    assert through_router.json()["choices"][0]["text"] == before


def test_a_removed_node_stays_stopped_until_it_joins_anew(box: Box) -> None:
    """Started again without a token it serves nobody; with one it is a new node on its old packs."""
    before, _ = answer(box)
    assert box.agent is not None
    box.operator().delete_node("box")
    box.agent.wait_for("control removed this node.*former-1.*join again")
    assert box.agent.handle.wait(PATIENCE_S) == 1
    words = ["--data-dir", str(box.folder / "agent"), "--control", box.node_url, "--device", "cpu:48MiB"]
    again = Process("agent", "run", *words, "--name", "box", "--listen", f"127.0.0.1:{box.ports[2]}")
    again.wait_for("this node has not joined")
    assert again.handle.wait(PATIENCE_S) == 1
    assert "plan " not in again.whole_log()
    box.start_agent()
    box.wait_planned(2)
    assert answer(box) == (before, "disk")


def certify_long_ago(box: Box) -> None:
    """Let the node's certificate have ended two days ago; neither agent nor control runs."""
    identity = Identity(box.folder / "agent" / "identity")
    assert identity.answer is not None
    then = datetime.now(UTC) - timedelta(days=3)
    authority = Authority(box.folder / "control", identity.answer.cluster, lambda: then)
    chain = authority.issue_node(authority.read_request(identity.csr_pem("box")), "box")
    identity.save(replace(identity.answer, certificate_pem=chain))


def test_revoking_a_key_reaches_the_node(box: Box) -> None:
    """A revoked key stops at the node itself, not only at the router."""
    answer(box)
    (key,) = box.operator().keys("acme")
    box.operator().revoke_key(key.key_id)
    assert box.agent is not None
    box.agent.wait_for(r"plan \d+\.\d+")
    while ask(box).status_code == 200:
        box.agent.wait_for(r"plan \d+\.\d+")
    assert ask(box).status_code == 401


def test_deleting_a_tenant_shreds_its_packs_and_keys(box: Box) -> None:
    """After the delete neither file nor key of the tenant is on the node."""
    answer(box)
    forget(box)
    assert ask(box).status_code == 401
    # Their keys went before; the files follow when their worker has given the weights back.
    assert box.agent is not None
    box.agent.until(lambda: not list((box.folder / "agent" / "packs").glob("acme/*.pack")))
