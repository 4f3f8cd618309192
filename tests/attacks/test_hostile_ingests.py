"""Threat: a tenant's weight files are built to exhaust the worker that loads them, or to smuggle bytes past
the hash.

Headers alone are attacked in ``test_hostile_headers``; here whole loads are: many files at their limits,
names in two files, origins that answer with other bytes the second time, and a pack beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from origin_samples import CountedSource, Tensor, contents, ingest, listed, load, weight_files
from pack_samples import KEY, REF, memory_file, read_image, safetensors_bytes

from packer.index import PackError
from packer.ingest import Ingest
from packer.layout import TensorInfo, lay_out
from packer.pack import PackReader
from packer.pack_writer import PackWriter
from packer.packing import PackTarget
from packer.progress import ProgressLog
from packer.sources import Source
from packer.tiers import TierError
from packer.types import MIB, OriginFile, Task

ROOT = Path(__file__).resolve().parents[2]


def run_of(sources: list[tuple[OriginFile, Source]], target: PackTarget | None = None) -> Ingest:
    return Ingest(sources, REF, "transformers", Task.EMBEDDING, target)


def refused(files: dict[str, bytes]) -> TierError:
    run = run_of([(file, CountedSource(files[file.path])) for file in listed(files)])
    with pytest.raises(TierError) as caught:
        load(run)
    return caught.value


def test_a_name_in_two_files_is_refused() -> None:
    """Two readers could see two models."""
    one: Tensor = ("h.0.w", "U8", [4], b"good")
    other: Tensor = ("h.0.w", "U8", [4], b"evil")
    assert refused(weight_files([[one], [other]])).broken


@pytest.mark.parametrize("names", [["../h.0.w"], ["/etc/passwd"], ["h.0.w", "h.0.w\n"], [""]])
def test_names_that_are_paths_are_refused(names: list[str]) -> None:
    error = refused(weight_files([[(name, "U8", [1], b"x") for name in names]]))
    assert error.broken
    assert len(error.message) < 1000


def header_only(rows: dict[str, object], body: bytes = b"") -> bytes:
    text = json.dumps(rows).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("rows", "body"),
    [
        ({"a": {"dtype": "U8", "shape": [2**39] * 8, "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "U8", "shape": [2**39], "data_offsets": [0, 2**39]}}, bytes(8)),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [-8, 0]}}, bytes(8)),
        (
            {
                "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]},
            },
            bytes(12),
        ),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}, bytes(16)),
        ({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, bytes(4)),
    ],
)
def test_a_lying_header_stops_a_load_before_its_image(rows: dict[str, object], body: bytes) -> None:
    files = {"model.safetensors": header_only(rows, body)}
    run = run_of([(file, CountedSource(files[file.path])) for file in listed(files)])
    with pytest.raises(TierError) as caught:
        run.open()
    assert caught.value.broken
    assert run.layout.image_bytes == 0


class TwoFaced(CountedSource):
    """Another file from the second read of a place on: what was hashed is not what comes later."""

    def __init__(self, data: bytes, other: bytes) -> None:
        super().__init__(data)
        self._other = other
        self._read: set[int] = set()

    def read_into(self, offset: int, view: memoryview) -> None:
        again = offset in self._read
        self._read.add(offset)
        data = self._other if again else self.data
        view[:] = data[offset : offset + len(view)]


def test_every_byte_that_is_used_is_the_byte_that_was_hashed() -> None:
    """An origin that changes its answers: each byte of the body is read once, there is no second answer."""
    good = safetensors_bytes([("h.0.w", "U8", [3 * MIB], bytes(range(256)) * (3 * MIB // 256))])
    evil = safetensors_bytes([("h.0.w", "U8", [3 * MIB], b"e" * 3 * MIB)])
    file = OriginFile("model.safetensors", len(good), hashlib.sha256(good).hexdigest())
    done = ingest([(file, TwoFaced(good, evil))])
    assert b"eeee" not in bytes(done.image.bytes)
    run = run_of([(file, TwoFaced(evil, good))])
    with pytest.raises(TierError, match="has changed"):
        load(run)


def test_a_changed_origin_never_becomes_a_pack() -> None:
    """The chunks are packed before the hash is known; with a wrong hash nothing of them stays."""
    good = safetensors_bytes([("h.0.w", "U8", [3 * MIB], bytes(3 * MIB))])
    evil = good[:-1] + b"\1"
    file = OriginFile("model.safetensors", len(good), hashlib.sha256(good).hexdigest())
    with memory_file() as fd, memory_file() as part_fd:
        run = run_of([(file, CountedSource(evil))], PackTarget(fd, part_fd, KEY, 64 * MIB))
        with pytest.raises(TierError) as caught:
            load(run)
        assert caught.value.corrupt
        with pytest.raises(PackError):
            run.finish_pack()
        assert contents(fd) == contents(part_fd) == b""


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_mutated_weight_files_load_completely_or_not_at_all(data: st.DataObject) -> None:
    """Registered as they are, so no hash protects: the header alone decides, and it never lies."""
    file = bytearray(
        safetensors_bytes([("h.0.w", "F32", [2, 3], bytes(range(24))), ("h.1.x", "BF16", [5], bytes(10))])
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1))
        file[at] = data.draw(st.sampled_from(b'0123456789-{}[]":,.aF\x00\xff'))
    files = {"model.safetensors": bytes(file)}
    try:
        done = ingest([(entry, CountedSource(files[entry.path])) for entry in listed(files)])
    except TierError:
        return
    for tensor in done.ingest.layout.tensors:
        info = tensor.info
        placed = done.image.bytes[tensor.image_offset : tensor.image_offset + info.nbytes]
        assert placed == file[info.file_offset : info.file_offset + info.nbytes]


SCRIPT = """
import hashlib, json, resource, sys
from packer.ingest import Ingest
from packer.layout import TensorInfo, lay_out
from packer.pack import PackReader
from packer.pack_writer import PackWriter
from packer.tiers import TierError
from packer.types import ModelRef, OriginFile, Task
from origin_samples import CountedSource

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def weight_file(number):
    {weight_file}

