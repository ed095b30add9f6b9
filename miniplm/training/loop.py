"""A training run, from where it stands to its last step.

The rows, the learning rate and the update of a step are functions of (seed, step) and of the weights before
it alone, so a run that was stopped and continued computes the same bits as one that was not.
"""

import functools
import math
import time
from collections.abc import Callable, Generator

import torch

from ..config import TrainConfig
from ..data.order import share_of_rank
from ..models.base import LanguageModel
from ..models.flops import training_flops
from ..runtime.background import Background
from ..runtime.devices import peak_flops
from ..runtime.distributed import ALONE, Ranks
from ..runtime.errors import RunError
from ..runtime.files import fingerprint
from ..runtime.interrupts import Interrupted
from ..runtime.profiling import trace
from ..runtime.progress import Progress, note
from .checkpoints import (
    checkpoint_folder,
    checkpoint_folders,
    prune_checkpoints,
    save_checkpoint,
)
from .memory import MIN_MICRO_BATCH_TOKENS, choose_micro_batch_tokens
from .metrics import Metrics, NoMetrics
from .setup import GlobalBatch, Setup, global_batches
from .snapshot import Snapshot, take_snapshot
from .state import TrainState
from .step import LOSS_COMPONENTS, Teacher, eval_loss, learning_rate, train_step


