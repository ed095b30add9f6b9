"""train: the step against plain PyTorch, the data order against its definition, and runs that are killed against one that is not."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miniplm import checkpoints, training
from miniplm.artifacts import UserError, complete_output, latest_checkpoint, open_output, read_json
from miniplm.batches import IGNORE
from miniplm.config import OptimizerConfig, StudentConfig, TrainConfig
from miniplm.model import load_model
from miniplm.training import DataOrder, TrainingDiverged, global_batch, learning_rate, make_optimizer, train, train_step

STUDENT = StudentConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
EOS = 0


@pytest.fixture
def config(tiny_corpus, tmp_path) -> TrainConfig:
    """40 steps of some 300 tokens in about six micro-batches, with every interval out of step with the others."""
    return TrainConfig(data=tiny_corpus, output=str(tmp_path / "out"), model=STUDENT, steps=40, batch_tokens=300, micro_batch_tokens=70,
                       optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5), eval_data=tiny_corpus, eval_interval=6, eval_rows=9,
                       checkpoint_interval=9, log_interval=4, device="cpu", peak_tflops=0.1)


def metrics(output) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("tokens_per_second", "mfu")} for line in lines]


def files(folder) -> dict[str, bytes]:
    """All files under a folder, but for tensorboard's (their names carry the time) and the metrics."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and "tensorboard" not in path.parts and path.name != "metrics.jsonl"}


def check_equal_runs(output, other):
    assert metrics(output) == metrics(other)
    assert files(output) == files(other)


def write_corpus(folder, chunks, like) -> str:
    """A complete corpus of these chunks with the tokenizer of the corpus `like`."""
    import pyarrow as pa

    from miniplm import storage

    manifest = read_json(Path(like) / "manifest.json")
    open_output(folder, "prepare", {})
    columns = {"input_ids": pa.array(chunks, pa.list_(pa.int32())), "domain": pa.array(["default"] * len(chunks)),
               "num_tokens": pa.array([len(ids) for ids in chunks], pa.int32())}
    content = storage.write_dataset_files(folder, [storage.write_shard(folder, 0, columns)], with_scores=False)
    shutil.copytree(Path(like) / "tokenizer", Path(folder) / "tokenizer")
    predictions = sum(token != EOS for ids in chunks for token in ids[:-1])
    complete_output(folder, {**manifest, "fingerprint": content, "rows": len(chunks), "tokens": sum(map(len, chunks)), "predictions": predictions})
    return str(folder)


# ---- data order ----

def stream(num_tokens, seed, shuffle, epochs):
    """(row, first prediction) over the epochs, one by one."""
    at = 0
    for epoch in range(epochs):
        rows = [row for row, n in enumerate(num_tokens) if n > 1]
        if shuffle:
            rows = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
        for row in rows:
            yield row, at
            at += int(num_tokens[row]) - 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows, longest, batch_tokens", [(200, 40, 100), (57, 1025, 1024), (5, 12, 500), (1, 9, 8), (300, 3, 7)])
