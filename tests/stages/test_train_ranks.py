"""train on several ranks: the losses of one, its checkpoints, and what one rank meets ends or holds all."""

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import exit_codes, forked, free_port, local_share, run_ranks, started, wait_until
from safetensors.torch import load_file
from training_runs import check_equal_runs, make_config, make_teachers, metrics, stop_after

from miniplm.config import DistillConfig, ParallelConfig
from miniplm.runtime.files import read_json
from miniplm.stages.train import train
from miniplm.training import loop
from miniplm.training import step as training_step
from miniplm.training.checkpoints import checkpoint_folders, latest_checkpoint

# What another order of the sums does. One process in micro-batches of 64, 140 or 200 tokens instead of 70
# differs by up to 2.5e-7 in its losses, and by up to 1.2e-3 in the gradient norm of the last step. The
# weights of 8 steps on one rank, 6 on two and 12 on one differ by up to 6e-6 from those of one.
LOSS_NOISE, NORM_NOISE, WEIGHT_NOISE = 1e-6, 5e-3, 3e-5


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return forked(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def alone(tiny_corpus, tmp_path_factory):
    """The config of a run of one process."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("alone") / "out")
    train(config)
    return config


@pytest.fixture(scope="module")
def with_teacher(alone, tiny_model, tmp_path_factory):
    """The config of a run of one process with a teacher that is large beside the student."""
    folder = tmp_path_factory.mktemp("with-teacher")
    teacher = make_teachers(tiny_model, folder / "teachers")["wider"]
    config = replace(
        alone, output=str(folder / "out"), distill=DistillConfig(teacher, alpha=0.3, temperature=1.5)
    )
    train(config)
    return config


@pytest.fixture
def config(alone, tmp_path):
    return replace(alone, output=str(tmp_path / "out"))


def train_rank(rank, config):
    train(config)


def check_equal_losses(output, other):
    found, expected = metrics(output), metrics(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, equal in zip(found, expected, strict=True):
        norm, expected_norm = line.pop("grad_norm"), equal.pop("grad_norm")
        assert (norm is None) == (expected_norm is None)  # of a skipped step
        assert norm is None or norm == pytest.approx(expected_norm, rel=NORM_NOISE)
        assert line == pytest.approx(equal, rel=LOSS_NOISE)


def step_of(output) -> int:
    return read_json(Path(latest_checkpoint(output)) / "trainer_state.json")["state"]["step"]


@pytest.mark.parametrize("replicate", [1, 2])
def test_two_ranks_have_the_losses_of_one(alone, config, replicate, context, tmp_path):
    ranks = run_ranks(
        context, tmp_path, 2, train_rank, replace(config, parallel=ParallelConfig(replicate=replicate))
    )
    check_equal_losses(config.output, alone.output)
    assert "trained 26 steps" in ranks[0].said() and ranks[1].said() == ""
    for folder, other in zip(
        checkpoint_folders(config.output), checkpoint_folders(alone.output), strict=True
    ):
        assert {file.name: file.stat().st_size for file in folder.iterdir() if file.suffix != ".json"} == {
            file.name: file.stat().st_size for file in other.iterdir() if file.suffix != ".json"
        }


@pytest.mark.slow
def test_two_ranks_with_a_teacher_an_untied_head_and_checkpointed_activations(
    tiny_corpus, tiny_model, config, context, tmp_path
):
    teacher = make_teachers(tiny_model, tmp_path / "teachers")["higher head"]
    config = replace(
        config,
        model=replace(config.model, tie_word_embeddings=False, num_hidden_layers=3, model_type="qwen3"),
        distill=DistillConfig(teacher=teacher),
        activation_checkpointing=True,
        steps=12,
    )
    run_ranks(context, tmp_path, 2, train_rank, config)
    one = replace(config, output=str(tmp_path / "one"))
    train(one)
    check_equal_losses(config.output, one.output)
    assert "kl_divergence" in metrics(config.output)[0]


def train_rank_with_teacher(rank, config, share):
    """Train; between the steps this share of the teacher lies on each rank."""
    original = loop.train_step

    def train_step(*arguments):
        result, teacher = original(*arguments), arguments[-2].model
        assert local_share(teacher) == pytest.approx(share, abs=0.01)
        assert hasattr(teacher.head_weight, "to_local") == (share < 1)
        return result

    loop.train_step = train_step
    train(config)


@pytest.mark.parametrize("replicate, share", [(1, 1 / 2), (2, 1)])
def test_two_ranks_with_a_teacher_in_slices_or_copies_have_the_losses_of_one(
    replicate, share, with_teacher, config, context, tmp_path
):
    config = replace(config, distill=with_teacher.distill, parallel=ParallelConfig(replicate=replicate))
    run_ranks(context, tmp_path, 2, train_rank_with_teacher, config, share)
    check_equal_losses(config.output, with_teacher.output)
    assert "kl_divergence" in metrics(config.output)[0]


def signalled(rank, config, who, step, number):
    """Train; the rank `who` gets a signal within a step."""
    original, calls = loop.train_step, []

    def with_signal(*arguments):
        calls.append(1)
        if rank == who and len(calls) == step:
            os.kill(os.getpid(), number)
        return original(*arguments)

    loop.train_step = with_signal
    train(config)


def test_one_two_one_ranks_and_a_signal_to_one_stops_all_at_one_step(
    alone, config, context, tmp_path, monkeypatch
):
    stop_after(config, 8, monkeypatch)
    assert step_of(config.output) == 8
    with started(context, tmp_path, 2, signalled, config, 1, 7, signal.SIGTERM) as ranks:
        assert exit_codes(ranks) == [143, 143], [rank.said() for rank in ranks]
    assert "continuing after step 8 of 26" in ranks[0].said()
    assert "stopped at step 14" in ranks[0].said()  # the step under way is given up
    assert step_of(config.output) == 14
    train(config)
    check_equal_losses(config.output, alone.output)
    weights, expected = (
        load_file(Path(latest_checkpoint(run.output)) / "model.safetensors") for run in (config, alone)
    )
    for name, weight in expected.items():
        assert (weights[name] - weight).norm() <= WEIGHT_NOISE * weight.norm()


def stopped_at(rank, config, module, function, call):
    """Train; the last rank gets SIGTERM at a call of a function."""
    module, calls = sys.modules[f"miniplm.training.{module}"], itertools.count(1)
    original = getattr(module, function)

    def stopping(*arguments):
        if rank == 1 and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    setattr(module, function, stopping)
    train(config)


def test_two_ranks_stopped_again_and_again_end_in_the_same_bytes(config, context, tmp_path):
    """Between two micro-batches, so again after that, and within an evaluation."""
    two = replace(config, output=str(tmp_path / "whole"))
    run_ranks(context, tmp_path, 2, train_rank, two)
    places = [("step", "summed_loss", 9), ("step", "summed_loss", 1), ("loop", "eval_loss", 2)]
    for place, step in zip(places, (4, 4, 18), strict=True):
        with started(context, tmp_path, 2, stopped_at, config, *place) as ranks:
            assert exit_codes(ranks) == [143, 143], [rank.said() for rank in ranks]
        assert step_of(config.output) == step
    assert metrics(config.output)[-1]["step"] == 16  # the evaluation is given up
    run_ranks(context, tmp_path, 2, train_rank, config)
    check_equal_runs(config.output, two.output)


def test_a_killed_rank_ends_the_other_which_names_it(alone, config, context, tmp_path):
    with started(context, tmp_path, 2, signalled, config, 1, 9, signal.SIGKILL) as ranks:
        assert exit_codes(ranks) == [1, -signal.SIGKILL], [rank.said() for rank in ranks]
    last = ranks[0].said().splitlines()[-1]
    assert last.startswith("rank 1 of 2 no longer answers") and "Traceback" not in ranks[0].said()
    run_ranks(context, tmp_path / "again", 2, train_rank, config)
    check_equal_losses(config.output, alone.output)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_hangs_is_named_within_the_timeout(config, who, context, tmp_path):
    config = replace(config, parallel=ParallelConfig(timeout=20))
    with started(context, tmp_path, 2, signalled, config, who, 9, signal.SIGSTOP) as ranks:
        other = ranks[1 - who]
        other.process.join(120)
        assert other.process.exitcode == 1, other.said()
    assert f"rank {who} of 2 no longer answers" in other.said().splitlines()[-1]


def with_nan(rank, config, who, call):
    """Train; a loss of the rank `who` is not finite, and so its gradient."""
    original, calls = training_step.summed_loss, []

    def summed_loss(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if rank == who and len(calls) == call else 1.0)

    training_step.summed_loss = summed_loss
    train(config)


def test_all_skip_the_step_in_which_one_has_no_finite_gradient(config, context, tmp_path, monkeypatch):
    with started(context, tmp_path, 2, with_nan, config, 1, 5) as ranks:
        assert exit_codes(ranks) == [0, 0], [rank.said() for rank in ranks]
    skipped = [line["step"] for line in metrics(config.output) if line.get("skipped")]
    assert len(skipped) == 1
    original, calls = loop.train_step, []

    def train_step(model, *arguments):
        calls.append(1)
        if len(calls) == skipped[0]:
            with monkeypatch.context() as patch:
                loss = training_step.summed_loss
                patch.setattr(training_step, "summed_loss", lambda *given: loss(*given) * float("nan"))
                return original(model, *arguments)
        return original(model, *arguments)

    monkeypatch.setattr(loop, "train_step", train_step)
    one = replace(config, output=str(tmp_path / "one"))
    train(one)
    expected = metrics(one.output)
    assert [line for line in expected if line.get("skipped")] == [
        line for line in metrics(config.output) if line.get("skipped")
    ]
    check_equal_losses(config.output, one.output)


def slow(rank, config):
    """Train, with pauses in which another job starts."""
    original = loop.train_step

    def train_step(*arguments):
        time.sleep(0.2)
        return original(*arguments)

    loop.train_step = train_step
    train(replace(config, steps=100_000))


def test_of_two_jobs_on_one_output_the_second_is_refused(config, context, tmp_path):
    with started(context, tmp_path / "first", 2, slow, config) as first:
        wait_until(lambda: checkpoint_folders(config.output), first)
        with started(context, tmp_path / "second", 2, slow, config) as second:
            assert exit_codes(second) == [2, 1]
        assert f"another process is writing to {config.output}: wait for it" in second[0].said()
        assert "rank 0 of 2 could not go on" in second[1].said()
        assert all(rank.process.is_alive() for rank in first)


def test_more_copies_than_ranks_divide_into_are_refused(config, context, tmp_path):
    config = replace(config, parallel=ParallelConfig(replicate=3))
    with started(context, tmp_path, 2, train_rank, config) as ranks:
        assert set(exit_codes(ranks)) <= {1, 2}
    assert "parallel.replicate 3 does not divide the number of ranks, 2" in ranks[0].said()
    assert not Path(config.output).exists()


def under_torchrun(config, folder, *words):
    """Two ranks of words that end in the program, which trains 26 steps; its output."""
    (folder / "settings.yaml").write_text(SETTINGS.format(data=config.data, output=config.output))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    done = subprocess.run(
        [*launcher, *address, *words, "train", "--config", "settings.yaml"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 26 steps") == 1
    return done


@pytest.mark.slow
def test_torchrun(alone, config, tmp_path):
    under_torchrun(config, tmp_path, "-m", "miniplm")
    check_equal_losses(config.output, alone.output)


@pytest.mark.slow
def test_torchrun_starts_anew_what_a_signal_to_one_rank_has_stopped(alone, config, tmp_path):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    said = under_torchrun(config, tmp_path, "--max-restarts", "1", "signalled.py").stderr
    assert "stopped at step 7: the same command continues" in said
    assert "continuing after step 7 of 26" in said
    check_equal_losses(config.output, alone.output)


SIGNALLED = """
import os, signal, sys
from miniplm.cli import main
from miniplm.training import loop
original, calls = loop.train_step, []
def train_step(*arguments, **settings):
    calls.append(1)
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], len(calls)) == ("0", "1", 8):
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **settings)
loop.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = """
data: {data}
output: {output}
model:
  {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4,
    num_key_value_heads: 2}}
steps: 26
batch_tokens: 200
micro_batch_tokens: 70
optimizer: {{lr: 0.01, warmup_steps: 5}}
eval: {{data: {data}, interval: 9, chunks: 6}}
checkpoint: {{interval: 6}}
log_interval: 4
device: cpu
peak_tflops: 0.1
"""
