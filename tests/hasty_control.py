"""Control as it is, but for its patience: a node is silent here after seconds, not after a minute.

Covers: starting it so. Does not cover: anything else.
"""

from __future__ import annotations

from control import cluster
from control.__main__ import main

if __name__ == "__main__":
    cluster.SILENT_AFTER_MS = 4_000
    main()
