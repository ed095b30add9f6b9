"""Settings of prepare, retokenize, score and synthesize: what makes corpora and scores."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Optional, Tuple

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

MAX_CHUNK_LENGTH = 2**20
SHARD_TOKENS = 2**25
MAX_SHARD_TOKENS = 2**30  # an Arrow file's offsets are int32
MAX_SHARD_CHUNKS = 2**24
MAX_WORKERS = 1_024


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
    STANDS_ALONE: ClassVar[dict[str, str]] = {"ray": "auto"}
    """What a flag without a value means."""

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
    rank: Optional[int] = None
    """Of several processes with one output the number of this one, from 0: it scores every world-th file. Who
    is last completes the folder. Default: as torchrun or SLURM (tasks, arrays) have it."""
    world: Optional[int] = None
    """How many processes there are; any other number may continue."""
    ray: Optional[str] = None
    """Score in the workers of the cluster of Ray at this address; alone, or auto: of the one that runs here,
    or of a new one on this machine. One worker per GPU, without GPUs per core."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require(
            (self.rank is None) == (self.world is None), "rank and world go together: give both or neither"
        )
        require_count(self, "world")
        require_count(self, "rank", low=0)
        if self.rank is not None and self.world is not None:
            require(self.rank < self.world, f"rank must be below world, {self.world}, got {self.rank}")
        require(
            self.ray is None or (self.rank is None and self.profile is None),
            "ray shares the files out by itself, in other processes: leave out rank, world and profile",
        )
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
