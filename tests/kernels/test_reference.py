"""What the reference alone has: tiles and blocks that bound its memory, and a path for other devices."""

import pytest
import torch
from checks import assert_close_everywhere
from miniplm.kernels import linear_log_prob, reference, reference_head
from oracles import plain_log_prob
from random_inputs import bounds, on, random, random_head, random_heads


@pytest.mark.parametrize(
    "lengths",
    [
        [0, 5, 0, 1, 127, 3, 0],
        [255],
        [7, 7, 14, 0, 14, 28, 9, 9],
        [1, 1, 1, 2],
        [0, 507, 129],
        [1],
        [0],
    ],
    ids=str,
)
def test_the_formula_for_other_devices(lengths, monkeypatch):
    """The path of attention that other devices take, run on the CPU, gives what the CPU path gives,
    log-sum-exp included."""
    q, k, v = random_heads(sum(lengths), 4, 2, 16)
    grad, cu_seqlens = random(*q.shape), bounds(lengths)

    def both():
        out, lse = reference.flash_attention(q, k, v, cu_seqlens, None, 0.2)
        return out, lse, reference.flash_attention_backward(grad, q, k, v, out, lse, cu_seqlens, None, 0.2)

    expected = both()
    monkeypatch.setattr(reference, "_attend_cpu", reference._attend)
    monkeypatch.setattr(reference, "_attend_backward_cpu", reference._attend_backward)
    assert_close_everywhere(both(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [4, 64, 1000, 10_000])
def test_any_tile(tile, monkeypatch):
    """The log-probabilities do not depend on how vocabulary and tokens are cut."""
    hidden, weight, targets = random_head(50, 101)
    rounded = on("cpu", hidden, weight, dtype=torch.bfloat16)
    monkeypatch.setattr(reference_head, "TILE_BYTES", tile)
    for tokens in (1, 7, 512):
        monkeypatch.setattr(reference_head, "CHUNK_TOKENS", tokens)
        found = linear_log_prob(hidden, weight, targets)
        torch.testing.assert_close(found, plain_log_prob(hidden, weight, targets))
        found = linear_log_prob(*rounded, targets)
        torch.testing.assert_close(found, plain_log_prob(*(x.float() for x in rounded), targets))
