"""sqlite-utils, imported without numpy and pandas.

sqlite-utils imports both when they are installed, only to know their types. The agent and control
processes stay free of them (they start fast and stay small), so both import it from here. Covers: that
import. Does not cover: tables (``agent/journal.py``, ``control/store.py``).
"""

from __future__ import annotations

import sys

# A None in sys.modules makes an import fail as if the package were absent; sqlite-utils copes with that.
_HIDDEN = [name for name in ("numpy", "pandas") if name not in sys.modules]
for _name in _HIDDEN:
    sys.modules[_name] = None  # type: ignore[assignment]
try:
    from sqlite_utils import Database, Migrations
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]

__all__ = ["Database", "Migrations"]
