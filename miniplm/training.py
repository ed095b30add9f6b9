"""Stage 4, train: corpus → checkpoints.

One optimiser step takes a global batch of `batch_tokens` predictions, in micro-batches; its loss is the mean over all
predicted tokens of the global batch, −(1/n) Σ log p, whatever the micro-batches. Weights, gradients and moments are
float32; forward and backward run in `dtype`. Rows, learning rate and update of a step are pure functions of (seed, step)
and of the weights before it, so a run that was stopped and continued computes the same bits as one that was not.

`DataOrder`, `global_batch`, `make_optimizer` and `train_step` are the core; they need no corpus on disk.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .artifacts import UserError, atomic_folder, atomic_write, complete_output, fingerprint, hash_files, open_output, read_json, write_json
from .batches import IGNORE, Batch, pack, prefetch, split_by_tokens
from .config import OptimizerConfig, TrainConfig
from .kernels import linear_cross_entropy
from .model import Adapter, Decoder, LanguageModel, choose_device, choose_dtype, load_model, student_config, unsupported, weight_files
from .progress import Progress
from .storage import Corpus
from .tokenizer import check_same_tokens, load_tokenizer


class TrainingDiverged(RuntimeError):
    """So many steps in a row had a loss or gradient that is not finite that the run was given up."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT stopped the run, with its work saved; the exit code is 128 + the signal's number."""


