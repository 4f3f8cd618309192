"""Certificate authorities of a cluster: their keys on disk, signing with them, and replacing one by another.

Covers: making and keeping a CA, certificates that it signs, and the stages of a rotation, in which two CAs
overlap. Does not cover: who is given a certificate (``control.authority``), or telling nodes
(``control.state``).

A rotation has three stages, so that no node has to be stopped and nothing is refused meanwhile:

1. announced: the next CA exists. Nodes are told to trust both; tokens pin the next. Everything is still
   signed by the present one, which the next one vouches for, so that nodes that join with a pin of the next
   accept what control shows.
2. issuing: all nodes have said that they trust both, or the life of a certificate has passed. Nodes'
   certificates are signed by the next CA from now on; what control shows stays as it is.
3. ended: no certificate of a node that the former CA signed can be valid any more. Its key is destroyed, and
   control shows certificates of the new one.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from packer.certificates import pem_of, spki_digest
from packer.durable import sync_folder, write_private

CA_LIFE = timedelta(days=3650)
# Revocation is the node's removal, checked on each request; a short life bounds what a copy is worth.
NODE_CERTIFICATE_LIFE = timedelta(hours=24)
# Certificates are valid from a little earlier, for clocks that are behind.
CLOCK_SKEW = timedelta(minutes=30)
PRESENT, NEXT = "ca", "next-ca"
ROTATION = "rotation.json"
# There while the first CA is made: what lies beside it was never used by anybody.
MAKING = "ca.making"


class BrokenCa(OSError):
    """The CA that nodes trust is there and can not be read: only a backup helps. The text says which file."""


class NoRotation(Exception):
    """The rotation that was asked for can not be; the text says why."""


@dataclass(frozen=True, slots=True)
class Ca:
    """A P-256 key and its self-signed certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return pem_of(self.certificate)

    @property
    def pin(self) -> str:
        """What join tokens carry: sha256 of the CA's key."""
        return base64.urlsafe_b64encode(spki_digest(self.certificate)).rstrip(b"=").decode()

    def sign(
        self,
        key: ec.EllipticCurvePublicKey,
        common_name: str,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        life: timedelta,
        now: datetime,
    ) -> x509.Certificate:
        """A certificate for ``key``, with these names and for these uses alone."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = (
            _builder(subject, self, key, life, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())

    def vouch_for(self, other: Ca, now: datetime) -> x509.Certificate:
        """The other CA's name and key under this one: who trusts this one accepts what the other signs."""
        builder = (
            _builder(other.certificate.subject, self, other.key.public_key(), CA_LIFE, now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(key_usage(signs_certificates=True), critical=True)
        )
        return builder.sign(self.key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: Ca, key: ec.EllipticCurvePublicKey, life: timedelta, now: datetime
) -> x509.CertificateBuilder:
    issuer_key = issuer.key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def make_ca(common_name: str, now: datetime) -> Ca:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + CA_LIFE)
        # One below: the CA that it takes over from, while they overlap.
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Ca(key, certificate)


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


# --- on disk --------------------------------------------------------------------------------------


def _paths(directory: Path, stem: str) -> tuple[Path, Path]:
    return directory / f"{stem}.key", directory / f"{stem}.pem"


def keep_ca(directory: Path, stem: str, ca: Ca) -> None:
    """The key goes last: with it in place the pair is complete."""
    key_path, certificate_path = _paths(directory, stem)
    key_path.unlink(missing_ok=True)
    write_private(certificate_path, ca.pem.encode())
    write_private(key_path, private_pem(ca.key))


def load_ca(directory: Path, stem: str) -> Ca | None:
    """None when there is none. Raises ``BrokenCa``: what was complete once is never made anew in silence:
    every node would have to join again."""
    paths = _paths(directory, stem)
    lacking = [str(path) for path in paths if not path.exists()]
    if len(lacking) == len(paths):
        return None
    ca = _read_pair(*paths)
    if ca is None:
        strange = f"{paths[0]} and {paths[1]} do not belong together"
        found = f"{lacking[0]} is missing" if lacking else strange
        raise BrokenCa(
            f"the cluster's CA can not be read: {found}; restore both from a backup. Without one, remove "
            "what is left of both and start control again: it makes a new CA, and every node must join again"
        )
    return ca


