"""linear_distillation_loss in Triton: on a GPU, or in Triton's interpreter (which has no bfloat16
products)."""

from functools import partial

import pytest
import torch
from checks import RELATIVE, assert_accurate_everywhere, strided
from miniplm.kernels import cross_entropy, distillation, linear_distillation_loss, tuning
from test_distillation import plain_distillation, random_heads

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def heads_on(device, *sizes, dtype=torch.float32):
    heads, targets = random_heads(*sizes)
    return [x.to(device, dtype) for x in heads], targets.to(device)


def loss_and_gradients(op, heads, targets, **options):
    heads = [*(x.detach().requires_grad_() for x in heads[:2]), *heads[2:]]
    result = op(*heads, targets, **options)
    return [*result, *torch.autograd.grad(result.loss, heads[:2])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, student_vocabulary, teacher_vocabulary, alpha, temperature",
    [
        (1, 5, 5, 0.5, 1.0),
        (3, 1000, 1003, 0.3, 1.0),
        (127, 2 * 64 + 1, 100, 0.5, 1.0),
        (150, 129, 129, 0.7, 2.5),
        (33, 255, 255, 0.5, 0.6),
        (33, 255, 255, 0.0, 1.0),
        (33, 255, 255, 1.0, 1.0),
    ],
)
def test_accuracy(tokens, student_vocabulary, teacher_vocabulary, alpha, temperature, dtype, device):
    (student_hidden, student_weight, *teacher), targets = random_heads(
        tokens, student_vocabulary, teacher_vocabulary
    )
    teacher = [x.to(device, dtype) for x in teacher]
    targets = targets.to(device)

    def loss(op):
        return lambda hidden, weight: (
            op(
                hidden,
                weight,
                *(x.to(hidden.dtype) for x in teacher),
                targets,
                alpha=alpha,
                temperature=temperature,
            ).loss
        )

    grad = torch.tensor(
        -100.0 * tokens, dtype=torch.float64, device=device
    )  # as a loss scale does: else gradients fall below what float16 resolves
    inputs = [student_hidden.to(device), student_weight.to(device)]
    # The divergence is that of probabilities stored in 16 bits: its bound is that of the inputs' dtype,
    # though it is a float32.
    assert_accurate_everywhere(
        loss(linear_distillation_loss), loss(plain_distillation), inputs, [grad], dtype, RELATIVE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype, device, monkeypatch):
    if device == "cpu":  # fewer, larger tiles: the interpreter takes its time per tile
        config = tuning.Config({"BLOCK_T": 16, "BLOCK_V": 1024, "BLOCK_D": 64})
        for name in ("exponentials", "logsumexp"):
            monkeypatch.setitem(tuning.CANDIDATES, name, lambda *_, **__: [config])
    heads, targets = heads_on(device, 5, 151_936, 152_064, dtype=torch.float64)

    def loss(op):
        return lambda *heads: (
            op(*heads[:2], *(x.detach() for x in heads[2:]), targets).loss
            + 0 * sum(x.sum() for x in heads[2:])
        )

    assert_accurate_everywhere(
        loss(linear_distillation_loss),
        loss(plain_distillation),
        heads,
        [torch.tensor(500.0, dtype=torch.float64)],
        dtype,
        RELATIVE[dtype],
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_three_numbers(temperature, device):
    heads, targets = heads_on(device, 50, 101, 103)
    found = linear_distillation_loss(*heads, targets, 0.3, temperature=temperature)
    torch.testing.assert_close(found, plain_distillation(*heads, targets, 0.3, temperature=temperature))
    torch.testing.assert_close(found.loss, 0.7 * found.cross_entropy + 0.3 * found.kl_divergence)
    again = loss_and_gradients(linear_distillation_loss, heads, targets, alpha=0.3, temperature=temperature)
    assert all(map(torch.equal, found, again[:3])), (
        "the numbers must not depend on whether gradients are asked for"
    )


def test_a_student_that_is_the_teacher(device):
    (hidden, weight, *_), targets = heads_on(device, 20, 101, 101)
    assert linear_distillation_loss(hidden, weight, hidden, weight, targets).kl_divergence == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "student_scale, teacher_scale", [(1.0, 30.0), (30.0, 1.0), (30.0, 30.0), (300.0, 300.0)]
)
def test_the_guard(student_scale, teacher_scale, temperature, device):
    """Targets so unlikely under either model, or both, that their logit cannot be the offset; some tokens
    are, some are not."""
    heads, targets = heads_on(device, 40, 101, 101)
    heads[0][::2] *= student_scale
    heads[2][::3] *= teacher_scale
    options = {"alpha": 0.4, "temperature": temperature}
    found = loss_and_gradients(linear_distillation_loss, heads, targets, **options)
    exact = loss_and_gradients(plain_distillation, [x.double() for x in heads], targets, **options)
    for one, two in zip(found, exact, strict=True):
        assert (
            one.double() - two
        ).norm() <= 5e-5 * two.norm()  # logits of up to 1e4 in float32 are rounded by up to 5e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_underflows(dtype, device):
    """Ids that the teacher likes and whose E the student's dtype cannot hold: their divergence is not
    lost."""
    heads, targets = heads_on(device, 12, 70, 70, dtype=dtype)
    heads[0][3:5, 0], heads[1][7:9, 0], heads[2][3, 0], heads[3][7, 0] = 20, -10, 3, 5
    targets[targets == 7] = 1
    found = linear_distillation_loss(*heads, targets).kl_divergence
    exact = plain_distillation(*(x.double() for x in heads), targets).kl_divergence
    assert exact > 10
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_chunks_and_repeatability(device, monkeypatch):
    heads, targets = heads_on(device, 50, 103, 101)
    whole = loss_and_gradients(linear_distillation_loss, heads, targets)
    assert all(map(torch.equal, whole, loss_and_gradients(linear_distillation_loss, heads, targets)))
    monkeypatch.setattr(distillation, "chunk_tokens", lambda *_: 7)
    torch.testing.assert_close(loss_and_gradients(linear_distillation_loss, heads, targets), whole)


