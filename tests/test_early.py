"""Answering while layers still come: never on a byte that is not there, and the same answer to the bit.

Covers: the gate, which chunks come first, and bringing a model into service in the middle of its restore,
with a restore that the test holds back chunk by chunk. Does not cover: the core's side (``test_partial``)
or restores at their own speed (``test_worker_moves``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from make_models import make_gpt2, make_llama
from running_workers import TEXT
from tiny_models import describe, find_minilm, opened, tiny_classifier

from agent.arena import Image
from agent.early import Gate, GateFailed, Watched, chunks_of, outside_layers
from agent.facade import EngineFrame, EngineRequest
from agent.frames import Spawn, wire_spec
from agent.moves import Incoming, Moves
from agent.shelf import NotResident, Shelf
from packer.ingest import Ingest
from packer.layout import ImageLayout
from packer.sources import FileSource
from packer.tiers import TierError
from packer.types import ModelRef, ModelSpec, Task

REF = ModelRef("acme", "m", "0" * 16)
PATIENCE_S = 60
NEVER: Callable[[], bool] = lambda: False  # noqa: E731
# What an unfilled image holds here, so that computing on it can not go unnoticed: every float of it is NaN.
POISON = b"\xff"


@dataclass
class Case:
    """A model, the bytes of its image, and one request."""

    spec: ModelSpec
    layout: ImageLayout
    side_files: dict[str, bytes]
    image: bytes
    request: EngineRequest


CASES = {
    "encoder": (lambda folder: find_minilm(), Task.EMBEDDING, EngineRequest("embed", {"inputs": [TEXT]})),
    "tied decoder": (
        lambda folder: make_gpt2(folder, 3, layers=3),
        Task.GENERATION,
        EngineRequest("generate", {"prompt": "Hello", "temperature": 0, "max_tokens": 5}),
    ),
    "decoder": (
        lambda folder: make_llama(folder, 4, layers=3),
        Task.GENERATION,
        EngineRequest("generate", {"prompt": "Hello", "temperature": 0, "max_tokens": 5}),
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    make, task, asked = CASES[request.param]
    directory = make(tmp_path_factory.mktemp("model") / "m")
    return case_of(directory, task, asked)


def case_of(directory: Path, task: Task, asked: EngineRequest) -> Case:
    from agent.arena import allocate_image

    spec = describe(directory, REF, task)
    with opened(directory, spec) as fds:
        ingest = Ingest(
            [(file, FileSource(fds[file.path])) for file in spec.files], REF, spec.engine, task, None
        )
        ingest.open()
        image = allocate_image("cpu", ingest.layout)
        ingest.fill(image)
    pieces = []
    for chunk in ingest.layout.chunks:
        with image.reading(chunk.image_offset, chunk.nbytes) as view:
            pieces.append(bytes(view))
    image.close()
    return Case(spec, ingest.layout, dict(ingest.side_files), b"".join(pieces), asked)


class Stage:
    """One model that comes in chunk by chunk, as the test says."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.shelf = Shelf()
        self.moves = Moves(Spawn(1, "acme", "cpu:0", "cpu", "", 1), self.shelf, folder)
        self.watched = Watched(case.layout, 0)
        self.serving = threading.Event()
        self.images: list[Image] = []
        self.steps = threading.Semaphore(0)
        self.broken = threading.Event()
        self.placed: list[int] = []

    def bring_in(self) -> None:
        case = self.case
        incoming = Incoming(
            REF,
            wire_spec(case.spec),
            case.layout,
            case.side_files,
            self._fill,
            watched=self.watched,
            serving=self.serving.set,
        )
        with self.shelf.arriving(REF) as parked:
            self.moves._bring_in(incoming, parked)

    def _fill(self, image: Image) -> None:
        self.images.append(image)
        chunks = self.case.layout.chunks
        for chunk in chunks:
            with image.filling(chunk.image_offset, chunk.nbytes) as view:
                view[:] = POISON * chunk.nbytes
        self.watched.laid()
        for number in sorted(range(len(chunks)), key=lambda n: n not in self.watched.urgent):
            assert self.steps.acquire(timeout=PATIENCE_S)
            if self.broken.is_set():
                raise TierError("a fault")
            chunk = chunks[number]
            with image.filling(chunk.image_offset, chunk.nbytes) as view:
                view[:] = self.case.image[chunk.image_offset : chunk.image_offset + chunk.nbytes]
            self.placed.append(number)
            self.watched.placed(number)

    def answer(self) -> list[tuple[dict[str, object], bytes]]:
        frames: list[EngineFrame] = []
        with self.shelf.using(REF) as (held, _):
            held.model.run(self.case.request, frames.append, NEVER)
        return [(dict(frame.header), frame.body) for frame in frames]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_an_answer_begins_on_the_first_layers_and_is_the_same_to_the_bit(
    case: Case, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    stage = Stage(case, tmp_path)
    coming = threads.submit(stage.bring_in)
    for _ in stage.watched.urgent:
        stage.steps.release()
    assert stage.serving.wait(PATIENCE_S), "nobody was let in although all but the layers is there"
    assert len(stage.placed) < len(case.layout.chunks), "all of it had to come first"
    answer = threads.submit(stage.answer)
    for _ in case.layout.chunks[len(stage.watched.urgent) :]:
        assert not answer.done(), "an answer before its last layer"
        stage.steps.release()
    coming.result(PATIENCE_S)
    early = answer.result(PATIENCE_S)
    # Once more with all of it there from the start, which also takes the waiting out of the layers.
    assert stage.answer() == early
    with stage.shelf.using(REF) as (held, _):
        assert not held.model._hooks


def test_a_restore_that_fails_sends_everybody_away_and_leaves_nothing(
    case: Case, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    stage = Stage(case, tmp_path)
    coming = threads.submit(stage.bring_in)
    for _ in stage.watched.urgent:
        stage.steps.release()
    assert stage.serving.wait(PATIENCE_S)
    answer = threads.submit(stage.answer)
    stage.broken.set()
    stage.steps.release()
    with pytest.raises(TierError, match="a fault"):
        coming.result(PATIENCE_S)
    # It either waited for a layer, or had not begun.
    with pytest.raises((GateFailed, NotResident)):
        answer.result(PATIENCE_S)
    with pytest.raises(NotResident):
        stage.answer()
    assert stage.images[0].close(), "something still refers to the image"


def test_a_restore_that_ends_first_is_as_if_nobody_had_wanted_to_begin(case: Case, tmp_path: Path) -> None:
    stage = Stage(case, tmp_path)
    for _ in case.layout.chunks:
        stage.steps.release()
    stage.bring_in()
    assert stage.answer() == stage.answer()


def test_a_model_without_layers_waits_for_all_of_it(tmp_path: Path) -> None:
    directory = tiny_classifier(tmp_path / "m")
    case = case_of(directory, Task.CLASSIFICATION, EngineRequest("classify", {"inputs": [TEXT]}))
    # All in one chunk: whatever is outside of the layers shares it.
    assert len(case.layout.chunks) == 1
    assert outside_layers(case.layout) == {0}
    stage = Stage(case, tmp_path)
    stage.steps.release()
    stage.bring_in()
    assert stage.answer()


def test_the_gate_lets_through_exactly_what_is_there() -> None:
    gate = Gate(4, first_chunk=1)
    gate.wait([0])
    gate.placed(2)
    gate.wait([0, 2])
    assert not gate.is_open
    gate.placed(1)
    gate.placed(3)
    assert gate.is_open
    gate.fail()
    with pytest.raises(GateFailed):
        gate.wait([])


def test_every_tensor_lies_in_the_chunks_that_are_said_to_hold_it(case: Case) -> None:
    layout = case.layout
    for tensor in layout.tensors:
        start, end = tensor.image_offset, tensor.image_offset + tensor.info.nbytes
        wanted = [
            number
            for number, chunk in enumerate(layout.chunks)
            if chunk.image_offset < end and start < chunk.image_offset + chunk.nbytes
        ]
        assert list(chunks_of(layout, start, tensor.info.nbytes)) == wanted
