"""Two real agents and control: packs go from node to node, the origin is read once.

Covers: a second node served without the origin, bad copies of peers, a busy model with replicas, control
away, a deleted node's certificate. Does not cover: the protocol (``test_peers``, ``attacks/test_peers``) or
who waits for whom (``test_sources``, ``test_cluster``).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.numpy
from click.testing import CliRunner
from make_models import make_gpt2
from real_box import CALLER, PATIENCE_S, Box, Process, running_box
from running_peers import dial, exchange, get
from tiny_models import describe, opened

from agent.arena import allocate_image
from agent.journal import open_journal
from bunkhouse.cli.main import bunk
from packer.identity import Identity
from packer.ingest import Ingest
from packer.pack import read_header
from packer.pack_file import base_name
from packer.packing import PackTarget
from packer.sources import FileSource
from packer.types import Task, parse_ref

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

MODELS = ("plain", "index", "chunk", "forged", "busy", "away")
# Of one family: the second and the third differ from the first in one tensor each.
TWINS = ("twin-a", "twin-b", "twin-c")


@dataclass(slots=True)
class Pair:
    """A box with control and its node ``box``, and a second node beside it."""

    box: Box
    second: Process
    port: int
    peer_url: str  # where ``box`` gives packs

    @property
    def folder(self) -> Path:
        return self.box.folder

    def pack(self, node: str, model: str) -> Path:
        found = list((self.folder / node / "packs" / "acme").glob(f"{model}@*.pack"))
        assert len(found) == 1, f"{node} has {found} of {model}"
        return found[0]

    def answer(self, model: str, *, second: bool = False) -> tuple[str, str]:
        """(text, tier) of a completion at one of the nodes, which must succeed."""
        url = f"http://127.0.0.1:{self.port}" if second else self.box.gateway_url
        got = CALLER.post(
            f"{url}/v1/completions",
            headers={"Authorization": f"Bearer {self.box.keys['acme']}"},
            json={"model": f"acme/{model}", "prompt": "the bunk", "max_tokens": 8, "temperature": 0},
            timeout=PATIENCE_S,
        )
        assert got.status_code == 200, got.text
        return got.json()["choices"][0]["text"], got.headers["x-bunkhouse-tier"]

    def load_first(self, model: str) -> str:
        """Have ``box`` load a model; returns its answer once control knows of the complete pack."""
        text, tier = self.answer(model)
        assert tier == "origin"
        operator = self.box.operator()

        def known() -> bool:
            packs = list((self.folder / "agent" / "packs" / "acme").glob(f"{model}@*.pack"))
            # While it is being made, what is reported is the room kept for it.
            sizes = [
                item.disk_bytes
                for item in operator.ps().items
                if item.node == "box" and f"/{model}@" in item.ref
            ]
            return bool(packs) and sizes == [packs[0].stat().st_size]

        assert self.box.agent is not None
        self.box.agent.until(known)
        return text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with running_box(folder, more=("--control-store", str(folder / "control" / "models"))) as box:
        box.add_tenant("acme")
        for seed, name in enumerate(MODELS):
            model = make_gpt2(folder / f"model-{name}", seed, hidden=256, layers=4, heads=4)
            box.tenant("acme").push(f"acme/{name}", model)
        for tensor, name in enumerate(TWINS):
            model = make_gpt2(folder / f"model-{name}", 9, hidden=256, layers=4, heads=4)
            if tensor:
                change(model, f"transformer.h.{tensor}.mlp.c_fc.weight")
            box.tenant("acme").push(f"acme/{name}", model)
        box.wait_planned(len(MODELS) + len(TWINS))
        assert box.agent is not None
        found = next(line for line in box.agent.whole_log().splitlines() if "packs for other nodes" in line)
        second, port = box.another_agent(
            "cpu:96MiB",
            "--control-store",
            str(folder / "control" / "models"),
            wait=rf"plan \d+\.\d+: \d+ tenants, {len(MODELS) + len(TWINS)} versions",
        )
        try:
            yield Pair(box, second, port, found.rpartition(" ")[2])
        finally:
            second.stop()


def change(directory: Path, tensor: str) -> None:
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors[tensor] = -tensors[tensor]
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_a_pack_with_parts_in_other_files_comes_with_these_parts(pair: Pair) -> None:
    """Without the version that they were written for, or out of it where it is; the origin is away."""
    texts = {name: pair.load_first(name) for name in TWINS}
    assert len(set(texts.values())) > 1
    for name in ("twin-b", "twin-c"):
        assert pair.pack("agent", name).stat().st_size < pair.pack("agent", "twin-a").stat().st_size // 2
    origin = pair.folder / "control" / "models" / "acme"
    origin.rename(pair.folder / "all-kept-away")
    try:
        for name in ("twin-b", "twin-a", "twin-c"):
            assert pair.answer(name, second=True) == (texts[name], "origin")
            pair.second.wait_for(rf"pack of acme/{name}@\S+: \d+ bytes from box")
    finally:
        (pair.folder / "all-kept-away").rename(origin)
    whole = pair.pack("second", "twin-a")
    assert whole.read_bytes() == pair.pack("agent", "twin-a").read_bytes()
    # The first one that came had to bring its parts along; the last one found them here.
    parts = {name: base_of(pair.pack("second", name)).stat() for name in ("twin-b", "twin-c")}
    assert parts["twin-b"].st_ino != whole.stat().st_ino == parts["twin-c"].st_ino
    assert 512 * parts["twin-b"].st_blocks < whole.stat().st_size


def base_of(pack: Path) -> Path:
    return pack.with_name(base_name(pack.name, 0))


def test_a_second_node_is_served_from_the_first_without_the_origin(pair: Pair) -> None:
    """The origin's files are away while the second node loads: not one byte of them can have been read."""
    text = pair.load_first("plain")
    origin = pair.folder / "control" / "models" / "acme" / "plain"
    origin.rename(pair.folder / "kept-away")
    try:
        assert pair.answer("plain", second=True) == (text, "origin")
    finally:
        (pair.folder / "kept-away").rename(origin)
    taken = pair.second.wait_for(r"pack of acme/plain@\S+: (\d+) bytes from box")
    copy = pair.pack("second", "plain").read_bytes()
    assert len(copy) == int(taken[1])
    assert copy == pair.pack("agent", "plain").read_bytes()
    wanted = {"pack_shared": "its key to node second", "pack_fetched": f"{len(copy)} bytes from box in"}
    for kind, detail in wanted.items():
        assert [item for item in pair.box.events(kind, "acme/plain") if item.detail.startswith(detail)]


