"""Unmodified clients of the Open Inference Protocol against a real stack: ``tritonclient`` and ``kserve``.

Covers: ``tritonclient[http]`` (sync and aio) and ``kserve``'s REST client, each through the router and at the
node itself, with real models in real workers, in JSON and raw bytes. Does not cover: every wrong request
(``test_oip.py``), the router alone (``test_oip_router.py``), or gRPC, which this surface has not.

There is no conformance suite of the protocol; these two are what its users run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kserve
import kserve.protocol.infer_type as kserve_types
import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from export_samples import SAMPLES, aten, forge, program_of, write_sample
from gateway_process import peak_bytes
from make_models import make_encoder
from real_box import CALLER, PATIENCE_S, Box, running_box
from tiny_models import tiny_classifier, tiny_gpt2
from tritonclient.utils import InferenceServerException

from bunkhouse import BunkhouseError
from packer.types import MIB

pytestmark = [pytest.mark.clients, pytest.mark.processes, pytest.mark.timeout(300)]

# A tensor far larger than what the router may hold of a request; the agent was seen to take three times it.
LARGE_BYTES = 48 * MIB
AGENT_GROWTH_MAX = 5
ACMES = ["acme/chat", "acme/half", "acme/mood", "acme/net", "acme/tokens", "acme/words"]
TEXTS = ("A bunkhouse is a plain building.", "Grüße, 早上好", "hello")


@dataclass(frozen=True, slots=True)
class Door:
    """One way in: the router's or the node's address, and acme's key."""

    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """Made anew for each call: Triton's clients leave headers of their own in it."""
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def address(self) -> str:
        """As Triton's clients take it."""
        return self.url.removeprefix("http://")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("oip")
    with running_box(folder, devices=("cpu:96MiB",)) as box:
        for tenant in ("acme", "globex"):
            box.add_tenant(tenant)
        acme = box.tenant("acme")
        acme.push("acme/words", make_encoder(folder / "words"))
        acme.push("acme/mood", tiny_classifier(folder / "mood"))
        acme.push("acme/chat", tiny_gpt2(folder / "chat"))
        acme.push("acme/tokens", write_sample("attention", folder / "tokens"))
        acme.push("acme/net", write_sample("mlp", folder / "net"))
        acme.push("acme/half", write_sample("mlp", folder / "half", torch.bfloat16))
        box.tenant("globex").push("globex/mood", tiny_classifier(folder / "other", seed=9))
        box.wait_planned(7)
        yield box


@pytest.fixture(params=["router", "node"])
def door(box: Box, request: pytest.FixtureRequest) -> Door:
    url = box.url if request.param == "router" else box.gateway_url
    return Door(url, box.keys["acme"])


@pytest.fixture
def client(door: Door) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(door.address, network_timeout=PATIENCE_S)
    yield made
    made.close()


def expected(box: Box) -> np.ndarray[Any, Any]:
    """The same embeddings by OpenAI's route."""
    answer = CALLER.post(
        f"{box.gateway_url}/v1/embeddings",
        headers={"Authorization": f"Bearer {box.keys['acme']}"},
        json={"model": "acme/words", "input": list(TEXTS), "encoding_format": "float"},
        timeout=PATIENCE_S,
    )
    return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)


def triton_input(binary: bool, kind: Any = triton, column: bool = False) -> Any:
    texts = np.array([text.encode() for text in TEXTS], dtype=np.object_)
    shaped = texts.reshape(-1, 1) if column else texts
    found = kind.InferInput("text", list(shaped.shape), "BYTES")
    found.set_data_from_numpy(shaped, binary_data=binary)
    return found


# --- tritonclient -----------------------------------------------------------------------------------------


def test_triton_reads_what_there_is(box: Box, door: Door, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata(headers=door.headers)
    assert metadata["name"] == "bunkhouse"
    assert "binary_tensor_data" in metadata["extensions"]
    model = client.get_model_metadata("acme/words", headers=door.headers)
    (version,) = model["versions"]
    assert client.is_model_ready("acme/words", headers=door.headers)
    assert client.is_model_ready("acme/words", version, headers=door.headers)
    assert not client.is_model_ready("globex/mood", headers=door.headers)
    assert not client.is_model_ready("acme/words")  # without a key
    assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    config = client.get_model_config("acme/mood", headers=door.headers)
    assert [port["name"] for port in config["output"]] == ["scores", "label"]
    index = client.get_model_repository_index(headers=door.headers)
    assert [row["name"] for row in index] == ACMES
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="by hand"):
            change("acme/mood", headers=door.headers)


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_triton_embeds_in_every_mix_of_json_and_raw_bytes(
    box: Box, door: Door, client: triton.InferenceServerClient, sent: bool, wanted: bool
) -> None:
    result = client.infer(
        "acme/words",
        [triton_input(sent, column=wanted)],
        outputs=[triton.InferRequestedOutput("embedding", binary_data=wanted)],
        request_id="seven",
        headers=door.headers,
        response_compression_algorithm="gzip",
    )
    assert result.get_response()["id"] == "seven"
    assert result.get_response()["model_name"] == "acme/words"
    assert np.array_equal(result.as_numpy("embedding"), expected(box))


