"""Threat: tensors that cost the node more than their caller, break a handler, or tell of others.

Covers: shapes that overflow, sizes that lie, lists nested a million deep or wide, a million tensors, cut and
mutated bodies (peak memory measured), bodies held by one tenant, and spellings of foreign models through the
router. Does not cover: the same of OpenAI's routes (``test_gateway_bodies.py``), or paths at the node
(``test_gateway_paths.py``).
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
from pathlib import Path

import aiohttp
import pytest
from fake_node import FakeNode, echo_spec, served, spec_of
from gateway_process import own_process, peak_bytes
from json_pieces import JSON_PIECES
from oip_http import HEADER_LENGTH, call, declare, get, infer, json_input, packed, raw_input, texts
from running_control import model_files, running

from agent.oip_tensors import read_inference
from packer.body_budget import BODIES_BYTES_MAX, LARGE_PERCENT, OWNER_BODIES_BYTES_MAX
from packer.http import JSON_BYTES_MAX, ApiError
from packer.oip import TENSOR_BODY_BYTES_MAX, TENSOR_JSON_BYTES_MAX
from packer.types import MIB, PORT_SIZE_MAX, Task, TensorPort, TensorSignature

# The JSON of a request is at most 4 MiB; every way to make it large in memory stays below this.
JSON_GROWTH_BYTES_MAX = 160 * MIB
# A request of 64 MiB: its order, the engine's answer and the answer sent were measured as three times it.
RAW_GROWTH_BYTES_MAX = 4 * TENSOR_BODY_BYTES_MAX


def filled(head: bytes, piece: bytes, tail: bytes, between: bytes = b",") -> bytes:
    """``piece`` as often as a body of the greatest length holds it."""
    times = (TENSOR_JSON_BYTES_MAX - len(head) - len(tail)) // (len(piece) + len(between))
    return head + between.join([piece] * times) + tail


DATA = b'{"inputs": [{"name": "x0", "datatype": "FP32", "shape": [%d, 2], "data": '
EXPANDING = {
    "numbers": filled(DATA % 1_000_000 + b"[", b"1", b"]}]}"),
    "fractions": filled(DATA % 1_000_000 + b"[", b"1.5", b"]}]}"),
    "empty lists": filled(DATA % 1_000_000 + b"[", b"[]", b"]}]}"),
    "pairs": filled(DATA % 1_000_000 + b"[", b"[1,1]", b"]}]}"),
    "deep lists": filled(DATA % 1 + b"[", b"[", b"", b""),
    "inputs": filled(b'{"inputs": [', b'{"name":"","shape":[],"datatype":""}', b"]}"),
    "objects": filled(b'{"inputs": [', b"{}", b"]}"),
    "dimensions": filled(b'{"inputs": [{"name": "x0", "datatype": "FP32", "shape": [', b"1", b"]}]}"),
    "outputs": filled(b'{"inputs": [], "outputs": [', b'{"name":""}', b"]}"),
    "texts as data": filled(DATA % 1_000_000 + b"[", b'""', b"]}]}"),
    "unknown fields": filled(b'{"inputs": [], "zz": [', b"[]", b"]}"),
    "parameters": b'{"parameters": {'
    + b",".join(b'"%07d":1' % i for i in range(TENSOR_JSON_BYTES_MAX // 13))
    + b'}, "inputs": []}',
}


@pytest.mark.processes
async def test_no_json_costs_memory_beyond_its_limit() -> None:
    """Each twice at once: they are read one after the other."""
    path = "/v2/models/acme/echo/infer"
    with own_process() as (url, key, pid):
        ok = {"inputs": [json_input("x0", "FP32", [1, 2], [1, 2])]}
        assert (await infer(url, "acme/echo", key, ok)).status == 200
        before = peak_bytes(pid)
        for name, body in EXPANDING.items():
            assert len(body) <= TENSOR_JSON_BYTES_MAX
            answers = await asyncio.gather(*(call(url, "POST", path, key, body) for _ in range(2)))
            assert {answer.status for answer in answers} <= {200, 400}, name
        assert peak_bytes(pid) - before < JSON_GROWTH_BYTES_MAX
        assert (await infer(url, "acme/echo", key, ok)).status == 200


@pytest.mark.processes
async def test_the_largest_request_costs_a_known_multiple_of_itself_and_leaves_nothing() -> None:
    """Twice: what the first took is given back, or the second would take as much again."""
    with own_process() as (url, key, pid):
        rows = (TENSOR_BODY_BYTES_MAX - MIB) // 8
        ask = {
            "inputs": [raw_input("x0", "FP32", [rows, 2], rows * 8)],
            "parameters": {"binary_data_output": True},
        }
        before = peak_bytes(pid)
        raw = struct.pack("<2f", 1.5, -2.0) * rows
        for _ in range(2):
            answer = await infer(url, "acme/echo", key, ask, raw)
            assert answer.raw == raw
        assert peak_bytes(pid) - before < RAW_GROWTH_BYTES_MAX


def hostile(**changes: object) -> bytes:
    """A right request with something wrong in its only input."""
    return json.dumps({"inputs": [json_input("x0", "FP32", [1, 2], [1, 2]) | changes]}).encode()


DEEP = 200_000
HOSTILE = {
    "empty": b"",
    "NUL": b"\x00",
    "not UTF-8": b'{"inputs": "\xff"}',
    "null": b"null",
    "list": b"[]",
    "cut": hostile()[:-5],
    "two documents": b"{}{}",
    "byte order mark": b"\xef\xbb\xbf" + hostile(),
    "shape that overflows 64 bits": hostile(shape=[2**31 - 1] * 8),
    "shape that overflows to the right size": hostile(shape=[2**32, 2**32, 2]),
    "shape that is huge and empty": hostile(shape=[2**31 - 1, 0], data=[]),
    "shape of nested nothing": hostile(shape=[2**31 - 1, 2], data=[[]]),
    "shape of zeros": hostile(shape=[0] * 8, data=[]),
    "negative shape": hostile(shape=[-1, -2]),
    "floating shape": hostile(shape=[1.0e300, 2]),
    "nine dimensions": hostile(shape=[1] * 9),
    "a million dimensions": hostile(shape=[1] * 1_000_000),
    "a million tensors": b'{"inputs": [' + b",".join([b"{}"] * 1_000_000) + b"]}",
    "deep data": hostile(data=0).replace(b'"data": 0', b'"data": ' + b"[" * DEEP + b"]" * DEEP),
    "deep data, never closed": hostile(data=0).partition(b'"data": ')[0] + b'"data": ' + b"[" * DEEP,
    "deep objects": b'{"inputs": ' * 80_000,
    "deep parameter": b'{"parameters": {"a": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "huge number": hostile(data=0).replace(b'"data": 0', b'"data": [1, ' + b"9" * 100_000 + b"]"),
    "huge exponent": hostile(data=0).replace(b'"data": 0', b'"data": [1, 1e999999]'),
    "huge name": hostile(name="x" * 1_000_000),
    "names of control characters": hostile(name="x\x00\n\u202e"),
    "lone surrogate": hostile(name="Z").replace(b"Z", b"\\ud800"),
    "size beyond 64 bits": hostile(parameters={"binary_data_size": 2**80}),
    "size that is none": hostile(parameters={"binary_data_size": "8"}),
    "size that is true": hostile(parameters={"binary_data_size": True}),
}


async def test_every_hostile_body_is_a_clear_400() -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32"))
    async with served(node) as url:
        for name, body in HOSTILE.items():
            for length in (None, len(body)):
                answer = await infer(url, "acme/echo", node.acme, body, None, length)
                assert answer.status == 400, name
                assert 0 < len(answer.error) < 1000, name
        assert node.orders == []
        assert (await infer(url, "acme/echo", node.acme, hostile())).status == 200


async def test_lying_sizes_never_reach_into_what_is_not_theirs() -> None:
    """Two tensors share what follows the JSON: every pair of sizes but the right one is refused."""
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32", "FP32"))
    raw = struct.pack("<4f", 1, 2, 3, 4)
    sizes = (-1, 0, 1, 7, 8, 9, 15, 16, 17, 2**31, 2**63, 2**64)
    async with served(node) as url:
        for first in sizes:
            for second in sizes:
                one, two = raw_input("x0", "FP32", [1, 2], first), raw_input("x1", "FP32", [1, 2], second)
                answer = await infer(url, "acme/echo", node.acme, {"inputs": [one, two]}, raw)
                assert answer.status == (200 if (first, second) == (8, 8) else 400), (first, second)
    (order,) = node.orders
    assert order.body == raw


async def test_no_mutated_body_is_a_5xx() -> None:
    chance = random.Random("mutations of tensors")
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32", "BOOL"))
    raw = packed(b"abc", b"\x00")
    bodies = [
        (
            "echo",
            {"inputs": [json_input("x0", "FP32", [1, 2], [[1, 2]]), raw_input("x1", "BOOL", [1, 2], 2)]},
            b"\x01\x00",
        ),
        ("embed", texts("a", "b", id="1", outputs=[{"name": "embedding"}]), b""),
        ("moods", {"inputs": [raw_input("text", "BYTES", [2], len(raw))]}, raw),
    ]
    pieces = [*JSON_PIECES, b"8"]
    statuses = set()
    async with served(node) as url:
        for model, ask, tail in bodies:
            right = json.dumps(ask).encode()
            assert (await infer(url, f"acme/{model}", node.acme, right, tail)).status == 200
            for _ in range(200):
                body = bytearray(right + tail)
                for _ in range(chance.randint(1, 4)):
                    at = chance.randrange(len(body) + 1)
                    body[at : at + chance.randint(0, 3)] = chance.choice(pieces)
                length = len(body) - len(tail) + chance.choice((0, 0, 0, 1, -1))
                answer = await infer(url, f"acme/{model}", node.acme, bytes(body), None, length)
                assert answer.status in (200, 400), bytes(body)
                statuses.add(answer.status)
    assert statuses == {200, 400}


async def test_one_tenants_large_bodies_are_bounded_and_do_not_harm_another() -> None:
    """Bodies that are promised and withheld: what exceeds the tenant's share is refused at once."""
    node = FakeNode()
    path, headers = "/v2/models/acme/embed/infer", {HEADER_LENGTH: "100"}
    fitting = OWNER_BODIES_BYTES_MAX // TENSOR_BODY_BYTES_MAX
    async with served(node) as url:
        held = [
            asyncio.create_task(declare(url, path, node.acme, TENSOR_BODY_BYTES_MAX, headers))
            for _ in range(fitting + 1)
        ]
        done, waiting = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status for task in done] == [429]
        assert (await infer(url, "globex/embed", node.globex, texts("a"))).status == 200
        # What is left of the share is enough for small requests.
        assert (await infer(url, "acme/embed", node.acme, texts("a"))).status == 200
        other = path.replace("acme", "globex")
        too_large = await declare(url, other, node.globex, TENSOR_BODY_BYTES_MAX + 1, headers)
        assert too_large.status == 413
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_tenants_that_withhold_large_bodies_hold_nobody_elses_up() -> None:
    """More tenants than have room promise large bodies and send none of them; small and large ones of others
    are read to their end and answered."""
    node = FakeNode()
    headers = {HEADER_LENGTH: "100"}
    tenants = BODIES_BYTES_MAX * LARGE_PERCENT // 100 // TENSOR_BODY_BYTES_MAX + 1
    keys = {f"t{i}": node.add_key(f"t{i}") for i in range(tenants)}
    for tenant in keys:
        node.add(spec_of(tenant, "m", Task.EMBEDDING))
    async with served(node) as url:
        held = [
            asyncio.create_task(
                declare(url, f"/v2/models/{one}/m/infer", key, TENSOR_BODY_BYTES_MAX, headers)
            )
            for one, key in keys.items()
        ]
        for tenant, key in keys.items():
            assert (await infer(url, f"{tenant}/m", key, texts("a"))).status == 200
        junk = bytes(JSON_BYTES_MAX + 1)
        assert (await infer(url, "globex/embed", node.globex, junk, None, 100)).status == 400, (
            "judged, so read"
        )
        assert not any(task.done() for task in held)
        for task in held:
            task.cancel()
        await asyncio.wait(held)


