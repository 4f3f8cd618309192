"""What every engine's model can do, whatever is inside.

Covers: the shape of a built model (``Model``), what makes a directory useless (``BrokenModel``), and
choosing the engine that builds one. Does not cover: building (``transformers``, ``export``) or memory
(``agent/arena``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agent.arena import Image
from agent.early import Gate
from agent.engines.decoding import Text
from agent.engines.vectors import VectorAnswer
from agent.facade import EngineFrame, EngineRequest
from packer.layout import ImageLayout
from packer.types import Task


class BrokenModel(Exception):
    """The directory can not become a model, whatever tier it comes from. Names what is wrong."""


class Model(Protocol):
    """A built model. ``attach`` gives it weights, ``detach`` takes them away; in between it answers.

    What computes must only be called from the worker's one compute thread.
    """

    @property
    def tokens_max(self) -> int:
        """Tokens of one pass over inputs of several requests."""

    @property
    def is_gated(self) -> bool:
        """Whether a pass may have to wait for weights."""

    def attach(self, image: Image) -> None:
        """Point every weight into the image. Copies nothing."""

    def detach(self) -> None:
        """Forget the weights; a stray use then fails instead of reading freed memory."""

    def serve_behind(self, gate: Gate, layout: ImageLayout) -> Sequence[int] | None:
        """From the next request on let each layer wait for its chunks. Gives the chunks that no layer waits
        for, which must be there before; None: this model can not, and nothing changed."""

    def begin(
        self, request: EngineRequest, emit: Callable[[EngineFrame], None]
    ) -> VectorAnswer | Text | None:
        """Read a request of which parts may share passes with others'; None: it is one for ``run``. ``emit``
        takes the frames of a text. Raises ``EngineError``."""

    def compute(self, parts: Sequence[tuple[VectorAnswer, int]]) -> None:
        """One forward pass over inputs of any answers that ``begin`` gave."""

    def frame(self, answer: VectorAnswer) -> EngineFrame:
        """The answer, once no row is missing."""

    def run(
        self,
        request: EngineRequest,
        emit: Callable[[EngineFrame], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Answer a whole request through ``emit``. Raises ``EngineError``."""


class WholeRequests:
    """The part of a model whose requests never share a pass."""

    tokens_max = 0

    def begin(self, request: EngineRequest, emit: object) -> None:
        return None

    def compute(self, parts: Sequence[tuple[VectorAnswer, int]]) -> None:
        raise AssertionError("no request of this model was begun")

    def frame(self, answer: VectorAnswer) -> EngineFrame:
        raise AssertionError("no request of this model was begun")


def build(
    engine: str, task: Task, files: Mapping[str, bytes], layout: ImageLayout, private: Path, device: str
) -> Model:
    """The skeleton of a model, without weights; see ``transformers.build``. Raises ``BrokenModel``."""
    # Here, because both engines need what this file says.
    from agent.engines import export, transformers

    match engine:
        case "transformers":
            return transformers.build(task, files, layout, private, device)
        case "export":
            return export.build(task, files, layout, device)
        case _:
            raise BrokenModel(f"engine {engine[:40]!r} is not one that this release has: upgrade the node")
