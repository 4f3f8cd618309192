"""Planted bugs of shares: the book that divides tenants' limits, the node's part, and rates under a share.

Covers: the list; ``module`` is a full name. Does not cover: planting (``planted``) or running them
(``scripts/mutation.py``).
"""

from __future__ import annotations

from mutants import Mutant

BOOK, STATE, DESK, SHARES, RATES, NODE = (
    "control.shares",
    "control.share_book",
    "control.share_desk",
    "packer.shares",
    "packer.rates",
    "agent.shares",
)

SHARE_MUTANTS = (
    # --- rates under a share
    Mutant(
        "what was taken of a part that goes is forgotten",
        RATES,
        "            self.gone_ms = max(self.gone_ms, now_ms + self.lag_ms(now_ms))\n",
        "",
    ),
    Mutant(
        "a part that comes is unused",
        RATES,
        " - (-lag_ms * self.limit * grown // before.of)",
        "",
    ),
    Mutant(
        "requests in flight lose what they stand on",
        RATES,
        "        if not in_flight or share.value >= self.share.value:\n",
        "        if in_flight or share.value >= self.share.value:\n",
    ),
    Mutant(
        "a limit divides into parts that let nobody in",
        RATES,
        "    return max(1, min(*known, GRAINS_MAX)) if known else 0\n",
        "    return GRAINS_MAX if known else 0\n",
    ),
    # --- what a node holds
    Mutant(
        "a node that hears nothing keeps all it has",
        SHARES,
        "        return self.halve_at_ms is not None and now_ms >= self.halve_at_ms\n",
        "        return False\n",
    ),
    Mutant(
        "shares are rounded up",
        SHARES,
        "        return whole * self.parts // self.of\n",
        "        return -(-whole * self.parts // self.of)\n",
    ),
    # --- the book
    Mutant(
        "what a node was answered is not counted until it says so",
        STATE,
        "        return max(share.value for share in self.could)\n",
        "        return self.could[0].value\n",
    ),
    Mutant(
        "what a node is to give up is free at once",
        STATE,
        "        return max(share.value for share in self.could)\n",
        "        return self.could[-1].value\n",
    ),
    Mutant(
        "a word that comes twice counts twice",
        BOOK,
        "    if event.number > holder.number:\n",
        "    if event.number:\n",
    ),
    Mutant(
        "words of an earlier session count",
        BOOK,
        "    if not holder.session or event.session != holder.session:\n",
        "    if not holder.session:\n",
    ),
    Mutant(
        "a node's word counts before it has heard of this control",
        BOOK,
        "    if not holder.session or event.session != holder.session:\n",
        "    holder.session = holder.session or book.name\n    if False:\n",
    ),
    Mutant(
        "nodes that were not heard hold nothing",
        BOOK,
        "    if not book.unbound:\n        return NONE\n",
        "    return NONE\n",
    ),
    Mutant(
        "a node that may be alone holds half",
        BOOK,
        "now_ms - book.started_ms < FREE_AFTER_MS or not book.divided:",
        "now_ms - book.started_ms < FREE_AFTER_MS:",
    ),
    Mutant(
        "what a silent node holds is free before its term is over",
        BOOK,
        "holder.halved or now_ms < holder.free_at_ms:",
        "holder.halved or now_ms < holder.free_at_ms - FREE_AFTER_MS // 2:",
    ),
    Mutant(
        "all that a silent node holds is free",
        BOOK,
        "    first = could[0] if holder.lasting else could[0].halved()\n",
        "    first = NOTHING\n",
    ),
    Mutant(
        "a node that has halved counts as halving again",
        BOOK,
        "    first = could[0] if holder.lasting else could[0].halved()\n",
        "    first = could[0].halved()\n",
    ),
    Mutant(
        "what a silent node took is forgotten",
        BOOK,
        "before - held.value, known.full, now_ms)",
        "before - held.value, NO_LAGS, now_ms)",
    ),
    Mutant(
        "what a removed node took is forgotten",
        BOOK,
        "        _give_back(book, known, part, known.full, now_ms)\n",
        "        _give_back(book, known, part, NO_LAGS, now_ms)\n",
    ),
    Mutant(
        "what an earlier process took is forgotten",
        BOOK,
        "    if event.begun:\n",
        "    if False:\n",
    ),
    Mutant(
        "a free part forgets what was taken of it",
        BOOK,
        "        now_ms + ceil((rest * max(due - now_ms, 0) + part * lag) / free)\n",
        "        now_ms + ceil(rest * max(due - now_ms, 0) / free)\n",
    ),
    Mutant(
        "a node that claims more is believed",
        BOOK,
        "    return share if share.value <= most else Share(floor(most * known.grains), known.grains)\n",
        "    return share\n",
    ),
    Mutant(
        "nobody is asked to give anything up",
        BOOK,
        "            actions.append(NudgeHolder(other))\n",
        "            pass\n",
    ),
    Mutant(
        "who has the only grain keeps it for ever",
        BOOK,
        "        (kept if now_ms - since_ms < HOLD_MS else over).append(node)\n",
        "        kept.append(node)\n",
    ),
    Mutant(
        "all that nobody wants stays with control",
        BOOK,
        "    more = wanted + (known.grains - sum(targets.values())) // (2 * len(targets))\n",
        "    more = wanted\n",
    ),
    Mutant(
        "nothing is left for who comes",
        BOOK,
        " // (2 * len(targets))\n",
        " // len(targets)\n",
    ),
    Mutant(
        "what is held ahead is given while others are short of it",
        BOOK,
        "    if not held.ahead or node in targets or _is_short(known, targets):\n",
        "    if not held.ahead or node in targets:\n",
    ),
    Mutant(
        "the first to stand by has all that may be held ahead",
        BOOK,
        "max(most // (len(others) + 2), 1)",
        "max(most, 1)",
    ),
    Mutant(
        "who wants most gets most",
        BOOK,
        "        targets[node] = min(want, left // (len(wants) - place))\n",
        "        targets[node] = min(want, left)\n",
    ),
    # --- both edges
    Mutant(
        "an answer is not held until more is free",
        DESK,
        "        while answer is not None and answer.unmet and not answer.recalls and not self._stopping:\n",
        "        while False:\n",
    ),
    Mutant(
        "a node that joins again keeps what it had",
        NODE,
        "        self._post(SharesSeen(NOTHING))\n"
        "        if await self._save(nothing := _text(Stored(NOTHING))):\n"
        "            self._stored = nothing\n",
        "",
    ),
    Mutant(
        "a share that shrinks is not on disk",
        NODE,
        "        if not await self._keep(answer):\n            return\n",
        "",
    ),
    Mutant(
        "a node begins anew with all it had",
        NODE,
        "TenantShare(each.tenant, each.share.halved()) for each in known.shares)",
        "TenantShare(each.tenant, each.share) for each in known.shares)",
    ),
    Mutant(
        "a node begins anew as if it had let nobody in",
        NODE,
        "        self._post(SharesSeen(known.rest.halved(), halves, used_up=True))\n",
        "        self._post(SharesSeen(known.rest.halved(), halves))\n",
    ),
    Mutant(
        "nothing is ever given back",
        NODE,
        "            use.grains = max(*used, slots)\n",
        "            use.grains = max(use.grains, *used, slots)\n",
    ),
    Mutant(
        "a tenant above its share does not ask for more",
        NODE,
        "            use.grains = max(use.grains, 2 * has, -(-count // FIRST_PART))\n",
        "            use.grains = max(use.grains, has)\n",
    ),
    Mutant(
        "what a node gave up unheard comes back unused",
        "packer.rates",
        "            lag_ms = max(lag_ms, self.gone_ms - now_ms)\n",
        "",
    ),
)
