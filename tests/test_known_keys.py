"""A key that has shown its secret is known by its text, and by nothing else, until it is revoked.

Covers: ``packer/known_keys.py`` against ``check_key``. Does not cover: routes (``attacks/test_gateway_auth``,
``attacks/test_control_auth``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from packer import http, known_keys
from packer.http import make_key
from packer.known_keys import KnownKeys
from packer.types import KeySpec

NOW_MS = 1_000_000


def test_a_known_text_proves_its_key_until_it_is_revoked_or_changed() -> None:
    made, other = make_key(), make_key()
    spec = KeySpec(made.key_id, made.secret_sha256, "acme")
    keys, known = {made.key_id: spec}, KnownKeys()
    for _ in range(2):
        assert known.check(keys, made.text, NOW_MS) is spec
        assert known.check(keys, made.text[:-1] + ("a" if made.text[-1] != "a" else "b"), NOW_MS) is None
        assert known.check(keys, other.text, NOW_MS) is None
    assert known.check({}, made.text, NOW_MS) is None
    assert known.check(keys, made.text, NOW_MS) is spec
    changed = replace(spec, secret_sha256=other.secret_sha256)
    assert known.check({made.key_id: changed}, made.text, NOW_MS) is None
    moved = replace(spec, tenant="other")
    assert known.check({made.key_id: moved}, made.text, NOW_MS) is moved
    assert known.check({made.key_id: moved}, made.text, NOW_MS) is moved


def test_a_known_text_expires_with_its_key() -> None:
    made = make_key()
    spec = KeySpec(made.key_id, made.secret_sha256, "acme", expires_ms=NOW_MS + 10)
    known = KnownKeys()
    assert known.check({made.key_id: spec}, made.text, NOW_MS) is spec
    assert known.check({made.key_id: spec}, made.text, NOW_MS + 9) is spec
    assert known.check({made.key_id: spec}, made.text, NOW_MS + 10) is None


def test_a_known_text_costs_no_hash_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "TEXTS_MAX", 2)
    asked: list[str] = []
    real = http.check_key

    def watched(keys: dict[str, KeySpec], text: str, now_ms: int) -> KeySpec | None:
        asked.append(text)
        return real(keys, text, now_ms)

    monkeypatch.setattr(known_keys, "check_key", watched)
    made = [make_key() for _ in range(3)]
    keys = {each.key_id: KeySpec(each.key_id, each.secret_sha256, "acme") for each in made}
    known = KnownKeys()
    for each in (made[0], made[0], made[1], made[2], made[2], made[0]):
        assert known.check(keys, each.text, NOW_MS) is keys[each.key_id]
    assert asked == [made[0].text, made[1].text, made[2].text, made[0].text]
