import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate, assert_accurate_everywhere, run, strided
from miniplm.kernels import linear_cross_entropy, linear_log_prob, reference_head
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


def plain_cross_entropy(hidden, weight, targets, reduction="mean", ignore_index=-100):
    logits = hidden @ weight.T
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        targets,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def random_head(tokens, vocabulary, width=24, ignore_index=-100, dtype=torch.float64):
    hidden, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype) / 2
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::5], targets[2::5], targets[3::5] = ignore_index, 0, vocabulary - 1
    targets[0] = (weight @ hidden[0]).argmin()
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "tokens, vocabulary", [(1, 5), (3, 1000), (127, 2 * 1187 + 1), (507, 129), (1037, 255)]
)
def test_accuracy(tokens, vocabulary, reduction, dtype):
    inputs = random_head(tokens, vocabulary)
    grad = torch.randn(tokens if reduction == "none" else (), dtype=torch.float64) + 2
    if reduction == "mean":
        grad *= tokens  # as a loss scale does: else the gradients fall below what float16 resolves
    assert_accurate_everywhere(
        lambda *x: linear_cross_entropy(*x, reduction=reduction),
        lambda *x: plain_cross_entropy(*x, reduction),
        inputs,
        [grad],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype):
    inputs = random_head(9, 151_936, 16)
    assert_accurate_everywhere(
        linear_cross_entropy, plain_cross_entropy, inputs, [torch.tensor(-3.0, dtype=torch.float64)], dtype
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [(False, False), (True, False), (False, True), (True, True)])
def test_frozen_inputs(frozen, reduction):
    hidden, weight, targets = random_head(30, 101)
    inputs = [x.requires_grad_(not still) for x, still in zip((hidden, weight), frozen, strict=True)]
    found, expected = (
        op(*inputs, targets, reduction=reduction) for op in (linear_cross_entropy, plain_cross_entropy)
    )
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == expected.requires_grad
    wanted = [x for x in inputs if x.requires_grad]
    if wanted:
        grad = torch.randn_like(found)
        torch.testing.assert_close(
            torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad)
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    hidden, weight, targets = random_head(7, 11, 3)
    call = lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert torch.autograd.gradcheck(call, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 10_000])
def test_ignore_index(ignore_index, reduction):
    hidden, weight, targets = random_head(40, 101, ignore_index=ignore_index)
    grads = [torch.randn(40 if reduction == "none" else (), dtype=torch.float64)]
    options = {"targets": targets, "reduction": reduction, "ignore_index": ignore_index}
    found, expected = (
        run(partial(op, **options), [hidden, weight], grads)
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_all_ignored(tokens, reduction):
    """Loss 0 and gradients 0, though the hidden states be NaN."""
    hidden, weight = (
        torch.full((tokens, 4), torch.nan, requires_grad=True),
        torch.randn(11, 4, requires_grad=True),
    )
    loss = linear_cross_entropy(hidden, weight, torch.full((tokens,), -100), reduction=reduction)
    assert loss.tolist() == ([0.0] * tokens if reduction == "none" else 0.0)
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(tokens, 4)) and torch.equal(weight.grad, torch.zeros(11, 4))
    with torch.no_grad():
        assert (
            linear_cross_entropy(hidden, weight, torch.full((tokens,), -100), reduction=reduction).sum() == 0
        )


def test_ignored_rows_do_not_touch_the_weight():
    hidden, weight, targets = random_head(40, 101, dtype=torch.float32)
    hidden[targets == -100] = torch.nan
    loss, gradients = run(lambda *x: linear_cross_entropy(*x, targets), [hidden, weight], [torch.ones(())])
    assert all(x.isfinite().all() for x in (*loss, *gradients))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_logits_bytes", [1, 8 * 101 * 7, 1 << 30])
