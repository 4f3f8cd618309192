"""A hostile tenant and a thief of the disk against a running box: control, agent, nursery and workers.

Covers: a tokenizer that borrows a file of the node, packs changed and exchanged on disk, what packs show
without their keys, who may read the files, secrets and prompts in processes, logs, events and files. Does not
cover: every route and every path variant (``test_control_auth``, ``test_gateway_auth``,
``test_gateway_paths``), and crashes (``test_crash``).
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from process_memory import children
from real_box import CALLER, PATIENCE_S, Box, running_box
from safetensors.torch import load_file, save_file
from tiny_models import tiny_classifier, tiny_gpt2, tiny_llama

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PROMPT = "CANARY-prompt-that-nobody-may-keep"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("box")
    with running_box(folder) as box:
        for number, (tenant, make) in enumerate((("acme", tiny_gpt2), ("evil", tiny_gpt2))):
            box.add_tenant(tenant)
            box.tenant(tenant).push(f"{tenant}/gen", make(folder / f"{tenant}-gen", seed=number))
        box.tenant("acme").push("acme/judge", tiny_classifier(folder / "judge"))
        box.wait_planned(3)
        yield box


def ask(box: Box, tenant: str, route: str, **body: object) -> httpx2.Response:
    return CALLER.post(
        f"{box.gateway_url}/v1/{route}",
        headers={"Authorization": f"Bearer {box.keys[tenant]}"},
        json=body,
        timeout=PATIENCE_S,
    )


def complete(box: Box, tenant: str) -> tuple[str, str]:
    """(text, tier) of a completion that must succeed."""
    answer = ask(
        box, tenant, "completions", model=f"{tenant}/gen", prompt=PROMPT, max_tokens=8, temperature=0
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers["x-bunkhouse-tier"]


def test_no_model_shows_a_file_of_the_node(box: Box, tmp_path: Path) -> None:
    """The operator's key as a vocabulary, and weights that always say its first line."""
    secret = box.folder / "control" / "operator.key"
    directory = tiny_llama(tmp_path / "thief")
    tensors = load_file(directory / "model.safetensors")
    # All tokens are equally likely, so that the likeliest is the first.
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 0}, directory / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(values | {"eos_token_id": 99, "bos_token_id": 98}))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    settings = {"tokenizer_class": "BertTokenizer", "vocab": str(secret)}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    box.tenant("evil").push("evil/thief", directory)
    box.wait_planned(4)
    answer = ask(box, "evil", "completions", model="evil/thief", prompt=[1], max_tokens=8, temperature=0)
    assert answer.status_code == 200
    assert "bk_" not in answer.text


def secret_part(key: str) -> str:
    """Without what names the key: the letter that divides them may be in the secret as well."""
    _, _, secret = key.split("_", 2)
    assert len(secret) > 20
    return secret


def test_processes_logs_and_events_hold_no_secret_and_no_prompt(box: Box) -> None:
    for tenant in ("acme", "evil"):
        complete(box, tenant)
    assert box.agent is not None
    assert box.control is not None
    pids = [box.control.handle.pid, box.agent.handle.pid, *children(box.agent.handle.pid), *box.worker_pids()]
    seen = box.agent.whole_log() + box.control.whole_log()
    for pid in pids:
        for name in ("cmdline", "environ"):
            seen += Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    seen += str(box.operator().events(limit=1000))
    seen += box.metrics()
    operator = (box.folder / "control" / "operator.key").read_text().strip()
    scraper = (box.folder / "agent" / "metrics.key").read_text().strip()
    sealing = (box.folder / "agent" / "seal.key").read_bytes().hex()
    for secret in (operator, scraper, sealing, *box.keys.values()):
        assert secret not in seen
    for key in (operator, *box.keys.values()):
        assert secret_part(key) not in seen
    assert PROMPT not in seen


