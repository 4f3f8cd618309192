"""The ``bunk`` command against a fake control server: forms of output, exit codes, keys and options.

``bunk up`` and ``bunk doctor`` have their own files (``test_up``, ``test_doctor``).
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from fake_control import OPERATOR_KEY, FakeControl, Fault, serving

import bunkhouse
from bunkhouse.cli import api, tables
from bunkhouse.cli.main import bunk as bunk_command

SDK = Path(bunkhouse.__file__).parents[1]


@pytest.fixture
def control() -> FakeControl:
    made = FakeControl()
    for name in ("acme", "globex"):
        made.tenants[name] = {"tenant": name, "created_ms": 1_700_000_000_000, "keys": 1, "models": 2}
    made.add_key("acme", {"label": "first"})
    made.add_model({"tenant": "acme", "name": "minilm", "files": []}, "control:")
    made.nodes["box"] = {
        "node": "box",
        "state": "up",
        "heard_ago_ms": 3000,
        "gateway_url": "http://10.0.0.1:8100",
        "route_url": "https://10.0.0.1:8101",
        "devices": [{"device": "cpu:0", "budget_bytes": 96 * 2**20, "used_bytes": 2**20, "healthy": False}],
    }
    restores = [{"from_tier": "disk", "count": 2, "restore_ms_p50": 12, "restore_ms_max": 30}]
    item = {"node": "box", "ref": "acme/minilm@0123456789abcdef", "state": "absent", "restores": restores}
    item["restore_ms_estimate"] = 47
    made.ps = {"items": [item], "devices": [{"node": "box", "device": "cpu:0", "budget_bytes": 5}]}
    made.events = [
        {"id": n, "at_ms": 1_700_000_000_000 + n, "kind": "restored", "tenant": "acme", "model": "acme/m@0"}
        for n in range(1, 6)
    ]
    used = {"tenant": "acme", "begin_ms": 1_700_000_000_000, "requests": 3, "answers": 2, "prompt_tokens": 90}
    used |= {"completion_tokens": 6, "device_ms": 41, "restored_disk_bytes": 2**20}
    made.usage = [{**used, "model": "acme/m"}, {**used, "model": ""}]
    return made


@pytest.fixture
def url(control: FakeControl) -> Iterator[str]:
    with serving(control) as address:
        yield address


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "operator.key"
    path.write_text(OPERATOR_KEY + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The developer's own server and key are not this test's."""
    for name in ("BUNKHOUSE_URL", "BUNKHOUSE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(b"weights")
    return root


class Bunk:
    """Runs ``bunk`` in process, as the operator unless told otherwise."""

    def __init__(self, url: str, key_file: Path) -> None:
        self._target = ["--url", url, "--key-file", str(key_file)]

    def __call__(self, *words: object, stdin: str | None = None, plain: bool = False) -> Result:
        arguments = [str(word) for word in words] + ([] if plain else self._target)
        return CliRunner().invoke(bunk_command, arguments, input=stdin)


@pytest.fixture
def bunk(url: str, key_file: Path) -> Bunk:
    return Bunk(url, key_file)


# --- output

COMMANDS: list[Sequence[str]] = [
    ("tenant", "create", "new"),
    ("tenant", "ls"),
    ("tenant", "rm", "globex"),
    ("key", "create", "acme", "--label", "ci", "--ttl", "30d"),
    ("key", "ls", "acme"),
    ("quota", "show", "acme"),
    ("quota", "set", "acme", "--device-max", "96MiB", "--rpm", "30"),
    ("node", "ls"),
    ("node", "ls", "--pool", "l40s"),
    ("node", "token", "create", "--name", "box", "--ttl", "1h", "--pool", "l40s"),
    ("node", "drain", "box"),
    ("node", "rm", "box"),
    ("router", "ls"),
    ("router", "token", "create", "--name", "r1", "--ttl", "1h"),
    ("router", "rm", "r1"),
    ("model", "push", "acme/x", "MODEL_DIR"),
    ("model", "push", "acme/y", "--from", "file:///models/y"),
    ("model", "ls"),
    ("model", "ls", "acme"),
    ("ps",),
    ("top", "--once"),
    ("events",),
    ("events", "--after", "2", "--limit", "2"),
    ("usage", "--by", "day", "--since", "30d"),
    ("usage", "--by", "key"),
    ("plan", "acme/minilm"),
    ("explain", "acme/minilm"),
    ("explain", "req_1", "--node", "box"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_prints_a_table_or_a_sentence_and_valid_json(
    bunk: Bunk, model_dir: Path, control: FakeControl, words: Sequence[str]
) -> None:
    """With ``-o json`` standard output is one JSON document; without it, it is not."""
    given = [str(model_dir) if word == "MODEL_DIR" else word for word in words]
    first = bunk(*given, "-o", "json")
    assert first.exit_code == 0, first.output
    assert isinstance(json.loads(first.stdout), dict)
    control.tenants = {name: {"tenant": name} for name in ("acme", "globex")}
    control.nodes["box"] = {"node": "box", "state": "up"}
    control.routers["r1"] = {"router": "r1", "state": "up"}
    second = bunk(*given)
    assert second.exit_code == 0, second.output
    assert second.stdout.strip()
    with pytest.raises(ValueError, match=r"Expecting|Extra data"):
        json.loads(second.stdout)


def test_every_command_is_covered_and_documented() -> None:
    """Each leaf has a help text and ``-o``, is in the README, and in the list above (or has its own file)."""
    readme = (SDK / "README.md").read_text()
    tested = {" ".join(words) for words in COMMANDS} | {
        "up",
        "key revoke x",
        "model rm x",
        "model set x",
        "doctor",
        "simulate",
        "completion",
    }

    def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from leaves(inner, f"{path} {name}".strip())
        else:
            yield path, command

    for path, command in leaves(bunk_command, ""):
        assert command.help, path
        # A script for a shell has one form.
        assert path == "completion" or any("--output" in option.opts for option in command.params), path
        assert any(each == path or each.startswith(path + " ") for each in tested), path
        assert f"bunk {path}" in readme, path


def test_tables_hold_sizes_restores_and_states(bunk: Bunk) -> None:
    nodes = bunk("node", "ls").stdout
    assert "1 MiB / 96 MiB (unhealthy)" in nodes
    ps = bunk("ps").stdout
    assert "disk 2x 12/30 ms" in ps
    assert "47 ms" in ps
    assert "FOREIGN" in ps
    assert "2023-11-14 22:13:20Z  -  restored  acme/m@0" in bunk("events").stdout


def test_usage_is_asked_for_a_time_and_shown_by_model(bunk: Bunk, control: FakeControl) -> None:
    month = ("--since", "2026-11-01", "--until", "2026-12-01T00:00Z")
    shown = bunk("usage", "--tenant", "acme", "--by", "hour", *month)
    assert control.asked["since_ms"] == "1793491200000"
    assert control.asked["until_ms"] == "1796083200000"
    assert (control.asked["tenant"], control.asked["by"]) == ("acme", "hour")
    first, second = (" ".join(line.split()) for line in shown.stdout.splitlines()[1:])
    assert first == "acme acme/m 2023-11-14 22:13:20Z 3 2 90 6 41 0 B 1 MiB 0 B"
    assert second.startswith("acme - ")
    for wrong in ("30", "soon", "2026-13-01"):
        assert bunk("usage", "--since", wrong).exit_code == 2


VICTIM = {"ref": "acme/old@0", "device": "cpu:0", "freed_bytes": 2**20, "kept_chunks": 3, "keep_index": 0.125}


def test_a_plan_shows_victims_scores_the_restore_and_every_device(bunk: Bunk, control: FakeControl) -> None:
    room = {"device": "cpu:0", "budget_bytes": 96 * 2**20, "used_bytes": 90 * 2**20}
    room |= {"needed_bytes": 7 * 2**20, "verdict": "chosen"}
    forecast = {"ref": "acme/m@0", "outcome": "evicts", "reason": "1 models give bytes", "device": "cpu:0"}
    forecast |= {"from_tier": "host", "restore_bytes": 7 * 2**20, "restore_ms": 12, "victims": [VICTIM]}
    forecast |= {"devices": [room], "waiting_before": 2, "at_ms": 1}
    item = {"node": "box", "forecast": forecast, "others": {"count": 2, "freed_bytes": 2**30}, "error": None}
    mute = {"node": "mute", "forecast": None, "others": {}, "error": "it did not answer in time"}
    control.plan = {"model": "acme/m@0", "items": [item, mute]}
    out = bunk("plan", "acme/m", "--node", "box").stdout
    assert control.asked == {"model": "acme/m", "node": "box"}
    assert "box/cpu:0: evicts: 1 models give bytes" in out
    assert "7 MiB from the host tier, about 12 ms" in out
    assert "0.125" in out
    assert "3 chunks" in out
    assert "and 2 models of other tenants give 1 GiB" in out
    assert "chosen" in out
    assert "mute: no answer: it did not answer in time" in out
    found = json.loads(bunk("plan", "acme/m", "-o", "json").stdout)
    assert found["items"][0]["victims"][0]["keep_index"] == 0.125
    assert found["items"][1]["outcome"] is None


def test_an_explanation_tells_decisions_and_requests(bunk: Bunk, control: FakeControl) -> None:
    decision = {
        "kind": "claimed",
        "ref": "",
        "reason": "",
        "device": "cpu:0",
        "victims": [VICTIM],
        "at_ms": 1,
    }
    story = {"request": "req_1", "ref": "acme/m@0", "asked_ms": 1, "outcome": "granted", "device": "cpu:0"}
    story |= {"from_tier": "disk", "waited_ms": 30}
    control.explanation["items"] = [{"node": "box", "decision": decision, "others": {}}]
    control.explanation["requests"] = [{"node": "box", "story": story}]
    control.explanation["silent"] = ["mute"]
    out = bunk("explain", "req_1").stdout
    assert control.asked == {"request": "req_1"}
    assert "acme/m@0: granted after 30 ms on box/cpu:0, weights from the disk tier" in out
    assert "claimed another tenant's model" in out
    assert "acme/old@0" in out
    assert "mute: no answer" in out
    assert bunk("explain", "acme/m").exit_code == 0
    assert control.asked == {"model": "acme/m"}
    control.explanation = {"requests": [], "items": [], "silent": []}
    assert "nothing was decided about acme/m lately" in bunk("explain", "acme/m").stdout


def test_an_empty_list_is_an_empty_list(bunk: Bunk, control: FakeControl) -> None:
    """JSON stays JSON; for people a sentence goes to standard error."""
    control.models.clear()
    assert json.loads(bunk("model", "ls", "-o", "json").stdout) == {"items": []}
    result = bunk("model", "ls")
    assert (result.stdout, result.stderr) == ("", "no models\n")


def test_a_servers_text_cannot_drive_the_terminal(bunk: Bunk, control: FakeControl) -> None:
    control.tenants["acme"]["tenant"] = "a\x1b]0;evil\x07\x9b31m"
    assert "\x1b" not in bunk("tenant", "ls").stdout
    control.faults.append(Fault("GET", "/api/v1/ps", 400, body={"error": {"message": "\x1b[2Jgone"}}))
    assert "\x1b" not in bunk("ps").output


def test_following_events_prints_one_document_per_line(
    bunk: Bunk, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after the last one seen, and Ctrl-C ends it with 130."""

    def next_second(_: float) -> None:
        if len(control.events) == 6:
            raise KeyboardInterrupt
        control.events.append({"id": 6, "at_ms": 1, "kind": "evicted"})

    monkeypatch.setattr("bunkhouse.cli.fleet.time.sleep", next_second)
    result = bunk("events", "--follow", "-o", "json")
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert result.exit_code == 130


# --- exit codes and errors


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, 1),
        (401, 4),
        (403, 4),
        (404, 3),
        (409, 1),
        (422, 1),
        (429, 5),
        (500, 1),
        (502, 6),
        (503, 6),
        (507, 5),
    ],
)
def test_exit_codes_follow_the_status(bunk: Bunk, control: FakeControl, status: int, code: int) -> None:
    """The table of the README; with ``-o json`` the error is JSON on standard error."""
    error = {"code": "c", "message": "words", "field": "f"}
    headers = {"x-should-retry": "false", "retry-after": "7"}
    control.faults.append(Fault("GET", "/api/v1/ps", status, times=2, headers=headers, body={"error": error}))
    result = bunk("ps")
    assert (result.exit_code, result.stdout) == (code, "")
    hint = "give a key with --key-file or BUNKHOUSE_API_KEY\n" if status == 401 else ""
    assert result.stderr == f"error: f: words\n{hint}try again in 7 s\n"
    result = bunk("ps", "-o", "json")
    assert (result.exit_code, result.stdout) == (code, "")
    told = json.loads(result.stderr)["error"]
    assert (told["status"], told["code"], told["field"], told["retry_after_s"]) == (status, "c", "f", 7.0)


def test_an_unreachable_server_is_exit_code_6(
    bunk: Bunk, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bunkhouse._retry.random.uniform", lambda low, high: 0.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    result = bunk("ps", "--url", address, "--key-file", key_file, plain=True)
    assert result.exit_code == 6
    assert "cannot reach" in result.stderr
    assert "`bunk up`" in result.stderr


def test_an_interrupted_push_says_how_to_go_on(
    bunk: Bunk, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bunkhouse._client.Client.push", interrupted)
    result = bunk("model", "push", "acme/x", model_dir)
    assert (result.exit_code, result.stderr) == (130, "run it again to go on from here\ninterrupted\n")


@pytest.mark.parametrize(
    "words",
    [
        ("quota", "set", "acme"),
        ("quota", "set", "acme", "--device-max", "lots"),
        ("quota", "set", "acme", "--rpm", "-5"),
        ("key", "create", "acme", "--ttl", "soon"),
        ("model", "push", "acme/x"),
        ("model", "push", "acme/x", ".", "--from", "file:///x"),
        ("model", "push", "x", "--from", "file:///x"),
        ("model", "rm", "acme/../x"),
        ("ps", "-o", "yaml"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(bunk: Bunk, control: FakeControl, words: Sequence[str]) -> None:
    """Said before anything is asked of the server."""
    result = bunk(*words)
    assert result.exit_code == 2, result.output
    assert control.requests == []


def test_a_directory_that_holds_code_is_named(bunk: Bunk, model_dir: Path) -> None:
    (model_dir / "modeling.py").write_text("")
    result = bunk("model", "push", "acme/x", model_dir)
    assert result.exit_code == 1
    assert "error: modeling.py: .py files can run code" in result.stderr
    assert bunk("model", "push", "acme/x", model_dir, "--ignore", "*.py").exit_code == 0


def test_files_that_are_left_out_are_named_on_standard_error(bunk: Bunk, model_dir: Path) -> None:
    (model_dir / "model.onnx").write_text("")
    result = bunk("model", "push", "acme/x", model_dir)
    assert "model.onnx: left out" in result.stderr
    assert "acme/x@" in result.stdout


# --- what commands send


def test_quota_set_sends_only_what_is_given(bunk: Bunk, control: FakeControl) -> None:
    bunk("quota", "set", "acme", "--device-reserved", "1GB", "--device-max", "2GiB", "--concurrency", "4")
    result = bunk(
        "quota", "set", "acme", "--device-max", "none", "--rpm", "none", "--priority=-1", "-o", "json"
    )
    quota = json.loads(result.stdout)["quota"]
    assert quota["device"] == {"reserved": 10**9, "max": None}
    assert (quota["concurrency"], quota["requests_per_minute"], quota["priority"]) == (4, None, -1)


def test_rates_are_set_and_shown_with_what_is_used_of_them(bunk: Bunk) -> None:
    options = ("--tpm", "900", "--restores-per-minute", "4", "--device-seconds-per-day", "3600")
    result = bunk("quota", "set", "acme", *options)
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert lines["tokens per minute"].split()[-6:] == ["-", "900", "4", "of", "900", "at", "once"][-6:]
    assert "4" in lines["restores per minute"]
    assert "3600" in lines["device seconds per day"]
    assert "none" in lines["requests per minute"]
    assert result.stderr == "warning: too much is promised\n"


def test_models_and_keys_are_removed(bunk: Bunk, model_dir: Path, control: FakeControl) -> None:
    ref = json.loads(bunk("model", "push", "acme/x", model_dir, "-o", "json").stdout)["ref"]
    assert bunk("model", "rm", ref).exit_code == 0
    assert bunk("model", "rm", ref).exit_code == 3
    key_id = json.loads(bunk("key", "create", "acme", "-o", "json").stdout)["key_id"]
    assert json.loads(bunk("key", "revoke", key_id, "-o", "json").stdout) == {"revoked": key_id}
    assert bunk("key", "revoke", key_id).exit_code == 3


def test_nothing_is_asked_without_a_terminal_and_on_one_no_means_no(
    bunk: Bunk, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "on_terminal", lambda: True)
    result = bunk("tenant", "rm", "acme", stdin="n\n")
    assert (result.exit_code, "acme" in control.tenants) == (1, True)
    assert bunk("tenant", "rm", "acme", "--yes").exit_code == 0
    monkeypatch.undo()
    assert bunk("tenant", "rm", "globex").exit_code == 0


# --- keys and targets


def test_a_new_key_goes_alone_to_standard_output_or_to_a_private_file(bunk: Bunk, tmp_path: Path) -> None:
    result = bunk("key", "create", "acme")
    assert result.stdout.startswith("bk_")
    assert len(result.stdout.split()) == 1
    saved = tmp_path / "new.key"
    for words in (("key", "create", "acme"), ("node", "token", "create")):
        result = bunk(*words, "--save-to", saved, "-o", "json")
        secret = saved.read_text().strip()
        assert secret
        assert secret not in result.output
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_no_option_or_argument_takes_a_key(bunk: Bunk, control: FakeControl) -> None:
    """Arguments are visible to other users: there is no --key, and a key given as an id is refused unsaid."""

    def options(command: click.Command) -> Iterator[str]:
        for param in command.params:
            yield from param.opts
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                yield from options(inner)

    assert not {"--key", "--api-key", "--token", "--password"} & set(options(bunk_command))
    result = bunk("key", "revoke", OPERATOR_KEY)
    assert result.exit_code == 2
    assert OPERATOR_KEY not in result.output
    assert control.requests == []


def test_the_key_may_come_from_the_environment_or_standard_input(
    bunk: Bunk, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bunk("ps", "--url", url, plain=True).exit_code == 4
    assert bunk("ps", "--url", url, "--key-file", "-", plain=True, stdin=OPERATOR_KEY + "\n").exit_code == 0
    monkeypatch.setenv("BUNKHOUSE_URL", url)
    monkeypatch.setenv("BUNKHOUSE_API_KEY", OPERATOR_KEY)
    assert bunk("ps", plain=True).exit_code == 0


def test_a_key_file_is_checked(bunk: Bunk, url: str, key_file: Path, tmp_path: Path) -> None:
    """Readable by others: a warning. Absent, empty or huge: an error that names it."""
    key_file.chmod(0o644)
    result = bunk("ps")
    assert result.exit_code == 0
    assert f"others can read the key in {key_file}" in result.stderr
    for name, data in (("absent", None), ("empty", b""), ("huge", b"x" * 100_000), ("binary", b"\xff")):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        result = bunk("ps", "--url", url, "--key-file", path, plain=True)
        assert (result.exit_code, str(path) in result.stderr) == (1, True), result.output


def test_the_contexts_key_goes_to_the_contexts_server_only(
    bunk: Bunk,
    control: FakeControl,
    url: str,
    key_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = tmp_path / "config" / "bunkhouse" / "context.json"
    context.parent.mkdir(parents=True)
    context.write_text(json.dumps({"url": url, "key_file": str(key_file)}))
    assert bunk("ps", plain=True).exit_code == 0
    assert bunk("ps", "--url", url + "/", plain=True).exit_code == 0
    other = url.replace("127.0.0.1", "localhost")
    assert bunk("ps", "--url", other, plain=True).exit_code == 4
    monkeypatch.setenv("BUNKHOUSE_URL", other)
    assert bunk("ps", plain=True).exit_code == 4
    assert all("authorization" not in headers for headers in control.headers[2:])
    context.write_text("[]")
    result = bunk("ps", plain=True)
    assert (result.exit_code, str(context) in result.stderr) == (1, True)


@pytest.mark.parametrize("words", [("--url", "http://h:1"), ("--key-file=k",), ("-o", "json")])
def test_an_option_before_its_command_is_told_where_it_goes(bunk: Bunk, words: Sequence[str]) -> None:
    result = bunk(*words, "ps", plain=True)
    assert result.exit_code == 2
    assert f"{words[0].partition('=')[0]} goes behind the command" in result.stderr


def test_without_a_server_the_ways_to_name_one_are_told(bunk: Bunk) -> None:
    result = bunk("ps", plain=True)
    assert result.exit_code == 2
    assert "bunk up" in result.stderr
    assert "BUNKHOUSE_URL" in result.stderr


# --- the executable


def test_the_module_runs_as_a_command(url: str, key_file: Path) -> None:
    """Output in a pipe is plain, and the version is the package's."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(SDK),
        "BUNKHOUSE_URL": url,
        "BUNKHOUSE_API_KEY": OPERATOR_KEY,
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bunkhouse.cli", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert bunkhouse.__version__ in run("--version").stdout
    listed = run("tenant", "ls")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.splitlines()[0].split() == ["TENANT", "KEYS", "MODELS", "CREATED"]


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": f"{tmp_path}:{SDK}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "bunkhouse.cli"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bunkhouse[cli]" in done.stderr


# --- values


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("1048576", 2**20), ("96MiB", 96 * 2**20), ("2GB", 2 * 10**9), ("1.5 kib", 1536), ("7b", 7)],
)
def test_sizes_are_parsed(text: str, count: int) -> None:
    assert api.Size().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["96", "1.5", "1048575"])
def test_a_size_that_lacks_its_unit_is_refused_with_both_ways_out(text: str) -> None:
    """`--device-reserved 96` reserved 96 bytes, in silence."""
    with pytest.raises(click.BadParameter, match=rf"write {text}MiB or {text}GiB, or {text}B"):
        api.Size().convert(text, None, None)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (1536, "1.5 KiB"), (2**50, "1024 TiB")],
)
def test_sizes_are_shown(count: int, text: str) -> None:
    assert tables.size(count) == text


def test_times_are_shown() -> None:
    assert [tables.span(ms) for ms in (None, 999, 61_000, 7_200_000, 200_000_000)] == [
        "-",
        "0s",
        "1m",
        "2h",
        "2d",
    ]
    assert tables.moment(0) == "-"
    assert tables.moment(10**30) == str(10**30)
