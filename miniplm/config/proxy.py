"""Settings of proxy fit and proxy score, which predict the scores of a corpus from those of a sample."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from .checks import (
    BATCH_TOKENS,
    MAX_BATCH_TOKENS,
    MAX_SEED,
    Dtype,
    require,
    require_count,
    require_device,
    require_finite,
    require_output,
    require_texts,
)
from .data import MAX_SHARD_CHUNKS

MAX_ORDERS = 10
MAX_BUCKETS = 2**31
MAX_EPOCHS = 1_000


@dataclass(frozen=True)
class NgramConfig:
    """The n-gram model."""

    orders: int = 3
    """N-grams of 1 to so many ids."""
    buckets: int = 2**22
    """Weights; n-grams are hashed to them."""
    ridge: float = 1.0
    """How strongly weights are drawn to 0: as by so many tokens that say so."""
    passes: int = 50
    """Passes over the sample at most; fewer where the fit is exact before."""

    def __post_init__(self) -> None:
        require_count(self, "orders", high=MAX_ORDERS, group="ngram.")
        require_count(self, "buckets", high=MAX_BUCKETS, group="ngram.")
        require_count(self, "passes", group="ngram.")
        require_finite(self, "ridge", positive=True, group="ngram.")


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer."""

    init_from: Optional[str] = None
    """The model that is fine-tuned, as a rule the reference model: Hugging Face id, local folder (a training
    output too), or .gguf file."""
    epochs: int = 3
    """Times that each chunk of the sample is learnt from."""
    lr: float = 1e-4
    """Peak learning rate."""
    batch_tokens: int = 16_384
    """Tokens per step, in one forward pass."""

    def __post_init__(self) -> None:
        require_texts(self, group="transformer.")
        require_count(self, "epochs", high=MAX_EPOCHS, group="transformer.")
        require_count(self, "batch_tokens", high=MAX_BATCH_TOKENS, group="transformer.")
        require_finite(self, "lr", positive=True, group="transformer.")


@dataclass(frozen=True)
class ProxyFitConfig:
    """Learn to predict the scores of a corpus from those of a sample."""

    data: str
    """The corpus folder that was scored."""
    scores: str
    """The score folder, with both models' scores; as score --sample writes it, or of a whole corpus."""
    output: str
    """The folder to write."""
    held_out: float = 0.1
    """The share of the scored chunks that is not learnt from, but measured on."""
    ratio: float = 0.5
    """The ratio of the selection that the agreement is told for."""
    seed: int = 0
    """Seed of the choice of what is held out."""
    kind: Literal["ngram", "transformer"] = "ngram"
    """What predicts: a linear model of hashed n-grams, on the CPU; or a small transformer without its head,
    fine-tuned."""
    ngram: NgramConfig = NgramConfig()
    """The n-gram model."""
    transformer: TransformerConfig = TransformerConfig()
    """The transformer."""
    dtype: Dtype = "auto"
    """What the transformer computes in, its weights being float32; auto: bfloat16 on a GPU, float32 on the
    CPU."""
    device: str = "auto"
    """Of the transformer: auto, cpu, cuda, cuda:1, …"""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require(0 < self.held_out < 1, f"held_out must be above 0 and below 1, got {self.held_out}")
        require(0 < self.ratio < 1, f"ratio must be above 0 and below 1, got {self.ratio}")
        require(
            (self.transformer.init_from is not None) == (self.kind == "transformer"),
            "kind transformer goes with transformer.init_from: give both or none",
        )
        require_device(self.device)
        require_count(self, "seed", low=0, high=MAX_SEED)


@dataclass(frozen=True)
class ProxyScoreConfig:
    """Predict the scores of a whole corpus with what proxy fit has learnt."""

    data: str
    """The corpus folder."""
    proxy: str
    """The folder that proxy fit wrote."""
    output: str
    """The folder for the scores."""
    shard_chunks: int = 16_384
    """Chunks per score file; a killed run continues after the last whole file."""
    dtype: Dtype = "auto"
    """What a transformer computes in; auto: bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    """Of a transformer: auto, cpu, cuda, cuda:1, …"""
    batch_tokens: Optional[int] = field(default=None, metadata={"default": BATCH_TOKENS})
    """Tokens per packed batch of a transformer."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require_count(self, "shard_chunks", high=MAX_SHARD_CHUNKS)
        require_count(self, "batch_tokens", high=MAX_BATCH_TOKENS)
        require_device(self.device)
