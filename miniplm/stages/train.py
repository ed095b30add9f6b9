"""Stage 4, train: corpus → checkpoints.

What is trained on what is settled here, and where the run stands; training/loop.py takes the steps.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import MICRO_BATCH_TOKENS, TrainConfig
from ..data.batches import Batch, squared_lengths
from ..data.corpus import Corpus
from ..data.order import DataOrder, global_batch
from ..data.token_scores import TokenScores
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..models.architecture import forward_cost_of, read_config
from ..models.base import LanguageModel
from ..models.decoder import student_config
from ..models.flops import forward_cost
from ..models.loading import forward_cost_of_model, load_model, model_hash
from ..runtime.artifacts import (
    complete_output,
    exclusive,
    open_output,
    reopen_output,
)
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.distributed import ALONE, Ranks, device_of_rank, ranks_of_run
from ..runtime.errors import UserError
from ..runtime.files import fingerprint, read_json
from ..runtime.interrupts import stop_signals
from ..runtime.profiling import check_trace
from ..runtime.progress import note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..training.checkpoints import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_folders,
    find_checkpoint,
    latest_checkpoint,
    load_optimizer,
    read_checkpoint,
)
from ..training.cost import RunCost, TrainingFlops, flops_of_run
from ..training.loop import TrainingRun
from ..training.metrics import Metrics, NoMetrics, read_lines
from ..training.parallel import check_replicas, spread
from ..training.results import is_complete, run_results
from ..training.setup import Setup
from ..training.starting import Sources, initial_model, load_teacher, set_checkpointing
from ..training.state import TrainState
from ..training.step import learning_rate, make_optimizer, num_targets
from ..training.tracking import Tracker, check_tracker

NOT_OF_THE_CONTENT = ("stage", "complete", "identity", "files", "checksum")  # of a corpus's manifest


def train(config: TrainConfig) -> None:
    """Train a model on a corpus, or continue where an equal run stopped.

    A line is added to metrics.jsonl every log_interval steps, at each evaluation, at each skipped step and at
    the last one: "step", "loss" (the exact mean over the steps since the last line, skipped ones left out),
    "lr", "grad_norm" (of this step, before clipping), "tokens" (predictions so far), "tokens_per_second" and
    "mfu" (of the training steps since the last line) and, where they apply, "eval_loss" (the cross-entropy,
    with a teacher too) and "skipped". With a teacher also "cross_entropy" and "kl_divergence", means like
    "loss", and "mfu" counts its FLOPs; with token scores "trained_tokens", those of "tokens" that count in
    the loss. A figure that is not finite is null.

    Raises:
        UserError: the inputs cannot be used or do not fit together, or the output holds another run.
        TrainingDiverged: max_skipped_steps steps in a row had a loss or gradient that is not finite.
        RankFailed, RankLost: another rank met an error, died, or hangs.
        Interrupted: SIGTERM or SIGINT came, to one of the ranks; the last finished step is saved.
    """
    with (
        ranks_of_run(choose_device(config.device), config.parallel.timeout) as ranks,
        ranks.first_speaks(),
        ranks.naming_lost(),
    ):
        _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> None:
    output, complete = Path(config.output), False
    with ranks.together():
        setup, sources = _set_up(config, ranks)
        if ranks.is_first:
            complete = is_complete(output, setup)
    if ranks.any(complete):
        print(printable(f"training {output} is complete, nothing to do"))
        return
    with ranks.together():
        # Made before the output is claimed: weights that cannot be read must not leave a run behind.
        first_model = None if checkpoint_folders(output) else initial_model(config, setup, sources)
        teacher = load_teacher(config, setup, sources.teacher) if sources.teacher else None
        if ranks.is_first:
            open_output(output, "train", setup.identity)
    if budget := setup.identity.get("flops"):
        note(f"{setup.steps:,} steps cost nearest to {budget:.4g} FLOPs")
    _warn_of_long_warm_up(config, setup.steps)
    with contextlib.ExitStack() as held, stop_signals() as raise_if_interrupted:
        checkpoint = _find_checkpoint(output, setup, ranks, held)
        with ranks.together():
            if checkpoint:
                state = checkpoint.state
                note(f"continuing after step {state.step:,} of {setup.steps:,}")
                model = load_model(checkpoint.folder, torch.float32, setup.device)
                set_checkpointing(model, config)
            else:
                state, model = TrainState(), first_model or initial_model(config, setup, sources)
            model.eval()  # no dropout, as published; so a step depends on no random numbers
        spread(
            model, ranks, config.parallel.replicate, setup.dtype, teacher=teacher.model if teacher else None
        )
        optimizer = make_optimizer(model, config.optimizer)
        if checkpoint:
            load_optimizer(optimizer, model, checkpoint.folder, state.optimizer_steps)
        metrics = held.enter_context(contextlib.closing(_metrics(config, setup, state, ranks)))
        with _memory_errors(config):
            run = TrainingRun(
                config, setup, model, teacher, optimizer, state, metrics, raise_if_interrupted, ranks
            )
            tokens_per_second = run.run()
    with ranks.together():
        if ranks.is_first:
            cost = RunCost(
                setup.order,
                squared_lengths(setup.corpus, config.document_mask),
                forward_cost(model),
                forward_cost(teacher.model) if teacher else None,
            )
            _finish(config, setup, cost, model, state, metrics.last, tokens_per_second)


def _find_checkpoint(
    output: Path, setup: Setup, ranks: Ranks, held: contextlib.ExitStack
) -> Checkpoint | None:
    """The checkpoint that the run continues from, if any, with the output kept from others."""
    checkpoint = None
    with ranks.together():
        if ranks.is_first:
            held.enter_context(exclusive(output))
            held.enter_context(timed(output))
            checkpoint = find_checkpoint(output, fingerprint(setup.identity))
            reopen_output(output)  # a complete one gets here where a part of it is lost
    step = ranks.of_first(checkpoint.state.step if checkpoint else -1)
    with ranks.together():
        return checkpoint if ranks.is_first or step < 0 else read_checkpoint(checkpoint_folder(output, step))


def _metrics(config: TrainConfig, setup: Setup, state: TrainState, ranks: Ranks) -> Metrics | NoMetrics:
    metrics = None
    with ranks.together():
        if ranks.is_first:
            tracker = Tracker(config.track, config.output, setup.identity) if config.track else None
            metrics = Metrics(config.output, state, tracker)
    last_step = ranks.of_first(metrics.last["step"] if metrics else 0)
    return metrics or NoMetrics(last_step)


@contextlib.contextmanager
def _memory_errors(config: TrainConfig) -> Iterator[None]:
    """torch's report of memory that is used up as one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        now = f" (now {config.micro_batch_tokens:,})" if config.micro_batch_tokens else ""
        raise UserError(
            f"out of GPU memory: lower micro_batch_tokens{now}, or set activation_checkpointing; the run "
            f"continues from its last checkpoint"
        ) from error


