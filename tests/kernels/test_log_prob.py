"""linear_log_prob, on the reference and on Triton."""

import math

import pytest
import torch
from checks import assert_accurate, assert_accurate_everywhere, assert_equal_everywhere, strided
from miniplm.kernels import difference_score, linear_log_prob
from oracles import IGNORE_INDEX, plain_log_prob
from random_inputs import on, random_head, random_pair

pytestmark = pytest.mark.products
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, vocabulary, width",
    [
        (1, 5, 24),
        (3, 1000, 17),
        (127, 63, 64),
        (33, 64, 40),
        (129, 2 * 1187 + 1, 24),
        (255, 1000, 3),
        (507, 129, 96),
        *(
            pytest.param(*shape, marks=pytest.mark.large)
            for shape in ((3, 1000, 24), (127, 5, 24), (507, 1000, 24), (1037, 4099, 24), (9, 151_936, 24))
        ),
    ],
)
def test_accuracy(tokens, vocabulary, width, dtype, implementation):
    """Widths that descriptors can and cannot read, vocabularies below one tile, of whole tiles, and
    beyond."""
    hidden, weight, targets = on(implementation.device, *random_head(tokens, vocabulary, width))
    if implementation.name == "reference":
        grad = torch.randn(tokens, dtype=torch.float64)
        assert_accurate_everywhere(linear_log_prob, plain_log_prob, [hidden, weight, targets], [grad], dtype)
    check(hidden, weight, targets, dtype)


def check(hidden, weight, targets, dtype):
    """As exact as plain PyTorch, and the same bits again, of inputs that are left as they were."""
    inputs = [hidden.to(dtype), weight.to(dtype), targets]
    before = [x.clone() for x in inputs]
    result = linear_log_prob(*inputs)
    assert_equal_everywhere(inputs, before)
    assert result.dtype == torch.float32 and not result[targets == IGNORE_INDEX].any()
    truth = plain_log_prob(*(x.double() for x in inputs[:2]), targets)
    assert_accurate(result, plain_log_prob(*inputs), truth)
    assert torch.equal(result, linear_log_prob(*inputs)), "not the same bits again"
    return result


@pytest.mark.parametrize("width", [24, 23])
def test_large_logits(width, implementation):
    """Logits of 1e4 and more, falling and rising along the vocabulary, and rows that are as good as −inf."""
    hidden, weight, targets = random_head(40, 1000, width, scale=3e3)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 1000)
    weight[[5, 17]] = -1e37 * hidden.sign()[0]
    hidden, weight, targets = on(implementation.device, hidden, weight, targets)
    for rows in (weight, weight.flip(0)):
        assert (check(hidden, rows, targets, torch.float32) <= 0).all()


def test_a_token_that_is_impossible_or_certain(implementation):
    device = implementation.device
    hidden, weight = (
        torch.ones(3, 1, device=device),
        torch.tensor([[0.0], [-torch.inf], [200.0]], device=device),
    )
    targets = torch.tensor([1, 2, 0], device=device)
    assert linear_log_prob(hidden, weight, targets).tolist() == [-math.inf, 0.0, -200.0]
    # Whole tiles of −inf before the first number.
    tokens, vocabulary = (600, 5000) if implementation.name == "reference" else (70, 700)
    weight = torch.full((vocabulary, 1), -torch.inf, device=device)
    weight[-1] = 1.0
    hidden, targets = (
        torch.ones(tokens, 1, device=device),
        torch.full((tokens,), vocabulary - 1, device=device),
    )
    assert linear_log_prob(hidden, weight, targets).tolist() == [0.0] * tokens


def test_nan_stays_in_its_row(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(40, 130), dtype=torch.float32)
    expected = linear_log_prob(hidden, weight, targets)
    hidden[7] = torch.nan
    result = linear_log_prob(hidden, weight, targets)
    others = [t for t in range(40) if t != 7]
    assert result[7].isnan() and torch.equal(result[others], expected[others])


def test_all_ignored_and_no_tokens(implementation):
    device = implementation.device
    weight = torch.randn(100, 8, device=device, requires_grad=True)
    hidden = torch.full((3, 8), torch.nan, device=device, requires_grad=True)
    nothing = torch.full((3,), IGNORE_INDEX, device=device)
    result = linear_log_prob(hidden, weight, nothing)
    assert result.tolist() == [0, 0, 0]
    result.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    assert linear_log_prob(torch.randn(0, 8, device=device), weight, nothing[:0]).shape == (0,)


def test_strided(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(33, 301), dtype=torch.float32)
    expected = linear_log_prob(hidden, weight, targets)
    rows_of_another = torch.cat((weight, weight), 1)[:, :24]
    for changed in (
        (strided(hidden), strided(weight), strided(targets)),
        (hidden.T.contiguous().T, weight.T.contiguous().T, strided(targets)),
        (hidden.T.contiguous().T, rows_of_another, targets),
    ):
        torch.testing.assert_close(linear_log_prob(*changed), expected, rtol=0, atol=1e-5)


def test_inference_mode(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(9, 30), dtype=implementation.finest)
    with torch.inference_mode():
        found = linear_log_prob(hidden, weight, targets)
    torch.testing.assert_close(found, plain_log_prob(hidden, weight, targets))


@pytest.mark.slow
def test_opcheck(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(20, 130, 8), dtype=torch.float32)
    example = hidden, weight, targets, IGNORE_INDEX, 1 << 20
    torch.library.opcheck(torch.ops.miniplm.linear_log_prob.default, example)


def test_compiled_with_the_difference_score(implementation):
    """Both ops in one graph, without a break, with the same bits."""
    heads, targets, cu_seqlens = random_pair([5, 0, 15], 130, 120)
    *heads, targets, cu_seqlens = on(implementation.device, *heads, targets, cu_seqlens, dtype=torch.float32)

    def both(*heads):
        log_prob = linear_log_prob(heads[0], heads[1][:120], targets)
        return log_prob, difference_score(*heads, targets, cu_seqlens)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_equal_everywhere(compiled(*heads), both(*heads))


RIGHT = {
    "hidden": torch.randn(3, 4),
    "weight": torch.randn(5, 4),
    "targets": torch.tensor([0, 4, IGNORE_INDEX]),
}


@pytest.mark.parametrize(
    "argument, change",
    [
        ("hidden", {"hidden": torch.randn(3, 1, 4)}),
        ("hidden", {"hidden": torch.zeros(3, 4).long()}),
        ("hidden", {"hidden": torch.randn(2, 4)}),
        ("weight", {"weight": torch.randn(5, 3)}),
        ("weight", {"weight": torch.randn(5, 4).half()}),
        ("weight", {"weight": torch.randn(5, 4, device="meta")}),
        ("targets", {"targets": torch.zeros(3, 1).long()}),
        ("targets", {"targets": torch.zeros(3)}),
        ("targets", {"targets": torch.zeros(3).int()}),
        ("targets", {"targets": torch.tensor([0, 5, 1])}),
        ("targets", {"targets": torch.tensor([0, -1, 1])}),
        ("targets", {"targets": torch.tensor([-101, 0, 0])}),
    ],
)
def test_wrong_arguments(argument, change):
    linear_log_prob(**RIGHT)
    with pytest.raises(ValueError, match=f"^{argument} (has|is|must)"):
        linear_log_prob(**{**RIGHT, **change})
