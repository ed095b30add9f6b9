"""train --token-scores: the best tokens of each global batch alone."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damages import cut, flip_bit, remove, swap
from scoring_runs import run_score
from training_runs import check_equal_runs, make_config, metrics, stop_after

from miniplm.cli import main
from miniplm.config import DistillConfig, TokensConfig, TrainConfig
from miniplm.data.batches import IGNORE_INDEX
from miniplm.data.corpus import Corpus
from miniplm.data.order import DataOrder
from miniplm.data.token_scores import TokenScores
from miniplm.runtime.files import read_json
from miniplm.stages.train import train
from miniplm.training import loop
from miniplm.training.checkpoints import latest_checkpoint

EOS = 0


@pytest.fixture(scope="module")
def token_scores(tiny_corpus, teacher, reference, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokens") / "scores"
    run_score(tiny_corpus, folder, teacher=teacher, reference=reference, tokens=True)
    return str(folder)


@pytest.fixture
def config(tiny_corpus, token_scores, tmp_path) -> TrainConfig:
    return replace(make_config(tiny_corpus, tmp_path / "out"), tokens=TokensConfig(scores=token_scores))


@pytest.fixture(scope="module")
def whole(tiny_corpus, token_scores, tmp_path_factory) -> TrainConfig:
    """The config of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    config = replace(make_config(tiny_corpus, output), tokens=TokensConfig(scores=token_scores))
    train(config)
    return config


def batches_of(config, monkeypatch) -> list[torch.Tensor]:
    """The targets of each step of a run, [T]."""
    found, original = [], loop.train_step

    def watching(model, optimizer, micro_batches, *others):
        found.append(torch.cat([batch.targets for batch in micro_batches]))
        return original(model, optimizer, micro_batches, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", watching)
        train(config)
    return found


@pytest.mark.parametrize("rule", ["difference", "teacher_loss", "reference_loss"])
def test_targets_of_each_step_are_the_best_of_its_tokens(rule, config, token_scores, monkeypatch, tmp_path):
    """From the files, chunk by chunk and token by token; with the loss of those alone, and what is told."""
    tokens = TokensConfig(scores=token_scores, ratio=0.3, rule=rule)
    found = batches_of(replace(config, tokens=tokens, steps=5), monkeypatch)
    corpus, scores = Corpus(config.data), TokenScores(token_scores, Corpus(config.data), rule)
    order = DataOrder(corpus.num_tokens, config.batch_tokens, config.seed)
    total = trained = 0
    for step, targets in enumerate(found):
        entries = []
        for chunk in order.step(step):
            ids = corpus.rows([chunk])[0]
            for place, value in enumerate(scores.of([chunk])):
                if ids[place] != EOS:
                    entries.append((-value, total + len(entries), int(ids[place + 1])))
        best = {position for _, position, _ in sorted(entries)[: int(0.3 * len(entries))]}
        expected = [target for _, position, target in entries if position in best]
        assert targets[targets != IGNORE_INDEX].tolist() == expected
        trained += len(expected)
        total += len(entries)
    manifest = read_json(Path(config.output) / "manifest.json")
    assert manifest["trained_tokens"] == trained == metrics(config.output)[-1]["trained_tokens"]
    assert manifest["trained_share"] == trained / manifest["tokens"]
    assert manifest["identity"]["tokens"]["rule"] == rule and manifest["identity"]["tokens"]["ratio"] == 0.3


def test_stopped_and_continued_it_ends_alike(config, whole, monkeypatch, capsys):
    for step in (3, 15):
        stop_after(config, step, monkeypatch)
    assert (
        "trained on are the best 60% of the tokens of each global batch, by difference"
        in capsys.readouterr().err
    )
    train(config)
    check_equal_runs(config.output, whole.output)


def test_killed_it_ends_alike(config, whole):
    child = os.fork()
    if child == 0:
        original, calls = loop.train_step, []

        def dying(*arguments):
            calls.append(1)
            if len(calls) == 17:  # after the checkpoint of step 12 and the line of step 16
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        loop.train_step = dying
        train(config)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(config)
    check_equal_runs(config.output, whole.output)


def test_micro_batches_choose_the_same_tokens(config, monkeypatch, tmp_path):
    """And come to the same losses, to rounding."""
    found, lines = [], []
    for size in (1, 70, 10_000):
        output = str(tmp_path / str(size))
        found.append(
            batches_of(replace(config, steps=6, micro_batch_tokens=size, output=output), monkeypatch)
        )
        lines.append([line["loss"] for line in metrics(output)])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    np.testing.assert_allclose(lines[1:], [lines[0]] * 2, rtol=1e-4)


def test_all_tokens_train_as_without(config, token_scores, tmp_path):
    """A ratio of 1 where every score is finite, bit for bit; 0.6 does not."""
    plain = replace(config, tokens=TokensConfig(), output=str(tmp_path / "plain"))
    all_of_them = replace(config, tokens=TokensConfig(scores=token_scores, ratio=1.0))
    some = replace(config, output=str(tmp_path / "some"))
    for each in (plain, all_of_them, some):
        train(each)
    weights = [
        Path(latest_checkpoint(each.output), "model.safetensors").read_bytes()
        for each in (plain, all_of_them, some)
    ]
    assert weights[0] == weights[1] != weights[2]
    manifests = [read_json(Path(each.output) / "manifest.json") for each in (plain, all_of_them, some)]
    assert "trained_tokens" not in manifests[0] and "tokens" not in manifests[0]["identity"]
    assert manifests[0]["flops"] == manifests[1]["flops"] == manifests[2]["flops"]  # the same forward passes
    assert 0.5 < manifests[2]["trained_share"] < 0.6 < 0.9 < manifests[1]["trained_share"] < 1
    assert "trained_tokens" not in metrics(plain.output)[-1]


def test_with_a_teacher_the_divergence_is_that_of_the_chosen_tokens(config, teacher, token_scores, tmp_path):
    """With alpha 0 the losses are those of a run without one; the divergence counts the same tokens."""
    runs = {}
    for name, alpha, ratio in (
        ("none", None, 0.5),
        ("zero", 0.0, 0.5),
        ("half", 0.5, 0.5),
        ("all", 0.5, 1.0),
    ):
        distill = DistillConfig() if alpha is None else DistillConfig(teacher=teacher, alpha=alpha)
        tokens = TokensConfig(scores=token_scores, ratio=ratio)
        runs[name] = replace(config, distill=distill, tokens=tokens, steps=2, output=str(tmp_path / name))
        train(runs[name])
    last = {name: metrics(run.output)[-1] for name, run in runs.items()}
    assert last["zero"]["loss"] == pytest.approx(last["none"]["loss"], rel=1e-5)
    assert last["half"]["trained_tokens"] == last["none"]["trained_tokens"] < last["all"]["trained_tokens"]
    assert abs(last["half"]["kl_divergence"] - last["all"]["kl_divergence"]) > 1e-3


def test_a_step_without_finite_scores_is_skipped(config, tiny_corpus, teacher, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(teacher, tmp_path / "broken")) / "model.safetensors"
    tensors = load_file(broken)
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, broken, {"format": "pt"})
    run_score(tiny_corpus, tmp_path / "s", teacher=str(broken.parent), tokens=True)
    tokens = TokensConfig(scores=str(tmp_path / "s"), rule="teacher_loss")
    train(replace(config, tokens=tokens, steps=2))
    manifest = read_json(Path(config.output) / "manifest.json")
    assert (manifest["skipped"], manifest["trained_tokens"], manifest["trained_share"]) == (2, 0, 0)


