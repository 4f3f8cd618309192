"""OpenAI's requests, and the answers that are one frame: their types, their limits, what an engine gets.

Covers: decoding and checking bodies of embeddings, completions, chat completions and classification
(vLLM's shape, OpenAI has none), the engine requests they become, and answers of embeddings and
classification. Does not cover: generated answers (``openai_answers``); routes, keys, leases or streams on
the wire (``gateway``); the error shape, which the router shares (``packer/http.py``).

Unknown fields are ignored, as newer clients send some, and so are those that change nothing about an
answer (``user``, ``metadata``, ``store``, ``service_tier`` and their kind). A known field that we can not
honour is refused by name rather than ignored, because the answer would not be what was asked for.
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
# Choices of one prompt; each is a whole answer's work, and they share no more than the reading of the prompt.
PROMPT_CHOICES_MAX = 8
# Answers of one request, over all its prompts.
CHOICES_MAX = 32
# OpenAI's limits.
TOP_LOGPROBS_MAX = 20
BIASES_MAX = 1024
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
FLOAT_BYTES = 4

Token: TypeAlias = Annotated[int, Meta(ge=0, le=TOKEN_MAX)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP: TypeAlias = Annotated[float, Meta(gt=0.0, le=1.0)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Choices: TypeAlias = Annotated[int, Meta(ge=1, le=PROMPT_CHOICES_MAX)]
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


class GenerateAsk(msgspec.Struct, frozen=True, kw_only=True):
    """What both ways to ask for text have in common. The last group is of other servers, whose clients send
    it too: what our engines do is taken, the rest is known only to be refused."""

    model: str
    max_tokens: OutputTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=BIASES_MAX)] | None = None

    top_k: Annotated[int, Meta(ge=-1, le=TOKEN_MAX)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] | None = None
    min_p: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    use_beam_search: Any = None
    prompt_logprobs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None


class CompletionAsk(GenerateAsk, frozen=True, kw_only=True):
    prompt: Inputs
    # A number of alternatives; some clients send the chat's ``false``.
    logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | bool | None = None
    best_of: int | None = None
    echo: Any = None
    suffix: Any = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | Annotated[list[ContentPart], Meta(min_length=1)] | None = None
    tool_calls: Any = None


class ChatAsk(GenerateAsk, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: OutputTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


# What these fields may hold beside null: the value that asks for nothing.
_NEUTRAL: Mapping[str, Sequence[object]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def bad_field(field: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, f"{field}: {message}", field=field)


def _refuse_unsupported(ask: GenerateAsk) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(ask, name, None)
        # Types are compared too: False == 0.
        if value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
        ):
            continue
        allowed = " or ".join(repr(one) for one in neutral) or "nothing"
        raise bad_field(
            name, f"is not supported here; leave it out (or send {allowed}).", "unsupported_value"
        )
    # Whether the model has the token its vocabulary says, later.
    for token in ask.logit_bias or ():
        if not (token.isascii() and token.isdigit() and len(token) <= len(str(TOKEN_MAX))):
            raise bad_field("logit_bias", f"{token[:40]!r} is no token number.")
    if ask.stream_options is not None and not ask.stream:
        raise bad_field("stream_options", "is only allowed with 'stream': true.")


# --- what an engine gets ------------------------------------------------------------------------------


def _inputs(
    value: str | list[str | int | list[int]], field: str, limit: int = INPUTS_MAX
) -> list[str] | list[list[int]]:
    """One of the four forms as a list of texts or a list of token lists."""
    if isinstance(value, str):
        if not value:
            raise bad_field(field, "is an empty text.")
        return [value]
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
    fields: dict[str, JSON] = {"inputs": _inputs(ask.input, "input")}
    if ask.dimensions is not None:
        fields["dimensions"] = ask.dimensions
    return EngineRequest("embed", fields)


def classify_request(ask: ClassifyAsk) -> EngineRequest:
    return EngineRequest("classify", {"inputs": _inputs(ask.input, "input")})


def _sampling(ask: GenerateAsk, max_tokens: int | None, top_logprobs: int | None) -> dict[str, JSON]:
    """What goes to the engine beside the prompt. Absent stays absent: the model's own directory may say what
    it is best sampled with."""
    given: dict[str, JSON] = {
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": None if ask.top_k is None else max(ask.top_k, 0),
        "repetition_penalty": ask.repetition_penalty,
        "presence_penalty": ask.presence_penalty,
        "frequency_penalty": ask.frequency_penalty,
        "logit_bias": ask.logit_bias,
        "max_tokens": max_tokens,
        "seed": ask.seed,
        "n": ask.n,
        "logprobs": top_logprobs,
    }
    stops = [ask.stop] if isinstance(ask.stop, str) else list(ask.stop or ())
    return {"stop": stops, **{name: value for name, value in given.items() if value is not None}}


def completion_requests(ask: CompletionAsk) -> tuple[EngineRequest, ...]:
    """One engine request per prompt, in order."""
    _refuse_unsupported(ask)
    choices = ask.n or 1
    if ask.best_of is not None and ask.best_of != choices:
        raise bad_field(
            "best_of",
            f"choosing among more than is answered is not supported here; leave it out (or send {choices}, "
            "as n), ask for logprobs and choose.",
            "unsupported_value",
        )
    if ask.logprobs is True:
        raise bad_field("logprobs", "is a number here: of how many of the likeliest tokens to tell.")
    prompts = _inputs(ask.prompt, "prompt", PROMPTS_MAX)
    if choices * len(prompts) > CHOICES_MAX:
        raise bad_field(
            "n",
            f"{choices} choices for each of {len(prompts)} prompts are {choices * len(prompts)} answers; the "
            f"limit is {CHOICES_MAX} in one request. Send several requests.",
        )
    top = None if ask.logprobs is False else ask.logprobs
    sampling = _sampling(ask, ask.max_tokens or COMPLETION_TOKENS_DEFAULT, top)
    return tuple(
        EngineRequest("generate", {("prompt" if isinstance(one, str) else "tokens"): one, **sampling})
        for one in prompts
    )


def chat_request(ask: ChatAsk) -> EngineRequest:
    _refuse_unsupported(ask)
    if ask.max_tokens and ask.max_completion_tokens and ask.max_tokens != ask.max_completion_tokens:
        raise bad_field("max_completion_tokens", "differs from max_tokens; send one of the two.")
    if ask.top_logprobs and not ask.logprobs:
        raise bad_field("top_logprobs", "is only allowed with 'logprobs': true.")
    messages = [_message(one, f"messages[{i}]") for i, one in enumerate(ask.messages)]
    top = (ask.top_logprobs or 0) if ask.logprobs else None
    return EngineRequest(
        "generate", {"messages": messages, **_sampling(ask, ask.max_completion_tokens or ask.max_tokens, top)}
    )


def _message(message: ChatMessage, field: str) -> dict[str, str]:
    role = _ROLES.get(message.role)
    if role is None:
        raise bad_field(f"{field}.role", f"must be one of {', '.join(_ROLES)}; tools are not supported here.")
    if message.tool_calls:
        raise bad_field(f"{field}.tool_calls", "tools are not supported here.", "unsupported_value")
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
        raise EngineFault(f"the engine gave {dimensions} dimensions where {ask.dimensions} were asked for")
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