# --- foreign models through the router ----------------------------------------------------------------------

# {m} is the foreign tenant's model "secret", or "absent", which nobody has.
VARIANTS = [
    "globex/{m}",
    "globex%2F{m}",
    "globex%2f{m}",
    "globex%252F{m}",
    "globex//{m}",
    "/globex/{m}",
    "%2Fglobex/{m}",
    "globex/{m}/",
    "globex/{m}%00",
    "globex/{m}%20",
    "globex/{m};x",
    "globex/{m}@latest",
    "globex/{m}%40latest",
    "globex/{m}/versions/latest",
    "globex/{m}/versions/{v}",
    "globex/{m}@{v}",
    "globex/{m}@{v}/versions/{v}",
    "globex/{m}/versions/{v}/versions/{v}",
    "acme/../globex/{m}",
    "acme%2F..%2Fglobex%2F{m}",
    "acme/%2e%2e/globex/{m}",
    "acme/m/../../globex/{m}",
    "acme/m/versions/../../globex/{m}",
    "acme/m/versions/{v}%2F..%2F..%2Fglobex%2F{m}",
    "./globex/{m}",
    "GLOBEX/{m}",
    "%67lobex/{m}",
    "globex%EF%BC%8F{m}",
    "globex%C0%AF{m}",
    "acme,globex/{m}",
    "acme%00globex/{m}",
]


