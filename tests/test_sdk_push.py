"""Pushing a directory: what is taken and refused, resuming, and what a push costs.

Against the fake control server on a real socket. Does not cover what control itself refuses.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_control import OPERATOR_KEY, FakeControl, Fault, serving

import bunkhouse
from bunkhouse import _push
from bunkhouse._push import list_directory
from bunkhouse._retry import RetryPolicy
from packer import directory as packer_directory

PIECE = 1000


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    # Small pieces, so that a small file has many; no waits, because the fake is there at once.
    monkeypatch.setattr(_push, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(_push, "RESUME_WAIT_S", 0.0)
    made = FakeControl()
    made.tenants["acme"] = {"tenant": "acme"}
    return made


@pytest.fixture
def url(control: FakeControl) -> Iterator[str]:
    with serving(control) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[bunkhouse.Client]:
    with bunkhouse.Client(url, OPERATOR_KEY, retry=RetryPolicy(backoff_s=0.001)) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory as Hugging Face lays it out; the contents do not matter to a push."""
    root = tmp_path / "model"
    (root / "1_Pooling").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    (root / "empty.txt").write_text("")
    (root / "model.safetensors").write_bytes(os.urandom(5 * PIECE + 123))
    return root


def names(directory: Path, **options: tuple[str, ...]) -> list[str]:
    return [file.path for file in list_directory(directory, **options).files]


# --- what is taken


