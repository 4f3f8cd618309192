"""How soon a model is likely to be used again: a self-exciting process, learned online per model.

Covers: the intensity of a model's uses (a Hawkes process with exponential kernels from a minute to ten
days, A. G. Hawkes 1971; weights by online expectation-maximisation), what a silence says of the next use,
the mean rate over the next minutes, and evaluating it for a thousand models in well under a millisecond.
Does not cover: what a restore costs or who may be evicted (``keep``, ``room``).

People's traffic comes in bursts inside sessions inside days, so one time constant is always wrong. Each
use raises the intensity by one share per kernel; how large a share each kernel gets is learned from the
model's own past, starting from what the node's models do on the whole, which itself starts from one fixed
prior. So where traffic has no bursts, or a scan touches many models once, nobody has to say so. Ordering by
hazard rate over size is optimal among causal policies when sizes divide (Panigrahy et al. 2022); this is
the hazard rate.

Kernels only know how often a model was used, not that it has fallen silent. A silence is measured by the uses
that its own kernels expected of it meanwhile, which makes silences of all models comparable: if the kernels
said all there is to say, every model would end its silence at rate one on that scale (time rescaling, Brown
et al. 2002). Two things are learned and assumed of it:
- The node counts at which silences uses do come, and corrects every rate by that. Where models are used in
  turns, the one just used is the last to come again; where they stop for good, a long silence lasts.
- The more often a model was used without a stop, the less likely is it that any one use was its last; but a
  silence in which e^n uses were expected less and less likely outweighs that (as in the model of buyers who
  leave unseen: Fader, Hardie and Lee 2005). So its rate is cut, to a tenth and not below: models come back.

Standard library only, no clock: times come in as milliseconds. The same uses give the same intensity.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, inf

# Eight kernels from a minute to ten days, each about four times slower than the one before: bursts,
# sessions, working days, habits. One setting for every node and trace.
KERNELS = 8
SHORTEST_MS = 60_000.0
LONGEST_MS = 864_000_000.0
_RATIO = (LONGEST_MS / SHORTEST_MS) ** (1 / (KERNELS - 1))
SCALES_MS = tuple(SHORTEST_MS * _RATIO**k for k in range(KERNELS))
# What is asked is the mean over the next twenty minutes, not the instant: right after a use the instant is
# ruled by the shortest kernel, which is the one that is known worst.
HORIZON_MS = 1_200_000.0
# Before anything is learned nine tenths of the uses are follow-ups, spread evenly over the kernels. For
# the node this weighs as much as a hundred uses; what the node has learned weighs three of a model's own.
PRIOR_SHARE = 0.9 / KERNELS
PRIOR_USES = 100.0
SHARED_USES = 3.0
# The rate of uses that follow on nothing, before any is seen: one in a hundred days.
BASE_USES = 0.05
BASE_MS = 432_000_000.0
# Shares are kept relative to a common epoch, so that one factor per kernel serves all models. The factor
# of the shortest kernel grows by e per minute, so an epoch ends at e^400; floating point ends at e^709.
EPOCH_MS = 400 * int(SHORTEST_MS)

# Silences are told apart by the uses that were expected meanwhile, up to these bounds and above the last.
# What is used in turns ends its silence when one use is expected, in the middle between two of them.
SILENCE_ENDS = (0.35, 0.7, 1.4, 2.8, 5.6, 11.2, 22.4)
SILENCES = len(SILENCE_ENDS) + 1
_ENDS = (*SILENCE_ENDS, inf)
# Silences that weigh as much, of each length, as what was seen of it: before, the kernels are believed.
SILENCES_PRIOR = 20.0
# Of more than this many both counts are halved: a node whose models are used in new ways learns it anew.
SILENCES_MAX = 4_000.0
# Silences shorter than the shortest kernel are bursts. Nobody is evicted between their uses, and a busy model
# that has no others shall not speak for all.
SILENCE_MS = SHORTEST_MS
# Nor shall the busiest of the others: of n silences of a model some two roots of n are learned from, which
# are picked by the fractions of n times the golden ratio. They repeat no pattern that its uses could have.
_GOLDEN = 0.6180339887498949
# A model's rate is corrected over the silence until one more use of it is expected: after that use another
# silence begins, and what is used every few minutes is wanted although it was used just now.
CORRECTED_USES = 1.0
# Before anything is known one use in eleven is a model's last for a long time; of a model that was used a
# hundred times one in a thousand.
ENDED_USES = 0.1
# What is left of the rate of a model that has stopped for sure.
BACK_SHARE = 0.1

# Uses of all models that may wait until the node learns from them; a minute at the longest.
SHARED_PENDING_MAX = 16

# What a kernel's excitation contributes to the mean over the horizon, per ms.
_GAINS = tuple((1.0 - exp(-HORIZON_MS / scale)) / HORIZON_MS for scale in SCALES_MS)
# Share of a kernel's excitation that is gone when a silence begins to count.
_BEGUN = tuple(1.0 - exp(-SILENCE_MS / scale) for scale in SCALES_MS)
# The kernels one by one, for ``note_use``: how fast they decay, and what excitation they give per ms.
_PACE0, _PACE1, _PACE2, _PACE3, _PACE4, _PACE5, _PACE6, _PACE7 = (-1.0 / scale for scale in SCALES_MS)
_PER_MS0, _PER_MS1, _PER_MS2, _PER_MS3, _PER_MS4, _PER_MS5, _PER_MS6, _PER_MS7 = (
    1.0 / scale for scale in SCALES_MS
)


_ZEROS = (0.0,) * KERNELS


@dataclass(slots=True, eq=False)
class Shared:
    """What all models of a node do on the whole: the prior of each."""

    uses: int = 0
    last_ms: int = 0
    # As in ``Intensity``, summed over all models. What has elapsed is the uses less their levels, so a model
    # that is never used again counts as well.
    levels: list[float] = field(default_factory=lambda: [0.0] * KERNELS)
    explained: tuple[float, ...] = _ZEROS
    shares: list[float] = field(default_factory=lambda: [PRIOR_SHARE] * KERNELS)
    # ``shares`` in uses of a model's own, as they are weighed.
    priors: tuple[float, ...] = (SHARED_USES * PRIOR_SHARE,) * KERNELS
    pending: int = 0  # uses that are counted in ``explained`` only, as yet
    # Uses that ended silences, by how long these were, and uses that were expected during silences, by how
    # long they were then.
    ended: list[float] = field(default_factory=lambda: [0.0] * SILENCES)
    expected: list[float] = field(default_factory=lambda: [0.0] * SILENCES)
    # The one over the other, and what to add to that times a silence for the sum over all of it.
    hazards: tuple[float, ...] = (1.0,) * SILENCES
    offsets: tuple[float, ...] = (0.0,) * SILENCES
    heard: bool = False  # a silence since ``hazards`` were worked out


@dataclass(slots=True, eq=False)
class Intensity:
    """What is known of one model's uses: bounded, whatever its past. All times in ms."""

    uses: int = 0
    first_ms: int = 0
    last_ms: int = 0
    # Uses so far, each decayed by its age, per kernel, as of the last use.
    levels: tuple[float, ...] = _ZEROS
    # Share of past uses that each kernel explains, and how many uses it has had time to bring about.
    explained: tuple[float, ...] = _ZEROS
    elapsed: tuple[float, ...] = _ZEROS
    # Uses that no kernel explains.
    base_uses: float = 0.0
    # Uses to come as (epoch, base, factor per kernel), and how many at the last use; see ``Ranking``.
    epoch_ms: int = -1
    base_per_ms: float = 0.0
    factors: tuple[float, ...] = _ZEROS
    due: float = 0.0
    # The rate as last worked out by ``Ranking.rates``, and when.
    rated_ms: int = -1
    per_ms: float = 0.0


