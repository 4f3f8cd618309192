"""Planted bugs of who is who: certificates, CAs that overlap, copies of a box, plans that are not for a node.

Covers: the list; ``module`` is a full name here. Does not cover: planting (``planted``) or running them
(``scripts/mutation.py``).
"""

from __future__ import annotations

from mutants import Mutant

LIVES, CA, READING, UPLINK = "control.lives", "control.ca", "packer.certificates", "agent.uplink"
IDENTITY, JOINING, LINES = "packer.identity", "control.routes.certifying", "control.node_tls"

IDENTITY_MUTANTS = (
    Mutant(
        "a restart is taken for a copy",
        LIVES,
        "if life.began < theirs.began <= told:",
        "if life.began < theirs.began:",
    ),
    Mutant("a copy is never found out", LIVES, "theirs.began <= told:", "theirs.began < told < 0:"),
    Mutant("a copy is forgotten at once", LIVES, "< CLONE_MEMORY_MS", "< 1"),
    Mutant("the next CA signs before nodes know it", CA, "if all_trust or now_s", "if True or now_s"),
    Mutant(
        "the former CA ends with its last day",
        CA,
        "rotation.issuing_s + life_s + 2 * CLOCK_SKEW.total_seconds()",
        "rotation.issuing_s",
    ),
    Mutant(
        "the next CA says nothing of the former",
        "control.authority",
        "pem_of(cas.next.vouch_for(cas.present, now)) if cas.next is not None else cas.present.pem",
        "cas.present.pem",
    ),
    Mutant(
        "any CA that TLS was given is good",
        READING,
        "    if not any(is_issued_by(certificate, ca) for ca in cas):\n",
        "    if not cas:\n",
    ),
    Mutant(
        "a certificate is good for ever", READING, "    if now_s >= speaker.ends_s:\n", "    if now_s < 0:\n"
    ),
    Mutant(
        "any node's certificate opens the listener for control",
        IDENTITY,
        "        if speaker.name != CONTROL and known != speaker.key_sha256:\n",
        "        if not speaker.name:\n",
    ),
    Mutant(
        "a CA beside the pinned one is trusted at a join",
        IDENTITY,
        "            return pem_of(certificate)\n",
        "            return ca_pem.decode()\n",
    ),
    Mutant(
        "the router takes a node's name for the node",
        LINES,
        "if (speaker.node, speaker.key_sha256) != (row.node, row.key_sha256):",
        "if speaker.node != row.node:",
    ),
    Mutant(
        "the key of a late renewal is not compared",
        JOINING,
        "row.key_sha256 == speaker.key_sha256 == key_sha256_of(csr)",
        "row.key_sha256 == speaker.key_sha256",
    ),
    Mutant(
        "late renewals have no end",
        JOINING,
        "    if late_s > LATE_RENEWAL_MAX",
        "    if late_s > 99 * LATE_RENEWAL_MAX",
    ),
    Mutant("another node's plan is taken", UPLINK, " or plan.node != mine.node:", ":"),
    Mutant(
        "plans do not expire on their way",
        UPLINK,
        "plan.expires_ms and self._clock",
        "not plan.seq and self._clock",
    ),
    Mutant(
        "an answer to another beat is listened to",
        UPLINK,
        "        if got.life and (got.life, got.number) != (beat.life, beat.number):\n",
        "        if got.life and not got.number:\n",
    ),
    Mutant(
        "a certificate that is refused is taken for a removal",
        UPLINK,
        "        if answer.status in (403, 404):\n",
        "        if answer.status in (401, 403, 404):\n",
    ),
)
