"""The agent's configuration: command line and environment into one frozen value.

Covers: every option of ``bunk-agent run`` with its default and limits. Does not cover: quotas and
models, which come from control in the plan.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.devices import DeviceConfig, inventory
from packer.events import Event, LendingChosen, PolicyChosen, PrefetchChosen
from packer.lending import MARGIN_PERCENT, MARGIN_PERCENT_MAX
from packer.policies import POLICY_NAMES
from packer.types import GIB, MIB, BadValue, HostForm, parse_budget, parse_bytes

# The restore of a large model from a slow origin takes minutes; a caller that waits longer than this
# is better served by an error that says when to come back.
REQUEST_TIMEOUT_S_DEFAULT = 300
# Each takes a context on its device and some 50 MiB of memory; tenants do not come by the dozen at once.
STANDBYS_MAX = 8
NODE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate chain and its key, as an operator keeps them for tenants."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class AgentConfig:
    data_dir: Path
    control_url: str | None  # None: serve the last plan only, never call out
    join_token_file: Path | None
    control_store: Path | None  # control's model directory, when it is on this machine
    name: str
    listen_host: str
    listen_port: int
    advertise_url: str | None
    devices: tuple[DeviceConfig, ...]
    host_budget_bytes: int
    disk_budget_bytes: int
    request_timeout_ms: int
    threads: int
    ready_file: Path | None
    log_level: str
    calibrate: bool = True  # measure this box in the background when its rates are not known
    host_form: HostForm | None = None  # None: what the rates say
    peer_listen: tuple[str, int] | None = None  # None: packs are given to nobody
    peer_url: str | None = None  # where other nodes reach that, when it differs
    peer_rate_bytes_s: int = GIB
    route_listen: tuple[str, int] | None = None  # None: control's router can not reach this node
    route_url: str | None = None  # where control reaches that, when it differs
    tls: TlsFiles | None = None  # of ``listen``; None: it speaks plain HTTP
    policy: str = "keep"
    regret_every_s: int = 3600
    lending_margin_percent: int = MARGIN_PERCENT
    prefetch: bool = True
    standbys: int = 1  # workers kept ready per device

    def choices(self) -> tuple[Event, ...]:
        """What the operator chose for the core, as it is told at the start."""
        return (
            PolicyChosen(self.policy),
            LendingChosen(self.lending_margin_percent),
            PrefetchChosen(self.prefetch),
        )


def node_name(text: str) -> str:
    """A node's name from what the user or the machine calls it; raises ``BadValue``."""
    if not NODE_NAME.fullmatch(text):
        raise BadValue("--name", f"{text[:80]!r}: use 1 to 63 of a-z, 0-9 and '-', as in a host name")
    return text