def note_use(known: Intensity, shared: Shared, now_ms: int) -> None:
    """Count one use now and learn from it. Constant time, constant memory.

    Written out kernel by kernel: every request comes by here, and a loop would take twice as long.
    """
    if not known.uses:
        _note_first(known, shared, now_ms)
        return
    passed_ms = now_ms - known.last_ms
    if passed_ms < 0:
        passed_ms, now_ms = 0, known.last_ms
    if passed_ms >= SILENCE_MS and (known.uses * _GOLDEN % 1.0) ** 2 * known.uses < 1.0:
        _note_silence(known, shared, passed_ms)
    l0, l1, l2, l3, l4, l5, l6, l7 = known.levels
    d0 = l0 * exp(passed_ms * _PACE0)
    d1 = l1 * exp(passed_ms * _PACE1)
    d2 = l2 * exp(passed_ms * _PACE2)
    d3 = l3 * exp(passed_ms * _PACE3)
    d4 = l4 * exp(passed_ms * _PACE4)
    d5 = l5 * exp(passed_ms * _PACE5)
    d6 = l6 * exp(passed_ms * _PACE6)
    d7 = l7 * exp(passed_ms * _PACE7)
    known.levels = (d0 + 1.0, d1 + 1.0, d2 + 1.0, d3 + 1.0, d4 + 1.0, d5 + 1.0, d6 + 1.0, d7 + 1.0)
    e0, e1, e2, e3, e4, e5, e6, e7 = known.elapsed
    e0 += l0 - d0
    e1 += l1 - d1
    e2 += l2 - d2
    e3 += l3 - d3
    e4 += l4 - d4
    e5 += l5 - d5
    e6 += l6 - d6
    e7 += l7 - d7
    known.elapsed = (e0, e1, e2, e3, e4, e5, e6, e7)
    # What each kernel has to do with this use: its weight, as learned so far, times its excitation.
    x0, x1, x2, x3, x4, x5, x6, x7 = known.explained
    p0, p1, p2, p3, p4, p5, p6, p7 = shared.priors
    s0 = (x0 + p0) / (e0 + SHARED_USES) * d0 * _PER_MS0
    s1 = (x1 + p1) / (e1 + SHARED_USES) * d1 * _PER_MS1
    s2 = (x2 + p2) / (e2 + SHARED_USES) * d2 * _PER_MS2
    s3 = (x3 + p3) / (e3 + SHARED_USES) * d3 * _PER_MS3
    s4 = (x4 + p4) / (e4 + SHARED_USES) * d4 * _PER_MS4
    s5 = (x5 + p5) / (e5 + SHARED_USES) * d5 * _PER_MS5
    s6 = (x6 + p6) / (e6 + SHARED_USES) * d6 * _PER_MS6
    s7 = (x7 + p7) / (e7 + SHARED_USES) * d7 * _PER_MS7
    base = known.base_per_ms
    total = base + s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7
    if total > 0.0:
        per = 1.0 / total
        s0 *= per
        s1 *= per
        s2 *= per
        s3 *= per
        s4 *= per
        s5 *= per
        s6 *= per
        s7 *= per
        known.explained = (x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7)
        x0, x1, x2, x3, x4, x5, x6, x7 = shared.explained
        shared.explained = (x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7)
        known.base_uses += base * per
    known.uses += 1
    known.last_ms = now_ms
    known.base_per_ms = (known.base_uses + BASE_USES) / (now_ms - known.first_ms + BASE_MS)
    known.epoch_ms = known.rated_ms = -1
    shared.pending += 1
    if shared.pending >= SHARED_PENDING_MAX or now_ms - shared.last_ms >= SHORTEST_MS:
        _learn_shared(shared, now_ms)


