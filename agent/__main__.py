"""``bunk-agent``: parse, wire up, run, stop. Reads as a table of contents of a node."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sqlite3
import ssl
import sys
from contextlib import suppress
from dataclasses import replace

from aiohttp import web

from agent import calibrate_command, check_box, rotate
from agent import config as configuration
from agent.config import AgentConfig
from agent.data_dir import hold_data_dir
from agent.gateway import GatewayConfig, build_app
from agent.node import RunningNode
from agent.scrape_key import scrape_key
from agent.workers import WorkerDead
from packer import http
from packer.doors import want_descriptors
from packer.durable import write_private
from packer.identity import BadIdentity
from packer.joining import token_of_input
from packer.types import BadValue

log = logging.getLogger("bunk.agent")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BROKEN = 70  # EX_SOFTWARE: the ledger broke; the supervisor restarts us and the journal rebuilds it
# Answers that are being written when the agent is told to stop get this long to end.
STOP_GRACE_S = 5.0
# Beside ``run``: what a person does with a box.
COMMANDS = {"rotate-key": rotate.main, "calibrate": calibrate_command.main, "check": check_box.main}


def main() -> None:
    """Entry point of the console script."""
    command = COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is not None:
        raise SystemExit(command(sys.argv[2:]))
    try:
        config = configuration.load(sys.argv[1:])
    except BadValue as error:
        print(f"bunk-agent: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    # Whatever this process or a worker writes is its own: packs, the journal, a dump of the ledger.
    os.umask(0o077)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s %(message)s"
    )
    # aiohttp prints raw request bytes when a request does not parse; a key could be among them.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    want_descriptors()
    # Core dumps would hold prompts and keys.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with hold_data_dir(config.data_dir):
            status = asyncio.run(run(_with_token_of_input(config)))
    except (OSError, sqlite3.Error, WorkerDead) as error:
        # A full or read-only disk, mostly: a person must help, a traceback would not.
        log.critical("can not run with --data-dir %s: %s", config.data_dir, error)
        status = EXIT_FAILED
    raise SystemExit(status)


def _with_token_of_input(config: AgentConfig) -> AgentConfig:
    """``--join-token-file -``: what standard input brings lies in a private file until it is spent."""
    return replace(config, join_token_file=token_of_input(config.join_token_file, config.data_dir))


async def run(config: AgentConfig) -> int:
    """Serve until a signal, a broken ledger or a deleted node ends it; returns the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    node = RunningNode(config)
    loop.add_signal_handler(signal.SIGUSR2, node.meter.look_now)
    loop.add_signal_handler(signal.SIGUSR1, lambda: node.loop.dump("asked"))
    scraper = scrape_key(config.data_dir)
    app = build_app(node, GatewayConfig(config.name, config.request_timeout_ms, scraper=scraper))
    if node.control_listener is not None:
        node.control_listener.guard(app)
    runner = http.runner(app, STOP_GRACE_S)
    try:
        if node.uplink is not None:
            node.uplink.joining.check()
        await node.start()
        await runner.setup()
        url = await _listen(config, node, runner)
        if url is None:
            return EXIT_FAILED
        log.info("gateway on %s", url)
        if config.ready_file is not None:
            ready = json.dumps({"url": url, "pid": os.getpid()})
            write_private(config.ready_file, ready.encode())
        return await _until_stopped(node, config.advertise_url or url, stop)
    except BadIdentity as error:
        log.critical("%s", error)
        return EXIT_FAILED
    finally:
        if node.control_listener is not None:
            node.control_listener.close()
        await runner.cleanup()
        await node.close()


async def _listen(config: AgentConfig, node: RunningNode, runner: web.AppRunner) -> str | None:
    """Open the tenants' listener, and the one for control's router; the former's URL, None when it fails."""
    try:
        site = web.TCPSite(runner, config.listen_host, config.listen_port, ssl_context=_tenants_tls(config))
        await site.start()
    except OSError as error:  # of TLS as well: a certificate that can not be read or is none
        log.error("--listen %s:%d: %s", config.listen_host, config.listen_port, error)
        return None
    if node.control_listener is not None:
        try:
            await node.control_listener.start(runner)
        except OSError as error:
            log.error("--route-listen: %s; control's router can not reach this node", error)
            return None
    host = f"[{config.listen_host}]" if ":" in config.listen_host else config.listen_host
    return f"{'http' if config.tls is None else 'https'}://{host}:{runner.addresses[0][1]}"


def _tenants_tls(config: AgentConfig) -> ssl.SSLContext | None:
    if config.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls.certificate, config.tls.key)
    return context


async def _until_stopped(node: RunningNode, advertise_url: str, stop: asyncio.Event) -> int:
    stopped = asyncio.create_task(stop.wait())
    uplink = asyncio.create_task(node.run_uplink(advertise_url))
    nursery = asyncio.create_task(node.nursery_died())
    try:
        await asyncio.wait((stopped, uplink, nursery, node.loop.broken), return_when=asyncio.FIRST_COMPLETED)
        if node.loop.broken.done():
            log.critical("the ledger broke: %r", node.loop.broken.result())
            return EXIT_BROKEN
        if nursery.done():
            log.critical("the nursery died; restarting is the only way to get new workers")
            return EXIT_BROKEN
        if uplink.done():
            log.critical("%s", uplink.exception())
            return EXIT_FAILED if isinstance(uplink.exception(), BadIdentity) else EXIT_BROKEN
        return 0
    finally:
        for task in (stopped, uplink, nursery):
            task.cancel()
        with suppress(BaseException):
            await asyncio.gather(stopped, uplink, nursery, return_exceptions=True)


if __name__ == "__main__":
    main()
