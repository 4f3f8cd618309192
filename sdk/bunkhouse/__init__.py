"""Bunkhouse's SDK: push models to a Bunkhouse and call them.

    from bunkhouse import Client

    with Client("http://127.0.0.1:8520", api_key=key) as client:
        client.push("acme/minilm", "./all-MiniLM-L6-v2")
        print(client.embed("acme/minilm", "hello").vectors[0][:4])

Covers: the public names. Everything under a name that begins with an underscore is private. The
clients are imported on first use, so that ``import bunkhouse`` stays a few milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bunkhouse._errors import (
    STATUS_ERRORS,
    ApiError,
    AuthenticationFailed,
    BadAnswer,
    BadDirectory,
    BadRequest,
    BadValue,
    BunkhouseError,
    ChangedMeanwhile,
    Conflict,
    DoesNotFit,
    NotFound,
    PermissionDenied,
    QuotaRefused,
    RateLimited,
    ServerFailed,
    StreamFailed,
    TimedOut,
    TooLarge,
    Unavailable,
    Unreachable,
)
from bunkhouse._types import (
    About,
    ByteQuota,
    Calibration,
    Classification,
    Completion,
    Copies,
    Decision,
    Device,
    DeviceRoom,
    DeviceShare,
    Embeddings,
    EstimateErrors,
    Event,
    Events,
    Explanation,
    Forecast,
    Forecasts,
    Key,
    Label,
    Lending,
    Model,
    ModelFile,
    NewKey,
    Node,
    NodeToken,
    Others,
    Placement,
    Placements,
    Progress,
    Quota,
    QuotaUse,
    RateUse,
    Regret,
    RequestStory,
    Restores,
    Router,
    Served,
    Tenant,
    Usage,
    UsageItem,
    Victim,
)
from bunkhouse._version import __version__

if TYPE_CHECKING:
    from bunkhouse._async_client import AsyncClient
    from bunkhouse._client import Client
    from bunkhouse._retry import RetryPolicy
    from bunkhouse._stream import AsyncTextStream, TextStream

_LAZY = {
    "AsyncClient": "bunkhouse._async_client",
    "AsyncTextStream": "bunkhouse._stream",
    "Client": "bunkhouse._client",
    "RetryPolicy": "bunkhouse._retry",
    "TextStream": "bunkhouse._stream",
}

__all__ = [
    "STATUS_ERRORS",
    "About",
    "ApiError",
    "AsyncClient",
    "AsyncTextStream",
    "AuthenticationFailed",
    "BadAnswer",
    "BadDirectory",
    "BadRequest",
    "BadValue",
    "BunkhouseError",
    "ByteQuota",
    "Calibration",
    "ChangedMeanwhile",
    "Classification",
    "Client",
    "Completion",
    "Conflict",
    "Copies",
    "Decision",
    "Device",
    "DeviceRoom",
    "DeviceShare",
    "DoesNotFit",
    "Embeddings",
    "EstimateErrors",
    "Event",
    "Events",
    "Explanation",
    "Forecast",
    "Forecasts",
    "Key",
    "Label",
    "Lending",
    "Model",
    "ModelFile",
    "NewKey",
    "Node",
    "NodeToken",
    "NotFound",
    "Others",
    "PermissionDenied",
    "Placement",
    "Placements",
    "Progress",
    "Quota",
    "QuotaRefused",
    "QuotaUse",
    "RateLimited",
    "RateUse",
    "Regret",
    "RequestStory",
    "Restores",
    "RetryPolicy",
    "Router",
    "Served",
    "ServerFailed",
    "StreamFailed",
    "Tenant",
    "TextStream",
    "TimedOut",
    "TooLarge",
    "Unavailable",
    "Unreachable",
    "Usage",
    "UsageItem",
    "Victim",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import a client when it is first named."""
    import importlib

    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'bunkhouse' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
