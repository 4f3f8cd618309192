"""Uploads by a hostile tenant: nothing is written where it should not be, nothing bad becomes a version.

Covers: path tricks in declarations and in request paths, wrong sizes and digests, too many files and
bytes, code and pickles, hostile safetensors headers and configurations, offsets out of order, bodies
that are too long, and fuzzed requests: the server answers each with a 4xx that names what is wrong and
stays up. Does not cover: the header parser in depth (``test_hostile_headers``), origins
(``test_origins``).
"""

from __future__ import annotations

import asyncio
import gzip
import json
import pickle
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from running_control import Answer, Running, declare, model_files, running, safetensors, until

from control.catalog import UPLOADS_PER_TENANT_MAX
from control.routes import commits, models, uploads
from packer.http import JSON_BYTES_MAX


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        await started.tenant("acme")
        yield started


async def declared(control: Running, content: Mapping[str, bytes], **changes: Any) -> Answer:
    ask = declare("m", content)
    return await control.call("POST", "/api/v1/tenants/acme/uploads", {**ask, **changes})


async def committed(control: Running, files: Mapping[str, bytes]) -> Answer:
    """Push as a client that checks nothing would."""
    answer = await declared(control, files)
    if answer.status != 201:
        return answer
    upload = answer.json()
    for path, data in files.items():
        if data:
            sent = await control.send_file(upload["upload_id"], path, 0, data)
            assert sent.status == 204, (path, sent.body)
    return await control.call("POST", f"/api/v1/uploads/{upload['upload_id']}/commit")


async def nothing_became_visible(control: Running) -> None:
    assert (await control.call("GET", "/api/v1/models")).json()["items"] == []
    assert not [path for path in (control.server.config.data_dir / "models").rglob("*") if path.is_file()]


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- names ----------------------------------------------------------------------------------------

BAD_PATHS = [
    "../evil.json",
    "/etc/cron.d/evil.json",
    "a/../../evil.json",
    "./config.json",
    "a//b.json",
    "..",
    ".",
    "a/./b.json",
    "a\\b.json",
    "C:\\evil.json",
    "%2e%2e/evil.json",
    "evil\0.json",
    "evil\n.json",
    "évil.json",
    " config.json",
    "config.json ",
    "a/b/c.json",
    "~/evil.json",
    "x" * 300 + ".json",
    "config.json/config.json",
    "CONFIG.json",
    "file.json#1",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=ascii)
async def test_paths_that_are_no_plain_file_names_are_refused(
    control: Running, path: str, tmp_path: Path
) -> None:
    before = everything_below(tmp_path)
    answer = await declared(control, {**model_files(), path: b"{}"})
    assert answer.status in (400, 422), answer.body
    assert answer.error["message"]
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "x.ckpt",
        "x.pkl",
        "modeling_evil.py",
        "x.so",
        "run.sh",
        "x.h5",
        "x.onnx",
    ],
)
async def test_code_and_pickles_are_refused_by_name(control: Running, name: str) -> None:
    answer = await declared(control, {**model_files(), name: b"x"})
    assert (answer.status, answer.error["code"], answer.error["field"]) == (422, "model_refused", name)
    assert name in answer.error["message"]


async def test_a_file_sent_under_another_name_is_refused(control: Running) -> None:
    upload = (await declared(control, model_files())).json()["upload_id"]
    for path in ("other.json", "../config.json", "%2e%2e%2fconfig.json", "0000", "config.json%00", ""):
        answer = await control.send_file(upload, path, 0, b"{}")
        assert answer.status in (400, 404), path


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a@b", "../x", "x" * 65, "a..b", "-a", "a b", "acme/m", "%2e", "a\0"]
)
async def test_model_names_that_are_none_are_refused(control: Running, name: str) -> None:
    answer = await declared(control, model_files(), name=name)
    assert (answer.status, answer.error["field"]) == (400, "name")


async def test_upload_ids_are_only_looked_up(control: Running) -> None:
    for text in ("..", "%2e%2e", "../acme", "%2e%2e%2facme", "0" * 32, "x" * 5_000, "%00", "%ff"):
        answer = await control.call("GET", f"/api/v1/uploads/{text}")
        assert answer.status in (400, 404), text


