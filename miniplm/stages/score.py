"""Stage 2, score: corpus + teacher + reference model → score files.

For every chunk the mean log-probability of its unmasked tokens under each model, and their difference, the
score r(x) = mean log p_teacher(x) − mean log p_reference(x) in nats per token (Gu et al., arXiv 2410.17215).

The chunks of the corpus, or of a sample of it, are cut into files of `shard_chunks`; batches are packed
within a file only. So a file depends on nothing but its own chunks: a killed run continues at the first file
that is not there, and ends in the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.scoring import Models, score_batch, score_batches
from ..config import BATCH_TOKENS, SHARD_CHUNKS, ScoreConfig
from ..data.batches import Batch, pinned, prefetch
from ..data.corpus import Corpus
from ..data.sampling import sampled_chunks
from ..data.scores import ROLES, columns_of, score_figures, shard_path, whole_hash, write_shard
from ..data.selection import rank_agreement
from ..data.token_scores import token_path, whole_token_hash, write_tokens
from ..data.tokenizer import check_same_tokens, load_tokenizer
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
from ..runtime.devices import choose_device, choose_dtype, cpu_multiplies_bf16
from ..runtime.errors import UserError
from ..runtime.profiling import check_trace, trace
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..training.checkpoints import latest_checkpoint
from ..training.cost import corpus_flops

AGREEMENT_CHUNKS = 1024  # on which a lower precision is compared
# On the CPU at most an eighth of the corpus, so that comparing costs less than bfloat16 saves; 64 at least.
MIN_AGREEMENT_CHUNKS, MAX_AGREEMENT_SHARE = 64, 1 / 8
MIN_EQUAL_SELECTIONS = 0.995  # beyond which bfloat16 is taken for float32


@dataclass(frozen=True)
class _Plan:
    """What is to be scored, with what, and into which files.

    tokenizer: the corpus's; names: of the models, by role; folders: where they are, likewise; reason: why
    auto is float32; shards: the chunks of each file; identity: of the output.
    """

    config: ScoreConfig
    corpus: Corpus
    tokenizer: Any
    names: dict[str, str]
    folders: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    reason: str | None
    batch_tokens: int
    shards: list[np.ndarray]
    identity: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def columns(self) -> list[str]:
        return columns_of(self.names)

    @property
    def chunks(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self.shards])


def score(config: ScoreConfig) -> None:
    """Score every chunk of a corpus and print a summary.

    Raises:
        UserError: the corpus or a model is missing, incomplete or damaged; a model has another tokenizer or
            too small a head; the output folder holds another run.
    """
    plan = _plan(config)
    complete = (plan.output / MANIFEST).exists() and open_output(plan.output, "score", plan.identity)
    whole, lost = _whole_shards(plan)
    if complete and not lost:
        print(printable(f"The scores in {plan.output} are complete, nothing to do."))
        return
    plan, models, vocab_size, agreement = _load(plan)
    if plan.reason:
        note(f"scoring in float32: {plan.reason}")
    open_output(plan.output, "score", plan.identity)  # claimed only now: a bad model leaves no folder behind
    with exclusive(plan.output), timed(plan.output):
        if damaged := [path for path in lost if path.exists()]:
            note(f"score file {damaged[0]} is damaged: its chunks are scored anew")
        elif complete:
            note(f"score file {lost[0]} is missing: its chunks are scored anew")
        reopen_output(plan.output, _files(plan, whole))
        _score_shards(plan, whole, models, vocab_size)
        _finish(plan, models, vocab_size, agreement)


def _whole_shards(plan: _Plan) -> tuple[dict[int, list[str]], list[Path]]:
    """(by their numbers, the hashes of the score file and, with tokens, of that of the tokens, where both are
    there and undamaged; the files that are not)."""
    files, token_files = (recorded(plan.output).get(key) for key in ("files", "token_files"))
    if not isinstance(files, dict | None):
        files = {}
    whole, lost = {}, []
    for number, chunks in enumerate(plan.shards):
        hashes = {
            shard_path(plan.output, number): whole_hash(plan.output, number, chunks, plan.columns, files)
        }
        if plan.config.tokens:
            hashes[token_path(plan.output, number)] = whole_token_hash(plan.output, number, token_files)
        if missing := [path for path, digest in hashes.items() if digest is None]:
            lost += missing
        else:
            whole[number] = [digest for digest in hashes.values() if digest is not None]
    return whole, lost


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
    dtype, reason = _choose_dtype(config, device)
    batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
    shard_chunks = config.shard_chunks or SHARD_CHUNKS.on(device.type)
    identity: dict[str, Any] = {
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
    if config.tokens:
        identity["tokens"] = True
    chunks = np.arange(len(corpus))
    if config.sample is not None:
        identity |= {"sample": config.sample, "seed": config.seed}
        chunks = sampled_chunks(corpus, config.sample, config.seed)
    shards = [chunks[start : start + shard_chunks] for start in range(0, len(chunks), shard_chunks)]
    return _Plan(
        config, corpus, tokenizer, names, folders, device, dtype, reason, batch_tokens, shards, identity
    )


def _choose_dtype(config: ScoreConfig, device: torch.device) -> tuple[torch.dtype, str | None]:
    """(the dtype, why auto is float32). What auto has begun goes on in its dtype, on another CPU too."""
    dtype = choose_dtype(config.dtype, device)
    if config.dtype != "auto" or device.type != "cpu" or config.precision:
        return dtype, None
    begun = recorded(config.output).get("identity", {}).get("dtype")
    if begun in ("float32", "bfloat16"):
        return getattr(torch, begun), None
    if not cpu_multiplies_bf16():
        return dtype, "torch sees no instructions for bfloat16 in this CPU"
    if not (config.teacher and config.reference):
        return dtype, "whether bfloat16 selects alike shows only with both models at once"
    return torch.bfloat16, None


def _load(plan: _Plan) -> tuple[_Plan, Models, int, dict[str, Any] | None]:
    """(the plan, the models by role, the number of ids that the softmax covers, how well a lower precision
    agrees with the higher one). Where bfloat16 does not agree well enough for auto, all is float32, and there
    is no agreement to tell."""
    fp8 = plan.config.precision is not None
    if not fp8 and not (plan.device.type == "cpu" and plan.dtype == torch.bfloat16):
        return plan, *_load_models(plan, plan.dtype), None
    models, vocab_size = _load_models(plan, plan.dtype if fp8 else torch.float32)
    before = _sample_scores(models, vocab_size, plan)
    if fp8:
        for model in models.values():
            to_float8(model)
    else:
        del models
        models, _ = _load_models(plan, torch.bfloat16)
    agreement = rank_agreement(before, _sample_scores(models, vocab_size, plan))
    equal = agreement["equal_selections"] or 0.0
    if fp8 or plan.config.dtype != "auto" or recorded(plan.output) or equal > MIN_EQUAL_SELECTIONS:
        return plan, models, vocab_size, agreement
    reason = (
        f"bfloat16 selects or drops {equal:.1%} of {agreement['rows']:,} chunks alike, more than "
        f"{MIN_EQUAL_SELECTIONS:.1%} are needed"
    )
    identity = {**plan.identity, "dtype": "float32"}
    plan = replace(plan, dtype=torch.float32, identity=identity, reason=reason)
    return plan, *_load_models(plan, plan.dtype), None


def _load_models(plan: _Plan, dtype: torch.dtype) -> tuple[Models, int]:
    """(the models by role, the number of ids that the softmax covers)."""
    config = plan.config
    models = {
        role: load_model(name, dtype, plan.device, config.trust_remote_code)
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


def _score_shards(plan: _Plan, whole: dict[int, list[str]], models: Models, vocab_size: int) -> None:
    """Write the score files that are not whole, and their hashes into the manifest as they come."""
    todo = [number for number in range(len(plan.shards)) if number not in whole]
    positions = plan.corpus.num_tokens - 1
    total, left = (
        int(positions[plan.chunks].sum()),
        sum(int(positions[plan.shards[number]].sum()) for number in todo),
    )
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
                    parts.append(score_batch(models, batch.to(plan.device), vocab_size, plan.config.tokens))
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of GPU memory: lower batch_tokens (now {plan.batch_tokens:,}) for a new output "
                        f"folder"
                    ) from error
                progress.update(len(batch.input_ids))
                profiler_step()
            values = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
            whole[number] = _write(plan, number, values)
            record_output(plan.output, _files(plan, whole))


def _write(plan: _Plan, number: int, values: dict[str, np.ndarray]) -> list[str]:
    """Write the files of a shard and return their hashes."""
    output, rows, hashes = plan.output, plan.shards[number], []
    if plan.config.tokens:
        tokens = {role: values[f"{role}_tokens"] for role in plan.names}
        positions = plan.corpus.num_tokens[rows] - 1
        hashes = [write_tokens(output, number, rows, positions, tokens)]
    return [write_shard(output, number, rows, plan.columns, values), *hashes]


def _files(plan: _Plan, whole: dict[int, list[str]]) -> dict[str, dict[str, str]]:
    """The hashes of the files of whole shards, as the manifest holds them."""
    paths = {"files": shard_path} | ({"token_files": token_path} if plan.config.tokens else {})
    return {
        key: {path(plan.output, number).name: whole[number][place] for number in sorted(whole)}
        for place, (key, path) in enumerate(paths.items())
    }


def _batches(plan: _Plan, chunks: np.ndarray) -> Iterator[Batch]:
    return score_batches(plan.corpus, chunks, plan.batch_tokens, plan.config.document_mask)


@torch.inference_mode()
def _sample_scores(models: Models, vocab_size: int, plan: _Plan) -> np.ndarray:
    """The last column of a sample of chunks that are spread over the corpus: float64."""
    parts, size = [], AGREEMENT_CHUNKS
    if not plan.config.precision:
        size = max(MIN_AGREEMENT_CHUNKS, min(size, int(MAX_AGREEMENT_SHARE * len(plan.chunks))))
    places = np.unique(np.linspace(0, len(plan.chunks) - 1, size).astype(np.int64))
    for batch in _batches(plan, plan.chunks[places]):
        parts.append(score_batch(models, batch.to(plan.device), vocab_size)[plan.columns[-1]])
    return torch.cat(parts).double().cpu().numpy()


# ---- the end ----


def _finish(plan: _Plan, models: Models, vocab_size: int, agreement: dict[str, Any] | None) -> None:
    """Mark the output complete, and print what came out."""
    figures = score_figures(plan.output, len(plan.shards), plan.columns[-1])
    results: dict[str, Any] = {role: _display_name(plan.names.get(role)) for role in ROLES}
    flops = corpus_flops(models, plan.corpus, plan.config.document_mask, plan.chunks)
    results |= {"vocab_size": vocab_size, **figures, "flops": flops}
    dtype = plan.identity["dtype"]
    lower, higher = (plan.config.precision, dtype) if plan.config.precision else (dtype, "float32")
    if agreement:
        results[f"{lower}_agreement"] = agreement
    complete_output(plan.output, {**results, "torch": torch.__version__})
    _print_summary(figures, plan.columns[-1], plan.output)
    if plan.config.sample is not None:
        print(f"A sample of {len(plan.corpus):,} chunks: miniplm proxy fit learns from it")
    if agreement and agreement["spearman"] is not None:
        print(
            f"{lower} against {higher} on {agreement['rows']:,} chunks: "
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
