"""Control is killed and stays away for minutes under a steady load: what fails, and is all use told?

Covers: control and two agents as processes; callers with keys at the nodes' own addresses, whole answers and
streams, models that must be restored meanwhile, wrong keys, a tenant with limits, and programs with the SDK
that had a route before; ``kill -9`` of control, and its return. Afterwards control's ledger (``bunk usage``)
is compared with what the callers counted. Does not cover: an agent that is killed
(``tests/test_failures.py``).

    python scripts/outage.py --away 400 --check

Every call of these callers reaches a node, so all must be answered as if control were there: 200 for a right
key, 401 for a wrong one. 400 s is longer than tickets live and than nodes keep all of their shares of limits,
300 s both. Before, the callers go on for a minute: a tenant that has just come has a small share of its
limits on a node, and can be given no more while control is away.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

from make_models import make_gpt2
from stack import find_command

import bunkhouse

AWAY_S_DEFAULT = 400.0
AWAY_S_QUICK = 30.0
READY_S = 180.0
# Longer than a restore of one of these models on a machine that is busy with other things.
CALL_S = 60.0
# Each caller pauses so long between two calls: the load is steady and leaves the machine air.
PAUSE_S = 0.25
# Two of the three models of a tenant fit on a node's device, so calls in turn bring restores all the time.
DEVICE = "cpu:56MiB"
MODELS = ("gen0", "gen1", "gen2")
TENANTS = ("acme", "bolt")
LIMITED = "bolt"
# Some ten times what its two callers ask for together.
REQUESTS_PER_MINUTE = 2_400
WRONG_KEY = "bk_aaaaaaaaaaaa_" + "x" * 43
POLL_S = 0.1
# Twice what shares of limits take to follow what is used.
WARM_S = 60.0
FAULTS_SHOWN = 10


@dataclass(slots=True)
class Tally:
    """What callers saw, and counted for themselves. Several threads write to it."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # by tenant
    tokens: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, fault: str = "", tenant: str = "", tokens: int = 0) -> None:
        with self.lock:
            self.calls[kind] += 1
            if fault:
                self.failed[kind] += 1
                self.faults.append(f"{kind}: {fault}"[:300])
            elif tenant:
                self.answers[tenant] += 1
                self.tokens[tenant] += tokens