def _note_first(known: Intensity, shared: Shared, now_ms: int) -> None:
    """The first use of a model: nothing explains it, and nothing is learned from it yet."""
    known.levels = (1.0,) * KERNELS
    known.uses = 1
    known.first_ms = now_ms
    known.last_ms = max(now_ms, known.last_ms)
    known.base_per_ms = (known.base_uses + BASE_USES) / (known.last_ms - now_ms + BASE_MS)
    known.epoch_ms = known.rated_ms = -1
    shared.pending += 1
    if shared.pending >= SHARED_PENDING_MAX or now_ms - shared.last_ms >= SHORTEST_MS:
        _learn_shared(shared, now_ms)


def _note_silence(known: Intensity, shared: Shared, passed_ms: int) -> None:
    """A use ends a silence: learn at which one, by the uses that were expected meanwhile. What was expected
    before ``SILENCE_MS`` does not count: until then nobody asked whether it would end."""
    silence = begun = 0.0
    for at, scale_ms in enumerate(SCALES_MS):
        weight = (known.explained[at] + shared.priors[at]) / (known.elapsed[at] + SHARED_USES)
        due = weight * known.levels[at]
        silence += due * (1.0 - exp(-passed_ms / scale_ms))
        begun += due * _BEGUN[at]
    end = bisect(SILENCE_ENDS, silence)
    shared.ended[end] += 1.0
    for place in range(bisect(SILENCE_ENDS, begun), end):
        shared.expected[place] += SILENCE_ENDS[place] - begun
        begun = SILENCE_ENDS[place]
    shared.expected[end] += max(silence - begun, 0.0)
    shared.heard = True


