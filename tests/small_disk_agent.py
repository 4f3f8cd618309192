"""The agent as it is, with a data directory on a small file system of its own: a tmpfs in a mount namespace.

Covers: making it before the agent starts; whoever may not make one ends with the status ``NOT_ALLOWED``.
Others reach it through ``/proc/PID/root``. Does not cover: filling it (``test_node_disk``).
"""

from __future__ import annotations

import ctypes
import os
import sys

from agent import pack_making, packs
from agent.__main__ import main

SIZE_BYTES = 64 * 1024 * 1024
NOT_ALLOWED = 77
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_REC, _PRIVATE = 0x4000, 0x40000


def mount_small(directory: str) -> None:
    """Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(_NEWNS | _NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    check(libc.mount(b"none", b"/", None, _REC | _PRIVATE, None))
    check(libc.mount(b"tmpfs", directory.encode(), b"tmpfs", 0, f"size={SIZE_BYTES}".encode()))


if __name__ == "__main__":
    directory = sys.argv[sys.argv.index("--data-dir") + 1]
    os.makedirs(directory, mode=0o700, exist_ok=True)
    try:
        mount_small(directory)
    except OSError as error:
        print(f"no small disk here: {error}", file=sys.stderr)
        sys.exit(NOT_ALLOWED)
    # Of what is kept free for others there is none on so small a disk.
    packs.DISK_FREE_FLOOR_BYTES = 0
    pack_making.DISK_FREE_FLOOR_BYTES = 0  # type: ignore[attr-defined]
    main()
