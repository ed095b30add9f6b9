"""Stage 5, evaluate: the loss of a model on a held-out corpus, per domain, and its answers to tasks.

The loss is the mean of −log p over the predicted positions (those whose input is not EOS), in nats per token,
and the perplexity its exponential. Domains and the whole are weighted by tokens, not by chunks.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.evaluation import read_evaluation, with_checksum
from ..analysis.tasks import harness_version, load_tasks, print_tasks, questions_fingerprint, run_tasks
from ..config import BATCH_TOKENS, EvaluateConfig
from ..data.batches import IGNORE_INDEX, pack, prefetch, split_by_tokens
from ..data.corpus import Corpus
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..kernels import linear_log_prob
from ..models.base import LanguageModel
from ..models.loading import load_model, model_hash
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.files import read_json, write_json
from ..runtime.locks import lock
from ..runtime.progress import Progress
from ..runtime.text import printable
from ..training.checkpoints import latest_checkpoint
from ..training.cost import corpus_flops


def evaluate(config: EvaluateConfig) -> dict:
    """Print the tables of losses and of tasks, write them to `config.output` if given, and return what is
    written.

    An output file of an equal evaluation (weights, corpus, document_mask, questions of the tasks, version of
    lm-eval, dtype) is taken as it is.

    Returns:
        What analysis/evaluation.py describes: what was evaluated on what, the figures of the whole, and of
        each domain; without `data` none of that. With tasks also "harness", "asked" ({task: fingerprint of
        its questions}) and what analysis.tasks.run_tasks returns.
    Raises:
        UserError: the corpus, the model, a task or the output file cannot be used, or model and corpus have
            different tokens.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    folder, corpus = latest_checkpoint(config.model), _read_corpus(config.data) if config.data else None
    tasks = load_tasks(config.tasks) if config.tasks else {}
    identity = _identity(config, folder, dtype, corpus, tasks)
    result = _read_equal(config.output, identity)
    if result is None:
        model = _load_model(config, folder, corpus, dtype, device)
        with _only_writer(config.output):
            figures: dict[str, Any] = {}
            if corpus:
                figures |= _all_figures(config, model, corpus, device)
            if tasks:
                tokenizer = load_tokenizer(folder, config.trust_remote_code)
                batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
                figures |= run_tasks(model, tokenizer, tasks, device, batch_tokens)
            result = with_checksum({**identity, **figures})
            if config.output:
                write_json(config.output, result)
    if corpus:
        _print_table(result)
    if tasks:
        print_tasks(result)
    return result


@contextlib.contextmanager
def _only_writer(output: str | None) -> Iterator[None]:
    """Keep other evaluations from writing the same file while the block runs; its folder is made."""
    if output is None:
        yield
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is writing {path}: wait for it, or choose another --output"
    with lock(path.with_name(f".{path.name}.lock.tmp"), refusal):
        yield


def _read_corpus(data: str) -> Corpus:
    corpus = Corpus(data)
    if not corpus.manifest["predictions"]:
        raise UserError(f"corpus {data} holds no token to predict: evaluate on another one")
    return corpus


def _identity(
    config: EvaluateConfig, folder: str, dtype: torch.dtype, corpus: Corpus | None, tasks: dict[str, Any]
) -> dict[str, Any]:
    """All that determines the figures."""
    identity: dict[str, Any] = {
        "model": Path(config.model).resolve().name if Path(config.model).exists() else config.model,
        "weights": model_hash(folder),
    }
    if corpus:
        identity |= {"corpus": corpus.fingerprint, "source": corpus.manifest["source"]}
        identity["document_mask"] = config.document_mask
    identity["dtype"] = str(dtype).removeprefix("torch.")
    if tasks:
        identity["harness"] = harness_version()
        identity["asked"] = {name: questions_fingerprint(task) for name, task in tasks.items()}
    return identity


def _read_equal(output: str | None, identity: dict) -> dict | None:
    """The result that an equal evaluation wrote to `output`; None where there is no such file. Any other file
    is refused."""
    if not output or not Path(output).exists():
        return None
    if Path(output).is_dir():
        raise UserError(f"output {output} is a folder: give the name of a JSON file")
    found = read_json(output)
    if not isinstance(found, dict) or {key: found.get(key) for key in identity} != identity:
        raise UserError(
            f"output {output} holds something other than this evaluation: choose another --output or "
            f"delete it"
        )
    if "corpus" in identity:
        read_evaluation(output)  # as it was written
    elif found != with_checksum({key: value for key, value in found.items() if key != "checksum"}):
        raise UserError(f"{output} is not as evaluate wrote it: delete it to evaluate again")
    print(printable(f"{output} is complete, nothing to do"))
    return found