async def test_the_router_tells_nothing_of_foreign_models(tmp_path: Path) -> None:
    """Every route that names a model, in every spelling; nothing is read or asked of a node first."""
    async with running(tmp_path / "control") as control:
        acme, globex = await control.tenant("acme"), await control.tenant("globex")
        await control.push("acme", "m", model_files())
        version = (await control.push("globex", "secret", model_files()))["ref"].partition("@")[2]
        assert (await get(control.url, "/v2/models/globex/secret", globex)).status == 200
        routes = [
            ("GET", f"/v2/models/{one}{word}")
            for one in VARIANTS
            for word in ("", "/ready", "/config", "/stats")
        ]
        routes += [("POST", f"/v2/models/{one}/infer") for one in VARIANTS]
        routes += [("POST", f"/v2/repository/models/{one}/load") for one in VARIANTS]
        for method, route in routes:
            answers = []
            for name in ("secret", "absent"):
                path = route.replace("{v}", version).replace("{m}", name)
                answer = await control.call(method, path, key=acme)
                answers.append((answer.status, answer.body.decode().replace(name, "MODEL")))
            assert answers[0] == answers[1], route
            assert answers[0][0] in (400, 404, 405), route
            assert list(json.loads(answers[0][1])) == ["error"]
        assert control.server.control.routed.calls == 0


