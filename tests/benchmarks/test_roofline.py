"""benchmarks/roofline.py: its counts against counts by hand."""

import json
import sys

import pytest
from miniplm.kernels.chunks import Chunks

V = 151_936


@pytest.fixture
def roofline(module):
    return module("roofline")


def test_waves(roofline):
    assert roofline.waves(132, 132) == roofline.waves(264, 132) == 1
    assert roofline.waves(52, 132) == pytest.approx(52 / 132)
    assert roofline.waves(133, 132) == pytest.approx(133 / 264)


def test_cross_entropy_is_counted(roofline):
    """T = 1,000, d = 512, two chunks: three products; the second chunk reads the sum of dW once more."""
    tokens, d = 1000, 512
    parts = roofline.cross_entropy(tokens, d, Chunks(600, 1))
    assert sum(part.flops for part in parts) == 3 * 2 * tokens * V * d
    inputs = 2 * 2 * V * d + 2 * tokens * d  # W for the logits, once per chunk, and x
    exponentials = 2 * tokens * V * 3  # written once, read for dx and for dW
    dx = 2 * tokens * d + 2 * 2 * V * d  # written; W read once per chunk
    dw = 2 * 4 * V * d + 2 * tokens * d  # float32, written by each chunk; x read
    total = 4 * V * d + (4 + 2) * V * d  # read by the second chunk; cast at the end
    assert sum(part.bytes for part in parts) == inputs + exponentials + dx + dw + total
    one = roofline.cross_entropy(tokens, d, Chunks(tokens, 1))
    assert not any(part.bytes for part in one if part.name == "dW's sum")


def test_tiles(roofline):
    (dx,) = [part for part in roofline.cross_entropy(3328, 512, Chunks(3328, 1)) if part.name == "dx"]
    assert dx.tiles == 26 * 2
    (halves,) = [part for part in roofline.cross_entropy(3328, 512, Chunks(3328, 2)) if part.name == "dx"]
    assert halves.tiles == 2 * dx.tiles and halves.flops == dx.flops
    assert halves.bytes - dx.bytes == 2 * 4 * 2 * 3328 * 512  # both halves written and read in float32
    assert roofline.logits("logits", 129, 64).tiles == 2 * 594  # 151,936 / 256 = 593.5


def test_predictions_are_above_the_ideal(roofline):
    gpu = roofline.GPUS["H200"]
    records = [roofline.record(op, shape, parts, bare, gpu) for op, shape, parts, bare in roofline.rows(132)]
    assert len({(found["op"], str(found["shape"])) for found in records}) == len(records) > 15
    for found in records:
        assert found["predicted_ms"] >= found["ideal_ms"] > 0, found
        assert found["predicted_ms"] == pytest.approx(sum(found["parts_ms"].values()))
        assert found["over_bare_products"] is None or found["over_bare_products"] > 1
    norm = next(found for found in records if found["op"] == "rms_norm")
    assert norm["mb"] == pytest.approx(2 * 2 * 65_536 * 768 / 1e6)


def test_the_losses_are_cut_as_the_ops_cut_them(roofline):
    """Before: what the budget holds, in one part; after: never worse, dx on nine tenths of the processors."""
    gpu = roofline.GPUS["H200"]
    before, after = (
        [roofline.record(*row, gpu) for row in roofline.losses(132, old)] for old in (True, False)
    )
    assert len(before) == len(after) == 20
    for old, new in zip(before, after, strict=True):
        assert (old["op"], old["shape"]["d"]) == (new["op"], new["shape"]["d"]) and old["shape"]["parts"] == 1
        assert new["predicted_ms"] <= old["predicted_ms"] and new["waves_of_dx"] > 0.9, new
    assert before[0]["shape"]["chunk"] == 3328 and before[0]["waves_of_dx"] == pytest.approx(
        52 / 132, rel=0.02
    )
    assert before[10]["shape"]["chunk"] == 1664


def test_command_line(roofline, monkeypatch, tmp_path, capsys):
    file = tmp_path / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--gemm", "395", "--json", str(file)])
    roofline.main()
    report = json.loads(file.read_text())
    assert report["predicted"] is True and report["gemm_tflops"] == 395
    assert "nothing is measured" in capsys.readouterr().out
