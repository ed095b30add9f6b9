"""Difference Sampling, the rule: scores → which chunks to keep.

Kept are the chunks x with the largest r(x) = mean log p_teacher(x) − mean log p_reference(x), in nats per
token (Gu et al., arXiv 2410.17215; the mean over the tokens, not the sum, is what the authors run). Ties go
to the earlier chunk, a score that is not finite is never kept, and the kept chunks stay in corpus order.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..config import SelectConfig
from ..runtime.errors import UserError


def compared(
    config: SelectConfig, columns: Mapping[str, np.ndarray], num_tokens: np.ndarray, domain: np.ndarray
) -> np.ndarray:
    """What the chunks are compared by, float32 [chunks]; not finite for those that are never to be kept.

    Args:
        columns: the score columns by name, float32 [chunks], nats per token.
        num_tokens, domain: as choose has them.
    """
    teacher, reference = columns["teacher_log_prob"], columns["reference_log_prob"]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if config.score == "difference":
            value = columns["score"]
        elif config.score == "ratio":
            value = reference / teacher
        elif config.score == "normalised":
            both = np.isfinite(teacher) & np.isfinite(reference)
            value = _standardised(teacher, domain, both) - _standardised(reference, domain, both)
        else:
            value = columns[f"{config.score}_log_prob"]
    if config.min_tokens is not None:
        value = np.where(num_tokens >= config.min_tokens, value, np.float32(np.nan))
    return value


def _standardised(values: np.ndarray, domain: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The values [n] less the mean of their domain, by its standard deviation (1 where that is 0), float32,
    of those that are counted (bool [n]); the others are NaN."""
    some, result = values[counted].astype(np.float64), np.full(len(values), np.nan, np.float32)
    codes = domain[counted]
    counts = np.maximum(np.bincount(codes), 1)
    some -= (np.bincount(codes, some) / counts)[codes]
    spread = np.sqrt(np.bincount(codes, some * some) / counts)
    result[counted] = some / np.where(spread > 0, spread, 1)[codes]
    return result


def _with_noise(score: np.ndarray, temperature: float, seed: int) -> np.ndarray:
    """score + temperature · Gumbel noise, float32 [n]: its k highest are k draws without replacement, each
    with probability proportional to exp(score / temperature) (Kool et al., arXiv 1903.06059; for selecting
    data QuRating, arXiv 2402.09739)."""
    noise = np.random.default_rng(seed).gumbel(size=len(score))
    noise *= temperature
    noise += score
    return noise.astype(np.float32)


def choose(
    config: SelectConfig,
    score: np.ndarray,
    num_tokens: np.ndarray,
    domain: np.ndarray,
    names: Sequence[str] = (),
) -> np.ndarray:
    """The rule: which chunks to keep, bool [chunks].

    Args:
        score: float32 [chunks], what they are compared by; chunks that are not finite are never kept.
        num_tokens: int [chunks], the lengths that count against a token budget.
        domain: int [chunks], the number of the domain, 0, 1, …
        names: of the domains, for domain_shares.
    Raises:
        UserError: a domain does not have what its share asks for.

    The ratio counts all chunks, those without a finite score too: int(ratio * chunks). A token budget keeps
    the longest run of the best chunks that fits. A domain's share of the budget is its share of the tokens,
    rounded down, or what domain_shares says.
    """
    finite = np.isfinite(score)
    if config.threshold is not None:
        return finite & (score >= config.threshold)
    if config.random_seed is not None:
        ranked = np.random.default_rng(config.random_seed).permutation(np.flatnonzero(finite))
    elif config.temperature:
        ranked = best_first(_with_noise(score, config.temperature, config.seed))
    else:
        ranked = best_first(score)
    if config.domain_shares:
        return _by_shares(config, ranked, num_tokens, domain, names)
    if config.per_domain:
        # The domains one after the other, each in rank order.
        ranked = ranked[np.argsort(domain[ranked], kind="stable")]
    else:
        domain = np.zeros(len(score), np.int8)
    chunks = np.bincount(domain)
    if config.token_budget is not None:
        tokens = np.bincount(domain, weights=num_tokens).astype(int).tolist()
        total = sum(tokens)
    keep = np.zeros(len(score), bool)
    bounds = np.searchsorted(domain[ranked], np.arange(len(chunks) + 1))
    for number, (start, stop) in enumerate(pairwise(bounds)):
        group = ranked[start:stop]
        if config.token_budget is not None:
            budget = config.token_budget * tokens[number] // total
            count = int(np.searchsorted(np.cumsum(num_tokens[group]), budget, side="right"))
        else:
            count = int(config.ratio * chunks[number])
        keep[group[:count]] = True
    return keep


