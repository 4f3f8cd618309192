"""The measure of how fast plans reach nodes: it counts every node and every change.

Covers: ``scripts/plan_delay.py`` on two nodes. Does not cover: how long it took; that is for the machine that
it is run on.
"""

from __future__ import annotations

import plan_delay


async def test_every_change_is_timed_at_every_node() -> None:
    delays = await plan_delay.measure(nodes=2, changes=3)
    assert (delays.nodes, len(delays.each_ms), len(delays.last_ms)) == (2, 6, 3)
    assert all(each > 0 for each in delays.each_ms)
    assert sorted(delays.last_ms)[-1] == max(delays.each_ms)
