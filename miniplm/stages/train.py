"""Stage 4, train: corpus → checkpoints.

One optimiser step takes a global batch of `batch_tokens` predictions, in micro-batches; its loss is the mean
over all targets of the global batch, −(1/n) Σ log p, however it is cut. With a teacher (Vanilla KD) it is the
mean of (1 − α)·(−log p) + α·KL(teacher ‖ student) over the same targets. Weights, gradients and moments are
float32; forward and backward compute in `dtype`. The rows, the learning rate and the update of a step are
functions of (seed, step) and of the weights before it alone, so a run that was stopped and continued computes
the same bits as one that was not.

`make_optimizer` and `train_step` are the core, with data_order.py; they need no corpus on disk.
"""

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import OptimizerConfig, TrainConfig
from ..data.batches import IGNORE_INDEX, Batch, pinned, prefetch
from ..data.corpus import Corpus
from ..data.order import DataOrder, global_batch
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..kernels import linear_cross_entropy, linear_distillation_loss
from ..models.base import LanguageModel
from ..models.decoder import Decoder, student_config, unsupported_reason
from ..models.loading import TransformersLM, load_model, model_hash
from ..runtime.artifacts import MANIFEST, complete_output, exclusive, open_output
from ..runtime.devices import choose_device, choose_dtype, peak_flops
from ..runtime.errors import UserError
from ..runtime.files import fingerprint, read_json
from ..runtime.interrupts import Interrupted, stop_signals
from ..runtime.profiling import check_trace, trace
from ..runtime.progress import Progress, note
from ..training.checkpoints import (
    Metrics,
    TrainState,
    checkpoint_folder,
    find_checkpoint,
    latest_checkpoint,
    load_optimizer,
    prune_checkpoints,
    save_checkpoint,
)
from ..training.memory import LEAST, micro_batch_tokens

HEAD_TOKENS = 8192


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


# ---- the core ----


def num_targets(batches: list[Batch]) -> int:
    """How many positions are predicted; call it before the batches are moved to a GPU."""
    return sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)