def test_steps_cut_the_stream_of_epochs_by_tokens(rows, longest, batch_tokens, shuffle):
    num_tokens = np.random.default_rng(rows).integers(0, longest + 1, rows)  # 0 and 1 give no prediction
    num_tokens[-1] = longest
    order = DataOrder(num_tokens, batch_tokens, seed=3, shuffle=shuffle)
    steps = 2 * order.steps_per_epoch + 3
    epochs = -(-steps * batch_tokens // order.epoch_tokens)
    expected = [[] for _ in range(steps)]
    for row, start in stream(num_tokens, 3, shuffle, epochs):
        if start < steps * batch_tokens:
            expected[start // batch_tokens].append(row)
    got = [order.step(step).tolist() for step in range(steps)]
    assert got == expected
    assert all(got)  # no step is empty
    seen = np.cumsum([sum(num_tokens[row] - 1 for row in part) for part in got])
    assert (abs(seen - batch_tokens * np.arange(1, steps + 1)) < longest).all()
    for step in reversed(range(steps)):  # whatever was asked for before
        assert DataOrder(num_tokens, batch_tokens, seed=3, shuffle=shuffle).step(step).tolist() == order.step(step).tolist() == got[step]


def test_epochs_and_seeds_differ_and_corpus_order_is_kept():
    num_tokens = np.full(50, 11)

    def epoch(number, seed=1, shuffle=True):
        return DataOrder(num_tokens, 500, seed, shuffle).step(number).tolist()

    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(50))
    assert len({tuple(rows) for rows in (epoch(0), epoch(1), epoch(0, seed=2), range(50))}) == 4
    assert epoch(0, shuffle=False) == epoch(7, shuffle=False) == list(range(50))


def test_order_refuses_what_leaves_steps_empty():
    with pytest.raises(UserError, match="batch_tokens 9 is below the longest chunk of the corpus, 10 predictions"):
        DataOrder(np.array([3, 11, 4]), 9, 0)
    assert DataOrder(np.array([3, 11, 4]), 10, 0).steps_per_epoch == 2
    for nothing in ([], [1, 0, 1]):
        with pytest.raises(UserError, match="no token to predict"):
            DataOrder(np.array(nothing, np.int64), 10, 0)


# ---- the step ----

def test_learning_rate():
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.25, warmup_steps=10)
    rates = [learning_rate(step, 50, config) for step in range(1, 51)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[29] == pytest.approx((2.0 + 0.5) / 2)  # half-way between peak and end
    assert rates[49] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(1, 1, OptimizerConfig(lr=2.0, warmup_steps=0)) == pytest.approx(0.2)
    assert [learning_rate(step, 4, config) for step in (1, 4)] == pytest.approx([0.2, 0.8])  # the run ends within the warm-up


def test_schedule_is_that_of_transformers():
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    config = OptimizerConfig(lr=0.3, min_lr_ratio=0.1, warmup_steps=7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 7, 60, min_lr_rate=0.1)
    for step in range(1, 61):
        optimizer.step()
        theirs.step()
        assert learning_rate(step, 60, config) == pytest.approx(theirs.get_last_lr()[0])


@pytest.fixture(scope="module")
def rows():
    """Chunks of very different lengths with EOS inside, some with next to nothing to predict."""
    generator = np.random.default_rng(0)
    chunks = [generator.integers(1, 500, n) for n in (40, 3, 65, 2, 17, 64, 9, 33)]
    for chunk in chunks:
        chunk[generator.random(len(chunk)) < 0.15] = EOS
    chunks[3][:] = EOS  # no target at all
    return chunks


@pytest.fixture
def folder(tiny_model, tmp_path):
    return tiny_model(tmp_path / "model", seed=1, tie_word_embeddings=False, initializer_range=0.1)


def plain_loss(model, rows):
    """Mean −log p over all positions whose input is not EOS, from transformers' own logits, one chunk at a time."""
    losses = []
    for row in rows:
        ids = torch.from_numpy(np.asarray(row)).long()
        log_prob = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_prob.gather(1, ids[1:, None])[ids[:-1] != EOS, 0])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 10_000])
def test_step_is_that_of_plain_pytorch(folder, rows, micro_batch_tokens):
    from transformers import AutoModelForCausalLM

    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, max_grad_norm=0.5)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double(), load_model(folder)
    adam = torch.optim.AdamW(theirs.parameters(), lr=1, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=False)
    optimizer = make_optimizer(ours, config)
    batches = global_batch(rows, EOS, micro_batch_tokens)
    assert len(batches) == {1: 8, 70: 5, 10_000: 1}[micro_batch_tokens]
    for step in range(1, 4):
        adam.param_groups[0]["lr"] = step * config.lr
        adam.zero_grad()
        expected = plain_loss(theirs, rows)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
        adam.step()
        loss, grad_norm = train_step(ours, optimizer, batches, step * config.lr, config.max_grad_norm, torch.float32)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert grad_norm == pytest.approx(expected_norm.item(), rel=1e-4) and grad_norm > config.max_grad_norm
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.double(), theirs[name], atol=1e-5), name


def test_bfloat16_compute_accumulates_in_float32(folder, rows):
    model = load_model(folder)
    parts = []  # the gradient of each micro-batch on its own
    for batch in global_batch(rows * 8, EOS, 40):
        model.zero_grad()
        training.summed_loss(model, batch, torch.bfloat16).backward()
        parts.append({name: parameter.grad.double() for name, parameter in model.named_parameters()})
    model.zero_grad()
    for batch in global_batch(rows * 8, EOS, 40):
        training.summed_loss(model, batch, torch.bfloat16).backward()
    assert len(parts) > 40
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        exact = sum(part[name] for part in parts)
        assert (parameter.grad - exact).norm() <= 1e-6 * exact.norm(), name
        rounded = functools.reduce(lambda total, part, name=name: (total + part[name]).bfloat16().double(), parts, torch.zeros_like(exact))
        assert (rounded - exact).norm() > 1e-3 * exact.norm(), name  # what adding up in bfloat16 would give