def test_triton_classifies_and_asks_in_the_background(
    door: Door, client: triton.InferenceServerClient
) -> None:
    whole = client.infer("acme/mood", [triton_input(True)], headers=door.headers)
    later = client.async_infer("acme/mood", [triton_input(False)], headers=door.headers).get_result()
    scores, labels = whole.as_numpy("scores"), whole.as_numpy("label")
    assert scores.shape == (len(TEXTS), 3)
    assert scores.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(later.as_numpy("scores"), scores)
    assert np.array_equal(later.as_numpy("label"), labels)
    assert labels.shape == (len(TEXTS),)


def test_triton_reads_its_own_statistics(box: Box, door: Door, client: triton.InferenceServerClient) -> None:
    def counted() -> int:
        (row,) = client.get_inference_statistics("acme/mood", headers=door.headers)["model_stats"]
        return int(row["inference_count"])

    before = counted()
    client.infer("acme/mood", [triton_input(True)], headers=door.headers)
    assert counted() == before + len(TEXTS)
    everything = client.get_inference_statistics(headers=door.headers)["model_stats"]
    assert {row["name"] for row in everything} == set(ACMES)


def test_a_program_that_may_not_run_is_refused_when_it_is_pushed(box: Box, tmp_path: Path) -> None:
    writing = forge(tmp_path, [aten("copy_.default", "y", self="p_w", src="x")])
    with pytest.raises(BunkhouseError, match=r"program\.json: node 0 .*aten\.copy_\.default.*not supported"):
        box.tenant("acme").push("acme/writing", writing)


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("globex/mood", "404", "does not exist or your key has no access"),
        ("acme/none", "404", "does not exist or your key has no access"),
        ("acme/chat", "400", "/v1/chat/completions"),
    ],
)
def test_triton_raises_what_is_wrong(
    door: Door, client: triton.InferenceServerClient, model: str, status: str, said: str
) -> None:
    with pytest.raises(InferenceServerException, match=said) as caught:
        client.infer(model, [triton_input(True)], headers=door.headers)
    assert caught.value.status() == status
    with pytest.raises(InferenceServerException, match="not accepted; send the body uncompressed"):
        client.infer(model, [triton_input(True)], headers=door.headers, request_compression_algorithm="gzip")
    with pytest.raises(InferenceServerException, match="No valid API key"):
        client.infer(model, [triton_input(True)])


async def test_tritons_other_client_does_the_same(box: Box, door: Door) -> None:
    async with triton_aio.InferenceServerClient(door.address) as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("acme/words", headers=door.headers)
        for binary in (True, False):
            result = await client.infer(
                "acme/words",
                [triton_input(binary, triton_aio)],
                outputs=[triton_aio.InferRequestedOutput("embedding", binary_data=binary)],
                headers=door.headers,
            )
            assert np.array_equal(result.as_numpy("embedding"), expected(box))
        with pytest.raises(InferenceServerException, match="does not exist or your key has no access"):
            await client.infer("globex/mood", [triton_input(True, triton_aio)], headers=door.headers)


# --- tensors ----------------------------------------------------------------------------------------------


def tensor_inputs(name: str, binary: bool) -> tuple[list[Any], Any]:
    """A sample model's inputs for a batch of five, and what torch itself answers to them."""
    torch.manual_seed(5)
    values = SAMPLES[name].inputs(5)
    names = list(inspect.signature(SAMPLES[name].module().forward).parameters)
    found = []
    for named, value in zip(names, values, strict=True):
        datatype = {torch.float32: "FP32", torch.int64: "INT64", torch.bool: "BOOL"}[value.dtype]
        one = triton.InferInput(named, list(value.shape), datatype)
        one.set_data_from_numpy(value.numpy(), binary_data=binary)
        found.append(one)
    return found, program_of(name).module()(*values)


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_triton_runs_a_program_of_torch_export(
    door: Door, client: triton.InferenceServerClient, sent: bool, wanted: bool
) -> None:
    inputs, expected = tensor_inputs("attention", sent)
    metadata = client.get_model_metadata("acme/tokens", headers=door.headers)
    outputs = [port["name"] for port in metadata["outputs"]]
    assert set(outputs) == set(expected)
    chosen = outputs[0]
    asked = [triton.InferRequestedOutput(chosen, binary_data=wanted)]
    result = client.infer("acme/tokens", inputs, outputs=asked, headers=door.headers)
    assert [one["name"] for one in result.get_response()["outputs"]] == [chosen]
    assert np.allclose(result.as_numpy(chosen), expected[chosen].detach().numpy(), atol=1e-5)
    everything = client.infer("acme/tokens", inputs, headers=door.headers)
    assert [one["name"] for one in everything.get_response()["outputs"]] == outputs


