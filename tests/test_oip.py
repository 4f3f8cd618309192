"""The node's gateway under the Open Inference Protocol v2, over real sockets.

Covers: health, metadata, configuration, index and statistics, inference of every kind of model in JSON and
raw bytes, the shared limits and headers, and every request that is plainly wrong. Does not cover: the router
(``test_oip_router.py``), real clients and models (``test_oip_clients.py``), or hostile bodies and paths
(``attacks/test_oip_bodies.py``, ``attacks/test_gateway_paths.py``).
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from fake_node import DIMENSIONS, OLDER, VERSION, FakeNode, echo_spec, served, too_long, vector_of
from oip_http import Answer, call, get, infer, json_input, packed, raw_input, texts

from agent.facade import EngineFrame, EngineRequest, Refused
from agent.oip_stats import Statistics
from packer.events import RefusalReason
from packer.oip import EXTENSIONS, TENSOR_JSON_BYTES_MAX
from packer.rates import RateView
from packer.types import ModelRef

BINARY = {"parameters": {"binary_data_output": True}}


# --- the server and its models --------------------------------------------------------------------------


async def test_the_server_says_what_it_is_and_whether_it_takes_requests() -> None:
    node = FakeNode()
    async with served(node) as url:
        for path in ("/v2", "/v2/"):
            answer = await get(url, path, node.acme)
            assert answer.json["name"] == "bunkhouse"
            assert answer.json["extensions"] == list(EXTENSIONS)
            assert answer.json["version"]
        assert (await get(url, "/v2/health/live", node.acme)).json == {"live": True}
        assert (await get(url, "/v2/health/ready", node.acme)).json == {"ready": True}
        node.is_ready = False
        not_ready = await get(url, "/v2/health/ready", node.acme)
        assert (not_ready.status, not_ready.json) == (503, {"ready": False})
        assert (await get(url, "/v2/models/acme/embed/ready", node.acme)).status == 503


@pytest.mark.parametrize(
    "model", ["acme/embed", "acme%2Fembed", "%61cme%2fembed", "acme/embed/versions/latest"]
)
async def test_a_model_describes_itself_in_every_spelling(model: str) -> None:
    node = FakeNode()
    async with served(node) as url:
        answer = await get(url, f"/v2/models/{model}", node.acme)
        assert (await get(url, f"/v2/models/{model}/ready", node.acme)).json == {
            "name": "acme/embed",
            "ready": True,
        }
    assert answer.json == {
        "name": "acme/embed",
        "versions": [VERSION, OLDER],
        "platform": "bunkhouse_transformers",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}],
    }


async def test_a_model_of_tensors_and_one_that_generates_describe_themselves() -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "BF16", "BOOL"))
    async with served(node) as url:
        answer = await get(url, "/v2/models/acme/echo", node.acme)
        config = await get(url, f"/v2/models/acme/echo/versions/{VERSION}/config", node.acme)
        chat = await get(url, "/v2/models/acme/chat", node.acme)
    ports = [
        {"name": "x0", "datatype": "BF16", "shape": [-1, 2]},
        {"name": "x1", "datatype": "BOOL", "shape": [-1, 2]},
    ]
    assert (answer.json["inputs"], answer.json["outputs"]) == (ports, ports)
    assert config.json["input"][0] == {"name": "x0", "data_type": "TYPE_BF16", "dims": [-1, 2]}
    assert (config.json["max_batch_size"], config.json["backend"]) == (0, "export")
    assert (chat.json["inputs"], chat.json["outputs"]) == ([], [])


async def test_the_index_has_the_callers_own_models_only() -> None:
    node = FakeNode()
    async with served(node) as url:
        for body in (b"", b"{}", b'{"ready": true}'):
            answer = await call(url, "POST", "/v2/repository/index", node.acme, body)
            rows = [(row["name"], row["version"], row["state"]) for row in answer.json]
            assert rows == [
                ("acme/chat", VERSION, "READY"),
                ("acme/embed", VERSION, "READY"),
                ("acme/embed", OLDER, "READY"),
                ("acme/moods", VERSION, "READY"),
            ]
        refused = await call(url, "POST", "/v2/repository/index", node.acme, b'{"ready": 1}')
        assert (refused.status, refused.error.partition(":")[0]) == (400, "ready")


@pytest.mark.parametrize("word", ["load", "unload"])
async def test_loading_by_hand_is_refused_with_the_way_out(word: str) -> None:
    node = FakeNode()
    async with served(node) as url:
        own = await call(url, "POST", f"/v2/repository/models/acme/embed/{word}", node.acme, b"{}")
        foreign = await call(url, "POST", f"/v2/repository/models/globex%2Fembed/{word}", node.acme)
    assert (own.status, foreign.status) == (400, 404)
    assert f"can not be {word}ed by hand" in own.error


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/acme/embed/infer", 405),
        ("POST", "/v2/models/acme/embed", 405),
        ("POST", "/v2/models/acme/embed/ready", 405),
        ("GET", "/v2/models/acme/embed/nothing", 404),
        ("GET", "/v2/models/acme/embed/", 404),
        ("GET", "/v2/models/acme/embed/ready/", 404),
        ("GET", "/v2/models/acme", 404),
        ("GET", "/v2/models/acme/embed/versions", 404),
        ("GET", "/v2/models/acme/embed/versions/1", 404),
        ("GET", f"/v2/models/acme/embed@{VERSION}/versions/{VERSION}", 404),
        ("POST", "/v2/repository/models/acme/embed/reload", 404),
        ("GET", "/v2/trace/setting", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
        ("DELETE", "/v2/models/acme/embed", 405),
    ],
)
async def test_what_there_is_not_is_said_in_the_protocols_shape(method: str, path: str, status: int) -> None:
    node = FakeNode()
    async with served(node) as url:
        answer = await call(url, method, path, node.acme)
    assert answer.status == status
    assert answer.error


# --- texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["acme/embed", "acme%2Fembed", f"acme/embed/versions/{OLDER}"])
async def test_embeddings_as_json(model: str) -> None:
    node = FakeNode()
    async with served(node) as url:
        answer = await infer(url, model, node.acme, texts("a", "b", id="seven"))
    assert answer.status == 200
    assert (answer.json["model_name"], answer.json["id"]) == ("acme/embed", "seven")
    assert answer.json["model_version"] == (OLDER if OLDER in model else VERSION)
    output = answer.output("embedding")
    assert (output["datatype"], output["shape"]) == ("FP32", [2, DIMENSIONS])
    assert output["data"] == vector_of("a") + vector_of("b")
    assert [order.fields["inputs"] for order in node.orders] == [["a", "b"]]


async def test_embeddings_as_raw_bytes_are_the_same() -> None:
    node = FakeNode()
    values = ["Grüße", "早上好", "a\x00b"]
    raw = packed(*(value.encode() for value in values))
    ask = {"inputs": [raw_input("text", "BYTES", [3, 1], len(raw))], **BINARY}
    async with served(node) as url:
        answer = await infer(url, "acme/embed", node.acme, ask, raw)
    output = answer.output("embedding")
    assert output["parameters"] == {"binary_data_size": 3 * DIMENSIONS * 4}
    assert "data" not in output
    assert "id" not in answer.json
    floats = list(struct.unpack(f"<{3 * DIMENSIONS}f", answer.raw))
    assert floats == [number for value in values for number in vector_of(value)]
    assert answer.headers["content-type"] == "application/octet-stream"
    assert [order.fields["inputs"] for order in node.orders] == [values]


async def test_a_column_of_texts_may_be_nested_or_flat() -> None:
    node = FakeNode()
    async with served(node) as url:
        for data in ([["a"], ["b"]], ["a", "b"]):
            ask = {"inputs": [json_input("text", "BYTES", [2, 1], data)]}
            assert (await infer(url, "acme/embed", node.acme, ask)).status == 200
    assert [order.fields["inputs"] for order in node.orders] == [["a", "b"]] * 2


async def test_classes_as_scores_and_labels_in_the_order_asked_for() -> None:
    node = FakeNode()
    asked = [{"name": "label"}, {"name": "scores", "parameters": {"binary_data": True}}]
    async with served(node) as url:
        whole = await infer(url, "acme/moods", node.acme, texts("a", "b"))
        chosen = await infer(url, "acme/moods", node.acme, texts("a", "b", outputs=asked))
        raw = await infer(url, "acme/moods", node.acme, texts("a", outputs=[{"name": "label"}], **BINARY))
    assert [one["name"] for one in whole.json["outputs"]] == ["scores", "label"]
    assert whole.output("scores")["data"] == [0.25, 0.75] * 2
    assert whole.output("scores")["shape"] == [2, 2]
    assert whole.output("label") == {
        "name": "label",
        "datatype": "BYTES",
        "shape": [2],
        "data": ["positive"] * 2,
    }
    assert [one["name"] for one in chosen.json["outputs"]] == ["label", "scores"]
    assert struct.unpack("<4f", chosen.raw) == (0.25, 0.75) * 2
    assert raw.raw == packed(b"positive")


async def test_generation_is_sent_to_openais_routes() -> None:
    node = FakeNode()
    async with served(node) as url:
        answer = await infer(url, "acme/chat", node.acme, texts("a"))
    assert answer.status == 400
    assert "/v1/chat/completions" in answer.error
    assert node.events == []


# --- tensors --------------------------------------------------------------------------------------------

# Four elements of each datatype: as JSON and as raw bytes.
ELEMENTS: dict[str, tuple[list[Any], bytes]] = {
    "BOOL": ([True, False, False, True], b"\x01\x00\x00\x01"),
    "UINT8": ([0, 1, 254, 255], bytes([0, 1, 254, 255])),
    "INT8": ([-128, -1, 0, 127], struct.pack("<4b", -128, -1, 0, 127)),
    "INT16": ([-(2**15), 0, 1, 2**15 - 1], struct.pack("<4h", -(2**15), 0, 1, 2**15 - 1)),
    "INT32": ([-(2**31), 0, 1, 2**31 - 1], struct.pack("<4i", -(2**31), 0, 1, 2**31 - 1)),
    "INT64": ([-(2**63), 0, 1, 2**63 - 1], struct.pack("<4q", -(2**63), 0, 1, 2**63 - 1)),
    "FP32": ([0.5, -1.5, 3.0, 1e-30], struct.pack("<4f", 0.5, -1.5, 3.0, 1e-30)),
    "FP64": ([0.1, -1.5, 3.0, 1e300], struct.pack("<4d", 0.1, -1.5, 3.0, 1e300)),
}


@pytest.mark.parametrize("datatype", list(ELEMENTS))
@pytest.mark.parametrize("nested", [False, True])
async def test_every_datatype_crosses_exactly_in_all_four_ways(datatype: str, nested: bool) -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", datatype))
    values, raw = ELEMENTS[datatype]
    data = [values[:2], values[2:]] if nested else values
    written = json_input("x0", datatype, [2, 2], data)
    sent = raw_input("x0", datatype, [2, 2], len(raw))
    async with served(node) as url:
        for one, body in ((written, None), (sent, raw)):
            plain = await infer(url, "acme/echo", node.acme, {"inputs": [one]}, body)
            assert plain.output("x0")["shape"] == [2, 2]
            found = plain.output("x0")["data"]
            assert found == pytest.approx(values, rel=1e-6) if datatype == "FP32" else found == values
            answer = await infer(url, "acme/echo", node.acme, {"inputs": [one], **BINARY}, body)
            assert answer.raw == raw
    assert {order.body for order in node.orders} == {raw}


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_half_floats_cross_as_raw_bytes_only(datatype: str) -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", datatype))
    raw = b"\x00\x3c\x00\xc0" * 2
    sent = {"inputs": [raw_input("x0", datatype, [2, 2], 8)]}
    async with served(node) as url:
        answer = await infer(url, "acme/echo", node.acme, {**sent, **BINARY}, raw)
        assert answer.raw == raw
        as_json = await infer(url, "acme/echo", node.acme, sent, raw)
        written = {"inputs": [json_input("x0", datatype, [2, 2], [1, 2, 3, 4])], **BINARY}
        from_json = await infer(url, "acme/echo", node.acme, written)
    assert (as_json.status, from_json.status) == (400, 400)
    assert "binary_data" in as_json.error
    assert "binary_data_size" in from_json.error
    assert len(node.orders) == 1  # the others were refused before they cost anything


async def test_json_and_raw_tensors_mix_and_outputs_are_filtered() -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32", "INT64", "BOOL"))
    x0, x2 = struct.pack("<2f", 1, 2), b"\x01\x00"
    ask = {
        "inputs": [
            raw_input("x2", "BOOL", [1, 2], 2),
            json_input("x1", "INT64", [1, 2], [[5, 6]]),
            raw_input("x0", "FP32", [1, 2], 8),
        ],
        "outputs": [{"name": "x0", "parameters": {"binary_data": False}}, {"name": "x2"}],
        **BINARY,
    }
    async with served(node) as url:
        answer = await infer(url, "acme/echo", node.acme, ask, x2 + x0)
    assert [one["name"] for one in answer.json["outputs"]] == ["x0", "x2"]
    assert answer.output("x0")["data"] == [1.0, 2.0]
    assert answer.raw == x2
    (order,) = node.orders
    assert order.op == "infer"
    assert order.fields["outputs"] == ["x0", "x2"]
    assert order.body == x2 + struct.pack("<2q", 5, 6) + x0


async def test_a_large_tensor_is_answered_exactly() -> None:
    """Read and written on a thread, beyond what JSON may hold."""
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "UINT8"))
    raw = bytes(range(256)) * (3 * 65536 // 2)
    ask = {"inputs": [raw_input("x0", "UINT8", [len(raw) // 2, 2], len(raw))]}
    async with served(node) as url:
        answer = await infer(url, "acme/echo", node.acme, {**ask, **BINARY}, raw)
        refused = await infer(url, "acme/echo", node.acme, ask, raw)
    assert answer.raw == raw
    assert refused.status == 400
    assert "binary_data_output" in refused.error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_what_json_can_not_say_is_an_error_not_another_number(value: float) -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32"))
    raw = struct.pack("<2f", 1.0, value)
    ask = {"inputs": [raw_input("x0", "FP32", [1, 2], 8)]}
    async with served(node) as url:
        refused = await infer(url, "acme/echo", node.acme, ask, raw)
        answer = await infer(url, "acme/echo", node.acme, {**ask, **BINARY}, raw)
    assert (refused.status, answer.raw) == (400, raw)
    assert "NaN or an infinity" in refused.error


async def test_a_lying_engine_is_our_fault_and_says_nothing_of_itself() -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32"))
    given = {"name": "x0", "datatype": "FP32", "shape": [1, 2]}
    lies: list[tuple[dict[str, Any], bytes]] = [
        ({}, b""),
        ({"outputs": []}, b""),
        ({"outputs": "x0"}, b""),
        ({"outputs": ["x0"]}, bytes(8)),
        ({"outputs": [given]}, bytes(4)),
        ({"outputs": [given]}, bytes(12)),
        ({"outputs": [given, given]}, bytes(16)),
        ({"outputs": [{**given, "name": "x1"}]}, bytes(8)),
        ({"outputs": [{**given, "datatype": "INT32"}]}, bytes(8)),
        ({"outputs": [{**given, "shape": [2, 1]}]}, bytes(8)),
        ({"outputs": [{**given, "shape": [-1, 2]}]}, b""),
        ({"outputs": [{**given, "shape": ["1", 2]}]}, bytes(8)),
    ]
    async with served(node) as url:
        for header, body in lies:

            async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
                yield EngineFrame(header, body)  # noqa: B023  # it runs within this turn of the loop

            node.script = script
            ask = {"inputs": [json_input("x0", "FP32", [1, 2], [1, 2])]}
            answer = await infer(url, "acme/echo", node.acme, ask)
            assert (answer.status, "logged" in answer.error) == (500, True), header


# --- what is wrong with a request -------------------------------------------------------------------------


def wrong(**changes: object) -> dict[str, Any]:
    """A right request of ``x0`` FP32 and ``x1`` INT32 with one thing changed in its first input."""
    first = json_input("x0", "FP32", [1, 2], [1, 2]) | changes
    return {"inputs": [first, json_input("x1", "INT32", [1, 2], [1, 2])]}


WRONG: dict[str, tuple[object, str]] = {
    "no inputs": ({}, "inputs: is missing"),
    "empty inputs": ({"inputs": []}, "inputs"),
    "an input missing": ({"inputs": [json_input("x0", "FP32", [1, 2], [1, 2])]}, "'x1' is missing"),
    "an input twice": ({"inputs": wrong()["inputs"] + wrong()["inputs"][:1]}, "'x0' is given more than once"),
    "an unknown input": (wrong(name="y"), "inputs[0].name: the model takes no 'y'"),
    "another datatype": (
        wrong(datatype="FP64"),
        "inputs[0].datatype: 'FP64', but the model takes 'x0' as FP32",
    ),
    "an unknown datatype": (wrong(datatype="FP31"), "inputs[0].datatype"),
    "too few dimensions": (wrong(shape=[2]), "inputs[0].shape: [2], but the model takes 'x0' as [-1, 2]"),
    "another size": (wrong(shape=[1, 3], data=[1, 2, 3]), "inputs[0].shape"),
    "a negative size": (wrong(shape=[-1, 2]), "inputs[0].shape"),
    "a fraction as size": (wrong(shape=[1.5, 2]), "inputs[0].shape"),
    "too many elements": (wrong(shape=[2**30, 2]), "elements; the limit is"),
    "a size beyond all": (wrong(shape=[2**64, 2]), "inputs[0].shape"),
    "too few data": (wrong(data=[1]), "inputs[0].data: 1 elements, but shape [1, 2] has 2"),
    "too many data": (wrong(data=[1, 2, 3]), "inputs[0].data: 3 elements"),
    "nested otherwise": (wrong(data=[[1], [2]]), "inputs[0].data: is not nested like the shape"),
    "nested too deeply": (wrong(data=[[[1, 2]]]), "inputs[0].data: is not nested like the shape"),
    "nested in part": (wrong(data=[1, [2]]), "inputs[0].data: mixes numbers and lists"),
    "a text as number": (wrong(data=["1", 2]), "inputs[0].data: must be a list of numbers"),
    "an object as data": (wrong(data={"a": 1}), "inputs[0].data: must be a list of numbers"),
    "a number as data": (wrong(data=1), "inputs[0].data: must be a list of numbers"),
    "null in the data": (wrong(data=[1, None]), "inputs[0].data[1]: must be a number, not null"),
    "a number beyond FP32": (wrong(data=[1, 1e39]), "inputs[0].data: holds a number that FP32 can not hold"),
    "no data at all": ({"inputs": [{"name": "x0", "datatype": "FP32", "shape": [1, 2]}]}, "missing"),
    "data and size": (wrong(parameters={"binary_data_size": 8}), "and not both"),
    "an unknown output": (wrong() | {"outputs": [{"name": "y"}]}, "outputs[0].name: the model gives no 'y'"),
    "an output twice": (wrong() | {"outputs": [{"name": "x0"}, {"name": "x0"}]}, "names a tensor twice"),
    "classification": (
        wrong() | {"outputs": [{"name": "x0", "parameters": {"classification": 2}}]},
        "classification extension is not supported",
    ),
    "a sequence": (wrong() | {"parameters": {"sequence_id": 3}}, "parameters.sequence_id: sequences"),
    "a priority": (wrong() | {"parameters": {"priority": 1}}, "parameters.priority"),
    "shared memory": (wrong(parameters={"shared_memory_region": "r"}), "shared memory is not supported"),
    "a flag that is none": (wrong() | {"parameters": {"binary_data_output": 1}}, "must be true or false"),
    "an object as parameter": (wrong() | {"parameters": {"a": {}}}, "parameters"),
    "a number as id": (wrong() | {"id": 5}, "id: must be a text"),
    "a long id": (wrong() | {"id": "x" * 257}, "id: must be a text"),
}


@pytest.mark.parametrize("name", list(WRONG))
async def test_a_wrong_request_is_a_400_that_names_the_field(name: str) -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32", "INT32"))
    ask, said = WRONG[name]
    async with served(node) as url:
        answer = await infer(url, "acme/echo", node.acme, ask)
        right = await infer(url, "acme/echo", node.acme, wrong())
    assert answer.status == 400
    assert said in answer.error
    assert right.status == 200
    assert len(node.orders) == 1


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[1,]"])
async def test_json_has_no_other_numbers(text: str) -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32", "INT32"))
    body = json.dumps(wrong()).replace("[1, 2]}, {", f"[1, {text}]}}, {{").encode()
    assert text.encode() in body
    async with served(node) as url:
        answer = await infer(url, "acme/echo", node.acme, body)
    assert answer.status == 400
    assert node.orders == []


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63, 10**400, 1.5, True])
async def test_a_number_that_does_not_fit_is_never_another(value: Any) -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "INT32"))
    ask = {"inputs": [json_input("x0", "INT32", [1, 2], [1, value])]}
    async with served(node) as url:
        answer = await infer(url, "acme/echo", node.acme, ask)
    where = answer.error.partition(":")[0]
    assert (answer.status, where.removesuffix("[1]")) == (400, "inputs[0].data")


RAW: dict[str, tuple[int, bytes, int | None, str]] = {
    "size of another shape": (4, bytes(4), None, "4 bytes, but FP32 of shape [1, 2] has 8"),
    "more than there is": (8, bytes(7), None, "8 bytes, but 7 are left"),
    "less than there is": (8, bytes(9), None, "1 bytes that no tensor's size covers"),
    "negative": (-8, bytes(8), None, "must be a number of bytes"),
    "header beyond the body": (8, bytes(8), 10_000, "can not be in a body of"),
    "header of nothing": (8, bytes(8), 0, "raw binary request"),
    "header too short": (8, bytes(8), 10, ""),
}


@pytest.mark.parametrize("name", list(RAW))
async def test_raw_bytes_must_be_what_the_json_says(name: str) -> None:
    size, raw, length, said = RAW[name]
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32"))
    async with served(node) as url:
        ask = {"inputs": [raw_input("x0", "FP32", [1, 2], size)]}
        answer = await infer(url, "acme/echo", node.acme, ask, raw, length)
    assert answer.status == 400
    assert said in answer.error
    assert node.orders == []


TEXTS: dict[str, tuple[list[int], bytes, str]] = {
    "a length beyond the end": ([1], b"\x05\x00\x00\x00abc", "element 0 reaches beyond"),
    "the greatest length": ([1], b"\xff\xff\xff\xffabc", "element 0 reaches beyond"),
    "a cut length": ([2], packed(b"a") + b"\x01\x00", "element 1 reaches beyond"),
    "fewer than the shape": ([3], packed(b"a", b"b"), "another number of elements"),
    "more than the shape": ([1], packed(b"a", b"b"), "another number of elements"),
    "no UTF-8": ([2], packed(b"a", b"\xff"), "element 1 is no UTF-8"),
    "an empty text": ([2], packed(b"a", b""), "element 1 is an empty text"),
    "none": ([0], b"", "no elements"),
    "two columns": ([1, 2], packed(b"a", b"b"), "inputs[0].shape"),
    "too many": ([2049], packed(*[b"a"] * 2049), "the limit is 2048"),
}


@pytest.mark.parametrize("name", list(TEXTS))
async def test_texts_must_be_texts(name: str) -> None:
    shape, raw, said = TEXTS[name]
    node = FakeNode()
    async with served(node) as url:
        ask = {"inputs": [raw_input("text", "BYTES", shape, len(raw))]}
        answer = await infer(url, "acme/embed", node.acme, ask, raw)
    assert answer.status == 400
    assert said in answer.error
    assert node.orders == []


async def test_raw_bytes_without_the_header_and_compressed_bodies_are_refused() -> None:
    node = FakeNode()
    node.add(echo_spec("acme", "echo", "FP32"))
    path = "/v2/models/acme/echo/infer"
    body = json.dumps({"inputs": [raw_input("x0", "FP32", [1, 2], 8)]}).encode()
    async with served(node) as url:
        bare = await call(url, "POST", path, node.acme, body)
        assert "Inference-Header-Content-Length" in bare.error
        for bad in ("x", "-1", "1.5", "9" * 20, "٣"):
            headers = {"Inference-Header-Content-Length": bad}
            answer = await call(url, "POST", path, node.acme, body, headers)
            assert answer.status == 400, bad
        encoded = await call(url, "POST", path, node.acme, gzip.compress(body), {"Content-Encoding": "gzip"})
        long = await call(url, "POST", path, node.acme, b" " * (TENSOR_JSON_BYTES_MAX + 1))
    assert (encoded.status, long.status) == (415, 413)
    assert "binary_data_size" in long.error
    assert "uncompressed" in encoded.error


# --- shared with the other surface --------------------------------------------------------------------------


async def test_refusals_headers_and_rates_are_those_of_the_other_surface() -> None:
    node = FakeNode()
    node.rates = (RateView("requests_per_minute", 60, 60, 12, 6000),)
    async with served(node) as url:
        answer = await infer(url, "acme/embed", node.acme, texts("a b c d"))
        assert answer.headers["x-ratelimit-limit-requests"] == "60"
        assert answer.headers["x-ratelimit-remaining-requests"] == "12"
        assert answer.headers["x-bunkhouse-tier"] == "disk"
        assert answer.headers["x-bunkhouse-restore-ms"] == "37"
        assert answer.headers["x-request-id"].startswith("req_")
        node.refused["embed"] = Refused(RefusalReason.TOKENS, "too many tokens", 1500)
        refused = await infer(url, "acme/embed", node.acme, texts("a"))
        node.refused["embed"] = Refused(RefusalReason.NEVER_FITS, "9 bytes too many")
        never = await infer(url, "acme/embed", node.acme, texts("a"))
    assert node.expected_tokens == [2, 1, 1]
    assert (refused.status, refused.error) == (429, "too many tokens")
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("2", "true")
    assert (never.status, never.error) == (507, "9 bytes too many")


async def test_an_engines_word_for_a_field_is_the_callers() -> None:
    node = FakeNode(script=too_long("inputs[3]"))
    node.add(echo_spec("acme", "echo", "FP32"))
    async with served(node) as url:
        answer = await infer(url, "acme/embed", node.acme, texts("a"))
        tensors = {"inputs": [json_input("x0", "FP32", [1, 2], [1, 2])]}
        other = await infer(url, "acme/echo", node.acme, tensors)
    assert (answer.status, answer.error.partition(":")[0]) == (400, "text[3]")
    assert other.error.partition(":")[0] == "inputs[3]"


async def statistics(url: str, path: str, key: str) -> list[Any]:
    answer: Answer = await get(url, f"/v2/models/{path}", key)
    assert answer.status == 200
    rows: list[Any] = answer.json["model_stats"]
    return rows


async def test_statistics_count_every_surface_and_only_the_callers_own() -> None:
    node = FakeNode()
    async with served(node) as url:
        await infer(url, "acme/embed", node.acme, texts("a", "b", "c"))
        async with aiohttp.ClientSession() as session:
            headers = {"Authorization": f"Bearer {node.acme}"}
            body = {"model": "acme/embed", "input": ["a", "b"]}
            async with session.post(f"{url}/v1/embeddings", json=body, headers=headers) as answer:
                assert answer.status == 200
        node.refused["moods"] = Refused(RefusalReason.RATE, "too many", 1000)
        assert (await infer(url, "acme/moods", node.acme, texts("a"))).status == 429
        (embed,) = await statistics(url, "acme/embed/stats", node.acme)
        (older,) = await statistics(url, f"acme/embed/versions/{OLDER}/stats", node.acme)
        own = await statistics(url, "stats", node.acme)
        foreign = await statistics(url, "stats", node.globex)
    assert (embed["name"], embed["version"]) == ("acme/embed", VERSION)
    assert (embed["inference_count"], embed["execution_count"]) == (5, 2)
    assert embed["last_inference"] > 0
    stats = embed["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"], stats["queue"]["count"]) == (2, 0, 2)
    assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
    assert (older["inference_count"], older["version"]) == (0, OLDER)
    assert [row["name"] for row in own] == ["acme/chat", "acme/embed", "acme/embed", "acme/moods"]
    assert own[3]["inference_stats"]["fail"]["count"] == 1
    assert own[3]["inference_count"] == 0
    assert {row["name"] for row in foreign} == {
        "globex/chat",
        "globex/embed",
        "globex/moods",
        "globex/secret",
    }
    assert {row["inference_count"] for row in foreign} == {0}


def test_statistics_of_many_models_are_bounded() -> None:
    statistics = Statistics(models_max=3)
    refs = [ModelRef("acme", f"m{i}", VERSION) for i in range(5)]
    for ref in refs:
        with statistics.timing(ref, 1):
            pass
    assert [statistics.of(ref).inference_count for ref in refs] == [0, 0, 1, 1, 1]
