#!/usr/bin/env python3
"""Step a dumped ring again: print what happened, and check that the core still decides the same.

Covers: the JSON lines that ``agent/loop.py`` writes on SIGUSR1 or when an invariant breaks. A ring that
begins at the node's first step is stepped again from an empty core and every action compared; a ring
that begins later can only be printed, because the state it started from is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from packer import events, residency
from packer.events import Action, Event


@dataclass(frozen=True, slots=True)
class Step:
    number: int
    now_ms: int
    event: Event
    actions: list[Action]


def read_steps(path: Path) -> Iterator[Step]:
    """The dump's steps; raises ``ValueError`` naming the line that does not decode."""
    for line_number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            event: Event = decode(*row["event"])
            actions: list[Action] = [decode(*action) for action in row["actions"]]
            yield Step(row["step"], row["now_ms"], event, actions)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: line {line_number}: {error}") from None


def decode(name: str, fields: object):  # type: ignore[no-untyped-def]  # an event or an action, by name
    kind = getattr(events, name)
    return msgspec.convert(fields, type=kind)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--story", metavar="TEXT", help="print only steps that mention TEXT, e.g. a model")
    options = parser.parse_args()
    try:
        steps = list(read_steps(options.dump))
    except (OSError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    for step in steps:
        lines = [f"{step.number:>8} {step.now_ms:>12} {step.event}"] + [
            f"{'':>24}-> {a}" for a in step.actions
        ]
        text = "\n".join(lines)
        if options.story is None or options.story in text:
            print(text)
    if not steps or steps[0].number != 1:
        print("replay: the ring does not begin at step 1; printed, not stepped again", file=sys.stderr)
        return 0
    return step_again(steps)


def step_again(steps: list[Step]) -> int:
    core = residency.Node()
    for step in steps:
        actions = residency.step(core, step.event, step.now_ms)
        if actions != step.actions:
            print(
                f"replay: step {step.number} differs:\n  then {step.actions}\n  now  {actions}",
                file=sys.stderr,
            )
            return 1
        residency.check(core)
    print(f"replay: {len(steps)} steps, every action the same, every invariant held", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