def summed_loss(model: LanguageModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Σ −log p over the targets of a batch on the model's device, in nats: float32 scalar.

    The float32 weights are cast to `dtype` inside the graph, so that their gradients come back as float32 and
    add up over micro-batches in float32.
    """
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
        return linear_cross_entropy(
            hidden,
            model.head_weight,
            batch.targets,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            max_logits_bytes=_head_logits_bytes(hidden, model, 1),
        )


class Teacher(NamedTuple):
    """Whom a student learns from, beside the corpus: its full distribution, at the temperature, is the share
    alpha of the loss."""

    model: LanguageModel  # frozen, in the compute dtype
    alpha: float
    temperature: float


def distillation_losses(student: LanguageModel, teacher: Teacher, batch: Batch, dtype: torch.dtype) -> Tensor:
    """(loss, cross-entropy, KL divergence), means over the targets of a batch on the models' device, 0
    without any: float32 [3].

    The loss alone carries gradients, and only for the student; they add up in float32 as those of summed_loss
    do.
    """
    with torch.no_grad():  # before the student's pass, whose activations stay in memory
        teacher_hidden = teacher.model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = student(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
        return torch.stack(
            linear_distillation_loss(
                hidden,
                student.head_weight,
                teacher_hidden,
                teacher.model.head_weight,
                batch.targets,
                alpha=teacher.alpha,
                ignore_index=IGNORE_INDEX,
                temperature=teacher.temperature,
                max_logits_bytes=_head_logits_bytes(hidden, student, 2),
            )
        )


def _head_logits_bytes(hidden: Tensor, model: LanguageModel, models: int) -> int | None:
    """Bytes of logits at a time: on a GPU those of HEAD_TOKENS tokens, since the head's gradient is read and
    written once per chunk of tokens."""
    return (
        None
        if hidden.device.type == "cpu"
        else models * HEAD_TOKENS * len(model.head_weight) * hidden.itemsize
    )


def training_flops(model: LanguageModel, context: int, teacher: Teacher | None = None) -> int:
    """FLOPs per token of a step on documents of `context` tokens: forward, backward (twice as many), and the
    teacher's forward."""
    return 3 * model.flops_per_token(context) + (teacher.model.flops_per_token(context) if teacher else 0)


def make_optimizer(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on all parameters, as published."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Of step 1 … steps: linear up to the peak at step warmup_steps, then a cosine down to min_lr_ratio ·
    peak at the last step.

    With warmup_steps ≥ steps the run ends within the warm-up, at steps / warmup_steps of the peak.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    )


def train_step(
    model: LanguageModel,
    optimizer,
    micro_batches: list[Batch],
    lr: float,
    max_grad_norm: float,
    dtype: torch.dtype,
    raise_if_interrupted=lambda: None,
    teacher: Teacher | None = None,
) -> tuple[float, ...]:
    """One optimiser step on a global batch; the weights stay as they are where the loss or the gradient norm
    is not finite.

    Args:
        optimizer: that of make_optimizer.
        dtype: of forward and backward; the parameters are float32.
        raise_if_interrupted: called between micro-batches; if it raises, the weights stay as they are.
    Returns:
        (loss, gradient norm before clipping), with a teacher (loss, gradient norm, cross-entropy, KL
        divergence). Losses are means over all targets of the global batch, in nats; NaN if there are none.
    """
    counts = [num_targets([batch]) for batch in micro_batches]
    count = sum(counts) or math.nan
    device = model.head_weight.device
    optimizer.zero_grad()
    total = torch.zeros(3 if teacher else 1, device=device)
    # All are moved now: a copy from memory that is not pinned waits for the device, and between micro-batches
    # that would drain its queue.
    for batch, targets in zip([batch.to(device) for batch in micro_batches], counts, strict=True):
        raise_if_interrupted()
        if teacher:
            losses = distillation_losses(model, teacher, batch, dtype) * (targets / count)
        else:
            losses = summed_loss(model, batch, dtype)[None] / count
        losses[0].backward()
        total += losses.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Where found_inf is 1 the fused step leaves all as it is: the device decides, the host need not wait
    # before it.
    optimizer.found_inf = (~(total[0].isfinite() & grad_norm.isfinite())).float()
    optimizer.step()
    grad_norm, loss, *parts = torch.cat(
        [grad_norm[None], total]
    ).tolist()  # the one wait for the device, with all of the step in its queue
    return loss, grad_norm, *parts


@torch.no_grad()
def held_out_loss(
    model: LanguageModel, batches: list[Batch], dtype: torch.dtype, raise_if_interrupted=lambda: None
) -> float:
    """Mean −log p over all targets of the batches, in nats. `raise_if_interrupted` is called between
    batches."""
    total = torch.zeros((), dtype=torch.float64, device=model.head_weight.device)
    for batch in batches:
        raise_if_interrupted()
        total += summed_loss(model, batch.to(total.device), dtype)
    return total.item() / num_targets(batches)


# ---- the stage ----

PARTS = ("cross_entropy", "kl_divergence")  # of the loss with a teacher


class _Setup(NamedTuple):
    """What a run is made of, settled before anything is written."""

    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    order: DataOrder
    steps: int
    held_out: list[Batch]  # of the evaluation corpus; empty without one
    architecture: object  # transformers' config of a model from scratch
    identity: dict


def train(config: TrainConfig) -> None:
    """Train a model on a corpus, or continue where an equal run stopped.

    A line is added to metrics.jsonl every log_interval steps, at each evaluation, at each skipped step and at
    the last one: "step", "loss" (the exact mean over the steps since the last line, skipped ones left out),
    "lr", "grad_norm" (of this step, before clipping), "tokens" (predictions so far), "tokens_per_second" and
    "mfu" (of the training steps since the last line) and, where they apply, "eval_loss" (the cross-entropy,
    with a teacher too) and "skipped". With a teacher also "cross_entropy" and "kl_divergence", means like
    "loss", and "mfu" counts its FLOPs. A figure that is not finite is null.

    Raises:
        UserError: the inputs cannot be used or do not fit together, or the output holds another run.
        TrainingDiverged: max_skipped_steps steps in a row had a loss or gradient that is not finite.
        Interrupted: SIGTERM or SIGINT came; the last finished step is saved.
    """
    setup, output = _set_up(config), Path(config.output)
    if (output / MANIFEST).exists() and open_output(output, "train", setup.identity):
        print(f"training {output} is complete, nothing to do")
        return
    # Made before the output is claimed: weights that cannot be read must not leave a run behind.
    model = (
        None
        if any(output.glob("checkpoints/step-*"))
        else _with_checkpointing(_initial_model(config, setup), config)
    )
    teacher = _load_teacher(config, setup) if config.distill.teacher else None
    open_output(output, "train", setup.identity)
    if config.optimizer.warmup_steps >= setup.steps:
        reached = learning_rate(setup.steps, setup.steps, config.optimizer)
        note(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} is not below the run's {setup.steps} "
            f"steps: "
            f"the learning rate only rises, to {reached:.2g} of {config.optimizer.lr:.2g}"
        )
    with exclusive(output), stop_signals() as raise_if_interrupted:
        checkpoint, state = find_checkpoint(output, fingerprint(setup.identity)) or (None, TrainState())
        if checkpoint:
            note(f"continuing after step {state.step:,} of {setup.steps:,}")
            model = _with_checkpointing(load_model(checkpoint, torch.float32, setup.device), config)
        model.eval()  # no dropout, as published; so a step depends on no random numbers
        optimizer = make_optimizer(model, config.optimizer)
        if checkpoint:
            load_optimizer(optimizer, model, checkpoint, state.updates)
        with contextlib.closing(Metrics(output, state.step)) as metrics:
            try:
                rate = _loop(config, setup, model, teacher, optimizer, state, metrics, raise_if_interrupted)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of GPU memory: lower "
                    f"micro_batch_tokens{f' (now {n:,})' if (n := config.micro_batch_tokens) else ''}, or "
                    f"set "
                    "activation_checkpointing; the run continues from its last checkpoint"
                ) from error
    losses = {name: metrics.last.get(name) for name in ("loss", *(PARTS if teacher else ()), "eval_loss")}
    shown = (
        {
            "teacher": Path(config.distill.teacher).resolve().name
            if Path(config.distill.teacher).exists()
            else config.distill.teacher
        }
        if teacher
        else {}
    )
    summary = {
        key: value
        for key, value in setup.corpus.manifest.items()
        if key not in ("stage", "complete", "identity")
    }
    complete_output(
        output,
        {
            "steps": state.step,
            "skipped": state.step - state.updates,
            "tokens": state.tokens,
            **losses,
            "parameters": model.num_parameters(),
            **shown,
            "corpus": summary,
        },
    )
    figures = [
        text.format(value)
        for text, value in [
            ("loss {:.4f}", losses["loss"]),
            ("held-out loss {:.4f}", losses["eval_loss"]),
            ("{:,.0f} tokens/s", rate),
        ]
        if value is not None
    ]
    print(
        f"trained {state.step:,} steps on {state.tokens:,} tokens: "
        f"{', '.join([*figures, str(checkpoint_folder(output, state.step))])}"
    )