# ---- before the first step ----


def _set_up(config: TrainConfig, ranks: Ranks = ALONE) -> tuple[Setup, Sources]:
    """Read and check all that the run is made of, but for the models' weights."""
    check_trace(config.profile)
    check_tracker(config.track)
    check_replicas(config.parallel.replicate, ranks.world)
    device = device_of_rank(choose_device(config.device), ranks.place)
    dtype = choose_dtype(config.dtype, device)
    corpus = Corpus(config.data)
    if not (manifest := corpus.manifest)["predictions"]:
        raise UserError(f"corpus {config.data} holds no token to predict: train on another one")
    order = DataOrder(corpus.num_tokens, config.batch_tokens, config.seed, config.shuffle)
    identity = {
        "corpus": corpus.fingerprint,
        "tokenizer": manifest["tokenizer_fingerprint"],
        "optimizer": dataclasses.asdict(config.optimizer),
        "steps": config.steps or order.steps_per_epoch,
        **{name: getattr(config, name) for name in ("batch_tokens", "shuffle", "seed", "document_mask")},
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    init_from, teacher = (
        _resolve(name, corpus) if name else None for name in (config.init_from, config.distill.teacher)
    )
    architecture: Any = None
    eval_batches: list[Batch] = []
    if init_from:
        identity["init_from"] = model_hash(init_from)
    elif config.model_config:
        architecture, identity["model_config"] = _read_architecture(Path(config.model_config), corpus)
    else:
        architecture = student_config(config.model, manifest["vocab_size"], corpus.eos_token_id)
        identity["model"] = {**dataclasses.asdict(config.model), "vocab_size": architecture.vocab_size}
    if config.eval.data:
        eval_batches, eval_corpus = _eval_batches(config, config.eval.data, corpus, device)
        # The keys of runs from before the settings were in groups.
        identity |= {"eval_corpus": eval_corpus, "eval_rows": config.eval.chunks}
    if teacher:
        identity["teacher"] = model_hash(teacher)
        identity |= {"alpha": config.distill.alpha, "temperature": config.distill.temperature}
    token_scores = None
    if config.tokens.scores:
        token_scores = TokenScores(config.tokens.scores, corpus, config.tokens.rule)
        identity["tokens"] = {**token_scores.identity, "ratio": config.tokens.ratio}
    sources = Sources(architecture, init_from, teacher)
    if budget := config.flops or (config.match_flops_of and flops_of_run(config.match_flops_of)):
        identity["steps"] = _cost(config, corpus, order, sources).steps_for(budget)
        identity["flops"] = round(budget)
    steps = identity["steps"]
    return Setup(device, dtype, corpus, order, steps, eval_batches, identity, token_scores), sources


def _cost(config: TrainConfig, corpus: Corpus, order: DataOrder, sources: Sources) -> RunCost:
    """What the steps of the run cost, without its weights."""
    if sources.init_from:
        student = forward_cost_of_model(sources.init_from)
    else:
        student = forward_cost_of(sources.architecture, config.model_config or "model.*")
    teacher = forward_cost_of_model(sources.teacher) if sources.teacher else None
    return RunCost(order, squared_lengths(corpus, config.document_mask), student, teacher)


def _resolve(name: str, corpus: Corpus) -> str:
    """The model `name`, of a training output its latest checkpoint; UserError unless its tokenizer is the
    corpus's."""
    resolved = latest_checkpoint(name)
    check_same_tokens(load_tokenizer(corpus.tokenizer), load_tokenizer(resolved), name)
    return resolved


def _read_architecture(path: Path, corpus: Corpus) -> tuple[Any, dict]:
    """(transformers' config in a config.json, set for the corpus's tokenizer; the file's content)."""
    path = path / "config.json" if path.is_dir() else path
    architecture, content = read_config(path), read_json(path)
    if architecture.vocab_size < corpus.manifest["vocab_size"]:
        raise UserError(
            f"vocab_size {architecture.vocab_size} in {path} is below the corpus's "
            f"{corpus.manifest['vocab_size']}: raise it"
        )
    architecture.bos_token_id = architecture.eos_token_id = corpus.eos_token_id
    return architecture, content


def _eval_batches(
    config: TrainConfig, data: str, corpus: Corpus, device: torch.device
) -> tuple[list[Batch], str]:
    """(batches of the first chunks of the evaluation corpus in `data`, the corpus's fingerprint)."""
    evaluation = Corpus(data)
    if evaluation.manifest["tokenizer_fingerprint"] != corpus.manifest["tokenizer_fingerprint"]:
        raise UserError(
            f"corpora {config.data} and {data} have different tokenizers: prepare both with the same one"
        )
    rows = evaluation.rows(range(min(config.eval.chunks, len(evaluation))))
    tokens = config.micro_batch_tokens or MICRO_BATCH_TOKENS.on(device.type)
    batches = global_batch(rows, corpus.eos_token_id, tokens, config.document_mask)
    if not num_targets(batches):
        raise UserError(
            f"the first {config.eval.chunks} chunks of corpus {data} hold no token to predict: give another "
            f"eval.data"
        )
    return batches, evaluation.fingerprint


def _warn_of_long_warm_up(config: TrainConfig, steps: int) -> None:
    if config.optimizer.warmup_steps >= steps:
        reached = learning_rate(steps, steps, config.optimizer)
        note(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} is not below the run's {steps} steps: "
            f"the learning rate only rises, to {reached:.2g} of {config.optimizer.lr:.2g}"
        )