def _by_shares(
    config: SelectConfig, ranked: np.ndarray, num_tokens: np.ndarray, domain: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Which chunks to keep, bool [chunks], by domain_shares; `ranked` are those that can be, the best
    first."""
    keep = np.zeros(len(domain), bool)
    if unknown := [name for name in config.shares if name not in names]:
        raise UserError(
            f"domain_shares names the domain {unknown[0]!r}, the corpus has {', '.join(sorted(names)[:10])}"
        )
    for name, share in config.shares.items():
        group = ranked[domain[ranked] == names.index(name)]
        if config.token_budget is not None:
            lengths = np.cumsum(num_tokens[group])
            wanted, there, unit = (
                int(share * config.token_budget),
                int(lengths[-1]) if len(group) else 0,
                "tokens",
            )
            count = int(np.searchsorted(lengths, wanted, side="right"))
        else:
            assert config.ratio is not None
            wanted, there, unit = int(share * int(config.ratio * len(domain))), len(group), "chunks"
            count = wanted
        if wanted > there:
            raise UserError(
                f"domain {name!r} has {there:,} {unit} that can be kept, its share of {share:g} asks for "
                f"{wanted:,}: lower it, or keep less in all"
            )
        keep[group[:count]] = True
    return keep


def written_order(config: SelectConfig, keep: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The kept chunks (keep is bool [chunks]) in the order in which they are to be written, if that is not
    the corpus's: int64.

    Args:
        score: float32 [chunks], what they are compared by.
    """
    if config.order == "random":
        return np.random.default_rng(config.seed).permutation(np.flatnonzero(keep))
    return best_first(np.where(keep, score, np.float32(np.nan))).astype(np.int64)


def best_first(score: np.ndarray) -> np.ndarray:
    """The chunks with a finite score (float32 [chunks]) in descending order of it, ties in ascending order of
    the chunk: uint32.

    Score and number share one int64 key, so that a plain sort in place does it: a third of the time and
    memory of a stable argsort.
    """
    chunks = np.flatnonzero(np.isfinite(score)).astype(np.uint32)
    # A difference is never −0, which has other bits than 0.
    bits = (np.float32(0) - score[chunks]).view(np.int32)
    # IEEE floats sort as integers once the negative ones have their other bits flipped.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= chunks
    keys.sort()
    chunks[:] = keys  # their low halves
    return chunks


def why_nothing(config: SelectConfig, score: np.ndarray) -> str:
    """Why the rule keeps none of the chunks with these scores (float32 [chunks]), and the remedy."""
    if not np.isfinite(score).any() and config.min_tokens is not None:
        return f"no chunk of at least {config.min_tokens:,} tokens has a finite score; lower min_tokens"
    if not np.isfinite(score).any():
        return "no chunk has a finite score; check the models that scored it"
    if config.threshold is not None:
        return (
            f"the highest score is {score[np.isfinite(score)].max():.4f}, below the threshold "
            f"{config.threshold}; lower the threshold"
        )
    where = " in any domain" if config.per_domain else ""
    if config.token_budget is not None:
        return (
            f"the best chunk alone{where} has more tokens than token_budget {config.token_budget} "
            f"allows; raise it"
        )
    return (
        f"ratio {config.ratio} of {len(score)} chunks is less than one chunk with a finite score{where}; "
        f"raise it"
    )


def rank_agreement(before: np.ndarray, after: np.ndarray, ratio: float = 0.5) -> dict[str, Any]:
    """How well two scorings [R] of the same rows agree, over the rows finite in both: their number,
    Spearman's rank correlation, and the share that Difference Sampling at this ratio keeps or drops alike."""
    both = np.isfinite(before) & np.isfinite(after)
    ranks = [
        np.argsort(np.argsort(-values[both], kind="stable"), kind="stable") for values in (before, after)
    ]
    rows = int(both.sum())
    kept = [rank < int(ratio * rows) for rank in ranks]
    return {
        "rows": rows,
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if rows > 1 else None,
        "equal_selections": float((kept[0] == kept[1]).mean()) if rows else None,
    }
