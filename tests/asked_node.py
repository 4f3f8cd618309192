"""A node that answers questions out of a real core, on a real uplink, without workers.

Covers: joining a running control server and answering what its beats bring. Does not cover: judging.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from running_control import Running, empty_report
from running_uplinks import Owner, beating, make_uplink, token_file
from scene import Scene, model

from agent.decisions import Decisions
from packer import residency
from packer.events import Answer, Asked, Event, Evict, Evicted, Grant, Packed, Restore, Restored
from packer.questions import Asks, Question, Reply
from packer.types import MIB, ModelSpec, parse_ref
from packer.wire import Report

WALL_MS = 1_700_000_000_000


@dataclass(slots=True)
class AskedNode(Owner):
    """``mute``: it hears questions and says nothing."""

    scene: Scene = field(default_factory=Scene)
    decisions: Decisions = field(default_factory=lambda: Decisions(lambda: WALL_MS))
    mute: bool = False
    asked: list[Question] = field(default_factory=list)

    def report(self) -> Report:
        return replace(empty_report("http://127.0.0.1:9"))

    async def reply(self, question: Question) -> Reply:
        self.asked.append(question)
        if self.mute:
            return Reply("another")
        if question.asks is not Asks.PLAN:
            return self.decisions.reply(question)
        (answer,) = residency.step(
            self.scene.node, Asked("q", parse_ref(question.subject)), self.scene.now_ms
        )
        assert isinstance(answer, Answer)
        return Reply(question.question, forecast=replace(answer.forecast, at_ms=WALL_MS))

    def feed(self, event: Event) -> list[object]:
        """One step that is remembered; all goes well."""
        actions = self.scene.feed(event)
        self.decisions.observe(self.scene.node, event, actions)
        for action in actions:
            if isinstance(action, Restore):
                self.feed(Restored(action.ref, action.device, action.from_tier, 7, order=action.order))
                if action.disk_bytes:
                    self.feed(Packed(action.ref, action.device, MIB, MIB, action.pack_order))
            elif isinstance(action, Evict):
                self.feed(Evicted(action.ref, action.device, action.order))
        return [action for action in actions if isinstance(action, Grant)]


def spec_like(ref: str, image_mib: int = 40) -> ModelSpec:
    """A version that control knows by this reference, of another size in the node's core."""
    parsed = parse_ref(ref)
    return replace(model(f"{parsed.tenant}/{parsed.name}", image_mib), ref=parsed)


@asynccontextmanager
async def joined(control: Running, folder: Path, node: AskedNode) -> AsyncIterator[AskedNode]:
    """The node beats until the block ends; control has heard of it when it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    uplink = make_uplink(control, folder, node, await token_file(control, folder))
    async with beating(uplink):
        await node.until_versions(len(control.server.control.catalog.models))
        yield node
