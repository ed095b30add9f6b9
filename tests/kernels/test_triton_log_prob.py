"""linear_log_prob and difference_score in Triton: on a GPU, or in Triton's interpreter (which has no bfloat16
products)."""

import math

import pytest
import torch
from checks import assert_accurate, strided
from miniplm.kernels import difference_score, linear_log_prob, logits, tuning
from test_log_prob import IGNORE_INDEX, plain_difference_score, plain_log_prob, random_head, random_pair

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(hidden, weight, targets, dtype, device):
    hidden, weight, targets = hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)
    before = hidden.clone(), weight.clone(), targets.clone()
    result = linear_log_prob(hidden, weight, targets)
    assert all(map(torch.equal, before, (hidden, weight, targets)))
    assert result.dtype == torch.float32 and not result[targets == IGNORE_INDEX].any()
    assert_accurate(
        result,
        plain_log_prob(hidden, weight, targets),
        plain_log_prob(hidden.double(), weight.double(), targets),
    )
    assert torch.equal(result, linear_log_prob(hidden, weight, targets)), "not the same bits again"
    return result


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
    ],
)
def test_accuracy(tokens, vocabulary, width, dtype, device):
    """Widths that descriptors can and cannot read, vocabularies below one tile, of whole tiles, and
    beyond."""
    hidden, weight, targets = random_head(tokens, vocabulary, width)
    targets[0] = (weight @ hidden[0]).argmin()
    check(hidden, weight, targets, dtype, device)


@pytest.mark.parametrize(
    "shape, blocks, processors",
    [
        ((75, 500, 40), (16, 16, 16), 1),
        ((75, 500, 40), (64, 32, 16), 3),
        ((75, 500, 40), (16, 128, 64), 7),
        ((2, 151_936, 8), (16, 1024, 16), 132),
    ],
)
def test_any_configuration(shape, blocks, processors, monkeypatch, device):
    """The result is right however tokens, vocabulary and width are cut, and whoever of the grid takes which
    part."""
    config = tuning.Config(dict(zip(("BLOCK_T", "BLOCK_V", "BLOCK_D"), blocks, strict=True)))
    monkeypatch.setitem(tuning.CANDIDATES, "logsumexp", lambda *_, **__: [config])
    target = tuning.target(torch.device(device))._replace(processors=processors)
    monkeypatch.setattr(tuning, "target", lambda _: target)
    check(*random_head(*shape), torch.float32, device)


@pytest.mark.parametrize("width", [24, 23])
def test_large_logits(width, device):
    """Logits of 1e4 and more, falling and rising along the vocabulary, and rows that are as good as −inf."""
    hidden, weight, targets = random_head(40, 1000, width, scale=3e3)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 1000)
    weight[[5, 17]] = -1e37 * hidden.sign()[0]
    for rows in (weight, weight.flip(0)):
        assert (check(hidden, rows, targets, torch.float32, device) <= 0).all()


def test_a_token_that_is_impossible_or_certain(device):
    hidden, weight = (
        torch.ones(3, 1, device=device),
        torch.tensor([[0.0], [-torch.inf], [200.0]], device=device),
    )
    assert linear_log_prob(hidden, weight, torch.tensor([1, 2, 0], device=device)).tolist() == [
        -math.inf,
        0.0,
        -200.0,
    ]
    weight = torch.full((700, 1), -torch.inf, device=device)  # whole tiles of −inf before the first number
    weight[-1] = 1.0
    assert (
        linear_log_prob(
            torch.ones(70, 1, device=device), weight, torch.full((70,), 699, device=device)
        ).tolist()
        == [0.0] * 70
    )


def test_nan_stays_in_its_row_and_a_wrong_target_gives_nan(device):
    hidden, weight, targets = (x.to(device) for x in random_head(40, 130))
    hidden, weight = hidden.float(), weight.float()
    expected = linear_log_prob(hidden, weight, targets)
    hidden[7] = torch.nan
    targets[[8, 9]] = torch.tensor([130, -1], device=device)
    result = linear_log_prob(hidden, weight, targets)
    assert result[[7, 8, 9]].isnan().all()
    others = [t for t in range(40) if t not in (7, 8, 9)]
    assert torch.equal(result[others], expected[others])


def test_nothing_to_score(device):
    weight = torch.randn(100, 8, device=device)
    nothing = torch.full((3,), IGNORE_INDEX, device=device)
    assert linear_log_prob(torch.full((3, 8), torch.nan, device=device), weight, nothing).tolist() == [
        0,
        0,
        0,
    ]
    assert linear_log_prob(torch.randn(0, 8, device=device), weight, nothing[:0]).shape == (0,)


def test_strided(device):
    hidden, weight, targets = (x.to(device) for x in random_head(33, 301))
    hidden, weight = hidden.float(), weight.float()
    expected = linear_log_prob(hidden, weight, targets)
    wide = torch.cat((weight, weight), 1)[:, :24]  # rows of another matrix
    for changed in [
        (strided(hidden), strided(weight), strided(targets)),
        (hidden.T.contiguous().T, wide, targets),
    ]:
        torch.testing.assert_close(linear_log_prob(*changed), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [16, 15])