def test_a_copy_with_a_bad_index_is_refused_and_the_origin_read(pair: Pair) -> None:
    text = pair.load_first("index")
    pack = pair.pack("agent", "index")
    with pack.open("r+b") as file:
        at = read_header(file.fileno()).index_offset + 20
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    assert pair.answer("index", second=True) == (text, "origin")
    pair.second.wait_for(r"refused the pack of acme/index@\S+ from box")


def test_a_bad_chunk_of_a_peers_copy_never_serves(pair: Pair) -> None:
    """It is found in the restore; what is served in the end is the same, made good from the origin."""
    text = pair.load_first("chunk")
    pack = pair.pack("agent", "chunk")
    good = pack.read_bytes()
    with pack.open("r+b") as file:
        at = len(good) // 2
        os.pwrite(file.fileno(), bytes([good[at] ^ 1]), at)
    assert pair.answer("chunk", second=True) == (text, "origin")
    pair.second.wait_for(r"pack of acme/chunk@\S+: \d+ bytes from box")
    assert pair.pack("second", "chunk").read_bytes()[at] != good[at] ^ 1


def forged(pair: Pair, name: str) -> bytes:
    """What a node that was taken over can make: a sound pack of another model's weights, in the same layout,
    with the registered side files, under the registered version's name and its own data key."""
    ref = parse_ref(f"acme/{pair.pack('agent', name).name.removesuffix('.pack')}")
    journal = open_journal(pair.folder / "agent")
    key = journal.data_key(ref)
    journal.close()
    assert key is not None
    other = make_gpt2(pair.folder / f"other-{name}", 99, hidden=256, layers=4, heads=4)
    spec = describe(other, ref, Task.GENERATION)
    path = pair.folder / "forged.pack"
    with opened(other, spec) as fds, path.open("w+b") as file:
        sources = [(item, FileSource(fds[item.path])) for item in spec.files]
        ingest = Ingest(sources, ref, spec.engine, spec.task, PackTarget(file.fileno(), None, key, 2**30))
        ingest.open()
        image = allocate_image("cpu", ingest.layout)
        ingest.fill(image)
        ingest.finish_pack()
        image.close()
    return path.read_bytes()


