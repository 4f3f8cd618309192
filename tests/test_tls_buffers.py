"""What a TLS connection that waits takes in memory. Does not cover: what is read over it."""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto

import pytest

from packer.tls_buffers import READ_BYTES, shrink_tls_buffers


async def test_a_connection_is_given_no_more_than_it_reads_at_one_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = sslproto.SSLProtocol.max_size
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", usual)  # put back afterwards
    shrink_tls_buffers()
    waiter = asyncio.get_running_loop().create_future()
    made = sslproto.SSLProtocol(
        asyncio.get_running_loop(), asyncio.Protocol(), ssl.create_default_context(), waiter, False, "box"
    )
    # The name is Python's own affair: were it another one some day, this would be as large as ever.
    assert len(made._ssl_buffer) == READ_BYTES < usual
