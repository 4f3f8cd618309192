"""``bunk-control``: parse the command line, set up logging, serve. Everything else is elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys

from control import rotate_command, router_command, simulate_command
from control.config import parse_config
from control.server import serve
from control.state import AlreadyRunning
from control.store import StoreUnavailable
from packer.doors import want_descriptors


def main() -> None:
    """Exit status: 0 after an orderly stop, 1 when it can not start, 2 for wrong arguments."""
    if sys.argv[1:2] == ["simulate"]:
        raise SystemExit(simulate_command.main(sys.argv[2:]))
    if sys.argv[1:2] == ["rotate-ca"]:
        raise SystemExit(rotate_command.main(sys.argv[2:]))
    if sys.argv[1:2] == ["router"]:
        raise SystemExit(router_command.main(sys.argv[2:]))
    config = parse_config(sys.argv[1:])
    # Everything that control writes is its own: the CA's key, the operator's key, tenants' models.
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # What is not HTTP is answered with a 400; its log line would repeat the bytes, a key perhaps among
    # them. Faults of handlers are logged by packer.http instead, without the caller's words.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    want_descriptors()
    # A core dump would hold keys and prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        asyncio.run(serve(config))
    except AlreadyRunning as error:
        print(f"bunk-control: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (StoreUnavailable, OSError) as error:
        # A taken port, or a directory that is full or not ours: not every library says which one.
        print(f"bunk-control: can not run with --data-dir {config.data_dir}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