def test_weights_that_were_not_registered_never_serve_whoever_sealed_them(pair: Pair) -> None:
    text = pair.load_first("forged")
    pack = pair.pack("agent", "forged")
    lie = forged(pair, "forged")
    spare = pack.with_suffix(".spare")
    spare.write_bytes(lie)
    spare.rename(pack)
    assert pair.answer("forged", second=True) == (text, "origin")
    pair.second.wait_for(r"pack of acme/forged@\S+: \d+ bytes from box")
    pair.box.events("pack_refused", "acme/forged")
    # What lies there now, or will in a moment, is the node's own work.
    path = pair.folder / "second" / "packs" / "acme"
    assert all(found.read_bytes() != lie for found in path.glob("forged@*.pack"))


def test_a_busy_model_is_served_from_as_many_nodes_as_it_has_replicas(pair: Pair) -> None:
    """The second copy comes from the first node's pack, when callers have waited long enough."""

    def ask(number: int) -> str:
        got = CALLER.post(
            f"{pair.box.url}/v1/completions",
            headers={"Authorization": f"Bearer {pair.box.keys['acme']}"},
            json={"model": "acme/busy", "prompt": f"{number} bunks", "max_tokens": 16},
            timeout=PATIENCE_S,
        )
        assert got.status_code == 200, got.text
        return got.headers["x-bunkhouse-node"]

    with ThreadPoolExecutor(8) as callers:
        assert len(set(callers.map(ask, range(16)))) == 1
        assert pair.box.operator().set_model("acme/busy", replicas=2).warnings == ()

        def shared() -> bool:
            answered = Counter(callers.map(ask, range(16)))
            return min(answered["box"], answered["second"]) >= 4

        pair.second.until(shared)

    def reported() -> bool:
        holding = [row for row in pair.box.operator().ps().items if "/busy@" in row.ref]
        return {row.node for row in holding if row.state == "resident"} == {"box", "second"}

    pair.second.until(reported)
    now = pair.box.operator().plan("acme/busy").copies
    assert now is not None
    assert (now.replicas, now.holders, now.next_node) == (2, ("box", "second"), None)
    told = CliRunner().invoke(
        bunk,
        ["plan", "acme/busy"],
        env={"BUNKHOUSE_URL": pair.box.url, "BUNKHOUSE_API_KEY": pair.box.keys["acme"]},
    )
    assert "copies: 2 of up to 2 (box, second)" in told.output


def test_with_control_away_the_origin_is_read(pair: Pair) -> None:
    text = pair.load_first("away")
    assert pair.box.control is not None
    pair.box.control.kill()
    pair.second.wait_for("control is away")
    assert pair.answer("away", second=True) == (text, "origin")
    pair.second.wait_for(r"pack of acme/away@\S+: control \S.*; reading the origin")
    pair.box.start_control()
    pair.second.wait_for("connected to control")


def test_a_deleted_node_is_refused_at_once(pair: Pair) -> None:
    """Its certificate is good for hours; the other nodes' next plan, which comes at once, is without it."""
    assert pair.box.agent is not None
    stolen = pair.folder / "stolen-identity"
    shutil.copytree(pair.folder / "second" / "identity", stolen)
    name, _, version = pair.pack("agent", "plain").name.removesuffix(".pack").partition("@")
    request = get(f"/peer/v1/packs/acme/{name}/{version}/key")
    peer_port = int(pair.peer_url.rpartition(":")[2])
    context = Identity(stolen).peer_context(server=False)
    with dial(peer_port, context) as tls:
        answer = exchange(tls, request)
        assert answer is not None
        assert answer.status == 200
    pair.box.agent.wait_for("connected to control")
    plan = rf"plan \d+\.\d+: \d+ tenants, {len(MODELS) + len(TWINS)} versions"
    pair.box.agent.wait_for(plan)
    pair.box.operator().delete_node("second")
    pair.second.wait_for("control removed this node")
    pair.box.agent.wait_for(plan)
    with dial(peer_port, context) as tls:
        answer = exchange(tls, request)
        assert answer is not None
        assert (answer.status, answer.body) == (403, b"")