class DataOrder:
    """Which rows of a corpus make up which step.

    The rows follow one another in epochs without end, each epoch in an order of its own (a permutation seeded with (seed,
    epoch), or as they are). Step k takes the rows whose first prediction is one of the predictions k·B … (k+1)·B − 1 of
    that stream: each row once per epoch, B predictions per step to within one row, and the first k steps of any two
    corpora count k·B predictions to within one row.

    Args:
        num_tokens: int [rows], ids per row; a row of n ids counts n − 1 predictions, rows without any are left out.
        batch_tokens: B, the predictions per step.
    Raises:
        UserError: a row is longer than a step, so some steps would be empty; or there are no predictions.
    """

    def __init__(self, num_tokens: np.ndarray, batch_tokens: int, seed: int, shuffle: bool = True):
        self.num_tokens, self.batch_tokens, self.seed, self.shuffle = num_tokens, batch_tokens, seed, shuffle
        self.rows = np.flatnonzero(num_tokens > 1)
        if not len(self.rows):
            raise UserError("the corpus holds no token to predict: train on another one")
        if (longest := int(num_tokens.max()) - 1) > batch_tokens:
            raise UserError(f"batch_tokens {batch_tokens} is below the longest chunk of the corpus, {longest} predictions: raise it")
        self.epoch_tokens = int(num_tokens[self.rows].sum()) - len(self.rows)
        self._cached = None

    @property
    def steps_per_epoch(self) -> int:
        """The steps of one pass; the last one runs on into the next epoch."""
        return -(-self.epoch_tokens // self.batch_tokens)

    def step(self, step: int) -> np.ndarray:
        """The rows of step 0, 1, …: int64 indices in the order of the stream."""
        start, stop = step * self.batch_tokens, (step + 1) * self.batch_tokens
        parts = []
        for epoch in range(start // self.epoch_tokens, (stop - 1) // self.epoch_tokens + 1):
            rows, starts = self._epoch(epoch)
            first, last = np.searchsorted(starts, [start - epoch * self.epoch_tokens, stop - epoch * self.epoch_tokens])
            parts.append(rows[first:last])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, the predictions before each) of an epoch; the latest epoch is kept."""
        if self._cached is None or self._cached[0] != epoch:
            rows = np.random.default_rng([self.seed, epoch]).permutation(self.rows) if self.shuffle else self.rows
            lengths = self.num_tokens[rows] - 1
            self._cached = epoch, rows, np.cumsum(lengths) - lengths
        return self._cached[1:]


def global_batch(rows, eos_token_id: int, micro_batch_tokens: int, document_mask: bool = False) -> list[Batch]:
    """Pack rows (int arrays of ids) into micro-batches of at most micro_batch_tokens predictions (a longer row: alone)."""
    return [pack(rows[group], eos_token_id, document_mask) for group in split_by_tokens([len(row) for row in rows], micro_batch_tokens)]


class _SummedLoss(torch.nn.Module):
    """A module around the model and its loss, so that functional_call can lend both the cast weights."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
        return linear_cross_entropy(hidden, self.model.head_weight, batch.targets, ignore_index=IGNORE, reduction="sum")


def summed_loss(model: LanguageModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Σ −log p over the targets of a batch on the model's device: scalar float32, in nats, computed in `dtype`.

    The weights are cast inside the graph: the gradient of each micro-batch comes back through the cast, and what adds up
    over micro-batches is float32. (Autocast does not reach into custom ops, and would leave the residual stream in float32.)
    """
    weights = {f"model.{name}": parameter.to(dtype) for name, parameter in model.named_parameters()}
    return torch.func.functional_call(_SummedLoss(model), weights, (batch,))


def make_optimizer(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on all parameters, as published."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Of step 1 … steps: linear up to the peak at step warmup_steps, then a cosine down to min_lr_ratio · peak at the last step.

    With warmup_steps ≥ steps the run ends within the warm-up, at steps / warmup_steps of the peak.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(model: LanguageModel, optimizer, micro_batches: list[Batch], lr: float, max_grad_norm: float, dtype: torch.dtype,
               poll=lambda: None) -> tuple[float, float]:
    """One optimiser step on a global batch; none where the loss or the gradient norm is not finite.

    Args:
        dtype: of forward and backward; the parameters are float32.
        poll: called between micro-batches; what it raises leaves the weights as they were.
    Returns:
        (loss, gradient norm before clipping); the loss in nats, the mean over all targets of the global batch (NaN if there are none).
    """
    num_targets = sum(int((batch.targets != IGNORE).sum()) for batch in micro_batches)
    device = model.head_weight.device
    total = torch.zeros((), device=device)
    # All are moved now: a copy from pageable memory waits for the device, so between micro-batches it would stall the queue.
    for batch in [batch.to(device) for batch in micro_batches]:
        poll()
        loss = summed_loss(model, batch, dtype) / num_targets if num_targets else summed_loss(model, batch, dtype) * math.nan
        loss.backward()
        total += loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    loss, grad_norm = torch.stack([total, grad_norm]).tolist()  # the only wait for the device
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


@torch.no_grad()
def held_out_loss(model: LanguageModel, rows, eos_token_id: int, batch_tokens: int, document_mask: bool, dtype: torch.dtype,
                  poll=lambda: None) -> float:
    """Mean −log p over the targets of the rows, in nats; `poll` is called between batches."""
    device, num_targets = model.head_weight.device, 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group in split_by_tokens([len(row) for row in rows], batch_tokens):
        poll()
        batch = pack(rows[group], eos_token_id, document_mask)
        num_targets += int((batch.targets != IGNORE).sum())
        total += summed_loss(model, batch.to(device), dtype)
    return total.item() / num_targets


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a square matrix product, the best of ten: bfloat16 and 8192 on a GPU, float32 and 1024 on the CPU."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a, best = torch.zeros(size, size, dtype=dtype, device=device), math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# ---- checkpoints: a folder that transformers opens, plus what it takes to continue ----
# torch.distributed.checkpoint is not used: its .metadata file is a pickle, and nothing here is unpickled.

@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds beside weights and moments. Losses are in nats per token, None where they are not finite."""

    step: int = 0  # steps done, skipped ones among them
    updates: int = 0  # steps that were not skipped
    tokens: int = 0  # predictions gone through
    skipped_in_a_row: int = 0
    grad_norm: float | None = None  # of the last step
    losses: list = dataclasses.field(default_factory=list)  # of the steps since the last line of metrics.jsonl
    line_step: int = 0  # the step of that line
    loss: float | None = None  # in that line
    eval_loss: float | None = None  # the latest


def save_checkpoint(folder: Path, model: LanguageModel, optimizer, state: TrainState, tokenizer: str, identity: str):
    """Write config.json, model.safetensors, the tokenizer's files, optimizer.safetensors and trainer_state.json, all or nothing.

    Args:
        folder: replaced if it exists.
        tokenizer: the folder whose files are copied.
        identity: fingerprint of the run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as temporary:
        shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        moments = {}
        for name, parameter in model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[f"{moment}.{name}"] = optimizer.state[parameter][moment] if state.updates else torch.zeros_like(parameter)
        try:
            model.save_pretrained(temporary)
            save_file(moments, temporary / "optimizer.safetensors")
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"cannot write checkpoint {folder}: {error}") from error
        files = {str(file.relative_to(temporary)): hash_files([file]) for file in sorted(temporary.rglob("*")) if file.is_file()}
        write_json(temporary / "trainer_state.json", {**dataclasses.asdict(state), "identity": identity, "files": files})


def load_optimizer(optimizer, model: LanguageModel, checkpoint: Path, updates: int):
    """Fill the optimiser of `model` from a checkpoint made after `updates` updates."""
    from safetensors import safe_open

    moments = {}
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            # Copies, because the tensors of an open file are the file.
            moments[index] = {moment: file.get_tensor(f"{moment}.{name}").to(parameter.device, copy=True) for moment in ("exp_avg", "exp_avg_sq")}
            moments[index]["step"] = torch.tensor(float(updates))
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def find_checkpoint(folder: Path, identity: str) -> tuple[Path, TrainState] | None:
    """The latest whole checkpoint under `folder`, None if there is none. Damaged later ones are removed, with a warning.

    Raises:
        UserError: all are damaged, or the latest whole one belongs to another run.
    """
    damaged = {}
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        try:
            found = read_json(checkpoint / "trainer_state.json")
            changed = [name for name, content in found.pop("files").items() if hash_files([checkpoint / name]) != content]
            if changed:
                raise UserError(f"{changed[0]} is not as it was written")
            owner, state = found.pop("identity"), TrainState(**found)
        except (UserError, FileNotFoundError, AttributeError, KeyError, TypeError) as error:
            damaged[checkpoint] = " ".join(str(error).split())
            continue
        if owner != identity:
            raise UserError(f"checkpoint {checkpoint} belongs to another run: remove it, or choose another --output")
        for path, reason in damaged.items():
            _warn(f"checkpoint {path} is damaged ({reason}): removed, continuing from {checkpoint.name}")
            shutil.rmtree(path)
        return checkpoint, state
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise UserError(f"checkpoint {path} is damaged ({reason}) and there is no whole one before it: delete {folder.parent} to start again")
    return None


def _prune(folder: Path, keep: int):
    for checkpoint in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(checkpoint)


# ---- metrics, signals ----

class Metrics:
    """metrics.jsonl and the same figures for tensorboard. What an earlier run wrote past `last_step` is dropped, so that the
    file of a continued run reads as that of one run."""

    def __init__(self, output: Path, last_step: int):
        path = output / "metrics.jsonl"
        with atomic_write(path) as temporary:
            temporary.write_text("".join(self._lines(path, last_step)), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            _warn("tensorboard is not installed: the figures go to metrics.jsonl alone")
            self.tensorboard = None
        else:
            self.tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=last_step + 1)

    @staticmethod
    def _lines(path: Path, last_step: int):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ():
            try:
                if json.loads(line)["step"] > last_step:
                    return
            except (ValueError, TypeError, KeyError):  # half a line, where a kill cut it off
                return
            yield line

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.tensorboard:
            for name, value in line.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, line["step"])

    def sync(self):
        """Make what was written survive a power failure."""
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


class _Signals:
    """Within it, the first SIGTERM or SIGINT makes the next poll() raise Interrupted; a second one ends the process at once."""

    def __enter__(self):
        self.received, self.previous = None, {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum, _):
        self.received = signum
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL)

    def poll(self):
        if self.received is not None:
            raise Interrupted(128 + self.received)


def _warn(text: str):
    tqdm.write(text, file=sys.stderr)  # above the progress bar, if there is one


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- the stage ----

class _Setup(NamedTuple):
    """What a run is made of, settled before anything is written."""

    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    held_out: list  # rows of the evaluation corpus; none without one
    order: DataOrder
    steps: int
    micro_batch_tokens: int
    architecture: dict | None  # the content of config.model_config
    identity: dict


def train(config: TrainConfig) -> None:
    """Train a model on a corpus, or continue where an equal run stopped.

    A line of metrics.jsonl is written every log_interval steps, at each evaluation, at each skipped step and at the last
    one: "step", "loss" (the exact mean over the steps since the last line, skipped ones left out), "lr", "grad_norm" (of
    this step, before clipping), "tokens" (predictions so far), "tokens_per_second" and "mfu" (of the training steps since
    the last line), and where they apply "eval_loss" and "skipped". A figure that is not finite is null.

    Raises:
        UserError: the inputs cannot be used or do not fit together, or the output holds another run.
        TrainingDiverged: max_skipped_steps steps in a row had a loss or gradient that is not finite.
        Interrupted: SIGTERM or SIGINT; the last finished step is saved.
    """
    setup = _set_up(config)
    output = Path(config.output)
    if open_output(output, "train", setup.identity):
        print(f"training {output} is complete, nothing to do")
        return
    if config.optimizer.warmup_steps >= setup.steps:
        _warn(f"the run ends within the warm-up ({setup.steps} of optimizer.warmup_steps {config.optimizer.warmup_steps}): the learning rate only "
              f"rises, to {learning_rate(setup.steps, setup.steps, config.optimizer):.2g}")
    with _Signals() as signals:
        found = find_checkpoint(output / "checkpoints", fingerprint(setup.identity))
        checkpoint, state = found or (None, TrainState())
        model = load_model(checkpoint, torch.float32, setup.device) if checkpoint else _initial_model(config, setup)
        model.eval()  # no dropout, as published; so a step depends on no random numbers
        optimizer = make_optimizer(model, config.optimizer)
        if checkpoint:
            load_optimizer(optimizer, model, checkpoint, state.updates)
            _warn(f"continuing after step {state.step} of {setup.steps}")
        with contextlib.closing(Metrics(output, state.line_step)) as metrics:
            speed = _loop(config, setup, model, optimizer, state, metrics, signals)
    summary = {key: value for key, value in setup.corpus.manifest.items() if key not in ("stage", "complete", "identity")}
    complete_output(output, {"steps": state.step, "skipped": state.step - state.updates, "tokens": state.tokens, "loss": state.loss,
                             "eval_loss": state.eval_loss, "parameters": model.num_parameters(), "corpus": summary})
    shown = [f"trained {state.step:,} steps on {state.tokens:,} tokens", f"loss {state.loss:.4f}" if state.loss is not None else "loss not finite"]
    shown += [f"held-out loss {state.eval_loss:.4f}"] if state.eval_loss is not None else []
    shown += [f"{speed:,.0f} tokens/s"] if speed else []
    print(f"{', '.join(shown)} → {_checkpoint_folder(output, state.step)}")


def _loop(config: TrainConfig, setup: _Setup, model, optimizer, state: TrainState, metrics: Metrics, signals: _Signals) -> float:
    """Train from `state` to the last step; the training rate in tokens/s, 0 if there was nothing left to train."""
    output, steps, identity = Path(config.output), setup.steps, fingerprint(setup.identity)
    peak = 1e12 * config.peak_tflops if config.peak_tflops else peak_flops(setup.device)
    flops = 3 * model.flops_per_token(setup.order.epoch_tokens // len(setup.order.rows))  # backward takes twice the forward
    saved, seconds, tokens, all_seconds, all_tokens = state.step, 0.0, 0, 0.0, 0

    def report():
        nonlocal seconds, tokens
        line = {"step": state.step, "loss": sum(state.losses) / len(state.losses) if state.losses else None,
                "lr": learning_rate(state.step, steps, config.optimizer), "grad_norm": state.grad_norm, "tokens": state.tokens,
                "tokens_per_second": round(tokens / seconds, 1) if seconds else None, "mfu": round(flops * tokens / seconds / peak, 4) if seconds else None}
        if setup.held_out and (state.step % config.eval_interval == 0 or state.step == steps):
            state.eval_loss = line["eval_loss"] = _finite(held_out_loss(
                model, setup.held_out, setup.corpus.eos_token_id, setup.micro_batch_tokens, config.document_mask, setup.dtype, signals.poll))
        if state.skipped_in_a_row:
            line["skipped"] = True
        metrics.write(line)
        state.losses, state.line_step, state.loss, seconds, tokens = [], state.step, line["loss"], 0.0, 0

    def save():
        nonlocal saved
        metrics.sync()
        save_checkpoint(_checkpoint_folder(output, state.step), model, optimizer, state, setup.corpus.tokenizer, identity)
        saved = state.step
        if not state.skipped_in_a_row:  # else the weights may already be beyond rescue: what is older is kept
            _prune(output / "checkpoints", config.keep_checkpoints)

    batches = prefetch(global_batch(setup.corpus.rows(setup.order.step(step)), setup.corpus.eos_token_id, setup.micro_batch_tokens,
                                    config.document_mask) for step in range(state.step, steps))
    with contextlib.closing(batches), Progress("train", steps * config.batch_tokens, done=state.step * config.batch_tokens) as progress:
        try:
            while True:
                # The line of a step comes first here, so that a run which was stopped in its evaluation continues with it.
                due = (config.log_interval, *([config.eval_interval] if setup.held_out else []))
                if state.line_step < state.step and (state.skipped_in_a_row or state.step == steps or any(state.step % n == 0 for n in due)):
                    report()
                if state.skipped_in_a_row >= config.max_skipped_steps:
                    kept = sorted((output / "checkpoints").glob("step-*"))
                    raise TrainingDiverged(
                        f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, had a loss or gradient that is not finite: lower optimizer.lr or "
                        f"look at the data; {f'the latest checkpoint is {kept[-1]}' if kept else 'there is no checkpoint yet'}")
                if saved < state.step and (state.step % config.checkpoint_interval == 0 or state.step == steps):
                    save()
                if state.step == steps:
                    return all_tokens / all_seconds if all_seconds else 0.0
                signals.poll()
                start = time.perf_counter()
                micro_batches, lr = next(batches), learning_rate(state.step + 1, steps, config.optimizer)
                loss, grad_norm = train_step(model, optimizer, micro_batches, lr, config.optimizer.max_grad_norm, setup.dtype, signals.poll)
                elapsed, count = time.perf_counter() - start, sum(len(batch.targets) for batch in micro_batches)
                seconds, tokens, all_seconds, all_tokens = seconds + elapsed, tokens + count, all_seconds + elapsed, all_tokens + count
                state.step, state.tokens, state.grad_norm = state.step + 1, state.tokens + count, _finite(grad_norm)
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    state.updates, state.skipped_in_a_row = state.updates + 1, 0
                    state.losses.append(loss)
                else:
                    state.skipped_in_a_row += 1
                    _warn(f"step {state.step} skipped: loss {loss}, gradient norm {grad_norm}")
                progress.note(f"loss {loss:.4f}, lr {lr:.2e}")
                progress.update(config.batch_tokens)
        except Interrupted:
            if saved < state.step:
                save()
            _warn(f"stopped at step {state.step}: the same command continues")
            raise


def _checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def _set_up(config: TrainConfig) -> _Setup:
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    corpus = Corpus(config.data)
    if not corpus.manifest["predictions"]:
        raise UserError(f"corpus {config.data} holds no token to predict: train on another one")
    order = DataOrder(corpus.num_tokens, config.batch_tokens, config.seed, config.shuffle)
    steps = config.steps or order.steps_per_epoch
    identity = {"corpus": corpus.fingerprint, "tokenizer": corpus.manifest["tokenizer_fingerprint"], "eval_corpus": None, "eval_rows": None}
    held_out = []
    if config.eval_data:
        held_out_corpus = Corpus(config.eval_data)
        if held_out_corpus.manifest["tokenizer_fingerprint"] != corpus.manifest["tokenizer_fingerprint"]:
            raise UserError(f"corpora {config.data} and {config.eval_data} have different tokenizers: prepare both with the same one")
        held_out = held_out_corpus.rows(range(min(config.eval_rows, len(held_out_corpus))))
        if not any((row[:-1] != corpus.eos_token_id).any() for row in held_out):
            raise UserError(f"the first {config.eval_rows} chunks of corpus {config.eval_data} hold no token to predict: evaluate on another one")
        identity |= {"eval_corpus": held_out_corpus.fingerprint, "eval_rows": config.eval_rows}
    architecture = None
    if config.init_from:
        check_same_tokens(load_tokenizer(corpus.tokenizer), load_tokenizer(config.init_from), config.init_from)
        identity["init_from"] = hash_files(weight_files(config.init_from))
    elif config.model_config:
        architecture = identity["model"] = read_json(_config_file(config))
    else:
        identity["model"] = dataclasses.asdict(config.model)
    identity |= {"optimizer": dataclasses.asdict(config.optimizer), "steps": steps, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    identity |= {name: getattr(config, name) for name in ("batch_tokens", "shuffle", "seed", "document_mask")}
    micro_batch_tokens = config.micro_batch_tokens or (4_096 if device.type == "cpu" else 65_536)
    return _Setup(device, dtype, corpus, held_out, order, steps, micro_batch_tokens, architecture, identity)
