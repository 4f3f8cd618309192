"""Asking a gateway in tests: the unmodified ``openai`` client, and one JSON request by plain HTTP.

Covers: what several test files ask alike. Does not cover: the gateway they ask (``fake_node``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai


@asynccontextmanager
async def client(url: str, key: str, retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries) as found:
        yield found


async def post(url: str, path: str, key: str, body: object) -> tuple[int, dict[str, str], Any]:
    """One JSON request by plain HTTP: status, headers in lower case, decoded body."""
    async with aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {key}"}
        async with session.post(url + path, json=body, headers=headers) as answer:
            lowered = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, lowered, json.loads(await answer.read())


def chat_body(**more: object) -> dict[str, object]:
    return {"model": "acme/chat", "messages": [{"role": "user", "content": "one two three"}], **more}