# --- declarations ---------------------------------------------------------------------------------


async def test_too_many_files_are_refused(control: Running) -> None:
    files = {**model_files(), **{f"f{number}.json": b"{}" for number in range(300)}}
    answer = await declared(control, files)
    assert answer.status in (400, 422)
    assert "256" in answer.error["message"]


@pytest.mark.parametrize(
    "file",
    [
        {"path": "config.json", "size_bytes": -1, "sha256": "0" * 64},
        {"path": "config.json", "size_bytes": 2**62, "sha256": "0" * 64},
        {"path": "config.json", "size_bytes": 1.5, "sha256": "0" * 64},
        {"path": "config.json", "size_bytes": 10**400, "sha256": "0" * 64},
        {"path": "config.json", "size_bytes": 2, "sha256": "0" * 63},
        {"path": "config.json", "size_bytes": 2, "sha256": "G" * 64},
        {"path": "config.json", "size_bytes": 2, "sha256": "0" * 64 + "\n"},
        {"path": "config.json", "size_bytes": 2},
        {"path": "", "size_bytes": 2, "sha256": "0" * 64},
        {"path": "config.json", "size_bytes": 2, "sha256": "0" * 64, "mode": 0o777},
        "config.json",
        None,
    ],
    ids=str,
)
async def test_a_wrong_declaration_is_refused(control: Running, file: object) -> None:
    answer = await declared(control, model_files(), files=[file])
    assert answer.status == 400, answer.body
    assert answer.error["code"] == "invalid_value" or answer.error["code"] == "invalid_json"


async def test_a_declaration_larger_than_the_disk_is_refused_with_the_arithmetic(control: Running) -> None:
    ask = declare("m", model_files())
    for file in ask["files"]:
        if file["path"] == "model.safetensors":
            file["size_bytes"] = 2**38
    answer = await control.call("POST", "/api/v1/tenants/acme/uploads", ask)
    assert answer.status == 507
    assert str(2**38)[:4] in answer.error["message"]


async def test_open_uploads_are_bounded(control: Running) -> None:
    answers = [await declared(control, model_files(seed)) for seed in range(UPLOADS_PER_TENANT_MAX + 1)]
    assert [answer.status for answer in answers] == [201] * UPLOADS_PER_TENANT_MAX + [429]
    assert str(UPLOADS_PER_TENANT_MAX) in answers[-1].error["message"]


async def test_a_refused_upload_frees_its_place_and_its_bytes(control: Running) -> None:
    """More refusals than uploads may be open, and a good one after them passes."""
    config = json.dumps({"architectures": ["EvilModel"]}).encode()
    for seed in range(UPLOADS_PER_TENANT_MAX + 1):
        answer = await committed(control, dict(model_files(seed), **{"config.json": config}))
        assert (answer.status, answer.error["code"]) == (422, "model_refused")
    assert control.server.control.catalog.uploads == {}
    assert (await committed(control, model_files())).status == 201


# --- bytes ----------------------------------------------------------------------------------------


async def test_a_wrong_digest_names_the_file_and_only_it_is_sent_again(control: Running) -> None:
    files = model_files()
    wrong = dict(files, **{"model.safetensors": files["model.safetensors"][:-1] + b"\xff"})
    upload = (await declared(control, files)).json()["upload_id"]
    for path, data in wrong.items():
        await control.send_file(upload, path, 0, data)
    refused = await control.call("POST", f"/api/v1/uploads/{upload}/commit")
    assert (refused.status, refused.error["code"]) == (422, "wrong_sha256")
    assert refused.error["field"] == "model.safetensors"
    await nothing_became_visible(control)
    offsets = {
        file["path"]: file["offset_bytes"]
        for file in (await control.call("GET", f"/api/v1/uploads/{upload}")).json()["files"]
    }
    assert offsets["model.safetensors"] == 0
    assert offsets["config.json"] == len(files["config.json"])
    await control.send_file(upload, "model.safetensors", 0, files["model.safetensors"])
    assert (await control.call("POST", f"/api/v1/uploads/{upload}/commit")).status == 201