# ---- after the last step ----


def _flops(config: TrainConfig, setup: Setup, cost: RunCost) -> TrainingFlops:
    """What the run has cost, with an evaluation for each line of its metrics that has one."""
    batches = setup.eval_batches
    tokens = sum(len(batch.input_ids) for batch in batches)
    squares = sum(int((batch.cu_seqlens.diff().long() ** 2).sum()) for batch in batches)
    evaluations = sum("eval_loss" in line for _, line in read_lines(config.output)[0])
    evaluation = evaluations * cost.student.of(tokens, squares)
    return cost.flops(setup.steps).model_copy(update={"evaluation": evaluation})


def _finish(
    config: TrainConfig,
    setup: Setup,
    cost: RunCost,
    model: LanguageModel,
    state: TrainState,
    last_line: dict,
    tokens_per_second: float | None,
) -> None:
    """Mark the output complete, and print what came out."""
    results = run_results(setup, state, last_line)
    results["parameters"] = model.num_parameters()
    results["flops"] = _flops(config, setup, cost).model_dump()
    if config.match_flops_of:
        results["match_flops_of"] = Path(config.match_flops_of).resolve().name
    if teacher := config.distill.teacher:
        results["teacher"] = Path(teacher).resolve().name if Path(teacher).exists() else teacher
    if setup.token_scores:
        results["token_models"] = setup.token_scores.models
    summary = setup.corpus.manifest.items()
    results["corpus"] = {key: value for key, value in summary if key not in NOT_OF_THE_CONTENT}
    complete_output(config.output, results)
    figures = [
        text.format(value)
        for text, value in [
            ("loss {:.4f}", results["loss"]),
            ("eval loss {:.4f}", results["eval_loss"]),
            ("{:,.0f} tokens/s", tokens_per_second),
        ]
        if value is not None
    ]
    folder = checkpoint_folder(config.output, state.step)
    out = ", ".join([*figures, printable(folder)])
    print(f"trained {state.step:,} steps on {state.tokens:,} tokens: {out}")
