"""Control as it is, with a second router: another application with a listener of its own over the same state.

Covers: starting it so; the second one's address is in the log. Does not cover: a router in a process of its
own, which there is not: control's state is in one process.
"""

from __future__ import annotations

import logging

from control import server
from control.__main__ import main
from control.config import Address

log = logging.getLogger("bunk.control")


class TwoDoors(server.Server):
    async def start(self) -> server.Bound:
        bound = await super().start()
        second = server.build_public_app(self.control)
        log.info("second router at http://%s", await self._listen(second, Address("127.0.0.1", 0), tls=False))
        return bound


if __name__ == "__main__":
    server.Server = TwoDoors  # type: ignore[misc]
    main()
