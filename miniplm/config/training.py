"""Settings of train: the student, the optimiser, the run."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Optional, Tuple

from .checks import (
    MAX_BATCH_TOKENS,
    MAX_SEED,
    MAX_VOCABULARY,
    MICRO_BATCH_TOKENS,
    Dtype,
    require,
    require_count,
    require_device,
    require_finite,
    require_output,
    require_texts,
    require_trace,
)

# Well above any model that one machine trains: what is larger is a slip of the keyboard.
MAX_WIDTH = 2**16
MAX_FEED_FORWARD = 2**18
MAX_LAYERS = 1_024
MAX_HEADS = 1_024
MAX_HEAD_DIM = 256  # what the attention kernels are tested with
MAX_POSITIONS = 2**31 - 1
MAX_STEP_TOKENS = 2**26  # a step's ids are in memory at once
MAX_STEPS = 2**31 - 1
MAX_TIMEOUT = 604_800  # a week


@dataclass(frozen=True)
class StudentConfig:
    """The architecture of a model that is trained from scratch; names as in transformers. Default: the 200M
    student."""

    model_type: Literal["qwen2", "llama", "qwen3"] = "qwen2"
    """The architecture."""
    hidden_size: int = 768
    """Width."""
    intermediate_size: int = 2112
    """Width of the feed-forward layer."""
    num_hidden_layers: int = 12
    """Layers."""
    num_attention_heads: int = 12
    """Query heads."""
    num_key_value_heads: Optional[int] = None
    """Key and value heads; default: as many as query heads."""
    head_dim: Optional[int] = None
    """Width of a head; default: hidden_size / num_attention_heads."""
    vocab_size: Optional[int] = None
    """Rows of the embedding; default: the length of the corpus's tokenizer."""
    tie_word_embeddings: bool = True
    """Use the embedding as the head."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary embedding."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the norms."""
    max_position_embeddings: int = 32_768
    """The longest context that the exported model states."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        group = "model."
        require_count(self, "hidden_size", high=MAX_WIDTH, group=group)
        require_count(self, "intermediate_size", high=MAX_FEED_FORWARD, group=group)
        require_count(self, "num_hidden_layers", high=MAX_LAYERS, group=group)
        require_count(self, "num_attention_heads", "num_key_value_heads", high=MAX_HEADS, group=group)
        require_count(self, "vocab_size", high=MAX_VOCABULARY, group=group)
        require_count(self, "max_position_embeddings", high=MAX_POSITIONS, group=group)
        require_finite(self, "rope_theta", "rms_norm_eps", positive=True, group=group)
        require_finite(self, "initializer_range", group=group)
        require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
            f"{self.num_attention_heads}: change one or set head_dim",
        )
        head_dim = self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim
        require(
            2 <= head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0,
            f"model.head_dim must be even, from 2 to {MAX_HEAD_DIM}, got {head_dim}",
        )
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        require(
            self.num_attention_heads % kv_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on all parameters, linear warm-up, cosine decay."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The final learning rate as a share of the peak."""
    warmup_steps: int = 2_000
    """Steps of linear warm-up."""
    betas: Tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Weight decay, on all parameters."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; .inf: never."""

    def __post_init__(self) -> None:
        group = "optimizer."
        require_finite(self, "lr", "eps", positive=True, group=group)
        require_finite(self, "weight_decay", group=group)
        require_count(self, "warmup_steps", low=0, high=MAX_STEPS, group=group)
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas must be two numbers from 0 to below 1, got {list(self.betas)}",
        )
        require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must be between 0 and 1, got {self.min_lr_ratio}")
        require(self.max_grad_norm > 0, f"max_grad_norm must be above 0, got {self.max_grad_norm}")