def test_rows_beyond_31_bits(width, device, monkeypatch):
    """Rows that lie more than 2³¹ elements apart, in memory that is reserved and hardly touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 16
    hidden = torch.empty(2 * stride + width, dtype=torch.float16, device=device).as_strided(
        (3, width), (stride, 1)
    )
    weight = torch.empty(2 * stride + width, dtype=torch.float16, device=device).as_strided(
        (3, width), (stride, 1)
    )
    hidden.normal_(), weight.normal_()
    targets = torch.tensor([0, 1, 2], device=device)
    result = linear_log_prob(hidden, weight, targets)
    torch.testing.assert_close(result, linear_log_prob(hidden.contiguous(), weight.contiguous(), targets))


def test_splits_divide_the_work_evenly():
    """At the shapes of the aims, no program has over 3% more tiles than the mean of all, and partial results
    stay small."""
    for tokens in (4096, 16_384, 65_536):
        for vocabulary in (151_936, 128_256, 49_152):
            blocks, tiles = tokens // 128, vocabulary // 256
            size = logits.tiles_per_split(tiles, blocks, 132)
            items = blocks * -(-tiles // size)
            assert -(-items // 132) * size <= 1.03 * blocks * tiles / 132 + 1
            assert -(-tiles // size) * tokens * 8 < 200e6


# --- difference_score ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabularies", [(200, 200), (200, 203), (203, 200)])
def test_difference_score(vocabularies, dtype, device):
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
    heads, targets, cu_seqlens = [x.to(device) for x in heads], targets.to(device), cu_seqlens.to(device)
    targets[131] = IGNORE_INDEX
    found = difference_score(*heads, targets, cu_seqlens)
    assert found.num_tokens.tolist() == [int((part != IGNORE_INDEX).sum()) for part in targets.split(lengths)]
    scored = found.num_tokens > 0
    assert scored.tolist() == [True, False, True, False, False, True, True]
    plain = plain_difference_score(*heads, targets, lengths)
    truth = plain_difference_score(*(x.double() for x in heads), targets, lengths)
    for one, two, three in zip((found.teacher_log_prob, found.reference_log_prob), plain, truth, strict=True):
        assert one.dtype == torch.float32 and one[~scored].isnan().all()
        assert_accurate(one[scored], two[scored], three[scored])
    torch.testing.assert_close(
        found.score, found.teacher_log_prob - found.reference_log_prob, rtol=0, atol=0, equal_nan=True
    )
    again = difference_score(*heads, targets, cu_seqlens)
    assert all(
        torch.equal(one.nan_to_num(7), two.nan_to_num(7)) for one, two in zip(found, again, strict=True)
    )


def test_difference_score_of_a_broken_document(device):
    """A NaN stays in its document, and so does a token that a model holds impossible."""
    heads, targets, cu_seqlens = random_pair([4, 4, 4, 4], 50, 50, torch.float32)
    targets[:] = torch.arange(16)
    heads, targets, cu_seqlens = [x.to(device) for x in heads], targets.to(device), cu_seqlens.to(device)
    expected = difference_score(*heads, targets, cu_seqlens)
    heads[0][5] = torch.nan
    heads[3][9] = -torch.inf
    heads[2].abs_()
    found = difference_score(*heads, targets, cu_seqlens)
    assert found.teacher_log_prob.isnan().tolist() == [False, True, False, False]
    assert found.reference_log_prob.isneginf().tolist() == [False, False, True, False]
    assert torch.equal(found.teacher_log_prob[[0, 2, 3]], expected.teacher_log_prob[[0, 2, 3]])


def test_difference_score_of_nothing(device):
    heads, targets, _ = random_pair([], 50, 50, torch.float32)
    heads, targets = [x.to(device) for x in heads], targets.to(device)
    for bounds in ([0], [0, 0, 0]):
        found = difference_score(*heads, targets, torch.tensor(bounds, dtype=torch.int32, device=device))
        assert found.score.isnan().tolist() == [True] * (len(bounds) - 1) and found.num_tokens.tolist() == [
            0
        ] * (len(bounds) - 1)


def test_opcheck(device):
    hidden, weight, targets = (x.to(device) for x in random_head(20, 130, 8))
    hidden, weight = hidden.float(), weight.float()
    torch.library.opcheck(
        torch.ops.miniplm.linear_log_prob.default, (hidden, weight, targets, IGNORE_INDEX, 1 << 20)
    )
    cu_seqlens = torch.tensor([0, 5, 20], dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.miniplm.difference_score.default,
        (hidden, weight, hidden[:, :3], weight[:120, :3], targets % 100, cu_seqlens),
    )


def test_compiled(device):
    """Both ops in one graph, without a break, with the same bits."""
    heads, targets, cu_seqlens = random_pair([5, 0, 15], 130, 120, torch.float32)
    heads, targets, cu_seqlens = [x.to(device) for x in heads], targets.to(device), cu_seqlens.to(device)

    def both(*heads):
        return linear_log_prob(heads[0], heads[1][:120], targets), *difference_score(
            *heads, targets, cu_seqlens
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*heads)
    assert all(
        torch.equal(one.nan_to_num(7), two.nan_to_num(7))
        for one, two in zip(compiled, both(*heads), strict=True)
    )
