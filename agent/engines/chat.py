"""Chat templates: a tenant's own little programs, run in a sandbox that ends.

Covers: rendering with a limit of time, of text and of the operators by which one expression can take for
ever. Does not cover: escapes from the sandbox itself (jinja2's and transformers' work), or memory, which
the worker's limit of heap bounds (``agent/nursery.py``).

Jinja has no limits of its own: two nested loops over ``range(99999)`` keep a thread busy for an hour, and
``9**(9**9)`` keeps it in one instruction that nothing can interrupt.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from agent.facade import EngineError
from packer.types import KIB, MIB

# A template of 100 turns renders in milliseconds; the first time it is compiled as well.
RENDER_SECONDS_MAX = 2.0
# The longest published templates have some 40 KB.
TEMPLATE_CHARS_MAX = 256 * KIB
# A body holds at most 1 MiB of messages; a template may frame and repeat them.
TEXT_CHARS_MAX = 8 * MIB
# Elements of a repeated string or list, and bits of a product or power.
REPEATED_MAX = 1 * MIB
NUMBER_BITS_MAX = 4096
# A width with so many digits, or one that is an argument, in a format string.
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\d{4}|\*)")


class _Overrun(BaseException):
    """Not an ``Exception``, so that nothing between the template and here takes it for its own."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' sandbox without the operators' power to take for ever in one step."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("a format string asks for too great a width")
        if operator == "**" and _bits(left) * abs(_number(right)) > NUMBER_BITS_MAX:
            raise SecurityError("a power is too great")
        if operator == "*":
            if _bits(left) + _bits(right) > NUMBER_BITS_MAX:
                raise SecurityError("a product is too great")
            if max(_length(left) * _number(right), _length(right) * _number(left)) > REPEATED_MAX:
                raise SecurityError("a repetition is too long")
        return super().call_binop(context, operator, left, right)


# transformers compiles templates in a function of its own and offers no other way in.
assert vars(chat_template_utils)["ImmutableSandboxedEnvironment"] is ImmutableSandboxedEnvironment
setattr(chat_template_utils, "ImmutableSandboxedEnvironment", BoundedEnvironment)  # noqa: B010  # not typed


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _bits(value: object) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation. Raises ``EngineError`` for whatever a template does wrong."""
    template = tokenizer.chat_template
    if isinstance(template, str) and len(template) > TEMPLATE_CHARS_MAX:
        raise _refused(f"has {len(template)} characters, the limit is {TEMPLATE_CHARS_MAX}")
    try:
        with _deadline(RENDER_SECONDS_MAX):
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=False
            )
    except _Overrun:
        raise _refused(f"took more than {RENDER_SECONDS_MAX:g} s; simplify it") from None
    except MemoryError:
        raise _refused("took more memory than a worker may have; simplify it") from None
    except Exception as error:  # a template is the tenant's own program and may raise anything
        raise _refused(f"refuses these messages: {str(error)[:500]}") from None
    if not isinstance(text, str) or len(text) > TEXT_CHARS_MAX:
        raise _refused(f"wrote more than {TEXT_CHARS_MAX} characters")
    return text


def _refused(what: str) -> EngineError:
    return EngineError("invalid_request", f"the model's chat template {what}", "messages")


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise ``_Overrun`` in this thread at the first line of Python that begins after so long.

    A trace and not a signal or a timer: signals only reach the main thread, and an exception that a timer
    throws may arrive when the block has been left.
    """
    end = time.monotonic() + seconds

    def check(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise _Overrun
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