def _read_pair(key_path: Path, certificate_path: Path) -> Ca | None:
    """None when a file is not there, or not whole, or when they do not belong together."""
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    except (FileNotFoundError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        return None
    return Ca(key, certificate)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# --- rotation -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rotation:
    """Since when, in Unix seconds; ``issuing_s`` None: announced. ``ended``: only files are left to move."""

    announced_s: float
    issuing_s: float | None = None
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Cas:
    """The present CA, and during a rotation the next. ``found``: what was wrong with their files."""

    present: Ca
    next: Ca | None = None
    rotation: Rotation | None = None
    found: str = ""

    @property
    def issuer(self) -> Ca:
        """Who signs nodes' certificates."""
        issuing = self.rotation is not None and self.rotation.issuing_s is not None
        return self.next if issuing and self.next is not None else self.present


def load_cas(directory: Path, common_name: str, now: datetime) -> Cas:
    """What there is, after moves that a crash cut short; a first CA is made when there is none.

    The next CA's files and the stage may be missing or broken (a crash, a disk, half a backup): the present
    one goes on then, ``found`` says so, and what was there is kept aside. Raises ``BrokenCa`` when that is
    broken itself.
    """
    rotation, found = _read_rotation(directory)
    if rotation is not None and rotation.ended:
        if _may_move(directory):
            _move_next(directory)
            return Cas(_present(directory, common_name, now), found=found)
        return _give_up(directory, _present(directory, common_name, now))
    present = _present(directory, common_name, now)
    if rotation is None:
        return Cas(present, found=found)
    following = _read_pair(*_paths(directory, NEXT))
    return Cas(present, following, rotation, found) if following is not None else _give_up(directory, present)


def _present(directory: Path, common_name: str, now: datetime) -> Ca:
    making = directory / MAKING
    present = _read_pair(*_paths(directory, PRESENT)) if making.exists() else load_ca(directory, PRESENT)
    if present is None:
        write_private(making, b"")
        present = make_ca(common_name, now)
        keep_ca(directory, PRESENT, present)
    if making.exists():
        making.unlink()
        sync_folder(directory)
    return present


def _read_rotation(directory: Path) -> tuple[Rotation | None, str]:
    """The stage, and what is wrong with its file. One that can not be read is taken for the first, in which
    both CAs are trusted and the present one signs: that holds whatever it was."""
    path = directory / ROTATION
    try:
        return _load_rotation(directory), ""
    except msgspec.DecodeError:
        announced = Rotation(path.stat().st_mtime)
        key_path, certificate_path = _paths(directory, NEXT)
        if not key_path.exists() and _read_pair(_paths(directory, PRESENT)[0], certificate_path) is not None:
            announced = replace(announced, ended=True)  # the key was moved already
        _keep_rotation(directory, announced)
        return announced, f"{path} could not be read: the rotation of the CA begins anew"


def _may_move(directory: Path) -> bool:
    """Whether the present CA is the next one after the moves that are left."""
    pairs = zip(_paths(directory, NEXT), _paths(directory, PRESENT), strict=True)
    return _read_pair(*(new if new.exists() else old for new, old in pairs)) is not None


def _give_up(directory: Path, present: Ca) -> Cas:
    """There is no next CA to rotate to: what is left of it is kept, and another rotation may begin."""
    for path in (*_paths(directory, NEXT), directory / ROTATION):
        if path.exists():
            os.replace(path, path.with_name(f"{path.name}.broken"))
    sync_folder(directory)
    return Cas(
        present,
        found=f"the next CA's files in {directory} are missing or broken, so its rotation is given up and "
        "the present CA goes on; what was there is kept as *.broken. Tokens that pin the next CA are void, "
        "and nodes that have a certificate of it must join again. Begin again with: bunk-control rotate-ca",
    )


def begin_rotation(directory: Path, now: datetime) -> Cas:
    """Announce a next CA. Raises ``NoRotation``. Control must not run, or take up what is returned."""
    present = load_ca(directory, PRESENT)
    if present is None:
        raise NoRotation(f"{directory} has no CA yet: control makes one when it starts for the first time")
    if (directory / ROTATION).exists():
        raise NoRotation(
            "a rotation is under way already; it ends by itself a day after all nodes know of it"
        )
    base = present.certificate.subject.rfc4514_string().removeprefix("CN=").partition(" CA ")[0]
    # Another name than the present one's: whoever looks for an issuer by name finds one.
    following = make_ca(f"{base} CA {now:%Y%m%d%H%M%S}"[:64], now)
    keep_ca(directory, NEXT, following)
    rotation = Rotation(now.timestamp())
    _keep_rotation(directory, rotation)
    return Cas(present, following, rotation)


def next_stage(cas: Cas, all_trust: bool, now: datetime) -> Rotation | None:
    """The stage that a rotation is in from now on; None when nothing changes."""
    rotation = cas.rotation
    if rotation is None:
        return None
    life_s = NODE_CERTIFICATE_LIFE.total_seconds()
    now_s = now.timestamp()
    if rotation.issuing_s is None:
        if all_trust or now_s >= rotation.announced_s + life_s:
            return replace(rotation, issuing_s=now_s)
    elif now_s >= rotation.issuing_s + life_s + 2 * CLOCK_SKEW.total_seconds():
        return replace(rotation, ended=True)
    return None


def enter_stage(directory: Path, cas: Cas, rotation: Rotation) -> Cas:
    """Make a stage durable. Ending destroys the former CA's key."""
    _keep_rotation(directory, rotation)
    if not rotation.ended or cas.next is None:
        return replace(cas, rotation=rotation)
    _move_next(directory)
    return Cas(cas.next)


def _load_rotation(directory: Path) -> Rotation | None:
    try:
        return msgspec.json.decode((directory / ROTATION).read_bytes(), type=Rotation)
    except FileNotFoundError:
        return None


def _keep_rotation(directory: Path, rotation: Rotation) -> None:
    write_private(directory / ROTATION, msgspec.json.encode(rotation))


def _move_next(directory: Path) -> None:
    """Each step may be the last before a crash; the same steps again end it."""
    for new, old in zip(_paths(directory, NEXT), _paths(directory, PRESENT), strict=True):
        if new.exists():
            os.replace(new, old)
    sync_folder(directory)
    (directory / ROTATION).unlink(missing_ok=True)
    sync_folder(directory)
