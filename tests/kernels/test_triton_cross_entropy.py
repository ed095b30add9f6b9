"""linear_cross_entropy in Triton: on a GPU, or in Triton's interpreter (which has no bfloat16 products)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate, assert_accurate_everywhere, run, strided
from miniplm.kernels import cross_entropy, linear_cross_entropy, linear_log_prob, tuning
from test_cross_entropy import REDUCTIONS, plain_cross_entropy, random_head
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def on(device, *tensors, dtype=None):
    return [x.to(device, dtype if x.is_floating_point() else None) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "tokens, vocabulary, width", [(1, 5, 24), (3, 1000, 17), (127, 2 * 64 + 1, 24), (150, 64, 40)]
)
def test_accuracy(tokens, vocabulary, width, reduction, dtype, device):
    inputs = on(device, *random_head(tokens, vocabulary, width))
    grad = torch.randn(tokens if reduction == "none" else (), dtype=torch.float64, device=device) + 2
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
def test_large_vocabulary(dtype, device, monkeypatch):
    if device == "cpu":  # fewer, larger tiles: the interpreter takes its time per tile
        config = tuning.Config({"BLOCK_T": 16, "BLOCK_V": 1024, "BLOCK_D": 16})
        monkeypatch.setitem(tuning.CANDIDATES, "exponentials", lambda *_, **__: [config])
        monkeypatch.setitem(tuning.CANDIDATES, "logsumexp", lambda *_, **__: [config])
    inputs = on(device, *random_head(9, 151_936, 16))
    assert_accurate_everywhere(
        linear_cross_entropy,
        plain_cross_entropy,
        inputs,
        [torch.tensor(-3.0, dtype=torch.float64, device=device)],
        dtype,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [(False, False), (True, False), (False, True), (True, True)])
def test_frozen_inputs(frozen, reduction, device, monkeypatch):
    """The product for a frozen input is left out, and nothing else changes."""
    products = []
    for function in (cross_entropy.product, cross_entropy.add_product):
        name = function.__name__
        monkeypatch.setattr(
            cross_entropy,
            name,
            lambda *x, name=name, function=function: (products.append(name), function(*x))[1],
        )
    hidden, weight, targets = on(device, *random_head(30, 101), dtype=torch.float32)
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
    assert products == ["product"] * len(wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_all_ignored(tokens, reduction, device):
    """Loss 0 and gradients 0, though the hidden states be NaN."""
    hidden, weight = (
        torch.full((tokens, 4), torch.nan, requires_grad=True, device=device),
        torch.randn(11, 4, requires_grad=True, device=device),
    )
    targets = torch.full((tokens,), -100, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert loss.tolist() == ([0.0] * tokens if reduction == "none" else 0.0)
    loss.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum() == 0


@pytest.mark.parametrize("ignore_index", [-1, 3, 10_000])
def test_ignored_rows_do_not_touch_the_weight(ignore_index, device):
    hidden, weight, targets = on(
        device, *random_head(40, 101, ignore_index=ignore_index), dtype=torch.float32
    )
    expected = run(
        partial(plain_cross_entropy, targets=targets, ignore_index=ignore_index),
        [hidden, weight],
        [torch.ones((), device=device)],
    )
    hidden[targets == ignore_index] = torch.nan
    found = run(
        partial(linear_cross_entropy, targets=targets, ignore_index=ignore_index),
        [hidden, weight],
        [torch.ones((), device=device)],
    )
    torch.testing.assert_close(found, expected)


def test_a_wrong_target_gives_nan(device):
    hidden, weight, targets = on(device, *random_head(9, 101), dtype=torch.float32)
    targets[4] = 101
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    assert linear_cross_entropy(hidden.requires_grad_(), weight, targets).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_drift_over_many_chunks(dtype, device, monkeypatch):
    """The gradients over 64 chunks are those over one, as accurate; chunks of 8 tokens for the interpreter's
    sake."""
    monkeypatch.setattr(
        cross_entropy, "chunk_tokens", lambda T, _, max_logits_bytes: T if max_logits_bytes == 1 << 30 else 8
    )
    hidden, weight, targets = on(device, *random_head(64 * 8, 60), dtype=dtype)
    ones = [torch.ones((), device=device)]
    truth = run(lambda *x: plain_cross_entropy(*x, targets, "sum"), [hidden.double(), weight.double()], ones)
    summed = partial(linear_cross_entropy, targets=targets, reduction="sum")
    one, many = (
        run(partial(summed, max_logits_bytes=max_logits_bytes), [hidden, weight], ones)
        for max_logits_bytes in (1 << 30, 1)
    )
    assert (
        abs(many[0][0].double() - truth[0][0]) <= abs(one[0][0].double() - truth[0][0]) + 1e-6 * truth[0][0]
    )
    for single, chunked, exact in zip(one[1], many[1], truth[1], strict=True):
        assert (chunked.double() - exact).norm() <= 1.5 * (single.double() - exact).norm()


def test_chunks_fill_the_budget():
    """At the shapes of the aims, whole tiles of tokens within max_logits_bytes, nearly equal; never fewer
    than one tile."""
    for tokens in (1, 100, 16_384, 65_536):
        for bytes_per_token in (2 * 151_936, 2 * 49_152, 4 * 151_936):
            size = cross_entropy.chunk_tokens(tokens, bytes_per_token, 1 << 30)
            assert size % 128 == 0 and size * bytes_per_token <= 1 << 30
            assert size - 128 < tokens and (
                size == -(-tokens // 128) * 128 or size * bytes_per_token > (1 << 30) / 2
            )
    assert cross_entropy.chunk_tokens(16_384, 2 * 151_936, 2_490 << 20) == 8_192
    assert cross_entropy.chunk_tokens(500, 1 << 40, 1) == 128


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


@pytest.mark.parametrize("nats", [40.0, 70.0, 95.0, 300.0, 1e4])
@pytest.mark.parametrize("unlikely", [[], [7], [0, 39], list(range(40))])
def test_the_guard(unlikely, nats, device):
    """Targets too unlikely for their logit to be the offset, alone, mixed with others, and everywhere: on
    both sides of the guard."""
    inputs = on(device, *head_with_unlikely_targets(unlikely, nats), dtype=torch.float32)
    grads = [torch.randn(40, dtype=torch.float64, device=device) + 2]
    assert_accurate_everywhere(
        partial(linear_cross_entropy, reduction="none"),
        partial(plain_cross_entropy, reduction="none"),
        inputs,
        grads,
        torch.float32,
    )
    assert_accurate_everywhere(
        linear_cross_entropy,
        plain_cross_entropy,
        inputs,
        [torch.tensor(3.0, dtype=torch.float64, device=device)],
        torch.float32,
    )


@pytest.mark.parametrize("nats, trips", [(40.0, False), (70.0, True), (95.0, True)])
def test_the_guard_trips_where_it_must(nats, trips, device, monkeypatch):
    """One chunk that trips does not make the others pay, and none of it is decided on the host."""
    flags = []
    real = cross_entropy.logsumexp_partials
    monkeypatch.setattr(
        cross_entropy, "logsumexp_partials", lambda x, w, flag: (flags.append(flag), real(x, w, flag))[1]
    )
    monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda *_: 20)
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
    assert_accurate_everywhere(
        linear_cross_entropy,
        plain_cross_entropy,
        inputs,
        [torch.tensor(3.0, dtype=torch.float64, device=device)],
        torch.float32,
    )


def test_nan_is_not_hidden(device):
    hidden, weight, targets = on(device, *random_head(9, 101), dtype=torch.float32)
    hidden[0] = torch.nan
    (loss,), gradients = run(
        lambda *x: linear_cross_entropy(*x, targets), [hidden, weight], [torch.ones((), device=device)]
    )
    assert loss.isnan() and gradients[0][0].isnan().all() and gradients[1].isnan().any()


def test_large_logits(device):
    hidden, weight, targets = on(device, *random_head(40, 300), dtype=torch.float32)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 300)
    ones = [torch.ones((), device=device)]
    found, plain = (
        run(partial(op, targets=targets), [hidden, weight], ones)
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    truth = run(lambda *x: plain_cross_entropy(*x, targets), [hidden.double(), weight.double()], ones)
    for one, two, three in zip(
        (*found[0], *found[1]), (*plain[0], *plain[1]), (*truth[0], *truth[1]), strict=True
    ):
        assert_accurate(one, two, three, relative=1e-4)  # a logit of 1e4 in float32 is rounded by 5e-4


# --- around it ---


def test_backward_twice_and_bitwise_repeatable(device):
    hidden, weight, targets = on(device, *random_head(30, 101), dtype=torch.float32)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    for reduction in REDUCTIONS:
        loss, again = (linear_cross_entropy(*inputs, targets, reduction=reduction) for _ in range(2))
        plain = plain_cross_entropy(*inputs, targets, reduction)
        for scale in (0.5, -3.0):
            grad = torch.full_like(plain, scale)
            found, repeated = (torch.autograd.grad(x, inputs, grad, retain_graph=True) for x in (loss, again))
            torch.testing.assert_close(found, torch.autograd.grad(plain, inputs, grad, retain_graph=True))
            assert torch.equal(loss, again) and all(map(torch.equal, found, repeated))


def test_tied_weight(device):
    """The embedding and the head are one parameter: its gradient is the sum of both."""
    embedding, (_, _, targets) = (
        torch.randn(101, 16, device=device, requires_grad=True),
        on(device, *random_head(30, 101)),
    )
    ids = torch.randint(0, 101, (30,), device=device)
    found, expected = (
        torch.autograd.grad(op(F.embedding(ids, embedding).tanh(), embedding, targets), embedding)
        for op in (linear_cross_entropy, plain_cross_entropy)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    hidden, weight, targets = on(device, *random_head(30, 101), dtype=torch.float32)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    loss = checkpoint(
        lambda h, w: linear_cross_entropy(h.tanh(), w, targets), *inputs, use_reentrant=use_reentrant
    )
    loss.backward()
    expected = torch.autograd.grad(plain_cross_entropy(hidden.tanh(), weight, targets), inputs)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_autocast(device):
    """Under autocast the op takes float32 parameters and computes from their 16-bit values, the sums in
    float32."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    hidden, weight, targets = on(device, *random_head(30, 101), dtype=torch.float32)
    grad = [torch.full((), 30.0, device=device)]
    with torch.autocast(device, dtype=dtype):
        loss, gradients = run(lambda *x: linear_cross_entropy(*x, targets), [hidden, weight], grad)
    expected, wanted = run(
        lambda *x: plain_cross_entropy(*x, targets),
        [hidden.to(dtype).float(), weight.to(dtype).float()],
        grad,
    )
    torch.testing.assert_close(loss, expected)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(gradients, wanted, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_without_gradients_it_is_the_log_probability(device):
    hidden, weight, targets = on(device, *random_head(30, 101), dtype=torch.float32)
    log_prob = linear_log_prob(hidden, weight, targets)
    with torch.no_grad():
        assert torch.equal(
            linear_cross_entropy(hidden.requires_grad_(), weight, targets, reduction="sum"), -log_prob.sum()
        )


def test_strided(device):
    hidden, weight, targets = on(device, *random_head(33, 101), dtype=torch.float32)
    grad = torch.randn(33, device=device)
    expected = run(lambda *x: plain_cross_entropy(*x, targets, "none"), [hidden, weight], [grad])
    for change in (strided, lambda x: x.T.contiguous().T):
        found = run(
            lambda *x: linear_cross_entropy(*x, strided(targets), reduction="none"),
            [change(hidden), change(weight)],
            [strided(grad)],
        )
        torch.testing.assert_close(found, expected)


def test_compiled(device):
    """The whole step, traced without a break."""
    hidden, weight, targets = on(device, *random_head(20, 70, 8), dtype=torch.float32)

    def step(hidden, weight):
        return torch.autograd.grad(linear_cross_entropy(hidden.tanh(), weight, targets), (hidden, weight))

    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    loss = torch.compile(
        lambda h, w: linear_cross_entropy(h.tanh(), w, targets), fullgraph=True, backend="aot_eager"
    )(*inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), step(*inputs))


def test_opcheck(device):
    hidden, weight, targets = on(device, *random_head(20, 70, 8), dtype=torch.float32)
    for need in ((True, True), (True, False), (False, True)):
        example = (
            hidden.requires_grad_(need[0]),
            weight.requires_grad_(need[1]),
            targets,
            torch.rand(20, device=device),
            -100,
            *need,
            1 << 20,
        )
        torch.library.opcheck(torch.ops.miniplm.linear_cross_entropy.default, example)


@pytest.mark.slow
def test_training_ends_at_the_same_loss(device):
    """A small model trained 200 steps with the kernels and with plain PyTorch."""

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
