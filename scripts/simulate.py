"""Replay a trace through the production cores: the same as ``bunk simulate``, from a checkout.

Covers: nothing but the way in. Does not cover: the options (``control/simulate_command.py``).
"""

from __future__ import annotations

import sys

from control.simulate_command import main

if __name__ == "__main__":
    sys.exit(main())
