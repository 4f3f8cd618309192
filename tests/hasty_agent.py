"""The agent as it is, but for its patience: what it waits a minute for in production it does at once here.

Covers: starting it with a short period of keeping what it has learned. Does not cover: anything else.
"""

from __future__ import annotations

from agent import remembering
from agent.__main__ import main

if __name__ == "__main__":
    remembering.KEEP_S = 0.05
    main()
