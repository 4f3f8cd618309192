"""Requests that carry tensors: the signature of a model, and bodies on their way to a worker.

Covers: limits of a signature, versions with and without one in a plan, and who waits while a worker holds as
many bytes of bodies as it may. Does not cover: the engine that reads them (``test_export_engine``).
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from agent.bodies import Bodies
from agent.frames import BODIES_BYTES_MAX, BadFrame, Run, Spawn, encode_value
from agent.worker import Worker
from packer.types import (
    PORTS_MAX,
    BadValue,
    ModelRef,
    ModelSpec,
    Task,
    TensorPort,
    TensorSignature,
    check_signature,
)
from packer.wire import WIRE_VERSION, BadMessage, Plan, decode, encode

PORT = TensorPort("x", "FP32", (-1, 4))
SIGNATURE = TensorSignature((PORT,), (replace(PORT, name="y"), TensorPort("count", "INT64", ())))
SPEC = ModelSpec(
    ModelRef("acme", "net", "0" * 16), "control:", (), "export", Task.TENSORS, 4096, (4096,), 4096, 0
)


def plan_of(*specs: ModelSpec) -> Plan:
    return Plan(WIRE_VERSION, "c", "n", 1, 1, (), (), specs)


def test_a_plan_carries_the_signature_of_a_version() -> None:
    plan = plan_of(SPEC, replace(SPEC, signature=SIGNATURE))
    assert decode(encode(plan), Plan) == plan


def test_a_version_of_an_earlier_release_has_no_signature() -> None:
    old = msgspec.json.decode(msgspec.json.encode(SPEC))
    del old["signature"]
    assert msgspec.json.decode(msgspec.json.encode(old), type=ModelSpec) == SPEC


def test_a_plan_whose_signature_is_of_the_wrong_types_is_refused_with_its_path() -> None:
    text = encode(plan_of(replace(SPEC, signature=SIGNATURE))).replace(b"[-1,4]", b'["a",4]')
    with pytest.raises(BadMessage, match=r"signature\.inputs"):
        decode(text, Plan)


def test_a_signature_within_the_limits_is_accepted() -> None:
    check_signature(SIGNATURE)


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (TensorSignature((), (PORT,)), r"signature\.inputs"),
        (TensorSignature((PORT,), ()), r"signature\.outputs"),
        (TensorSignature((PORT, PORT), (PORT,)), r"signature\.inputs"),
        (
            TensorSignature(tuple(replace(PORT, name=f"x{n}") for n in range(PORTS_MAX + 1)), (PORT,)),
            r"signature\.inputs",
        ),
        (TensorSignature((PORT, replace(PORT, name="a b")), (PORT,)), r"signature\.inputs\[1\]\.name"),
        (TensorSignature((replace(PORT, name="x" * 65),), (PORT,)), r"inputs\[0\]\.name"),
        (TensorSignature((replace(PORT, datatype="BYTES"),), (PORT,)), r"inputs\[0\]\.datatype"),
        (TensorSignature((PORT,), (replace(PORT, shape=(-2,)),)), r"outputs\[0\]\.shape"),
        (TensorSignature((PORT,), (replace(PORT, shape=(2**31,)),)), r"outputs\[0\]\.shape"),
        (TensorSignature((PORT,), (replace(PORT, shape=(1,) * 9),)), r"outputs\[0\]\.shape"),
    ],
)
def test_a_signature_beyond_a_limit_is_refused_by_its_field(broken: TensorSignature, field: str) -> None:
    with pytest.raises(BadValue, match=field):
        check_signature(broken)


# --- bodies ---------------------------------------------------------------------------------------


async def test_a_body_waits_until_those_before_it_leave_room() -> None:
    bodies = Bodies(100)
    await bodies.take(1, 60)
    second, third = (asyncio.ensure_future(bodies.take(number, 60)) for number in (2, 3))
    await bodies.take(4, 0)  # has no body, so it passes
    await asyncio.sleep(0)
    assert not second.done()
    bodies.give(4)
    bodies.give(1)
    await second
    assert not third.done()
    bodies.give(2)
    await third


async def test_a_body_alone_is_never_held_back() -> None:
    bodies = Bodies(100)
    await bodies.take(1, 1000)
    waiting = asyncio.ensure_future(bodies.take(2, 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    bodies.give_all()
    await waiting


async def test_who_stops_waiting_leaves_the_turn_to_the_next() -> None:
    bodies = Bodies(100)
    await bodies.take(1, 100)
    second, third = (asyncio.ensure_future(bodies.take(number, 50)) for number in (2, 3))
    await asyncio.sleep(0)
    second.cancel()
    bodies.give(1)
    await third


async def test_nobody_waits_for_a_worker_that_is_gone() -> None:
    bodies = Bodies(100)
    await bodies.take(1, 50)
    waiting = [asyncio.ensure_future(bodies.take(number, 90)) for number in (2, 3)]
    await asyncio.sleep(0)
    bodies.give_all()
    async with asyncio.timeout(60):  # what a dead worker is sent it never gives back
        await asyncio.gather(*waiting)
        await bodies.take(4, 90)


def test_a_worker_holds_no_more_than_its_limit_of_bodies(tmp_path: Path) -> None:
    identity = Spawn(1, "acme", "cpu:0", "cpu", "", 1)
    with socket.socket() as orders, socket.socket() as data:
        worker = Worker(identity, orders, data, tmp_path)  # computes nothing: it does not serve
        body = bytes(BODIES_BYTES_MAX // 2 + 1)
        run = Run(1, str(SPEC.ref), "infer", encode_value({}))
        worker._take_frame(run, body)
        worker._take_frame(msgspec.structs.replace(run, id=2), b"")
        with pytest.raises(BadFrame, match="bodies above the limit"):
            worker._take_frame(msgspec.structs.replace(run, id=3), body)
