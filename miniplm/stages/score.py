"""Stage 2, score: corpus + teacher + reference model → score files.

For every chunk the mean log-probability of its unmasked tokens under each model, and their difference, the
score r(x) = mean log p_teacher(x) − mean log p_reference(x) in nats per token (Gu et al., arXiv 2410.17215).

The chunks of the corpus are cut into files of `shard_chunks`; batches are packed within a file only. So a
file depends on nothing but its own chunks: a killed run continues at the first file that is not there, and
ends in the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import BATCH_TOKENS, SHARD_CHUNKS, ScoreConfig
from ..data.batches import IGNORE_INDEX, Batch, pack, pinned, prefetch, split_by_tokens
from ..data.corpus import Corpus
from ..data.scores import ROLES, columns_of, score_figures, shard_path, whole_hash, write_shard
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..kernels import difference_score, linear_log_prob
from ..models.base import LanguageModel
from ..models.float8 import to_float8
from ..models.loading import load_model, model_hash
from ..runtime.artifacts import (
    MANIFEST,
    complete_output,
    exclusive,
    open_output,
    record_output,
    recorded,
    reopen_output,
)
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.profiling import check_trace, trace
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..training.checkpoints import latest_checkpoint

AGREEMENT_CHUNKS = 1024  # on which float8 is compared

Models = dict[str, LanguageModel]  # by role


@dataclass(frozen=True)
class _Plan:
    """What is to be scored, with what, and into which files.

    tokenizer: the corpus's; models: the name of each, by role; folders: where they are, likewise; shards: the
    chunks of each file; columns: the score columns; identity: of the output.
    """

    config: ScoreConfig
    corpus: Corpus
    tokenizer: Any
    names: dict[str, str]
    folders: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int
    shards: list[range]
    columns: list[str]
    identity: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def score(config: ScoreConfig) -> None:
    """Score every chunk of a corpus and print a summary.

    Raises:
        UserError: the corpus or a model is missing, incomplete or damaged; a model has another tokenizer or
            too small a head; the output folder holds another run.
    """
    plan = _plan(config)
    complete = (plan.output / MANIFEST).exists() and open_output(plan.output, "score", plan.identity)
    whole = _whole_shards(plan)
    todo = [number for number in range(len(plan.shards)) if number not in whole]
    if complete and not todo:
        print(printable(f"The scores in {plan.output} are complete, nothing to do."))
        return
    models, vocab_size = _load(plan)
    agreement = _to_float8(models, plan, vocab_size) if config.precision else None
    open_output(plan.output, "score", plan.identity)  # claimed only now: a bad model leaves no folder behind
    with exclusive(plan.output):
        if damaged := [path for number in todo if (path := shard_path(plan.output, number)).exists()]:
            note(f"score file {damaged[0]} is damaged: its chunks are scored anew")
        elif complete:
            note(f"score file {shard_path(plan.output, todo[0])} is missing: its chunks are scored anew")
        reopen_output(plan.output, {"files": _files(plan, whole)})
        _score_shards(plan, whole, models, vocab_size)
        _finish(plan, vocab_size, agreement)


def _whole_shards(plan: _Plan) -> dict[int, str]:
    """The hashes of the score files that are there and undamaged, by their number."""
    files = recorded(plan.output).get("files")
    if not isinstance(files, dict | None):
        files = {}
    hashes = {
        number: whole_hash(plan.output, number, chunks, plan.columns, files)
        for number, chunks in enumerate(plan.shards)
    }
    return {number: digest for number, digest in hashes.items() if digest is not None}


def _plan(config: ScoreConfig) -> _Plan:
    """Read and check all that the run is made of, but for the models' weights."""
    check_trace(config.profile)
    corpus = Corpus(config.data)
    names = {role: name for role in ROLES if (name := getattr(config, role))}
    folders = {role: latest_checkpoint(name) for role, name in names.items()}
    tokenizer = load_tokenizer(corpus.tokenizer)
    for role, name in names.items():
        check_same_tokens(tokenizer, load_tokenizer(folders[role], config.trust_remote_code), name)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
    shard_chunks = config.shard_chunks or SHARD_CHUNKS.on(device.type)
    identity = {
        "corpus": corpus.fingerprint,
        **{role: model_hash(folders[role]) if role in names else None for role in ROLES},
        "dtype": str(dtype).removeprefix("torch."),
        "document_mask": config.document_mask,
        "vocab_size": config.vocab_size,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_chunks,
        "device": device.type,
    }
    if config.precision:
        identity["precision"] = config.precision
    starts = range(0, len(corpus), shard_chunks)
    shards = [range(start, min(start + shard_chunks, len(corpus))) for start in starts]
    columns = columns_of(names)
    return _Plan(
        config, corpus, tokenizer, names, folders, device, dtype, batch_tokens, shards, columns, identity
    )


