"""train: what a run says it cost, against torch's own count, and runs of equal cost."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import chunks_of
from torch.utils.flop_counter import FlopCounterMode
from training_runs import check_equal_runs, make_config, make_teachers, metrics, scores_again, stop_after
from transformers import AutoModelForCausalLM

from miniplm import config as settings
from miniplm.cli import main
from miniplm.config import CheckpointConfig, DistillConfig, EvalConfig, TrainConfig
from miniplm.data.order import DataOrder
from miniplm.models.flops import ForwardFlops
from miniplm.models.loading import forward_cost_of_model, load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json, write_json
from miniplm.stages.train import train
from miniplm.training.cost import RunCost, flops_of_run
from miniplm.training.step import learning_rate


@pytest.fixture(scope="module")
def teachers(tiny_model, tmp_path_factory):
    return make_teachers(tiny_model, tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def alone(tiny_corpus, tmp_path_factory):
    """The config of a finished run without a teacher."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("alone") / "out")
    train(config)
    return config


def manifest(config) -> dict:
    return read_json(Path(config.output) / "manifest.json")


def matched(alone, teachers, output, **changes) -> TrainConfig:
    """A run with a teacher, as long as costs what `alone` did."""
    changes = {"steps": None, "match_flops_of": alone.output} | changes
    return replace(alone, output=str(output), distill=DistillConfig(teachers["wider"]), **changes)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_run_costs_what_torch_counts(tiny_corpus, teachers, tmp_path, document_mask):
    """Forward, backward and the teacher, of more than one epoch. Besides, the backward pass computes the
    scores of the student's attention anew, which is not the model's own cost."""
    config = replace(
        make_config(tiny_corpus, tmp_path / "out"),
        distill=DistillConfig(teachers["wider"]),
        eval=EvalConfig(),
        document_mask=document_mask,
    )
    with FlopCounterMode(display=False) as counter:
        train(config)
    assert config.steps * 200 > 1.5 * sum(len(ids) - 1 for ids in chunks_of(tiny_corpus))
    flops, counted = manifest(config)["flops"], counter.get_total_flops() - scores_again(config)
    assert counted == flops["forward"] + flops["backward"] + flops["teacher"]
    assert flops["backward"] == 2 * flops["forward"] > 0 and flops["evaluation"] == 0
    head = 2 * 500 * 64 * manifest(config)["tokens"]  # of the teacher: 500 ids, 64 wide
    assert flops["teacher"] > head


def test_evaluations_are_counted_apart(alone, tiny_corpus):
    model = load_model(f"{alone.output}/checkpoints/step-00000026")
    chunks = chunks_of(tiny_corpus)[:6]
    once = sum((len(ids) - 1) * model.flops_per_token(len(ids) - 1) for ids in chunks)
    assert sum("eval_loss" in line for line in metrics(alone.output)) == 3
    flops = manifest(alone)["flops"]
    assert flops["evaluation"] == 3 * once and flops["teacher"] == 0
    assert flops_of_run(alone.output) == 3 * flops["forward"]


def test_the_papers_steps():
    """T · 3 N_s / (3 N_s + N_t), and what it printed for 100,000 steps with a teacher of 1.84B."""
    order = DataOrder(np.full(100, 1025), 512 * 1024, seed=1)
    squares = np.full(100, 1024**2)
    for student, printed in [(203e6, 25_000), (464e6, 45_000), (1.16e9, 65_000)]:
        own, teacher = ForwardFlops(2 * int(student), 0), ForwardFlops(2 * int(1.84e9), 0)
        budget = RunCost(order, squares, own, None).flops(100_000).training
        steps = RunCost(order, squares, own, teacher).steps_for(budget)
        assert steps == round(100_000 * 3 * student / (3 * student + 1.84e9))
        assert steps == pytest.approx(printed, abs=2_000)


def forward_by_torch(name, chunks) -> int:
    """FLOPs of a forward pass over chunks, as torch counts those of transformers' model."""
    model, total = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager"), 0
    width = model.config.num_hidden_layers * model.config.hidden_size
    for ids in chunks:
        if (n := len(ids) - 1) > 0:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(input_ids=torch.tensor([ids[:-1]]))
            # Some versions write the angles of the rotary embedding as a matrix product.
            rotary = counter.get_flop_counts().get("Qwen2ForCausalLM.model.rotary_emb", {})
            # This attention computes all n² pairs, of which n·(n + 1)/2 are causal.
            total += counter.get_total_flops() - sum(rotary.values()) - 2 * width * n * (n - 1)
    return total