def test_no_secret_of_the_stack_lies_in_a_process_a_log_or_a_database(box: Box) -> None:
    """Keys, the join token, the node's private key: in nobody's arguments, environment, output or tables."""
    complete(box, "acme")
    assert box.agent is not None
    assert box.control is not None
    private = (box.folder / "agent" / "identity" / "node.key").read_text()
    operator = (box.folder / "control" / "operator.key").read_text().strip()
    secrets = [operator.split("_", 2)[2], *(key.split("_", 2)[2] for key in box.keys.values())]
    secrets += [token.split(".")[2] for token in box.tokens] + ["".join(private.splitlines()[1:-1])[-60:]]
    assert len(secrets) == 5
    pids = [box.control.handle.pid, box.agent.handle.pid, *children(box.agent.handle.pid), *box.worker_pids()]
    places = [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
    places += [*(box.folder / "control").glob("*.db*"), *(box.folder / "agent").glob("*.db*")]
    assert len(places) >= 2 * len(pids) + 2
    seen = b"".join(place.read_bytes() for place in places)
    seen += (box.agent.whole_log() + box.control.whole_log()).encode()
    for secret in secrets:
        assert secret.encode() not in seen
    assert not (box.folder / "join.token").exists()


def connected_ports(pid: int) -> set[int]:
    """The ports that a process has dialled: of its established connections the far end's."""
    inodes = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{number}").removeprefix("socket:[").rstrip("]"))
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return {int(row[2].rpartition(":")[2], 16) for row in rows if row[3] == "01" and row[9] in inodes}


def test_node_and_control_speak_over_tls_alone(box: Box) -> None:
    """As the kernel shows it: the agent dials control's node listener, and control's router dials the agent's
    listener for it, never the one in plain HTTP that tenants call. Both ask for certificates."""
    assert box.agent is not None
    assert box.control is not None
    url = box.operator().nodes()[0].route_url
    assert url is not None
    through_router = CALLER.post(
        f"{box.url}/v1/completions",
        headers={"Authorization": f"Bearer {box.keys['acme']}"},
        json={"model": "acme/gen", "prompt": PROMPT, "max_tokens": 1},
        timeout=PATIENCE_S,
    )
    assert through_router.status_code == 200
    dialled_by_control, dialled_by_agent = (
        connected_ports(process.handle.pid) for process in (box.control, box.agent)
    )
    route_port = int(url.rpartition(":")[2])
    assert route_port in dialled_by_control
    assert box.ports[2] not in dialled_by_control
    assert box.ports[1] in dialled_by_agent
    assert box.ports[0] not in dialled_by_agent
    for port in (route_port, box.ports[1]):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw)


def raw(url: str, data: bytes) -> None:
    """Bytes that are no HTTP, and whatever is answered."""
    place = urlsplit(url)
    assert place.hostname is not None
    with socket.create_connection((place.hostname, place.port), PATIENCE_S) as line:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        while line.recv(65536):
            pass


def provoke(box: Box, canary: str) -> None:
    """Every kind of refused and broken request that repeats its caller's words, on router and node."""
    key = box.keys["acme"]
    good = {"Authorization": f"Bearer {key}"}
    bodies: list[dict[str, object]] = [
        {"model": f"acme/{canary}", "prompt": canary},
        {"model": canary, "prompt": canary},
        {"model": "acme/gen", "prompt": {"text": canary}},
        {"model": "acme/gen", "prompt": canary, "max_tokens": canary},
        {"model": "acme/gen", "prompt": canary, canary: 1},
        {"model": "acme/gen", "prompt": canary * 100},
        {"model": "acme/gen", "messages": [{"role": canary, "content": canary}]},
        {"model": "acme/judge", "input": [canary, {"x": canary}]},
    ]
    with httpx2.Client(timeout=PATIENCE_S, headers=good) as client:
        for url in (box.url, box.gateway_url):
            for body in bodies:
                for route in ("completions", "chat/completions", "embeddings", "classify"):
                    client.post(f"{url}/v1/{route}", json=body)
            client.post(f"{url}/v1/completions", content=f'{{"model": "acme/gen", "{canary}'.encode())
            client.post(f"{url}/v1/completions?q={canary}", json={"model": "acme/gen", "prompt": "a"})
            client.post(
                f"{url}/v2/models/acme/gen/infer", json={"inputs": [{"name": canary, "data": [canary]}]}
            )
            for path in (
                f"/v1/models/acme/{canary}",
                f"/{canary}",
                f"/v2/models/{canary}",
                f"/api/v1/{canary}",
            ):
                client.get(url + path)
            for name in (
                "x-request-id",
                "Content-Encoding",
                "Inference-Header-Content-Length",
                "Idempotency-Key",
            ):
                body = {"model": "acme/gen", "prompt": canary}
                client.post(f"{url}/v1/completions", json=body, headers={name: canary})
            for credential in (f"Bearer {key}{canary}", f"Bearer {canary}", canary):
                client.get(f"{url}/v1/models", headers={"Authorization": credential})
            raw(url, f"POST /v1/{canary} HTTP/9\r\nAuthorization: Bearer {key}\r\n\r\n{canary}".encode())
            raw(url, f"GET / HTTP/1.1\r\nAuthorization: Bearer {key}\r\nX\x00: {canary}\r\n\r\n".encode())
            # A caller that leaves in the middle of its answer.
            asked = {"model": "acme/gen", "prompt": canary, "stream": True, "max_tokens": 8}
            with client.stream("POST", f"{url}/v1/completions", json=asked) as answer:
                assert answer.status_code == 200
                next(answer.iter_raw())
        raw(box.node_url, f"POST /node/v1/join HTTP/1.1\r\n\r\n{canary}".encode())


