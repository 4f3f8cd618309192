"""Control as it is, but for its patience: what lasts minutes in production lasts seconds here.

Covers: starting it so that a node is silent, a ticket ends and a part of a limit is given back soon. Does not
cover: anything else.
"""

from __future__ import annotations

from control import cluster, shares
from control.__main__ import main
from control.routes import direct

TICKET_LIFE_MS = 3_000
# As ``hasty_agent`` counts it, and a second for the way.
FREE_AFTER_MS = 3_000

if __name__ == "__main__":
    cluster.SILENT_AFTER_MS = 4_000
    direct.TICKET_LIFE_MS = TICKET_LIFE_MS  # type: ignore[attr-defined]
    direct.REFRESH_MS = 500
    shares.FREE_AFTER_MS = FREE_AFTER_MS
    shares.STEADY_MS = 0
    main()
