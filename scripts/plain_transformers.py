"""A fresh process that loads a model the plain way and answers once: what people do without Bunkhouse.

Covers: embeddings (with the mean pooling and normalisation of a sentence-transformers directory) and greedy
generation, on CPU, through ``from_pretrained`` and nothing of ours. Used as the peer of ``bench_cold`` and as
the reference whose bits the tour compares with. Does not cover: other poolings, batches, or GPUs.

``python scripts/plain_transformers.py DIR --embed TEXT …`` prints ``{"load_ms", "answer_ms", "vectors"}``;
``vectors`` are base64 of little-endian float32. ``--generate TEXT --tokens N`` prints ``text`` instead.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0  # importing torch and loading a small model takes seconds even on a slow disk


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """``process_ms`` runs from before the process was started until its answer was read."""

    process_ms: float
    load_ms: float
    answer_ms: float
    vectors: tuple[bytes, ...] = ()
    text: str = ""


def ask_fresh_process(directory: Path, *words: str, timeout_s: float = TIMEOUT_S) -> PlainAnswer:
    """Run this file in a process of its own. Raises ``RuntimeError`` with what it printed if it fails."""
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, str(directory), *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    process_ms = (time.perf_counter() - started_s) * 1000
    if done.returncode != 0:
        raise RuntimeError(f"plain transformers failed on {directory}:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout)
    return PlainAnswer(
        process_ms=process_ms,
        load_ms=answer["load_ms"],
        answer_ms=answer["answer_ms"],
        vectors=tuple(base64.b64decode(vector) for vector in answer.get("vectors", ())),
        text=answer.get("text", ""),
    )


def embed(directory: Path, inputs: Sequence[str]) -> dict[str, object]:
    """Each input alone in its batch, like sentence-transformers: mean, then length one."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    started_s = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()
    settings = directory / "sentence_bert_config.json"
    tokens_max = json.loads(settings.read_text())["max_seq_length"] if settings.exists() else None
    loaded_s = time.perf_counter()
    vectors = []
    with torch.inference_mode():
        for text in inputs:
            batch = tokenizer(text, truncation=True, max_length=tokens_max, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
            mean = (hidden * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
            vector = torch.nn.functional.normalize(mean, p=2, dim=1)[0]
            vectors.append(base64.b64encode(vector.contiguous().numpy().tobytes()).decode())
    answered_s = time.perf_counter()
    return {
        "load_ms": (loaded_s - started_s) * 1000,
        "answer_ms": (answered_s - loaded_s) * 1000,
        "vectors": vectors,
    }


def generate(directory: Path, prompt: str, tokens: int) -> dict[str, object]:
    """The greedy continuation of a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started_s = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Any: the declared types of generate() do not accept the classes that have it.
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    model.train(False)
    loaded_s = time.perf_counter()
    with torch.inference_mode():
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**batch, do_sample=False, max_new_tokens=tokens)
        text = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    answered_s = time.perf_counter()
    return {
        "load_ms": (loaded_s - started_s) * 1000,
        "answer_ms": (answered_s - loaded_s) * 1000,
        "text": text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--embed", nargs="+", metavar="TEXT")
    what.add_argument("--generate", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=8, help="how many tokens --generate makes")
    options = parser.parse_args()
    if options.embed:
        answer = embed(options.directory, options.embed)
    else:
        answer = generate(options.directory, options.generate, options.tokens)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