def test_bfloat16_step_is_close_and_keeps_small_updates(folder, rows):
    batches, models = global_batch(rows, EOS, 100), {}
    for dtype in (torch.float32, torch.bfloat16):
        models[dtype] = model = load_model(folder)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss, _ = train_step(model, make_optimizer(model, OptimizerConfig()), batches, 1e-6, 1.0, dtype)
        models[dtype].loss = loss
        for name, parameter in model.named_parameters():  # 1e-6 is far below the resolution of bfloat16 weights
            moved = (parameter - before[name]).abs()
            assert parameter.dtype == torch.float32 and 0 < moved.max() < 2e-6, name
    assert models[torch.bfloat16].loss == pytest.approx(models[torch.float32].loss, rel=3e-3)
    assert models[torch.bfloat16].loss != models[torch.float32].loss


def test_step_without_a_target_is_skipped(folder):
    model = load_model(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss, _ = train_step(model, make_optimizer(model, OptimizerConfig()), global_batch([np.full(5, EOS)], EOS, 10), 1e-2, 1.0, torch.float32)
    assert math.isnan(loss)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_core_needs_no_datasets(tmp_path):
    code = """
import sys
sys.modules.update({"datasets": None, "pyarrow": None})
import numpy as np, torch
from miniplm.config import OptimizerConfig, StudentConfig
from miniplm.decoder import Decoder, student_config
from miniplm.training import DataOrder, global_batch, make_optimizer, train_step
rows = [np.arange(2, 2 + n) for n in (9, 30, 17)]
order = DataOrder(np.array([len(row) for row in rows]), 40, seed=0)
model = Decoder(student_config(StudentConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2), 50, 0))
optimizer = make_optimizer(model, OptimizerConfig())
losses = [train_step(model, optimizer, global_batch([rows[i] for i in order.step(k)], 0, 20), 1e-2, 1.0, torch.float32)[0] for k in range(20)]
assert losses[-1] < losses[0] - 1, losses
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ---- whole runs ----

@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """(config, output) of a run that nothing stops: what every killed one must equal."""
    config = globals()["config"].__wrapped__(tiny_corpus, tmp_path_factory.mktemp("whole"))
    train(config)
    return config


def test_run_writes_what_it_says(whole, tiny_corpus, capsys):
    from safetensors import safe_open
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = Path(whole.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in range(1, 41) if step % 4 == 0 or step % 6 == 0]
    assert [line["step"] for line in lines] == steps
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12, 18, 24, 30, 36, 40]
    assert [line["lr"] for line in lines] == [learning_rate(step, 40, whole.optimizer) for step in steps]
    corpus_tokens = training.Corpus(tiny_corpus).num_tokens
    order = DataOrder(corpus_tokens, 300, whole.seed)
    tokens = np.cumsum([(corpus_tokens[order.step(step)] - 1).sum() for step in range(40)])
    assert [line["tokens"] for line in lines] == [tokens[step - 1] for step in steps]
    model = load_model(output)
    flops = 3 * model.flops_per_token(order.epoch_tokens // len(order.rows))
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e11)

    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000036", "step-00000040"]
    checkpoint = latest_checkpoint(output)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    corpus = training.Corpus(tiny_corpus)
    with torch.no_grad():
        assert lines[-1]["eval_loss"] == pytest.approx(plain_loss(theirs, corpus.rows(range(9))).item(), abs=1e-5)
    assert AutoTokenizer.from_pretrained(checkpoint)("a model")["input_ids"] == AutoTokenizer.from_pretrained(corpus.tokenizer)("a model")["input_ids"]
    with safe_open(f"{checkpoint}/optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()}
    assert all(path.suffix in (".json", ".safetensors") for path in Path(checkpoint).iterdir())

    manifest = read_json(output / "manifest.json")
    assert manifest["complete"] and manifest["stage"] == "train"
    expected = {"steps": 40, "skipped": 0, "tokens": int(tokens[-1]), "loss": lines[-1]["loss"], "eval_loss": lines[-1]["eval_loss"],
                "parameters": theirs.num_parameters()}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["corpus"]["fingerprint"] == corpus.fingerprint and manifest["corpus"]["domains"] == corpus.manifest["domains"]
    assert str(output) not in (output / "manifest.json").read_text() and tiny_corpus not in (output / "manifest.json").read_text()

    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(line["step"], pytest.approx(line["loss"])) for line in lines]

    before = files(output)
    train(replace(whole, log_interval=1, checkpoint_interval=2, keep_checkpoints=1, micro_batch_tokens=64, max_skipped_steps=1))
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(output) == before


def test_logged_loss_is_the_mean_over_the_interval(config, whole, capsys):
    train(replace(config, log_interval=1))
    every = {line["step"]: line["loss"] for line in metrics(config.output)}
    assert sorted(every) == list(range(1, 41))
    last = 0
    for line in metrics(whole.output):
        assert line["loss"] == pytest.approx(np.mean([every[step] for step in range(last + 1, line["step"] + 1)]), rel=1e-12)
        last = line["step"]
    out = capsys.readouterr().out
    assert "trained 40 steps on" in out and f"loss {every[40]:.4f}, held-out loss" in out and "tokens/s" in out


def test_micro_batches_do_not_change_the_mathematics(config, whole):
    train(replace(config, micro_batch_tokens=100_000))
    for one, many in zip(metrics(config.output), metrics(whole.output), strict=True):
        assert one["loss"] == pytest.approx(many["loss"], rel=1e-4) and one["eval_loss" if "eval_loss" in one else "lr"]
        assert one["tokens"] == many["tokens"]


def test_it_learns(tiny_corpus, tmp_path):
    pattern = random.Random(0).choices(range(1, 500), k=37)
    data = write_corpus(tmp_path / "corpus", [(pattern * 3)[i % 37:i % 37 + 60] for i in range(50)], tiny_corpus)
    train(TrainConfig(data=data, output=str(tmp_path / "out"), model=STUDENT, steps=60, batch_tokens=600, optimizer=OptimizerConfig(lr=2e-2, warmup_steps=5),
                      eval_data=data, device="cpu", peak_tflops=1))
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert metrics(tmp_path / "out")[0]["loss"] > 4
    assert manifest["loss"] < 0.2 and manifest["eval_loss"] < 0.2 < math.log(500) / 20


def test_default_is_one_pass_and_a_small_corpus_repeats(config, tiny_corpus):
    epoch_tokens = int((training.Corpus(tiny_corpus).num_tokens - 1).sum())
    train(replace(config, steps=None))
    assert read_json(f"{config.output}/manifest.json")["steps"] == -(-epoch_tokens // 300)
    train(replace(config, steps=None, batch_tokens=524_288, output=config.output + "2", micro_batch_tokens=4096))
    manifest = read_json(f"{config.output}2/manifest.json")
    assert manifest["steps"] == 1 and abs(manifest["tokens"] - 524_288) < 65


def test_settings_reach_the_mathematics(config, whole):
    losses = {json.dumps(metrics(whole.output)[0]["loss"])}
    variants = [dict(seed=11), dict(shuffle=False), dict(document_mask=True), dict(dtype="bfloat16"), dict(model=replace(STUDENT, vocab_size=512)),
                dict(optimizer=replace(config.optimizer, betas=(0.5, 0.6)))]
    for number, changed in enumerate(variants):
        # Equal up to here, another run from there: the first run's folder refuses each.
        with pytest.raises(UserError, match="another train run"):
            train(replace(whole, **changed))
        variant = replace(config, output=f"{config.output}{number}", steps=4, eval_data=None, **changed)
        train(variant)
        losses.add(json.dumps(metrics(variant.output)[0]["loss"]))
    assert len(losses) == len(variants) + 1


# ---- stops and kills ----

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["miniplm.training", "datasets", "transformers", "torch.utils.tensorboard"])


def start(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for_line(output, step, process):
    """Until metrics.jsonl has come past `step`."""
    path, deadline = Path(output) / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        try:
            if json.loads(path.read_text().splitlines()[-1])["step"] >= step:
                return
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_at_random_moments_it_ends_alike(config, whole, number):
    generator, kills = random.Random(number), 0
    for step in (2, 12, 20, 30):
        process = start(train, config)
        wait_for_line(config.output, step, process)
        time.sleep(generator.uniform(0, 0.03))
        os.kill(process.pid, number)
        process.join(60)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert process.exitcode in (0, expected)
        kills += process.exitcode == expected
        if number != signal.SIGKILL and process.exitcode:  # the last finished step was saved
            saved = read_json(Path(latest_checkpoint(config.output)) / "trainer_state.json")["state"]["step"]
            assert saved >= max(line["step"] for line in metrics(config.output))
    assert kills >= 2
    train(config)
    check_equal_runs(config.output, whole.output)
    assert not list(Path(config.output, "checkpoints").glob(".*"))


def killed_while(function, config):
    """train(), killed within the fourth call of a function of `training` or `checkpoints`."""
    module = training if hasattr(training, function) else checkpoints
    original, calls = getattr(module, function), []

    def dying(*arguments, **keywords):
        calls.append(1)
        result = original(*arguments, **keywords)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, dying)
    train(config)


@pytest.mark.parametrize("function", ["save_checkpoint", "prune_checkpoints", "held_out_loss", "write_json", "hash_files"])
def test_killed_between_two_writes_it_ends_alike(config, whole, function):
    process = start(killed_while, function, config)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    train(config)
    check_equal_runs(config.output, whole.output)


@pytest.mark.parametrize("function, call", [
    ("summed_loss", 1), ("summed_loss", 29), ("held_out_loss", 2), ("held_out_loss", 7), ("save_checkpoint", 2), ("train_step", 9)])
def test_stopped_at_a_given_call_it_ends_alike(config, whole, function, call, monkeypatch, capsys):
    """Within a step, an evaluation (at a checkpoint's step too, and at the last), a save; and stopped again when continued."""
    for _ in range(2):
        original, calls = getattr(training, function), []

        def stopping(*arguments, original=original, calls=calls, **keywords):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch, pytest.raises(training.Interrupted) as stopped:
            patch.setattr(training, function, stopping)
            train(config)
            raise training.Interrupted(128 + signal.SIGTERM)  # the second run may have fewer calls left than that
        assert stopped.value.code == 143
    assert "stopped at step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    train(config)
    check_equal_runs(config.output, whole.output)


def hang_in_first_step(config):
    def hang(*_):
        Path(config.output, "hanging").touch()
        time.sleep(120)
        raise AssertionError("not killed")

    training.summed_loss = hang
    train(config)


def test_second_signal_ends_at_once(config):
    process = start(hang_in_first_step, config)
    deadline = time.monotonic() + 60
    while not Path(config.output, "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(1)
    assert process.is_alive()  # the first one waits for the step
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == -signal.SIGTERM


def test_stopped_command_exits_with_the_signal_and_one_line(config, tiny_corpus, tmp_path):
    command = [sys.executable, "-m", "miniplm.cli", "train", "--data", tiny_corpus, "--output", config.output, "--model.hidden_size", "32",
               "--model.num_hidden_layers", "1", "--model.num_attention_heads", "4", "--steps", "100000", "--batch_tokens", "300", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not Path(config.output, "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("stopped at step ") and err.endswith(": the same command continues\n")
    assert "Traceback" not in err and out == ""


def test_metrics_of_a_cut_off_line_and_of_later_steps_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in (2, 4, 6, 8)]
    for cut, kept in [(lines[3][:-9], lines[:3]), (lines[3][:-1], lines[:3]), (lines[3], lines[:4]), ("", lines[:3])]:
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + cut)
        written = checkpoints.Metrics(tmp_path, 100)
        assert written.last == json.loads(kept[-1])
        written.close()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
    written = checkpoints.Metrics(tmp_path, 5)
    written.write({"step": 6, "loss": 0.5})
    written.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2]) + '{"step": 6, "loss": 0.5}\n'


def test_runs_without_tensorboard(config, whole, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(config)
    assert capsys.readouterr().err.count("tensorboard is not installed") == 1
    check_equal_runs(config.output, whole.output)


# ---- losses that are not finite ----

def poison(monkeypatch, steps, kind):
    """Make the loss or the gradient of these steps (1, 2, …) of the next run NaN or infinite."""
    original_step, original_loss, now = training.train_step, training.summed_loss, []

    def counted_step(*arguments):
        now.append(1)
        return original_step(*arguments)

    def poisoned_loss(model, batch, dtype):
        loss = original_loss(model, batch, dtype)
        if len(now) not in steps or not torch.is_grad_enabled():
            return loss
        if kind == "gradient":
            return loss + (model.head_weight.sum() * 0).sqrt()  # adds 0, whose gradient is 0 · ∞
        return loss * kind

    monkeypatch.setattr(training, "train_step", counted_step)
    monkeypatch.setattr(training, "summed_loss", poisoned_loss)


@pytest.mark.parametrize("kind", [math.nan, math.inf, "gradient"])
def test_step_that_is_not_finite_is_skipped(config, kind, monkeypatch, capsys):
    config = replace(config, steps=12, log_interval=3, checkpoint_interval=1, keep_checkpoints=12)
    with monkeypatch.context() as patch:
        poison(patch, {5, 6, 9}, kind)
        train(config)
    lines = {line["step"]: line for line in metrics(config.output)}
    assert sorted(lines) == [3, 5, 6, 9, 12]
    assert [step for step, line in lines.items() if line.get("skipped")] == [5, 6, 9]
    for step in (5, 6, 9):
        assert lines[step]["grad_norm"] is None and lines[step]["lr"] == learning_rate(step, 12, config.optimizer)
    assert lines[6]["loss"] is None and lines[5]["loss"] and lines[9]["loss"]  # nothing since the line before; the steps 4; 7 and 8
    err = capsys.readouterr().err
    assert [f"step {step} skipped: loss " in err for step in range(1, 13)] == [step in (5, 6, 9) for step in range(1, 13)]
    manifest = read_json(f"{config.output}/manifest.json")
    assert manifest["skipped"] == 3 and manifest["steps"] == 12

    def weights(step):
        return checkpoints.checkpoint_folder(config.output, step).joinpath("model.safetensors").read_bytes()

    assert weights(4) == weights(5) == weights(6) != weights(7)

    # Weights and moments go on as if the skipped steps had not been: the same updates with the same rates and rows.
    model = training._initial_model(config, setup := training._set_up(config))
    optimizer = make_optimizer(model, config.optimizer)
    for step in (1, 2, 3, 4, 7, 8, 10, 11, 12):
        batch = global_batch(setup.corpus.rows(setup.order.step(step - 1)), EOS, config.micro_batch_tokens)
        train_step(model, optimizer, batch, learning_rate(step, 12, config.optimizer), 1.0, torch.float32)
    ours = load_model(config.output)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))


