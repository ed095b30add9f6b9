import math

import pytest
import torch
from checks import assert_accurate, assert_accurate_everywhere, strided
from miniplm.kernels import DifferenceScore, difference_score, linear_log_prob, reference_head

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORE_INDEX = -100


def plain_log_prob(hidden, weight, targets):
    """From the whole matrix of logits, the softmax in float32 at least."""
    logits = hidden @ weight.T
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return torch.where(
        targets == IGNORE_INDEX, 0.0, log_probs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    )


def random_head(tokens, vocabulary, width=24, scale=0.5):
    """hidden, weight, targets: a fifth of the targets ignored, both ends of the vocabulary among the rest."""
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    weight = scale * torch.randn(vocabulary, width, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::5] = IGNORE_INDEX
    targets[1::5], targets[2::5] = 0, vocabulary - 1
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, vocabulary",
    [(1, 5), (3, 1000), (127, 5), (129, 2 * 1187 + 1), (507, 1000), (1037, 4099), (9, 151_936)],
)
def test_accuracy(tokens, vocabulary, dtype):
    hidden, weight, targets = random_head(tokens, vocabulary)
    targets[0] = (
        weight @ hidden[0]
    ).argmin()  # unlikely: a log-probability near 0 is a difference of logits, and all of it rounding
    assert_accurate_everywhere(
        linear_log_prob,
        plain_log_prob,
        [hidden, weight, targets],
        [torch.randn(tokens, dtype=torch.float64)],
        dtype,
    )


@pytest.mark.parametrize("tile", [4, 64, 1000, 10_000])
def test_any_tile(tile, monkeypatch):
    """The result does not depend on how vocabulary and tokens are cut."""
    hidden, weight, targets = random_head(50, 101)
    expected = plain_log_prob(hidden, weight, targets)
    monkeypatch.setattr(reference_head, "TILE_BYTES", tile)
    for tokens in (1, 7, 512):
        monkeypatch.setattr(reference_head, "CHUNK_TOKENS", tokens)
        torch.testing.assert_close(linear_log_prob(hidden, weight, targets), expected)
        torch.testing.assert_close(
            linear_log_prob(hidden.bfloat16(), weight.bfloat16(), targets),
            plain_log_prob(hidden.bfloat16().float(), weight.bfloat16().float(), targets),
        )


def test_large_logits():
    """Logits of 1e4 and more, falling and rising along the vocabulary, and rows that are as good as −inf."""
    hidden, weight, targets = random_head(40, 3000, scale=3e3)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 3000)
    weight[[5, 17]] = -1e37 * hidden.sign()[0]
    for rows in (weight, weight.flip(0)):
        result = linear_log_prob(hidden.float(), rows.float(), targets)
        assert_accurate(
            result,
            plain_log_prob(hidden.float(), rows.float(), targets),
            plain_log_prob(hidden.float().double(), rows.float().double(), targets),
        )
        assert (result <= 0).all()


def test_a_token_that_is_impossible_or_certain():
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [-torch.inf], [200.0]])
    assert linear_log_prob(hidden, weight, torch.tensor([1, 2, 0])).tolist() == [-math.inf, 0.0, -200.0]
    weight = torch.full((5000, 1), -torch.inf)  # whole tiles of −inf before the first number
    weight[-1] = 1.0
    assert linear_log_prob(torch.ones(600, 1), weight, torch.full((600,), 4999)).tolist() == [0.0] * 600


def test_all_ignored_and_no_tokens():
    weight = torch.randn(11, 4, requires_grad=True)
    hidden = torch.full((3, 4), torch.nan, requires_grad=True)
    result = linear_log_prob(hidden, weight, torch.full((3,), IGNORE_INDEX))
    assert result.tolist() == [0, 0, 0]
    result.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    assert linear_log_prob(torch.randn(0, 4), weight, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_strided():
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in random_head(33, 301))
    expected = linear_log_prob(hidden, weight, targets)
    for change in (strided, lambda x: x.T.contiguous().T):
        torch.testing.assert_close(
            linear_log_prob(change(hidden), change(weight), strided(targets)), expected
        )


def test_inference_mode():
    hidden, weight, targets = random_head(9, 30)
    with torch.inference_mode():
        torch.testing.assert_close(
            linear_log_prob(hidden, weight, targets), plain_log_prob(hidden, weight, targets)
        )


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


# --- difference_score ---


