"""Threat: a path written in an unusual way shows that another tenant has a model, on control's listener.

Covers: every spelling of ``path_spellings`` on the router and the management API, for reading, changing and
deleting; tenants and uploads by name. Each must be answered as what does not exist. Does not cover: the
node's gateway (``test_gateway_paths``) or plain spellings on every route (``test_control_auth``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from path_spellings import OIP_VARIANTS, VARIANTS, get_raw, post_raw, send_raw
from running_control import Running, declare, model_files, running

MANAGED = [variant.replace("/v1/", "/api/v1/") for variant in VARIANTS]
# A tenant that is there, or one of as many letters that is not.
TENANTS = [
    "/api/v1/tenants/{m}",
    "/api/v1/tenants/{m}/",
    "/api/v1/tenants/{m}%20",
    "/api/v1/tenants/%2e/{m}",
    "/api/v1/tenants/acme/../{m}",
    "/api/v1/tenants/acme%2F..%2F{m}",
    "/api/v1/tenants/{m}%2Fquota",
    "/api/v1/tenants/{m}/quota",
    "/api/v1/tenants/{m}/keys",
    "/api/v1/tenants/{m}/uploads",
    "/api/v1/tenants/{m}/nonsense",
    "/api/v1/tenants/{m};acme/quota",
    "/api/v1/tenants/{m}%00/quota",
    "/api/v1/tenants//{m}/quota",
    "/api/v1/models?tenant={m}",
    "/api/v1/models?tenant={m}%20",
    "/api/v1/models?tenant={m}&tenant=acme",
    "/api/v1/ps?tenant={m}",
    "/api/v1/events?tenant={m}",
    "/api/v1/plan?model={m}/secret",
    "/api/v1/explain?model={m}%2Fsecret",
    "/api/v1/route?model={m}/secret",
]


@dataclass(slots=True)
class Site:
    """acme asks; globex has the model ``secret`` and an upload."""

    control: Running
    acme: str
    upload_id: str

    async def both(
        self, method: str, variant: str, names: Sequence[str] = ("secret", "absent")
    ) -> list[tuple[int, str]]:
        """The answers for what is there and for what is not, without the names."""
        answers = []
        for name in names:
            path = variant.replace("{m}", name)
            status, body = await send_raw(self.control.url, method, path, self.acme)
            answers.append((status, body.replace(name, "NAME")))
        return answers


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        acme = await control.tenant("acme")
        await control.tenant("globex")
        await control.push("acme", "embed", model_files())
        await control.push("globex", "secret", model_files(1))
        made = await control.call("POST", "/api/v1/tenants/globex/uploads", declare("new", model_files(2)))
        yield Site(control, acme, made.json()["upload_id"])


async def test_models_in_every_spelling(site: Site) -> None:
    for method, variants in (
        ("GET", [*VARIANTS, *OIP_VARIANTS, *MANAGED]),
        ("DELETE", [*VARIANTS[:5], *MANAGED]),
        ("PATCH", MANAGED),
        ("POST", [*VARIANTS[:12], *OIP_VARIANTS[::7], *MANAGED[:12]]),
    ):
        for variant in variants:
            there, absent = await site.both(method, variant)
            assert there == absent, (method, variant)
            assert there[0] in (400, 404, 405), (method, variant)
    kept = (await site.control.call("GET", "/api/v1/models?tenant=globex")).json()["items"]
    assert len(kept) == 1


async def test_tenants_in_every_spelling(site: Site) -> None:
    for method in ("GET", "POST", "DELETE", "PUT"):
        for variant in TENANTS:
            there, absent = await site.both(method, variant, ("globex", "nobody"))
            assert there == absent, (method, variant)
            # Most of them are another's thing or no route at all; the rest is the operator's.
            assert there[0] in (400, 403, 404, 405), (method, variant)
    assert len(TENANTS) > 20


async def test_uploads_in_every_spelling(site: Site) -> None:
    names = (site.upload_id, "f" * len(site.upload_id))
    for end in ("", "/", "/commit", "/files/config.json", "/files/..%2Fconfig.json", "%2Fcommit", "%00"):
        for method in ("GET", "POST", "PATCH", "DELETE"):
            there, absent = await site.both(method, f"/api/v1/uploads/{{m}}{end}", names)
            assert there == absent, (method, end)
            assert there[0] in (400, 404, 405), (method, end)
    assert (await site.control.call("GET", f"/api/v1/uploads/{site.upload_id}")).status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/classify", "/v1/none"])
async def test_models_in_a_body(site: Site, path: str) -> None:
    for model in ("globex/{m}", "globex%2F{m}", "acme/../globex/{m}", "globex/{m}@latest", " globex/{m}"):
        answers = []
        for name in ("secret", "absent"):
            body = b'{"model": "%s", "input": 5}' % model.replace("{m}", name).encode()
            status, text = await post_raw(site.control.url, path, site.acme, body)
            answers.append((status, text.replace(name, "NAME")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404


async def test_a_tenants_own_model_is_found_however_it_is_rightly_written(site: Site) -> None:
    for start in ("/v1/models/", "/v2/models/", "/api/v1/models/"):
        for spelling in ("acme/embed", "acme%2Fembed", "%61cme/embed"):
            assert (await get_raw(site.control.url, start + spelling, site.acme))[0] == 200
