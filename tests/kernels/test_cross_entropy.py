"""linear_cross_entropy, on the reference and on Triton: its values and gradients."""

from functools import partial

import pytest
import torch
from checks import assert_accurate, assert_accurate_everywhere, assert_close_everywhere, run, strided
from miniplm.kernels import linear_cross_entropy, linear_log_prob, reference_head
from oracles import plain_cross_entropy
from random_inputs import on, random_head

pytestmark = pytest.mark.products
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "tokens, vocabulary, width",
    [
        (1, 5, 24),
        (3, 1000, 17),
        (127, 2 * 64 + 1, 24),
        (150, 64, 40),
        *(
            pytest.param(*shape, marks=pytest.mark.large)
            for shape in ((3, 1000, 24), (127, 2 * 1187 + 1, 24), (507, 129, 24), (1037, 255, 24))
        ),
    ],
)
def test_accuracy(tokens, vocabulary, width, reduction, dtype, implementation):
    inputs = on(implementation.device, *random_head(tokens, vocabulary, width))
    grad = torch.randn(tokens if reduction == "none" else (), dtype=torch.float64) + 2
    if reduction == "mean":
        grad *= tokens  # as a loss scale does: else the gradients fall below what float16 resolves
    assert_accurate_everywhere(
        partial(linear_cross_entropy, reduction=reduction),
        partial(plain_cross_entropy, reduction=reduction),
        inputs,
        [grad.to(implementation.device)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype, implementation, large_tiles):
    inputs = on(implementation.device, *random_head(9, 151_936, 16))
    grad = torch.tensor(-3.0, dtype=torch.float64, device=implementation.device)
    assert_accurate_everywhere(linear_cross_entropy, plain_cross_entropy, inputs, [grad], dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 10_000])
