"""Settings of prepare, score and select: text → corpus → scores → refined corpus; and of synthesize."""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, List, Literal, Optional, Tuple

from .checks import (
    BATCH_CHUNKS,
    BATCH_TOKENS,
    MAX_BATCH_TOKENS,
    MAX_SEED,
    MAX_VOCABULARY,
    SHARD_CHUNKS,
    Dtype,
    require,
    require_count,
    require_device,
    require_finite,
    require_output,
    require_texts,
    require_trace,
)
from .fields import shown

MAX_CHUNK_LENGTH = 2**20
SHARD_TOKENS = 2**25
MAX_SHARD_TOKENS = 2**30  # an Arrow file's offsets are int32
MAX_SHARD_CHUNKS = 2**24
MAX_WORKERS = 1_024
DEFAULT_RATIO = 0.5
MAX_TEMPERATURE = 1_000_000.0


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a corpus of token chunks."""

    data: str
    """A .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt file (one .txt file is one document), a folder of
    those, or a Hugging Face dataset id (streamed)."""
    tokenizer: str
    """A tokenizer: Hugging Face id, local folder, or .gguf file."""
    output: str
    """The corpus folder to write."""
    text_column: str = "text"
    """The column that holds the text."""
    domain_column: Optional[str] = None
    """The column that names a document's domain; without one all documents are of the domain "default".
    Documents of different domains never share a chunk."""
    max_length: int = 1024
    """Predictions per chunk: a chunk holds at most max_length + 1 token ids."""
    take: Tuple[float, float] = (0.0, 1.0)
    """The share of the documents to take, as a range of a hash of their text: [0, 0.05] and [0.05, 1] are
    disjoint random splits, equal texts fall into the same one."""
    max_bad_fraction: float = 0.0
    """The largest share of unreadable records (bad JSON, missing column, not UTF-8, null) to skip; past it
    the run stops."""
    eos_token: Optional[str] = None
    """The token that ends a document, where the tokenizer names none."""
    subset: Optional[str] = None
    """The configuration of a Hugging Face dataset."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    workers: Optional[int] = None
    """Worker processes; default: one per CPU core. 1: no extra process."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens per file of the corpus; a killed run continues after the last whole file."""

    def __post_init__(self) -> None:
        require_texts(self, any_bytes="data")
        require_output(self.output)
        require_count(self, "max_length", high=MAX_CHUNK_LENGTH)
        require(
            0 <= self.take[0] < self.take[1] <= 1,
            f"take must be two numbers 0 <= from < to <= 1, got {list(self.take)}",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"max_bad_fraction must be between 0 and 1, got {self.max_bad_fraction}",
        )
        require_count(self, "workers", high=MAX_WORKERS)
        require_count(self, "shard_tokens", high=MAX_SHARD_TOKENS)