class TrainingDiverged(RunError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class TrainingRun:
    """Trains `model` with `optimizer` from `state` on, and keeps metrics and checkpoints in config.output.

    Args:
        setup: its model and teacher computing on setup.device.
        raise_if_interrupted: raises Interrupted once the run is to stop; called between micro-batches too.
        ranks: takes its share of each global batch, of a model spread over all. Each calls the same; rank 0
            writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        setup: Setup,
        model: LanguageModel,
        teacher: Teacher | None,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        metrics: Metrics | NoMetrics,
        raise_if_interrupted: Callable[[], None],
        ranks: Ranks = ALONE,
    ):
        self.config, self.setup, self.model, self.teacher = config, setup, model, teacher
        self.optimizer, self.state, self.metrics = optimizer, state, metrics
        self.writer = Background("the checkpoint that was being written")

        def raise_if_stopped() -> None:
            self.writer.raise_if_failed()
            raise_if_interrupted()

        self.raise_if_interrupted = ranks.stop_together(raise_if_stopped)
        self.ranks = ranks
        context = setup.order.epoch_tokens // len(setup.order.rows)
        self.flops = training_flops(model, context, teacher.model if teacher else None)  # per token
        self.student_flops = training_flops(model, context)
        peak = 1e12 * config.peak_tflops if config.peak_tflops else peak_flops(setup.device)
        self.peak_flops = ranks.world * peak
        self.last_saved_step = state.step
        self.spent = self.spent_at_line = (0.0, 0)  # (seconds, tokens) of this process's steps
        self.batches: Generator[GlobalBatch, None, None]
        if metrics.last["step"] == state.step:  # this step's line was written after its checkpoint
            self.start_new_line()

    def run(self) -> float | None:
        """Train to the last step. Returns the tokens per second of the training steps, None if there was
        none.

        Raises:
            TrainingDiverged: max_skipped_steps steps in a row had a loss or gradient that is not finite.
            Interrupted: the last finished step is saved.
            torch.OutOfMemoryError: also with the smallest micro-batches, or with those of the config.
        """
        if self.teacher:
            self.describe_teacher(self.teacher)
        if self.setup.token_scores:
            note(
                f"trained on are the best {self.config.tokens.ratio:.0%} of the tokens of each global batch, "
                f"by {self.config.tokens.rule}: the loss is theirs alone"
            )
        self.make_batches(
            self.config.micro_batch_tokens or self.state.micro_batch_tokens or self.chosen_size()
        )
        tokens_per_step, steps = self.config.batch_tokens, self.setup.steps
        self.progress = Progress("train", steps * tokens_per_step, done=self.state.step * tokens_per_step)
        profile = self.config.profile if self.ranks.is_first else None
        with trace(profile) as profiler_step, self.progress, self.writer:
            try:
                while True:
                    self.save_and_log()
                    if self.state.step == steps:
                        self.wait_for_checkpoint()
                        return self.tokens_per_second()
                    self.raise_if_interrupted()
                    if self.step():
                        self.progress.update(tokens_per_step)
                        profiler_step()
            except Interrupted:
                if self.last_saved_step < self.state.step:
                    self.save()
                self.wait_for_checkpoint()
                note(f"stopped at step {self.state.step:,}: the same command continues")
                raise
            finally:
                self.batches.close()

    # ---- a step ----

    def step(self) -> bool:
        """Take the next step. False where it did not fit into memory: it is still to come, in smaller
        micro-batches."""
        start = time.perf_counter()
        batch = next(self.batches)
        lr = learning_rate(self.state.step + 1, self.setup.steps, self.config.optimizer)
        smaller = None
        try:
            loss, grad_norm, *loss_components = train_step(
                self.model,
                self.optimizer,
                batch.micro_batches,
                lr,
                self.config.optimizer.max_grad_norm,
                self.setup.dtype,
                self.raise_if_interrupted,
                self.teacher,
                self.ranks,
            )
        except torch.OutOfMemoryError:
            smaller = (self.state.micro_batch_tokens or 0) // 2
            if smaller < MIN_MICRO_BATCH_TOKENS or self.ranks.world > 1:  # the others are within the step
                raise
        if smaller:  # the error, which holds on to memory, is gone by now
            self.retry_smaller(smaller)
            return False
        if self.setup.token_scores:
            self.state.trained_tokens += batch.targets
        seconds, tokens = self.spent
        self.spent = seconds + time.perf_counter() - start, tokens + batch.tokens
        self.count(batch.tokens, loss, grad_norm, loss_components)
        mfu = self.metrics.last.get("mfu")  # of the latest line
        self.progress.note(f"loss {loss:.4f}, lr {lr:.2e}" + (f", MFU {mfu:.1%}" if mfu else ""))
        return True

    def count(self, tokens: int, loss: float, grad_norm: float, loss_components: list[float]) -> None:
        """Enter a step that was taken into the state."""
        state = self.state
        state.step += 1
        state.tokens += tokens
        state.grad_norm = _finite(grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            state.optimizer_steps += 1
            state.skipped_in_a_row = 0
            state.losses.append(loss)
            if self.teacher:
                state.loss_components.append(loss_components)
        else:
            state.skipped_in_a_row += 1
            note(f"step {state.step} skipped: loss {loss}, gradient norm {grad_norm}")

    def make_batches(self, micro_batch_tokens: int) -> None:
        """Make the batches of the steps to come, in the background."""
        self.state.micro_batch_tokens = None if self.config.micro_batch_tokens else micro_batch_tokens
        self.batches = global_batches(
            self.config, self.setup, self.ranks, self.state.step, micro_batch_tokens
        )

    def chosen_size(self) -> int:
        """Tokens of a micro-batch where neither the config nor an earlier process says how many."""
        size = choose_micro_batch_tokens(
            self.model,
            self.setup.device,
            self.setup.dtype,
            with_teacher=self.teacher is not None,
            checkpointing=self.config.activation_checkpointing,
        )
        return self.ranks.smallest(size)

    def retry_smaller(self, micro_batch_tokens: int) -> None:
        """After a step that ran out of memory: free it, and go on in micro-batches of this size."""
        note(f"out of GPU memory: micro-batches of {micro_batch_tokens:,} tokens from here on")
        self.batches.close()
        self.optimizer.zero_grad()
        if not self.state.optimizer_steps:  # it may have run out of memory while it made its state
            self.optimizer.state.clear()
        torch.cuda.empty_cache()
        self.make_batches(micro_batch_tokens)

    # ---- checkpoints and metrics ----

    def save_and_log(self) -> None:
        """Begin the checkpoint, then write the line of metrics, that this step is due.

        In this order each checkpoint is that of a step whose line is still to come, whenever it is made.
        """
        state, config = self.state, self.config
        diverged = state.skipped_in_a_row >= config.max_skipped_steps
        if self.last_saved_step < state.step and self.is_due(config.checkpoint.interval) and not diverged:
            self.save()
        line_due = state.skipped_in_a_row or self.is_due(config.log_interval) or self.is_eval_due()
        if state.last_logged_step < state.step and line_due:
            self.log()
        if diverged:
            self.wait_for_checkpoint()
            latest = next(reversed(checkpoint_folders(config.output)), None)
            raise TrainingDiverged(
                f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, had a loss or gradient "
                f"that is not finite: lower optimizer.lr or look at the data (latest checkpoint: {latest})"
            )

    def is_due(self, interval: int) -> bool:
        return self.state.step % interval == 0 or self.state.step == self.setup.steps

    def is_eval_due(self) -> bool:
        return bool(self.setup.eval_batches) and self.is_due(self.config.eval.interval)

    def save(self) -> None:
        """Begin to write a checkpoint of this step, once the one before is written."""
        self.wait_for_checkpoint()
        snapshot = take_snapshot(self.model, self.optimizer, self.state, self.ranks)
        if self.ranks.is_first:
            self.writer.start(functools.partial(self.write_checkpoint, snapshot))
        self.last_saved_step = self.state.step

    def write_checkpoint(self, snapshot: Snapshot) -> None:
        """In the background: write a checkpoint, and remove those that are not to be kept."""
        self.metrics.sync()
        save_checkpoint(
            checkpoint_folder(self.config.output, snapshot.state.step),
            self.model,
            snapshot,
            self.setup.corpus.tokenizer,
            fingerprint(self.setup.identity),
        )
        if not snapshot.state.skipped_in_a_row:  # else the weights may be past rescue: the older ones stay
            prune_checkpoints(self.config.output, self.config.checkpoint.keep)

    def wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written. Where that fails, all ranks stop."""
        with self.ranks.together():
            self.writer.wait()

    def log(self) -> None:
        """Write a line of metrics, with an evaluation if it is due."""
        state = self.state
        rate = self.tokens_per_second(self.spent_at_line)
        line: dict = {"step": state.step, "loss": _mean(state.losses)}
        if self.teacher:
            for index, name in enumerate(LOSS_COMPONENTS):
                line[name] = _mean([components[index] for components in state.loss_components])
        line |= {
            "lr": learning_rate(state.step, self.setup.steps, self.config.optimizer),
            "grad_norm": state.grad_norm,
            "tokens": state.tokens,
            **({"trained_tokens": state.trained_tokens} if self.setup.token_scores else {}),
            "tokens_per_second": rate,
            "mfu": rate and self.flops * rate / self.peak_flops,
        }
        if self.is_eval_due():
            ranks, eos = self.ranks, self.setup.corpus.eos_token_id
            batches = share_of_rank(self.setup.eval_batches, eos, ranks.rank, ranks.world)
            loss = eval_loss(self.model, batches, self.setup.dtype, self.raise_if_interrupted, self.ranks)
            line["eval_loss"] = _finite(loss)
        if state.skipped_in_a_row:
            line["skipped"] = True
        self.metrics.write(line)
        self.start_new_line()

    def start_new_line(self) -> None:
        state = self.state
        state.losses, state.loss_components, state.last_logged_step = [], [], state.step
        self.spent_at_line = self.spent

    def tokens_per_second(self, before: tuple[float, int] = (0.0, 0)) -> float | None:
        """Of the steps of this process since self.spent was `before`; None if there was none."""
        seconds, tokens = (now - then for now, then in zip(self.spent, before, strict=True))
        return tokens / seconds if tokens else None

    def describe_teacher(self, teacher: Teacher) -> None:
        """Say what the loss is, and what the teacher costs."""
        share = 1 - self.student_flops / self.flops
        note(
            f"the loss is {1 - teacher.alpha:g} · cross-entropy + {teacher.alpha:g} · KL divergence from "
            f"{self.config.distill.teacher} at temperature {teacher.temperature:g}; the teacher takes "
            f"{share:.0%} of {self.flops / 1e6:,.2f} MFLOPs per token"
        )
        ids, student_ids = len(teacher.model.head_weight), len(self.model.head_weight)
        if ids < student_ids:
            note(
                f"the teacher predicts {ids:,} ids, the student {student_ids:,}: the loss leaves the rest "
                f"out, so the student does not learn to avoid them"
            )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
