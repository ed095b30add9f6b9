"""linear_log_prob on Triton: however the work is cut, wherever the rows lie."""

import pytest
import torch
from checks import assert_accurate
from miniplm.kernels import linear_log_prob, log_prob, logits, tuning
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


# --- the maximum that is not looked for ---


def head_with_logits(logits, width=16):
    """hidden, weight whose product is `logits` [T, V], T ≤ width."""
    hidden = torch.eye(width, dtype=torch.float64)[: len(logits)]
    weight = torch.zeros(logits.shape[1], width, dtype=torch.float64)
    weight[:, : len(logits)] = logits.T
    return hidden, weight


def check(hidden, weight, targets, device):
    hidden, weight, targets = on(device, hidden, weight, targets, dtype=torch.float32)
    result = linear_log_prob(hidden, weight, targets)
    truth = plain_log_prob(hidden.double(), weight.double(), targets)
    assert_accurate(result, plain_log_prob(hidden, weight, targets), truth)
    return result


@pytest.mark.parametrize("nats", [0.0, 60.0, 84.0, 87.0, 95.0, 300.0, 1e4])
@pytest.mark.parametrize("step", [0.0, 0.01, 1.0])
def test_unlikely_targets(nats, step, device):
    """Others `nats` above some targets, and logits that grow all along the vocabulary: every tile has a new
    maximum."""
    z = step * torch.arange(300, dtype=torch.float64).expand(9, 300).clone()
    targets = torch.tensor([299, 0, 150, -100, 7, 299, 0, 1, 298])
    z[[1, 4, 5], 200] += nats
    check(*head_with_logits(z), targets, device)


def test_impossible_ids(device):
    """Logits of −∞: some, and all but the target's."""
    hidden, weight, targets = random_head(9, 300, 16)
    hidden[:, 0] = 1
    weight[[3, 7, 100, 255, 256]] = 0
    weight[[3, 7, 100, 255, 256], 0] = -torch.inf
    targets = torch.where(targets >= 0, targets.clamp(min=10, max=90), targets)
    check(hidden, weight, targets, device)
    weight[:], weight[:, 0] = 0, -torch.inf
    weight[5, 0] = 2.0
    result = linear_log_prob(*on(device, hidden, weight, torch.full((9,), 5), dtype=torch.float32))
    assert torch.equal(result, torch.zeros_like(result))


def test_a_token_does_not_depend_on_others(device):
    """An unlikely target makes its batch pay for another product, and changes no bit of the other tokens."""
    hidden, weight, targets = random_head(40, 300, 16)
    weight[:, 0], hidden[:, 0] = 0, 0
    weight[17, 0] = 1
    calm = check(hidden, weight, targets, device)
    hidden[7, 0], targets[7] = 500, 20
    result = check(hidden, weight, targets, device)
    others = torch.arange(40, device=device) != 7
    assert result[7] < -400 and torch.equal(result[others], calm[others])


@pytest.mark.parametrize("nats, trips", [(80.0, 0), (87.0, 1)])
def test_who_pays_for_the_maximum(nats, trips, device, monkeypatch):
    flags = []
    real = log_prob.logsumexp_partials
    monkeypatch.setattr(log_prob, "logsumexp_partials", lambda *a: (flags.append(a[2]), real(*a))[1])
    z = torch.zeros(3, 50, dtype=torch.float64)
    z[1, 9], z[2, 9] = nats, 1e4
    check(*head_with_logits(z), torch.tensor([4, 4, -100]), device)
    assert [flag.item() for flag in flags] == [trips]
