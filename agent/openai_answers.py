"""Generated answers in OpenAI's shapes: whole or chunk by chunk, of chat and of plain completions.

Covers: reading an engine's frames without trusting them, choices and their ends, log probabilities in both
shapes, and usage. Does not cover: requests (``openai_shapes``) or streams on the wire (``event_stream``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent.facade import EngineFault, EngineFrame
from agent.openai_shapes import TOP_LOGPROBS_MAX, Usage, bad_field, integer, text

# A generated answer longer than this is an engine gone wild; 4 Mi characters is a million tokens.
ANSWER_CHARS_MAX = 4 * 1024 * 1024
# Log probabilities that one answer may hold until it is whole, alternatives included: some 40 MB of memory. A
# stream holds none.
ANSWER_FIGURES_MAX = 256 * 1024
# JSON of one log probability; what a whole answer takes is guessed by it.
FIGURE_BYTES = 96
# No vocabulary has a token of more bytes.
TOKEN_BYTES_MAX = 4096

_Hex: TypeAlias = Annotated[str, Meta(pattern="^(?:[0-9a-f]{2})*$", max_length=2 * TOKEN_BYTES_MAX)]


class Figures(msgspec.Struct, frozen=True):
    """What an engine tells of one token; see ``agent.facade.EngineFrame``."""

    name: _Hex = msgspec.field(name="bytes")
    logprob: float
    at: Annotated[int, Meta(ge=0)]
    top: Annotated[list[tuple[_Hex, float]], Meta(max_length=TOP_LOGPROBS_MAX)]


@dataclass(frozen=True, slots=True)
class Said:
    """One frame as a caller will see it. ``reason`` ends the choice."""

    index: int
    text: str
    figures: Sequence[Figures]
    reason: str | None


# --- shapes -----------------------------------------------------------------------------------------


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: Sequence[int]


class TokenLogprob(TopLogprob, frozen=True):
    top_logprobs: Sequence[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: Sequence[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: Sequence[str]
    token_logprobs: Sequence[float]
    top_logprobs: Sequence[dict[str, float]] | None
    text_offset: Sequence[int]


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None


class Delta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatAnswerMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatAnswerMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None


class ChatDeltaChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class Completion(msgspec.Struct, frozen=True):
    """Every generated answer and every chunk of one; ``object`` says which."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[TextChoice | ChatChoice | ChatDeltaChoice]
    # What a seed repeats under: the version that answered.
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