def parse_listen(text: str, field: str = "--listen") -> tuple[str, int]:
    """``HOST:PORT``, ``[::1]:PORT``; port 0 picks a free one. Raises ``BadValue``."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BadValue(field, f"{text[:80]!r}: write HOST:PORT, for example 127.0.0.1:8100")
    return host.strip("[]") or "127.0.0.1", int(port)


def _host_budget_default_bytes() -> int:
    """A quarter of the machine's memory, at most 64 GiB until somebody asks for more."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(64 * GIB, memory // 4)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bunk-agent", description="Bunkhouse node agent: one per GPU box.")
    commands = parser.add_subparsers(dest="command", required=True)
    # Commands of their own, with their own parsers (``agent/__main__.py``): named here for --help.
    commands.add_parser("calibrate", help="measure this box and keep what was found", add_help=False)
    commands.add_parser("check", help="say what about this box is slow or unsafe", add_help=False)
    commands.add_parser("rotate-key", help="replace the key that wraps all keys", add_help=False)
    run = commands.add_parser("run", help="serve this box's devices")
    run.add_argument("--data-dir", type=Path, required=True, help="packs, journal and identity live here")
    run.add_argument("--control", metavar="URL", help="control's node URL (https://…)")
    run.add_argument(
        "--join-token-file",
        type=Path,
        help="file with a token of `bunk node token create`, - for standard input",
    )
    run.add_argument(
        "--control-store",
        type=Path,
        metavar="DIR",
        help="control's `models` directory, when control runs on this machine: read without a detour",
    )
    run.add_argument("--name", default=None, help="this node's name (default: the host name)")
    run.add_argument("--listen", default="127.0.0.1:8100", help="tenants' HTTP surface (default %(default)s)")
    run.add_argument("--advertise-url", help="where routers reach --listen, when that differs")
    _add_tls_options(run)
    run.add_argument(
        "--peer-listen",
        default="auto",
        metavar="HOST:PORT",
        help="where this node gives packs to the other nodes of its cluster, over mutual TLS; auto: a free "
        "port at the host of --listen; off: it gives none (default %(default)s)",
    )
    run.add_argument(
        "--peer-url", metavar="URL", help="where other nodes reach --peer-listen, when that differs"
    )
    run.add_argument(
        "--peer-rate",
        default="1GiB",
        metavar="SIZE",
        help="bytes per second that other nodes may fetch here, all together (default %(default)s)",
    )
    run.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="D",
        help="cpu:SIZE, cuda, cuda:INDEX or cuda:UUID; repeatable (default: all GPUs, else one cpu device)",
    )
    _add_memory_options(run)
    run.add_argument("--ready-file", type=Path, help="JSON with the gateway's URL, written when it listens")
    run.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _add_tls_options(run: argparse.ArgumentParser) -> None:
    """Who reaches the gateway how."""
    run.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve --listen over TLS: PEM chain")
    run.add_argument("--tls-key", type=Path, metavar="FILE", help="the key of --tls-cert, PEM")
    run.add_argument(
        "--route-listen",
        default="auto",
        metavar="HOST:PORT",
        help="where control's router calls this node, over mutual TLS; auto: a free port at the host of "
        "--listen; off: tenants call it directly only (default %(default)s)",
    )
    run.add_argument(
        "--route-url", metavar="URL", help="where control reaches --route-listen, when it differs"
    )


def _add_memory_options(run: argparse.ArgumentParser) -> None:
    """What the node may hold, in which form, and what goes first."""
    run.add_argument("--host-bytes", metavar="SIZE", help="budget of the host-RAM tier (default: RAM/4)")
    run.add_argument("--disk-bytes", default="100GiB", metavar="SIZE", help="budget of the disk tier")
    run.add_argument(
        "--request-timeout",
        type=int,
        default=REQUEST_TIMEOUT_S_DEFAULT,
        metavar="SECONDS",
        help="longest wait of a request for its model (default %(default)s)",
    )
    run.add_argument(
        "--standbys",
        type=int,
        default=1,
        help="workers kept ready per device for who comes next (default: 1)",
    )
    run.add_argument("--threads", type=int, default=0, help="compute threads per worker (default: cores)")
    run.add_argument(
        "--host-form",
        default="auto",
        choices=("auto", *(form.value for form in HostForm)),
        help="how the host tier keeps weights; auto: the smallest form that is nearly as fast as the fastest "
        "on this box (default %(default)s)",
    )
    run.add_argument(
        "--calibrate",
        default="auto",
        choices=("auto", "off"),
        help="auto: measure this box once it is idle, when its rates are not known yet (default %(default)s)",
    )
    run.add_argument(
        "--regret-every",
        type=int,
        default=3600,
        metavar="SECONDS",
        help="how often the log of uses is replayed against the clairvoyant optimum (default %(default)s); "
        "SIGUSR2 asks for it now",
    )
    run.add_argument(
        "--policy",
        default="keep",
        choices=POLICY_NAMES,
        help="what is evicted first: keep, the least expected use x restore time per byte, learned per "
        "model; the others are the classics to compare with, about whole models; ttl also unloads after five "
        "idle minutes (default %(default)s)",
    )

    run.add_argument(
        "--lending-margin",
        type=int,
        default=MARGIN_PERCENT,
        metavar="PERCENT",
        help="reserved device bytes are lent while credit covers this share of what their tenant may lose: "
        "100 never leaves it worse off than alone on them, 0 lends on any credit (default %(default)s)",
    )
    run.add_argument(
        "--prefetch",
        default="on",
        choices=("on", "off"),
        help="while nobody needs the disk, bring packs that are likely to be used again into free host "
        "memory, which pays after a restart (default %(default)s)",
    )


