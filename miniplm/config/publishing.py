"""Settings of what follows training: evaluate, generate, export, export data, ledger, report; and of run and
demo, which chain the stages."""

from dataclasses import dataclass, field
from typing import ClassVar, List, Literal, Optional, Tuple

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

MAX_NEW_TOKENS = 2**20


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss and perplexity of a model on a held-out corpus, per domain, and its answers to tasks."""

    model: str
    """The model: training output, checkpoint, local folder, Hugging Face id, or .gguf file."""
    data: Optional[str] = None
    """The corpus folder to evaluate on."""
    tasks: Tuple[str, ...] = ()
    """Zero-shot tasks: names of lm-eval's (hellaswag, piqa, …) and .yaml files of one's own."""
    output: Optional[str] = None
    """A JSON file for the figures."""
    document_mask: bool = False
    """Attention within each document only."""
    dtype: Dtype = "auto"
    """The model's dtype; auto: bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    batch_tokens: Optional[int] = field(default=None, metadata={"default": BATCH_TOKENS})
    """Tokens per packed batch."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only for models that you trust."""

    def __post_init__(self) -> None:
        require(bool(self.data or self.tasks), "give data, tasks, or both")
        require_texts(self)
        require_output(self.output)
        require_device(self.device)
        require_count(self, "batch_tokens", high=MAX_BATCH_TOKENS)


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

    def __post_init__(self) -> None:
        require_texts(self, "prompt")
        require_device(self.device)
        require_count(self, "max_new_tokens", high=MAX_NEW_TOKENS)
        require_finite(self, "temperature")
        require_count(self, "seed", low=0, high=MAX_SEED)
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")


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
    gguf: Optional[Literal["f16", "q8_0"]] = None
    """Also write a .gguf file for llama.cpp, its matrices in half precision (f16) or in 8 bits (q8_0)."""
    license: str = "apache-2.0"
    """The licence on the card."""
    language: Tuple[str, ...] = ("en",)
    """The languages on the card."""
    datasets: Tuple[str, ...] = ()
    """Hugging Face ids of the datasets on the card; default: the corpus's source, where that is one."""
    evaluation: Optional[str] = None
    """A JSON file that evaluate wrote, for the card's table of losses."""
    push_to_hub: Optional[str] = None
    """Upload the folder to this Hugging Face repository (log in first)."""
    private: bool = False
    """Make that repository private."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)


@dataclass(frozen=True)
class ExportDataConfig:
    """Publish a corpus, refined or not, as a Hugging Face dataset with a card."""

    data: str
    """The corpus folder."""
    output: str
    """The folder to write."""
    name: Optional[str] = None
    """The dataset's name on the card; default: the output folder's."""
    license: Optional[str] = None
    """The licence on the card, which is yours to name: that of the text."""
    language: Tuple[str, ...] = ("en",)
    """The languages on the card."""
    push_to_hub: Optional[str] = None
    """Upload the folder to this Hugging Face dataset repository (log in first)."""
    private: bool = False
    """Make that repository private."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)


@dataclass(frozen=True)
class LedgerConfig:
    """Compare what runs have cost, alone and with all that was made for them."""

    POSITIONAL: ClassVar[str] = "runs"

    runs: List[str]
    """Training outputs; they may stand first, without --runs. The others are compared with the first."""
    inputs: Tuple[str, ...] = ()
    """Folders that hold what the runs were made from (corpora, scores, the reference model), or that are it;
    what lies beside the runs is found without."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "give at least one training output")
        require_texts(self)


@dataclass(frozen=True)
class ReportConfig:
    """One HTML file of what runs came to: scores, selection, losses, costs."""

    POSITIONAL: ClassVar[str] = "runs"
    SHORT: ClassVar[dict[str, str]] = {"-o": "--output"}

    runs: List[str]
    """Outputs of any stage, folders of such outputs (what run and demo write), and files of evaluate; they
    may stand first, without --runs. What they were made from is found beside them."""
    output: str = "report.html"
    """The HTML file; -o for short. A report that is there is replaced."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "give at least one output")
        require_texts(self)
        require_output(self.output)


@dataclass(frozen=True)
class RunConfig:
    """Run a pipeline file: all stages, resumable, each skipped when complete."""

    config: str
    """A YAML file with the stages in order (see configs/quickstart.yaml)."""
    output: str
    """The folder under which each stage gets a folder of its own."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)


@dataclass(frozen=True)
class DemoConfig:
    """The whole story on this machine in minutes, without a network."""

    output: str = "miniplm-demo"
    """The folder to write. The same command continues a stopped run."""
    seed: int = 10
    """Seed of the noise, of the models' first weights and data order, and of the random selection; the text
    and what of it is held out stay."""

    def __post_init__(self) -> None:
        require_texts(self)
        require_output(self.output)
        require_count(self, "seed", low=0, high=MAX_SEED)
