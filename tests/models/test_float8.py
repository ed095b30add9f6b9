"""score --precision fp8: layers, agreement of ranks, refusals."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from miniplm.kernels import quantize_rows
from scoring_runs import needs_scaled_rows
from torch import nn

from miniplm.cli import main
from miniplm.config import ScoreConfig
from miniplm.data.selection import rank_agreement
from miniplm.models import float8
from miniplm.models.float8 import Float8Linear, fused_linear, to_float8
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.stages.score import score


@needs_scaled_rows
@pytest.mark.parametrize("bias", [False, True])
def test_layer(bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48, bias=bias), torch.randn(3, 7, 64)
    layer = Float8Linear(linear)
    (rows, scale), (weight, weight_scale) = (
        quantize_rows(x.flatten(0, 1)),
        quantize_rows(linear.weight.detach()),
    )
    expected = (rows.double() * scale) @ (weight.double() * weight_scale).T + (
        linear.bias.double() if bias else 0
    )
    torch.testing.assert_close(layer(x), expected.float().unflatten(0, (3, 7)), rtol=1e-5, atol=1e-5)
    assert (layer(x) - linear(x)).norm() < 0.05 * linear(x).norm()
    other = Float8Linear(nn.Linear(64, 16, bias=bias))
    torch.testing.assert_close(
        fused_linear(x, [layer, other, layer]),
        torch.cat([layer(x), other(x), layer(x)], -1),
        rtol=1e-6,
        atol=1e-6,
    )


@needs_scaled_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(dtype, tiny_model, tmp_path):
    """All layers of the decoder are replaced, the head is not, and the hidden states stay near."""
    name = tiny_model(tmp_path, initializer_range=0.05, tie_word_embeddings=False)
    model, plain = load_model(name, dtype), load_model(name, dtype)
    to_float8(model)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2 * 7
    assert type(model.lm_head) is nn.Linear and torch.equal(model.head_weight, plain.head_weight)
    ids, cu_seqlens = torch.randint(0, 500, (100,)), torch.tensor([0, 40, 100], dtype=torch.int32)
    with torch.inference_mode():
        near, exact = model(ids, cu_seqlens), plain(ids, cu_seqlens)
    assert near.dtype == dtype and 0 < (near - exact).norm() < 0.1 * exact.norm()


@needs_scaled_rows
@pytest.mark.parametrize(
    "sizes",
    [dict(num_attention_heads=4, num_key_value_heads=1), dict(num_attention_heads=3, num_key_value_heads=3)],
)
def test_joined_layers_of_which_some_stay(sizes, tiny_model, tmp_path):
    """Heads of 8: keys and values 8 wide, or all 24 wide, are no multiple of 16."""
    name = tiny_model(tmp_path, initializer_range=0.05, head_dim=8, **sizes)
    model, plain = to_float8(load_model(name)), load_model(name)
    assert {type(module) for module in model.modules()} >= {nn.Linear, Float8Linear}
    ids, cu_seqlens = torch.randint(0, 500, (60,)), torch.tensor([0, 60], dtype=torch.int32)
    with torch.inference_mode():
        near, exact = model(ids, cu_seqlens), plain(ids, cu_seqlens)
    assert 0 < (near - exact).norm() < 0.1 * exact.norm()


@needs_scaled_rows
def test_odd_sizes_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.even, self.odd, self.head_weight = nn.Linear(16, 32), nn.Linear(32, 15), torch.zeros(1)

    odd = to_float8(Odd())
    assert isinstance(odd.even, Float8Linear) and type(odd.odd) is nn.Linear


def test_a_device_that_cannot(tiny_model, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError(
            "torch._scaled_mm is only supported\non CUDA devices with compute capability >= 9.0 or 8.9"
        )

    monkeypatch.setattr(float8.torch, "_scaled_mm", refuse)
    with pytest.raises(
        UserError, match=r"^precision fp8 does not run here: it needs .*leave --precision out$"
    ):
        to_float8(load_model(tiny_model(tmp_path)))


def test_rank_agreement():
    values = np.array([3.0, 1.0, 2.0, 0.0, np.nan, 5.0])
    assert rank_agreement(values, 2 * values + 1) == {
        "rows": 5,
        "spearman": pytest.approx(1),
        "equal_selections": 1.0,
    }
    assert rank_agreement(values, -values)["spearman"] == pytest.approx(-1)
    other = np.array(
        [3.0, 1.0, 4.0, 0.0, 9.0, np.inf]
    )  # four rows finite in both; of the best two {0, 2} both times
    assert rank_agreement(values, other) == {
        "rows": 4,
        "spearman": pytest.approx(0.8),
        "equal_selections": 1.0,
    }
    swapped = np.array([1.5, 3.0, 2.0, 0.0, 9.0, np.inf])  # {1, 2} instead of {0, 2}
    assert rank_agreement(values, swapped)["equal_selections"] == 0.5
    assert rank_agreement(values[4:5], values[4:5]) == {"rows": 0, "spearman": None, "equal_selections": None}


@needs_scaled_rows
@pytest.mark.parametrize("both", [True, False])
def test_scoring(both, tiny_corpus, tiny_model, tmp_path, capsys):
    teacher, reference = tiny_model(tmp_path / "t", seed=0), tiny_model(tmp_path / "r", seed=1)
    arguments = [
        "score",
        "--data",
        tiny_corpus,
        "--teacher",
        teacher,
        *(["--reference", reference] if both else []),
        *("--device", "cpu", "--dtype", "float32"),
    ]
    assert main([*arguments, "--output", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path / "fp8"), "--precision", "fp8"]) == 0
    assert "fp8 against float32 on 39 chunks: " in capsys.readouterr().out
    manifest = json.loads((tmp_path / "fp8" / "manifest.json").read_text())
    column = "score" if both else "teacher_log_prob"
    plain, quantised = (
        pq.read_table(sorted((tmp_path / name).glob("*.parquet"))[0])[column].to_numpy()
        for name in ("plain", "fp8")
    )
    assert (
        manifest["fp8_agreement"] == rank_agreement(plain, quantised)
        and manifest["identity"]["precision"] == "fp8"
    )
    assert manifest["fp8_agreement"]["spearman"] > 0.9 and not np.array_equal(
        plain, quantised, equal_nan=True
    )
    assert "precision" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["identity"]


def test_another_precision_is_another_run(tiny_corpus, tiny_model, tmp_path):
    config = dict(
        data=tiny_corpus, teacher=tiny_model(tmp_path / "t"), output=str(tmp_path / "scores"), device="cpu"
    )
    score(ScoreConfig(**config))
    before = {path.name: path.read_bytes() for path in Path(config["output"]).iterdir()}
    with pytest.raises(UserError, match="precision"):
        score(ScoreConfig(**config, precision="fp8"))
    assert before == {path.name: path.read_bytes() for path in Path(config["output"]).iterdir()}
