"""How large each version of the experiment is: docs/experiments/plan.md in figures; and at toy size."""

from dataclasses import dataclass, field, replace
from typing import Any

DOMAINS = [
    "essays",
    "encyclopedic",
    "dictionary",
    "kernel",
    "manuals",
    "api",
    "javadoc",
    "code",
    "ham",
    "spam",
]
ALL = 10**12  # bytes: what there is
RATES = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Version:
    pipelines: str  # the folder in pipelines/
    bytes_by_domain: dict[str, int]  # of text in the pack
    held_out_bytes: int  # of each clean set
    minutes: float  # what is not begun or ended by then is dropped
    settings: dict[str, Any]  # for <name> in the pipeline files
    students: dict[str, dict[str, Any]]  # name → for <name>, beside those
    seeds: dict[str, tuple[int, ...]]  # arm → its seeds, in the order of the queue
    steps: int
    tuning_steps: int
    steps_of: dict[str, float] = field(default_factory=dict)  # arm → its share of `steps`, where not 1
    vocabulary: int | None = None  # of the student's own tokenizer
    tuning_seed: int = 10
    rates: tuple[float, ...] = RATES


def llama(width: int, layers: int, heads: int, feed_forward: int) -> dict[str, Any]:
    """Settings of train's `model`."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


CPU = Version(
    pipelines="cpu",
    bytes_by_domain={  # tokens of the plan · bytes per token of SmolLM2's tokenizer
        "essays": 1_732_000,
        "encyclopedic": 1_725_000,
        "dictionary": 327_000,
        "kernel": 234_000,
        "api": 214_000,
        "javadoc": 361_000,
        "code": 124_000,
        "ham": 160_000,
        "spam": 160_000,
    },
    held_out_bytes=200_000,
    minutes=120,
    settings={
        "length": 256,
        "in_pool": [0.0, 0.04],
        "reference_split": [0.04, 0.28],
        "pool": [0.28, 1.0],
        "reference": llama(128, 3, 4, 344),
        "reference_steps": 300,
        "reference_batch": 1024,
        "reference_warmup": 30,
        "batch_tokens": 2048,
        "prose": ["essays=0.5", "encyclopedic=0.5"],
    },
    students={"S": {"model": llama(256, 4, 4, 688)}},
    seeds={arm: (11, 12, 13, 14, 15) for arm in ("C", "M", "O")},
    steps=240,
    tuning_steps=120,
    vocabulary=8192,
)
GPU = Version(
    pipelines="gpu",
    bytes_by_domain={
        **dict.fromkeys(DOMAINS, ALL),
        "api": 48_000_000,
        "javadoc": 29_000_000,
        "code": 42_000_000,
    },
    held_out_bytes=ALL,
    minutes=25,
    settings={
        "length": 512,
        "in_pool": [0.0, 0.015],
        "reference_split": [0.015, 0.125],
        "pool": [0.125, 1.0],
        "reference": llama(192, 8, 6, 512),
        "reference_steps": 250,
        "reference_batch": 32_768,
        "reference_warmup": 25,
        "batch_tokens": 32_768,
    },
    students={"S": {"model": llama(384, 8, 6, 1024)}, "M": {"model": llama(512, 10, 8, 1408)}},
    seeds={
        **{arm: (11, 12, 13, 14, 15) for arm in ("C", "M")},
        **{arm: (11, 12, 13) for arm in ("Mp", "K", "C-half", "C-double", "MK", "M4")},
    },
    steps=976,
    tuning_steps=244,
    steps_of={"C-half": 0.5, "C-double": 2},
)
TOY = {"reference": llama(16, 1, 2, 32), "reference_steps": 4, "reference_batch": 256, "reference_warmup": 1}
TOY |= {"batch_tokens": 256, "length": 32, "in_pool": [0.0, 0.2], "reference_split": [0.2, 0.4]}
TOY |= {"pool": [0.4, 1.0], "prose": [f"{domain}=0.1" for domain in DOMAINS]}


def toy(version: Version, **changes: Any) -> Version:
    """A version in seconds: every stage, no meaning."""
    students = {"S": {"model": llama(32, 2, 2, 64)}}
    settings = {**version.settings, **TOY}
    return replace(version, settings=settings, students=students, steps=8, tuning_steps=2, **changes)


VERSIONS = {
    "cpu": CPU,
    "gpu": GPU,
    "toy-cpu": toy(
        CPU,
        seeds=dict.fromkeys(CPU.seeds, (11,)),
        vocabulary=400,
        bytes_by_domain=dict.fromkeys(DOMAINS, 30_000),
        held_out_bytes=2_000,
        rates=RATES[:2],
    ),
    "toy-gpu": toy(
        GPU,
        seeds=dict.fromkeys(GPU.seeds, (11,)),
        bytes_by_domain=dict.fromkeys(DOMAINS, 30_000),
        held_out_bytes=2_000,
        rates=RATES[:2],
    ),
}