def test_triton_sends_and_reads_half_floats(door: Door, client: triton.InferenceServerClient) -> None:
    values = np.linspace(-2, 2, 32, dtype=np.float32).reshape(2, 16)
    tensor = triton.InferInput("x", [2, 16], "BF16")
    tensor.set_data_from_numpy(values.astype(ml_dtypes.bfloat16), binary_data=True)
    result = client.infer("acme/half", [tensor], headers=door.headers).as_numpy("output_0")
    plain = program_of("mlp", torch.bfloat16).module()(torch.from_numpy(values).to(torch.bfloat16))
    assert np.allclose(result.astype(np.float32), plain.detach().float().numpy(), atol=1e-2)
    asked = [triton.InferRequestedOutput("output_0", binary_data=False)]
    with pytest.raises(InferenceServerException, match="BF16, which JSON can not carry"):
        client.infer("acme/half", [tensor], outputs=asked, headers=door.headers)


def test_a_large_tensor_goes_through_the_router_without_being_held_there(box: Box) -> None:
    door = Door(box.url, box.keys["acme"])
    rows = LARGE_BYTES // 64
    values = np.tile(np.linspace(-2, 2, 16, dtype=np.float32), (rows, 1))
    tensor = triton.InferInput("x", [rows, 16], "FP32")
    tensor.set_data_from_numpy(values, binary_data=True)
    assert box.control is not None
    assert box.agent is not None
    processes = {"control": box.control.handle.pid, "agent": box.agent.handle.pid}
    before = {name: peak_bytes(pid) for name, pid in processes.items()}
    client = triton.InferenceServerClient(door.address, network_timeout=PATIENCE_S)
    result = client.infer("acme/net", [tensor], headers=door.headers).as_numpy("output_0")
    client.close()
    assert result.shape == (rows, 4)
    assert np.allclose(result, result[0], atol=1e-5)
    grown = {name: peak_bytes(pid) - before[name] for name, pid in processes.items()}
    assert grown["control"] < LARGE_BYTES / 2
    assert grown["agent"] < AGENT_GROWTH_MAX * LARGE_BYTES


# --- kserve -----------------------------------------------------------------------------------------------


def kserve_request(model: str, binary: bool) -> kserve.InferRequest:
    tensor = kserve.InferInput("text", [len(TEXTS)], "BYTES")
    values = np.array([text.encode() if binary else text for text in TEXTS], dtype=np.object_)
    tensor.set_data_from_numpy(values, binary_data=binary)
    output = kserve_types.RequestedOutput("embedding", parameters={"binary_data": binary})
    return kserve.InferRequest(model, [tensor], request_id="nine", request_outputs=[output])


@pytest.mark.parametrize("binary", [True, False])
async def test_kserves_client_embeds(box: Box, door: Door, binary: bool) -> None:
    async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=PATIENCE_S)) as client:
        assert await client.is_server_live(door.url)
        assert await client.is_server_ready(door.url)
        assert await client.is_model_ready(door.url, "acme/words", headers=door.headers)
        assert not await client.is_model_ready(door.url, "globex/mood", headers=door.headers)
        answer = await client.infer(
            door.url,
            kserve_request("acme/words", binary),
            model_name="acme/words",
            headers=door.headers,
        )
    assert answer.id == "nine"
    (output,) = answer.outputs
    assert np.array_equal(output.as_numpy(), expected(box))


@pytest.mark.parametrize("binary", [True, False])
async def test_kserves_client_runs_a_program(door: Door, binary: bool) -> None:
    values = np.linspace(-2, 2, 32, dtype=np.float32).reshape(2, 16)
    tensor = kserve.InferInput("x", [2, 16], "FP32")
    tensor.set_data_from_numpy(values, binary_data=binary)
    async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=PATIENCE_S)) as client:
        answer = await client.infer(
            door.url,
            kserve.InferRequest("acme/net", [tensor]),
            model_name="acme/net",
            headers=door.headers,
        )
    (output,) = answer.outputs
    plain = program_of("mlp").module()(torch.from_numpy(values)).detach().numpy()
    assert np.allclose(output.as_numpy(), plain, atol=1e-5)
