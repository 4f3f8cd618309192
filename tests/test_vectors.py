"""Inputs that share a forward pass, on every kind of encoder: each row is its own input's and no other's.

Covers: rows of padded passes against the same inputs alone, rows against plain transformers to the bit, and
inputs whose results are not numbers. Does not cover: which inputs are joined (``test_batching``), requests
(``test_compute``), or tokenizers (``test_engines``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from agent.engines.pooling import Pooling
from agent.engines.vectors import VectorAnswer, Vectors
from packer.types import Task

WORDS = 200
CONTEXT = 48
# Of rows of length one, in float32, from passes that share nothing but the weights: a few roundings.
TOLERANCE = 2e-6

_SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT + 8,
    "pad_token_id": 1,
}
_KINDS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {},
    "Camembert": {},
    "MPNet": {},
    "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 8},
}


def encoder(kind: str, task: Task = Task.EMBEDDING, dtype: torch.dtype = torch.float32) -> Vectors:
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **_KINDS[kind]})
    config._attn_implementation = "sdpa"
    suffix = "Model" if task is Task.EMBEDDING else "ForSequenceClassification"
    try:
        module: PreTrainedModel = getattr(transformers, kind + suffix)(config)
    except ValueError:  # it has no such attention
        config._attn_implementation = "eager"
        module = getattr(transformers, kind + suffix)(config)
    module = module.train(False).to(dtype)
    return Vectors(task, module, None, Pooling(normalize=True), CONTEXT, WORDS)  # type: ignore[arg-type]


def inputs(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, WORDS, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def together(vectors: Vectors, *answers: VectorAnswer) -> list[list[torch.Tensor]]:
    vectors.compute([(answer, place) for answer in answers for place in answer.missing])
    return [answer.rows for answer in answers]


@torch.inference_mode()
def alone(vectors: Vectors, tokens: Sequence[int]) -> torch.Tensor:
    answer = VectorAnswer([tokens])
    vectors.compute([(answer, 0)])
    return answer.rows[0]


@torch.no_grad()
def set_embedding(vectors: Vectors, token: int, value: float) -> None:
    vectors.module.get_parameter("embeddings.word_embeddings.weight")[token] = value


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("task", [Task.EMBEDDING, Task.CLASSIFICATION])
def test_a_row_is_what_its_input_gives_alone(kind: str, task: Task) -> None:
    vectors = encoder(kind, task)
    texts = inputs(3, 17, 9, 17, 40)
    first, second = together(vectors, VectorAnswer(texts[:2]), VectorAnswer(texts[2:]))
    for tokens, row in zip(texts, [*first, *second], strict=True):
        assert torch.allclose(row, alone(vectors, tokens), atol=TOLERANCE, rtol=0), len(tokens)


def test_an_input_alone_is_plain_transformers_to_the_bit() -> None:
    vectors = encoder("Bert")
    (tokens,) = inputs(13)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        hidden = vectors.module(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        plain = torch.nn.functional.normalize(hidden.mean(dim=1), p=2, dim=1)[0]
    assert torch.equal(alone(vectors, tokens), plain)


def test_the_company_of_an_input_can_not_be_read_off_its_row() -> None:
    """Another neighbour of the same length changes nothing at all: the same sums in the same order."""
    vectors = encoder("Bert")
    mine, one, other = inputs(12, 20, 20)
    (beside_one,), (beside_other,) = (
        together(vectors, VectorAnswer([mine]), VectorAnswer([neighbour]))[0] for neighbour in (one, other)
    )
    assert torch.equal(beside_one, beside_other)


def test_a_row_does_not_keep_those_of_its_company() -> None:
    vectors = encoder("Bert")
    mine, theirs = (VectorAnswer(inputs(7)) for _ in range(2))
    together(vectors, mine, theirs)
    (row,) = mine.rows
    assert row.untyped_storage().nbytes() == row.nbytes


def test_requests_for_fewer_dimensions_share_passes_with_others() -> None:
    vectors = encoder("Bert")
    (tokens,) = inputs(8)
    (short,), (whole,) = together(vectors, VectorAnswer([tokens], dimensions=16), VectorAnswer([tokens]))
    assert (len(short), len(whole)) == (16, 32)
    assert torch.allclose(short, whole[:16] / whole[:16].norm(), atol=TOLERANCE, rtol=0)


def test_what_is_not_a_number_stays_where_it_is() -> None:
    vectors = encoder("Bert")
    bad = 100
    set_embedding(vectors, bad, float("nan"))
    poisoned, clean = [5, bad, 7], inputs(9)[0]
    (nan,), (row,) = together(vectors, VectorAnswer([poisoned]), VectorAnswer([clean]))
    assert torch.isnan(nan).all()
    assert torch.allclose(row, alone(vectors, clean), atol=TOLERANCE, rtol=0)


def test_padding_that_is_not_a_number_spoils_no_row() -> None:
    """A tenant's weights may hold anything, also for the padding token, which no input has."""
    vectors = encoder("Bert")
    texts = inputs(4, 12)
    before = [alone(vectors, tokens) for tokens in texts]
    set_embedding(vectors, 1, 1e30)
    (rows,) = together(vectors, VectorAnswer(texts))
    for row, wanted in zip(rows, before, strict=True):
        assert torch.allclose(row, wanted, atol=TOLERANCE, rtol=0)
