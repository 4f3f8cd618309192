"""From tokens to the text that a caller may see, piece by piece.

Covers: incremental detokenization that never shows half a character, stop strings that are found
across tokens and never leak, and which tokens the shown text is made of. Does not cover: producing tokens
(``generation``).
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
        self._said_chars = 0
        # Where in the text each token's piece begins and ends. Tokens that make up one character share both.
        self._begins: list[int] = []
        self._ends: list[int] = []
        # How many tokens lie wholly in the text that ``emit`` was given, the piece in hand included.
        self.tokens_shown = 0
        self.stopped = False

    def begins_at(self, position: int) -> int:
        """Where in the text a token begins, in characters; for the first ``tokens_shown`` tokens."""
        return self._begins[position]

    def push(self, token: int) -> None:
        """Take one token; afterwards ``stopped`` tells whether a stop string was found."""
        self._tokens.append(token)
        new = self._undecoded()
        if new and not new.endswith(_INCOMPLETE):
            self._window_at, self._shown_at = self._shown_at, len(self._tokens)
            self._place(new)
            self._take(new)

    def finish(self) -> None:
        """Show what is still held back: nothing follows that could complete it."""
        if self.stopped:
            return
        rest = self._undecoded()
        self._place(rest)
        self._take(rest)
        if not self.stopped:
            self._say(self._held)
        self._held = ""

    def _place(self, piece: str) -> None:
        """The tokens since the last piece make up this one."""
        begin = self._ends[-1] if self._ends else 0
        count = len(self._tokens) - len(self._ends)
        self._begins += [begin] * count
        self._ends += [begin + len(piece)] * count

    def _say(self, text: str) -> None:
        self._said_chars += len(text)
        while self.tokens_shown < len(self._ends) and self._ends[self.tokens_shown] <= self._said_chars:
            self.tokens_shown += 1
        if text:
            self._emit(text)

    def _undecoded(self) -> str:
        shown = self._decode(self._tokens[self._window_at : self._shown_at])
        return self._decode(self._tokens[self._window_at :])[len(shown) :]

    def _take(self, new: str) -> None:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(self._held) - self._partial_stop()
        self._say(self._held[:keep])
        self._held = "" if found else self._held[keep:]

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
