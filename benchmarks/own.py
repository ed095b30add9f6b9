"""miniplm's own contenders in pipeline.py, each a context manager, (job, chunks per batch) → Contender."""

import contextlib

import torch
import workload
from workload import EOS, OPTIMIZER, Contender, Job

from miniplm.analysis import scoring
from miniplm.data.batches import Batch, pack, pinned, prefetch, split_by_tokens
from miniplm.data.order import global_batch
from miniplm.data.scores import ROLES
from miniplm.models.decoder import Decoder
from miniplm.models.float8 import to_float8
from miniplm.training import step as training


@contextlib.contextmanager
def ours(job: Job, rows: int, prepare=lambda model: model):
    """prepare: makes of each model what is run."""
    models = []
    for config, state in zip(job.configs, job.states, strict=True):
        with torch.device(job.device):
            models.append(Decoder(config).to(job.device, torch.float32 if job.trains else job.dtype).eval())
        models[-1].load_state_dict(state)
        prepare(models[-1])
    parts = {
        "data": [(workload, "next_batch"), (Batch, "to")],
        "forward": [(model, "forward") for model in models],
    }
    if job.trains:
        yield trainer(job, rows, models, parts)
    else:
        yield scorer(job, rows, models, parts)


def scorer(job: Job, rows: int, models: list, parts: dict) -> Contender:
    named, device = dict(zip(ROLES, models, strict=True)), torch.device(job.device)

    def score(chunks):
        groups = split_by_tokens([len(chunk) for chunk in chunks], rows * job.length)
        packed = pinned((pack(chunks[group], EOS) for group in groups), device)
        with torch.inference_mode(), contextlib.closing(prefetch(packed)) as batches:
            found = []
            for _ in groups:
                batch = workload.next_batch(batches).to(job.device)
                found.append(scoring.score_batch(named, batch, job.configs[0].vocab_size)["score"])
            return torch.cat(found).cpu()

    return Contender(score, models, {**parts, "head": [(scoring, "difference_score")]})


def trainer(job: Job, rows: int, models: list, parts: dict) -> Contender:
    device = torch.device(job.device)
    optimizer = training.make_optimizer(models[0], OPTIMIZER)

    def train(steps, rates):
        packed = (list(pinned(global_batch(chunks, EOS, rows * job.length), device)) for chunks in steps)
        with contextlib.closing(prefetch(packed)) as batches:
            losses = []
            for rate in rates:
                micro_batches = workload.next_batch(batches)
                loss, *_ = training.train_step(
                    models[0], optimizer, micro_batches, rate, OPTIMIZER.max_grad_norm, job.dtype
                )
                losses.append(loss)
            return losses

    return Contender(
        train,
        models,
        {
            **parts,
            "head": [(training, "linear_cross_entropy")],
            "backward": [(torch.Tensor, "backward")],
            "optimiser": [(torch.nn.utils, "clip_grad_norm_"), (optimizer, "zero_grad"), (optimizer, "step")],
        },
    )


@contextlib.contextmanager
def float8(job: Job, rows: int):
    with ours(job, rows, to_float8) as contender:
        yield contender


@contextlib.contextmanager
def compiled(job: Job, rows: int):
    def compile_layers(model):
        for layer in model.model.layers:  # each by itself: they are all alike, so one is compiled
            layer.compile(dynamic=True, backend="inductor" if job.device == "cuda" else "aot_eager")

    try:
        with ours(job, rows, compile_layers) as contender:
            yield contender
    finally:
        torch._dynamo.reset()
