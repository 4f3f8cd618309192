"""What a TLS connection that waits holds in memory.

Covers: the buffer that Python's asyncio makes for each connection before a byte of it has come. Does not
cover: OpenSSL's own, some tens of KiB.

A control server has a connection of each node, which waits nearly always. asyncio allots each of them
256 KiB to read into, and writes zeros over it, so that all of it is really taken. A TLS record has 16 KiB at
most: what comes is read in several steps instead of one.
"""

from __future__ import annotations

from asyncio import sslproto

from packer.types import KIB

READ_BYTES = 32 * KIB


def shrink_tls_buffers() -> None:
    """For every TLS connection that this process makes or takes from now on."""
    sslproto.SSLProtocol.max_size = READ_BYTES