async def test_the_router_holds_no_more_of_a_tenants_bodies_than_a_node(tmp_path: Path) -> None:
    """Large bodies pass through it, so what is withheld is not held; the node's own budget bounds it."""
    async with running(tmp_path / "control") as control:
        acme = await control.tenant("acme")
        await control.push("acme", "m", model_files())
        async with aiohttp.ClientSession() as session:
            url = f"{control.url}/v2/models/acme/m/infer"
            headers = {"Authorization": f"Bearer {acme}", HEADER_LENGTH: "10"}
            async with session.post(url, data=b"x" * 1000, headers=headers) as answer:
                assert answer.status == 503  # there is no node
        assert control.server.control.bodies.held_bytes == 0


def nested_nothing(shape: list[int], data: object) -> bytes:
    port = TensorPort("x", "FP32", (-1,) * len(shape))
    body = json.dumps({"inputs": [json_input("x", "FP32", shape, data)]}).encode()
    (tensor,) = read_inference(body, None, TensorSignature((port,), (port,))).inputs
    assert tensor.shape == tuple(shape)
    return bytes(tensor.data)


def test_sizes_behind_a_zero_cost_nothing() -> None:
    """Their structure would be a list of 2**31 times nothing."""
    assert nested_nothing([1, 0, PORT_SIZE_MAX], [[]]) == b""
    assert nested_nothing([2, 0], [[], []]) == b""
    with pytest.raises(ApiError, match="elements"):
        nested_nothing([2, 0], [[1], []])
