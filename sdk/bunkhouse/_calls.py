"""What each method sends and how its answer is read: tenants' calls and models.

Covers: OpenAI-compatible calls under ``/v1``, models and uploads under ``/api/v1``. Does not cover:
operators' calls (``_admin``), sending (``_transport``). Every function is pure and returns a
``Call``; the blocking and the async client run the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bunkhouse import _decode
from bunkhouse._errors import BadValue
from bunkhouse._request import (
    COMMIT_TIMEOUT_S,
    INFERENCE_TIMEOUT_S,
    Call,
    Listing,
    Request,
    json_request,
    model_path,
    segment,
    split_model,
)
from bunkhouse._types import Classification, Completion, Embeddings, Model

# A string, a list of strings, a list of token ids, or a list of lists of token ids.
EmbeddingInput = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]


def _present(**fields: object) -> dict[str, object]:
    """The given fields without those that are None: the server's defaults apply."""
    return {name: value for name, value in fields.items() if value is not None}


def _inference(path: str, body: Mapping[str, object]) -> Request:
    # Repeatable: an answer that was lost costs a second computation and changes nothing.
    request = json_request("POST", path, body, repeatable=True, timeout_s=INFERENCE_TIMEOUT_S)
    return replace(request, model=str(body["model"]))


def embed(model: str, inputs: EmbeddingInput, dimensions: int | None) -> Call[Embeddings]:
    if not isinstance(inputs, str):
        inputs = list(inputs)  # type: ignore[assignment]
        if not inputs:
            raise BadValue("inputs", "is empty: give at least one text")
    body = _present(model=model, input=inputs, encoding_format="base64", dimensions=dimensions)
    return Call(_inference("/v1/embeddings", body), _decode.embeddings)


def classify(model: str, inputs: str | Sequence[str]) -> Call[Classification]:
    if not inputs:
        raise BadValue("inputs", "is empty: give at least one text")
    texts = inputs if isinstance(inputs, str) else list(inputs)
    return Call(_inference("/v1/classify", {"model": model, "input": texts}), _decode.classification)


def chat(
    model: str,
    messages: str | Sequence[Message],
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: str | Sequence[str] | None,
) -> Call[Completion]:
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    body = _present(
        model=model,
        messages=turns,
        max_completion_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=_stop(stop),
    )
    return Call(_inference("/v1/chat/completions", body), _decode.completion)


def complete(
    model: str,
    prompt: str,
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: str | Sequence[str] | None,
) -> Call[Completion]:
    body = _present(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=_stop(stop),
    )
    return Call(_inference("/v1/completions", body), _decode.completion)


def _stop(stop: str | Sequence[str] | None) -> object:
    return stop if stop is None or isinstance(stop, str) else list(stop)


def streamed(call: Call[Completion]) -> Request:
    """The same generation as a stream of server-sent events, token counts included."""
    body = call.request.body or b"{}"
    # The body was made by this module, so its last byte closes the object.
    marked = body[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}'
    return replace(call.request, body=marked, headers={**call.request.headers, "accept": "text/event-stream"})


def models(tenant: str | None) -> Listing[Model, tuple[Model, ...]]:
    query = {} if tenant is None else {"tenant": tenant}
    return Listing("/api/v1/models", _decode.page(_decode.model), tuple, query)


def model(ref: str) -> Call[Model]:
    request = json_request("GET", f"/api/v1/models/{model_path(ref)}", repeatable=True)
    return Call(request, _decode.one(_decode.model))


def set_model(
    ref: str, batch_max: int | None, batch_delay_ms: int | None, devices: int | None, replicas: int | None
) -> Call[Model]:
    given = {
        "batch_max": batch_max,
        "batch_delay_ms": batch_delay_ms,
        "devices": devices,
        "replicas": replicas,
    }
    body: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    if not body:
        raise BadValue("batch_max", "give at least one of batch_max, batch_delay_ms, devices and replicas")
    request = json_request("PATCH", f"/api/v1/models/{model_path(ref)}", body, repeatable=True)
    return Call(request, _decode.one(_decode.model))


def delete_model(ref: str) -> Call[None]:
    return Call(json_request("DELETE", f"/api/v1/models/{model_path(ref)}", repeatable=True), _decode.nothing)


def register(ref: str, origin: str) -> Call[Model]:
    tenant, name = split_model(ref)
    # Repeatable: the same content is the same version. Control hashes every byte before it answers.
    request = json_request(
        "POST",
        f"/api/v1/tenants/{segment(tenant, 'model')}/models",
        {"name": name, "origin": origin},
        repeatable=True,
        timeout_s=COMMIT_TIMEOUT_S,
    )
    return Call(request, _decode.one(_decode.model))
