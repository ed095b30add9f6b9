"""train: what a run writes, and that it learns."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    STUDENT,
    files,
    make_config,
    metrics,
    plain_loss,
    write_corpus,
)
from transformers import AutoModelForCausalLM

from miniplm.config import (
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
)
from miniplm.data.corpus import Corpus
from miniplm.data.order import DataOrder
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.train import train
from miniplm.training.checkpoints import latest_checkpoint
from miniplm.training.step import learning_rate


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """The config of a run that nothing stopped."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("whole") / "out")
    train(config)
    return config


def test_run_writes_what_it_says(whole, tiny_corpus, capsys):
    from safetensors import safe_open
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoTokenizer

    output = Path(whole.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [4, 8, 9, 12, 16, 18, 20, 24, 26]
    assert [line["step"] for line in lines] == steps
    assert [line["step"] for line in lines if "eval_loss" in line] == [9, 18, 26]
    assert [line["lr"] for line in lines] == [learning_rate(step, 26, whole.optimizer) for step in steps]
    corpus_tokens = Corpus(tiny_corpus).num_tokens
    order = DataOrder(corpus_tokens, 200, whole.seed)
    tokens = np.cumsum([(corpus_tokens[order.step(step)] - 1).sum() for step in range(26)])
    assert [line["tokens"] for line in lines] == [tokens[step - 1] for step in steps]
    model = load_model(latest_checkpoint(output))
    flops = 3 * model.flops_per_token(order.epoch_tokens // len(order.rows))
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e11)

    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-00000024",
        "step-00000026",
    ]
    checkpoint = latest_checkpoint(output)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    corpus = Corpus(tiny_corpus)
    with torch.no_grad():
        assert lines[-1]["eval_loss"] == pytest.approx(
            plain_loss(theirs, corpus.rows(range(6))).item(), abs=1e-5
        )
    assert (
        AutoTokenizer.from_pretrained(checkpoint)("a model")["input_ids"]
        == AutoTokenizer.from_pretrained(corpus.tokenizer)("a model")["input_ids"]
    )
    with safe_open(f"{checkpoint}/optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()
        }
    assert all(path.suffix in (".json", ".safetensors") for path in Path(checkpoint).iterdir())

    manifest = read_json(output / "manifest.json")
    assert manifest["complete"] and manifest["stage"] == "train"
    expected = {
        "steps": 26,
        "skipped": 0,
        "tokens": int(tokens[-1]),
        "loss": lines[-1]["loss"],
        "eval_loss": lines[-1]["eval_loss"],
        "parameters": theirs.num_parameters(),
    }
    assert {key: manifest[key] for key in expected} == expected
    assert (
        manifest["corpus"]["fingerprint"] == corpus.fingerprint
        and manifest["corpus"]["domains"] == corpus.manifest["domains"]
    )
    assert (
        str(output) not in (output / "manifest.json").read_text()
        and tiny_corpus not in (output / "manifest.json").read_text()
    )

    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {
        "loss",
        "eval_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
    }
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]

    before = files(output)
    train(
        replace(
            whole,
            log_interval=1,
            checkpoint=CheckpointConfig(interval=2, keep=1),
            micro_batch_tokens=64,
            max_skipped_steps=1,
        )
    )
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(output) == before


def test_logged_loss_is_the_mean_over_the_interval(config, whole, capsys):
    train(replace(config, log_interval=1))
    every = {line["step"]: line["loss"] for line in metrics(config.output)}
    assert sorted(every) == list(range(1, 27))
    last = 0
    for line in metrics(whole.output):
        assert line["loss"] == pytest.approx(
            np.mean([every[step] for step in range(last + 1, line["step"] + 1)]), rel=1e-12
        )
        last = line["step"]
    out = capsys.readouterr().out
    assert "trained 26 steps on" in out and f"loss {every[26]:.4f}, eval loss" in out and "tokens/s" in out


def test_micro_batches_do_not_change_the_mathematics(config, whole):
    train(replace(config, micro_batch_tokens=100_000))
    for one, many in zip(metrics(config.output), metrics(whole.output), strict=True):
        assert (
            one["loss"] == pytest.approx(many["loss"], rel=1e-4)
            and one["eval_loss" if "eval_loss" in one else "lr"]
        )
        assert one["tokens"] == many["tokens"]


def test_it_learns(tiny_corpus, tmp_path):
    pattern = random.Random(0).choices(range(1, 500), k=37)
    data = write_corpus(
        tmp_path / "corpus", [(pattern * 3)[i % 37 : i % 37 + 60] for i in range(50)], tiny_corpus
    )
    train(
        TrainConfig(
            data=data,
            output=str(tmp_path / "out"),
            model=STUDENT,
            steps=60,
            batch_tokens=600,
            optimizer=OptimizerConfig(lr=2e-2, warmup_steps=5),
            eval=EvalConfig(data=data),
            device="cpu",
            peak_tflops=1,
        )
    )
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert metrics(tmp_path / "out")[0]["loss"] > 4
    assert manifest["loss"] < 0.2 and manifest["eval_loss"] < 0.2 < math.log(500) / 20


def test_default_is_one_pass_and_a_small_corpus_repeats(config, tiny_corpus):
    epoch_tokens = int((Corpus(tiny_corpus).num_tokens - 1).sum())
    train(replace(config, steps=None))
    assert read_json(f"{config.output}/manifest.json")["steps"] == -(-epoch_tokens // 200)
    train(
        replace(
            config,
            steps=None,
            batch_tokens=3 * epoch_tokens + 5,
            output=config.output + "2",
            micro_batch_tokens=4096,
        )
    )
    manifest = read_json(f"{config.output}2/manifest.json")
    assert manifest["steps"] == 1 and 0 <= manifest["tokens"] - (3 * epoch_tokens + 5) < 65


def test_settings_reach_the_mathematics(config, whole):
    losses = {json.dumps(metrics(whole.output)[0]["loss"])}
    variants = [
        dict(seed=11),
        dict(shuffle=False),
        dict(document_mask=True),
        dict(dtype="bfloat16"),
        dict(model=replace(STUDENT, vocab_size=512)),
        dict(optimizer=replace(config.optimizer, betas=(0.5, 0.6))),
    ]
    for number, changed in enumerate(variants):
        # Equal up to here, another run from there: the first run's folder refuses each.
        with pytest.raises(UserError, match="another train run"):
            train(replace(whole, **changed))
        variant = replace(config, output=f"{config.output}{number}", steps=4, eval=EvalConfig(), **changed)
        train(variant)
        losses.add(json.dumps(metrics(variant.output)[0]["loss"]))
    assert len(losses) == len(variants) + 1
