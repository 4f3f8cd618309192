"""What tenants used: amounts per hour and model, as nodes count them and control keeps them.

Covers: the amounts and their addition, the hour that a moment belongs to, and which hour control takes a
row for. Does not cover: counting (``agent/usage_meter.py``), the node's tables (``agent/usage_spool.py``),
control's (``control/usage_tables.py``), or limits (``packer/rates.py``).

Pure: no clock, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# Sums end up in JSON that browsers read; no tenant lives to use more of anything.
AMOUNT_MAX = 2**53
# Rows of one beat: 250 bytes each. What is left goes with the next.
USAGE_ROWS_PER_BEAT_MAX = 1_000


class Used(msgspec.Struct, frozen=True):
    """``requests``: that were let in, of which ``answers`` went well to their end. ``restored_*_bytes``:
    moved to a device from that tier, for whomever it was. ``device_ms``: an engine's own time."""

    requests: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    device_ms: int = 0
    restored_host_bytes: int = 0
    restored_disk_bytes: int = 0
    restored_origin_bytes: int = 0

    def __add__(self, other: Used) -> Used:
        # Written out, here and below: every request comes by here.
        return Used(
            min(self.requests + other.requests, AMOUNT_MAX),
            min(self.answers + other.answers, AMOUNT_MAX),
            min(self.prompt_tokens + other.prompt_tokens, AMOUNT_MAX),
            min(self.completion_tokens + other.completion_tokens, AMOUNT_MAX),
            min(self.device_ms + other.device_ms, AMOUNT_MAX),
            min(self.restored_host_bytes + other.restored_host_bytes, AMOUNT_MAX),
            min(self.restored_disk_bytes + other.restored_disk_bytes, AMOUNT_MAX),
            min(self.restored_origin_bytes + other.restored_origin_bytes, AMOUNT_MAX),
        )

    def beyond(self, other: Used) -> Used:
        """What this has more; a worker that counts backwards takes nothing back."""
        return Used(
            max(self.requests - other.requests, 0),
            max(self.answers - other.answers, 0),
            max(self.prompt_tokens - other.prompt_tokens, 0),
            max(self.completion_tokens - other.completion_tokens, 0),
            max(self.device_ms - other.device_ms, 0),
            max(self.restored_host_bytes - other.restored_host_bytes, 0),
            max(self.restored_disk_bytes - other.restored_disk_bytes, 0),
            max(self.restored_origin_bytes - other.restored_origin_bytes, 0),
        )


# The names of the amounts, which are the names of columns as well.
AMOUNTS = Used.__struct_fields__
NOTHING = Used()


# What stands before a key's id where else a model's name stands; no model's name begins so. So a busy key
# costs a row an hour beside those per model, and not one for each of both.
KEY_MARK = "key!"


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What was used of one model in the hour that begins at ``hour_ms`` (wall clock, UTC). ``model``: its
    name without a version; empty: what no model can be told for. With ``KEY_MARK`` and a key's id: what
    requests with this key used, of all models, which is in those rows as well; never a key's text."""

    hour_ms: int
    tenant: str
    model: str
    used: Used


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """Rows under one number: sent with it until control has them, and never with others."""

    seq: int
    rows: tuple[UsageRow, ...]


NO_USAGE = UsageBatch(0, ())


def amounts(used: Used) -> tuple[int, ...]:
    """The amounts in the order of ``AMOUNTS``."""
    return tuple(getattr(used, name) for name in AMOUNTS)


def hour_of(at_ms: int) -> int:
    """When the hour began that a moment lies in."""
    return at_ms - at_ms % HOUR_MS


def day_of(at_ms: int) -> int:
    return at_ms - at_ms % DAY_MS


def counted_hour(hour_ms: int, now_ms: int, kept_ms: int) -> int:
    """The hour that control takes a node's row for: its own, or the present one when the node's clock can not
    have been right: an hour that is still to come, or one so old that it would be forgotten unseen."""
    return hour_of(hour_ms) if now_ms - kept_ms <= hour_ms <= now_ms else hour_of(now_ms)