def load(argv: Sequence[str]) -> AgentConfig:
    """Parse ``bunk-agent run …``; raises ``BadValue`` naming the option."""
    options = arguments().parse_args(argv)
    host, port = parse_listen(options.listen)
    control_url = options.control
    if control_url is not None and not control_url.startswith("https://"):
        raise BadValue("--control", f"{control_url[:120]!r}: the uplink is TLS only, write https://HOST:PORT")
    default_name = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower()).strip("-")[:63] or "node"
    host_bytes = options.host_bytes
    if options.request_timeout < 1 or options.request_timeout > 3600:
        raise BadValue("--request-timeout", "must be 1 to 3600 seconds")
    if options.threads < 0 or options.threads > 1024:
        raise BadValue("--threads", "must be 0 (all cores) to 1024")
    if not 0 <= options.standbys <= STANDBYS_MAX:
        raise BadValue("--standbys", f"must be 0 (none) to {STANDBYS_MAX} per device")
    if not 0 <= options.lending_margin <= MARGIN_PERCENT_MAX:
        raise BadValue("--lending-margin", f"must be 0 to {MARGIN_PERCENT_MAX} percent")
    disk_budget_bytes = parse_budget(options.disk_bytes, "--disk-bytes")
    return AgentConfig(
        data_dir=options.data_dir,
        control_url=control_url,
        join_token_file=options.join_token_file,
        control_store=options.control_store,
        name=node_name(options.name or default_name),
        listen_host=host,
        listen_port=port,
        advertise_url=options.advertise_url,
        devices=inventory(options.device),
        host_budget_bytes=parse_budget(host_bytes, "--host-bytes")
        if host_bytes
        else _host_budget_default_bytes(),
        disk_budget_bytes=disk_budget_bytes,
        request_timeout_ms=options.request_timeout * 1000,
        threads=options.threads or os.cpu_count() or 1,
        standbys=options.standbys,
        ready_file=options.ready_file,
        log_level=options.log_level,
        calibrate=options.calibrate == "auto",
        host_form=None if options.host_form == "auto" else HostForm(options.host_form),
        policy=options.policy,
        regret_every_s=_regret_every_s(options.regret_every),
        lending_margin_percent=options.lending_margin,
        prefetch=options.prefetch == "on",
        peer_listen=_listen_or_off(options.peer_listen, host, "--peer-listen"),
        peer_url=_tls_url(options.peer_url, "--peer-url"),
        route_listen=_listen_or_off(options.route_listen, host, "--route-listen"),
        route_url=_tls_url(options.route_url, "--route-url"),
        tls=_tls_files(options.tls_cert, options.tls_key),
        peer_rate_bytes_s=_peer_rate(options.peer_rate),
    )


def _regret_every_s(seconds: int) -> int:
    if not 1 <= seconds <= 7 * 86_400:
        raise BadValue("--regret-every", "must be 1 to 604800 seconds (a week)")
    return seconds


def _listen_or_off(text: str, host: str, field: str) -> tuple[str, int] | None:
    if text == "off":
        return None
    return (host, 0) if text == "auto" else parse_listen(text, field)


def _tls_url(url: str | None, field: str) -> str | None:
    if url is not None and not re.fullmatch(r"https://[!-~]{1,240}:[0-9]{1,5}", url):
        raise BadValue(field, f"{url[:120]!r}: this is TLS only, write https://HOST:PORT")
    return url


def _tls_files(certificate: Path | None, key: Path | None) -> TlsFiles | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise BadValue("--tls-cert, --tls-key", "give both files, or neither for plain HTTP")
    return TlsFiles(certificate, key)


def _peer_rate(text: str) -> int:
    """Slower than this, readers would take themselves for cut off."""
    rate_bytes_s = parse_bytes(text, "--peer-rate")
    if rate_bytes_s < 8 * MIB:
        raise BadValue(
            "--peer-rate", "must be at least 8MiB (a second); to give no packs use --peer-listen off"
        )
    return rate_bytes_s
