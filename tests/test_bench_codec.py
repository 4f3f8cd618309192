"""The codec bench runs, notices wrong bytes on either side, and names the goals that it could not judge.

Covers: scripts/bench_codec.py with few weights and without peers, codec_cases, and codec_peers with the one
peer that is installed here anyway. Does not cover: any figure, zipnn, blosc2, or installing them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_codec
import codec_cases
import codec_peers
import numpy as np
import pytest
import torch
from codec_cases import NotExact, OurCodec

from packer.codec import decode_into
from packer.transforms import Transforms


@pytest.fixture(autouse=True)
def few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = {
        "embeddings.word.weight": torch.randn(600, 384) * 0.02,
        "encoder.layer.0.dense.weight": torch.randn(384, 1536) * 0.05,
        "encoder.layer.0.dense.bias": torch.zeros(1536),
    }
    monkeypatch.setattr(codec_cases, "real_weights", lambda file: weights)
    monkeypatch.setattr(bench_codec, "weights_file", lambda: Path("unused"))
    monkeypatch.setenv("BUNKHOUSE_KERNELS", "off")


def test_without_peers_goals_are_named_and_the_check_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file, text_file = tmp_path / "report.json", tmp_path / "report.md"
    words = ["--no-peers", "--quick", "--mib", "1", "--rounds", "1", "--check"]
    assert bench_codec.main([*words, "--json", str(report_file), "--markdown", str(text_file)]) == 1
    out, log = capsys.readouterr()
    assert "MISSED   stored to wire planes, one core, to zipnn" in out
    assert "missed goal: stored to wire planes, one core, to zipnn: at least 4x" in log
    assert "--no-peers" in log
    report = json.loads(report_file.read_text())
    verdicts = {verdict["goal"]: verdict for verdict in report["verdicts"]}
    assert verdicts["bf16 MiniLM, stored bytes of a raw byte"]["reached"]
    assert len(verdicts) == 6
    tables = [table["title"] for section in report["sections"] for table in section["tables"]]
    assert "Sizes, all of MiniLM" in tables
    assert "Stored to tensor, fp8, one thread" in tables
    assert "Encode, bf16, one thread" in tables
    assert "| bf16 |" in text_file.read_text()


def test_a_dtype_of_every_kind_is_run_and_compared() -> None:
    weights = codec_cases.real_weights(Path("unused"))
    for dtype in codec_cases.DTYPES:
        ours = OurCodec(codec_cases.tiled(codec_cases.cast(weights, dtype), 3 * 2**20 + 4), dtype)
        assert ours.decode(Transforms, 2) > 0
        assert ours.encode(Transforms) > 0
        assert ours.has_wire_form == (dtype in ("bf16", "fp32"))
        if ours.has_wire_form:
            assert ours.to_wire() > 0
            assert ours.open_to_wire(2) > 0


def test_a_decoder_that_is_not_exact_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = codec_cases.cast(codec_cases.real_weights(Path("unused")), "bf16")
    ours = OurCodec(codec_cases.tiled(weights, 2**20), "bf16")

    def one_bit_wrong(codec_id: int, planes: list[memoryview], out: memoryview, space: object) -> None:
        decode_into(codec_id, planes, out)
        out[len(out) - 1] ^= 1

    monkeypatch.setattr(codec_cases, "decode_into", one_bit_wrong)
    for run in (lambda: ours.decode(Transforms), ours.to_wire, ours.open_to_wire):
        with pytest.raises(NotExact):
            run()
    with pytest.raises(NotExact):
        codec_cases.stored_size(weights, "bf16")


def test_entropy_is_that_of_the_exponents() -> None:
    words = np.array([0x3F80, 0xBF81, 0x3F00, 0x4000] * 64, dtype=np.uint16)
    assert codec_cases.entropy_bytes(words.view(np.uint8), "bf16") == (1.5 + 8) * 256 / 8
    assert codec_cases.entropy_bytes(np.arange(256, dtype=np.uint8), "int8") == 256
    assert codec_cases.entropy_bytes(np.zeros(256, dtype=np.uint8), "fp8") == 0


def test_a_goal_is_not_reached_because_noise_hit_the_peer() -> None:
    rows = {"ours": (10.0, 10.0, 12.0), "zipnn": (90.0, 20.0, 80.0), "zipnn, copied": (95.0, 30.0, 99.0)}
    ratio = bench_codec.ratio_to_zipnn(rows, "ours")
    assert ratio is not None
    assert (ratio.by_medians, ratio.by_fastest, ratio.certain) == (8.0, 2.0, 2.0)
    rows = {"ours": (10.0, 40.0, 40.0), "zipnn, one call": (80.0, 80.0, 80.0)}
    ratio = bench_codec.ratio_to_zipnn(rows, "ours")
    assert ratio is not None
    assert (ratio.by_medians, ratio.by_fastest, ratio.certain) == (2.0, 8.0, 2.0)
    assert bench_codec.ratio_to_zipnn({"ours": (1.0,), "blosc2": (1.0,)}, "ours") is None


# --- peers ----------------------------------------------------------------------------------------


def test_the_process_of_the_peers_answers_or_says_why(tmp_path: Path) -> None:
    raw = np.tile(np.arange(256, dtype=np.uint8), 2**13)
    raw.tofile(tmp_path / "raw")
    peers = bench_codec.Peers(Path(sys.executable), ["zstd"])
    try:
        peers.ask(do="load", path=str(tmp_path / "raw"), dtype="bf16")
        assert peers.ask(do="encode", name="zstd")["bytes"] < len(raw)
        for threads in (1, 2):
            assert peers.ask(do="decode", name="zstd", threads=threads)["ms"] > 0
        with pytest.raises(bench_codec.PeerFailed, match="zipnn"):
            peers.ask(do="decode", name="zipnn")
        assert peers.ask(do="decode", name="zstd")["ms"] > 0
    finally:
        peers.close()


class Lossy(codec_peers.Zstd):
    """A peer that is fast and wrong."""

    def decode(self, packed: object, out: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> object:
        super().decode(packed, out)
        out[-1] ^= 1
        return out


def test_a_peer_that_is_not_exact_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.tile(np.arange(256, dtype=np.uint8), 2**13).tofile(tmp_path / "raw")
    monkeypatch.setitem(codec_peers.PEERS, "lossy", Lossy)
    bench = codec_peers.Bench()
    bench.load(str(tmp_path / "raw"), "bf16")
    with pytest.raises(RuntimeError, match="lossy did not give back the same bytes"):
        bench.decode("lossy", 2)


def test_peers_that_can_not_be_installed_leave_goals_unjudged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path, peers: object) -> None:
        raise bench_codec.peers_venv.CanNotInstall("no compiler here")

    monkeypatch.setattr(bench_codec.peers_venv, "ensure", fail)
    report_file = tmp_path / "report.json"
    words = ["--quick", "--mib", "1", "--rounds", "1", "--check", "--cache-dir", str(tmp_path)]
    assert bench_codec.main([*words, "--json", str(report_file)]) == 1
    whys = [verdict["why"] for verdict in json.loads(report_file.read_text())["verdicts"]]
    assert sum("no compiler here" in why for why in whys) == 4


@pytest.mark.parametrize("words", [["--mib", "0"], ["--mib", "5000"], ["--rounds", "0"]])
def test_bad_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_codec.main(["--no-peers", *words])
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err
