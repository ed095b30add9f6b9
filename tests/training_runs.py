"""What the tests of train share: a run, and how to compare two of them."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import chunks_of
from transformers import GPT2Config

from miniplm.config import CheckpointConfig, EvalConfig, OptimizerConfig, StudentConfig, TrainConfig
from miniplm.data.order import DataOrder
from miniplm.runtime.files import fingerprint, hash_files, read_json, write_json
from miniplm.runtime.interrupts import Interrupted
from miniplm.stages.train import train
from miniplm.training import loop

STUDENT = StudentConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)
EOS = 0  # of the tiny tokenizer


def make_config(data, output) -> TrainConfig:
    """26 steps of some 200 tokens in about four micro-batches. Lines at 4, 8, …; checkpoints at 6, 12, …;
    evaluations at 9, 18 and the end."""
    return TrainConfig(
        data=data,
        output=str(output),
        model=STUDENT,
        steps=26,
        batch_tokens=200,
        micro_batch_tokens=70,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
        eval=EvalConfig(data=data, interval=9, chunks=6),
        checkpoint=CheckpointConfig(interval=6),
        log_interval=4,
        device="cpu",
        peak_tflops=0.1,
    )


def metrics(output) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "mfu", "checksum")}
        for line in lines
    ]


def files(folder) -> dict[str, bytes]:
    """All files under a folder, but for tensorboard's (their names carry the time), the metrics, and how long
    it took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
        and "tensorboard" not in path.parts
        and path.name not in ("metrics.jsonl", "wall_time.json")
    }


def check_equal_runs(output, other):
    assert metrics(output) == metrics(other)
    assert files(output) == files(other)


def stop_after(config, step, monkeypatch):
    """A run stopped after `step` steps."""
    original, calls = loop.train_step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "train_step", stopping)
        train(config)


TEACHERS = {
    "wider": dict(hidden_size=64, num_hidden_layers=3),
    "higher head": dict(vocab_size=512, tie_word_embeddings=False),
    "lower head": dict(vocab_size=480),
    "adapted": dict(config_class=GPT2Config, n_embd=48, n_layer=1, n_head=2),
}


def make_teachers(tiny_model, root) -> dict[str, str]:
    """Random models of all kinds that can teach, by name."""
    return {name: tiny_model(root / name, seed=7, **settings) for name, settings in TEACHERS.items()}


def seal(checkpoint: Path, identity: str | None = None) -> None:
    """Make a checkpoint that a test has changed a whole one, of the run with this identity's fingerprint."""
    path = checkpoint / "trainer_state.json"
    found = read_json(path)
    files = {name: hash_files([checkpoint / name]) for name in found["files"]}
    content = {"identity": identity or found["identity"], "state": found["state"], "files": files}
    write_json(path, {**content, "checksum": fingerprint(content)})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap_two_tokens(folder) -> None:
    """Give two tokens of a tokenizer each other's ids."""
    path = Path(folder) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))


def flip_bit(path, generator: random.Random):
    """Flip one bit of a file, anywhere in it."""
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def plain_loss(model, rows):
    """Mean −log p over all positions whose input is not EOS, from transformers' own logits, one chunk at a
    time."""
    losses = []
    for row in rows:
        ids = torch.tensor(row, dtype=torch.int64)
        log_prob = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_prob.gather(1, ids[1:, None])[ids[:-1] != EOS, 0])
    return torch.cat(losses).mean()


def scores_again(config) -> int:
    """FLOPs of attention's scores that the backward pass of a run with STUDENT computes anew."""
    chunks, pairs = chunks_of(config.data), 0
    order = DataOrder(np.array([len(ids) for ids in chunks]), config.batch_tokens, config.seed)
    for row in np.concatenate([order.step(step) for step in range(config.steps)]):
        inputs = chunks[row][:-1]
        ends = [place + 1 for place, token in enumerate(inputs) if token == EOS and config.document_mask]
        pairs += sum(int(n) * (int(n) + 1) // 2 for n in np.diff([0, *ends, len(inputs)]))
    return 2 * STUDENT.num_hidden_layers * STUDENT.hidden_size * pairs
