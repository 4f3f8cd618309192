"""Planted bugs in what tenants used: in the node's meter and spool, and in control's tables.

Covers: their text and what replaces it. Does not cover: planting (``planted``) or judging
(``scripts/mutation.py``).
"""

from __future__ import annotations

from mutants import Mutant

METER, SPOOL, TABLES = "agent.usage_meter", "agent.usage_spool", "control.usage_tables"

USAGE_MUTANTS = (
    Mutant(
        "usage that came twice is added twice",
        TABLES,
        "    if seq <= known:\n",
        "    if seq < known:\n",
    ),
    Mutant(
        "a batch of usage is added and its number is not kept",
        TABLES,
        '        "on conflict (counted_by) do update set seq = excluded.seq, at_ms = excluded.at_ms",\n',
        '        "on conflict (counted_by) do update set at_ms = excluded.at_ms",\n',
    ),
    Mutant(
        "usage of nobody is kept",
        TABLES,
        '        f"where exists (select 1 from tenants where tenant = ? and created_ms < ?) {_ADDED}",\n',
        '        f"where ? <> ? {_ADDED}",\n',
    ),
    Mutant(
        "an unconfirmed batch of usage gets a new number",
        SPOOL,
        '                return UsageBatch(self._number("select max(seq) from usage_told"), told)\n',
        '                self._db.execute("update usage_count set seq = seq + 1")\n'
        '                self._db.execute("update usage_told set seq = (select seq from usage_count)")\n'
        '                return UsageBatch(self._number("select max(seq) from usage_told"), told)\n',
    ),
    Mutant(
        "a batch of usage stays open beside itself",
        SPOOL,
        '"delete from usage_open where (hour_ms, tenant, model) = (?, ?, ?)", key)',
        '"select 1 where (1, 2, 3) = (?, ?, ?)", key)',
    ),
    Mutant(
        "any answer confirms any batch of usage",
        SPOOL,
        '            self._db.execute("delete from usage_told where seq <= ?", (seq,))\n',
        '            self._db.execute("delete from usage_told where ? = ?", (seq, seq))\n',
    ),
    Mutant(
        "an hour that is merged is kept beside the next",
        SPOOL,
        '        self._db.execute("delete from usage_open where hour_ms = ?", (oldest,))\n',
        '        self._db.execute("delete from usage_open where hour_ms = ?", (0,))\n        return False\n',
    ),
    Mutant(
        "usage that the journal did not take is forgotten",
        METER,
        "                if not added:\n                    self._put_back(taken)\n",
        "                pass\n",
    ),
    Mutant(
        "what a running request has used counts again at its end",
        METER,
        "        self.noted += rest\n",
        "",
    ),
    Mutant(
        "usage that is left of an earlier life is not told",
        METER,
        "        self._untold = True\n        self._told_at_s: float | None = None\n",
        "        self._untold = False\n        self._told_at_s: float | None = None\n",
    ),
)