def random_pair(lengths, teacher_vocabulary, reference_vocabulary, dtype=torch.float64):
    teacher_hidden, teacher_weight, _ = random_head(sum(lengths), teacher_vocabulary, 24)
    reference_hidden, reference_weight, targets = random_head(
        sum(lengths), min(teacher_vocabulary, reference_vocabulary), 8
    )
    extra = torch.randn(max(0, reference_vocabulary - teacher_vocabulary), 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    heads = (teacher_hidden, teacher_weight, reference_hidden, torch.cat((reference_weight, extra)))
    return [x.to(dtype) for x in heads], targets, cu_seqlens


def plain_difference_score(
    teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, lengths
):
    vocabulary = min(len(teacher_weight), len(reference_weight))
    result = []
    for hidden, weight in ((teacher_hidden, teacher_weight), (reference_hidden, reference_weight)):
        log_prob = plain_log_prob(hidden, weight[:vocabulary], targets)
        result.append(
            torch.stack(
                [
                    part[counted != IGNORE_INDEX].mean()
                    for part, counted in zip(log_prob.split(lengths), targets.split(lengths), strict=True)
                ]
            )
        )
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabularies", [(1000, 1000), (1000, 1003), (1003, 1000)])
def test_difference_score(vocabularies, dtype):
    lengths = [
        3,
        0,
        127,
        1,
        1,
        255,
        2,
    ]  # the first token of every five is ignored: the fifth document, one token, has nothing to score
    heads, targets, cu_seqlens = random_pair(lengths, *vocabularies, dtype)
    targets[131] = IGNORE_INDEX
    found = difference_score(*heads, targets, cu_seqlens)
    assert isinstance(found, DifferenceScore) and found._fields == (
        "score",
        "teacher_log_prob",
        "reference_log_prob",
        "num_tokens",
    )
    assert found.num_tokens.tolist() == [int((part != IGNORE_INDEX).sum()) for part in targets.split(lengths)]
    assert found.num_tokens[[1, 4]].tolist() == [0, 0]
    scored = found.num_tokens > 0
    plain = plain_difference_score(*heads, targets, lengths)
    truth = plain_difference_score(*(x.double() for x in heads), targets, lengths)
    for one, two, three in zip((found.teacher_log_prob, found.reference_log_prob), plain, truth, strict=True):
        assert one.dtype == torch.float32 and one[~scored].isnan().all()
        assert_accurate(one[scored], two[scored], three[scored])
    torch.testing.assert_close(
        found.score, found.teacher_log_prob - found.reference_log_prob, rtol=0, atol=0, equal_nan=True
    )


def test_difference_score_of_a_broken_document():
    """A NaN stays in its document, and so does a token that a model holds impossible."""
    heads, targets, cu_seqlens = random_pair([4, 4, 4, 4], 50, 50, torch.float32)
    targets[:] = torch.arange(16)
    expected = difference_score(*heads, targets, cu_seqlens)
    heads[0][5] = torch.nan
    heads[3][9] = -torch.inf
    heads[2].abs_()
    found = difference_score(*heads, targets, cu_seqlens)
    assert found.teacher_log_prob.isnan().tolist() == [False, True, False, False]
    assert found.reference_log_prob.isneginf().tolist() == [False, False, True, False]
    assert found.score.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(found.teacher_log_prob[[0, 2, 3]], expected.teacher_log_prob[[0, 2, 3]])


def test_difference_score_of_nothing():
    heads, targets, _ = random_pair([], 50, 50, torch.float32)
    assert [len(x) for x in difference_score(*heads, targets, torch.tensor([0], dtype=torch.int32))] == [
        0
    ] * 4
    found = difference_score(*heads, targets, torch.tensor([0, 0], dtype=torch.int32))
    assert found.score.isnan().tolist() == [True] and found.num_tokens.tolist() == [0]


def test_difference_score_has_no_derivative():
    heads, targets, cu_seqlens = random_pair([4, 4], 50, 50)
    result = difference_score(heads[0].requires_grad_(), *heads[1:], targets, cu_seqlens)
    with pytest.raises(NotImplementedError, match="difference_score has no derivative"):
        result.score.sum().backward()


def test_difference_score_wrong_arguments():
    heads, targets, cu_seqlens = random_pair([3, 3], 50, 40, torch.float32)
    names = ["teacher_hidden", "teacher_weight", "reference_hidden", "reference_weight"]
    right = {**dict(zip(names, heads, strict=True)), "targets": targets, "cu_seqlens": cu_seqlens}
    difference_score(**right)
    beyond = targets.clone()
    beyond[3] = 40  # in the teacher's vocabulary alone
    for argument, wrong in [
        ("teacher_hidden", torch.randn(5, 24)),
        ("teacher_weight", torch.randn(50, 8)),
        ("reference_hidden", torch.randn(6, 24).int()),
        ("reference_weight", torch.randn(40, 8).half()),
        ("targets", beyond),
        ("targets", targets.int()),
        ("cu_seqlens", cu_seqlens.long()),
        ("cu_seqlens", torch.tensor([0, 3, 5], dtype=torch.int32)),
        ("cu_seqlens", torch.tensor([1, 3, 6], dtype=torch.int32)),
    ]:
        with pytest.raises(ValueError, match=rf"^{argument} (has|is|must)"):
            difference_score(**{**right, argument: wrong})
