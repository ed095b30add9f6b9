"""configs/: one file per published model, its shape and its hyper-parameters."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from miniplm.config import OptimizerConfig, StudentConfig, TrainConfig, from_arguments
from miniplm.models.decoder import Decoder, student_config

ROOT = Path(__file__).parents[1]


class Shape(NamedTuple):
    """A row of the table of models in docs/design.md; heads are as many as key and value heads."""

    vocabulary: int
    d: int
    feed_forward: int
    layers: int
    heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool
    published: str  # how many parameters, as the paper and the model cards have it


QWEN = 151_936
SHAPES = {
    "qwen_104m_reference": Shape(QWEN, 512, 1408, 8, 8, 64, True, True, "104M"),
    "qwen_200m": Shape(QWEN, 768, 2112, 12, 12, 64, True, True, "203M"),
    "qwen_500m": Shape(QWEN, 1024, 2816, 24, 16, 64, True, True, "464M"),
    "qwen_1.2b": Shape(QWEN, 1536, 4224, 24, 16, 96, False, True, "1161M"),  # 4.64 GB of float32
    "llama3_212m": Shape(128_256, 768, 3072, 12, 12, 64, True, False, "212M"),
}
PEAK_LR = {
    "qwen_104m_reference": 6e-4,
    "qwen_200m": 6e-4,
    "qwen_500m": 3e-4,
    "qwen_1.2b": 2.5e-4,
    "llama3_212m": 6e-4,
    "mamba_130m": 2e-3,
}


def settings(name: str) -> TrainConfig:
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--data", "corpus", "--output", "run"]
    return from_arguments(TrainConfig, arguments, prog="miniplm train")


def count_by_hand(shape: Shape) -> int:
    """The parameters of a decoder, from the shapes of its matrices."""
    d, attention = shape.d, shape.heads * shape.head_dim
    embeddings = shape.vocabulary * d * (1 if shape.tied else 2)
    projections = 4 * d * attention + (3 * attention if shape.qkv_bias else 0)  # q, k, v, o
    feed_forward = 3 * d * shape.feed_forward  # gate, up, down
    norms = 2 * d
    return embeddings + shape.layers * (projections + feed_forward + norms) + d  # the last norm


@pytest.mark.parametrize("name", SHAPES)
def test_decoders_have_the_published_shapes(name):
    shape, model = SHAPES[name], settings(name).model
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (
        shape.d,
        shape.feed_forward,
        shape.layers,
    )
    assert (model.vocab_size, model.tie_word_embeddings) == (shape.vocabulary, shape.tied)
    with torch.device("meta"):
        decoder = Decoder(student_config(model, vocab_size=shape.vocabulary, eos_token_id=0))
    assert decoder.num_parameters() == count_by_hand(shape)
    assert f"{count_by_hand(shape) / 1e6:.0f}M" == shape.published
    attention = decoder.model.layers[0].self_attn
    assert attention.head_dim == shape.head_dim
    assert attention.k_proj.out_features == shape.heads * shape.head_dim
    assert decoder.config.max_position_embeddings == 32_768
    if name.startswith("qwen"):
        assert (model.rope_theta, model.rms_norm_eps) == (1e6, 1e-6)


def test_mamba_has_the_published_shape():
    from transformers import AutoConfig, AutoModelForCausalLM

    path = ROOT / settings("mamba_130m").model_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    d, inner, state, conv, rank, layers, vocabulary = 768, 1536, 16, 4, 48, 24, 65_024
    layer = sum(
        [
            d,  # norm
            d * 2 * inner,  # in_proj: the state's input and the gate
            inner * conv + inner,  # the convolution over time, with a bias
            inner * (rank + 2 * state),  # x_proj: the time step, B and C
            rank * inner + inner,  # dt_proj, with a bias
            inner * state,  # A
            inner,  # D
            inner * d,  # out_proj
        ]
    )
    by_hand = vocabulary * d + layers * layer + d
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand
    assert f"{4 * by_hand / 1e6:.0f} MB" == "562 MB"  # of float32, as published


@pytest.mark.parametrize("name", PEAK_LR)
def test_hyper_parameters_are_the_published_ones(name):
    config = settings(name)
    mamba = name == "mamba_130m"
    assert config.optimizer == OptimizerConfig(
        lr=PEAK_LR[name],
        min_lr_ratio=0.005 if mamba else 0.1,
        warmup_steps=10_000 if mamba else 2_000,
        betas=(0.9, 0.95) if mamba else (0.9, 0.98),
        eps=1e-6,
        weight_decay=0.1 if mamba else 0.01,
        max_grad_norm=1.0,
    )
    assert config.batch_tokens == 512 * 1024
    assert (config.shuffle, config.seed, config.document_mask) == (False, 10, False)
    tokens = config.steps * config.batch_tokens
    assert f"{tokens / 1e9:.1f}B" == ("5.0B" if name == "qwen_104m_reference" else "52.4B")


def test_every_preset_is_tested():
    presets = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"quickstart"}
    assert presets == PEAK_LR.keys() == SHAPES.keys() | {"mamba_130m"}


QWEN_1_8B = StudentConfig(
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    tie_word_embeddings=False,
)


def decoder(shape: StudentConfig) -> Decoder:
    """A model with Qwen's vocabulary that takes no memory."""
    with torch.device("meta"):
        return Decoder(student_config(shape, vocab_size=QWEN, eos_token_id=0))


