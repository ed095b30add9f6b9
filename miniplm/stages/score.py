"""Stage 2, score: corpus + teacher + reference model → score files.

For every chunk the mean log-probability of its unmasked tokens under each model, and their difference, the
score r(x) = mean log p_teacher(x) − mean log p_reference(x) in nats per token (Gu et al., arXiv 2410.17215).

The rows of the corpus are cut into files of `shard_chunks`; batches are packed within a file only. So a file
depends on nothing but its own rows: a killed run continues at the first file that is not there, and ends in
the same bytes.
"""

from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from ..config import BATCH_TOKENS, SHARD_CHUNKS, ScoreConfig
from ..data.batches import IGNORE_INDEX, Batch, pack, pinned, prefetch, split_by_tokens
from ..data.corpus import Corpus
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..kernels import difference_score, linear_log_prob
from ..models.float8 import to_float8
from ..models.loading import load_model, model_hash
from ..runtime.artifacts import MANIFEST, complete_output, open_output
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.files import atomic_write
from ..runtime.profiling import check_trace, trace
from ..runtime.progress import Progress
from ..training.checkpoints import latest_checkpoint

ROLES = ("teacher", "reference")
AGREEMENT_ROWS = 1024  # on which float8 is compared


def score(config: ScoreConfig) -> None:
    """Score every row of a corpus and print a summary.

    Raises:
        UserError: the corpus or a model is missing, incomplete or damaged; a model has another tokenizer or
            too small a head; the output folder holds another run.
    """
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
    shard_rows = config.shard_chunks or SHARD_CHUNKS.on(device.type)
    identity = {
        "corpus": corpus.fingerprint,
        **{role: model_hash(folders[role]) if role in names else None for role in ROLES},
        "dtype": str(dtype).removeprefix("torch."),
        "document_mask": config.document_mask,
        "vocab_size": config.vocab_size,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_rows,
        "device": device.type,
        **({"precision": config.precision} if config.precision else {}),
    }
    output = Path(config.output)
    columns = [f"{role}_log_prob" for role in names] + ["score"] * (len(names) == 2)
    shards = [
        range(start, min(start + shard_rows, len(corpus))) for start in range(0, len(corpus), shard_rows)
    ]
    complete = (output / MANIFEST).exists() and open_output(output, "score", identity)
    todo = [
        number
        for number, rows in enumerate(shards)
        if not is_whole(output / shard_name(number), rows, columns)
    ]
    if complete and not todo:
        print(f"The scores in {output} are complete, nothing to do.")
        return
    models = {
        role: load_model(name, dtype, device, config.trust_remote_code) for role, name in folders.items()
    }
    heads = [len(model.head_weight) for model in models.values()]
    vocab_size = min([*heads, config.vocab_size or heads[0]])
    if vocab_size < (needed := _ids_needed(corpus, tokenizer, vocab_size)):
        raise UserError(
            f"corpus {config.data} has ids up to {needed - 1}, the softmax covers only {vocab_size}: "
            "give models with a larger head, or a larger vocab_size"
        )

    agreement = (
        _to_float8(models, corpus, batch_tokens, config.document_mask, vocab_size, columns[-1])
        if config.precision
        else None
    )
    open_output(
        output, "score", identity
    )  # claimed only now: a model that does not load leaves no folder behind
    positions = corpus.num_tokens - 1
    batches = (
        (number, batch)
        for number in todo
        for batch in pinned(_batches(corpus, shards[number], batch_tokens, config.document_mask), device)
    )
    left = sum(int(positions[shards[number]].sum()) for number in todo)
    with (
        torch.inference_mode(),
        trace(config.profile) as profiler_step,
        Progress("score", int(positions.sum()), done=int(positions.sum()) - left) as progress,
    ):
        for number, group in groupby(prefetch(batches), key=itemgetter(0)):
            parts = []
            for _, batch in group:
                try:
                    parts.append(score_batch(models, batch.to(device), vocab_size))
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of GPU memory: lower batch_tokens (now {batch_tokens:,}) for a new output "
                        f"folder"
                    ) from error
                progress.update(len(batch.input_ids))
                profiler_step()
            _write_shard(output / shard_name(number), shards[number], columns, parts)
    figures = _figures(output, len(shards), columns[-1])
    shown = {role: _display_name(names.get(role)) for role in ROLES}
    complete_output(
        output,
        {
            **shown,
            "vocab_size": vocab_size,
            **figures,
            **({"fp8_agreement": agreement} if agreement else {}),
            "torch": torch.__version__,
        },
    )
    _print_summary(figures, columns[-1], output)
    if agreement and agreement["spearman"] is not None:
        print(
            f"fp8 against {identity['dtype']} on {agreement['rows']:,} chunks: "
            f"{agreement['equal_selections']:.1%} selected or dropped alike at ratio 0.5, "
            f"Spearman's rank correlation {agreement['spearman']:.4f}"
        )


