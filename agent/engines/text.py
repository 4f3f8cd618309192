"""From tokens to the text that a caller may see, piece by piece.

Covers: incremental detokenization that never shows half a character, and stop strings that are found
across tokens and never leak. Does not cover: producing tokens (``generation``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders write for bytes that are not (yet) a whole character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Feeds on tokens, calls ``emit`` with text. The pieces joined are the decoding of all tokens, cut
    before the first stop string."""

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str], emit: Callable[[str], None]
    ) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._emit = emit
        self._tokens: list[int] = []
        # Text before ``_shown_at`` is out; the window from ``_window_at`` gives the decoder the context
        # that it needs to put spaces right, without decoding everything for each token.
        self._window_at = 0
        self._shown_at = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> None:
        """Take one token; afterwards ``stopped`` tells whether a stop string was found."""
        self._tokens.append(token)
        new = self._undecoded()
        if new and not new.endswith(_INCOMPLETE):
            self._window_at, self._shown_at = self._shown_at, len(self._tokens)
            self._take(new)

    def finish(self) -> None:
        """Show what is still held back: nothing follows that could complete it."""
        if self.stopped:
            return
        self._take(self._undecoded())
        if not self.stopped and self._held:
            self._emit(self._held)
        self._held = ""

    def _undecoded(self) -> str:
        shown = self._decode(self._tokens[self._window_at : self._shown_at])
        return self._decode(self._tokens[self._window_at :])[len(shown) :]

    def _take(self, new: str) -> None:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(self._held) - self._partial_stop()
        if keep:
            self._emit(self._held[:keep])
        self._held = "" if found else self._held[keep:]

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