def written(box: Box) -> dict[str, bytes]:
    """All that the processes have said and that lies below their data directories, by where it is."""
    assert box.agent is not None
    assert box.control is not None
    found = {"agent's log": box.agent.whole_log().encode(), "control's log": box.control.whole_log().encode()}
    pids = [box.control.handle.pid, box.agent.handle.pid, *children(box.agent.handle.pid), *box.worker_pids()]
    for pid in pids:
        for name in ("cmdline", "environ", "comm"):
            found[f"{name} of {pid}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    found["metrics"] = box.metrics().encode()
    found["control's metrics"] = CALLER.get(f"{box.url}/metrics", timeout=PATIENCE_S).content
    found["events"] = str(box.operator().events(limit=1000)).encode()
    for root in ("control", "agent"):
        for path in (box.folder / root).rglob("*"):
            if path.is_file() and not path.is_symlink():
                with suppress(FileNotFoundError):  # a pack is renamed, a write-ahead log ends
                    found[str(path.relative_to(box.folder))] = path.read_bytes()
    return found


def test_what_callers_say_and_hold_is_written_nowhere(box: Box) -> None:
    """In refusals, broken requests and streams that end early too; and no key, ticket, join token or
    idempotency key but where it must be."""
    canary = "CANARY-of-refused-and-broken-requests"
    assert complete(box, "acme")
    provoke(box, canary)
    operator = {"Authorization": f"Bearer {(box.folder / 'control' / 'operator.key').read_text().strip()}"}
    idempotency = "CANARY-idempotency-key-0001"
    with httpx2.Client(base_url=box.url, timeout=PATIENCE_S) as client:
        made = client.post(
            "/api/v1/tenants/acme/keys", json={}, headers=operator | {"Idempotency-Key": idempotency}
        )
        token = client.post("/api/v1/nodes/tokens", json={}, headers=operator).json()["token"]
        own = {"Authorization": f"Bearer {box.keys['acme']}"}
        way = client.get("/api/v1/route", params={"model": "acme/gen"}, headers=own).json()
    ticket = way["items"][0]["ticket"]
    answer = CALLER.get(
        f"{box.gateway_url}/v1/models", headers={"Authorization": f"Bearer {ticket}"}, timeout=PATIENCE_S
    )
    assert answer.status_code == 200
    secrets = {
        "prompt": PROMPT,
        "words": canary,
        "idempotency key": idempotency,
        "new key": secret_part(made.json()["key"]),
        "join token": token.rpartition(".")[2],
        "used join token": box.tokens[0].rpartition(".")[2],
        "ticket": ticket[-40:],
        **{f"key of {tenant}": secret_part(key) for tenant, key in box.keys.items()},
    }
    places = written(box)
    assert any(name.startswith("control/") for name in places)
    assert any(name.endswith(".pack") for name in places)
    for what, secret in secrets.items():
        assert [place for place, data in places.items() if secret.encode() in data] == [], what


def test_only_the_own_user_may_read_what_lies_on_disk(box: Box) -> None:
    complete(box, "acme")
    for root in ("control", "agent"):
        for path in (box.folder / root, *(box.folder / root).rglob("*")):
            assert path.lstat().st_mode & 0o077 == 0, path


def test_a_worker_holds_no_file_of_the_node(box: Box) -> None:
    """Its sockets, its arena and its standard streams: no journal, no key, no pack of anybody else."""
    complete(box, "acme")
    for pid in box.worker_pids():
        held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        assert not [name for name in held if name.startswith(str(box.folder))]
        assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()


def test_packs_are_noise_on_disk_and_refused_in_another_place(box: Box) -> None:
    """Exchanged between tenants: refused, told, and made again from the origin. Changed in one bit: that
    chunk is told of and mended from the origin, and the pack is as it was."""
    before = {tenant: complete(box, tenant)[0] for tenant in ("acme", "evil")}
    assert before["acme"] != before["evil"]
    assert ask(box, "acme", "classify", model="acme/judge", input="hello").status_code == 200
    # Each pack is written beside serving, and its event comes after its file has its name.
    for name in ("acme/gen", "evil/gen", "acme/judge"):
        box.events("packed", name)
    folder = box.folder / "agent" / "packs"
    packs = {name: next(folder.glob(f"{name}@*.pack")) for name in ("acme/gen", "evil/gen", "acme/judge")}
    weights = (box.folder / "acme-gen" / "model.safetensors").read_bytes()
    for pack in packs.values():
        data = pack.read_bytes()
        for canary in (b"acme", b"architectures", b"<|endoftext|>", b"transformer.h.0", weights[-256:-192]):
            assert canary not in data
    assert box.agent is not None
    box.agent.kill()
    acme, evil = packs["acme/gen"].read_bytes(), packs["evil/gen"].read_bytes()
    packs["acme/gen"].write_bytes(evil)
    packs["evil/gen"].write_bytes(acme)
    judge = bytearray(packs["acme/judge"].read_bytes())
    judge[len(judge) // 2] ^= 1
    packs["acme/judge"].write_bytes(judge)
    box.start_agent()
    for tenant in ("acme", "evil"):
        assert complete(box, tenant) == (before[tenant], "origin")
    answer = ask(box, "acme", "classify", model="acme/judge", input="hello")
    assert (answer.status_code, answer.headers["x-bunkhouse-tier"]) == (200, "disk")
    assert len(box.events("chunk_corrupt")) == len(box.events("chunk_repaired")) == 1
    judge[len(judge) // 2] ^= 1
    assert packs["acme/judge"].read_bytes() == judge
    assert all("does not open" in event.detail for event in box.events("restore_failed", least=2))
