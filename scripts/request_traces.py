"""Request traces for benches and simulations, derived from the public traces that lie beside the checkout.

Covers: reading the ServeGen client rates and thinning them into requests over many models, and the
catalogue of model sizes that they are given. Does not cover: replaying them (``pool_model``,
``bench_policies``). Traces are test data: never packaged.

Each ServeGen client is taken for one model of a tenant; its rates are multiplied by a thinning factor and
arrivals are drawn as a Poisson process inside each window of 600 s, from a seed. Sizes are drawn from the
catalogue with the same seed. That mapping is ours: ServeGen says nothing of models behind clients.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import exp
from pathlib import Path

GB = 1_000_000_000
WINDOW_S = 600
# Weights of well-known open models as served, from embeddings to 70B in four bits, in tenths of a GB.
CATALOGUE_TENTHS_GB = (
    *(6, 13, 23, 32, 44, 50, 69, 76, 81, 93, 112, 135, 145, 152, 161, 161, 176),
    *(190, 210, 244, 276, 305, 340, 372, 415, 640, 715),
)
CATALOGUE_BYTES = tuple(tenths * GB // 10 for tenths in CATALOGUE_TENTHS_GB)
TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
SERVEGEN = "servegen_client_rates_600s.csv.gz"
# Poisson draws are made by multiplying uniform numbers, which underflows for greater means.
_MEAN_MAX = 500.0


class NoTrace(Exception):
    """The trace file is not there or not what it should be; the text says which and where."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time. ``models[i]`` is the number of the model that request i wants."""

    name: str
    at_ms: tuple[int, ...]
    models: tuple[int, ...]
    names: tuple[str, ...]
    size_bytes: tuple[int, ...]

    @property
    def days(self) -> float:
        return (self.at_ms[-1] - self.at_ms[0]) / 86_400_000


@cache
def _servegen(path: Path) -> tuple[tuple[str, float, float], ...]:
    """(client, start of the window in s, requests per s), in the file's order."""
    try:
        with gzip.open(path, "rt", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise NoTrace(f"{path}: {error.strerror or error}; give its folder with --traces") from None
    try:
        return tuple(
            (f"{row['model']}/{row['client']}", float(row["t0"]), float(row["rate"])) for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NoTrace(
            f"{path}: a row lacks model, client, t0 or rate, or has no number there: {error}"
        ) from None


def _poisson(generator: random.Random, mean: float) -> int:
    """A Poisson draw (Knuth's method, in parts that do not underflow)."""
    count = 0
    while mean > 0.0:
        part = min(mean, _MEAN_MAX)
        mean -= part
        limit, product = exp(-part), generator.random()
        while product > limit:
            count += 1
            product *= generator.random()
    return count


def _arrivals(path: Path, thinning: float, generator: random.Random) -> Iterator[tuple[int, str]]:
    for client, start_s, rate in _servegen(path):
        for _ in range(_poisson(generator, rate * WINDOW_S * thinning)):
            yield int((start_s + generator.random() * WINDOW_S) * 1000), client


def servegen(thinning: float, seed: int, folder: Path = TRACES) -> Trace:
    """The ServeGen clients thinned to this share of their requests. Raises ``NoTrace``."""
    generator = random.Random(seed)
    arrivals = sorted(_arrivals(folder / SERVEGEN, thinning, generator))
    names = sorted({name for _, name in arrivals})
    number = {name: at for at, name in enumerate(names)}
    return Trace(
        f"servegen {thinning:g} seed {seed}",
        tuple(at_ms for at_ms, _ in arrivals),
        tuple(number[name] for _, name in arrivals),
        tuple(names),
        tuple(generator.choice(CATALOGUE_BYTES) for _ in names),
    )
