"""What each stage can be told: one frozen dataclass per stage, a doc string for each field, validated once.

The command line, YAML files and Python callers all build these. A wrong value raises ValueError naming the field.
"""

import json
import re
from dataclasses import dataclass, fields
from typing import List, Literal, Optional, Tuple, get_args, get_origin, get_type_hints

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _require(holds: bool, rule: str):
    if not holds:
        raise ValueError(rule)


def _require_trace(profile: Optional[str]):
    _require(profile is None or profile.endswith((".json", ".json.gz")), f"profile must be a .json or .json.gz file, got {profile}")


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a corpus of token chunks."""

    data: str
    """A .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt file (one .txt file is one document), a folder of those, or a
    Hugging Face dataset id (streamed)."""
    tokenizer: str
    """A tokenizer: Hugging Face id, local folder, or .gguf file."""
    output: str
    """The corpus folder to write."""
    text_column: str = "text"
    """The column that holds the text."""
    domain_column: Optional[str] = None
    """The column that names a document's domain; without one all documents are of the domain "default". Documents of different domains never share a chunk."""
    max_length: int = 1024
    """Predictions per chunk: a chunk holds at most max_length + 1 token ids."""
    take: Tuple[float, float] = (0.0, 1.0)
    """The share of the documents to take, as a range of a hash of their text: [0, 0.05] and [0.05, 1] are disjoint random
    splits, equal texts fall into the same one."""
    max_bad_fraction: float = 0.0
    """The largest share of unreadable records (bad JSON, missing column, not UTF-8, null) to skip; past it the run stops."""
    eos_token: Optional[str] = None
    """The token that ends a document, where the tokenizer names none."""
    subset: Optional[str] = None
    """The configuration of a Hugging Face dataset."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    workers: Optional[int] = None
    """Worker processes; default: one per CPU core. 1: no extra process."""
    shard_tokens: int = 33_554_432
    """Tokens per file of the corpus; a killed run continues after the last whole file."""

    def __post_init__(self):
        _require(self.max_length >= 1, f"max_length must be at least 1, got {self.max_length}")
        _require(0 <= self.take[0] < self.take[1] <= 1, f"take must be two numbers 0 <= from < to <= 1, got {list(self.take)}")
        _require(0 <= self.max_bad_fraction <= 1, f"max_bad_fraction must be between 0 and 1, got {self.max_bad_fraction}")
        _require(self.workers is None or self.workers >= 1, f"workers must be at least 1, got {self.workers}")
        _require(self.shard_tokens >= 1, f"shard_tokens must be at least 1, got {self.shard_tokens}")


@dataclass(frozen=True)
class ScoreConfig:
    """Score every chunk of a corpus with a teacher, a reference model, or both."""

    data: str
    """The corpus folder that prepare wrote."""
    output: str
    """The folder for the scores."""
    teacher: Optional[str] = None
    """The teacher: Hugging Face id, local folder (a training output too), or .gguf file."""
    reference: Optional[str] = None
    """The reference model, likewise."""
    document_mask: bool = False
    """Attention within each document only; the default is as published: across the documents of a chunk."""
    dtype: Dtype = "auto"
    """The models' dtype; auto: bfloat16 on a GPU, float32 on the CPU."""
    precision: Optional[Literal["fp8"]] = None
    """fp8: the layers' matrix products in float8, with a scale per row; how well the ranks of up to 1,024 chunks agree with those without
    is told at the end. Default: all in dtype."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    batch_tokens: Optional[int] = None
    """Tokens per packed batch; default 2,048 on the CPU, 65,536 on a GPU."""
    shard_rows: Optional[int] = None
    """Chunks per score file; default 256 on the CPU, 16,384 on a GPU. A killed run continues after the last whole file."""
    vocab_size: Optional[int] = None
    """Softmax over the first so many ids; default: the lower head of the two models (one model alone: its own). Needed only
    when models with heads of unequal height are scored one at a time."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only for models that you trust."""
    profile: Optional[str] = None
    """Write a Chrome trace of three batches near the start to this file (.json or .json.gz)."""

    def __post_init__(self):
        _require(bool(self.teacher or self.reference), "give --teacher, --reference, or both")
        _require_trace(self.profile)
        for name in ("batch_tokens", "shard_rows", "vocab_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")


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
    """Keep the int(ratio * rows) best chunks. The default rule, with 0.5."""
    token_budget: Optional[int] = None
    """Instead: keep the best chunks as long as their tokens fit into this budget."""
    threshold: Optional[float] = None
    """Instead: keep every chunk with a score of at least this (nats per token)."""
    per_domain: bool = False
    """Apply the ratio, or the domain's share of the token budget, to each domain on its own."""
    random_seed: Optional[int] = None
    """Choose at random with this seed instead of by score: the control experiment. Chunks without a finite score are left out here too."""

    def __post_init__(self):
        rules = [name for name in ("ratio", "token_budget", "threshold") if getattr(self, name) is not None]
        _require(len(rules) <= 1, f"give one of ratio, token_budget and threshold, got {' and '.join(rules)}")
        if not rules:
            object.__setattr__(self, "ratio", 0.5)
        _require(self.ratio is None or 0 < self.ratio <= 1, f"ratio must be above 0 and at most 1, got {self.ratio}")
        _require(self.token_budget is None or self.token_budget >= 1, f"token_budget must be at least 1, got {self.token_budget}")
        _require(not (self.threshold is not None and self.per_domain), "per_domain changes nothing with threshold: leave one out")
        _require(not (self.threshold is not None and self.random_seed is not None), "random_seed needs ratio or token_budget, not threshold")
        _require(self.random_seed is None or self.random_seed >= 0, f"random_seed must not be negative, got {self.random_seed}")
        _require(1 <= len(self.scores) <= 2, f"scores takes one or two folders, got {len(self.scores)}")