@dataclass(frozen=True)
class DistillConfig:
    """Vanilla KD: the student learns a teacher's predictions too."""

    teacher: Optional[str] = None
    """The teacher: Hugging Face id, local folder (a training output too), or .gguf file. Default: none."""
    alpha: float = 0.5
    """The loss is (1 - alpha) * cross-entropy + alpha * KL divergence from the teacher."""
    temperature: float = 1.0
    """Both models' logits are divided by this in the KL divergence, which is not multiplied by its square."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"distill.alpha must be between 0 and 1, got {self.alpha}")
        require_finite(self, "temperature", positive=True, group="distill.")
        require_texts(self, group="distill.")
        require(
            bool(self.teacher) or (self.alpha, self.temperature) == (0.5, 1.0),
            "distill.alpha and distill.temperature have no say without distill.teacher: leave them out",
        )


@dataclass(frozen=True)
class TokensConfig:
    """Training on the best tokens of each global batch alone."""

    scores: Optional[str] = None
    """The folder in which score --tokens has scored the corpus. Default: all tokens are trained on."""
    ratio: float = 0.6
    """Train on the int(ratio * tokens) best tokens of each global batch."""
    rule: Literal["difference", "teacher_loss", "reference_loss"] = "difference"
    """What tokens are compared by: the teacher's minus the reference's log-probability; or how unlikely one
    of the two finds them, the control that needs no second model."""

    def __post_init__(self) -> None:
        require(0 < self.ratio <= 1, f"tokens.ratio must be above 0 and at most 1, got {self.ratio}")
        require_texts(self, group="tokens.")
        require(
            bool(self.scores) or (self.ratio, self.rule) == (0.6, "difference"),
            "tokens.ratio and tokens.rule have no say without tokens.scores: give the folder of score "
            "--tokens, or leave them out",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to write a checkpoint, and how many of them stay."""

    interval: int = 1_000
    """Steps between checkpoints (one also at the end, and on SIGTERM and SIGINT)."""
    keep: int = 2
    """How many of the latest checkpoints to keep."""

    def __post_init__(self) -> None:
        require_count(self, "interval", "keep", high=MAX_STEPS, group="checkpoint.")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run that torchrun starts is spread over its processes, the ranks. None of it changes the
    mathematics."""

    replicate: int = 1
    """Copies of the model, each in slices on as many ranks; as many as ranks: every rank has all of it."""
    timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""

    def __post_init__(self) -> None:
        require_count(self, "replicate", high=MAX_STEPS, group="parallel.")
        require_finite(self, "timeout", positive=True, group="parallel.")
        require(self.timeout <= MAX_TIMEOUT, f"parallel.timeout must be at most {MAX_TIMEOUT:,} seconds")


@dataclass(frozen=True)
class EvalConfig:
    """The loss on a corpus that is not trained on."""

    data: Optional[str] = None
    """The evaluation corpus, held out. Default: no evaluation."""
    interval: int = 1_000
    """Steps between evaluations (one also at the end)."""
    chunks: int = 1_000
    """Chunks of the evaluation corpus to evaluate on, from its start."""

    def __post_init__(self) -> None:
        require_count(self, "interval", high=MAX_STEPS, group="eval.")
        require_count(self, "chunks", group="eval.")
        require_texts(self, group="eval.")


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a model on a corpus."""

    ALIASES: ClassVar[dict[str, str]] = {
        "teacher": "distill.teacher",
        "alpha": "distill.alpha",
        "temperature": "distill.temperature",
        "token_scores": "tokens.scores",
        "token_ratio": "tokens.ratio",
        "token_rule": "tokens.rule",
        "eval_data": "eval.data",
        "eval_interval": "eval.interval",
        "eval_rows": "eval.chunks",
        "checkpoint_interval": "checkpoint.interval",
        "keep_checkpoints": "checkpoint.keep",
    }
    """Flat names; most are from before there were groups."""

    data: str
    """The corpus folder: what prepare or select wrote."""
    output: str
    """The folder for checkpoints and metrics. The same command continues a stopped run."""
    model: StudentConfig = StudentConfig()
    """The architecture, for training from scratch."""
    init_from: Optional[str] = None
    """Start from these weights instead: Hugging Face id, local folder or training output."""
    model_config: Optional[str] = None
    """Take the architecture from a transformers config.json instead (from scratch)."""
    distill: DistillConfig = DistillConfig()
    """A teacher whose predictions are learned too."""
    tokens: TokensConfig = TokensConfig()
    """Training on the best tokens alone."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and schedule."""
    steps: Optional[int] = None
    """Optimiser steps; default: one pass over the corpus."""
    flops: Optional[float] = None
    """Instead: as many steps as cost nearest to so many FLOPs, forward, backward and a teacher's forward."""
    match_flops_of: Optional[str] = None
    """Instead: as many steps as cost what the finished run in this training output did."""
    batch_tokens: int = 524_288
    """Tokens per optimiser step (the global batch)."""
    micro_batch_tokens: Optional[int] = field(default=None, metadata={"default": MICRO_BATCH_TOKENS})
    """Tokens per forward and backward pass; by default fewer where they do not fit into a GPU. Does not
    change the mathematics."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs and compute each layer anew in the backward pass: less memory, a third
    more of the layers' FLOPs."""
    shuffle: bool = True
    """Visit the chunks in a new random order in every epoch; false: in corpus order, as published."""
    seed: int = 10
    """Seed of the initial weights and of the data order."""
    document_mask: bool = False
    """Attention within each document only; the default is as published: across the documents of a chunk."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on a held-out corpus."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    parallel: ParallelConfig = ParallelConfig()
    """Several processes."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    max_skipped_steps: int = 10
    """So many steps in a row with a loss or gradient that is not finite stop the run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    dtype: Dtype = "auto"
    """Compute dtype; auto: bfloat16 on a GPU, float32 on the CPU. Master weights are float32."""
    peak_tflops: Optional[float] = None
    """The machine's peak for the MFU figure; default: a matrix product measured at the start."""
    track: Optional[Literal["wandb", "trackio"]] = None
    """Send the figures there too, beside TensorBoard; the package must be installed."""
    profile: Optional[str] = None
    """Write a Chrome trace of three steps near the start to this file (.json or .json.gz)."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require_device(self.device)
        require_count(self, "batch_tokens", high=MAX_STEP_TOKENS)
        require_count(self, "micro_batch_tokens", high=MAX_BATCH_TOKENS)
        require_count(self, "steps", "log_interval", "max_skipped_steps", high=MAX_STEPS)
        require_count(self, "seed", low=0, high=MAX_SEED)
        require_finite(self, "peak_tflops", "flops", positive=True)
        lengths = [name for name in ("steps", "flops", "match_flops_of") if getattr(self, name) is not None]
        require(
            len(lengths) <= 1,
            f"give one of steps, flops and match_flops_of, got {' and '.join(lengths)} (--steps null takes "
            f"back those of a file)",
        )
        require(not (self.init_from and self.model_config), "give init_from or model_config, not both")
        require(
            self.model == StudentConfig() or not (self.init_from or self.model_config),
            "model.* has no say beside init_from or model_config: leave it out",
        )
        require_trace(self.profile)
        require(
            self.dtype != "float16", "float16 needs loss scaling, which is not built: use bfloat16 or float32"
        )