def test_any_budget(max_logits_bytes, reduction, monkeypatch):
    """One row at a time, seven, all: the same result; and so in 16 bits, where the weight passes by in tiles
    as well."""
    monkeypatch.setattr(reference_head, "TILE_BYTES", 1000)
    monkeypatch.setattr(reference_head, "BLOCK_BYTES", 3000)
    hidden, weight, targets = random_head(50, 101)
    grads = [torch.randn(50 if reduction == "none" else (), dtype=torch.float64)]
    expected = run(lambda *x: plain_cross_entropy(*x, targets, reduction), [hidden, weight], grads)
    call = lambda *x: linear_cross_entropy(
        *x, targets, reduction=reduction, max_logits_bytes=max_logits_bytes
    )
    torch.testing.assert_close(run(call, [hidden, weight], grads), expected)
    expected = run(
        lambda *x: plain_cross_entropy(*x, targets, reduction),
        [hidden.half().double(), weight.half().double()],
        grads,
    )
    for part, wanted in zip(run(call, [hidden.half(), weight.half()], grads), expected, strict=True):
        for one, two in zip(part, wanted, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_drift_over_many_chunks(dtype):
    """The weight's gradient over 64 chunks is as accurate as over one."""
    hidden, weight, targets = random_head(64 * 32, 101)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    truth = run(
        lambda *x: plain_cross_entropy(*x, targets, "sum"),
        [hidden.double(), weight.double()],
        [torch.ones(())],
    )[1][1]
    summed = partial(linear_cross_entropy, targets=targets, reduction="sum")
    one, many = (
        run(partial(summed, max_logits_bytes=max_logits_bytes), [hidden, weight], [torch.ones(())])[1][1]
        for max_logits_bytes in (1 << 30, 32 * 101 * 4)
    )
    assert (many.double() - truth).norm() <= 1.5 * (one.double() - truth).norm()


def test_backward_twice():
    hidden, weight, targets = random_head(30, 101)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(*inputs, targets, reduction=reduction)
        plain = plain_cross_entropy(*inputs, targets, reduction)
        for scale in (0.5, -3.0):
            grad = torch.full_like(plain, scale)
            torch.testing.assert_close(
                torch.autograd.grad(loss, inputs, grad, retain_graph=True),
                torch.autograd.grad(plain, inputs, grad, retain_graph=True),
            )


def test_no_second_derivative():
    hidden, weight, targets = random_head(5, 11)
    (gradient,) = torch.autograd.grad(
        linear_log_prob(hidden.requires_grad_(), weight, targets).sum(), hidden, create_graph=True
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.sum().backward()


def test_tied_weight():
    """The embedding and the head are one parameter: its gradient is the sum of both."""
    embedding, (_, _, targets) = (
        torch.randn(101, 16, dtype=torch.float64, requires_grad=True),
        random_head(30, 101),
    )
    ids = torch.randint(0, 101, (30,))
    found, expected = (
        torch.autograd.grad(op(F.embedding(ids, embedding).tanh(), embedding, targets), embedding)
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    hidden, weight, targets = random_head(30, 101)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    loss = checkpoint(
        lambda h, w: linear_cross_entropy(h.tanh(), w, targets), *inputs, use_reentrant=use_reentrant
    )
    loss.backward()
    expected = torch.autograd.grad(plain_cross_entropy(hidden.tanh(), weight, targets), inputs)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_autocast():
    """Under autocast the op takes float32 parameters and computes from their bfloat16 values, the sums in
    float32."""
    hidden, weight, targets = random_head(30, 101, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, (grad_hidden, grad_weight) = run(
            lambda *x: linear_cross_entropy(*x, targets), [hidden, weight], [torch.ones(())]
        )
    expected, gradients = run(
        lambda *x: plain_cross_entropy(*x, targets),
        [hidden.bfloat16().float(), weight.bfloat16().float()],
        [torch.ones(())],
    )
    torch.testing.assert_close(loss, expected)
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32
    torch.testing.assert_close([grad_hidden, grad_weight], gradients, rtol=1e-2, atol=1e-5)


def test_without_gradients_it_is_the_log_probability():
    hidden, weight, targets = random_head(30, 101, dtype=torch.float32)
    log_prob = linear_log_prob(hidden, weight, targets)
    with torch.no_grad():
        assert torch.equal(
            linear_cross_entropy(hidden.requires_grad_(), weight, targets, reduction="sum"), -log_prob.sum()
        )
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets, reduction="sum"), -log_prob.sum()
    )


def test_strided():
    hidden, weight, targets = random_head(33, 101)
    expected = run(
        lambda *x: plain_cross_entropy(*x, targets, "none"),
        [hidden, weight],
        [grad := torch.randn(33).double()],
    )
    for change in (strided, lambda x: x.T.contiguous().T):
        found = run(
            lambda *x: linear_cross_entropy(*x, strided(targets), reduction="none"),
            [change(hidden), change(weight)],
            [strided(grad)],
        )
        torch.testing.assert_close(found, expected)
        found = run(
            lambda *x: linear_cross_entropy(*x, targets), [change(hidden), change(weight)], [torch.ones(())]
        )
        torch.testing.assert_close(
            found, run(lambda *x: plain_cross_entropy(*x, targets), [hidden, weight], [torch.ones(())])
        )


def test_large_logits():
    hidden, weight, targets = random_head(40, 300, dtype=torch.float32)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 300)
    found, plain = (
        run(partial(op, targets=targets), [hidden, weight], [torch.ones(())])
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    truth = run(
        lambda *x: plain_cross_entropy(*x, targets), [hidden.double(), weight.double()], [torch.ones(())]
    )
    for one, two, three in zip(
        (*found[0], *found[1]), (*plain[0], *plain[1]), (*truth[0], *truth[1]), strict=True
    ):
        assert_accurate(one, two, three, relative=1e-4)  # a logit of 1e4 in float32 is rounded by 5e-4


def test_the_graph_is_freed():
    """The gradients that wait in the graph do not outlive it, without help of the garbage collector."""
    hidden, weight, targets = random_head(5, 11)
    gc.disable()
    try:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
        node = weakref.ref(loss.grad_fn)
        del loss
        assert node() is None
    finally:
        gc.enable()


def test_training_ends_at_the_same_loss():
    """A small model trained 200 steps with the kernels and with plain PyTorch."""

    def train(loss_function):
        torch.manual_seed(0)
        embedding, layer = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 16)
        optimizer = torch.optim.AdamW([*embedding.parameters(), *layer.parameters()], lr=1e-2)
        ids = torch.randint(0, 64, (200, 32)).cumsum(1) % 64
        for row in ids:
            loss = loss_function(layer(embedding(row[:-1])).tanh(), embedding.weight, row[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    torch.testing.assert_close(train(linear_cross_entropy), train(plain_cross_entropy), rtol=1e-3, atol=0)


def test_wrong_arguments():
    hidden, weight, targets = random_head(3, 5, dtype=torch.float32)
    for change in (
        {"hidden": hidden[0]},
        {"weight": weight.half()},
        {"weight": weight[:, 1:]},
        {"targets": targets.int()},
        {"targets": targets + 3},
    ):
        (argument,) = change
        with pytest.raises(ValueError, match=f"^{argument} (has|is|must)"):
            linear_cross_entropy(
                **{"hidden": hidden.requires_grad_(), "weight": weight, "targets": targets, **change}
            )
    with pytest.raises(ValueError, match="reduction is 'max'; it must be 'mean', 'sum' or 'none'"):
        linear_cross_entropy(hidden, weight, targets, reduction="max")
