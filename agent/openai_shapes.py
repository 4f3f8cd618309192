"""OpenAI's requests and answers: their types, their limits, and how they map to an engine's.

Covers: decoding and checking bodies of embeddings, completions, chat completions and classification
(vLLM's shape, OpenAI has none), the engine requests they become, and the answers built from frames.
Does not cover: routes, keys, leases or streams on the wire (``gateway``); the error shape, which the
router shares (``packer/http.py``).

Unknown fields are ignored, as newer clients send some. A known field that we can not honour is refused
by name rather than ignored, because the answer would not be what was asked for.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent.facade import JSON, EngineFault, EngineFrame, EngineRequest
from packer.http import ApiError

# OpenAI's own limit for one embeddings request.
INPUTS_MAX = 2048
# Prompts of one completions request run one after another under one lease.
PROMPTS_MAX = 16
MESSAGES_MAX = 2048
# Four stop texts is OpenAI's limit; the length bounds what an engine must hold back while it streams.
STOPS_MAX = 4
STOP_CHARS_MAX = 256
# Token numbers travel as signed 32-bit integers.
TOKEN_MAX = 2**31 - 1
OUTPUT_TOKENS_MAX = 1_000_000
DIMENSIONS_MAX = 65_536
# What OpenAI's completions (not chat) stop at when not told.
COMPLETION_TOKENS_DEFAULT = 16
# A generated answer longer than this is an engine gone wild; 4 Mi characters is a million tokens.
ANSWER_CHARS_MAX = 4 * 1024 * 1024
FLOAT_BYTES = 4

Token: TypeAlias = Annotated[int, Meta(ge=0, le=TOKEN_MAX)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP: TypeAlias = Annotated[float, Meta(gt=0.0, le=1.0)]
Seed: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
OutputTokens: TypeAlias = Annotated[int, Meta(ge=1, le=OUTPUT_TOKENS_MAX)]
Stop: TypeAlias = Annotated[str, Meta(min_length=1, max_length=STOP_CHARS_MAX)]
Stops: TypeAlias = Stop | Annotated[list[Stop], Meta(max_length=STOPS_MAX)] | None
# A list is all texts, all token numbers, or all lists of token numbers; ``_inputs`` checks which.
Inputs: TypeAlias = str | Annotated[list[str | Token | list[Token]], Meta(min_length=1)]


class EmbeddingAsk(msgspec.Struct, frozen=True):
    model: str
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=DIMENSIONS_MAX)] | None = None


class ClassifyAsk(msgspec.Struct, frozen=True):
    model: str
    input: Inputs


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class CompletionAsk(msgspec.Struct, frozen=True):
    model: str
    prompt: Inputs
    max_tokens: OutputTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    echo: Any = None
    suffix: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: Any = None


class ChatAsk(msgspec.Struct, frozen=True):
    model: str
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_tokens: OutputTokens | None = None
    max_completion_tokens: OutputTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: Any = None
    functions: Any = None
    response_format: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    modalities: Any = None
    audio: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


# What these fields may hold beside null: the value that asks for nothing.
_NEUTRAL: Mapping[str, Sequence[object]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def bad_field(field: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, f"{field}: {message}", field=field)


def _refuse_unsupported(ask: CompletionAsk | ChatAsk) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(ask, name, None)
        # Types are compared too: False == 0, and ``logprobs: 0`` asks for something.
        if value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
        ):
            continue
        allowed = " or ".join(repr(one) for one in neutral) or "nothing"
        raise bad_field(
            name, f"is not supported here; leave it out (or send {allowed}).", "unsupported_value"
        )
    if ask.stream_options is not None and not ask.stream:
        raise bad_field("stream_options", "is only allowed with 'stream': true.")


# --- what an engine gets ------------------------------------------------------------------------------


def _inputs(
    value: str | list[str | int | list[int]], field: str, limit: int = INPUTS_MAX
) -> list[str] | list[list[int]]:
    """One of the four forms as a list of texts or a list of token lists."""
    if isinstance(value, str):
        value = [value]
    if all(isinstance(one, int) for one in value):
        return [[one for one in value if isinstance(one, int)]]
    if len(value) > limit:
        raise bad_field(field, f"has {len(value)} inputs; the limit is {limit}. Send several requests.")
    if all(isinstance(one, str) for one in value):
        texts = [one for one in value if isinstance(one, str)]
        if not all(texts):
            raise bad_field(f"{field}[{texts.index('')}]", "is an empty text; leave it out.")
        return texts
    if all(isinstance(one, list) for one in value):
        lists = [one for one in value if isinstance(one, list)]
        if not all(lists):
            raise bad_field(f"{field}[{lists.index([])}]", "is an empty list of tokens; leave it out.")
        return lists
    raise bad_field(field, "mixes texts and tokens; send one text, texts, token numbers, or lists of them.")


def embed_request(ask: EmbeddingAsk) -> EngineRequest:
    return EngineRequest("embed", {"inputs": _inputs(ask.input, "input")})


def classify_request(ask: ClassifyAsk) -> EngineRequest:
    return EngineRequest("classify", {"inputs": _inputs(ask.input, "input")})


def _sampling(ask: CompletionAsk | ChatAsk, max_tokens: int | None) -> dict[str, JSON]:
    stops = [ask.stop] if isinstance(ask.stop, str) else list(ask.stop or ())
    fields: dict[str, JSON] = {"stop": stops}
    # Absent stays absent: the model's own directory may say what it is best sampled with.
    if ask.temperature is not None:
        fields["temperature"] = ask.temperature
    if ask.top_p is not None:
        fields["top_p"] = ask.top_p
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    if ask.seed is not None:
        fields["seed"] = ask.seed
    return fields


def completion_requests(ask: CompletionAsk) -> tuple[EngineRequest, ...]:
    """One engine request per prompt, in order."""
    _refuse_unsupported(ask)
    prompts = _inputs(ask.prompt, "prompt", PROMPTS_MAX)
    sampling = _sampling(ask, ask.max_tokens or COMPLETION_TOKENS_DEFAULT)
    return tuple(
        EngineRequest("generate", {("prompt" if isinstance(one, str) else "tokens"): one, **sampling})
        for one in prompts
    )


def chat_request(ask: ChatAsk) -> EngineRequest:
    _refuse_unsupported(ask)
    if ask.max_tokens and ask.max_completion_tokens and ask.max_tokens != ask.max_completion_tokens:
        raise bad_field("max_completion_tokens", "differs from max_tokens; send one of the two.")
    messages = [_message(one, f"messages[{i}]") for i, one in enumerate(ask.messages)]
    return EngineRequest(
        "generate", {"messages": messages, **_sampling(ask, ask.max_completion_tokens or ask.max_tokens)}
    )


def _message(message: ChatMessage, field: str) -> dict[str, str]:
    role = _ROLES.get(message.role)
    if role is None or message.tool_calls:
        raise bad_field(f"{field}.role", f"must be one of {', '.join(_ROLES)}; tools are not supported here.")
    if isinstance(message.content, list):
        texts = []
        for i, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise bad_field(f"{field}.content[{i}]", "must be a part of type 'text' with a 'text'.")
            texts.append(part.text)
        return {"role": role, "content": "".join(texts)}
    if message.content is None and role != "assistant":
        raise bad_field(f"{field}.content", "is missing.")
    return {"role": role, "content": message.content or ""}


# --- what an engine answered ---------------------------------------------------------------------------


def integer(frame: EngineFrame, name: str) -> int:
    value = frame.header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise EngineFault(f"the engine's frame has no count {name!r}")
    return value


def text(frame: EngineFrame, name: str) -> str | None:
    value = frame.header.get(name)
    if value is not None and not isinstance(value, str):
        raise EngineFault(f"the engine's {name!r} is not a text")
    return value


def _rows(frame: EngineFrame, count: int, columns: int) -> Iterator[memoryview]:
    """The body as ``count`` rows of float32. A worker is not trusted to count right."""
    width = columns * FLOAT_BYTES
    if len(frame.body) != count * width:
        raise EngineFault(f"the engine sent {len(frame.body)} bytes for {count} rows of {columns} floats")
    body = memoryview(frame.body)
    for i in range(count):
        yield body[i * width : (i + 1) * width]


def _floats(row: memoryview) -> list[float]:
    return list(struct.unpack(f"<{len(row) // FLOAT_BYTES}f", row))


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | UnsetType = UNSET


class EmbeddingItem(msgspec.Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw]
    model: str
    usage: Usage
    object: str = "list"


def embedding_answer(ask: EmbeddingAsk, model: str, count: int, frame: EngineFrame) -> bytes:
    """The whole answer as JSON.

    Row by row, so that a thread that runs it lets go of the interpreter in between: 2,048 inputs of
    1,024 floats are 40 MB of JSON.
    """
    dimensions = integer(frame, "dimensions")
    if integer(frame, "count") != count:
        raise EngineFault(f"the engine answered {integer(frame, 'count')} of {count} inputs")
    if ask.dimensions is not None and ask.dimensions != dimensions:
        raise bad_field(
            "dimensions",
            f"this model gives {dimensions} and can not be shortened; leave the field out.",
            "unsupported_value",
        )
    encoder = msgspec.json.Encoder()
    items: list[msgspec.Raw] = []
    for index, row in enumerate(_rows(frame, count, dimensions)):
        value: list[float] | str
        value = base64.b64encode(row).decode("ascii") if ask.encoding_format == "base64" else _floats(row)
        items.append(msgspec.Raw(encoder.encode(EmbeddingItem(index, value))))
    tokens = integer(frame, "prompt_tokens")
    return encoder.encode(EmbeddingList(items, model, Usage(tokens, tokens)))


class ClassItem(msgspec.Struct, frozen=True):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassList(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    data: list[ClassItem]
    labels: list[str]  # ours: what the positions of ``probs`` mean
    usage: Usage
    object: str = "list"


def classify_answer(answer_id: str, created: int, model: str, count: int, frame: EngineFrame) -> bytes:
    named = frame.header.get("labels")
    if not isinstance(named, Sequence) or isinstance(named, str) or not named:
        raise EngineFault("the engine's answer has no labels")
    labels = [str(one) for one in named]
    items = []
    for index, row in enumerate(_rows(frame, count, len(labels))):
        probs = _floats(row)
        best = max(range(len(probs)), key=probs.__getitem__)
        items.append(ClassItem(index, labels[best], probs, len(probs)))
    tokens = integer(frame, "prompt_tokens")
    usage = Usage(tokens, tokens, 0)
    return msgspec.json.encode(ClassList(answer_id, created, model, items, labels, usage))


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None


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
    logprobs: None = None


class ChatDeltaChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: None = None


class Completion(msgspec.Struct, frozen=True):
    """Every generated answer and every chunk of one; ``object`` says which."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[TextChoice | ChatChoice | ChatDeltaChoice]
    usage: Usage | UnsetType | None = UNSET


