"""linear_log_prob on Triton: however the work is cut, wherever the rows lie."""

import pytest
import torch
from checks import assert_accurate
from miniplm.kernels import linear_log_prob, logits, tuning
from oracles import plain_log_prob
from random_inputs import on, random_head

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize(
    "shape, blocks, processors",
    [
        ((75, 500, 40), (16, 16, 16), 1),
        ((75, 500, 40), (64, 32, 16), 3),
        ((75, 500, 40), (16, 128, 64), 7),
        ((2, 151_936, 8), (16, 1024, 16), 132),
    ],
)
def test_any_configuration(shape, blocks, processors, monkeypatch, device):
    """The result is right however tokens, vocabulary and width are cut, and whoever of the grid takes which
    part."""
    config = tuning.Config(dict(zip(("BLOCK_T", "BLOCK_V", "BLOCK_D"), blocks, strict=True)))
    monkeypatch.setitem(tuning.CANDIDATES, "logsumexp", lambda *_, **__: [config])
    target = tuning.target(torch.device(device))._replace(processors=processors)
    monkeypatch.setattr(tuning, "target", lambda _: target)
    hidden, weight, targets = on(device, *random_head(*shape), dtype=torch.float32)
    result = linear_log_prob(hidden, weight, targets)
    truth = plain_log_prob(hidden.double(), weight.double(), targets)
    assert_accurate(result, plain_log_prob(hidden, weight, targets), truth)
    assert torch.equal(result, linear_log_prob(hidden, weight, targets)), "not the same bits again"


def test_a_wrong_target_gives_nan(device):
    hidden, weight, targets = on(device, *random_head(40, 130), dtype=torch.float32)
    expected = linear_log_prob(hidden, weight, targets)
    targets[[8, 9]] = torch.tensor([130, -1], device=device)
    result = linear_log_prob(hidden, weight, targets)
    others = [t for t in range(40) if t not in (8, 9)]
    assert result[[8, 9]].isnan().all() and torch.equal(result[others], expected[others])


@pytest.mark.parametrize("width", [16, 15])
def test_rows_beyond_31_bits(width, device, monkeypatch):
    """Rows that lie more than 2³¹ elements apart, in memory that is reserved and hardly touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 16
    hidden, weight = (
        torch.empty(2 * stride + width, dtype=torch.float16, device=device).as_strided(
            (3, width), (stride, 1)
        )
        for _ in range(2)
    )
    hidden.normal_(), weight.normal_()
    targets = torch.tensor([0, 1, 2], device=device)
    result = linear_log_prob(hidden, weight, targets)
    torch.testing.assert_close(result, linear_log_prob(hidden.contiguous(), weight.contiguous(), targets))


def test_splits_divide_the_work_evenly():
    """At the shapes of the aims (docs/design.md), no program has over 3% more tiles than the mean of all, and
    partial results stay small."""
    for tokens in (4096, 16_384, 65_536):
        for vocabulary in (151_936, 128_256, 49_152):
            blocks, tiles = tokens // 128, vocabulary // 256
            size = logits.tiles_per_split(tiles, blocks, 132)
            items = blocks * -(-tiles // size)
            assert -(-items // 132) * size <= 1.03 * blocks * tiles / 132 + 1
            assert -(-tiles // size) * tokens * 8 < 200e6
