"""Questions that control carries to a node in the answer to its beat, and what the node answers.

Covers: their shapes and limits, on the wire. Does not cover: who may ask (``control/routes/plans.py``), how
long control waits (``control/questions.py``), or the answers themselves (``decisions``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from packer.decisions import Decision, Forecast
from packer.types import KIB

# Decisions in one answer, the newest; one is some 300 bytes, and 200 more for each victim.
DECISIONS_MAX = 32
# Bytes of them as JSON: names may be long, and then the oldest are left out. Beside them an answer has a
# forecast or a request's story, some 40 KiB on the largest box.
DECISIONS_BYTES_MAX = 192 * KIB
REPLY_BYTES_MAX = 256 * KIB
# Questions in one answer to a beat, and so answers in one message.
QUESTIONS_MAX = 8
# Of one message with all its answers; whatever is above is refused, with every answer in it.
REPLIES_BYTES_MAX = QUESTIONS_MAX * REPLY_BYTES_MAX


class Asks(StrEnum):
    PLAN = "plan"  # what would a request for the model meet?
    MODEL = "model"  # what was decided about the model?
    REQUEST = "request"  # what became of the request?


@dataclass(frozen=True, slots=True)
class Question:
    """``subject`` is a version's reference, or a request's id."""

    question: str
    asks: Asks
    subject: str


@dataclass(frozen=True, slots=True)
class RequestStory:
    """What a node knows of one request. ``outcome``: waiting, granted, refused or left."""

    request: str
    ref: str
    asked_ms: int
    outcome: str
    device: str = ""
    from_tier: str = ""
    waited_ms: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """One node's answer. Nothing set: the node knows nothing of the subject."""

    question: str
    forecast: Forecast | None = None
    decisions: tuple[Decision, ...] = ()
    story: RequestStory | None = None


@dataclass(frozen=True, slots=True)
class Replies:
    """Node to control, as soon as it has them."""

    version: int
    replies: tuple[Reply, ...]