@dataclass(frozen=True)
class StudentConfig:
    """The architecture of a model that is trained from scratch; names as in transformers. Default: the 200M student."""

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

    def __post_init__(self):
        _require(self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
                 f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: change one or set head_dim")
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        _require(self.num_attention_heads % kv_heads == 0,
                 f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {kv_heads}")


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
    """Gradients are clipped to this norm."""

    def __post_init__(self):
        _require(self.lr > 0, f"lr must be above 0, got {self.lr}")
        _require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must be between 0 and 1, got {self.min_lr_ratio}")
        _require(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        _require(self.max_grad_norm > 0, f"max_grad_norm must be above 0, got {self.max_grad_norm}")


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a model on a corpus."""

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
    teacher: Optional[str] = None
    """Vanilla KD: learn from this model's predictions too: Hugging Face id, local folder (a training output too), or .gguf file."""
    alpha: float = 0.5
    """With a teacher: the loss is (1 - alpha) * cross-entropy + alpha * KL divergence from the teacher."""
    temperature: float = 1.0
    """With a teacher: both models' logits are divided by this in the KL divergence, which is not multiplied by its square."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and schedule."""
    steps: Optional[int] = None
    """Optimiser steps; default: one pass over the corpus."""
    batch_tokens: int = 524_288
    """Tokens per optimiser step (the global batch)."""
    micro_batch_tokens: Optional[int] = None
    """Tokens per forward and backward pass; default 4,096 on the CPU, on a GPU what fits, up to 65,536. Does not change the mathematics."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs and compute each layer anew in the backward pass: less memory, a third more of the layers' FLOPs."""
    shuffle: bool = True
    """Visit the chunks in a new random order in every epoch; false: in corpus order, as published."""
    seed: int = 10
    """Seed of the initial weights and of the data order."""
    document_mask: bool = False
    """Attention within each document only; the default is as published: across the documents of a chunk."""
    eval_data: Optional[str] = None
    """A held-out corpus for the evaluation loss."""
    eval_interval: int = 1_000
    """Steps between evaluations (one also at the end)."""
    eval_rows: int = 1_000
    """Chunks of the held-out corpus to evaluate on, from its start."""
    checkpoint_interval: int = 1_000
    """Steps between checkpoints (one also at the end, and on SIGTERM and SIGINT)."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep."""
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
    profile: Optional[str] = None
    """Write a Chrome trace of three steps near the start to this file (.json or .json.gz)."""

    def __post_init__(self):
        for name in ("batch_tokens", "eval_interval", "eval_rows", "checkpoint_interval", "keep_checkpoints", "log_interval", "max_skipped_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.micro_batch_tokens is None or self.micro_batch_tokens >= 1, f"micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
        _require(not (self.init_from and self.model_config), "give init_from or model_config, not both")
        _require(self.model == StudentConfig() or not (self.init_from or self.model_config),
                 "model.* has no say beside init_from or model_config: leave it out")
        _require(0 <= self.alpha <= 1, f"alpha must be between 0 and 1, got {self.alpha}")
        _require(self.temperature > 0, f"temperature must be above 0, got {self.temperature}")
        _require(bool(self.teacher) or (self.alpha, self.temperature) == (0.5, 1.0), "alpha and temperature have no say without teacher: leave them out")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require_trace(self.profile)
        _require(self.dtype != "float16", "float16 needs loss scaling, which is not built: use bfloat16 or float32")


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss and perplexity of a model on a held-out corpus, per domain."""

    model: str
    """The model: training output, checkpoint, local folder, Hugging Face id, or .gguf file."""
    data: str
    """The corpus folder to evaluate on."""
    output: Optional[str] = None
    """A JSON file for the figures."""
    document_mask: bool = False
    """Attention within each document only."""
    dtype: Dtype = "auto"
    """The model's dtype; auto: bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    batch_tokens: Optional[int] = None
    """Tokens per packed batch; default 2,048 on the CPU, 65,536 on a GPU."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only for models that you trust."""

    def __post_init__(self):
        _require(self.batch_tokens is None or self.batch_tokens >= 1, f"batch_tokens must be at least 1, got {self.batch_tokens}")


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt."""

    model: str
    """The model: training output, checkpoint, local folder, Hugging Face id, or .gguf file."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Dtype = "auto"
    """The model's dtype; auto: bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only for models that you trust."""

    def __post_init__(self):
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        _require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class ExportConfig:
    """Publish a checkpoint as a Hugging Face folder with a model card."""

    checkpoint: str
    """A training output (its latest checkpoint) or one checkpoint."""
    output: str
    """The folder to write."""
    name: Optional[str] = None
    """The model's name on the card; default: the output folder's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the published weights."""
    license: str = "apache-2.0"
    """The licence on the card."""
    language: List[str] = ("en",)
    """The languages on the card."""
    datasets: List[str] = ()
    """Hugging Face ids of the datasets on the card; default: the corpus's source, where that is one."""
    evaluation: Optional[str] = None
    """A JSON file that evaluate wrote, for the card's table of losses."""
    push_to_hub: Optional[str] = None
    """Upload the folder to this Hugging Face repository (log in first)."""
    private: bool = False
    """Make that repository private."""


@dataclass(frozen=True)
class RunConfig:
    """Run a pipeline file: all stages, resumable, each skipped when complete."""

    config: str
    """A YAML file with the stages in order (see configs/quickstart.yaml)."""
    output: str
    """The folder under which each stage gets a folder of its own."""


@dataclass(frozen=True)
class DemoConfig:
    """The whole story on this machine in minutes, without a network."""

    output: str = "miniplm-demo"
    """The folder to write."""


def _parser(config_class, **options):
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__, **options)
    if "config" not in {field.name for field in fields(config_class)}:
        parser.add_argument("--config", action="config", help="A YAML file with any of these settings; flags after it win.")
    parser.add_class_arguments(config_class)
    return parser


def _build(parser, config_class, namespace):
    values = {name: value for name, value in vars(parser.instantiate(namespace)).items() if name in {field.name for field in fields(config_class)}}
    return config_class(**values)


def from_dict(config_class, values: dict):
    """Build a config from plain values as YAML holds them, nested ones too. ValueError on an unknown key or a wrong type."""
    from jsonargparse import ArgumentError

    parser = _parser(config_class)
    try:
        return _build(parser, config_class, parser.parse_object(values))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_one_line(error)) from None


def from_arguments(config_class, arguments: list, prog: str):
    """Build a config from command-line flags (--some-name or --some_name, lists by repetition or as "a b") and --config YAML.
    ValueError on an unknown flag or a wrong value; exits after --help and --print_config."""
    from jsonargparse import ArgumentError

    parser = _parser(config_class, prog=prog)
    try:
        return _build(parser, config_class, parser.parse_args(_normalize(config_class, arguments)))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_one_line(error)) from None


def _normalize(config_class, arguments: list) -> list:
    """Spell the flags as jsonargparse wants them: underscores, booleans with a value, lists as one JSON value."""
    kinds, result, lists = get_type_hints(config_class), [], {}
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        position += 1
        if not flag.startswith("--"):
            result.append(arguments[position - 1])
            continue
        flag = flag.replace("-", "_").replace("__", "--", 1)
        kind = kinds.get(flag[2:].split(".")[0])
        values = [value] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            values.append(arguments[position])
            position += 1
        if get_origin(kind) in (list, tuple) and values and not values[0].startswith("["):
            lists.setdefault(flag, []).extend(values)
        elif kind is bool and not values:
            result.append(f"{flag}=true")
        elif len(values) == 1:
            result.append(f"{flag}={values[0]}")
        else:
            result.extend([flag, *values])
    for flag, values in lists.items():
        kind = get_args(kinds[flag[2:]])[0]
        result.append(f"{flag}={json.dumps([value if kind is str else json.loads(value) for value in values])}")
    return result


def _one_line(error) -> str:
    """jsonargparse's message without its structure of several lines."""
    text = " ".join(str(error).split())
    key, value = re.search(r'Parser key "([^"]*)"', text), re.search(r"Given value: (.*)$", text)
    kinds = [kind for kind in dict.fromkeys(re.findall(r"<class '(\w+)'>", text.partition("Given value type")[0])) if kind != "NoneType"]
    if key and value and kinds:
        return f"{key[1]}: expected {' or '.join(kinds)}, got {value[1]!r}"
    return text
