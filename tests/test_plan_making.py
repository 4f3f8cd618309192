"""Plans as bytes: what all nodes are told is written once, and nobody can tell. Does not cover: when a plan
is due, or lists of peers."""

from __future__ import annotations

import pytest

from control.catalog import Catalog, PutTenant, TenantRow
from control.plan_making import PlanFacts, PlanMaker
from packer.questions import Asks, Question
from packer.types import KeySpec, ModelRef, ModelSpec, Task, TenantSpec
from packer.wire import WIRE_VERSION, BeatAnswer, decode, encode

SPEC = ModelSpec(
    ModelRef("acme", "m", "0" * 16), "control:", (), "transformers", Task.EMBEDDING, 1, (1,), 0, 1
)


class Told(Catalog):
    """A catalog that counts how often it is read."""

    read = 0

    def plan_parts(self) -> tuple[tuple[TenantSpec, ...], tuple[KeySpec, ...], tuple[ModelSpec, ...]]:
        self.read += 1
        tenants = tuple(TenantSpec(name) for name in self.tenants)
        return tenants, (KeySpec("k" * 12, "0" * 64, "acme"),), (SPEC,)


def facts(seq: int) -> PlanFacts:
    return PlanFacts("c", 1, seq, "start", ("key",))


@pytest.mark.parametrize("question", ["", '"tenants":[],"keys":[],"models":[]'])
def test_an_answer_is_the_same_bytes_as_if_all_were_written_anew(question: str) -> None:
    catalog = Told()
    maker = PlanMaker(lambda: catalog)
    asked = (Question(question, Asks.MODEL, question),)
    seen = []
    for seq in (1, 2):
        for node in ("a", "b"):
            answer = BeatAnswer(WIRE_VERSION, maker.make(facts(seq), node, "", 7), 0, asked)
            written = maker.encode(answer)
            assert written == encode(answer)
            plan = decode(written, BeatAnswer).plan
            assert plan is not None
            seen.append((plan.node, plan.seq, len(plan.tenants)))
        catalog.apply(PutTenant(TenantRow("acme", 0)), seq + 1)
    assert seen == [("a", 1, 0), ("b", 1, 0), ("a", 2, 1), ("b", 2, 1)]
    assert catalog.read == 2


def test_a_plan_that_was_overtaken_before_it_was_written_is_written_as_it_was() -> None:
    catalog = Told()
    maker = PlanMaker(lambda: catalog)
    old = BeatAnswer(WIRE_VERSION, maker.make(facts(1), "a", "", 7), 0)
    catalog.apply(PutTenant(TenantRow("acme", 0)), 2)
    maker.make(facts(2), "b", "", 7)
    assert maker.encode(old) == encode(old)


def test_an_answer_without_a_plan_has_none() -> None:
    maker = PlanMaker(Told)
    answer = BeatAnswer(WIRE_VERSION, None, 3)
    assert decode(maker.encode(answer), BeatAnswer) == answer