def token_name(token: bytes, prefix: str = "") -> str:
    """A token as text; one that is a part of a character by its bytes, as OpenAI writes it."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(figures: Sequence[Figures]) -> ChatLogprobs:
    def top(name: str, logprob: float) -> TopLogprob:
        token = bytes.fromhex(name)
        return TopLogprob(token_name(token), logprob, list(token))

    def one(figure: Figures) -> TokenLogprob:
        own = top(figure.name, figure.logprob)
        return TokenLogprob(own.token, own.logprob, own.bytes, [top(*each) for each in figure.top])

    return ChatLogprobs([one(figure) for figure in figures])


def text_logprobs(figures: Sequence[Figures]) -> TextLogprobs:
    names = [token_name(bytes.fromhex(figure.name), "bytes:") for figure in figures]
    tops = [
        # The token itself is told too where it is not among the likeliest.
        {token_name(bytes.fromhex(other), "bytes:"): logprob for other, logprob in figure.top}
        | {name: figure.logprob}
        for name, figure in zip(names, figures, strict=True)
    ]
    return TextLogprobs(
        names,
        [figure.logprob for figure in figures],
        tops if any(figure.top for figure in figures) else None,
        [figure.at for figure in figures],
    )


# --- from frames to answers -------------------------------------------------------------------------


@dataclass(slots=True)
class _Choice:
    """What there is of one choice. Text and figures are kept for whole answers only."""

    begun: bool = False
    reason: str | None = None
    parts: list[str] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)


class GeneratedShape:
    """Answers of one request, streamed or not, in the shape of ``chat`` or plain completions.

    ``orders`` (prompts) with ``choices`` each: a choice's index counts through all of them, as OpenAI's.
    """

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        version: str,
        chat: bool,
        include_usage: bool = False,
        orders: int = 1,
        choices: int = 1,
        logprobs: bool = False,
    ) -> None:
        self.answer_id = answer_id
        self.created = created
        self.model = model
        self.version = version
        self.chat = chat
        self.include_usage = include_usage
        self.logprobs = logprobs
        self._each = choices
        self._choices = [_Choice() for _ in range(orders * choices)]
        self._counts: dict[int, tuple[int, int]] = {}
        self._chars = 0
        self._figures = 0

    @property
    def about_bytes(self) -> int:
        """How large the whole answer will be, roughly."""
        return self._chars + self._figures * FIGURE_BYTES

    def usage(self) -> Usage:
        prompt = sum(read for read, _ in self._counts.values())
        completion = sum(written for _, written in self._counts.values())
        return Usage(prompt, prompt + completion, completion)

    def read(self, order: int, frame: EngineFrame) -> Said:
        """Take note of a frame. Raises ``EngineFault`` for one that can not be."""
        within = integer(frame, "choice") if "choice" in frame.header else 0
        if within >= self._each:
            raise EngineFault(f"the engine's frame is of choice {within}, and {self._each} were asked for")
        index = order * self._each + within
        choice = self._choices[index]
        if choice.reason is not None:
            raise EngineFault("the engine's frame comes after its choice has ended")
        try:
            figures = msgspec.convert(frame.header.get("logprobs", []), list[Figures])
        except msgspec.ValidationError as error:
            raise EngineFault(f"the engine's log probabilities are none: {error}") from None
        reason = text(frame, "finish_reason")
        if reason is not None:
            # Counted over all choices of the order: what the last one says is the count.
            self._counts[order] = (integer(frame, "prompt_tokens"), integer(frame, "completion_tokens"))
            choice.reason = reason
        return Said(index, text(frame, "delta") or "", figures, reason)

    def check_ended(self) -> None:
        """Raises ``EngineFault``."""
        if any(choice.reason is None for choice in self._choices):
            raise EngineFault("the engine's stream ended without a reason")

    def keep(self, said: Said) -> None:
        """Gather a whole answer. Raises ``EngineFault`` and ``ApiError`` when it is too large."""
        choice = self._choices[said.index]
        self._chars += len(said.text)
        self._figures += sum(1 + len(figure.top) for figure in said.figures)
        if self._chars > ANSWER_CHARS_MAX:
            raise EngineFault(f"the engine wrote more than {ANSWER_CHARS_MAX} characters")
        if self._figures > ANSWER_FIGURES_MAX:
            raise bad_field(
                "logprobs",
                f"the answer has more than {ANSWER_FIGURES_MAX} log probabilities; stream it, or ask for "
                "fewer of them, fewer choices or fewer tokens.",
            )
        choice.parts.append(said.text)
        choice.figures.extend(said.figures)

    def whole(self) -> bytes:
        """Raises ``EngineFault``."""
        self.check_ended()
        made: list[TextChoice | ChatChoice | ChatDeltaChoice] = []
        for index, choice in enumerate(self._choices):
            said = "".join(choice.parts)
            if self.chat:
                told = chat_logprobs(choice.figures) if self.logprobs else None
                made.append(ChatChoice(index, ChatAnswerMessage(said), choice.reason, told))
            else:
                plain = text_logprobs(choice.figures) if self.logprobs else None
                made.append(TextChoice(index, said, choice.reason, plain))
        return self._encode("chat.completion" if self.chat else "text_completion", made, self.usage())

    def chunks(self, said: Said) -> list[bytes]:
        """The stream's chunks for one frame; none for a frame that says nothing."""
        made: list[bytes] = []
        choice = self._choices[said.index]
        if self.chat and not choice.begun:
            choice.begun = True
            made.append(self._part(said.index, "", None, role="assistant"))
        if said.text or said.figures:
            made.append(self._part(said.index, said.text, None, said.figures))
        if said.reason is not None:
            made.append(self._part(said.index, None, said.reason))
        return made

    def last_chunks(self) -> list[bytes]:
        """The chunk with the counts, when the caller asked for it. Raises ``EngineFault``."""
        self.check_ended()
        return [self._encode(self._chunk_object(), [], self.usage())] if self.include_usage else []

    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _part(
        self,
        index: int,
        said: str | None,
        reason: str | None,
        figures: Sequence[Figures] = (),
        role: str | UnsetType = UNSET,
    ) -> bytes:
        choice: TextChoice | ChatDeltaChoice
        if self.chat:
            delta = Delta(role, UNSET if said is None else said)
            choice = ChatDeltaChoice(index, delta, reason, chat_logprobs(figures) if figures else None)
        else:
            choice = TextChoice(index, said or "", reason, text_logprobs(figures) if figures else None)
        return self._encode(self._chunk_object(), [choice], None if self.include_usage else UNSET)

    def _encode(
        self,
        kind: str,
        choices: Sequence[TextChoice | ChatChoice | ChatDeltaChoice],
        usage: Usage | UnsetType | None,
    ) -> bytes:
        return msgspec.json.encode(
            Completion(self.answer_id, kind, self.created, self.model, choices, self.version, usage)
        )