async def test_no_byte_beyond_the_declared_size_is_kept(control: Running) -> None:
    files = model_files()
    upload = (await declared(control, files)).json()["upload_id"]
    long = files["config.json"] + b"x"
    assert (await control.send_file(upload, "config.json", 0, long)).status == 413

    async def chunked() -> AsyncIterator[bytes]:
        yield long

    assert (await control.send_file(upload, "config.json", 0, chunked())).status == 413
    parts = (control.server.config.data_dir / "uploads" / upload).iterdir()
    assert all(part.stat().st_size <= len(files["config.json"]) for part in parts)


@pytest.mark.parametrize("offset", ["", "-1", "1", "0x0", "9" * 30, "1e3", "٣"])
async def test_offsets_that_are_not_the_next_byte_are_refused(control: Running, offset: str) -> None:
    upload = (await declared(control, model_files())).json()["upload_id"]
    headers = {"Upload-Offset": offset}
    path = f"/api/v1/uploads/{upload}/files/config.json"
    answer = await control.call("PATCH", path, data=b"{}", headers=headers)
    assert answer.status in (400, 409)
    assert answer.headers["Upload-Offset"] == "0"


async def test_compressed_bodies_are_refused_unread(control: Running) -> None:
    upload = (await declared(control, model_files())).json()["upload_id"]
    bomb = gzip.compress(b"\0" * 10_000_000)
    for method, path in (
        ("POST", "/api/v1/tenants"),
        ("PATCH", f"/api/v1/uploads/{upload}/files/config.json"),
        ("POST", "/v1/embeddings"),
    ):
        answer = await control.call(
            method, path, data=bomb, headers={"Content-Encoding": "gzip", "Upload-Offset": "0"}
        )
        assert answer.status == 415, path


async def test_bodies_of_json_routes_are_bounded(control: Running) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65_536

    for data in (b" " * (JSON_BYTES_MAX + 1), endless()):
        answer = await control.call("POST", "/api/v1/tenants", data=data)
        assert answer.status == 413
        assert str(JSON_BYTES_MAX) in answer.error["message"]


# --- contents -------------------------------------------------------------------------------------


class Canary:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


async def test_a_pickle_that_is_called_safetensors_is_refused_and_never_opened(
    control: Running, tmp_path: Path
) -> None:
    files = dict(model_files(), **{"model.safetensors": pickle.dumps(Canary(tmp_path / "canary"))})
    answer = await committed(control, files)
    assert (answer.status, answer.error["field"]) == (422, "model.safetensors")
    assert not (tmp_path / "canary").exists()
    await nothing_became_visible(control)


def header_only(text: bytes, declared: int | None = None) -> bytes:
    return (len(text) if declared is None else declared).to_bytes(8, "little") + text


