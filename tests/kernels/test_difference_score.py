"""difference_score, on the reference and on Triton."""

import pytest
import torch
from checks import assert_accurate, assert_equal_everywhere
from miniplm.kernels import DifferenceScore, difference_score, linear_log_prob
from oracles import IGNORE_INDEX, plain_difference_score
from random_inputs import bounds, on, random_head, random_pair

pytestmark = pytest.mark.products
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocabularies",
    [
        (200, 200),
        (200, 203),
        (203, 200),
        *(pytest.param(pair, marks=pytest.mark.large) for pair in ((1000, 1000), (1000, 1003), (1003, 1000))),
    ],
)
def test_accuracy(vocabularies, dtype, implementation):
    lengths = [3, 0, 127, 1, 1, 255, 2]
    heads, targets, cu_seqlens = random_pair(lengths, *vocabularies)
    *heads, targets, cu_seqlens = on(implementation.device, *heads, targets, cu_seqlens, dtype=dtype)
    targets[130:132] = IGNORE_INDEX  # the two documents of one token have nothing to score
    found = difference_score(*heads, targets, cu_seqlens)
    assert isinstance(found, DifferenceScore)
    assert found._fields[:4] == ("score", "teacher_log_prob", "reference_log_prob", "num_tokens")
    assert found._fields[4:] == ("teacher_token_log_prob", "reference_token_log_prob")
    height = min(vocabularies)
    for one, hidden, weight in zip(found[4:], heads[::2], heads[1::2], strict=True):
        assert torch.equal(one, linear_log_prob(hidden, weight[:height], targets))
        assert not one[targets == IGNORE_INDEX].any()
    counts = [int((part != IGNORE_INDEX).sum()) for part in targets.split(lengths)]
    assert found.num_tokens.tolist() == counts
    scored = found.num_tokens > 0
    assert scored.tolist() == [True, False, True, False, False, True, True]
    plain = plain_difference_score(*heads, targets, lengths)
    truth = plain_difference_score(*(x.double() for x in heads), targets, lengths)
    for one, two, three in zip((found.teacher_log_prob, found.reference_log_prob), plain, truth, strict=True):
        assert one.dtype == torch.float32 and one[~scored].isnan().all()
        assert_accurate(one[scored], two[scored], three[scored])
    difference = found.teacher_log_prob - found.reference_log_prob
    torch.testing.assert_close(found.score, difference, rtol=0, atol=0, equal_nan=True)
    assert_equal_everywhere(difference_score(*heads, targets, cu_seqlens), found)


def test_a_broken_document(implementation):
    """A NaN stays in its document, and so does a token that a model holds impossible."""
    heads, _, cu_seqlens = random_pair([4, 4, 4, 4], 50, 50)
    *heads, targets, cu_seqlens = on(
        implementation.device, *heads, torch.arange(16), cu_seqlens, dtype=torch.float32
    )
    expected = difference_score(*heads, targets, cu_seqlens)
    heads[0][5] = torch.nan
    heads[3][9] = -torch.inf
    heads[2].abs_()
    found = difference_score(*heads, targets, cu_seqlens)
    assert found.teacher_log_prob.isnan().tolist() == [False, True, False, False]
    assert found.reference_log_prob.isneginf().tolist() == [False, False, True, False]
    assert found.score.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(found.teacher_log_prob[[0, 2, 3]], expected.teacher_log_prob[[0, 2, 3]])


def test_nothing_to_score(implementation):
    heads, targets, _ = random_pair([], 50, 50)
    *heads, targets = on(implementation.device, *heads, targets, dtype=torch.float32)
    for documents in (0, 1, 2):
        found = difference_score(*heads, targets, bounds([0] * documents, implementation.device))
        assert found.score.isnan().tolist() == [True] * documents
        assert found.num_tokens.tolist() == [0] * documents
        assert [len(x) for x in found] == [documents] * 4 + [0, 0]


def test_no_derivative(implementation):
    heads, targets, cu_seqlens = random_pair([4, 4], 50, 50)
    *heads, targets, cu_seqlens = on(
        implementation.device, *heads, targets, cu_seqlens, dtype=implementation.finest
    )
    result = difference_score(heads[0].requires_grad_(), *heads[1:], targets, cu_seqlens)
    with pytest.raises(NotImplementedError, match="difference_score has no derivative"):
        result.score.sum().backward()


def test_opcheck(implementation):
    hidden, weight, targets = on(implementation.device, *random_head(20, 130, 8), dtype=torch.float32)
    cu_seqlens = bounds([5, 15], implementation.device)
    reference_model = hidden[:, :3], weight[:120, :3]
    example = hidden, weight, *reference_model, targets % 100, cu_seqlens
    torch.library.opcheck(torch.ops.miniplm.difference_score.default, example)


def test_wrong_arguments():
    heads, targets, cu_seqlens = random_pair([3, 3], 50, 40)
    heads = [x.float() for x in heads]
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