def _learn_silences(shared: Shared) -> None:
    """How much more or less often uses come after each length of silence than the kernels expect."""
    shared.heard = False
    if sum(shared.ended) > SILENCES_MAX:
        shared.ended = [uses / 2 for uses in shared.ended]
        shared.expected = [uses / 2 for uses in shared.expected]
    pairs = zip(shared.ended, shared.expected, strict=True)
    hazards = [(ended + SILENCES_PRIOR) / (expected + SILENCES_PRIOR) for ended, expected in pairs]
    offsets = [0.0]
    for place, end in enumerate(SILENCE_ENDS):
        offsets.append(offsets[place] + end * (hazards[place] - hazards[place + 1]))
    shared.hazards, shared.offsets = tuple(hazards), tuple(offsets)


def _learn_shared(shared: Shared, now_ms: int) -> None:
    """Take in the uses since the last time as if all were now: they lie within the shortest kernel, and
    what a whole node does moves slowly."""
    passed_ms = max(now_ms - shared.last_ms, 0)
    new = shared.pending
    shared.pending = 0
    shared.uses += new
    shared.last_ms = max(now_ms, shared.last_ms)
    levels = shared.levels
    for k, scale_ms in enumerate(SCALES_MS):
        levels[k] = level = levels[k] * exp(-passed_ms / scale_ms) + new
        shared.shares[k] = (shared.explained[k] + PRIOR_USES * PRIOR_SHARE) / (
            shared.uses - level + PRIOR_USES
        )
    shared.priors = tuple([SHARED_USES * share for share in shared.shares])
    if shared.heard:
        _learn_silences(shared)


def encode_shared(shared: Shared, shift_ms: int = 0) -> list[float]:
    """What all models have in common, as plain numbers; its time moved by ``shift_ms``."""
    uses = float(shared.uses + shared.pending)
    times = [uses, float(shared.last_ms + shift_ms)]
    return [*times, *shared.levels, *shared.explained, *shared.ended, *shared.expected]


def decode_shared(numbers: Sequence[float], shift_ms: int = 0) -> Shared:
    """The inverse of ``encode_shared``. Raises ``ValueError`` on anything that it does not write.

    What was written before silences were counted lacks them: they are learned anew.
    """
    at = 2 + 2 * KERNELS
    if len(numbers) not in (at, at + 2 * SILENCES) or any(not 0 <= value < 1e15 for value in numbers[2:]):
        raise ValueError(f"{len(numbers)} numbers are not what a node has learned of uses")
    uses, last_ms = numbers[:2]
    if not 0 <= uses < 1e15 or not -1e15 < last_ms < 1e15 or max(numbers[2 : 2 + KERNELS]) > uses:
        raise ValueError("what a node has learned of uses has impossible counts or times")
    shared = Shared(int(uses), int(last_ms) + shift_ms)
    shared.levels, shared.explained = list(numbers[2 : 2 + KERNELS]), tuple(numbers[2 + KERNELS : at])
    if len(numbers) > at:
        shared.ended, shared.expected = list(numbers[at : at + SILENCES]), list(numbers[at + SILENCES :])
        shared.heard = True
    _learn_shared(shared, shared.last_ms)
    return shared


def _settle(known: Intensity, shared: Shared, epoch_ms: int) -> None:
    """Express the uses to come relative to ``epoch_ms``."""
    since_ms = min(known.last_ms - epoch_ms, EPOCH_MS)
    parts = zip(known.explained, known.elapsed, known.levels, shared.shares, strict=True)
    due = [
        (explained + SHARED_USES * share) / (elapsed + SHARED_USES) * level
        for explained, elapsed, level, share in parts
    ]
    known.due = sum(due)
    known.factors = tuple(
        [uses * exp(since_ms / scale_ms) for uses, scale_ms in zip(due, SCALES_MS, strict=True)]
    )
    known.epoch_ms = epoch_ms


