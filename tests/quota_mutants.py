"""Planted bugs of lending, rates and turns in the residency core.

Covers: the list of changes. Does not cover: loading a changed copy (``mutants``) or running it
(``test_lending``, ``test_simulation``).
"""

from __future__ import annotations

from mutants import Mutant

# Judged by comparing whole histories with what each tenant would pay alone (``lenders``).
LENDING_MUTANTS = (
    Mutant(
        "what was lent before is not counted",
        "lending",
        "// terms.margin_percent - self.gap_ms, 0)",
        "// terms.margin_percent, 0)",
    ),
    Mutant(
        "debt counts the wrong way",
        "lending",
        "self._book(cost_ms - owed_ms, terms)",
        "self._book(owed_ms - cost_ms, terms)",
    ),
    Mutant(
        "the margin is not looked at",
        "lending",
        "-self.debt_ms * 100 // terms.margin_percent",
        "-self.debt_ms * 100",
    ),
    Mutant(
        "the slice evicts in the order of arrival",
        "lending",
        "        self.shades.pop(shade, None)\n        self.held_bytes += shade.size",
        "        self.held_bytes += shade.size",
    ),
    Mutant(
        "the slice pays twice for a model that waits",
        "lending",
        "            shade.owed_ms += cost_ms\n",
        "            shade.owed_ms += 2 * cost_ms\n",
    ),
    Mutant(
        "what a waiting model still has counts as nobody's",
        "lending",
        "has_bytes = shade.slice_bytes if shade.owed_ms is None else shade.before_bytes",
        "has_bytes = shade.slice_bytes",
    ),
    Mutant(
        "a slice never grows to its reserve",
        "lending",
        "self.held_bytes > self.reserved_bytes or",
        "self.held_bytes > self.reserved_bytes // 2 or",
    ),
    Mutant(
        "a taking opens no gap",
        "lending",
        "        self._set_gap(shade, shade.gap_with(real_bytes))\n\n    def lose",
        "\n    def lose",
    ),
    Mutant(
        "the shortcut does not tell the slice of a use",
        "hits",
        "    if tenant.slice.reserved_bytes:\n        use_slice(node, model)\n",
        "",
    ),
    Mutant(
        "the whole step does not tell the slice of a use",
        "residency",
        "    room.use_slice(node, model)\n",
        "",
    ),
    Mutant(
        "a choice counts each victim's gap alone",
        "giving",
        "        self._may_open_ms[name] = may_open_ms - max(opens_ms, 0)\n",
        "",
    ),
)

# What ``rate_judge`` must see.
RATE_MUTANTS = (
    Mutant(
        "one more than the rate comes in",
        "rates",
        "over = self._used(now_ms) - (self.burst - units) * self.span_ms",
        "over = self._used(now_ms) - (self.burst - units + 1) * self.period_ms",
    ),
    Mutant(
        "what requests are expected to use does not count",
        "rates",
        "+ self.reserved * self.span_ms",
        "+ 0 * self.reserved",
    ),
    Mutant(
        "tokens that were used are not charged",
        "turns",
        "rates.tokens.take(now_ms, bounded(tokens,",
        "rates.tokens.take(now_ms, 0 * bounded(tokens,",
    ),
    Mutant(
        "device time is not charged",
        "turns",
        "        rates.device.take(now_ms, bounded(device_ms, REQUEST_DEVICE_MS_MAX))\n    note_device_time",
        "    note_device_time",
    ),
    Mutant(
        "what was reserved for a request that never ran stays reserved",
        "queueing",
        "    model.tenant.rates.tokens.reserved -= waiter.tokens\n",
        "",
    ),
    Mutant(
        "restores are not counted",
        "queueing",
        "        model.tenant.rates.restores.take(now_ms)\n",
        "",
    ),
    Mutant(
        "a model's restores are counted once for ever",
        "turns",
        "    model.counted, model.payer = False, None\n",
        "    model.payer = None\n",
    ),
    Mutant(
        "a restore that is over is still expected",
        "turns",
        "    payer.pending_us -= model.pending_us\n",
        "",
    ),
)
