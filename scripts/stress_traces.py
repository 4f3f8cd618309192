"""Synthetic requests of shapes that the public traces do not have.

Covers: traffic that a policy could be wrong about: steady and skewed, on and off by day, scans, bursts of
one model after another, popularity that drifts, everything at random. Does not cover: replaying it. Every
shape is made from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from request_traces import CATALOGUE_BYTES, Trace

MODELS = 120
DAYS = 7
DAY_MS = 86_400_000
REQUESTS = 20_000
_Arrivals = Iterator[tuple[int, int]]


def _skewed(generator: random.Random) -> list[float]:
    """Zipf's law over the models."""
    return [1.0 / (rank + 1) for rank in range(MODELS)]


def _steady(generator: random.Random) -> _Arrivals:
    """Everything always, some models far more often."""
    models = generator.choices(range(MODELS), _skewed(generator), k=REQUESTS)
    for model in models:
        yield int(generator.random() * DAYS * DAY_MS), model


def _days(generator: random.Random) -> _Arrivals:
    """Each model is used in its own eight hours of the day, or of every other day."""
    starts = [generator.random() for _ in range(MODELS)]
    every = [generator.choice((1, 2)) for _ in range(MODELS)]
    for model in generator.choices(range(MODELS), _skewed(generator), k=REQUESTS):
        day = generator.randrange(0, DAYS, every[model])
        yield int((day + (starts[model] + generator.random() / 3) % 1.0) * DAY_MS), model


def _scans(generator: random.Random) -> _Arrivals:
    """Steady traffic over half of the models, and every six hours a job touches the other half once."""
    half = MODELS // 2
    for at_ms, model in _steady(generator):
        yield at_ms, model % half
    for start_ms in range(0, DAYS * DAY_MS, DAY_MS // 4):
        for place in range(half):
            yield start_ms + place * 20_000, half + place


def _bursts(generator: random.Random) -> _Arrivals:
    """Sessions: a model is used some twenty times within minutes, then not for hours."""
    weights = _skewed(generator)
    for model in generator.choices(range(MODELS), weights, k=REQUESTS // 20):
        at_ms = generator.random() * DAYS * DAY_MS
        for _ in range(generator.randrange(1, 40)):
            yield int(at_ms), model
            at_ms += generator.expovariate(1 / 30_000)


def _drift(generator: random.Random) -> _Arrivals:
    """Which models are popular changes slowly, all of them within two days."""
    weights = _skewed(generator)
    for place in generator.choices(range(MODELS), weights, k=REQUESTS):
        at = generator.random() * DAYS
        yield int(at * DAY_MS), (place + int(at / 2 * MODELS)) % MODELS


def _loop(generator: random.Random) -> _Arrivals:
    """One model after the other, round and round: the worst there is for the longest-unused-first rule."""
    for place in range(REQUESTS):
        yield place * DAYS * DAY_MS // REQUESTS, place % MODELS


def _even(generator: random.Random) -> _Arrivals:
    """Every model as often as every other, at random: nothing can be learned."""
    for _ in range(REQUESTS):
        yield int(generator.random() * DAYS * DAY_MS), generator.randrange(MODELS)


SHAPES: dict[str, Callable[[random.Random], _Arrivals]] = {
    "steady": _steady,
    "days": _days,
    "scans": _scans,
    "bursts": _bursts,
    "drift": _drift,
    "loop": _loop,
    "even": _even,
}


def stress(shape: str, seed: int) -> Trace:
    """The requests of a shape."""
    generator = random.Random(f"{shape} {seed}")
    arrivals = sorted(SHAPES[shape](generator))
    sizes = tuple(generator.choice(CATALOGUE_BYTES) for _ in range(MODELS))
    names = tuple(f"m{number:03}" for number in range(MODELS))
    return Trace(
        f"{shape} seed {seed}", tuple(at for at, _ in arrivals), tuple(m for _, m in arrivals), names, sizes
    )