def score_batch(models: dict, batch: Batch, vocab_size: int) -> dict[str, torch.Tensor]:
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


def _to_float8(
    models: dict, corpus: Corpus, batch_tokens: int, document_mask: bool, vocab_size: int, column: str
) -> dict:
    """Turn the models to float8, and tell how a column's ranks of AGREEMENT_ROWS rows, spread over the
    corpus, agree before and after."""
    rows = np.unique(np.linspace(0, len(corpus) - 1, AGREEMENT_ROWS).astype(np.int64))
    device = next(iter(models.values())).head_weight.device

    @torch.inference_mode()
    def ranked():
        parts = []
        for group in split_by_tokens(corpus.num_tokens[rows], batch_tokens):
            parts.append(
                score_batch(
                    models,
                    pack(corpus.rows(rows[group]), corpus.eos_token_id, document_mask).to(device),
                    vocab_size,
                )[column]
            )
        return torch.cat(parts).double().cpu().numpy()

    before = ranked()
    for model in models.values():
        to_float8(model)
    return rank_agreement(before, ranked())


def rank_agreement(before: np.ndarray, after: np.ndarray) -> dict:
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
        "spearman": float(np.corrcoef(*ranks)[0, 1]) if rows > 1 else None,
        "equal_selections": float((kept[0] == kept[1]).mean()) if rows else None,
    }


def shard_name(number: int) -> str:
    return f"scores-{number:05d}.parquet"


def _batches(corpus: Corpus, rows: range, batch_tokens: int, document_mask: bool):
    for group in split_by_tokens(corpus.num_tokens[rows.start : rows.stop], batch_tokens):
        yield pack(corpus.rows(rows[group]), corpus.eos_token_id, document_mask)


def _ids_needed(corpus: Corpus, tokenizer, vocab_size: int) -> int:
    """The highest id of the corpus plus one; where the tokenizer's own highest id fits into vocab_size, that
    bound will do."""
    bound = max(tokenizer.get_vocab().values()) + 1
    return bound if bound <= vocab_size else corpus.highest_id + 1


def _schema(columns):
    import pyarrow as pa

    return pa.schema(
        {"index": pa.int64(), "num_tokens": pa.int32(), **{name: pa.float32() for name in columns}}
    )


def _write_shard(path: Path, rows: range, columns: list[str], parts: list[dict]):
    """Write the scores of `rows` from the results of their batches; null where a value is not finite."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = {
        name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in ("num_tokens", *columns)
    }
    arrays = [pa.array(np.arange(rows.start, rows.stop)), pa.array(values["num_tokens"].astype(np.int32))]
    arrays += [pa.array(values[name].astype(np.float32), mask=~np.isfinite(values[name])) for name in columns]
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(arrays, schema=_schema(columns)), temporary, write_page_checksum=True)


def is_whole(path: Path, rows: range, columns: list[str]) -> bool:
    """Is this score file there, undamaged (by its checksums), and of exactly these rows and columns?"""
    import pyarrow as pa

    try:
        table = _read_shard(path)
    except (OSError, pa.ArrowException):
        return False
    return table.schema.equals(_schema(columns)) and np.array_equal(
        table["index"].to_numpy(), np.arange(rows.start, rows.stop)
    )


def _read_shard(path: Path):
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read()


def _figures(output: Path, shards: int, column: str) -> dict:
    """Rows, scored tokens, and of `column` the number not finite, the mean and the share below 0 (null where
    nothing is finite)."""
    rows = tokens = finite = below = 0
    total = 0.0
    for number in range(shards):
        table = _read_shard(output / shard_name(number))
        values = table[column].drop_null().to_numpy()
        rows += table.num_rows
        tokens += int(table["num_tokens"].to_numpy().sum(dtype=np.int64))
        finite += len(values)
        below += int((values < 0).sum())
        total += float(values.sum(dtype=np.float64))
    return {
        "rows": rows,
        "tokens": tokens,
        "non_finite": rows - finite,
        "mean": total / finite if finite else None,
        "below_zero": below / finite if finite else None,
    }


def _display_name(name: str | None) -> str | None:
    return Path(name).resolve().name if name and Path(name).exists() else name


def _print_summary(figures: dict, column: str, output: Path):
    print(
        f"Scored {figures['rows']:,} chunks, {figures['tokens']:,} tokens; {figures['non_finite']:,} not "
        f"finite; scores in {output}"
    )
    if figures["mean"] is not None:
        below = f", {figures['below_zero']:.1%} of the chunks below 0" if column == "score" else ""
        print(f"Mean {column.replace('_', ' ')}: {figures['mean']:.4f} nats per token{below}")
