"""Telling nodes who their peers are without telling all of it each time.

Covers: what a list of peers is known by, the change from one list to another, applying it, and the lists
that control keeps to tell changes from. Does not cover: who is a peer (``control/catalog.py``) or what peers
may do (``agent/sharing.py``). Pure.

In a cluster of 5,000 nodes the whole list takes some 600 KB; sent to all with each change of a plan that
would be 3 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from packer.wire import PeerSpec, Plan

# Lists that control can still tell the change from: a node that missed more of them gets the whole list.
# They share their entries, so one takes eight bytes per node.
LISTS_KEPT_MAX = 64
# Lists that a node still follows from: a poll that waits is answered at the first change, a few beats of the
# other kind may come before that.
LISTS_FOLLOWED_MAX = 8


@dataclass(frozen=True, slots=True)
class PeerChange:
    """From the list known by ``base`` (empty: from nothing) to the one known by ``result``: peers that are
    new or have another key, and names that are gone."""

    base: str
    peers: tuple[PeerSpec, ...]
    gone: tuple[str, ...]
    result: str


def peer_change(plan: Plan) -> PeerChange:
    """What a plan says of the list of peers."""
    result = plan.peers_sha256 or list_sha256(plan.peers)
    return PeerChange(plan.peers_base, plan.peers, plan.peers_gone, result)


def list_sha256(peers: Sequence[PeerSpec]) -> str:
    """What a list is known by; ``peers`` are in the order of their names."""
    text = "\n".join(f"{peer.node} {peer.key_sha256} {peer.peer_url}" for peer in peers)
    return hashlib.sha256(text.encode()).hexdigest()


def changed(peers: Sequence[PeerSpec], change: PeerChange) -> tuple[PeerSpec, ...] | None:
    """The list after the change; None when it does not come to what the change says."""
    by_name = {peer.node: peer for peer in peers} if change.base else {}
    for name in change.gone:
        by_name.pop(name, None)
    by_name |= {peer.node: peer for peer in change.peers}
    # Control orders them; a plan of an earlier release, which comes whole, is taken as it is.
    found = tuple(by_name[name] for name in sorted(by_name)) if change.base else tuple(change.peers)
    return found if list_sha256(found) == change.result else None


class KnownPeers:
    """A node's side: the list of the newest plan that came to this process, and what it is ``known`` by.

    A node has two beats under way, and what it knew when it sent one may be behind what the answer to the
    other has brought meanwhile: the lists before the newest one are kept to follow from as well.
    """

    def __init__(self) -> None:
        # By what each is known by, the newest last.
        self._lists: dict[str, tuple[PeerSpec, ...]] = {}

    @property
    def known(self) -> str:
        return next(reversed(self._lists), "")

    def complete(self, plan: Plan) -> Plan | None:
        """The plan with its whole list. None when that does not follow from what is here: without that plan
        the next beat brings one again, from nothing."""
        change = peer_change(plan)
        base = self._lists.get(change.base) if change.base else ()
        peers = changed(base, change) if base is not None else None
        if peers is None:
            self._lists.clear()
            return None
        self._lists.pop(change.result, None)
        self._lists[change.result] = peers
        while len(self._lists) > LISTS_FOLLOWED_MAX:
            del self._lists[next(iter(self._lists))]
        return replace(plan, peers=peers, peers_base="", peers_gone=())


class PeerLists:
    """Control's side: the newest list and those before it."""

    def __init__(self) -> None:
        # By what each is known by, the oldest first.
        self._lists: dict[str, tuple[PeerSpec, ...]] = {}
        self._newest = ""
        # Ways to the newest list that were worked out; most nodes have the same one.
        self._changes: dict[str, PeerChange] = {}

    def take(self, peers: tuple[PeerSpec, ...]) -> None:
        """These are all peers now, in the order of their names."""
        sha256 = list_sha256(peers)
        if sha256 == self._newest:
            return
        self._lists.pop(sha256, None)
        self._lists[sha256] = peers
        while len(self._lists) > LISTS_KEPT_MAX:
            del self._lists[next(iter(self._lists))]
        self._newest = sha256
        self._changes = {}

    def change_from(self, have: str) -> PeerChange:
        """What brings whoever has the list ``have`` (anything, from anybody) to the newest one."""
        base = have if have in self._lists else ""
        if base not in self._changes:
            self._changes[base] = self._change(base)
        return self._changes[base]

    def _change(self, base: str) -> PeerChange:
        newest = self._lists[self._newest]
        before = {peer.node: peer for peer in self._lists[base]} if base else {}
        peers = tuple(peer for peer in newest if before.get(peer.node) != peer)
        names = {peer.node: None for peer in newest}
        gone = tuple(name for name in before if name not in names)
        return PeerChange(base, peers, gone, self._newest)
