"""Keys are rotated without touching a pack, and a kill at any moment loses nothing.

Covers: the node's and a tenant's key, every line at which the command can be killed, what is left of old
keys on disk, and the refusals of the command. Does not cover: wrapping itself (``test_seal``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from agent import rotate
from agent.data_dir import DataDirInUse, hold_data_dir
from agent.journal import JournalFailed, PackRow, load_node_key, open_journal
from packer import seal
from packer.types import HostSizes, ModelRef

ROOT = Path(__file__).resolve().parent.parent
REF = ModelRef("acme", "minilm", "0" * 16)
PARTIAL = ModelRef("acme", "growing", "2" * 16)
OTHER = ModelRef("globex", "tiny", "1" * 16)
SIZES = HostSizes(10, 12, 15)


def fill(data_dir: Path) -> dict[str, str]:
    """A data directory with two packs and one in the making; returns their data keys."""
    journal = open_journal(data_dir)
    keys = {}
    for ref in (REF, OTHER):
        key, wrapped = journal.seal_new_key(ref)
        journal.add_pack(PackRow(ref, 1, 10, SIZES), wrapped, 0)
        keys[str(ref)] = key.hex()
    keys[str(PARTIAL)] = journal.seal_partial_key(PARTIAL)[0].hex()
    journal.close()
    return keys


def read(data_dir: Path) -> dict[str, str]:
    """The same, as a node finds it that starts now."""
    journal = open_journal(data_dir)
    try:
        keys = {}
        for ref in (REF, OTHER):
            key = journal.data_key(ref)
            assert key is not None
            keys[str(ref)] = key.hex()
        assert journal.partial_packs() == [PARTIAL]
        keys[str(PARTIAL)] = journal.seal_partial_key(PARTIAL)[0].hex()
        return keys
    finally:
        journal.close()


def run(data_dir: Path, *more: str) -> int:
    return rotate.main(["--data-dir", str(data_dir), *more])


def rows(data_dir: Path, query: str) -> list[bytes]:
    connection = sqlite3.connect(data_dir / "journal.db")
    try:
        return [bytes(row[0]) for row in connection.execute(query)]
    finally:
        connection.close()


def on_disk(data_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(data_dir.iterdir()))


def test_a_new_node_key_opens_everything_and_the_old_one_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill(tmp_path)
    old = load_node_key(tmp_path / "seal.key")
    before = rows(tmp_path, "select wrapped_key from tenant_keys")
    assert run(tmp_path) == 0
    assert "2 tenants" in capsys.readouterr().out
    new = load_node_key(tmp_path / "seal.key")
    assert new != old
    assert (tmp_path / "seal.key").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "seal.key.next").exists()
    for wrapped in rows(tmp_path, "select wrapped_key from tenant_keys"):
        with pytest.raises(seal.BadSeal):
            seal.unwrap_key(old, wrapped, b"acme")
    assert read(tmp_path) == keys
    left = on_disk(tmp_path)
    for gone in (*before, old):
        assert gone not in left


def test_a_new_tenant_key_opens_its_packs_and_leaves_other_tenants_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill(tmp_path)
    mine = "select wrapped_key from {} where tenant = 'acme'"
    other = rows(tmp_path, "select wrapped_key from tenant_keys where tenant = 'globex'")
    before = [
        key
        for table in ("tenant_keys", "packs", "partial_packs")
        for key in rows(tmp_path, mine.format(table))
    ]
    assert len(before) == 3
    assert run(tmp_path, "--tenant", "acme") == 0
    assert "2 data keys" in capsys.readouterr().out
    assert read(tmp_path) == keys
    assert rows(tmp_path, "select wrapped_key from tenant_keys where tenant = 'globex'") == other
    left = on_disk(tmp_path)
    assert not [wrapped for wrapped in before if wrapped in left]


# Runs the command in a fork that dies like by kill -9 at the n-th line of the code that does it, for every n.
KILL_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from agent import rotate

source, work, arguments = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
files = ("agent/rotate.py", "agent/journal.py", "packer/durable.py", "agent/data_dir.py")

def run(data_dir, kill_at):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.settrace(trace)
    status = rotate.main(["--data-dir", str(data_dir), *arguments])
    sys.settrace(None)
    os._exit(status)

kill_at, ends = 0, []
while not ends or ends[-1] == -signal.SIGKILL:
    kill_at += 1
    data_dir = work / str(kill_at)
    shutil.copytree(source, data_dir)
    child = os.fork()
    if not child:
        run(data_dir, kill_at)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


@pytest.mark.parametrize("more", [(), ("--tenant", "acme")], ids=["node", "tenant"])
def test_a_kill_at_any_line_loses_no_key(tmp_path: Path, more: tuple[str, ...]) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    keys = fill(source)
    old_key = (source / "seal.key").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(source), str(work), *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    ends: list[int] = json.loads(done.stdout)
    assert ends[-1] == 0
    assert set(ends[:-1]) == {-signal.SIGKILL}
    assert len(ends) > 60, "the lines of both files are traced"
    rotated = 0
    for kill_at in range(1, len(ends) + 1):
        data_dir = work / str(kill_at)
        pending = (data_dir / "seal.key.next").exists()
        assert read(data_dir) == keys, f"killed at line event {kill_at}"
        assert not (data_dir / "seal.key.next").exists(), "a start ends or undoes what was cut off"
        rotated += pending and (data_dir / "seal.key").read_bytes() != old_key
        assert run(data_dir, *more) == 0, "and rotating again works"
        assert read(data_dir) == keys
        shutil.rmtree(data_dir)
    assert rotated or more, "some kill was between the journal's word and the key file's new name"


def test_a_running_agent_is_not_rotated_under(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock is another process's; one process could take its own again."""
    fill(tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from agent.data_dir import hold_data_dir\n"
            "with hold_data_dir(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        key = (tmp_path / "seal.key").read_bytes()
        assert run(tmp_path) == rotate.EXIT_FAILED
        assert f"in use by process {holder.pid}" in capsys.readouterr().err
        assert (tmp_path / "seal.key").read_bytes() == key
        with pytest.raises(DataDirInUse), hold_data_dir(tmp_path):
            raise AssertionError("held twice")
    finally:
        holder.communicate("")
    assert run(tmp_path) == 0, "the lock went with its process"


@pytest.mark.parametrize("arguments", [[], ["--tenant", "No Tenant"]])
def test_a_wrong_directory_or_name_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(tmp_path, *arguments) == rotate.EXIT_USAGE
    assert ("--tenant" if arguments else "--data-dir") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is made there"


def test_a_tenant_without_a_key_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert run(tmp_path, "--tenant", "nobody") == rotate.EXIT_FAILED
    assert "nobody" in capsys.readouterr().err


def test_what_the_old_key_could_not_open_stays_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seal.key that was replaced once: its old backup may still come back, so nothing is destroyed."""
    fill(tmp_path)
    first = (tmp_path / "seal.key").read_bytes()
    (tmp_path / "seal.key").write_bytes(b"\x07" * 32)
    journal = open_journal(tmp_path)
    _, wrapped = journal.seal_new_key(OTHER)
    journal.close()
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "1 tenants" in out
    assert "acme" in out
    (acme,) = rows(tmp_path, "select wrapped_key from tenant_keys where tenant = 'acme'")
    assert seal.unwrap_key(first, acme, b"acme")
    assert len(wrapped) == seal.WRAPPED_KEY_BYTES


def test_old_keys_wait_in_the_log_only_as_long_as_somebody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agent.journal.BUSY_TIMEOUT_MS", 0)
    keys = fill(tmp_path)
    before = rows(tmp_path, "select wrapped_key from tenant_keys")
    reader = sqlite3.connect(tmp_path / "journal.db")
    reader.execute("begin")
    reader.execute("select count(*) from tenant_keys").fetchone()
    assert run(tmp_path) == rotate.EXIT_FAILED
    assert "another process is reading it" in capsys.readouterr().err
    reader.rollback()
    reader.close()
    assert read(tmp_path) == keys, "a start finishes the cleaning"
    left = on_disk(tmp_path)
    assert not [wrapped for wrapped in before if wrapped in left]


def test_shredding_waits_for_readers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.journal.BUSY_TIMEOUT_MS", 0)
    fill(tmp_path)
    mine = "select wrapped_key from {} where tenant = 'acme'"
    gone = [
        key
        for table in ("tenant_keys", "packs", "partial_packs")
        for key in rows(tmp_path, mine.format(table))
    ]
    journal = open_journal(tmp_path)
    reader = sqlite3.connect(tmp_path / "journal.db")
    reader.execute("begin")
    reader.execute("select count(*) from tenant_keys").fetchone()
    with pytest.raises(JournalFailed):
        journal.shred_tenants(["globex"])
    assert journal.data_key(REF) is None, "the key is destroyed; only its traces remain"
    reader.rollback()
    reader.close()
    assert journal.shred_tenants(["globex"]) == [], "the next try cleans up"
    left = on_disk(tmp_path)
    assert len(gone) == 3
    assert not [wrapped for wrapped in gone if wrapped in left]
    assert journal.data_key(OTHER) is not None
