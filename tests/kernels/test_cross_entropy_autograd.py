"""linear_cross_entropy, on the reference and on Triton: in graphs, under autocast, compiled, in training."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close_everywhere, assert_equal_everywhere, run
from miniplm.kernels import linear_cross_entropy, linear_log_prob
from oracles import plain_cross_entropy
from random_inputs import on, random_head
from torch.utils.checkpoint import checkpoint

REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def head(implementation):
    """hidden, weight, targets of 30 tokens."""
    return on(implementation.device, *random_head(30, 101), dtype=implementation.finest)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [(False, False), (True, False), (False, True), (True, True)])
def test_frozen_inputs(frozen, reduction, head):
    *inputs, targets = head
    for x, still in zip(inputs, frozen, strict=True):
        x.requires_grad_(not still)
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


def test_backward_twice_and_bitwise_repeatable(head):
    *inputs, targets = head
    inputs = [x.requires_grad_() for x in inputs]
    for reduction in REDUCTIONS:
        loss, again = (linear_cross_entropy(*inputs, targets, reduction=reduction) for _ in range(2))
        plain = plain_cross_entropy(*inputs, targets, reduction)
        assert torch.equal(loss, again)
        for scale in (0.5, -3.0):
            grad = torch.full_like(plain, scale)
            found, repeated, expected = (
                torch.autograd.grad(x, inputs, grad, retain_graph=True) for x in (loss, again, plain)
            )
            torch.testing.assert_close(found, expected)
            assert_equal_everywhere(repeated, found)


def test_no_second_derivative(head):
    hidden, weight, targets = head
    loss = linear_log_prob(hidden.requires_grad_(), weight, targets).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.sum().backward()


def test_tied_weight(head, implementation):
    """The embedding and the head are one parameter: its gradient is the sum of both."""
    _, _, targets = head
    embedding = torch.randn(101, 16, dtype=implementation.finest, device=implementation.device)
    embedding.requires_grad_()
    ids = torch.randint(0, 101, (30,), device=implementation.device)
    found, expected = (
        torch.autograd.grad(op(F.embedding(ids, embedding).tanh(), embedding, targets), embedding)
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, head):
    *inputs, targets = head
    hidden, weight = (x.requires_grad_() for x in inputs)
    loss = checkpoint(
        lambda h, w: linear_cross_entropy(h.tanh(), w, targets), hidden, weight, use_reentrant=use_reentrant
    )
    loss.backward()
    expected = torch.autograd.grad(plain_cross_entropy(hidden.tanh(), weight, targets), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_autocast(implementation):
    """Under autocast the op takes float32 parameters and computes from their 16-bit values, the sums in
    float32."""
    dtype, scale, atol = torch.bfloat16, 1.0, 1e-5
    if implementation.name == "triton":
        scale, atol = 30.0, 1e-2
        if implementation.device == "cpu":  # the interpreter cannot multiply bfloat16
            dtype, atol = torch.float16, 2e-3
    hidden, weight, targets = on(implementation.device, *random_head(30, 101), dtype=torch.float32)
    grad = [torch.full((), scale, device=implementation.device)]
    with torch.autocast(implementation.device, dtype=dtype):
        loss, gradients = run(partial(linear_cross_entropy, targets=targets), [hidden, weight], grad)
    rounded = [x.to(dtype).float() for x in (hidden, weight)]
    expected, wanted = run(partial(plain_cross_entropy, targets=targets), rounded, grad)
    torch.testing.assert_close(loss, expected)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(gradients, wanted, rtol=1e-2, atol=atol)


def test_the_graph_is_freed(head):
    """The gradients that wait in the graph do not outlive it, without help of the garbage collector."""
    hidden, weight, targets = head
    gc.disable()
    try:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
        node = weakref.ref(loss.grad_fn)
        del loss
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_compiled(head):
    """The whole step, traced without a break."""
    *inputs, targets = head
    inputs = [x.requires_grad_() for x in inputs]
    step = lambda hidden, weight: linear_cross_entropy(hidden.tanh(), weight, targets)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(call(*inputs), inputs) for call in (compiled, step))
    assert_close_everywhere(found, expected)


@pytest.mark.slow
def test_opcheck(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(20, 70, 8), dtype=torch.float32)
    token_weight = torch.rand(20, device=implementation.device)
    for need in ((True, True), (True, False), (False, True)):
        hidden.requires_grad_(need[0]), weight.requires_grad_(need[1])
        example = hidden, weight, targets, token_weight, -100, *need, 1 << 20
        torch.library.opcheck(torch.ops.miniplm.linear_cross_entropy.default, example)


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("triton", marks=pytest.mark.slow)], indirect=True
)
def test_training_ends_at_the_same_loss(implementation):
    """A small model trained 200 steps with the kernels and with plain PyTorch."""
    device = implementation.device

    def train(loss_function):
        torch.manual_seed(0)
        embedding, layer = torch.nn.Embedding(64, 16).to(device), torch.nn.Linear(16, 16).to(device)
        optimizer = torch.optim.AdamW([*embedding.parameters(), *layer.parameters()], lr=1e-2)
        ids = torch.randint(0, 64, (200, 32), device=device).cumsum(1) % 64
        for row in ids:
            loss = loss_function(layer(embedding(row[:-1])).tanh(), embedding.weight, row[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    torch.testing.assert_close(train(linear_cross_entropy), train(plain_cross_entropy), rtol=1e-3, atol=0)