def test_ignore_index(ignore_index, reduction, implementation):
    """What is not a number at ignored tokens does not touch the others, nor the weight."""
    hidden, weight, targets = on(
        implementation.device, *random_head(40, 101, ignore_index=ignore_index), dtype=implementation.finest
    )
    grads = [torch.randn(40 if reduction == "none" else (), dtype=torch.float64).to(implementation.device)]
    options = {"targets": targets, "reduction": reduction, "ignore_index": ignore_index}
    expected = run(partial(plain_cross_entropy, **options), [hidden, weight], grads)
    torch.testing.assert_close(
        run(partial(linear_cross_entropy, **options), [hidden, weight], grads), expected
    )
    hidden[targets == ignore_index] = torch.nan
    torch.testing.assert_close(
        run(partial(linear_cross_entropy, **options), [hidden, weight], grads), expected
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_all_ignored(tokens, reduction, implementation):
    """Loss 0 and gradients 0, though the hidden states be NaN."""
    device = implementation.device
    hidden = torch.full((tokens, 4), torch.nan, requires_grad=True, device=device)
    weight = torch.randn(11, 4, requires_grad=True, device=device)
    targets = torch.full((tokens,), -100, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert loss.tolist() == ([0.0] * tokens if reduction == "none" else 0.0)
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_logits_bytes", [1, 8 * 101 * 7, 1 << 30])
def test_any_budget(max_logits_bytes, reduction, implementation, monkeypatch):
    """One row at a time, seven, all (on Triton as few as its tiles allow): the same result; in 16 bits
    too, in which the reference takes the weight in tiles as well."""
    monkeypatch.setattr(reference_head, "TILE_BYTES", 1000)
    monkeypatch.setattr(reference_head, "BLOCK_BYTES", 3000)
    hidden, weight, targets = on(implementation.device, *random_head(50, 101), dtype=implementation.finest)
    grad = torch.randn(50 if reduction == "none" else (), dtype=torch.float64)
    grads = [grad.to(implementation.device)]
    options = {"targets": targets, "reduction": reduction}
    call = partial(linear_cross_entropy, **options, max_logits_bytes=max_logits_bytes)
    plain = partial(plain_cross_entropy, **options)
    torch.testing.assert_close(run(call, [hidden, weight], grads), run(plain, [hidden, weight], grads))
    rounded = [hidden.half(), weight.half()]
    assert_close_everywhere(
        run(call, rounded, grads),
        run(plain, [x.double() for x in rounded], grads),
        rtol=2e-3,
        atol=2e-3,
        check_dtype=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_drift_over_many_chunks(dtype, implementation, monkeypatch):
    """Loss and gradients over 64 chunks are as accurate as over one."""
    tokens, vocabulary = (32, 101) if implementation.name == "reference" else (8, 60)  # in a chunk
    if (
        implementation.name == "triton"
    ):  # chunks of less than a tile of 128 tokens, for the interpreter's sake
        monkeypatch.setattr(
            "miniplm.kernels.chunks.choose",
            lambda T, V, d, _, max_logits_bytes, __: (T if max_logits_bytes == 1 << 30 else tokens, 1),
        )
    hidden, weight, targets = on(implementation.device, *random_head(64 * tokens, vocabulary), dtype=dtype)
    ones = [torch.ones((), device=implementation.device)]
    plain = partial(plain_cross_entropy, targets=targets, reduction="sum")
    truth = run(plain, [hidden.double(), weight.double()], ones)
    summed = partial(linear_cross_entropy, targets=targets, reduction="sum")
    one, many = (
        run(partial(summed, max_logits_bytes=max_logits_bytes), [hidden, weight], ones)
        for max_logits_bytes in (1 << 30, tokens * vocabulary * 4)
    )
    error_of_one, error_of_many = (abs(found[0][0].double() - truth[0][0]) for found in (one, many))
    assert error_of_many <= error_of_one + 1e-6 * truth[0][0]
    for single, chunked, exact in zip(one[1], many[1], truth[1], strict=True):
        assert (chunked.double() - exact).norm() <= 1.5 * (single.double() - exact).norm()


def test_large_logits(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(40, 300), dtype=torch.float32)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 300)
    ones = [torch.ones((), device=implementation.device)]
    found, plain = (
        run(partial(op, targets=targets), [hidden, weight], ones)
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    truth = run(partial(plain_cross_entropy, targets=targets), [hidden.double(), weight.double()], ones)
    for one, two, three in zip(
        (*found[0], *found[1]), (*plain[0], *plain[1]), (*truth[0], *truth[1]), strict=True
    ):
        assert_accurate(one, two, three, relative=1e-4)  # a logit of 1e4 in float32 is rounded by 5e-4


def test_nan_is_not_hidden(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(9, 101), dtype=torch.float32)
    hidden[0] = torch.nan
    ones = [torch.ones((), device=implementation.device)]
    (loss,), gradients = run(partial(linear_cross_entropy, targets=targets), [hidden, weight], ones)
    assert loss.isnan() and gradients[0][0].isnan().all() and gradients[1].isnan().any()


def test_without_gradients_it_is_the_log_probability(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(30, 101), dtype=torch.float32)
    log_prob = linear_log_prob(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(loss, -log_prob.sum())
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, reduction="sum")
        assert torch.equal(loss, -log_prob.sum())


def test_strided(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(33, 101), dtype=implementation.finest)
    grad = torch.randn(33, dtype=torch.float64).to(implementation.device)
    ones = [torch.ones((), device=implementation.device)]
    expected = run(partial(plain_cross_entropy, targets=targets, reduction="none"), [hidden, weight], [grad])
    expected_mean = run(partial(plain_cross_entropy, targets=targets), [hidden, weight], ones)
    for change in (strided, lambda x: x.T.contiguous().T):
        changed = [change(hidden), change(weight)]
        found = run(
            partial(linear_cross_entropy, targets=strided(targets), reduction="none"),
            changed,
            [strided(grad)],
        )
        torch.testing.assert_close(found, expected)
        found = run(partial(linear_cross_entropy, targets=targets), changed, ones)
        torch.testing.assert_close(found, expected_mean)


def test_wrong_arguments():
    hidden, weight, targets = on("cpu", *random_head(3, 5), dtype=torch.float32)
    right = {"hidden": hidden.requires_grad_(), "weight": weight, "targets": targets}
    for change in (
        {"hidden": hidden[0]},
        {"weight": weight.half()},
        {"weight": weight[:, 1:]},
        {"targets": targets.int()},
        {"targets": targets + 3},
    ):
        (argument,) = change
        with pytest.raises(ValueError, match=f"^{argument} (has|is|must)"):
            linear_cross_entropy(**{**right, **change})
    with pytest.raises(ValueError, match="reduction is 'max'; it must be 'mean', 'sum' or 'none'"):
        linear_cross_entropy(hidden, weight, targets, reduction="max")
