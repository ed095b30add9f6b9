"""What pipeline.py gives every contender, a job (models with random weights) and synthetic chunks, and how it
looks at results and time."""

import contextlib
import math
import time
from typing import Callable, NamedTuple
from unittest import mock

import harness  # noqa: F401 (finds the package in a checkout that is not installed)
import numpy as np
import torch

from miniplm.config import OptimizerConfig, StudentConfig
from miniplm.data.chunking import chunk_ends
from miniplm.models.decoder import Decoder, student_config
from miniplm.models.flops import training_flops

EOS = 0
OPTIMIZER = OptimizerConfig()
STEPS = 4  # of training in a pass
MODELS = {  # 1.8B: Qwen1.5-1.8B
    "104M": StudentConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    ),
    "200M": StudentConfig(
        hidden_size=768, intermediate_size=2112, num_hidden_layers=12, num_attention_heads=12
    ),
    "500M": StudentConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16
    ),
    "1.2B": StudentConfig(
        hidden_size=1536,
        intermediate_size=4224,
        num_hidden_layers=24,
        num_attention_heads=16,
        tie_word_embeddings=False,
    ),
    "1.8B": StudentConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        tie_word_embeddings=False,
    ),
    "toy": StudentConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3, vocab_size=500
    ),
    "larger toy": StudentConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=500,
        tie_word_embeddings=False,
    ),
}


class Job(NamedTuple):
    configs: list  # transformers' configs: of the model to train; or of teacher and reference model, to score
    states: list  # their weights under transformers' names, on the CPU
    device: str
    dtype: torch.dtype  # of the matrix products
    length: int  # predictions per chunk, at most

    @property
    def trains(self) -> bool:
        return len(self.configs) == 1


class Contender(NamedTuple):
    # training: (chunks of each step, its learning rate) → its losses; scoring: chunks → scores [chunks], on
    # the CPU
    run: Callable
    models: list
    parts: dict  # part of the time → the calls that it is made of, as (owner, attribute)


def next_batch(batches):
    """In a function of its own, so that the wait for a batch can be timed."""
    return next(batches)


def make_job(names: list[str], device: str, dtype: torch.dtype, length: int, spread: bool) -> Job:
    """Random weights. spread: not those of a start, where biases are 0, norms 1 and all targets about as
    likely, so that errors would not show, but with random biases and norms and logits of standard deviation
    2."""
    torch.manual_seed(0)
    job = Job([], [], device, dtype, length)
    for name in names:
        config = student_config(MODELS[name], MODELS[name].vocab_size or 151_936, EOS)
        with torch.device(device):
            state = Decoder(config).state_dict()
        if spread:
            for key, value in state.items():
                if value.ndim == 1:
                    torch.nn.init.uniform_(value, 0.5, 1.5) if "norm" in key else torch.nn.init.normal_(
                        value, std=0.2
                    )
            state["model.norm.weight"] *= 2 / (config.initializer_range * config.hidden_size**0.5)
        stored = (
            torch.float32 if len(names) == 1 else dtype
        )  # master weights, or those that all contenders score with
        job.configs.append(config)
        job.states.append({key: value.to("cpu", stored, copy=True) for key, value in state.items()})
    return job


def synthetic_chunks(count: int, job: Job, seed: int) -> list[np.ndarray]:
    """Chunks of at most length + 1 ids, cut as prepare does it. Documents of log-normal length (median 0.3 ·
    length, mean 0.6 · length), each ended by EOS; the mean sentence has 20 ids; ids by Zipf's law: p(id) ~ 1
    / id."""
    rng = np.random.default_rng(seed)
    size, vocab_size = 2 * (count + 1) * (job.length + 1), job.configs[0].vocab_size
    ids = (vocab_size ** rng.random(size)).astype(np.int64).clip(EOS + 1, vocab_size - 1)
    ends = np.cumsum(rng.lognormal(np.log(0.3 * job.length), 1.2, size).astype(np.int64) + 1)
    ids[ends[ends < size]] = EOS
    chunks = np.split(ids, chunk_ends((ids == EOS) | (rng.random(size) < 1 / 20), job.length + 1))[:count]
    assert len(chunks) == count
    return chunks


def flops(job: Job, chunks) -> int:
    """What the models need for the chunks: every prediction once, no padding."""
    with torch.device("meta"):
        models = [Decoder(config) for config in job.configs]
    count = training_flops if job.trains else Decoder.flops_per_token
    return sum((len(chunk) - 1) * count(model, len(chunk) - 1) for chunk in chunks for model in models)


# ---- are the results right ----


def results(contender: Contender, job: Job, chunks) -> dict:
    """Of fresh models: {"scores"}, or {"loss", and the gradient of each parameter, clipped}; on the CPU."""
    if not job.trains:
        return {"scores": contender.run(chunks)}
    for _ in range(8):  # where there is a loss scale, it may have to come down first
        (loss,) = contender.run([chunks], [0.0])
        found = {name: parameter.grad.cpu() for name, parameter in contender.models[0].named_parameters()}
        if all(gradient.isfinite().all() for gradient in found.values()):
            break
    return {"loss": torch.tensor(loss), **found}


def errors(found: dict, truth: dict) -> dict:
    """‖x − x*‖ / ‖x*‖ of the scores, or of the loss and of all gradients as one vector; "inf": not finite."""
    assert found.keys() == truth.keys()
    gradients = [key for key in truth if key not in ("scores", "loss")]
    groups = {key: [key] for key in ("scores", "loss") if key in truth} | (
        {"gradient": gradients} if gradients else {}
    )

    def norm(tensors):
        return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))

    error = {
        key: norm(found[name] - truth[name].double() for name in names) / norm(truth[name] for name in names)
        for key, names in groups.items()
    }
    return {key: value if math.isfinite(value) else "inf" for key, value in error.items()}


def run_pass(contender: Contender, job: Job, chunks):
    """(results of a pass over the chunks, its seconds)"""
    if job.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    if job.trains:
        found = contender.run([chunks[step::STEPS] for step in range(STEPS)], [1e-4] * STEPS)
    else:
        found = contender.run(chunks)
    if job.device == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def split(contender: Contender, job: Job, chunks) -> dict:
    """Shares of a pass by the contender's parts."""
    spans, shares = [], dict.fromkeys(contender.parts, 0.0)

    def mark():
        if job.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(part, function):
        def call(*args, **kwargs):
            began = mark()
            result = function(*args, **kwargs)
            spans.append((part, began, mark()))
            return result

        return call

    with contextlib.ExitStack() as patches:
        for part, calls in contender.parts.items():
            for owner, name in calls:
                patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        _, seconds = run_pass(contender, job, chunks)
    for part, began, ended in spans:
        shares[part] += (ended - began if job.device == "cpu" else began.elapsed_time(ended) / 1e3) / seconds
    return {**shares, "other": 1 - sum(shares.values())}
