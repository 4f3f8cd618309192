"""What the JSON decoder complains of, in words (``packer.json_words``), through the decoder itself."""

from __future__ import annotations

from typing import Annotated

import msgspec
import pytest

from packer.http import ApiError, decode_json
from packer.json_words import in_words


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    n: Annotated[int, msgspec.Meta(ge=1, le=8)] | None = None
    heat: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    name: Annotated[str, msgspec.Meta(max_length=3)] = ""
    inputs: Annotated[list[str], msgspec.Meta(min_length=1)] | str = ""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"n": 9}', "n: must be a whole number, at most 8."),
        (b'{"n": 0}', "n: must be a whole number, at least 1."),
        (b'{"n": "x"}', "n: must be a whole number or null, not a text."),
        (b'{"heat": 0}', "heat: must be a number, above 0.0."),
        (b'{"name": "acme"}', "name: must be a text of at most 3 characters."),
        (b'{"inputs": []}', "inputs: must be a list of at least 1 item."),
        (b'{"inputs": [true]}', "inputs[0]: must be a text, not true or false."),
        (b'{"m": 1}', "body: there is no field 'm'."),
        (b"[]", "body: must be an object, not a list."),
    ],
)
def test_complaints_are_sentences_about_the_field(body: bytes, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode_json(body, Ask)
    assert (caught.value.status, caught.value.message) == (400, said)


def test_what_is_not_known_is_passed_on() -> None:
    assert in_words("Invalid enum value 'x'") == "Invalid enum value 'x'"
