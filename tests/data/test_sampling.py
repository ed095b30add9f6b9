"""A sample of a corpus: stratified by domain, nested, seeded."""

from types import SimpleNamespace

import numpy as np
import pytest

from miniplm.data.sampling import sampled_chunks


def corpus_of(codes) -> SimpleNamespace:
    return SimpleNamespace(domains=(np.int32(codes), [f"d{code}" for code in range(max(codes) + 1)]))


def plainly(codes, share, seed) -> list[int]:
    """Go through the chunks in an order at random and take those whose domain has not had its share yet."""
    left = {code: max(1, round(share * codes.count(code))) for code in set(codes)}
    taken = []
    for chunk in np.random.default_rng(seed).permutation(len(codes)).tolist():
        if left[codes[chunk]]:
            left[codes[chunk]] -= 1
            taken.append(chunk)
    return sorted(taken)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.999])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_each_domain_has_its_share(share, seed):
    codes = np.random.default_rng(5).choice(4, 500, p=[0.7, 0.2, 0.09, 0.01]).tolist() + [4]
    assert sampled_chunks(corpus_of(codes), share, seed).tolist() == plainly(codes, share, seed)


def test_a_larger_share_holds_the_smaller_one_and_another_seed_another():
    codes = [0, 1, 1, 2] * 50
    small, large = (set(sampled_chunks(corpus_of(codes), share, 3).tolist()) for share in (0.1, 0.4))
    assert len(small) == 20 and small < large
    assert small != set(sampled_chunks(corpus_of(codes), 0.1, 4).tolist())


def test_every_chunk_is_as_likely():
    codes = [0] * 20
    counts = sum(
        np.bincount(sampled_chunks(corpus_of(codes), 0.25, seed), minlength=20) for seed in range(400)
    )
    assert counts.sum() == 400 * 5 and (abs(counts - 100) < 50).all()  # five standard deviations are 43
