"""The agent as it is, but for its patience: what it waits a minute for in production it does at once here.

Covers: starting it with a short period of keeping what it has learned, with short waits for a control that
does not answer, and with parts of limits that halve soon. Does not cover: anything else.
"""

from __future__ import annotations

from agent import remembering, shares, uplink, usage_meter
from agent.__main__ import main
from packer import joining

if __name__ == "__main__":
    remembering.KEEP_S = 0.05
    usage_meter.TELL_S = 0.2
    shares.TERM_MS = 2_000  # type: ignore[attr-defined]  # imported there
    shares.RENEW_MS = shares.LOOK_MS = 300
    uplink.POLL_WAIT_MS = 1_000  # type: ignore[attr-defined]  # imported there
    uplink.ANSWER_TIMEOUT_S = 3.0  # type: ignore[attr-defined]  # imported there
    joining.RETRY_MAX_S = 0.5
    main()