@dataclass(slots=True)
class Site:
    """Where everything runs. ``ports``: control's two, then one for each node."""

    folder: Path
    ports: list[int]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def node_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports[2:]]

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def start_control(self) -> None:
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        listen = ["--listen", f"127.0.0.1:{self.ports[0]}", "--node-listen", f"127.0.0.1:{self.ports[1]}"]
        command = [find_command("bunk-control"), "serve", "--data-dir", str(self.folder / "control")]
        self.start("control", *command, *listen, "--ready-file", str(ready))
        until(ready.exists, "control is ready")

    def start_node(self, name: str, port: int) -> None:
        token_file = self.folder / f"{name}.token"
        token_file.write_text(self.operator().create_node_token(name=name).token)
        words = [find_command("bunk-agent"), "run", "--data-dir", str(self.folder / name), "--name", name]
        words += ["--control", f"https://127.0.0.1:{self.ports[1]}", "--join-token-file", str(token_file)]
        words += ["--host-bytes", "64MiB", "--disk-bytes", "1GiB", "--device", DEVICE, "--calibrate", "off"]
        self.start(name, *words, "--standbys", "0", "--listen", f"127.0.0.1:{port}")

    def operator(self) -> bunkhouse.Client:
        return bunkhouse.Client(self.url, (self.folder / "control" / "operator.key").read_text().strip())

    def client(self, tenant: str, url: str, *, direct: bool = False) -> bunkhouse.Client:
        retry = bunkhouse.RetryPolicy(tries_max=1)
        return bunkhouse.Client(url, self.keys[tenant], direct=direct, retry=retry, timeout_s=CALL_S)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(READY_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(true: Callable[[], bool], what: str, patience_s: float = READY_S) -> None:
    deadline_s = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not within {patience_s:.0f} s: {what}")
        time.sleep(POLL_S)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def site_in(folder: Path) -> Iterator[Site]:
    """Two nodes with the packs of every model."""
    site = Site(folder, free_ports(4))
    for seed, name in enumerate(MODELS):
        make_gpt2(folder / name, seed, hidden=256, layers=4, heads=4)
    try:
        site.start_control()
        for number, port in enumerate(site.ports[2:]):
            site.start_node(f"n{number}", port)
        operator = site.operator()
        for tenant in TENANTS:
            operator.create_tenant(tenant)
            site.keys[tenant] = operator.create_key(tenant).key
            for name in MODELS:
                site.client(tenant, site.url).push(f"{tenant}/{name}", folder / name)
        operator.set_quota(LIMITED, requests_per_minute=REQUESTS_PER_MINUTE)
        until(lambda: len(site.operator().nodes()) == 2, "both nodes have joined")
        for url in site.node_urls():
            for tenant in TENANTS:
                for name in MODELS:
                    served = partial(answers, site, tenant, url, name)
                    until(served, f"{url} serves {tenant}/{name}")
        total = 2 * len(TENANTS) * len(MODELS)
        until(lambda: packed(operator) >= total, "all models are packed on both nodes")
        yield site
    finally:
        site.close()


def answers(site: Site, tenant: str, url: str, name: str) -> bool:
    try:
        site.client(tenant, url).complete(f"{tenant}/{name}", "x", max_tokens=1)
    except bunkhouse.BunkhouseError:
        return False
    return True


def packed(operator: bunkhouse.Client) -> int:
    return sum(item.kind == "packed" for item in operator.events(limit=1000).items)


# --- callers --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Callers:
    """One thread each; ``end`` stops them all between two calls."""

    site: Site
    tally: Tally = field(default_factory=Tally)
    ending: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self) -> None:
        for url in self.site.node_urls():
            self._run(partial(self._complete, "whole, key at a node", "acme", url, MODELS))
            self._run(partial(self._stream, "stream, key at a node", "acme", url, MODELS[:2]))
            self._run(partial(self._complete, "whole, with limits", LIMITED, url, MODELS[:1]))
        self._run(partial(self._wrong, "wrong key at a node", self.site.node_urls()[0]))
        routed = self.site.client("acme", self.site.url, direct=True)
        sdk = partial(self._call, "SDK with a route", "acme", routed, MODELS[:1])
        sdk(0)  # it has one from here on
        self._run(sdk)

    def end(self) -> None:
        self.ending.set()
        for thread in self.threads:
            thread.join(CALL_S)

    def _run(self, call: Callable[[int], None]) -> None:
        def run() -> None:
            number = 0
            while not self.ending.wait(PAUSE_S):
                call(number)
                number += 1

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def _complete(self, kind: str, tenant: str, url: str, names: Sequence[str], number: int) -> None:
        with self.site.client(tenant, url) as client:
            self._call(kind, tenant, client, names, number)

    def _call(
        self, kind: str, tenant: str, client: bunkhouse.Client, names: Sequence[str], number: int
    ) -> None:
        try:
            got = client.complete(f"{tenant}/{names[number % len(names)]}", "the bunk", max_tokens=4)
        except bunkhouse.BunkhouseError as error:
            self.tally.note(kind, repr(error))
        else:
            self.tally.note(kind, tenant=tenant, tokens=got.prompt_tokens + got.completion_tokens)

    def _stream(self, kind: str, tenant: str, url: str, names: Sequence[str], number: int) -> None:
        model = f"{tenant}/{names[number % len(names)]}"
        with self.site.client(tenant, url) as client:
            try:
                stream = client.complete(model, "the bunk", max_tokens=16, stream=True)
                stream.text()
            except bunkhouse.BunkhouseError as error:
                self.tally.note(kind, repr(error))
            else:
                tokens = (stream.prompt_tokens or 0) + (stream.completion_tokens or 0)
                self.tally.note(kind, tenant=tenant, tokens=tokens)

    def _wrong(self, kind: str, url: str, number: int) -> None:
        try:
            bunkhouse.Client(url, WRONG_KEY, direct=False).complete("acme/gen0", "x", max_tokens=1)
        except bunkhouse.AuthenticationFailed:
            self.tally.note(kind)
        except bunkhouse.BunkhouseError as error:
            self.tally.note(kind, repr(error))
        else:
            self.tally.note(kind, "it was let in")


