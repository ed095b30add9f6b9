"""What people would use instead of miniplm to train on a corpus and to score it, each a function, written
here from its published behaviour.

    authors       as the paper's authors do it: batches padded to their longest chunk, with a padding mask;
                  full logits; fp16, in training with a loss scale; AdamW neither fused nor multi-tensor; the
                  host waits for each batch; scoring: one model after the other
    transformers  Hugging Face's models with SDPA, compiled together with the loss; bf16; fused AdamW; chunks
                  padded to the full length, so that shapes are static and causal attention needs no mask
    liger         the same, with Liger Kernel's norms, rotary, SwiGLU and fused linear cross-entropy (written
                  for Liger Kernel 0.8.5)
    plain         no contender but what results are compared with: transformers as it is, in any dtype. (In
                  float64 its norms and rotary tables stay float32, as transformers has them.)

In training weights, gradients and moments are float32, forward and backward run under autocast; in scoring
the weights are in the lower dtype. Each is a context manager, (job, chunks per batch) → Contender, so that
nothing of it stays behind. pipeline.py runs them.
"""

import contextlib
import copy
import sys
from types import SimpleNamespace

import torch
import workload
from workload import EOS, OPTIMIZER, Contender, Job

from miniplm.data.batches import IGNORE_INDEX, prefetch

HERE = sys.modules[__name__]


# ---- what they share ----


def to_device(tensors, device):
    return [x.to(device, non_blocking=True) for x in tensors]


def pad(chunks, width=None):
    """(ids, targets, whether there is a prediction), each [chunks, width]; without a width, that of the
    longest."""
    width = width or max(map(len, chunks)) - 1
    ids, targets = torch.full((len(chunks), width), EOS), torch.full((len(chunks), width), IGNORE_INDEX)
    mask = torch.zeros(len(chunks), width, dtype=torch.bool)
    for row, chunk in enumerate(map(torch.from_numpy, chunks)):
        ids[row, : len(chunk) - 1], mask[row, : len(chunk) - 1] = chunk[:-1], True
        targets[row, : len(chunk) - 1] = chunk[1:].masked_fill(chunk[:-1] == EOS, IGNORE_INDEX)
    return ids, targets, mask


def load(job: Job, dtype: torch.dtype) -> list:
    """transformers' models with the job's weights."""
    from transformers import AutoModelForCausalLM

    models = []
    for config, state in zip(job.configs, job.states, strict=True):
        with torch.device(job.device):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
            )
        missing, unknown = model.load_state_dict(state, strict=False)
        assert not unknown and (not missing or (config.tie_word_embeddings and missing == ["lm_head.weight"]))
        models.append(model)
    return models