@pytest.mark.parametrize("tokens", [0, 5])
def test_all_ignored(tokens, device):
    heads, targets = heads_on(device, tokens, 11, 13)
    heads[0].fill_(torch.nan)
    targets[:] = -100
    result = linear_distillation_loss(*(x.requires_grad_() for x in heads), targets)
    assert [x.item() for x in result] == [0, 0, 0]
    result.loss.backward()
    assert not heads[0].grad.any() and not heads[1].grad.any() and heads[2].grad is None


def test_ignored_tokens_and_wrong_targets(device):
    heads, targets = heads_on(device, 20, 101, 103)
    expected = loss_and_gradients(linear_distillation_loss, heads, targets)
    heads[0][targets == -100], heads[2][targets == -100] = torch.nan, torch.nan
    torch.testing.assert_close(
        loss_and_gradients(linear_distillation_loss, heads, targets), expected, rtol=0, atol=0
    )
    targets[3] = 101
    assert linear_distillation_loss(*heads, targets).loss.isnan()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(frozen, device, monkeypatch):
    products = []
    for function in (cross_entropy.product, cross_entropy.add_product):
        name = function.__name__
        monkeypatch.setattr(
            distillation,
            name,
            lambda *x, name=name, function=function: (products.append(name), function(*x))[1],
        )
    heads, targets = heads_on(device, 20, 103, 101)
    free = heads[1 - frozen].requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(linear_distillation_loss(*heads, targets).loss, free),
        torch.autograd.grad(plain_distillation(*heads, targets).loss, free),
    )
    assert products == [["add_product"], ["product"]][frozen]


def test_strided(device):
    heads, targets = heads_on(device, 20, 103, 101)
    expected = loss_and_gradients(linear_distillation_loss, heads, targets)
    for change in (strided, lambda x: x.T.contiguous().T):
        torch.testing.assert_close(
            loss_and_gradients(linear_distillation_loss, [change(x) for x in heads], strided(targets)),
            expected,
        )


def test_compiled_and_opcheck(device):
    heads, targets = heads_on(device, 20, 70, 70)
    compiled = torch.compile(
        lambda *x: linear_distillation_loss(*x, targets), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        loss_and_gradients(lambda *x: compiled(*x[:4]), heads, targets),
        loss_and_gradients(linear_distillation_loss, heads, targets),
    )
    example = [
        *(x.requires_grad_() for x in heads[:2]),
        *heads[2:],
        targets,
        0.5,
        2.0,
        -100,
        True,
        True,
        1 << 20,
    ]
    torch.library.opcheck(torch.ops.miniplm.linear_distillation_loss.default, example)


def test_backward_twice(device):
    heads, targets = heads_on(device, 20, 101, 103)
    inputs = [x.requires_grad_() for x in heads[:2]]
    loss, plain = (
        op(*heads, targets).loss
        for op in (partial(linear_distillation_loss, max_logits_bytes=1 << 20), plain_distillation)
    )
    for scale in (0.5, -3.0):
        found, expected = (torch.autograd.grad(scale * x, inputs, retain_graph=True) for x in (loss, plain))
        torch.testing.assert_close(found, expected)


def test_float16_below_temperature_1_is_left_to_the_reference(device):
    """One id stands 8 nats above 2,000 others, who together have 40% of the mass: at temperature 0.25 they
    lie 32 nats below it, and exp(−32) is 0 in float16."""

    def head(width):
        hidden, weight = torch.zeros(5, width, device=device), 0.3 * torch.randn(2000, width, device=device)
        hidden[:, 0], weight[7] = 1, 0
        weight[7, 0] = 8
        return hidden.half(), weight.half()

    heads, targets = [*head(16), *head(24)], torch.arange(5, device=device)
    found = linear_distillation_loss(*heads, targets, 0.5, temperature=0.25)
    exact = plain_distillation(*(x.double() for x in heads), targets, 0.5, temperature=0.25)
    torch.testing.assert_close(found.cross_entropy.double(), exact[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(found.loss.double(), exact[0], rtol=2e-3, atol=0)