def test_a_push_sends_every_byte_once_and_returns_the_model(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    """Digests, sizes and bytes arrive; progress counts to the end."""
    steps: list[bunkhouse.Progress] = []
    pushed = client.push("acme/minilm", model, steps.append)
    assert pushed.ref.startswith("acme/minilm@")
    sent = {file.path: file.sha256 for file in pushed.files}
    assert sent == {
        path: hashlib.sha256((model / path).read_bytes()).hexdigest()
        for path in ("1_Pooling/config.json", "config.json", "empty.txt", "model.safetensors")
    }
    total = sum((model / path).stat().st_size for path in sent)
    assert control.received_bytes == total
    for step in ("hash", "upload"):
        last = [each for each in steps if each.step == step][-1]
        assert (last.done_bytes, last.total_bytes) == (total, total)


def test_pushing_the_same_again_sends_no_byte(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    first = client.push("acme/minilm", model)
    before = control.received_bytes
    assert client.push("acme/minilm", model) == first
    assert control.received_bytes == before


def test_each_file_is_read_once_for_its_digest(
    client: bunkhouse.Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing happens once per file, resumed or not."""
    hashed: list[str] = []
    real = hashlib.sha256

    def counting(*data: bytes) -> object:
        hashed.append("")
        return real(*data)

    monkeypatch.setattr(hashlib, "sha256", counting)
    listing = list_directory(model)
    _push._hash_files(listing, lambda _: None)
    assert len(hashed) == len(listing.files)


def test_hidden_and_unread_files_are_left_out_and_the_latter_are_named(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "hook.py").write_text("")
    (model / ".cache.bin").write_text("")
    (model / "model.onnx").write_text("")
    (model / "onnx").mkdir()
    (model / "onnx" / "deeper").mkdir()
    (model / "onnx" / "deeper" / "run.py").write_text("")
    (model / "figure.png").write_text("")
    steps: list[bunkhouse.Progress] = []
    pushed = client.push("acme/minilm", model, steps.append)
    assert {each.path for each in steps if each.step == "skip"} == {
        "figure.png",
        "model.onnx",
        "onnx/deeper/",
    }
    assert len(pushed.files) == 4


@pytest.mark.parametrize(
    "name", ["modeling.py", "pytorch_model.bin", "x.PKL", "1_Pooling/run.sh", "lib.so", "a.pt", "tf_model.h5"]
)
def test_files_that_could_run_code_stop_the_push_by_name(
    client: bunkhouse.Client, control: FakeControl, model: Path, name: str
) -> None:
    """Nothing is sent, and the way out works."""
    (model / name).write_text("")
    with pytest.raises(bunkhouse.BadDirectory, match="can run code") as caught:
        client.push("acme/minilm", model)
    assert caught.value.path == name
    assert "ignore" in str(caught.value)
    assert control.requests == []
    client.push("acme/minilm", model, ignore=[name])


def test_ignore_takes_patterns_of_names_paths_and_directories(model: Path) -> None:
    (model / "onnx").mkdir()
    (model / "onnx" / "a.bin").write_text("")
    (model / "b.bin").write_text("")
    assert "config.json" in names(model, ignore=("onnx", "*.bin"))
    assert "config.json" in names(model, ignore=("onnx/*", "b.*"))
    assert "1_Pooling/config.json" not in names(model, ignore=("1_Pooling/", "*.bin"))


def test_links_that_leave_the_directory_are_refused_and_inner_ones_followed(model: Path) -> None:
    (model / "same.json").symlink_to("config.json")
    assert "same.json" in names(model)
    (model / "secret.txt").symlink_to("/etc/hostname")
    with pytest.raises(bunkhouse.BadDirectory, match=r"secret\.txt: is a link that leaves"):
        list_directory(model)
    (model / "secret.txt").unlink()
    (model / "up").symlink_to("..")
    with pytest.raises(bunkhouse.BadDirectory, match="up: is a link that leaves"):
        list_directory(model)
    (model / "up").unlink()
    (model / "loop").symlink_to(".")
    with pytest.raises(bunkhouse.BadDirectory, match="loop: is a link to a directory"):
        list_directory(model)
    (model / "loop").unlink()
    (model / "gone.json").symlink_to("nowhere")
    with pytest.raises(bunkhouse.BadDirectory, match=r"gone\.json: cannot be read"):
        list_directory(model)


def test_a_directory_reached_through_a_link_is_fine(model: Path, tmp_path: Path) -> None:
    """Only links inside the directory are judged."""
    (tmp_path / "link").symlink_to(model)
    assert names(tmp_path / "link") == names(model)


def test_special_files_are_refused(model: Path) -> None:
    os.mkfifo(model / "pipe.json")
    with pytest.raises(bunkhouse.BadDirectory, match=r"pipe\.json: is not a regular file"):
        list_directory(model)


def test_what_is_no_model_directory_is_said_early(model: Path, tmp_path: Path) -> None:
    with pytest.raises(bunkhouse.BadDirectory, match="is not a directory"):
        list_directory(tmp_path / "absent")
    with pytest.raises(bunkhouse.BadDirectory, match=r"no config\.json"):
        list_directory(tmp_path)
    (model / "model.safetensors").unlink()
    with pytest.raises(bunkhouse.BadDirectory, match="safetensors"):
        list_directory(model)


def test_too_many_files_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(_push.FILES_MAX):
        (model / f"{i}.json").write_text("")
    with pytest.raises(bunkhouse.BadDirectory, match="limit is 256"):
        list_directory(model)
    monkeypatch.setattr(_push, "ENTRIES_MAX", 100)
    with pytest.raises(bunkhouse.BadDirectory, match="more than 100 entries"):
        list_directory(model)


def test_what_is_taken_control_takes_too() -> None:
    """The SDK's list of names is within the server's; the two cannot import each other."""
    taken = [f"model{suffix}" for suffix in _push.TAKEN_SUFFIXES] + sorted(_push.TAKEN_NAMES)
    packer_directory.check_paths([(name, 1) for name in (*taken, "config.json", "1_Pooling/config.json")])
    assert _push.FILES_MAX == packer_directory.FILES_MAX


@pytest.mark.parametrize("ref", ["minilm", "acme/minilm@0123456789abcdef", "acme/../x"])
def test_a_push_names_a_model_and_no_version(client: bunkhouse.Client, model: Path, ref: str) -> None:
    with pytest.raises(bunkhouse.BadValue, match="model"):
        client.push(ref, model)


def test_a_file_that_changes_meanwhile_stops_the_push(client: bunkhouse.Client, model: Path) -> None:
    """What was hashed is what is sent, or nothing is."""

    def grow(step: bunkhouse.Progress) -> None:
        if step.step == "upload" and step.path == "model.safetensors":
            with open(model / step.path, "ab") as file:
                file.write(b"x")

    with pytest.raises(bunkhouse.BadDirectory, match=r"model\.safetensors: changed"):
        client.push("acme/minilm", model, grow)


# --- resuming


def test_an_interrupted_push_continues_where_it_stopped(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    """The process dies in the middle; the next push sends only what is missing."""

    class Killed(BaseException):
        pass

    def kill(step: bunkhouse.Progress) -> None:
        if step.step == "upload" and step.done_bytes > 3 * PIECE:
            raise Killed

    with pytest.raises(Killed):
        client.push("acme/minilm", model, kill)
    sent = control.received_bytes
    assert 0 < sent < 5 * PIECE
    pushed = client.push("acme/minilm", model)
    assert control.received_bytes == sum(file.size_bytes for file in pushed.files)


def test_a_connection_that_breaks_inside_a_piece_resumes_at_the_byte(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    """The server kept 10 bytes of a piece: the push asks, and goes on from there, without a gap."""
    control.faults.append(Fault("PATCH", "/api/v1/uploads", 0, times=3, after_bytes=10))
    pushed = client.push("acme/minilm", model)
    assert control.received_bytes == sum(file.size_bytes for file in pushed.files)


def test_a_wrong_offset_is_corrected_by_the_answer(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    """409 with Upload-Offset: another push of the same files was quicker."""

    def overtake(step: bunkhouse.Progress) -> None:
        if step.step == "upload" and step.path == "model.safetensors":
            (upload,) = control.uploads.values()
            if not upload["data"][step.path]:
                upload["data"][step.path] += (model / step.path).read_bytes()[: PIECE + 1]

    pushed = client.push("acme/minilm", model, overtake)
    assert pushed.latest
    assert control.received_bytes == sum(file.size_bytes for file in pushed.files) - PIECE - 1


def test_a_busy_file_is_asked_about_until_it_is_free(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    """409 without an offset: the earlier request has not ended yet on the server's side."""
    busy = {"error": {"code": "file_busy", "message": "busy"}}
    control.faults.append(Fault("PATCH", "/api/v1/uploads", 409, times=3, body=busy))
    assert client.push("acme/minilm", model).latest


def test_a_push_without_progress_ends(client: bunkhouse.Client, control: FakeControl, model: Path) -> None:
    busy = {"error": {"code": "file_busy", "message": "still busy"}}
    control.faults.append(Fault("PATCH", "/api/v1/uploads", 409, times=1000, body=busy))
    with pytest.raises(bunkhouse.Conflict, match="still busy"):
        client.push("acme/minilm", model)
    pieces = [path for method, path in control.requests if method == "PATCH"]
    assert len(pieces) == _push.RESUMES_MAX + 1


def test_a_forgotten_upload_is_declared_again(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    """The upload expired on the server: the push starts over, once."""

    def forget(step: bunkhouse.Progress) -> None:
        if step.step == "upload" and 2 * PIECE < step.done_bytes < 3 * PIECE and not forgotten:
            forgotten.append(True)
            control.uploads.clear()

    forgotten: list[bool] = []
    assert client.push("acme/minilm", model, forget).latest
    assert forgotten


def test_an_unknown_tenant_is_not_found_before_a_byte_is_sent(
    client: bunkhouse.Client, control: FakeControl, model: Path
) -> None:
    with pytest.raises(bunkhouse.NotFound):
        client.push("nobody/minilm", model)
    assert control.received_bytes == 0


def test_a_server_that_is_gone_ends_the_push_as_unreachable(model: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with bunkhouse.Client(f"http://127.0.0.1:{port}", retry=RetryPolicy(tries_max=1)) as client:
        with pytest.raises(bunkhouse.Unreachable):
            client.push("acme/minilm", model)


async def test_the_async_push_resumes_too(url: str, control: FakeControl, model: Path) -> None:
    """The same steps, driven by the other client."""
    control.faults.append(Fault("PATCH", "/api/v1/uploads", 0, times=2, after_bytes=10))
    steps: list[bunkhouse.Progress] = []
    async with bunkhouse.AsyncClient(url, OPERATOR_KEY) as client:
        pushed = await client.push("acme/minilm", model, steps.append)
        with pytest.raises(bunkhouse.BadDirectory):
            await client.push("acme/minilm", model / "1_Pooling")
    assert control.received_bytes == sum(file.size_bytes for file in pushed.files)
    assert steps[-1].done_bytes == steps[-1].total_bytes