def _loop(
    config: TrainConfig,
    setup: _Setup,
    model,
    teacher: Teacher | None,
    optimizer,
    state: TrainState,
    metrics: Metrics,
    raise_if_interrupted,
) -> float | None:
    """Train from `state` to the last step. Returns the tokens per second of the training steps, None if there
    was none."""
    output, steps, eos = Path(config.output), setup.steps, setup.corpus.eos_token_id
    peak = 1e12 * config.peak_tflops if config.peak_tflops else peak_flops(setup.device)
    context = setup.order.epoch_tokens // len(setup.order.rows)
    flops = training_flops(model, context, teacher)
    if teacher:
        note(
            f"the loss is {1 - teacher.alpha:g} · cross-entropy + {teacher.alpha:g} · KL divergence from "
            f"{config.distill.teacher} at temperature "
            f"{teacher.temperature:g}; the teacher takes {1 - training_flops(model, context) / flops:.0%} "
            f"of {flops / 1e6:,.2f} MFLOPs per token"
        )
        if (ids := len(teacher.model.head_weight)) < len(model.head_weight):
            note(
                f"the teacher predicts {ids:,} ids, the student {len(model.head_weight):,}: the loss leaves "
                f"the rest out, so the student does "
                "not learn to avoid them"
            )
    saved, reported, spans = (
        state.step,
        0,
        [],
    )  # spans: (seconds, tokens) of each step, `reported` of them in a line
    if metrics.last["step"] == state.step:  # this step's line was written after its checkpoint
        state.losses, state.parts, state.line_step = [], [], state.step

    def due(interval: int) -> bool:
        return state.step % interval == 0 or state.step == steps

    def tokens_per_second(first: int) -> float | None:
        seconds, tokens = np.sum(spans[first:], axis=0).tolist() if spans[first:] else (0, 0)
        return tokens / seconds if seconds else None

    def save():
        metrics.sync()
        save_checkpoint(
            checkpoint_folder(output, state.step),
            model,
            optimizer,
            state,
            setup.corpus.tokenizer,
            fingerprint(setup.identity),
        )
        if not state.skipped_in_a_row:  # else the weights may be past rescue already: the older ones are kept
            prune_checkpoints(output, config.checkpoint.keep)

    def report():
        nonlocal reported
        rate = tokens_per_second(reported)
        parts = (
            {name: _mean([step[i] for step in state.parts]) for i, name in enumerate(PARTS)}
            if teacher
            else {}
        )
        line = {
            "step": state.step,
            "loss": _mean(state.losses),
            **parts,
            "lr": learning_rate(state.step, steps, config.optimizer),
            "grad_norm": state.grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": rate,
            "mfu": rate and flops * rate / peak,
        }
        if setup.held_out and due(config.eval.interval):
            line["eval_loss"] = _finite(
                held_out_loss(model, setup.held_out, setup.dtype, raise_if_interrupted)
            )
        if state.skipped_in_a_row:
            line["skipped"] = True
        metrics.write(line)
        state.losses, state.parts, state.line_step, reported = [], [], state.step, len(spans)

    def batches_of(micro_batch: int):
        state.micro_batch_tokens = None if config.micro_batch_tokens else micro_batch
        return prefetch(
            list(
                pinned(
                    global_batch(
                        setup.corpus.rows(setup.order.step(step)), eos, micro_batch, config.document_mask
                    ),
                    setup.device,
                )
            )
            for step in range(state.step, steps)
        )

    batches = batches_of(
        config.micro_batch_tokens
        or state.micro_batch_tokens
        or _micro_batch_tokens(model, teacher, setup, config)
    )
    with (
        trace(config.profile) as profiler_step,
        Progress("train", steps * config.batch_tokens, done=state.step * config.batch_tokens) as progress,
    ):
        try:
            while True:
                # Checkpoint, then line: each checkpoint is that of a step whose line is still to come,
                # whenever it is made.
                diverged = state.skipped_in_a_row >= config.max_skipped_steps
                if saved < state.step and due(config.checkpoint.interval) and not diverged:
                    save()
                    saved = state.step
                line_due = (
                    state.skipped_in_a_row
                    or due(config.log_interval)
                    or (setup.held_out and due(config.eval.interval))
                )
                if state.line_step < state.step and line_due:
                    report()
                if diverged:
                    latest = max(output.glob("checkpoints/step-*"), default=None)
                    raise TrainingDiverged(
                        f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, had a loss or "
                        f"gradient that is not finite: "
                        f"lower optimizer.lr or look at the data (latest checkpoint: {latest})"
                    )
                if state.step == steps:
                    return tokens_per_second(0)
                raise_if_interrupted()
                start = time.perf_counter()
                micro_batches, lr = next(batches), learning_rate(state.step + 1, steps, config.optimizer)
                smaller = None
                try:
                    loss, grad_norm, *parts = train_step(
                        model,
                        optimizer,
                        micro_batches,
                        lr,
                        config.optimizer.max_grad_norm,
                        setup.dtype,
                        raise_if_interrupted,
                        teacher,
                    )
                except torch.OutOfMemoryError:
                    if (smaller := (state.micro_batch_tokens or 0) // 2) < LEAST:
                        raise
                if smaller:  # the estimate was wrong; the error, which holds on to memory, is gone by now
                    note(f"out of GPU memory: micro-batches of {smaller:,} tokens from here on")
                    batches.close()
                    optimizer.zero_grad()
                    if not state.updates:  # it may have run out of memory while it made its moments
                        optimizer.state.clear()
                    torch.cuda.empty_cache()
                    batches = batches_of(smaller)
                    continue
                tokens = sum(len(batch.targets) for batch in micro_batches)
                spans.append((time.perf_counter() - start, tokens))
                state.step, state.tokens, state.grad_norm = (
                    state.step + 1,
                    state.tokens + tokens,
                    _finite(grad_norm),
                )
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    state.updates, state.skipped_in_a_row = state.updates + 1, 0
                    state.losses.append(loss)
                    state.parts += [parts] if teacher else []
                else:
                    state.skipped_in_a_row += 1
                    note(f"step {state.step} skipped: loss {loss}, gradient norm {grad_norm}")
                progress.note(f"loss {loss:.4f}, lr {lr:.2e}")
                progress.update(config.batch_tokens)
                profiler_step()
        except Interrupted:
            if saved < state.step:
                save()
            note(f"stopped at step {state.step:,}: the same command continues")
            raise
        finally:
            batches.close()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _set_up(config: TrainConfig) -> _Setup:
    check_trace(config.profile)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    corpus = Corpus(config.data)
    if not (manifest := corpus.manifest)["predictions"]:
        raise UserError(f"corpus {config.data} holds no token to predict: train on another one")
    order = DataOrder(corpus.num_tokens, config.batch_tokens, config.seed, config.shuffle)
    steps = config.steps or order.steps_per_epoch
    identity = {
        "corpus": corpus.fingerprint,
        "tokenizer": manifest["tokenizer_fingerprint"],
        "optimizer": dataclasses.asdict(config.optimizer),
        "steps": steps,
        **{name: getattr(config, name) for name in ("batch_tokens", "shuffle", "seed", "document_mask")},
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    architecture, held_out = None, []
    for name in filter(None, (config.init_from, config.distill.teacher)):
        check_same_tokens(load_tokenizer(corpus.tokenizer), load_tokenizer(latest_checkpoint(name)), name)
    if config.init_from:
        identity["init_from"] = model_hash(latest_checkpoint(config.init_from))
    elif config.model_config:
        architecture, identity["model_config"] = _read_architecture(Path(config.model_config), corpus)
    else:
        architecture = student_config(config.model, manifest["vocab_size"], corpus.eos_token_id)
        identity["model"] = {**dataclasses.asdict(config.model), "vocab_size": architecture.vocab_size}
    if config.eval.data:
        evaluation = Corpus(config.eval.data)
        if evaluation.manifest["tokenizer_fingerprint"] != manifest["tokenizer_fingerprint"]:
            raise UserError(
                f"corpora {config.data} and {config.eval.data} have different tokenizers: prepare both with "
                f"the same one"
            )
        rows = evaluation.rows(range(min(config.eval.chunks, len(evaluation))))
        tokens = config.micro_batch_tokens or (4_096 if device.type == "cpu" else 65_536)
        held_out = global_batch(rows, corpus.eos_token_id, tokens, config.document_mask)
        if not num_targets(held_out):
            raise UserError(
                f"the first {config.eval.chunks} chunks of corpus {config.eval.data} hold no token to "
                f"predict: give another eval.data"
            )
        identity |= {"eval_corpus": evaluation.fingerprint, "eval_rows": config.eval.chunks}
    if config.distill.teacher:
        identity |= {
            "teacher": model_hash(latest_checkpoint(config.distill.teacher)),
            "alpha": config.distill.alpha,
            "temperature": config.distill.temperature,
        }
    return _Setup(device, dtype, corpus, order, steps, held_out, architecture, identity)


def _read_architecture(path: Path, corpus: Corpus):
    """(transformers' config in a config.json, set for the corpus's tokenizer; the file's content)."""
    from transformers import AutoConfig

    path = path / "config.json" if path.is_dir() else path
    content = read_json(path)
    try:
        architecture = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises anything, from KeyError to OSError
        raise UserError(f"transformers cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    if architecture.vocab_size < corpus.manifest["vocab_size"]:
        raise UserError(
            f"vocab_size {architecture.vocab_size} in {path} is below the corpus's "
            f"{corpus.manifest['vocab_size']}: raise it"
        )
    architecture.bos_token_id = architecture.eos_token_id = corpus.eos_token_id
    return architecture, content


def _initial_model(config: TrainConfig, setup: _Setup) -> LanguageModel:
    if config.init_from:
        model = load_model(latest_checkpoint(config.init_from), torch.float32, setup.device)
        if len(model.head_weight) < setup.corpus.manifest["vocab_size"]:
            raise UserError(
                f"model {config.init_from} predicts {len(model.head_weight)} ids, the tokenizer of corpus "
                f"{config.data} has "
                f"{setup.corpus.manifest['vocab_size']}: start from a model that was made for it"
            )
        return model
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that every device starts from the same weights
        torch.manual_seed(config.seed)
        if not unsupported_reason(setup.architecture):
            return Decoder(setup.architecture).to(setup.device)
        from transformers import AutoModelForCausalLM

        return TransformersLM(
            AutoModelForCausalLM.from_config(setup.architecture, dtype=torch.float32), config.model_config
        ).to(setup.device)


def _micro_batch_tokens(
    model: LanguageModel, teacher: Teacher | None, setup: _Setup, config: TrainConfig
) -> int:
    if setup.device.type == "cpu":
        return 4_096
    head_bytes = (1 + bool(teacher)) * HEAD_TOKENS * len(model.head_weight) * setup.dtype.itemsize
    tokens = micro_batch_tokens(
        model,
        torch.cuda.mem_get_info(setup.device)[0],
        setup.dtype.itemsize,
        head_bytes,
        config.activation_checkpointing,
    )
    note(f"micro-batches of {tokens:,} tokens, by the free memory")
    return tokens


def _with_checkpointing(model: LanguageModel, config: TrainConfig) -> LanguageModel:
    if config.activation_checkpointing:
        if not isinstance(model, Decoder):
            raise UserError(
                f"activation_checkpointing is built for Qwen2, Llama and Qwen3, not for "
                f"{model.config.model_type}: leave it out, or lower "
                "micro_batch_tokens"
            )
        model.activation_checkpointing = True
    return model


def _load_teacher(config: TrainConfig, setup: _Setup) -> Teacher:
    model, corpus = (
        load_model(latest_checkpoint(config.distill.teacher), setup.dtype, setup.device).requires_grad_(
            False
        ),
        setup.corpus,
    )
    ids = len(model.head_weight)
    if ids < corpus.manifest["vocab_size"] and ids <= corpus.highest_id:  # the second reads the whole corpus
        raise UserError(
            f"teacher {config.distill.teacher} predicts {ids} ids, corpus {config.data} has ids up to "
            f"{corpus.highest_id}: "
            "give a teacher that was made for its tokenizer"
        )
    return Teacher(model, config.distill.alpha, config.distill.temperature)
