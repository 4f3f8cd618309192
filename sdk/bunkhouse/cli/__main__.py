"""``python -m bunkhouse.cli`` is ``bunk``."""

from bunkhouse.cli import main

main()
