"""Pictures of simulations, with matplotlib where it is installed.

Covers: one outcome (who waits how long, and when), and many fleets beside each other. Does not cover: the
figures themselves (``packer.outcome``). matplotlib is an extra of the server (``plot``) and is imported only
when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packer.outcome import Outcome
from packer.types import BadValue

SUFFIXES = (".png", ".svg")
BUCKETS = 200


class NoMatplotlib(Exception):
    """A picture was asked for, and there is nothing to draw it with."""


def need_matplotlib(path: Path) -> None:
    """Raises before anything is simulated for nothing."""
    if path.suffix not in SUFFIXES:
        raise BadValue("--plot", f"{path.name[:60]!r} must end with {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise NoMatplotlib(
            "--plot: matplotlib is not installed beside the server; install it there (its extra is called "
            "plot; pip install matplotlib does the same), or leave --plot out"
        )


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_outcome(outcomes: Sequence[Outcome], path: Path) -> None:
    """How many requests wait how long, and over the time of the trace what their waiting adds up to."""
    outcome = outcomes[0]
    figure = _figure(10, 4)
    waits, hours = figure.subplots(1, 2)
    answered = max(outcome.all.requests - outcome.all.refused, 1)
    cold_s = sorted((cold_ms / 1000 for _, _, cold_ms in outcome.cold), reverse=True)
    shares = [(place + 1) / answered for place in range(len(cold_s))]
    every = max(1, len(cold_s) // 2_000)  # a line of some thousand points looks the same and stays small
    waits.loglog([max(s, 0.001) for s in cold_s[::every]], shares[::every], drawstyle="steps-post")
    waits.axhline(0.01, linewidth=0.8, color="grey", linestyle=":")
    waits.set(xlabel="cold seconds", ylabel="share of requests that wait longer", title=str(outcome.fleet))
    if outcome.cold:
        first = min(at_ms for _, at_ms, _ in outcome.cold)
        last = max(at_ms for _, at_ms, _ in outcome.cold)
        wide_ms = max((last - first) / BUCKETS, 1.0)
        sums = [0.0] * BUCKETS
        for _, at_ms, cold_ms in outcome.cold:
            sums[min(int((at_ms - first) / wide_ms), BUCKETS - 1)] += cold_ms / 1000
        hours.plot([(first + at * wide_ms) / 3_600_000 for at in range(BUCKETS)], sums, linewidth=0.8)
    hours.set(xlabel="hours of the trace", ylabel=f"cold seconds per {1 / BUCKETS:.1%} of it")
    figure.savefig(path)


def draw_fleets(outcomes: Sequence[Outcome], path: Path) -> None:
    """Mean and 99th percentile of every fleet that was tried, against its memory."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    rams = sorted({outcome.fleet.ram_bytes for outcome in outcomes})
    for ram in rams:
        mine = [outcome for outcome in outcomes if outcome.fleet.ram_bytes == ram]
        boxes = [outcome.fleet.boxes for outcome in mine]
        label = f"{ram / 1e9:g} GB RAM"
        for name, values, style in (
            ("p99", [o.all.cold_s_p99 for o in mine], "-"),
            ("mean", [o.all.cold_s_mean for o in mine], "--"),
            ("least mean", [o.least_cold_s_mean for o in mine], ":"),
        ):
            axes.plot(boxes, values, style, marker=".", label=f"{name}, {label}")
    axes.set(xlabel="boxes", ylabel="cold seconds", yscale="symlog")
    axes.set_yscale("symlog", linthresh=0.001)
    axes.legend(fontsize="small")
    figure.savefig(path)
