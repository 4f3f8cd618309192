"""Command line of the control server, parsed into one immutable value.

Covers: options, their defaults and their checks. Does not cover: limits that nobody needs to change
(each is a constant beside the code that it protects).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packer.types import GIB, BadValue, parse_bytes

LISTEN_DEFAULT = "127.0.0.1:8080"
NODE_LISTEN_DEFAULT = "127.0.0.1:8443"
# What one tenant may keep in control's own store, versions and open uploads together.
TENANT_STORE_BYTES_DEFAULT = 256 * GIB
# An upload that nobody touched for this long is removed.
UPLOAD_LIFE_S_DEFAULT = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int  # 0: any free one

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that an operator chooses."""

    data_dir: Path
    listen: Address = Address("127.0.0.1", 0)
    node_listen: Address = Address("127.0.0.1", 0)
    ready_file: Path | None = None
    # Directories (or URL prefixes such as s3://bucket/models) below which origins may be registered.
    origin_roots: tuple[str, ...] = ()
    # Further names under which nodes reach the node listener; they go into its certificate.
    node_hosts: tuple[str, ...] = ()
    # Whether requests may go to nodes that have no listener for mutual TLS.
    plain_routes: bool = False
    tenant_store_bytes: int = TENANT_STORE_BYTES_DEFAULT
    upload_life_s: int = UPLOAD_LIFE_S_DEFAULT
    # Whether tenants' programs are told where they can call nodes themselves.
    direct: bool = True


def parse_address(text: str, field: str) -> Address:
    """Parse ``host:port`` or ``[v6]:port``; raises ``BadValue``."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise BadValue(field, f"{text[:80]!r} is not an address: write host:port, for example 0.0.0.0:8080")
    return Address(host, int(port))


def _origin_root(root: str) -> str:
    """A root as it is written. A directory that is not there is a typing error, found at the start."""
    path = root.removeprefix("file://")
    if "://" not in path and not os.path.isdir(path):
        raise BadValue(
            "--origin-root", f"{root[:80]!r} is not a directory: create it, or leave the option out"
        )
    return root


def parse_config(arguments: Sequence[str]) -> Config:
    """Parse the arguments of ``bunk-control``; exits with status 2 and a message when they are wrong."""
    parser = argparse.ArgumentParser(prog="bunk-control", description="Bunkhouse's control server.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the control server until SIGTERM or SIGINT")
    serve.add_argument("--data-dir", type=Path, required=True, help="where all of control's state lives")
    serve.add_argument(
        "--listen", default=LISTEN_DEFAULT, help="address of the API and the router (default %(default)s)"
    )
    serve.add_argument(
        "--node-listen", default=NODE_LISTEN_DEFAULT, help="address that nodes dial (default %(default)s)"
    )
    serve.add_argument(
        "--node-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name or IP address under which nodes reach --node-listen (repeatable)",
    )
    serve.add_argument("--ready-file", type=Path, help="written as JSON once both listeners are open")
    serve.add_argument(
        "--origin-root",
        action="append",
        default=[],
        metavar="DIR|URL",
        help="directory or URL prefix below which operators may register origins (repeatable)",
    )
    serve.add_argument(
        "--tenant-store-bytes",
        default=str(TENANT_STORE_BYTES_DEFAULT),
        metavar="SIZE",
        help="bytes that one tenant's uploads may take here, for example 100GiB (default %(default)s)",
    )
    serve.add_argument(
        "--plain-routes",
        action="store_true",
        help="also send requests in plain HTTP, to nodes that run with --route-listen off: for a network "
        "that encrypts by itself",
    )
    serve.add_argument(
        "--direct",
        default="on",
        choices=("on", "off"),
        help="tell tenants' programs where they can call nodes themselves; off: all calls pass here "
        "(default %(default)s)",
    )
    # Only for the list of commands: ``control.__main__`` sends these to their own modules.
    commands.add_parser("router", help="run one more router, on any box (--help for more)", add_help=False)
    commands.add_parser("simulate", help="replay a trace on a fleet that you describe (--help for more)")
    commands.add_parser("rotate-ca", help="replace the cluster's CA while its nodes go on", add_help=False)
    given = parser.parse_args(arguments)
    try:
        return Config(
            data_dir=given.data_dir,
            listen=parse_address(given.listen, "--listen"),
            node_listen=parse_address(given.node_listen, "--node-listen"),
            ready_file=given.ready_file,
            origin_roots=tuple(_origin_root(root) for root in given.origin_root),
            node_hosts=tuple(given.node_host),
            plain_routes=given.plain_routes,
            tenant_store_bytes=parse_bytes(given.tenant_store_bytes, "--tenant-store-bytes"),
            direct=given.direct == "on",
        )
    except BadValue as error:
        parser.error(str(error))