def test_a_matched_run_costs_what_the_other_did(alone, teachers, tiny_corpus, tmp_path, capsys):
    config = matched(alone, teachers, tmp_path / "out")
    train(config)
    chunks = chunks_of(tiny_corpus)
    student = forward_by_torch(f"{alone.output}/checkpoints/step-00000026", chunks)
    teacher = forward_by_torch(teachers["wider"], chunks)
    steps = round(26 * 3 * student / (3 * student + teacher))
    found, cost = manifest(config), flops_of_run(alone.output)
    assert found["steps"] == found["identity"]["steps"] == steps < 20
    assert found["identity"]["flops"] == cost and found["match_flops_of"] == Path(alone.output).name
    per_step = flops_of_run(config.output) / steps
    assert abs(flops_of_run(config.output) - cost) < per_step  # half a step, and how rows fill steps
    lines = metrics(config.output)
    assert lines[-1]["step"] == steps
    assert [line["lr"] for line in lines] == [
        learning_rate(line["step"], steps, config.optimizer) for line in lines
    ]
    assert f"{steps} steps cost nearest to {cost:.4g} FLOPs" in capsys.readouterr().err


def test_resume_keeps_the_length(alone, teachers, tmp_path, monkeypatch):
    latest = {"checkpoint": CheckpointConfig(interval=6, keep=1)}
    whole, stopped = (matched(alone, teachers, tmp_path / name, **latest) for name in ("whole", "stopped"))
    train(whole)
    stop_after(stopped, 7, monkeypatch)
    train(stopped)
    check_equal_runs(stopped.output, whole.output)
    by_number = replace(stopped, match_flops_of=None, flops=float(flops_of_run(alone.output)))
    train(by_number)  # the same run: nothing to do
    with pytest.raises(UserError, match="steps was 11, is now 21"):
        train(replace(by_number, flops=2 * by_number.flops))


def test_costs_without_weights(teachers):
    """By config.json alone, of models of all kinds, as of the models themselves."""
    for name in teachers.values():
        model, cost = load_model(name), forward_cost_of_model(name)
        for context in (1, 7, 64):
            assert cost.of(context, context**2) == context * model.flops_per_token(context)


def train_line(config, capsys, *flags) -> str:
    """What the command line says of a refused run."""
    capsys.readouterr()
    assert main(["train", "--data", config.data, "--output", config.output, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not Path(config.output).exists()
    return said


def test_runs_that_cannot_be_matched(alone, tiny_corpus, tmp_path, capsys, monkeypatch):
    config = make_config(tiny_corpus, tmp_path / "out")
    unfinished = replace(alone, output=str(tmp_path / "unfinished"))
    stop_after(unfinished, 3, monkeypatch)
    old = Path(shutil.copytree(alone.output, tmp_path / "old"))
    kept = {key: value for key, value in manifest(alone).items() if key not in ("flops", "checksum")}
    write_json(old / "manifest.json", kept)
    damaged = Path(shutil.copytree(old, tmp_path / "damaged"))
    write_json(damaged / "manifest.json", kept | {"flops": {"forward": -1}})
    (tmp_path / "empty").mkdir()
    for run, message in [
        (unfinished.output, "is not complete: run its 'train' command again"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "empty", "has no manifest.json"),
        (tiny_corpus, "holds the output of 'prepare'; expected that of 'train'"),
        (old, "does not say what it cost"),
        (damaged, "is not a manifest of miniplm (forward: "),
    ]:
        assert message in train_line(config, capsys, "--match-flops-of", str(run), "--batch-tokens", "200")
    assert "FLOPs, 100 are" in train_line(config, capsys, "--flops", "100", "--batch-tokens", "200")
    assert "steps: give from 1" in train_line(config, capsys, "--flops", "1e40", "--batch-tokens", "200")


@pytest.mark.parametrize(
    "lengths",
    [
        {"steps": 3, "flops": 1e9},
        {"steps": 3, "match_flops_of": "run"},
        {"flops": 1e9, "match_flops_of": "run"},
    ],
)
def test_one_length_alone(lengths):
    with pytest.raises(ValueError, match=f"give one of steps, .* got {' and '.join(lengths)} "):
        TrainConfig(data="d", output="o", **lengths)


def test_the_steps_of_a_preset_are_taken_back():
    preset = str(Path(__file__).parents[2] / "configs" / "qwen_200m.yaml")
    arguments = ["--config", preset, "--data", "d", "--output", "o", "--match-flops-of", "run"]
    with pytest.raises(ValueError, match="--steps null"):
        settings.from_arguments(TrainConfig, arguments, prog="miniplm train")
    assert settings.from_arguments(TrainConfig, [*arguments, "--steps", "null"], prog="x").steps is None
