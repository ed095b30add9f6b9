"""Settings of select: scores → refined corpus."""

import math
import re
from dataclasses import dataclass
from typing import List, Literal, Optional, Tuple

from .checks import MAX_SEED, require, require_count, require_finite, require_output, require_texts
from .fields import shown

DEFAULT_RATIO = 0.5
MAX_TEMPERATURE = 1_000_000.0


@dataclass(frozen=True)
class SelectConfig:
    """Keep the chunks that the teacher finds much likelier than the reference model (Difference Sampling)."""

    data: str
    """The corpus folder that was scored."""
    scores: List[str]
    """The score folder; or two, one of the teacher and one of the reference model."""
    output: str
    """The refined corpus folder to write."""
    ratio: Optional[float] = None
    """Keep the int(ratio * chunks) best chunks. Where no rule is given, this one, with half of the chunks."""
    token_budget: Optional[int] = None
    """Instead: keep the best chunks as long as their tokens fit into this budget."""
    threshold: Optional[float] = None
    """Instead: keep every chunk with a score of at least this (nats per token)."""
    per_domain: bool = False
    """Apply the ratio, or the domain's share of the token budget, to each domain on its own."""
    random_seed: Optional[int] = None
    """Choose at random with this seed instead of by score: the control experiment. Chunks without a finite
    score are left out here too."""
    score: Literal["difference", "ratio", "normalised", "teacher", "reference"] = "difference"
    """What chunks are compared by: teacher's minus reference's mean log-probability; the reference's divided
    by the teacher's; the difference of the two, each standardised within the domain; one of the two alone."""
    temperature: Optional[float] = None
    """Sample instead of a hard cut: chunks are drawn without replacement, each with a probability
    proportional to exp(score / temperature). Towards 0 it is the hard cut, towards infinity the choice at
    random."""
    domain_shares: Tuple[str, ...] = ()
    """What share of all that is kept (of the chunks, or with token_budget of the tokens) comes from which
    domain: a=0.3 b=0.7. They add up to 1; of other domains nothing is kept."""
    aggregate: Literal["mean", "sum", "quantile"] = "mean"
    """How a chunk's score comes of those of its tokens: their mean; their sum, which favours long chunks
    (nats, not nats per token); or a quantile of them, which needs score --tokens."""
    quantile: float = 0.5
    """Which quantile, 0 to 1; 0.5 is the median."""
    document_scores: bool = False
    """Compare documents: a document's score is the mean over its chunks, weighted by its ids there, and so is
    that of a chunk over its documents."""
    min_tokens: Optional[int] = None
    """Never keep chunks with fewer ids: their scores are means of little."""
    max_repeats: Optional[int] = None
    """Of each group of near-duplicate chunks (by MinHash; Jaccard similarity of runs of 5 ids of at least
    0.8) never keep more than so many, the best scored. Reads the corpus once more: about 9,000 chunks of
    1,025 ids a second, and some 220 bytes of memory a chunk."""
    order: Literal["corpus", "score", "random"] = "corpus"
    """The order in which the kept chunks are written. score: the best first. To be trained in that order they
    need train --no-shuffle."""
    seed: int = 0
    """Seed of the sampling with a temperature, and of the random order."""
    compare: Optional[str] = None
    """Show how this selection and that of another refined corpus agree, per domain."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        rules = [name for name in ("ratio", "token_budget", "threshold") if getattr(self, name) is not None]
        require(len(rules) <= 1, f"give one of ratio, token_budget and threshold, got {' and '.join(rules)}")
        if not rules:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        require(
            self.ratio is None or 0 < self.ratio <= 1,
            f"ratio must be above 0 and at most 1, got {self.ratio}",
        )
        require_count(self, "token_budget")
        require(
            self.threshold is None or math.isfinite(self.threshold),
            f"threshold must be finite, got {self.threshold}",
        )
        require(
            not (self.threshold is not None and self.per_domain),
            "per_domain changes nothing with threshold: leave one out",
        )
        require(
            not (self.threshold is not None and self.random_seed is not None),
            "random_seed needs ratio or token_budget, not threshold",
        )
        require_count(self, "random_seed", "seed", low=0, high=MAX_SEED)
        require_count(self, "min_tokens", "max_repeats")
        require(
            self.aggregate == "mean" or self.score != "ratio",
            f"score ratio is one of means: leave it or aggregate {self.aggregate} out",
        )
        require(0 <= self.quantile <= 1, f"quantile must be between 0 and 1, got {self.quantile}")
        require(
            self.quantile == 0.5 or self.aggregate == "quantile",
            "quantile has no say without aggregate quantile: give both",
        )
        self._check_sampling()
        require(1 <= len(self.scores) <= 2, f"scores takes one or two folders, got {len(self.scores)}")

    def _check_sampling(self) -> None:
        hard = self.threshold is not None or self.random_seed is not None
        require(
            not (self.temperature is not None and hard), "temperature needs ratio or token_budget, by score"
        )
        require_finite(self, "temperature")
        require(
            self.temperature is None or self.temperature <= MAX_TEMPERATURE,
            f"temperature must be at most {MAX_TEMPERATURE:,}, got {self.temperature}: for a choice at "
            f"random give random_seed",
        )
        if self.domain_shares:
            require(
                self.threshold is None and not self.per_domain,
                "domain_shares needs ratio or token_budget, without per_domain",
            )
            total = math.fsum(self.shares.values())
            require(abs(total - 1) <= 1e-6, f"domain_shares must add up to 1, they add up to {total:g}")

    @property
    def shares(self) -> dict[str, float]:
        """domain_shares by domain."""
        shares: dict[str, float] = {}
        texts = [part for text in self.domain_shares for part in _parts(text)]
        for text in texts:
            name, _, value = text.rpartition("=")
            try:
                share = float(value)
            except ValueError:
                share = math.nan
            require(
                bool(name) and 0 <= share <= 1, f"domain_shares takes name=share, 0 to 1, got {shown(text)}"
            )
            require(name not in shares, f"domain_shares gives {shown(name)} twice")
            shares[name] = share
        return shares


def _parts(text: str) -> list[str]:
    """The name=share texts in one, between commas; a comma may also be within a name."""
    parts = text.split(",")
    return parts if all(re.search(r"=[^=]*\d[^=]*$", part) for part in parts) else [text]
