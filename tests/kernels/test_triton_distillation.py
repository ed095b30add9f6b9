"""linear_distillation_loss on Triton: its guards, its chunks, and what it leaves out."""

import pytest
import torch
from checks import assert_close_everywhere, assert_equal_everywhere, loss_and_gradients, remember_calls
from miniplm.kernels import chunks, distillation, linear_distillation_loss
from oracles import plain_distillation
from random_inputs import on, random_student_and_teacher

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter cannot multiply bfloat16
]


def make(device, *sizes, dtype=torch.float32):
    heads, targets = random_student_and_teacher(*sizes)
    *heads, targets = on(device, *heads, targets, dtype=dtype)
    return heads, targets


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "student_scale, teacher_scale", [(1.0, 30.0), (30.0, 1.0), (30.0, 30.0), (300.0, 300.0)]
)
def test_the_guard(student_scale, teacher_scale, temperature, device):
    """Targets so unlikely under either model, or both, that their logit cannot be the offset; some tokens
    are, some are not."""
    heads, targets = make(device, 40, 101, 101)
    heads[0][::2] *= student_scale
    heads[2][::3] *= teacher_scale
    options = {"alpha": 0.4, "temperature": temperature}
    found = loss_and_gradients(linear_distillation_loss, heads, targets, **options)
    exact = loss_and_gradients(plain_distillation, [x.double() for x in heads], targets, **options)
    for one, two in zip(found, exact, strict=True):
        # Logits of up to 1e4 in float32 are rounded by up to 5e-4.
        assert (one.double() - two).norm() <= 5e-5 * two.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_underflows(dtype, device):
    """Ids that the teacher likes and whose E the student's dtype cannot hold: their divergence is not
    lost."""
    heads, targets = make(device, 12, 70, 70, dtype=dtype)
    heads[0][3:5, 0], heads[1][7:9, 0], heads[2][3, 0], heads[3][7, 0] = 20, -10, 3, 5
    targets[targets == 7] = 1
    found = linear_distillation_loss(*heads, targets).kl_divergence
    exact = plain_distillation(*(x.double() for x in heads), targets).kl_divergence
    assert exact > 10
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


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


def test_chunks_and_repeatability(device, monkeypatch):
    heads, targets = make(device, 50, 103, 101)
    whole = loss_and_gradients(linear_distillation_loss, heads, targets)
    assert_equal_everywhere(loss_and_gradients(linear_distillation_loss, heads, targets), whole)
    monkeypatch.setattr(chunks, "choose", lambda *_: (7, 1))
    assert_close_everywhere(loss_and_gradients(linear_distillation_loss, heads, targets), whole)


def test_a_wrong_target_gives_nan(device):
    heads, targets = make(device, 20, 101, 103)
    targets[3] = 101
    assert linear_distillation_loss(*heads, targets).loss.isnan()


@pytest.mark.parametrize("frozen", [0, 1])
def test_no_product_for_a_frozen_input(frozen, device, monkeypatch):
    products = remember_calls(monkeypatch, distillation, "product", "add_product")
    heads, targets = make(device, 300, 103, 101)
    free = heads[1 - frozen].requires_grad_()
    torch.autograd.grad(linear_distillation_loss(*heads, targets, max_logits_bytes=1).loss, free)
    # In three chunks of 128 tokens; the weight's gradient begins with the first one's.
    assert products == [["product", "add_product", "add_product"], ["product"] * 3][frozen]
