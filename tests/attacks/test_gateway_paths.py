"""Threat: a path written in an unusual way means one model to a check and another to a look-up.

Covers: encoded, doubled, dotted and overlong spellings of a foreign and of an absent model on the gateway;
each must be answered alike, and none may reach the other tenant's model. Paths are sent as raw bytes, since
clients tidy them. Does not cover: the same on control (``test_router_paths``).
"""

from __future__ import annotations

import json

import pytest
from fake_node import FakeNode, served
from path_spellings import OIP_VARIANTS, VARIANTS, get_raw, post_raw


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
