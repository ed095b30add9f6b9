"""train: what a run writes, and that it learns."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_corpus
from training_runs import STUDENT, files, make_config, metrics, plain_loss
from transformers import AutoModelForCausalLM

from miniplm.config import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
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


def read_lines(output) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_metrics(whole, tiny_corpus):
    lines, steps = read_lines(whole.output), [4, 8, 9, 12, 16, 18, 20, 24, 26]
    assert [line["step"] for line in lines] == steps
    assert [line["step"] for line in lines if "eval_loss" in line] == [9, 18, 26]
    assert [line["lr"] for line in lines] == [learning_rate(step, 26, whole.optimizer) for step in steps]
    corpus_tokens = Corpus(tiny_corpus).num_tokens
    order = DataOrder(corpus_tokens, 200, whole.seed)
    tokens = np.cumsum([(corpus_tokens[order.step(step)] - 1).sum() for step in range(26)])
    assert [line["tokens"] for line in lines] == [tokens[step - 1] for step in steps]
    model = load_model(latest_checkpoint(whole.output))
    flops = 3 * model.flops_per_token(order.epoch_tokens // len(order.rows))
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e11)


def test_checkpoints_open_in_transformers(whole, tiny_corpus):
    from safetensors import safe_open
    from transformers import AutoTokenizer

    assert [path.name for path in sorted(Path(whole.output, "checkpoints").iterdir())] == [
        "step-00000024",
        "step-00000026",
    ]
    checkpoint, corpus = latest_checkpoint(whole.output), Corpus(tiny_corpus)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = plain_loss(theirs, corpus.rows(range(6))).item()
    assert read_lines(whole.output)[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    ids = [
        AutoTokenizer.from_pretrained(name)("a model")["input_ids"] for name in (checkpoint, corpus.tokenizer)
    ]
    assert ids[0] == ids[1]
    names = [name for name, _ in load_model(checkpoint).named_parameters()]
    with safe_open(f"{checkpoint}/optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in names}
    assert all(path.suffix in (".json", ".safetensors") for path in Path(checkpoint).iterdir())


def test_manifest(whole, tiny_corpus):
    text = Path(whole.output, "manifest.json").read_text()
    manifest, last, corpus = json.loads(text), read_lines(whole.output)[-1], Corpus(tiny_corpus)
    expected = {
        "stage": "train",
        "complete": True,
        "steps": 26,
        "skipped": 0,
        "tokens": last["tokens"],
        "loss": last["loss"],
        "eval_loss": last["eval_loss"],
        "parameters": load_model(latest_checkpoint(whole.output)).num_parameters(),
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["corpus"]["fingerprint"] == corpus.fingerprint
    assert manifest["corpus"]["domains"] == corpus.manifest["domains"]
    assert whole.output not in text and tiny_corpus not in text


# What the identity of a run is called in its manifest: a run that was begun before must continue.
IDENTITY = (
    "corpus tokenizer optimizer steps batch_tokens shuffle seed document_mask device dtype model eval_corpus "
    "eval_rows"
)


def test_identity_keeps_its_names(whole):
    identity = read_json(Path(whole.output) / "manifest.json")["identity"]
    assert list(identity) == IDENTITY.split()
    assert identity["eval_rows"] == whole.eval.chunks
    assert identity["optimizer"] == {
        "lr": 1e-2,
        "min_lr_ratio": 0.1,
        "warmup_steps": 5,
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }


def test_tensorboard_shows_the_same_figures(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(Path(whole.output) / "tensorboard"))
    board.Reload()
    names = {"loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
    assert set(board.Tags()["scalars"]) == names
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in read_lines(whole.output)
    ]


def test_complete_run_is_left_alone(whole, capsys):
    before = files(whole.output)
    checkpoint = CheckpointConfig(interval=2, keep=1)
    train(replace(whole, log_interval=1, checkpoint=checkpoint, micro_batch_tokens=64, max_skipped_steps=1))
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(whole.output) == before


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
        assert one.keys() == many.keys() and one["tokens"] == many["tokens"]
        for key in one.keys() & {"loss", "eval_loss"}:
            assert one[key] == pytest.approx(many[key], rel=1e-4), key


def test_it_learns(tiny_tokenizer, tmp_path):
    pattern = random.Random(0).choices(range(1, 500), k=37)
    chunks = [(pattern * 3)[i % 37 : i % 37 + 60] for i in range(50)]
    data = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer)
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
