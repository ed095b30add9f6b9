"""linear_cross_entropy on Triton: its guard, its chunks, and what it leaves out."""

from functools import partial

import pytest
import torch
from checks import assert_accurate_everywhere, remember_calls
from miniplm.kernels import chunks, cross_entropy, linear_cross_entropy, tuning
from oracles import plain_cross_entropy
from random_inputs import on, random_head

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [(False, False), (True, False), (False, True), (True, True)])
def test_no_product_for_a_frozen_input(frozen, reduction, device, monkeypatch):
    products = remember_calls(monkeypatch, cross_entropy, "product", "add_product")
    *inputs, targets = on(device, *random_head(30, 101), dtype=torch.float32)
    for x, still in zip(inputs, frozen, strict=True):
        x.requires_grad_(not still)
    loss = linear_cross_entropy(*inputs, targets, reduction=reduction).sum()
    if loss.requires_grad:
        loss.backward()
    assert products == ["product"] * sum(x.requires_grad for x in inputs)


def test_a_wrong_target_gives_nan(device):
    hidden, weight, targets = on(device, *random_head(9, 101), dtype=torch.float32)
    targets[4] = 101
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    assert linear_cross_entropy(hidden.requires_grad_(), weight, targets).isnan()


# --- the guard ---


def head_with_unlikely_targets(unlikely, nats, vocabulary=150):
    """A head whose targets have an nll of about 5, but `nats` at the tokens `unlikely`."""
    hidden, weight, targets = random_head(40, vocabulary, 16)
    targets = targets.clamp(min=0)
    weight[:, 0] = 0
    weight[0], weight[1], hidden[:, 0] = 0, 0, nats
    weight[1, 0] = 1  # id 1 beats id 0 by `nats`
    targets[unlikely] = 0
    others = torch.ones(40, dtype=torch.bool)
    others[unlikely] = False
    hidden[others, 0] = 0
    return hidden, weight, targets


def check(inputs, grad, reduction="mean"):
    assert_accurate_everywhere(
        partial(linear_cross_entropy, reduction=reduction),
        partial(plain_cross_entropy, reduction=reduction),
        inputs,
        [grad],
        torch.float32,
    )


@pytest.mark.parametrize("nats", [40.0, 70.0, 95.0, 300.0, 1e4])
@pytest.mark.parametrize("unlikely", [[], [7], [0, 39], list(range(40))])
def test_the_guard(unlikely, nats, device):
    """Targets too unlikely for their logit to be the offset, alone, mixed with others, and everywhere: on
    both sides of the guard."""
    inputs = on(device, *head_with_unlikely_targets(unlikely, nats), dtype=torch.float32)
    check(inputs, torch.randn(40, dtype=torch.float64, device=device) + 2, "none")
    check(inputs, torch.tensor(3.0, dtype=torch.float64, device=device))


@pytest.mark.parametrize("nats, trips", [(40.0, False), (70.0, True), (95.0, True)])
def test_the_guard_trips_where_it_must(nats, trips, device, monkeypatch):
    """One chunk that trips does not make the others pay, and none of it is decided on the host."""
    flags = []
    real = cross_entropy.logsumexp_partials

    def remember_flag(x, w, flag):
        flags.append(flag)
        return real(x, w, flag)

    monkeypatch.setattr(cross_entropy, "logsumexp_partials", remember_flag)
    monkeypatch.setattr(chunks, "choose", lambda *_: (20, 1))
    hidden, weight, targets = on(device, *head_with_unlikely_targets([25], nats), dtype=torch.float32)
    linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    assert [flag.item() for flag in flags] == [0, int(trips)]


@pytest.mark.parametrize("nats", [40.0, 70.0])
def test_what_is_launched_on_condition_may_be_cut_otherwise(nats, device, monkeypatch):
    """As where the first launch was tuned and the other not: more splits of the vocabulary in one than in the
    other."""
    configs = [tuning.Config({"BLOCK_T": 16, "BLOCK_V": width, "BLOCK_D": 16}) for width in (16, 64)]
    monkeypatch.setitem(
        tuning.CANDIDATES, "exponentials", lambda *_, conditional, **__: [configs[conditional]]
    )
    inputs = on(device, *head_with_unlikely_targets([7], nats), dtype=torch.float32)
    check(inputs, torch.tensor(3.0, dtype=torch.float64, device=device))