# --- the ledger -----------------------------------------------------------------------------------------


def settled(site: Site) -> bool:
    """Whether control has confirmed everything that the nodes know of."""
    for node in ("n0", "n1"):
        key = (site.folder / node / "metrics.key").read_text().strip()
        port = site.ports[2 + int(node[1:])]
        if "bunkhouse_usage_waiting 0.0" not in scrape(port, key):
            return False
    return True


def scrape(port: int, key: str) -> str:
    request = Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urlopen(request, timeout=CALL_S) as answer:
        text: str = answer.read().decode()
    return text


def ledger(site: Site) -> dict[str, tuple[int, int]]:
    """(answers, tokens) by tenant, as control has them once the nodes have told all."""
    until(lambda: settled(site), "the nodes have told all that was used")
    found = {tenant: (0, 0) for tenant in TENANTS}
    for row in site.operator().usage():
        answers, tokens = found[row.tenant]
        found[row.tenant] = answers + row.answers, tokens + row.prompt_tokens + row.completion_tokens
    return found


@dataclass(frozen=True, slots=True)
class Ledger:
    """What callers counted for themselves and what control was told: answers, and tokens."""

    tenant: str
    counted: tuple[int, int]
    told: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``calls`` were made while control was away; ``failed`` are of the whole run."""

    away_s: float
    calls: dict[str, int]
    failed: dict[str, int]
    faults: list[str]
    ledgers: list[Ledger]

    @property
    def is_well(self) -> bool:
        return bool(self.calls) and not self.failed and all(row.counted == row.told for row in self.ledgers)


def outage(site: Site, away_s: float) -> Outcome:
    before = ledger(site)
    callers = Callers(site)
    callers.begin()
    time.sleep(WARM_S)
    control = site.processes["control"]
    control.kill()
    control.wait()
    killed_s = time.monotonic()
    during = Counter(callers.tally.calls)
    print(f"control is killed; it stays away for {away_s:.0f} s", flush=True)
    time.sleep(away_s)
    calls = callers.tally.calls - during
    site.start_control()
    away_s = time.monotonic() - killed_s
    until(lambda: all(node.state == "up" for node in site.operator().nodes()), "both nodes are back")
    callers.end()
    failed = callers.tally.failed
    after = ledger(site)
    ledgers = []
    for tenant in TENANTS:
        counted = callers.tally.answers[tenant], callers.tally.tokens[tenant]
        told = after[tenant][0] - before[tenant][0], after[tenant][1] - before[tenant][1]
        ledgers.append(Ledger(tenant, counted, told))
    return Outcome(round(away_s, 1), dict(calls), dict(+failed), callers.tally.faults[:FAULTS_SHOWN], ledgers)


def show(outcome: Outcome) -> None:
    print(f"\ncontrol was away for {outcome.away_s} s")
    print(f"{'calls meanwhile':<28}{'calls':>8}{'failed':>8}")
    for kind, count in sorted(outcome.calls.items()):
        print(f"{kind:<28}{count:>8}{outcome.failed.get(kind, 0):>8}")
    print(f"\n{'used in the whole run':<28}{'counted':>16}{'told':>16}")
    for row in outcome.ledgers:
        for what, counted, told in zip(("answers", "tokens"), row.counted, row.told, strict=True):
            print(f"{row.tenant + ' ' + what:<28}{counted:>16}{told:>16}")
    for fault in outcome.faults:
        print(f"failed: {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--away", type=float, default=AWAY_S_DEFAULT, help="seconds (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"away for {AWAY_S_QUICK:.0f} s")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--check", action="store_true", help="exit 1 when a call failed or use was not told")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bunkhouse-outage-") as folder, site_in(Path(folder)) as site:
        outcome = outage(site, AWAY_S_QUICK if given.quick else given.away)
    show(outcome)
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    return 1 if given.check and not outcome.is_well else 0


if __name__ == "__main__":
    sys.exit(main())
