"""Threat: a path written in an unusual way means one model to a check and another to a look-up.

Covers: encoded, doubled, dotted and overlong spellings of a foreign and of an absent model on the gateway;
each must be answered alike, and none may reach the other tenant's model. Paths are sent as raw bytes, since
clients tidy them. Does not cover: the same on the router.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_node import FakeNode, served

# {m} is the foreign tenant's model "secret", or "absent", which nobody has.
VARIANTS = [
    "/v1/models/globex/{m}",
    "/v1/models/globex%2F{m}",
    "/v1/models/globex%2f{m}",
    "/v1/models/globex%252F{m}",
    "/v1/models/globex%25252F{m}",
    "/v1/models/globex//{m}",
    "/v1/models//globex/{m}",
    "/v1/models/%2Fglobex/{m}",
    "/v1/models/globex/{m}/",
    "/v1/models/globex/{m}%2F",
    "/v1/models/globex/{m}%00",
    "/v1/models/globex/{m}%0a",
    "/v1/models/globex/{m}%20",
    "/v1/models/globex/{m};x",
    "/v1/models/globex/{m}?tenant=globex",
    "/v1/models/globex/{m}#acme/embed",
    "/v1/models/globex/{m}@latest",
    "/v1/models/globex/{m}%40latest",
    "/v1/models/globex/{m}@0123456789abcdef",
    "/v1/models/globex/{m}@0123456789ABCDEF",
    "/v1/models/acme/../globex/{m}",
    "/v1/models/acme%2F..%2Fglobex%2F{m}",
    "/v1/models/acme/%2e%2e/globex/{m}",
    "/v1/models/acme/%2E%2E%2Fglobex%2F{m}",
    "/v1/models/acme/embed/../../globex/{m}",
    "/v1/models/acme/embed%2F..%2F..%2Fglobex%2F{m}",
    "/v1/models/./globex/{m}",
    "/v1/models/%2e/globex/{m}",
    "/v1/models/acme\\globex/{m}",
    "/v1/models/acme%5C..%5Cglobex%5C{m}",
    "/v1/models/GLOBEX/{m}",
    "/v1/models/%67lobex/{m}",
    "/v1/models/globex%EF%BC%8F{m}",
    "/v1/models/globex%C0%AF{m}",
    "/v1/models/globex%FF/{m}",
    "/v1/models/acme,globex/{m}",
    "/v1/models/acme%00globex/{m}",
    "/v1/models/" + "x" * 7000 + "/{m}",
]

# The same below /v2, with and without a word after the model; and versions, which only it writes as a part.
OIP_VARIANTS = [
    variant.replace("/v1/", "/v2/").replace("{m}", "{m}" + word)
    for variant in VARIANTS
    for word in ("", "/ready", "/config", "/stats", "%2Fstats")
] + [
    "/v2/models/globex/{m}/versions/0123456789abcdef",
    "/v2/models/globex/{m}/versions/latest/ready",
    "/v2/models/globex/{m}/versions/../stats",
    "/v2/models/globex/{m}/versions/",
    "/v2/models/globex/{m}/versions/0123456789abcdef/versions/0123456789abcdef",
    "/v2/models/globex/{m}@0123456789abcdef/versions/0123456789abcdef",
    "/v2/models/acme/embed/versions/../../globex/{m}",
    "/v2/models/acme/embed/versions/0123456789abcdef%2F..%2F..%2Fglobex%2F{m}",
    "/v2/models/globex/{m}/infer",
    "/v2/repository/models/globex/{m}/load",
]


async def get_raw(url: str, path: str, key: str) -> tuple[int, str]:
    """Send the path as it is written; status and body."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET {path} HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(10):
        answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


async def answers_of(url: str, variant: str, key: str) -> list[tuple[int, str]]:
    """To the foreign and to the absent model, without their names."""
    answers = []
    for model in ("secret", "absent"):
        status, body = await get_raw(url, variant.replace("{m}", model), key)
        answers.append((status, body.replace(model, "MODEL")))
    return answers


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one[11:60])
async def test_a_foreign_model_answers_as_an_absent_one_however_it_is_written(variant: str) -> None:
    node = FakeNode()
    async with served(node) as url:
        answers = await answers_of(url, variant, node.acme)
    assert answers[0] == answers[1]
    assert answers[0][0] in (400, 404)
    assert "globex/secret@" not in answers[0][1]
    assert "created" not in answers[0][1]


async def test_the_same_under_the_open_inference_protocol() -> None:
    node = FakeNode()
    async with served(node) as url:
        for variant in OIP_VARIANTS:
            answers = await answers_of(url, variant, node.acme)
            assert answers[0] == answers[1], variant
            assert answers[0][0] in (400, 404, 405), variant
            assert "platform" not in answers[0][1]
            assert "model_stats" not in answers[0][1]
    assert len(OIP_VARIANTS) > 150


async def test_an_inference_with_a_foreign_model_is_one_with_an_absent_one() -> None:
    """A body that would be refused is not even read: nothing of it can differ by the model."""
    node = FakeNode()
    spellings = ("globex/{m}", "globex%2F{m}", "acme/../globex/{m}", "globex/{m}/versions/0123456789abcdef")
    async with served(node) as url:
        for spelling in spellings:
            for body in (b"", b"{}", b"{" * 100):
                answers = []
                for name in ("secret", "absent"):
                    path = f"/v2/models/{spelling.replace('{m}', name)}/infer"
                    status, answer = await post_raw(url, path, node.acme, body)
                    answers.append((status, answer.replace(name, "MODEL")))
                assert answers[0] == answers[1]
                assert answers[0][0] == 404
    assert node.events == []


@pytest.mark.parametrize(
    "variant",
    [
        "acme/embed",
        "acme%2Fembed",
        "acme%2fembed",
        "%61cme/embed",
        "acme/embed@latest",
        "acme/embed%40latest",
    ],
)
async def test_a_tenants_own_model_is_found_however_it_is_rightly_written(variant: str) -> None:
    """The rule above must not be kept by finding nothing at all."""
    node = FakeNode()
    async with served(node) as url:
        status, body = await get_raw(url, f"/v1/models/{variant}", node.acme)
    assert status == 200
    assert json.loads(body)["id"] == "acme/embed"


@pytest.mark.parametrize(
    "model",
    [
        "globex/{m}",
        "acme/../globex/{m}",
        "globex%2F{m}",
        "globex/{m}\u0000",
        "globex/{m}\n",
        " globex/{m}",
        "globex/{m}@latest",
        "globex\\{m}",
        "\uff47lobex/{m}",
        "globex/{m}" * 1000,
    ],
)
async def test_the_same_in_a_body(model: str) -> None:
    """A body's model is not a path: it is never percent-decoded."""
    node = FakeNode()
    async with served(node) as url:
        answers = []
        for name in ("secret", "absent"):
            body = json.dumps({"model": model.replace("{m}", name), "input": "a"})
            status, answer = await post_raw(url, "/v1/embeddings", node.acme, body.encode())
            answers.append((status, answer.replace(name, "MODEL")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert node.events == []


async def post_raw(url: str, path: str, key: str, body: bytes) -> tuple[int, str]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    async with asyncio.timeout(10):
        answer = (await reader.read()).decode()
    writer.close()
    head, _, text = answer.partition("\r\n\r\n")
    return int(head.split()[1]), text
