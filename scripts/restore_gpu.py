"""The section of the restore bench that needs a GPU; without one it says so and measures nothing.

Covers: restores to a GPU against the plain copy from pinned memory and against other loaders, decoding on the
GPU against its own copy rate, and the time from the host tier to the first token of a model shaped like one
of 8 billion parameters. Does not cover: several GPUs.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import restore_data
import torch
from bench_harness import Case
from bench_suite import Judgement, Section, Table
from restore_node import running_node
from restore_peers import PLAIN, WARM, Peer
from restore_setup import PACK, Setup, measure, rate, rivals_of, runs_of, timed_table

from packer.types import GIB, HostForm, Task

PINNED_COPY = "plain copy from pinned memory"
DEVICE_COPY = "copy within the GPU"
DECODE = "decode on the GPU"
FROM_HOST = "host tier, wire form"
# Llama-3.1-8B: 16 GB of bf16.
EIGHT_B = restore_data.Shape("llama-8B", 4096, 14336, 32, 8, 128_256)
FIRST_TOKENS = 5
NO_GPU = "torch sees no GPU here; on a machine with one the same command measures it"


def gpu(setup: Setup) -> Section:
    """Everything that needs a GPU."""
    if not torch.cuda.is_available():
        return Section("gpu", skipped=(NO_GPU,))
    rivals = rivals_of(setup, WARM, cold=False, device="cuda")
    report, medians = measure(setup, "gpu", _cases(setup, rivals.peers), PINNED_COPY, DEVICE_COPY)
    best, best_name = rivals.best_streamer(medians)
    judgements = [
        Judgement(
            "host tier to the GPU, times the plain pinned copy rate of the same bytes",
            medians[PINNED_COPY] / medians[FROM_HOST],
            1.3,
            unit="x",
        ),
        Judgement(
            f"pack in the page cache to the GPU, times as fast as the best loader ({best_name})",
            best / medians[PACK] if best is not None else None,
            1.0,
            unit="x",
            why="no loader could be run" if best is None else "",
        ),
    ]
    tables = [timed_table(setup, "To tensors on a GPU", report, [rivals.note])]
    if not setup.quick:
        tables.append(asyncio.run(_first_token(setup)))
    name = torch.cuda.get_device_name(0)
    skipped = (f"host tier to the first token of {EIGHT_B.name} (not in a quick run)",) if setup.quick else ()
    tables[0] = replace(tables[0], notes=(*tables[0].notes, name))
    return Section("gpu", tuple(tables), tuple(judgements), skipped, runs_of(report))


def _cases(setup: Setup, peers: Sequence[Peer]) -> list[Case]:
    def ours(name: str, job: str, **settings: Any) -> Case:
        return Case(name, lambda: setup.ours_once(name, job, **settings).taken_ms)

    def theirs(peer: Peer) -> Case:
        return Case(peer.name, lambda: setup.peer_once(peer, "cuda"))

    nbytes = setup.spec.image_bytes
    pack = {"path": str(setup.pack), "key": setup.key}
    return [
        ours(PINNED_COPY, "pinned_copy", nbytes=nbytes),
        ours(DEVICE_COPY, "device_copy", nbytes=nbytes),
        ours(DECODE, "device_decode", **pack),
        ours(FROM_HOST, "restore", fd=setup.segments[HostForm.WIRE], kind="cuda"),
        ours(PACK, "restore", **pack, kind="cuda"),
        *(theirs(peer) for peer in peers),
        *([theirs(PLAIN)] if PLAIN.loader in setup.present and PLAIN not in peers else []),
    ]


async def _first_token(setup: Setup) -> Table:
    """Two tenants' models of 16 GB on a device that holds one: each call swaps, then answers."""
    setup.free_memory()
    directory = restore_data.model_directory(setup.cache, EIGHT_B)
    spec = restore_data.describe(directory, setup.spec.ref, Task.GENERATION)
    specs = tuple(replace(spec, ref=replace(spec.ref, tenant=name)) for name in ("first", "second"))
    folder = setup.cache / "bench-gpu-node"
    shutil.rmtree(folder, ignore_errors=True)
    restores: list[float] = []
    tokens: list[float] = []
    free_bytes, _ = torch.cuda.mem_get_info()
    try:
        # So large a workspace that the device never has room for both.
        held = tuple(replace(each, workspace_bytes=max(GIB, free_bytes // 2)) for each in specs)
        async with running_node(folder, setup.rates, held, "cuda:0", 40 * GIB, 60 * GIB) as node:
            for each in held:
                await node.answer(each)
                await node.until_packed(each)
            for number in range(2 * FIRST_TOKENS + 4):
                started_s = time.perf_counter()
                taken = await node.take(held[number % 2])
                await node.answer(held[number % 2], tokens=1)
                if number >= 4:  # packs are read once before host copies are there
                    restores.append(taken.wait_ms)
                    tokens.append((time.perf_counter() - started_s) * 1000)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = tuple(_spread(name, values, spec.image_bytes) for name, values in _named(restores, tokens))
    columns = ("until", "median", "least", "greatest", "GB/s of weights")
    return Table(f"{EIGHT_B.name}, {spec.image_bytes / 1e9:.1f} GB, from the host tier", columns, rows)


def _named(restores: list[float], tokens: list[float]) -> list[tuple[str, list[float]]]:
    return [("the model can run", restores), ("the first token", tokens)]


def _spread(name: str, values: list[float], nbytes: int) -> tuple[str, str, str, str, str]:
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return name, f"{middle:.0f} ms", f"{ordered[0]:.0f}", f"{ordered[-1]:.0f}", rate(nbytes, middle)
