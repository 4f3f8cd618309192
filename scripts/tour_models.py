"""The models of the tour: which tenant pushes what, how large, and what plain transformers answers.

Covers: the list, making the directories, and the reference embeddings. Does not cover: calling them.

Sizes are chosen for two cpu devices of ``DEVICE`` each: the largest model fits one of them beside its
workspace, no two large ones do, and all together are more than three times what the devices hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import make_models
import plain_transformers

MIB = 1024 * 1024
DEVICE = "cpu:112MiB"
DEVICE_BYTES = 112 * MIB
DEVICES = 2
# Some opened packs fit, not all, so that restores come from the host and from the disk.
HOST_BYTES = "192MiB"
DISK_BYTES = "4GiB"
# The promise, checked against what control says the models weigh.
WEIGHTS_TO_BUDGET_MIN = 3

INPUTS = (
    "A bunkhouse is a plain building where many workers sleep.",
    "Each has a bed while it is needed, and nobody keeps one that stays empty.",
    "The weights come back exactly as they were, byte for byte.",
    "hello",
    "Models are like riders: most of them rest most of the time. " * 12,
    "Grüße aus der Schlafbaracke, 早上好, ¿qué tal?",
)


@dataclass(frozen=True, slots=True)
class TourModel:
    """One model of the tour. ``kind`` is how it is made and called."""

    tenant: str
    name: str
    kind: str  # "minilm", "gpt2", "llama", "llama-bf16", "classifier"
    seed: int = 0

    @property
    def ref(self) -> str:
        return f"{self.tenant}/{self.name}"

    @property
    def directory_name(self) -> str:
        """Tenants with the same real model push the same directory."""
        return self.kind if self.kind == "minilm" else f"{self.kind}-{self.seed}"


# In order of popularity: the skewed order of calls follows it.
MODELS = (
    TourModel("acme", "minilm", "minilm"),
    TourModel("bolt", "chat", "llama", seed=1),
    TourModel("coda", "minilm", "minilm"),
    TourModel("acme", "writer", "gpt2", seed=2),
    TourModel("bolt", "minilm", "minilm"),
    TourModel("coda", "writer", "gpt2", seed=3),
    TourModel("acme", "mood", "classifier", seed=4),
    TourModel("bolt", "writer", "gpt2", seed=5),
    TourModel("coda", "chat", "llama-bf16", seed=6),
    TourModel("bolt", "chat-large", "llama", seed=7),
)
TENANTS = ("acme", "bolt", "coda")


def make_directory(model: TourModel, root: Path) -> Path:
    """The model's directory under ``root``, made on the first call."""
    directory = root / model.directory_name
    if (directory / "model.safetensors").exists():
        return directory
    match model.kind:
        case "minilm":
            return make_models.copy_minilm(directory)
        case "gpt2":
            return make_models.make_gpt2(directory, model.seed)
        case "llama":
            return make_models.make_llama(directory, model.seed, hidden=640, layers=4, heads=8)
        case "llama-bf16":
            return make_models.make_llama(
                directory, model.seed, hidden=896, layers=4, heads=8, dtype="bfloat16"
            )
        case "classifier":
            return make_models.make_classifier(directory, model.seed, hidden=512, layers=6, heads=8)
        case kind:
            raise ValueError(f"{model.ref}: no such kind of model: {kind!r}")


def reference_embeddings(directory: Path) -> dict[str, bytes]:
    """What plain transformers answers to each of ``INPUTS``, in a process of its own."""
    answer = plain_transformers.ask_fresh_process(directory, "--embed", *INPUTS)
    return dict(zip(INPUTS, answer.vectors, strict=True))
