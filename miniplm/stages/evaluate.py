"""Stage 5, evaluate: the loss of a model on a held-out corpus, per domain.

The loss is the mean of −log p over the predicted positions (those whose input is not EOS), in nats per token,
and the perplexity its exponential. Domains and the whole are weighted by tokens, not by rows.
"""

import math
from pathlib import Path

import numpy as np
import torch

from ..config import BATCH_TOKENS, EvaluateConfig
from ..data.batches import IGNORE_INDEX, pack, prefetch, split_by_tokens
from ..data.corpus import Corpus
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..kernels import linear_log_prob
from ..models.loading import load_model, model_hash
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.files import read_json, write_json
from ..runtime.progress import Progress
from ..training.checkpoints import latest_checkpoint


def evaluate(config: EvaluateConfig) -> dict:
    """Print the table of losses, write it to `config.output` if given, and return what is written.

    An output file of an equal evaluation (weights, corpus, document_mask, dtype) is taken as it is.

    Returns:
        {"model": name (of a path its last part), "weights": hash, "corpus": fingerprint, "source": the
        corpus's, "document_mask", "dtype", figures of the whole, "domains": {name: figures}}. Figures are
        "rows", "non_finite_rows" (with a loss that is not finite), "tokens" (predicted positions), "loss"
        (nats per token) and "perplexity". A loss that is not finite or of no token is None; so is a
        perplexity past the largest float.
    Raises:
        UserError: the corpus, the model or the output file cannot be used, or model and corpus have different
            tokens.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    corpus, folder = Corpus(config.data), latest_checkpoint(config.model)
    if not corpus.manifest["predictions"]:
        raise UserError(f"corpus {config.data} holds no token to predict: evaluate on another one")
    identity = {
        "model": Path(config.model).resolve().name if Path(config.model).exists() else config.model,
        "weights": model_hash(folder),
        "corpus": corpus.fingerprint,
        "source": corpus.manifest["source"],
        "document_mask": config.document_mask,
        "dtype": str(dtype).removeprefix("torch."),
    }
    result = _read_equal(config.output, identity)
    if result is None:
        check_same_tokens(
            load_tokenizer(corpus.tokenizer), load_tokenizer(folder, config.trust_remote_code), config.model
        )
        model = load_model(folder, dtype, device, config.trust_remote_code)
        if len(model.head_weight) <= corpus.highest_id:
            raise UserError(
                f"model {config.model} knows {len(model.head_weight)} ids, corpus {config.data} has ids up "
                f"to {corpus.highest_id}: "
                "evaluate a model that was made for its tokenizer"
            )
        batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
        losses, tokens = _row_losses(model, corpus, config.document_mask, batch_tokens, device)
        codes, names = corpus.domains
        domains = {
            name: _figures(losses[codes == code], tokens[codes == code]) for code, name in enumerate(names)
        }
        result = {**identity, **_figures(losses, tokens), "domains": dict(sorted(domains.items()))}
        if config.output:
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(config.output, result)
    _print_table(result)
    return result


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
            f"output {output} holds something else than this evaluation: choose another --output or delete it"
        )
    print(f"{output} is complete, nothing to do")
    return found


@torch.inference_mode()
def _row_losses(
    model, corpus: Corpus, document_mask: bool, batch_tokens: int, device
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of −log p float64 [rows], predicted positions int64 [rows]) of every row of the corpus."""
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
            rows = np.repeat(np.arange(group.start, group.stop), batch.row_cu_seqlens.diff())
            np.subtract.at(losses, rows, log_prob)  # in float64
            np.add.at(tokens, rows, (batch.targets != IGNORE_INDEX).numpy())
            progress.update(len(rows))
    return losses, tokens


def _figures(losses: np.ndarray, tokens: np.ndarray) -> dict:
    """The figures of rows with these sums of −log p and these predicted positions."""
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


def _print_table(result: dict):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{_plain(result['model'])} on {_plain(result['source'])}"))
    for column in ("domain", "rows", "tokens", "loss (nats/token)", "perplexity"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, figures in result["domains"].items():
        table.add_row(Text(_plain(name)), *_cells(figures))
    table.add_section()
    table.add_row("all", *_cells(result))
    Console().print(table)


def _cells(figures: dict) -> list[str]:
    loss, perplexity = figures["loss"], figures["perplexity"]
    if loss is not None:
        last = [
            f"{loss:.4f}",
            f"> {np.finfo(np.float64).max:.0e}" if perplexity is None else f"{perplexity:,.2f}",
        ]
    elif figures["tokens"]:
        last = [f"not finite in {figures['non_finite_rows']:,} rows", "not finite"]
    else:
        last = ["no tokens", "no tokens"]
    return [f"{figures['rows']:,}", f"{figures['tokens']:,}", *last]


def _plain(text: str) -> str:
    """The text with control characters written out instead of sent to the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