HOSTILE_WEIGHTS = {
    "empty": b"",
    "short": b"\x01",
    "huge header": header_only(b"{}", 2**63),
    "header beyond the file": header_only(b"{}", 1_000),
    "no json": header_only(b"not json"),
    "deep": header_only(b"[" * 200_000),
    "list": header_only(b"[]"),
    "path name": safetensors({"../../etc/x": ("F32", [1], b"\0" * 4)}),
    "unknown type": safetensors({"a": ("PICKLE", [1], b"\0" * 4)}),
    "overflow": safetensors({"a": ("F32", [2**40, 2**40], b"\0" * 4)}),
    "trailing": safetensors({"a": ("F32", [1], b"\0" * 4)}) + b"x",
    "twice": header_only(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "no tensors": header_only(b"{}"),
    "surrogate": header_only(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "nul": header_only(b"\0" * 64),
}


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
async def test_hostile_weights_are_refused_with_the_files_name(control: Running, kind: str) -> None:
    answer = await committed(control, dict(model_files(), **{"model.safetensors": HOSTILE_WEIGHTS[kind]}))
    assert (answer.status, answer.error["code"]) == (422, "model_refused"), answer.body
    assert answer.error["field"] == "model.safetensors"
    await nothing_became_visible(control)


BERT = {"architectures": ["BertModel"], "model_type": "bert"}
HOSTILE_CONFIGS: dict[str, bytes] = {
    "auto_map": json.dumps({**BERT, "auto_map": {"AutoModel": "evil.Model"}}).encode(),
    "nested auto_map": json.dumps({**BERT, "text_config": {"auto_map": {"A": "b"}}}).encode(),
    "unknown architecture": json.dumps({**BERT, "architectures": ["EvilModel"]}).encode(),
    "no architecture": b"{}",
    "list": b"[]",
    "not json": b"import os",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "not utf-8": b"\xff\xfe{}",
    "kernel from a repository": json.dumps({**BERT, "_attn_implementation": "evil/kernel"}).encode(),
    "huge sizes": json.dumps({**BERT, "hidden_size": 2**60}).encode(),
    "number beyond all": b'{"architectures":["BertModel"],"model_type":"bert","hidden_size":'
    + b"9" * 5_000
    + b"}",
    "surrogate": b'{"architectures":["\\ud800"]}',
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
async def test_hostile_configurations_are_refused_with_the_files_name(control: Running, kind: str) -> None:
    answer = await committed(control, dict(model_files(), **{"config.json": HOSTILE_CONFIGS[kind]}))
    assert (answer.status, answer.error["code"]) == (422, "model_refused"), answer.body
    assert answer.error["field"] == "config.json"
    await nothing_became_visible(control)


# --- all at once ----------------------------------------------------------------------------------


async def test_deleting_while_committing_leaves_nothing_behind(control: Running) -> None:
    """Whichever wins, the version is whole or its files are gone."""
    for seed in range(5):
        files = model_files(seed)
        upload = (await declared(control, files)).json()["upload_id"]
        for path, data in files.items():
            await control.send_file(upload, path, 0, data)
        answers = await asyncio.gather(
            control.call("POST", f"/api/v1/uploads/{upload}/commit"),
            control.call("DELETE", f"/api/v1/uploads/{upload}"),
        )
        assert answers[0].status in (200, 201, 404, 409), answers[0].body
    state = control.server.control
    stored = {path.name for path in (state.config.data_dir / "models" / "acme" / "m").glob("*")}
    assert stored == {ref.version for ref in state.catalog.models}


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01 not plain http",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer\x00canary\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["method", "version", "tls", "long", "nul", "smuggling", "length"],
)
async def test_what_is_not_http_is_refused(control: Running, request_bytes: bytes) -> None:
    host, port = control.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request_bytes)
    status = (await reader.readline()).split(b" ")[1]
    writer.close()
    assert status.startswith(b"4")
    assert (await control.call("GET", "/healthz")).status == 200


async def test_random_requests_never_make_a_server_error(control: Running) -> None:
    """Fuzz with a seed: methods, paths, headers and bodies from pieces that mean something."""
    chance = random.Random(11)
    upload = (await declared(control, model_files())).json()["upload_id"]
    pieces = [
        "api",
        "v1",
        "tenants",
        "acme",
        "keys",
        "quota",
        "uploads",
        "models",
        "files",
        "commit",
        "nodes",
    ]
    pieces += ["tokens", "ps", "events", upload, "config.json", "%2e%2e", "%00", "%ff", "..", "m@latest", "é"]
    pieces += ["chat", "completions", "node", "beat", "x" * 300, "%F0%9F%92%A9", ";", "*", "%25"]
    bodies: list[bytes] = [b"", b"{}", b"[]", b"null", b"\0", b"\xff", b'"\\ud800"', b"[" * 50_000]
    bodies += [b'{"name": "\\ud800"}', b'{"name": "\\u0000"}', b'{"name": 1e999}', b'{"label": "\\ud800"}']
    bodies += [b'{"name": "m", "origin": "\\ud800"}', b'{"ttl_s": 1e400}', b'{"model": "\\ud800/x"}']
    bodies += [b'{"\\ud800": 1}', json.dumps(declare("m", model_files())).encode()]
    queries = [
        "",
        "",
        "?after=-1",
        "?after=99999999999999999999",
        "?limit=x",
        "?tenant=%ff",
        "?tenant=..",
        "?a=%",
    ]
    for _ in range(600):
        path = "/".join(chance.choice(pieces) for _ in range(chance.randint(1, 5)))
        path = "/" + chance.choice(["api/v1/", "v1/", ""]) + path + chance.choice(queries)
        method = chance.choice(["GET", "POST", "PATCH", "DELETE", "PUT", "HEAD", "OPTIONS"])
        answer = await control.call(
            method,
            path.replace("é", "%C3%A9"),
            data=chance.choice(bodies),
            headers={"Upload-Offset": chance.choice(["0", "x", "-0"]), "Range": "bytes=9-1"},
        )
        assert answer.status < 500 or answer.status in (501, 503, 507), (method, path, answer.body)
        if answer.status >= 400 and answer.body:
            assert answer.error["message"], (method, path)
    assert (await control.call("GET", "/healthz")).status == 200


async def test_the_floor_of_free_space_holds_for_bytes_that_arrive(
    control: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads that were declared when there was room, and have none together, do not fill the disk."""
    files = model_files()
    upload = (await declared(control, files)).json()
    path, data = "model.safetensors", files["model.safetensors"]
    with monkeypatch.context() as full:
        full.setattr(uploads, "DISK_FREE_BYTES_MIN", 2**62)
        sent = await control.send_file(upload["upload_id"], path, 0, data)
        assert (sent.status, sent.error["code"]) == (507, "disk_full")
    for name, content in files.items():
        assert (await control.send_file(upload["upload_id"], name, 0, content)).status == 204
    commit = f"/api/v1/uploads/{upload['upload_id']}/commit"
    with monkeypatch.context() as full:
        full.setattr(uploads, "DISK_FREE_BYTES_MIN", 2**62)
        answer = await control.call("POST", commit)
        assert (answer.status, answer.error["code"]) == (507, "disk_full")
    await nothing_became_visible(control)
    assert (await control.call("POST", commit)).status == 201


@pytest.mark.parametrize("ends", ["key", "tenant", "upload"])
async def test_a_long_upload_is_cut_when_its_key_is_revoked_or_it_is_deleted(
    control: Running, ends: str
) -> None:
    """Whoever sends slowly would go on for as long as it likes; nothing that comes later is kept."""
    key = await control.key("acme")
    files = model_files()
    upload_id = (await declared(control, files)).json()["upload_id"]
    data = files["model.safetensors"]
    begun, rest = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield data[:100]
        begun.set()
        await rest.wait()
        yield data[100:]

    path = f"/api/v1/uploads/{upload_id}/files/model.safetensors"
    sending = control.call("PATCH", path, key=key, data=body(), headers={"Upload-Offset": "0"})
    task = asyncio.create_task(sending)
    await begun.wait()
    await until(lambda: bool(control.server.control.busy_parts))
    ended = {"key": f"keys/{key.split('_')[1]}", "tenant": "tenants/acme", "upload": f"uploads/{upload_id}"}
    assert (await control.call("DELETE", f"/api/v1/{ended[ends]}")).status == 204
    rest.set()
    answer = await task
    assert (answer.status, answer.error["code"]) == {
        "key": (401, "invalid_api_key"),
        "tenant": (401, "invalid_api_key"),
        "upload": (404, "upload_not_found"),
    }[ends]
    assert not control.server.control.busy_parts
    if ends == "key":
        shown = (await control.call("GET", f"/api/v1/uploads/{upload_id}")).json()
        assert {file["path"]: file["offset_bytes"] for file in shown["files"]}["model.safetensors"] <= 100


async def test_a_commit_of_a_key_that_is_revoked_meanwhile_makes_no_version(
    control: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a large model are hashed for minutes."""
    key = await control.key("acme")
    files = model_files()
    upload_id = (await declared(control, files)).json()["upload_id"]
    for path, data in files.items():
        assert (await control.send_file(upload_id, path, 0, data)).status == 204
    examined = asyncio.Event()
    go_on = asyncio.Event()
    really = models.examine_off_loop

    async def slowly(*given: Any) -> Any:
        found = await really(*given)
        examined.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(commits, "examine_off_loop", slowly)
    commit = f"/api/v1/uploads/{upload_id}/commit"
    task = asyncio.create_task(control.call("POST", commit, key=key))
    await examined.wait()
    await control.call("DELETE", f"/api/v1/keys/{key.split('_')[1]}")
    go_on.set()
    answer = await task
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    await nothing_became_visible(control)
    assert (await control.call("POST", commit)).status == 201