def cross_entropy(logits, targets, reduction):
    """As transformers computes it: in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction=reduction)


def hidden_states(model, ids):
    """Of right-padded chunks: with causal attention no token sees the padding. (Left to itself, transformers
    makes a mask where it is compiled by a torch before 2.14, and attention is slower.)"""
    return model.model(ids, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state


def contender(
    job: Job, rows: int, models: list, losses, half: torch.dtype, width=None, wait=False, parts=None, **adamw
) -> Contender:
    """Batches of `rows` chunks, padded to `width`; losses(model, ids, targets, mask, reduction) are their
    −log p; half: the dtype of autocast."""
    calls = SimpleNamespace(losses=losses)
    parts = {
        "data": [(workload, "next_batch"), (HERE, "to_device")],
        **(parts or {"forward and head": [(calls, "losses")]}),
    }
    if not job.trains:
        return Contender(scorer(job, rows, models, calls, width, wait), models, parts)
    optimizer = torch.optim.AdamW(
        models[0].parameters(),
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        **adamw,
    )
    parts |= {
        "backward": [(torch.Tensor, "backward")],
        "optimiser": [(torch.nn.utils, "clip_grad_norm_"), (optimizer, "step")],
    }
    return Contender(trainer(job, rows, models[0], calls, half, width, wait, optimizer), models, parts)


def trainer(job, rows, model, calls, half, width, wait, optimizer):
    scaler = torch.amp.GradScaler(job.device, enabled=half == torch.float16)

    def collate(chunks):
        micro_batches = [pad(chunks[start : start + rows], width) for start in range(0, len(chunks), rows)]
        return micro_batches, sum(int((targets != IGNORE_INDEX).sum()) for _, targets, _ in micro_batches)

    def step(micro_batches, count, rate):
        optimizer.zero_grad()
        total = 0
        for batch in micro_batches:
            with torch.autocast(job.device, half, enabled=half.itemsize == 2):
                mean = calls.losses(model, *to_device(batch, job.device), "sum") / count
            scaler.scale(mean).backward()
            total += mean.item() if wait else mean.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
        return total

    def run(steps, rates):
        with contextlib.closing(prefetch(map(collate, steps))) as batches:
            losses = [step(*workload.next_batch(batches), rate) for rate in rates]
        return [float(loss) for loss in losses]

    return run


def scorer(job, rows, models, calls, width, wait):
    def mean_log_prob(model, ids, targets, mask):
        losses = calls.losses(model, ids, targets, mask, "none").view_as(targets)
        return -losses.sum(1) / (targets != IGNORE_INDEX).sum(1)

    def run(chunks):
        found, starts = {id(model): [] for model in models}, range(0, len(chunks), rows)
        with torch.inference_mode():
            for together in [[model] for model in models] if wait else [models]:
                with contextlib.closing(
                    prefetch(pad(chunks[start : start + rows], width) for start in starts)
                ) as batches:
                    for _ in starts:
                        batch = to_device(workload.next_batch(batches), job.device)
                        for model in together:
                            mean = mean_log_prob(model, *batch)
                            found[id(model)].append(mean.cpu() if wait else mean)
            teacher, reference = map(torch.cat, found.values())
            return (teacher - reference).cpu()

    return run


# ---- the peers ----


@contextlib.contextmanager
def authors(job: Job, rows: int):
    half = torch.float16 if job.dtype == torch.bfloat16 else job.dtype
    models = load(job, torch.float32 if job.trains else half)

    def losses(model, ids, targets, mask, reduction):
        return HERE.cross_entropy(model(ids, attention_mask=mask, use_cache=False).logits, targets, reduction)

    parts = {
        "forward": [(model.model, "forward") for model in models],
        "head": [*((model.lm_head, "forward") for model in models), (HERE, "cross_entropy")],
    }
    yield contender(job, rows, models, losses, half, wait=True, parts=parts, foreach=False, fused=False)


@contextlib.contextmanager
def transformers(
    job: Job,
    rows: int,
    head=lambda hidden, weight, targets, reduction: cross_entropy(hidden @ weight.T, targets, reduction),
):
    models = load(job, torch.float32 if job.trains else job.dtype)

    @torch.compile(
        dynamic=False, backend="inductor" if job.device == "cuda" else "aot_eager"
    )  # toys need not be fast
    def losses(model, ids, targets, mask, reduction):
        return head(hidden_states(model, ids), model.lm_head.weight, targets, reduction)

    try:
        yield contender(job, rows, models, losses, job.dtype, width=job.length, fused=True)
    finally:
        torch._dynamo.reset()


@contextlib.contextmanager
def liger(job: Job, rows: int):
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    from transformers.models.qwen2 import modeling_qwen2 as module

    def head(hidden, weight, targets, reduction):
        return liger_fused_linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), reduction=reduction
        )

    kept = dict(vars(module))
    apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)  # the model's own loss is not used
    try:
        with transformers(job, rows, head) as patched:
            yield patched
    finally:
        vars(module).update(kept)


@contextlib.contextmanager
def plain(job: Job, rows: int):
    models = load(job, torch.promote_types(job.dtype, torch.float32) if job.trains else job.dtype)

    def losses(model, ids, targets, mask, reduction):
        return cross_entropy(model.lm_head(hidden_states(model, ids)), targets, reduction)

    yield contender(job, rows, models, losses, job.dtype)


PEERS = {"authors": authors, "transformers": transformers, "liger": liger}