def test_skips_survive_a_stop(config, monkeypatch):
    """A run stopped within a row of skipped steps counts on, and skips what the uninterrupted run skips."""
    config = replace(config, steps=12, max_skipped_steps=4, eval_data=None)
    other = replace(config, output=config.output + "2")
    with monkeypatch.context() as patch:
        poison(patch, {5, 6, 7}, math.nan)
        train(config)
    with monkeypatch.context() as patch, pytest.raises(training.Interrupted):
        poison(patch, {5, 6, 7}, math.nan)
        poisoned = training.train_step
        patch.setattr(training, "train_step", lambda *arguments: poisoned(*arguments) if signal.getsignal(signal.SIGTERM) else None)
        warn = training._note
        patch.setattr(training, "_note", lambda text: (warn(text), "step 6 skipped" in text and os.kill(os.getpid(), signal.SIGTERM)))
        train(other)
    with monkeypatch.context() as patch:
        poison(patch, {1}, math.nan)  # its first step is step 7
        train(other)
    check_equal_runs(config.output, other.output)


def test_too_many_in_a_row_stop_the_run(config, monkeypatch, capsys):
    config = replace(config, checkpoint_interval=2, keep_checkpoints=1)  # max_skipped_steps 10
    good = checkpoints.checkpoint_folder(config.output, 6)
    with monkeypatch.context() as patch:
        poison(patch, set(range(7, 17)), "gradient")
        patch.setattr(training, "save_checkpoint", functools.partial(keep_copy, good))
        with pytest.raises(TrainingDiverged) as raised:
            train(config)
    assert "10 steps in a row, up to step 16" in str(raised.value) and "\n" not in str(raised.value)
    assert files(good) == files(f"{good}-copy") and files(good)
    assert not checkpoints.checkpoint_folder(config.output, 16).exists()
    assert [line["step"] for line in metrics(config.output) if line.get("skipped")] == list(range(7, 17))
    assert not read_json(f"{config.output}/manifest.json")["complete"]
    shutil.rmtree(f"{good}-copy")

    with monkeypatch.context() as patch:  # nine in a row do not; and the run goes on from what the first one left
        poison(patch, {2}, math.nan)
        train(config)
    assert read_json(f"{config.output}/manifest.json")["complete"]


