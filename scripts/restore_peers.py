"""Which settings the other loaders are given, and finding the best one of each on this machine.

Covers: the settings worth trying, warm and cold, and a search that runs each and keeps the fastest. Does not
cover: the loaders (``peer_loaders``) or installing them (``peers_venv``).

A peer must be measured at its best: what its authors chose for a server with sixteen cores and a network
file system is not what is best here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fresh_child import LoadFailed

# Noise can double a time, on a busy machine; settings that are worth a second run are within this.
FAR_BEHIND = 1.7


@dataclass(frozen=True, slots=True)
class Peer:
    """One loader with one choice of settings."""

    loader: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    words: str = ""

    @property
    def name(self) -> str:
        return f"{self.loader} ({self.words})" if self.words else self.loader


# What people do without any loader of the streaming kind.
PLAIN = Peer("safetensors", words="load_file + clone")


def _fastsafetensors(direct: bool, threads: int, buffer_mib: int) -> Peer:
    return Peer(
        "fastsafetensors",
        {"max_threads": threads, "bbuf_size_kb": buffer_mib * 1024},
        {"FASTSAFETENSORS_ODIRECT": "1" if direct else "0"},
        f"{'direct' if direct else 'buffered'}, {threads} threads, {buffer_mib} MiB",
    )


def _runai(strategy: str, concurrency: int | None) -> Peer:
    environment = {"RUNAI_STREAMER_FS_STRATEGY": strategy}
    words = strategy
    if concurrency is not None:
        environment["RUNAI_STREAMER_CONCURRENCY"] = str(concurrency)
        words += f", concurrency {concurrency}"
    return Peer("runai_model_streamer", {}, environment, words)


def _tensorizer(readers: int) -> Peer:
    return Peer("tensorizer", {"num_readers": readers}, {}, f"{readers} readers")


# By loader: its default first, then what was seen to win somewhere.
WARM: Mapping[str, Sequence[Peer]] = {
    "fastsafetensors": (
        _fastsafetensors(True, 16, 16),
        _fastsafetensors(False, 2, 1),
        _fastsafetensors(False, 4, 1),
        _fastsafetensors(False, 2, 16),
        _fastsafetensors(False, 16, 16),
    ),
    "runai_model_streamer": (
        Peer("runai_model_streamer", words="default"),
        _runai("sync_buffered", 2),
        _runai("sync_buffered", 8),
        _runai("io_uring_buffered", None),
    ),
    "tensorizer": (_tensorizer(1), _tensorizer(2), _tensorizer(4)),
}
COLD: Mapping[str, Sequence[Peer]] = {
    "fastsafetensors": (
        _fastsafetensors(True, 16, 16),
        _fastsafetensors(True, 4, 4),
        _fastsafetensors(False, 16, 16),
    ),
    "runai_model_streamer": (
        Peer("runai_model_streamer", words="default"),
        _runai("libaio_direct", None),
        _runai("io_uring_buffered", None),
    ),
    "tensorizer": (_tensorizer(1), _tensorizer(4)),
}


@dataclass(frozen=True, slots=True)
class Search:
    """The best of each loader, and what its others took."""

    best: tuple[Peer, ...]
    tried: Mapping[str, float]
    failed: Mapping[str, str]


def search(
    candidates: Mapping[str, Sequence[Peer]],
    present: Sequence[str],
    run: Callable[[Peer], float],
    runs: int,
) -> Search:
    """Run every candidate of the loaders that are there ``runs`` times; the least time decides. One that is
    far behind its loader's best after the first run is not run again."""
    tried: dict[str, float] = {}
    failed: dict[str, str] = {}
    best: list[Peer] = []
    for loader, peers in candidates.items():
        if loader not in present:
            continue
        for peer in peers:
            try:
                least = run(peer)
                for _ in range(runs - 1):
                    others = [tried[other.name] for other in peers if other.name in tried]
                    if not others or least <= FAR_BEHIND * min(others):
                        least = min(least, run(peer))
                tried[peer.name] = least
            except LoadFailed as error:
                failed[peer.name] = str(error).strip().splitlines()[-1]
        working = [peer for peer in peers if peer.name in tried]
        if working:
            best.append(min(working, key=lambda peer: tried[peer.name]))
    return Search(tuple(best), tried, failed)