def _load_model(
    config: EvaluateConfig, folder: str, corpus: Corpus | None, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """The model in `folder`; UserError unless it goes with the corpus, if there is one."""
    if corpus:
        own = load_tokenizer(folder, config.trust_remote_code)
        check_same_tokens(load_tokenizer(corpus.tokenizer), own, config.model)
    model = load_model(folder, dtype, device, config.trust_remote_code)
    if corpus and len(model.head_weight) <= corpus.highest_id:
        raise UserError(
            f"model {config.model} knows {len(model.head_weight)} ids, corpus {config.data} has ids up to "
            f"{corpus.highest_id}: evaluate a model that was made for its tokenizer"
        )
    return model


# ---- the figures ----


def _all_figures(
    config: EvaluateConfig, model: LanguageModel, corpus: Corpus, device: torch.device
) -> dict[str, Any]:
    """The figures of the whole corpus, what they cost, and under "domains" the figures of each, by name."""
    batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
    losses, tokens = _chunk_losses(model, corpus, config.document_mask, batch_tokens, device)
    codes, names = corpus.domains
    domains = {
        name: _figures(losses[codes == code], tokens[codes == code]) for code, name in enumerate(names)
    }
    flops = corpus_flops({"forward": model}, corpus, config.document_mask)
    return {**_figures(losses, tokens), "flops": flops, "domains": dict(sorted(domains.items()))}


@torch.inference_mode()
def _chunk_losses(
    model: LanguageModel, corpus: Corpus, document_mask: bool, batch_tokens: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of −log p float64 [chunks], predicted positions int64 [chunks]) of every chunk of the corpus."""
    losses, tokens = np.zeros(len(corpus)), np.zeros(len(corpus), np.int64)
    groups = split_by_tokens(corpus.num_tokens, batch_tokens)
    batches = (
        (group, pack(corpus.rows(range(group.start, group.stop)), corpus.eos_token_id, document_mask))
        for group in groups
    )
    with Progress("evaluate", int((corpus.num_tokens - 1).sum())) as progress:
        for group, batch in prefetch(batches):
            moved = batch.to(device)
            hidden = model(moved.input_ids, moved.cu_seqlens, batch.max_seqlen)
            log_prob = linear_log_prob(hidden, model.head_weight, moved.targets).cpu().numpy()
            chunks = np.repeat(np.arange(group.start, group.stop), batch.row_cu_seqlens.diff())
            np.subtract.at(losses, chunks, log_prob)  # in float64
            np.add.at(tokens, chunks, (batch.targets != IGNORE_INDEX).numpy())
            progress.update(len(chunks))
    return losses, tokens


def _figures(losses: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """The figures of chunks with these sums of −log p and these predicted positions."""
    total, count = float(losses.sum()), int(tokens.sum())
    loss = total / count if count and math.isfinite(total) else None
    perplexity = math.exp(loss) if loss is not None and loss < math.log(np.finfo(np.float64).max) else None
    return {
        "rows": len(losses),
        "non_finite_rows": int((~np.isfinite(losses)).sum()),
        "tokens": count,
        "loss": loss,
        "perplexity": perplexity,
    }


# ---- the table ----


def _print_table(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(f"{result['model']} on {result['source']}")))
    for column in ("domain", "chunks", "tokens", "loss (nats/token)", "perplexity"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, figures in result["domains"].items():
        table.add_row(Text(printable(name)), *_cells(figures))
    table.add_section()
    table.add_row("all", *_cells(result))
    Console().print(table)


def _cells(figures: dict) -> list[str]:
    loss, perplexity = figures["loss"], figures["perplexity"]
    if loss is not None:
        largest = np.finfo(np.float64).max
        last = [f"{loss:.4f}", f"> {largest:.0e}" if perplexity is None else f"{perplexity:,.2f}"]
    elif figures["tokens"]:
        last = [f"not finite in {figures['non_finite_rows']:,} chunks", "not finite"]
    else:
        last = ["no tokens", "no tokens"]
    return [f"{figures['rows']:,}", f"{figures['tokens']:,}", *last]