shared = {{}}
sources = []
for number in range({files}):
    if not shared or {distinct}:
        data = weight_file(number)
        shared[number] = (data, hashlib.sha256(data).hexdigest())
    data, digest = shared[max(shared)]
    sources.append((OriginFile(f"m{{number}}.safetensors", len(data), digest), CountedSource(data)))
before = peak()
run = Ingest(sources, ModelRef("acme", "m", "0" * 16), "transformers", Task.EMBEDDING, None)
try:
    run.open()
    print("opened", peak() - before)
except TierError as error:
    print("broken" if error.broken else "other", peak() - before)
"""


def outcome(weight_file: Iterable[str], files: int, distinct: bool) -> tuple[str, int]:
    """How opening these files ends, and by how many bytes the process grew."""
    body = "\n    ".join(weight_file)
    script = SCRIPT.format(weight_file=body, files=files, distinct=distinct)
    path = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    word, grown = done.stdout.split()
    return word, int(grown)


TENSORS = (
    "row = {'dtype': 'U8', 'shape': [0], 'data_offsets': [0, 0]}",
    "rows = {f'h.{number}.t{at}': row for at in range(50_000)}",
    "text = json.dumps(rows).encode()",
    "return len(text).to_bytes(8, 'little') + text",
)
LONG_TEXT = (
    "text = json.dumps({'__metadata__': {'a': 'x' * 15_000_000}}).encode()",
    "return len(text).to_bytes(8, 'little') + text",
)


def test_the_tensors_of_all_files_together_are_limited() -> None:
    """Each file has as many as one may have; the second is the last that is looked at."""
    word, grown = outcome(TENSORS, 4, distinct=True)
    assert word == "broken"
    assert grown < 256 * MIB


def test_long_headers_of_many_files_do_not_add_up() -> None:
    """40 headers of 15 MB each: one at a time is in memory."""
    word, grown = outcome(LONG_TEXT, 40, distinct=False)
    assert word == "opened"
    assert grown < 128 * MIB


def test_equal_chunks_in_falling_order_cost_what_they_cost_in_rising_order() -> None:
    """Their extent must go to the first of them; moved with each, 3 MB of weights would take hours of
    rewriting and 60 GB of records beside the pack."""
    raw = memoryview(bytes(range(64)) + bytes(4096 - 64))
    tensors = [
        TensorInfo(f"h.{n}.w", "F32" if n % 2 else "I32", (16,), "m.safetensors", 64 * n, 64)
        for n in range(400)
    ]
    layout = lay_out(tensors)
    assert len(layout.chunks) == len(tensors)
    written: list[tuple[int, bytearray]] = []
    for numbers in (range(len(layout.chunks)), reversed(range(len(layout.chunks)))):
        with memory_file() as pack, memory_file() as part:
            log = ProgressLog(part, KEY, REF, layout)
            log.clear()
            writer = PackWriter(pack, REF, "transformers", Task.EMBEDDING, layout, KEY, 4 * MIB, log=log)
            for number in numbers:
                writer.add_chunk(number, raw)
            assert writer.finish().deduplicated_bytes == 398 * 4096
            log_bytes = os.fstat(part).st_size
            reader = PackReader(pack, KEY, REF)
            written.append((log_bytes, read_image(reader)))
            assert [chunk.same_as for chunk in reader.index.chunks[:4]] == [None, None, 0, 1]
    assert written[1][0] <= 3 * written[0][0]
    assert written[0][1] == written[1][1] == bytes(raw) * 400
