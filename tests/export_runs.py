"""What the tests of export share: models that the real stages made, and what is in an exported folder."""

import dataclasses
from pathlib import Path

import torch
from training_runs import seal

from miniplm.analysis.evaluation import with_checksum
from miniplm.config import (
    CheckpointConfig,
    EvalConfig,
    EvaluateConfig,
    ExportConfig,
    OptimizerConfig,
    ScoreConfig,
    SelectConfig,
    StudentConfig,
    TrainConfig,
)
from miniplm.runtime.artifacts import MANIFEST
from miniplm.runtime.files import fingerprint, read_json, write_json
from miniplm.stages.evaluate import evaluate
from miniplm.stages.export import export
from miniplm.stages.score import score
from miniplm.stages.select import select
from miniplm.stages.train import train

TINY = StudentConfig(
    model_type="llama",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    initializer_range=0.3,
)
PLAN = TrainConfig(
    data="data",
    output="output",
    model=TINY,
    optimizer=OptimizerConfig(warmup_steps=2, lr=1e-2),
    batch_tokens=256,
    steps=6,
    eval=EvalConfig(interval=3),
    checkpoint=CheckpointConfig(interval=3),
    log_interval=2,
    device="cpu",
    dtype="float32",
    peak_tflops=1.0,
)


def make_students(root: Path, corpus: str, tiny_model) -> None:
    """In `root`: scores, a refined and a random corpus, a student of each, and the refined one's
    evaluation."""
    teacher = tiny_model(root / "big-teacher", seed=1)
    reference = tiny_model(root / "small_reference", seed=2, hidden_size=16)
    on_cpu = {"device": "cpu", "dtype": "float32"}
    scores = str(root / "scores")
    score(ScoreConfig(data=corpus, output=scores, teacher=teacher, reference=reference, **on_cpu))
    for name, seed in (("refined", None), ("random", 3)):
        data = str(root / name)
        select(SelectConfig(data=corpus, scores=[scores], output=data, random_seed=seed))
        output, held_out = str(root / f"{name}-student"), EvalConfig(data=corpus, interval=3)
        train(dataclasses.replace(PLAN, data=data, output=output, eval=held_out))
    model, losses = str(root / "refined-student"), str(root / "losses.json")
    evaluate(EvaluateConfig(model=model, data=corpus, output=losses, **on_cpu))


def publish(checkpoint, output, **settings) -> Path:
    export(ExportConfig(checkpoint=str(checkpoint), output=str(output), **settings))
    return Path(output)


def card(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md")


def logits(folder, **settings):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **settings)(torch.randint(500, (2, 40))).logits


def rewrite(run, change):
    """Change the manifest of a training output, and its checkpoints so that they belong to it."""
    manifest = read_json(run / MANIFEST)
    change(manifest)
    manifest.pop("checksum", None)
    write_json(run / MANIFEST, manifest)
    for checkpoint in run.glob("checkpoints/step-*"):
        seal(checkpoint, fingerprint(manifest["identity"]))


def rewrite_losses(work, path, change) -> str:
    """The refined student's evaluation, changed, as a whole file at `path`."""
    losses = read_json(work / "losses.json")
    del losses["checksum"]
    change(losses)
    write_json(path, with_checksum(losses))
    return str(path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