class GeneratedShape:
    """Answers of one generation request, streamed or not, in the shape of ``chat`` or plain completions."""

    def __init__(
        self, answer_id: str, created: int, model: str, chat: bool, include_usage: bool = False
    ) -> None:
        self.answer_id = answer_id
        self.created = created
        self.model = model
        self.chat = chat
        self.include_usage = include_usage
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._begun: set[int] = set()

    def usage(self) -> Usage:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return Usage(prompt, prompt + completion, completion)

    def count(self, frame: EngineFrame) -> str | None:
        """Note the last frame's counts; returns its finish reason, None for any other frame."""
        reason = text(frame, "finish_reason")
        if reason is not None:
            self._prompt_tokens += integer(frame, "prompt_tokens")
            self._completion_tokens += integer(frame, "completion_tokens")
        return reason

    def whole(self, texts: Sequence[str], reasons: Sequence[str]) -> bytes:
        pairs = enumerate(zip(texts, reasons, strict=True))
        if self.chat:
            chats = [ChatChoice(i, ChatAnswerMessage(said), reason) for i, (said, reason) in pairs]
            return self._encode("chat.completion", chats, self.usage())
        plain = [TextChoice(i, said, reason) for i, (said, reason) in pairs]
        return self._encode("text_completion", plain, self.usage())

    def chunk(self, index: int, frame: EngineFrame) -> list[bytes]:
        """The stream's chunks for one frame; none for a frame that says nothing."""
        chunks: list[bytes] = []
        delta, reason = text(frame, "delta"), self.count(frame)
        if self.chat and index not in self._begun:
            self._begun.add(index)
            chunks.append(self._part(index, "", None, role="assistant"))
        if delta:
            chunks.append(self._part(index, delta, None))
        if reason is not None:
            chunks.append(self._part(index, None, reason))
        return chunks

    def last_chunk(self) -> list[bytes]:
        """The chunk with the counts, when the caller asked for it."""
        return [self._encode(self._chunk_object(), [], self.usage())] if self.include_usage else []

    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _part(self, index: int, said: str | None, reason: str | None, role: str | UnsetType = UNSET) -> bytes:
        choice: TextChoice | ChatDeltaChoice
        if self.chat:
            choice = ChatDeltaChoice(index, Delta(role, UNSET if said is None else said), reason)
        else:
            choice = TextChoice(index, said or "", reason)
        return self._encode(self._chunk_object(), [choice], None if self.include_usage else UNSET)

    def _encode(
        self,
        kind: str,
        choices: Sequence[TextChoice | ChatChoice | ChatDeltaChoice],
        usage: Usage | UnsetType | None,
    ) -> bytes:
        return msgspec.json.encode(Completion(self.answer_id, kind, self.created, self.model, choices, usage))