def test_the_costs_in_reproducing_md_are_the_counted_ones():
    page = (ROOT / "docs" / "reproducing.md").read_text()

    of_teacher = decoder(QWEN_1_8B).flops_per_token(1024)
    reference, student = (
        decoder(settings(name).model).flops_per_token(1024) for name in ("qwen_104m_reference", "qwen_200m")
    )
    for flops in (3 * reference * 5e9, of_teacher * 1e11, reference * 1e11, 3 * student * 512 * 1024 * 1e5):
        hours = [flops / (share * 989e12) / 3600 for share in (0.4, 0.6)]
        shown = [f"{value:.1f}" if value < 10 else f"{value:.0f}" for value in hours]
        assert f"| {flops:.2e} | {shown[0]} | {shown[1]} |".replace("e+", "e") in page
    assert f"{3 * student + of_teacher:.2e} FLOPs a token".replace("e+0", "e") in page
    assert f"alone costs {3 * student:.2e}".replace("e+0", "e") in page
    assert f"it has {round(1e2 * 3 * student / (3 * student + of_teacher))}k\nsteps" in page


def test_the_figures_in_scaling_md_are_the_computed_ones():
    page = (ROOT / "docs" / "scaling.md").read_text()
    models = {name: decoder(settings(name).model) for name in ("qwen_200m", "qwen_500m", "qwen_1.2b")}
    teacher = decoder(QWEN_1_8B).flops_per_token(1024)
    reference = decoder(settings("qwen_104m_reference").model).flops_per_token(1024)
    tokens = 512 * 1024 * 1e5
    flops = [(teacher + reference) * 1e11]
    flops += [3 * model.flops_per_token(1024) * tokens for model in models.values()]
    flops.append((3 * models["qwen_200m"].flops_per_token(1024) + teacher) * tokens)
    for total in flops:
        cells = [f"{total:.2e}".replace("e+", "e")]
        for gpus in (1, 8, 64):
            hours = [total / (share * 989e12) / 3600 / gpus for share in (0.4, 0.6)]
            cells.append(" to ".join(f"{value:.{1 if value < 10 else 0}f}" for value in hours) + " h")
        assert f"| {' | '.join(cells)} |" in page
    for name, model in models.items():
        moved = 8 * model.num_parameters()
        step = 3 * model.flops_per_token(1024) * 512 * 1024 / (0.4 * 989e12) * 1e3
        cells = [f"{moved / 1e9:.1f} GB", f"{step / 8:.0f} ms, {moved / 450e6:.0f} ms"]
        cells.append(f"{step / 64:.0f} ms, {moved / 50e6:.0f} ms")
        size = name.removeprefix("qwen_").upper()
        assert f"| {size} | {' | '.join(cells)} |" in page
    assert f"{(teacher + reference) * 16_384 * 1024 / (0.4 * 989e12):.0f} s each" in page
    checkpoints = [12 * model.num_parameters() / 1e9 for model in models.values()]
    assert f"{checkpoints[0]:.1f}, {checkpoints[1]:.1f}, {checkpoints[2]:.0f} GB" in page
    words = " ".join(page.split())
    assert f"{2 * decoder(QWEN_1_8B).num_parameters() / 1e9:.1f} GB of Qwen1.5-1.8B" in words
    assert f"{1e11 / 2**25:,.0f} files of 100B" in words
    assert f"{round(1e11 / 1024 / 16_384, -1):,.0f} files, 143 s" in words