@dataclass(frozen=True)
class RetokenizeConfig:
    """Turn a corpus into the ids of another tokenizer, for students of another family."""

    data: str
    """The corpus folder that prepare or select wrote."""
    tokenizer: str
    """The other tokenizer: Hugging Face id, local folder, or .gguf file."""
    output: str
    """The corpus folder to write."""
    max_length: Optional[int] = None
    """Predictions per chunk; default: as in the corpus."""
    add_bos: Optional[bool] = None
    """Begin every document with the tokenizer's BOS; default: where the tokenizer begins any text with it."""
    eos_token: Optional[str] = None
    """The token that ends a document, where the tokenizer names none."""
    workers: Optional[int] = None
    """Worker processes; default: one per CPU core. 1: no extra process."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens per file of the corpus; a killed run continues after the last whole file."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require_count(self, "max_length", high=MAX_CHUNK_LENGTH)
        require_count(self, "workers", high=MAX_WORKERS)
        require_count(self, "shard_tokens", high=MAX_SHARD_TOKENS)


@dataclass(frozen=True)
class ScoreConfig:
    """Score every chunk of a corpus with a teacher, a reference model, or both."""

    ALIASES: ClassVar[dict[str, str]] = {"shard_rows": "shard_chunks"}
    """Old names."""

    data: str
    """The corpus folder that prepare wrote."""
    output: str
    """The folder for the scores."""
    teacher: Optional[str] = None
    """The teacher: Hugging Face id, local folder (a training output too), or .gguf file."""
    reference: Optional[str] = None
    """The reference model, likewise."""
    sample: Optional[float] = None
    """Score this share of each domain's chunks, chosen at random, for proxy fit to learn from."""
    seed: int = 0
    """Seed of the sample."""
    document_mask: bool = False
    """Attention within each document only; the default is as published: across the documents of a chunk."""
    dtype: Dtype = "auto"
    """The models' dtype; auto: bfloat16 on a GPU, on a CPU float32, or bfloat16 where it has instructions for
    it and more than 99.5% of a sample of chunks would be selected or dropped alike. On a CPU the agreement of
    bfloat16 with float32 is told at the end."""
    precision: Optional[Literal["fp8"]] = None
    """fp8: the layers' matrix products in float8, with a scale per row; how well the ranks of up to 1,024
    chunks agree with those without is told at the end. Default: all in dtype."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    batch_tokens: Optional[int] = field(default=None, metadata={"default": BATCH_TOKENS})
    """Tokens per packed batch."""
    shard_chunks: Optional[int] = field(default=None, metadata={"default": SHARD_CHUNKS})
    """Chunks per score file; a killed run continues after the last whole file."""
    vocab_size: Optional[int] = None
    """Softmax over the first so many ids; default: the lower head of the two models (one model alone: its
    own). Needed only when models with heads of unequal height are scored one at a time."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only for models that you trust."""
    tokens: bool = False
    """Keep the log-probability of every token too, 2 bytes for each model, for train --tokens.scores."""
    profile: Optional[str] = None
    """Write a Chrome trace of three batches near the start to this file (.json or .json.gz)."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require(bool(self.teacher or self.reference), "give --teacher, --reference, or both")
        require(
            self.sample is None or 0 < self.sample < 1,
            f"sample must be above 0 and below 1, got {self.sample}",
        )
        require_count(self, "seed", low=0, high=MAX_SEED)
        require(not (self.sample and self.tokens), "tokens keeps those of all chunks: leave out sample")
        require_device(self.device)
        require_trace(self.profile)
        require_count(self, "batch_tokens", high=MAX_BATCH_TOKENS)
        require_count(self, "shard_chunks", high=MAX_SHARD_CHUNKS)
        require_count(self, "vocab_size", high=MAX_VOCABULARY)


@dataclass(frozen=True)
class SynthesizeConfig:
    """Let a teacher continue the beginnings of a corpus's chunks (SeqKD)."""

    data: str
    """The corpus folder whose chunks begin the text."""
    teacher: str
    """The teacher: Hugging Face id, local folder (a training output too), or .gguf file."""
    output: str
    """The corpus folder to write."""
    prompt_tokens: int = 768
    """Tokens of a chunk that the teacher continues to the chunk's length; shorter chunks stay as they are."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: int = 10
    """Seed of the sampling; each chunk has its own, from this and its number."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates; vllm where that is installed."""
    dtype: Dtype = "auto"
    """The teacher's dtype; auto: bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    batch_chunks: Optional[int] = field(default=None, metadata={"default": BATCH_CHUNKS})
    """Chunks continued at once, by transformers."""
    shard_chunks: Optional[int] = field(default=None, metadata={"default": SHARD_CHUNKS})
    """Chunks per file; a killed run continues after the last whole file."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only for models that you trust."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require_device(self.device)
        require_count(self, "prompt_tokens", high=MAX_CHUNK_LENGTH)
        require_finite(self, "temperature")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")
        require_count(self, "seed", low=0, high=MAX_SEED)
        require_count(self, "batch_chunks", "shard_chunks", high=MAX_SHARD_CHUNKS)


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
