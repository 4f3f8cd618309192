"""The agent as it is, but for its patience: what it waits a minute for in production it does at once here.

Covers: starting it with a short period of keeping what it has learned, and with short waits for a control
that does not answer. Does not cover: anything else.
"""

from __future__ import annotations

from agent import remembering, uplink, usage_meter
from agent.__main__ import main

if __name__ == "__main__":
    remembering.KEEP_S = 0.05
    usage_meter.TELL_S = 0.2
    uplink.POLL_WAIT_MS = 1_000
    uplink.ANSWER_TIMEOUT_S = 3.0
    uplink.RETRY_MAX_S = 0.5
    main()
