"""``bunk-control router``: one more router, on any box, as a process of its own.

Covers: its options and their checks, logging, running until SIGTERM, and its exit status. Does not cover:
what it does (``control.router_process``).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from control.authority import parse_node
from control.config import parse_address
from control.router_process import Router, RouterConfig
from control.state import AlreadyRunning, lock_data_dir
from packer.doors import want_descriptors
from packer.identity import BadIdentity
from packer.joining import token_of_input
from packer.tls_buffers import shrink_tls_buffers
from packer.types import BadValue

LISTEN_DEFAULT = "127.0.0.1:8090"
URL_CHARS_MAX = 256


def parse_router(arguments: Sequence[str]) -> RouterConfig:
    """Parse the arguments of ``bunk-control router``; exits with status 2 and a message when they are
    wrong."""
    parser = argparse.ArgumentParser(
        prog="bunk-control router",
        description="One more router: tenants call it as they call control, any number of them behind a TCP "
        "load balancer.",
    )
    parser.add_argument("--control", metavar="URL", required=True, help="control's node URL (https://…)")
    parser.add_argument("--data-dir", type=Path, required=True, help="its identity lives here")
    parser.add_argument(
        "--join-token-file",
        type=Path,
        help="file with a token of `bunk router token create`, - for standard input",
    )
    parser.add_argument("--name", default=None, help="this router's name (default: the host name)")
    parser.add_argument(
        "--listen", default=LISTEN_DEFAULT, help="where tenants call it (default %(default)s)"
    )
    parser.add_argument(
        "--advertise-url", default="", metavar="URL", help="what `bunk router ls` says of where it is called"
    )
    parser.add_argument(
        "--plain-routes",
        action="store_true",
        help="also send requests in plain HTTP, to nodes that run with --route-listen off: for a network "
        "that encrypts by itself",
    )
    parser.add_argument("--ready-file", type=Path, help="written as JSON once it listens")
    given = parser.parse_args(arguments)
    default_name = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower()).strip("-")[:63] or "router"
    try:
        if not given.control.startswith("https://"):
            raise BadValue(
                "--control", f"{given.control[:120]!r}: the line is TLS only, write https://HOST:PORT"
            )
        if len(given.advertise_url) > URL_CHARS_MAX:
            raise BadValue("--advertise-url", f"at most {URL_CHARS_MAX} characters")
        return RouterConfig(
            data_dir=given.data_dir,
            control_url=given.control,
            name=parse_node(given.name or default_name, "--name"),
            listen=parse_address(given.listen, "--listen"),
            token_file=given.join_token_file,
            ready_file=given.ready_file,
            plain_routes=given.plain_routes,
            url=given.advertise_url,
        )
    except BadValue as error:
        parser.error(str(error))


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 after an orderly stop, 1 when it can not start or may route no more."""
    config = parse_router(arguments)
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # see ``control.__main__``
    want_descriptors()
    # A core dump would hold keys and prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_data_dir(config.data_dir)
        token_file = token_of_input(config.token_file, config.data_dir)
        asyncio.run(serve(replace(config, token_file=token_file)))
    except AlreadyRunning:
        print(f"bunk-control router: another process uses {config.data_dir}", file=sys.stderr)
        return 1
    except (BadIdentity, OSError) as error:
        print(f"bunk-control router: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(config: RouterConfig) -> None:
    """Run until SIGTERM or SIGINT. Raises ``BadIdentity`` when it may route no more."""
    shrink_tls_buffers()
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    router = Router(config)
    await router.start()
    ended = {asyncio.create_task(asked.wait()), failed := asyncio.create_task(router.failed())}
    await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
    logging.getLogger("bunk.router").info("stopping")
    await router.stop()
    if failed.done() and not failed.cancelled():
        raise failed.result()
