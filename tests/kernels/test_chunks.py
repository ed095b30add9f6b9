"""In which chunks, and in how many parts, the losses of the head cut their work."""

import itertools
import math

import pytest
import torch
from checks import assert_close_everywhere, assert_equal_everywhere, loss_and_gradients, run
from random_inputs import on, random, random_head, random_student_and_teacher

pytest.importorskip("triton")
from miniplm.kernels import chunks, cross_entropy, linear_cross_entropy, linear_distillation_loss

V, SMS, GIB = 151_936, 132, 1 << 30
TRAIN = 8192 * 2 * V  # the budget of train


def share(tokens, parts, d):
    """Of the processors that work, on average over the waves of dx."""
    tiles = parts * math.ceil(tokens / 128) * math.ceil(d / 256)
    return tiles / (math.ceil(tiles / SMS) * SMS)


@pytest.mark.parametrize(
    "d, budget, models, expected",
    [
        (512, GIB, 1, (2048, 4)),  # 16 · 2 · 4 = 128 tiles a wave
        (768, GIB, 1, (2816, 2)),  # 22 · 3 · 2 = 132
        (1024, GIB, 1, (3328, 8)),  # 26 · 4 · 8 = 6.3 · 132: 3,328 tokens are 0.8 waves, and 4,224 do not fit
        (1536, GIB, 1, (2816, 1)),  # 22 · 6 = 132
        (768, GIB, 2, (1408, 4)),  # 11 · 3 · 4 = 132
        (512, TRAIN, 1, (8192, 1)),  # 64 · 2 = 128
        (768, TRAIN, 1, (8192, 2)),  # 64 · 3 · 2 = 2.9 · 132: three half waves, where one part took two waves
        (1024, TRAIN, 1, (8192, 1)),  # 64 · 4 = 1.9 · 132
    ],
)
def test_at_the_aims(d, budget, models, expected):
    """16,384 tokens; the counts by hand."""
    assert chunks.choose(16_384, V, d, 2 * V * models, budget, SMS) == expected
    assert share(*expected, d) > 0.88


SHAPES = list(itertools.product((1, 100, 4096, 16_384, 65_536), (V, 49_152, 128_256, 1001), (512, 768, 2048)))


@pytest.mark.parametrize("budget", [1, GIB // 4, GIB, TRAIN])
def test_the_budget_holds(budget):
    """Whole blocks of tokens, one at least, no more than there are, their logits within the budget; parts
    that are equal and aligned, and small beside the logits."""
    for tokens, vocabulary, d in SHAPES:
        size, parts = chunks.choose(tokens, vocabulary, d, 2 * vocabulary, budget, SMS)
        assert size % 128 == 0 and 128 <= size < tokens + 128
        assert size == 128 or size * 2 * vocabulary <= budget
        assert parts == 1 or (vocabulary % (8 * parts) == 0 and 4 * parts * size * d <= budget / 8)


@pytest.mark.parametrize("budget", [GIB, TRAIN])
@pytest.mark.parametrize("models", [1, 2])
def test_nothing_else_is_cheaper(budget, models):
    """Among all chunks and parts, not only those that are tried: up to a tenth of a wave, and 5%."""
    for tokens, vocabulary, d in SHAPES:
        wave = 2 * 128 * 256 * vocabulary * SMS

        def cost(size, parts, tokens=tokens, vocabulary=vocabulary, d=d, wave=wave):
            waves = math.ceil(parts * (size // 128) * math.ceil(d / 256) / SMS) / parts
            moved = 8 * d * (vocabulary + parts * size)  # dW's sum, and the parts of dx: read and written
            return math.ceil(tokens / size) * (waves + 200 * moved / wave)

        found = chunks.choose(tokens, vocabulary, d, 2 * vocabulary * models, budget, SMS)
        most = max(128, min(tokens + 127, budget // (2 * vocabulary * models)) // 128 * 128)
        best = min(
            cost(size, parts)
            for size in range(128, most + 1, 128)
            for parts in (1, 2, 4, 8, 16)
            if parts == 1
            or (
                vocabulary % (8 * parts) == 0
                and vocabulary // parts >= 4096
                and 4 * parts * size * d <= budget / 8
            )
        )
        assert cost(*found) <= 1.05 * best + 0.1, (tokens, vocabulary, d, found)


def test_it_depends_on_its_arguments_alone(monkeypatch):
    """The order of sums must not change with what memory is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: pytest.fail("asked for free memory"))
    chunks.choose.cache_clear()
    first = chunks.choose(16_384, V, 768, 2 * V, GIB, SMS)
    chunks.choose.cache_clear()
    assert chunks.choose(16_384, V, 768, 2 * V, GIB, SMS) == first


@pytest.mark.parametrize("parts", [2, 4])
def test_a_product_in_parts(parts, device):
    """The same product, from matrices whose rows are apart; twice the same bits."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = on(device, random(40, 140)[:, :128], random(128, 70)[:, :32], dtype=dtype)
    found = cross_entropy.product(a, b, parts)
    assert found.dtype == torch.float32 and found.shape == (40, 32)
    torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)
    assert_equal_everywhere(found, cross_entropy.product(a, b, parts))


@pytest.mark.usefixtures("triton_ops")
def test_losses_in_chunks_and_parts(device, monkeypatch):
    """As in one piece, but for the rounding of the sums."""
    hidden, weight, targets = on(device, *random_head(50, 104), dtype=torch.float32)
    pair, pair_targets = random_student_and_teacher(50, 108, 104)
    pair, (pair_targets,) = on(device, *pair, dtype=torch.float32), on(device, pair_targets)

    def both():
        ones = [torch.ones((), device=device)]
        loss = run(lambda x, w: linear_cross_entropy(x, w, targets), [hidden, weight], ones)
        return loss, loss_and_gradients(linear_distillation_loss, pair, pair_targets)

    whole = both()
    monkeypatch.setattr(chunks, "choose", lambda *_: (20, 4))
    cut = both()
    assert_close_everywhere(cut, whole, rtol=1e-5, atol=1e-6)
    assert_equal_everywhere(both(), cut)
