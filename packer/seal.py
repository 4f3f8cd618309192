"""Keys and sealed bytes: wrapping keys in keys, sealing and opening the parts of a pack.

Covers: the key hierarchy's two operations (wrap, unwrap), the key of one pack file derived from the
version's data key, and AES-256-GCM over each part of a pack, in place. Does not cover: where keys are
kept (the agent's journal) or where sealed parts lie in the file (``pack``).

Hierarchy: node key > tenant key > data key of one version > key of one pack file. The upper ones wrap
the lower ones, so rotating the node or tenant key rewrites no pack, and destroying a tenant key
destroys all that its data keys sealed.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from packer.types import ModelRef

KEY_BYTES = 32
TAG_BYTES = 16
SALT_BYTES = 32
NONCE_BYTES = 12
FINGERPRINT_BYTES = TAG_BYTES
WRAPPED_KEY_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES
# A part longer than this is never made; also far below what one GCM nonce may cover (64 GiB).
PART_BYTES_MAX = 128 * 1024 * 1024

_DERIVE_INFO = b"bunkhouse pack key, format 3"
_NONCE = struct.Struct(">BBHQ")
_BINDING = struct.Struct(">BBHQQQ")


class BadSeal(ValueError):
    """Bytes are not what was sealed with this key in this place. Nothing of them may be used."""


class PartKind(IntEnum):
    """What a sealed part of a pack is; part of its nonce, so that no two parts share one."""

    INDEX = 1
    FILE = 2
    CHUNK = 3


@dataclass(frozen=True, slots=True)
class Part:
    """The place of one sealed part. All of it is authenticated, kind, index and plane make the nonce."""

    kind: PartKind
    index: int = 0
    plane: int = 0
    codec_id: int = 0
    stored_bytes: int = 0
    raw_bytes: int = 0

    def nonce(self) -> bytes:
        return _NONCE.pack(self.kind, self.plane, 0, self.index)

    def binding(self) -> bytes:
        return _BINDING.pack(
            self.kind, self.plane, self.codec_id, self.index, self.stored_bytes, self.raw_bytes
        )


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


def new_salt() -> bytes:
    return os.urandom(SALT_BYTES)


def _check_key(key: bytes, what: str) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"{what} must have {KEY_BYTES} bytes, not {len(key)}")


def wrap_key(parent: bytes, key: bytes, aad: bytes) -> bytes:
    """Seal ``key`` under ``parent``. ``aad`` says whose key it is; unwrapping needs the same.

    The nonce is random: a parent wraps a few thousand keys at most, far below where that matters.
    """
    _check_key(parent, "parent key")
    _check_key(key, "key")
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(parent).encrypt(nonce, key, aad)


def unwrap_key(parent: bytes, wrapped: bytes, aad: bytes) -> bytes:
    """The inverse of ``wrap_key``. Raises ``BadSeal`` for a wrong parent, ``aad`` or changed bytes."""
    _check_key(parent, "parent key")
    if len(wrapped) != WRAPPED_KEY_BYTES:
        raise BadSeal(f"a wrapped key has {WRAPPED_KEY_BYTES} bytes, not {len(wrapped)}")
    try:
        return AESGCM(parent).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)
    except InvalidTag:
        raise BadSeal("wrapped key does not open: wrong parent key, wrong owner or changed bytes") from None


def derive_pack_key(data_key: bytes, salt: bytes) -> bytes:
    """The key of one pack file. A version packed twice gets a new salt and so a new key, which is what
    makes plain counters safe as nonces even when the second packing produces other bytes."""
    _check_key(data_key, "data key")
    if len(salt) != SALT_BYTES:
        raise ValueError(f"salt must have {SALT_BYTES} bytes, not {len(salt)}")
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_DERIVE_INFO).derive(data_key)


def seal_context(ref: ModelRef) -> bytes:
    """What every chunk and side file of a version is bound to. Lengths first, so no two refs collide."""
    words = [word.encode("utf-8") for word in (ref.tenant, ref.name, ref.version)]
    return b"".join(len(word).to_bytes(2, "big") + word for word in words)


class Fingerprints:
    """Keyed fingerprints of chunks: the authentication code of AES-GCM over all bytes.

    The key is random, and key and codes are only ever in sealed indexes of one tenant's packs. So for any
    two different chunks of at most 4 MiB, chosen by whomever without them, the chance of the same code is
    below 2^-108. All codes of a key have one nonce: whoever has several could work out the key's part in
    them, which is why chunks of two versions are compared besides, and why no other tenant sees one.
    """

    def __init__(self, key: bytes) -> None:
        _check_key(key, "fingerprint key")
        self.key = key
        self._cipher = AESGCM(key)

    def of(self, raw: memoryview) -> bytes:
        return self._cipher.encrypt(bytes(NONCE_BYTES), b"", raw)


class ChunkSeal:
    """Seals and opens the parts of one pack file. Thread-safe; holds the GIL for no bulk work."""

    def __init__(self, key: bytes, context: bytes) -> None:
        _check_key(key, "pack key")
        self._cipher = AESGCM(key)
        self._context = context
        self._lock = threading.Lock()
        self._sealed: set[bytes] = set()

    def seal_into(self, part: Part, plain: memoryview, out: memoryview) -> None:
        """Seal ``plain`` into ``out``, which has room for the tag behind it. ``out`` may start at the
        same address as ``plain``. Each part is sealed at most once: a nonce is never used again."""
        if len(out) != len(plain) + TAG_BYTES or len(plain) > PART_BYTES_MAX:
            raise ValueError(f"sealing {len(plain)} bytes needs {TAG_BYTES} more, not {len(out)} in all")
        nonce = part.nonce()
        with self._lock:
            if nonce in self._sealed:
                raise ValueError(f"{part} was sealed before with this key")
            self._sealed.add(nonce)
        self._cipher.encrypt_into(nonce, plain, self._context + part.binding(), out)

    def open_into(self, part: Part, sealed: memoryview, out: memoryview) -> None:
        """Authenticate ``sealed`` (bytes, then tag) and open it into ``out``, which may start at the same
        address. Raises ``BadSeal``; what ``out`` then holds must not be used."""
        if len(sealed) != len(out) + TAG_BYTES or len(out) > PART_BYTES_MAX:
            raise BadSeal(f"{len(sealed)} sealed bytes do not open to {len(out)}")
        try:
            self._cipher.decrypt_into(part.nonce(), sealed, self._context + part.binding(), out)
        except InvalidTag:
            raise BadSeal(
                f"{part.kind.name.lower()} {part.index} plane {part.plane} does not open: wrong key, "
                "changed bytes or another place"
            ) from None