def keep_copy(good, folder, *arguments):
    """save_checkpoint, with a copy of the checkpoint `good` beside it."""
    checkpoints.save_checkpoint(folder, *arguments)
    if folder == good:
        shutil.copytree(folder, folder.parent / f"{folder.name}-copy".replace("step", "copy-of-step"))


# ---- damage and bad input ----

def stop_after(config, step, monkeypatch):
    """A run stopped after `step` steps."""
    original, calls = training.train_step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(training.Interrupted):
        patch.setattr(training, "train_step", stopping)
        train(config)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage, name", [(truncate, "model.safetensors"), (truncate, "optimizer.safetensors"), (truncate, "trainer_state.json"),
                                          (flip, "model.safetensors"), (Path.unlink, "config.json"), (Path.unlink, "trainer_state.json")])
def test_damaged_checkpoint_gives_way_to_the_one_before(config, whole, damage, name, monkeypatch, capsys):
    stop_after(config, 20, monkeypatch)
    folder = Path(config.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000018", "step-00000020"]
    damage(folder / "step-00000020" / name)
    (folder / "step-00000018" / "README.md").write_text("a file of the user's does no harm")
    capsys.readouterr()
    train(config)
    err = capsys.readouterr().err
    assert "step-00000020 is damaged" in err and "continuing from step-00000018" in err
    check_equal_runs(config.output, whole.output)


def test_all_checkpoints_damaged_is_an_error_that_removes_nothing(config, monkeypatch):
    stop_after(config, 20, monkeypatch)
    for path in Path(config.output).glob("checkpoints/*/model.safetensors"):
        truncate(path)
    before = files(config.output)
    with pytest.raises(UserError, match=r"step-00000020 is damaged \(model.safetensors is not as it was written\) and there is no whole one before it"):
        train(config)
    assert files(config.output) == before


def test_checkpoint_of_another_run_is_refused(config, whole, monkeypatch):
    stop_after(replace(config, seed=99), 5, monkeypatch)
    shutil.copytree(Path(whole.output) / "checkpoints" / "step-00000040", Path(config.output) / "checkpoints" / "step-00000040")
    with pytest.raises(UserError, match="step-00000040 belongs to another run"):
        train(replace(config, seed=99))


def limited(config, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails as on a full disk
    try:
        train(config)
    except OSError as error:
        sys.exit("checkpoint" in str(error) and 42)


def test_full_disk_leaves_the_last_checkpoint(config, whole, monkeypatch):
    stop_after(config, 20, monkeypatch)
    before = files(Path(config.output) / "checkpoints")
    process = start(limited, config, 100_000)
    process.join(60)
    assert process.exitcode == 42
    assert files(Path(config.output) / "checkpoints") == before
    train(config)
    check_equal_runs(config.output, whole.output)


def test_changed_intervals_continue_the_run(config, whole, monkeypatch):
    stop_after(config, 20, monkeypatch)
    train(replace(config, checkpoint_interval=7, keep_checkpoints=1, max_skipped_steps=3, eval_interval=100, log_interval=40))
    assert [path.name for path in Path(config.output, "checkpoints").iterdir()] == ["step-00000040"]
    assert metrics(config.output)[-1]["eval_loss"] == metrics(whole.output)[-1]["eval_loss"]


def test_bad_input_leaves_nothing_behind(config, tiny_corpus, tiny_model, tmp_path):
    nothing = write_corpus(tmp_path / "nothing", [[EOS, EOS, 5], [7], [EOS]], tiny_corpus)
    other = write_corpus(tmp_path / "other", [[1, 2, 3]], tiny_corpus)
    manifest = read_json(Path(other) / "manifest.json")
    Path(other, "manifest.json").write_text(json.dumps({**manifest, "tokenizer_fingerprint": "another"}))
    model = tiny_model(tmp_path / "model")
    small = tiny_model(tmp_path / "small", vocab_size=400)
    broken = Path(tiny_model(tmp_path / "broken"))
    truncate(broken / "model.safetensors")
    reordered = Path(tiny_model(tmp_path / "reordered"))
    tokenizer = json.loads((reordered / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (reordered / "tokenizer.json").write_text(json.dumps(tokenizer))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps({"model_type": "no-such-model", "vocab_size": 500}))
    (tmp_path / "text.json").write_text("{model")
    for changed, message in [
        (dict(data=str(tmp_path / "missing")), "does not exist"),
        (dict(data=nothing), "holds no token to predict"),
        (dict(eval_data=nothing), "hold no token to predict"),
        (dict(eval_data=other), "different tokenizers"),
        (dict(batch_tokens=32), "batch_tokens 32 is below the longest chunk"),
        (dict(model=replace(STUDENT, vocab_size=499)), "vocab_size 499"),
        (dict(init_from=str(tmp_path / "missing")), "missing"),
        (dict(init_from=str(broken)), "model.safetensors is not a whole"),
        (dict(init_from=str(reordered)), "the tokenizer of .*reordered is not the corpus's"),
        (dict(init_from=small), "predicts 400 ids"),
        (dict(model_config=str(tmp_path / "missing.json")), "does not exist"),
        (dict(model_config=str(tmp_path / "text.json")), "not valid JSON"),
        (dict(model_config=str(unknown)), "transformers cannot read"),
        (dict(model_config=small), "vocab_size 400 in .* is below the corpus's 500"),
        (dict(device="cuda:77"), "cuda:77"),
        (dict(output=str(Path(model) / "config.json")), "is a file"),
        (dict(output=model), "not empty"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            train(replace(config, **changed))
        assert "\n" not in str(raised.value)
        assert not Path(config.output).exists()


def test_warm_up_past_the_end_is_said(config, capsys):
    train(replace(config, steps=5, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=50)))
    assert "optimizer.warmup_steps 50 is not below the run's 5 steps: the learning rate only rises, to 0.001 of 0.01" in capsys.readouterr().err
    assert metrics(config.output)[-1]["lr"] == pytest.approx(1e-3)


# ---- where training starts ----

def test_starts_from_weights(config, tiny_model, tiny_corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    start = tiny_model(tmp_path / "start", seed=3)
    train(replace(config, init_from=start, steps=1, log_interval=1))
    corpus = training.Corpus(tiny_corpus)
    rows = corpus.rows(DataOrder(corpus.num_tokens, 300, config.seed).step(0))
    with torch.no_grad():
        assert metrics(config.output)[0]["loss"] == pytest.approx(plain_loss(AutoModelForCausalLM.from_pretrained(start), rows).item(), rel=1e-5)
    train(replace(config, init_from=config.output, output=config.output + "2", steps=2, eval_data=None))  # a training output is one too
    assert metrics(config.output + "2")[0]["loss"] < metrics(config.output)[0]["loss"]
    with pytest.raises(UserError, match="init_from was"):
        train(replace(config, init_from=tiny_model(tmp_path / "other", seed=4), steps=1))


@pytest.mark.parametrize("architecture", ["LlamaConfig", "GPTNeoXConfig", "MambaConfig"])
def test_starts_from_any_architecture(config, architecture, monkeypatch, tmp_path):
    import transformers

    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    if architecture == "MambaConfig":
        sizes = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)
    getattr(transformers, architecture)(**sizes, bos_token_id=1, eos_token_id=2, dtype="bfloat16").save_pretrained(tmp_path / "architecture")
    config = replace(config, model_config=str(tmp_path / "architecture" / "config.json"), steps=10, micro_batch_tokens=200)
    train(config)
    lines = metrics(config.output)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    saved = read_json(Path(latest_checkpoint(config.output)) / "config.json")
    assert (saved["eos_token_id"], saved["dtype"]) == (EOS, "float32")
    again = replace(config, output=config.output + "2")
    stop_after(again, 5, monkeypatch)
    train(again)
    check_equal_runs(config.output, again.output)


def test_equal_seeds_give_equal_weights_and_leave_the_callers_numbers_alone(config):
    setup = training._set_up(config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = training._initial_model(config, setup)
    assert torch.equal(torch.rand(3), expected)
    second, other = training._initial_model(config, setup), training._initial_model(replace(config, seed=11), setup)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head_weight, other.head_weight)


def test_targets_after_eos_are_ignored(rows):
    batch = global_batch(rows, EOS, 10_000)[0]
    assert ((batch.targets == IGNORE) == (batch.input_ids == EOS)).all()
    assert training.num_targets([batch]) == sum(int((row[:-1] != EOS).sum()) for row in rows)