def _load(plan: _Plan) -> tuple[Models, int]:
    """(the models by role, the number of ids that the softmax covers)."""
    config = plan.config
    models = {
        role: load_model(name, plan.dtype, plan.device, config.trust_remote_code)
        for role, name in plan.folders.items()
    }
    heads = [len(model.head_weight) for model in models.values()]
    vocab_size = min([*heads, config.vocab_size or heads[0]])
    # Where the tokenizer's own highest id fits, there is no need to look for the corpus's.
    needed = max(plan.tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        needed = plan.corpus.highest_id + 1
    if needed > vocab_size:
        raise UserError(
            f"corpus {config.data} has ids up to {needed - 1}, the softmax covers only {vocab_size}: "
            "give models with a larger head, or a larger vocab_size"
        )
    return models, vocab_size


def _score_shards(plan: _Plan, whole: dict[int, str], models: Models, vocab_size: int) -> None:
    """Write the score files that are not whole, and their hashes into the manifest as they come."""
    todo = [number for number in range(len(plan.shards)) if number not in whole]
    positions = plan.corpus.num_tokens - 1
    total, left = int(positions.sum()), sum(int(positions[plan.shards[number]].sum()) for number in todo)
    batches = (
        (number, batch)
        for number in todo
        for batch in pinned(_batches(plan, plan.shards[number]), plan.device)
    )
    with (
        torch.inference_mode(),
        trace(plan.config.profile) as profiler_step,
        Progress("score", total, done=total - left) as progress,
    ):
        for number, group in groupby(prefetch(batches), key=itemgetter(0)):
            parts = []
            for _, batch in group:
                try:
                    parts.append(score_batch(models, batch.to(plan.device), vocab_size))
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of GPU memory: lower batch_tokens (now {plan.batch_tokens:,}) for a new output "
                        f"folder"
                    ) from error
                progress.update(len(batch.input_ids))
                profiler_step()
            values = {
                name: torch.cat([part[name] for part in parts]).cpu().numpy()
                for name in ("num_tokens", *plan.columns)
            }
            whole[number] = write_shard(plan.output, number, plan.shards[number], plan.columns, values)
            record_output(plan.output, {"files": _files(plan, whole)})


def _files(plan: _Plan, whole: dict[int, str]) -> dict[str, str]:
    return {shard_path(plan.output, number).name: whole[number] for number in sorted(whole)}


def _batches(plan: _Plan, chunks: range) -> Iterator[Batch]:
    corpus = plan.corpus
    for group in split_by_tokens(corpus.num_tokens[chunks.start : chunks.stop], plan.batch_tokens):
        yield pack(corpus.rows(chunks[group]), corpus.eos_token_id, plan.config.document_mask)