class Ranking:
    """The rates of many models at one moment.

    The excitation of every model decays by the same factors, so what a model's kernels still expect is eight
    products of its own factors with those of the moment; its exponentials are paid once per use and epoch.
    """

    __slots__ = ("_decay", "_epoch_ms", "_gains", "_now_ms", "_shared")

    def __init__(self, shared: Shared, now_ms: int) -> None:
        self._shared = shared
        self._now_ms = now_ms
        self._epoch_ms = now_ms - now_ms % EPOCH_MS
        passed_ms = now_ms - self._epoch_ms
        self._decay = decay = [exp(-passed_ms / scale_ms) for scale_ms in SCALES_MS]
        self._gains = [gain * left for gain, left in zip(_GAINS, decay, strict=True)]

    def uses_per_ms(self, known: Intensity) -> float:
        """Expected uses per ms over the next ``HORIZON_MS``; 0 for a model that was never used."""
        return self.rates((known,))[0]

    def rates(self, models: Iterable[Intensity]) -> list[float]:
        """``uses_per_ms`` of many in one tight loop, since there may be a thousand."""
        found: list[float] = []
        now_ms, epoch_ms, shared = self._now_ms, self._epoch_ms, self._shared
        d0, d1, d2, d3, d4, d5, d6, d7 = self._decay
        g0, g1, g2, g3, g4, g5, g6, g7 = self._gains
        hazards, offsets, ends, horizon_ms = shared.hazards, shared.offsets, _ENDS, HORIZON_MS
        for known in models:
            if known.rated_ms == now_ms:
                found.append(known.per_ms)
                continue
            if known.epoch_ms != epoch_ms:
                _settle(known, shared, epoch_ms)
            f0, f1, f2, f3, f4, f5, f6, f7 = known.factors
            rate = f0 * g0 + f1 * g1 + f2 * g2 + f3 * g3 + f4 * g4 + f5 * g5 + f6 * g6 + f7 * g7
            left = f0 * d0 + f1 * d1 + f2 * d2 + f3 * d3 + f4 * d4 + f5 * d5 + f6 * d6 + f7 * d7
            silence = known.due - left
            if silence < 0.0:
                silence = 0.0
            until = rate * horizon_ms
            until = silence + (until if until < CORRECTED_USES else CORRECTED_USES)
            place = bisect(ends, silence)
            # How much more likely the silence is if the last use was not the last for long.
            goes_on = exp(-silence) * known.uses
            goes_on = BACK_SHARE + (1.0 - BACK_SHARE) * goes_on / (goes_on + ENDED_USES)
            if until < ends[place]:
                rate *= hazards[place] * goes_on
            else:
                last = bisect(ends, until)
                ended = offsets[last] + hazards[last] * until - offsets[place] - hazards[place] * silence
                rate *= ended / (until - silence) * goes_on
            known.per_ms = rate = known.base_per_ms + rate
            known.rated_ms = now_ms
            found.append(rate)
        return found


def encode(known: Intensity) -> list[float]:
    """Everything that was learned, as plain numbers for a journal; times stay the caller's clock."""
    return [
        float(known.uses),
        float(known.first_ms),
        float(known.last_ms),
        known.base_uses,
        *known.levels,
        *known.explained,
        *known.elapsed,
    ]


def decode(numbers: list[float], shift_ms: int = 0) -> Intensity:
    """The inverse of ``encode``, every time moved by ``shift_ms`` (a new process has a new clock).

    Raises ``ValueError`` on anything ``encode`` does not write: the journal may be another version's.
    """
    if len(numbers) != 4 + 3 * KERNELS or any(not 0 <= value < 1e15 for value in numbers[3:]):
        raise ValueError(f"{len(numbers)} numbers are not a learned intensity")
    uses, first, last, base = numbers[:4]
    if not 1 <= uses < 1e15 or not -1e15 < first <= last < 1e15:
        raise ValueError("a learned intensity with impossible counts or times")
    at = [4 + KERNELS * part for part in range(4)]
    known = Intensity(int(uses), int(first) + shift_ms, int(last) + shift_ms)
    known.levels, known.explained, known.elapsed = (tuple(numbers[at[p] : at[p + 1]]) for p in range(3))
    known.base_uses = base
    known.base_per_ms = (base + BASE_USES) / (known.last_ms - known.first_ms + BASE_MS)
    return known