def command(data, scores, output, *flags) -> list[str]:
    return [
        *f"train --data {data} --token-scores {scores} --output {output} --batch-tokens 200".split(),
        *"--model.hidden-size 32 --model.intermediate-size 48 --model.num-hidden-layers 1".split(),
        *"--model.num-attention-heads 2 --steps 2 --device cpu --peak-tflops 0.1".split(),
        *flags,
    ]


def test_the_command(tiny_corpus, token_scores, tmp_path, capsys):
    flags = ["--token-ratio", "0.25", "--token-rule", "reference_loss"]
    assert main(command(tiny_corpus, token_scores, tmp_path / "out", *flags)) == 0
    assert "best 25% of the tokens of each global batch, by reference_loss" in capsys.readouterr().err
    assert main(command(tiny_corpus, token_scores, tmp_path / "out", *flags)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(command(tiny_corpus, token_scores, tmp_path / "out")) == 2
    assert "(tokens.rule was " in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_bit, cut, remove, swap])
def test_damaged_scores_are_told(damage, tiny_corpus, token_scores, tmp_path, capsys):
    folder = Path(shutil.copytree(token_scores, tmp_path / "s"))
    TokenScores(folder, Corpus(tiny_corpus), "difference")  # what is remembered of them holds no longer
    damage(folder / "tokens-00002.arrow", random.Random(0))
    assert main(command(tiny_corpus, folder, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"miniplm train: {folder}/tokens-0000") and "run score again" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"token_files": {}}, {"token_files": {"x": "y"}}, {"token_files": 3}, {"token_files": None}]
)
def test_a_changed_manifest_is_told(change, tiny_corpus, token_scores, tmp_path, capsys):
    folder = Path(shutil.copytree(token_scores, tmp_path / "s"))
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(command(tiny_corpus, folder, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line


def test_scores_of_another_corpus_name_the_command(work, token_scores, tmp_path, capsys):
    """A refined corpus is scored itself, and then trained on."""
    refined = work / "refined"
    assert main(command(refined, token_scores, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"miniplm score --tokens --data {refined}" in line


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--token-ratio", "0"], "tokens.ratio must be above 0 and at most 1, got 0.0"),
        (["--token-ratio", "1.01"], "tokens.ratio must be above 0 and at most 1, got 1.01"),
        (["--token-ratio", "nan"], "tokens.ratio: expected a number, got 'nan'"),
        (["--token-rule", "loss"], "one of difference, teacher_loss, reference_loss"),
    ],
)
def test_settings_that_cannot_be(flags, said, tiny_corpus, token_scores, tmp_path, capsys):
    assert main(command(tiny_corpus, token_scores, tmp_path / "out", *flags)) == 2
    assert said in capsys.readouterr().err


def test_no_say_without_scores(tiny_corpus, tmp_path, capsys):
    arguments = command(tiny_corpus, "x", tmp_path / "out", "--token-ratio", "0.5")
    del arguments[3:5]
    assert main(arguments) == 2
    assert "have no say without tokens.scores" in capsys.readouterr().err