def score_batch(models: Models, batch: Batch, vocab_size: int) -> dict[str, torch.Tensor]:
    """The columns of the score files for the R rows of a batch, each [R] on the models' device.

    Args:
        models: {"teacher": LanguageModel, "reference": LanguageModel} or one of the two.
        vocab_size: the softmax covers the first so many ids.
    Returns:
        num_tokens (unmasked positions), teacher_log_prob, reference_log_prob (means over those, nats), score
        (their difference, with both models only). A row without an unmasked position gets NaN.
    """
    hidden = {
        role: model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen) for role, model in models.items()
    }
    heads = {role: model.head_weight[:vocab_size] for role, model in models.items()}
    if len(models) == 2:
        return difference_score(
            hidden["teacher"],
            heads["teacher"],
            hidden["reference"],
            heads["reference"],
            batch.targets,
            batch.row_cu_seqlens,
        )._asdict()
    (role,) = models
    log_prob = linear_log_prob(hidden[role], heads[role], batch.targets)
    offsets = batch.row_cu_seqlens.long()
    total, count = (
        torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0)
        for values in (log_prob, batch.targets != IGNORE_INDEX)
    )
    return {"num_tokens": count, f"{role}_log_prob": total / count}


# ---- float8 ----


def _to_float8(models: Models, plan: _Plan, vocab_size: int) -> dict[str, Any]:
    """Turn the models to float8, and tell how the ranks by the last column of AGREEMENT_CHUNKS chunks, spread
    over the corpus, agree before and after."""
    corpus, document_mask = plan.corpus, plan.config.document_mask
    chunks = np.unique(np.linspace(0, len(corpus) - 1, AGREEMENT_CHUNKS).astype(np.int64))

    @torch.inference_mode()
    def ranked() -> np.ndarray:
        parts = []
        for group in split_by_tokens(corpus.num_tokens[chunks], plan.batch_tokens):
            batch = pack(corpus.rows(chunks[group]), corpus.eos_token_id, document_mask)
            parts.append(score_batch(models, batch.to(plan.device), vocab_size)[plan.columns[-1]])
        return torch.cat(parts).double().cpu().numpy()

    before = ranked()
    for model in models.values():
        to_float8(model)
    return rank_agreement(before, ranked())


def rank_agreement(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """How well two scorings [R] of the same rows agree, over the rows finite in both: their number,
    Spearman's rank correlation, and the share that Difference Sampling at ratio 0.5 keeps or drops alike."""
    both = np.isfinite(before) & np.isfinite(after)
    ranks = [
        np.argsort(np.argsort(-values[both], kind="stable"), kind="stable") for values in (before, after)
    ]
    rows = int(both.sum())
    kept = [rank < int(0.5 * rows) for rank in ranks]
    return {
        "rows": rows,
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if rows > 1 else None,
        "equal_selections": float((kept[0] == kept[1]).mean()) if rows else None,
    }


# ---- the end ----


def _finish(plan: _Plan, vocab_size: int, agreement: dict[str, Any] | None) -> None:
    """Mark the output complete, and print what came out."""
    figures = score_figures(plan.output, len(plan.shards), plan.columns[-1])
    results: dict[str, Any] = {role: _display_name(plan.names.get(role)) for role in ROLES}
    results |= {"vocab_size": vocab_size, **figures}
    if agreement:
        results["fp8_agreement"] = agreement
    complete_output(plan.output, {**results, "torch": torch.__version__})
    _print_summary(figures, plan.columns[-1], plan.output)
    if agreement and agreement["spearman"] is not None:
        print(
            f"fp8 against {plan.identity['dtype']} on {agreement['rows']:,} chunks: "
            f"{agreement['equal_selections']:.1%} selected or dropped alike at ratio 0.5, "
            f"Spearman's rank correlation {agreement['spearman']:.4f}"
        )


def _display_name(name: str | None) -> str | None:
    return Path(name).resolve().name if name and Path(name).exists() else name


def _print_summary(figures: dict[str, Any], column: str, output: Path) -> None:
    print(
        f"Scored {figures['rows']:,} chunks, {figures['tokens']:,} tokens; {figures['non_finite']:,} not "
        f"finite; scores in {printable(output)}"
    )
    if figures["mean"] is not None:
        below = f", {figures['below_zero']:.1%} of the chunks below 0" if column == "score" else ""
        print(f"Mean {column.replace('_', ' ')}: {figures['mean']:.4f} nats per token{below}")
