"""Stage 3, select: Difference Sampling. Scores → refined corpus. The rule itself is in data/selection.py."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.overlap import print_overlap
from ..config import SelectConfig
from ..data.aggregation import NEEDED, document_means, summed, token_quantiles
from ..data.corpus import Corpus, file_hashes, write_dataset_files, write_shard
from ..data.derived import CARRIED, copy_tokenizer, what_is_lost
from ..data.repeats import without_repeats
from ..data.score_folders import read_score_manifest
from ..data.scores import ROLES, SCORE_COLUMNS, read_scores
from ..data.selection import choose, compared, why_nothing, written_order
from ..runtime.artifacts import (
    MANIFEST,
    complete_output,
    exclusive,
    open_output,
    reopen_output,
)
from ..runtime.errors import UserError
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed

SHARD_BYTES = 128 * 2**20  # of a file of the refined corpus; bounds the memory of the writing
QUANTILES_PERCENT = (1, 5, 25, 50, 75, 95, 99)  # of the summary
# Two folders may be combined when these agree: they decide which distribution was scored. Dtype, device,
# batch and shard sizes may differ (they change rounding only): a large teacher in bfloat16 on a GPU goes with
# a small reference in float32.
MUST_AGREE = ("vocab_size", "document_mask")

Sources = dict[str, tuple[str, dict[str, Any]]]  # role → (score folder, its manifest)


def select(config: SelectConfig) -> None:
    """Write the chunks of a scored corpus that the rule of `config` keeps as a new corpus, and print what was
    kept.

    The output is a corpus like the scored one with the columns teacher_log_prob, reference_log_prob and
    score. A killed run starts over and writes the same bytes.

    Raises:
        UserError: scores of another corpus, of one model only, incomplete, damaged or not combinable; a rule
            that keeps nothing; an output folder of another run.
    """
    corpus = Corpus(config.data)
    sources = _score_folders(config, corpus)
    rule = _rule(config)
    identity = {
        "corpus": corpus.fingerprint,
        "scores": {role: manifest["identity"] for role, (_, manifest) in sources.items()},
        "rule": rule,
    }
    output = Path(config.output)
    if (output / MANIFEST).exists() and open_output(output, "select", identity):
        lost = what_is_lost(output, corpus)
        if not lost:
            print(printable(f"The refined corpus {output} is complete, nothing to do."))
            return
        note(f"the refined corpus {output} was complete, but {lost}: it is written anew")

    columns = _read_sources(sources, corpus)
    codes, names = corpus.domains
    score, repeats = _compared(config, columns, corpus, {role: sources[role][0] for role in ROLES})
    keep = choose(config, score, corpus.num_tokens, codes, names)
    if not keep.any():
        raise UserError(f"nothing of corpus {config.data} is kept: {why_nothing(config, score)}")
    selection = _summary(rule, keep, score, corpus) | repeats
    order = np.flatnonzero(keep) if config.order == "corpus" else written_order(config, keep, score)
    columns = {name: values[order] for name, values in columns.items()}

    open_output(output, "select", identity)  # claimed only now: a rule that keeps nothing leaves no folder
    with exclusive(output), timed(output):
        reopen_output(output)  # a complete one gets here where a part of it is lost
        if config.order == "corpus":
            tables = corpus.filtered(keep, SHARD_BYTES)
        else:
            tables = _in_order(corpus, order)
        hashes = _write_tables(tables, columns, output)
        copy_tokenizer(corpus, output)
        content = write_dataset_files(output, hashes, with_scores=True)
        predictions = int(columns["num_tokens"].sum(dtype=np.int64))
        results = _results(corpus, content, predictions, selection, sources)
        complete_output(output, results | {"files": file_hashes(output, hashes)})
    _print_summary(selection, output)
    if config.compare:
        print_overlap(Corpus(output), Corpus(config.compare))


def _rule(config: SelectConfig) -> dict[str, Any]:
    """The settings that make the rule, as manifests hold them."""
    names = ("ratio", "token_budget", "threshold", "random_seed", "temperature", "min_tokens", "max_repeats")
    rule = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.per_domain:
        rule["per_domain"] = True
    if config.document_scores:
        rule["document_scores"] = True
    if config.aggregate != "mean":
        rule["aggregate"] = config.aggregate
    if config.aggregate == "quantile":
        rule["quantile"] = config.quantile
    if config.domain_shares:
        rule["domain_shares"] = dict(sorted(config.shares.items()))
    if config.score != "difference":
        rule["score"] = config.score
    if config.order != "corpus":
        rule["order"] = config.order
    if config.temperature or config.order == "random":
        rule["seed"] = config.seed
    return rule


def _compared(
    config: SelectConfig, columns: dict[str, np.ndarray], corpus: Corpus, folders: dict[str, str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """What the chunks are compared by, float32 [chunks], and the figures of near-duplicates, if they were
    looked for."""
    if config.aggregate == "sum":
        columns = summed(columns, SCORE_COLUMNS)
    elif config.aggregate == "quantile":
        columns = token_quantiles(columns, corpus, folders, NEEDED[config.score], config.quantile)
    score = compared(config, columns, corpus.num_tokens, corpus.domains[0])
    if config.document_scores:
        score = document_means(corpus, score)
    if config.max_repeats is None:
        return score, {}
    score, repeats = without_repeats(corpus, score, config.max_repeats)
    return score, {"repeats": repeats}


def _results(
    corpus: Corpus, fingerprint: str, predictions: int, selection: dict[str, Any], sources: Sources
) -> dict[str, Any]:
    """What the manifest of the refined corpus says beside its identity."""
    return {
        "fingerprint": fingerprint,
        "rows": selection["kept"],
        "tokens": selection["kept_tokens"],
        "predictions": predictions,
        "domains": {
            name: {"rows": part["kept"], "tokens": part["kept_tokens"]}
            for name, part in selection["domains"].items()
            if part["kept"]
        },
        **{key: corpus.manifest[key] for key in CARRIED},
        "parent": corpus.fingerprint,
        "selection": selection,
        "scores": _score_summaries(sources),
    }


# ---- score folders ----


def _score_folders(config: SelectConfig, corpus: Corpus) -> Sources:
    """Where the scores of each role are; one folder may hold both. UserError unless they fit corpus, rule and
    each other."""
    sources: Sources = {}
    for folder in config.scores:
        manifest = read_score_manifest(folder, corpus)
        if manifest["identity"].get("sample") is not None:
            raise UserError(
                f"score folder {folder} holds the scores of a sample: fit a proxy to it with miniplm proxy "
                f"fit, and give the scores that miniplm proxy score predicts with that"
            )
        if manifest["identity"].get("proxy") is not None and config.score != "difference":
            raise UserError(
                f"score folder {folder} holds predicted scores, which are differences: leave out score "
                f"{config.score}, or score the corpus itself"
            )
        for role in ROLES:
            if manifest["identity"][role] is not None:
                if role in sources:
                    raise UserError(
                        f"score folders {sources[role][0]} and {folder} both hold scores of a {role}: give "
                        f"one of each, or one of both"
                    )
                sources[role] = folder, manifest
    for role in ROLES:
        if role not in sources:
            raise UserError(
                f"{' and '.join(config.scores)}: no scores of a {role}: score the corpus with --{role} and "
                f"give that folder too"
            )
    (teacher, first), (reference, second) = (sources[role] for role in ROLES)
    for key in MUST_AGREE:
        if (one := _fact(first, key)) != (other := _fact(second, key)):
            raise UserError(
                f"score folders {teacher} and {reference} do not go together ({key} is {one} and {other}): "
                f"score again with equal {key}"
            )
    return {role: sources[role] for role in ROLES}


def _score_summaries(sources: Sources) -> list[dict[str, Any]]:
    """What each score manifest says about the models, for the manifest of the refined corpus and the cards
    that follow from it."""
    manifests = {str(folder): manifest for folder, manifest in sources.values()}.values()
    return [
        {role: manifest[role] for role in ROLES if manifest["identity"][role] is not None}
        | {key: _fact(manifest, key) for key in ("dtype", *MUST_AGREE)}
        | ({"predicted": manifest["predicted"]} if "predicted" in manifest else {})
        for manifest in manifests
    ]


def _fact(manifest: dict[str, Any], key: str) -> Any:
    """What came of a setting (vocab_size: the ids that the softmax covered), else the setting itself."""
    return manifest.get(key, manifest["identity"].get(key))


def _read_sources(sources: Sources, corpus: Corpus) -> dict[str, np.ndarray]:
    """num_tokens (int32 [chunks]) and the score columns (float32 [chunks]) from one folder with both models
    or from two."""
    (teacher, first), (reference, second) = sources.values()
    if teacher == reference:
        return _read_folder(teacher, first, corpus, SCORE_COLUMNS)
    columns = _read_folder(teacher, first, corpus, SCORE_COLUMNS[:1])
    other = _read_folder(reference, second, corpus, SCORE_COLUMNS[1:2])
    columns["reference_log_prob"] = other["reference_log_prob"]
    with np.errstate(invalid="ignore"):  # inf − inf
        columns["score"] = columns["teacher_log_prob"] - columns["reference_log_prob"]
    return columns


def _read_folder(
    folder: str, manifest: dict[str, Any], corpus: Corpus, names: Sequence[str]
) -> dict[str, np.ndarray]:
    columns = read_scores(folder, len(corpus), names, manifest.get("files"))
    wrong = (columns["num_tokens"] < 0) | (columns["num_tokens"] >= corpus.num_tokens)
    if wrong.any():
        raise UserError(
            f"score folder {folder} says of chunk {int(np.argmax(wrong)):,} that more positions were scored "
            f"than it has: score the corpus again into a new folder"
        )
    return columns


# ---- the refined corpus ----


def _in_order(corpus: Corpus, order: np.ndarray) -> Iterator[Any]:
    """The chunks `order`, in that order, as Arrow tables of the size of a file."""
    files = np.cumsum(corpus.num_tokens[order] * np.dtype(np.int32).itemsize) // SHARD_BYTES
    ends = np.flatnonzero(np.diff(files, append=-1)) + 1
    for start, end in pairwise([0, *ends.tolist()]):
        yield corpus.taken(order[start:end])


def _write_tables(tables: Iterable[Any], columns: dict[str, np.ndarray], output: Path) -> list[str]:
    """Write a file of each table of kept chunks, with their score columns (of the kept chunks in that order),
    and return the hashes of the files."""
    hashes: list[str] = []
    written = 0
    with Progress("select", len(columns["score"]), unit="chunks") as progress:
        for number, table in enumerate(tables):
            arrays = dict(zip(table.column_names, table.columns, strict=True))
            arrays |= _score_arrays(columns, slice(written, written + table.num_rows))
            hashes.append(write_shard(output, number, arrays))
            written += table.num_rows
            progress.update(table.num_rows)
    return hashes


def _score_arrays(columns: dict[str, np.ndarray], rows: slice) -> dict[str, Any]:
    """The score columns of some of the kept chunks, null where they are not finite."""
    import pyarrow as pa

    parts = {name: columns[name][rows] for name in SCORE_COLUMNS}
    return {name: pa.array(values, mask=~np.isfinite(values)) for name, values in parts.items()}


def _summary(rule: dict[str, Any], keep: np.ndarray, score: np.ndarray, corpus: Corpus) -> dict[str, Any]:
    """The figures of the selection for manifest and table: chunks and tokens, kept and dropped, in all and
    per domain; the scores."""
    domain, names = corpus.domains

    def count(mask: np.ndarray, weights: np.ndarray | None = None) -> list[int]:
        counts = np.bincount(domain[mask], None if weights is None else weights[mask], minlength=len(names))
        return counts.astype(np.int64).tolist()

    figures = {
        "kept": count(keep),
        "dropped": count(~keep),
        "kept_tokens": count(keep, corpus.num_tokens),
        "dropped_tokens": count(~keep, corpus.num_tokens),
    }
    finite = score[np.isfinite(score)]
    quantiles = np.percentile(finite, QUANTILES_PERCENT).tolist()
    return {
        "rule": rule,
        **{key: sum(values) for key, values in figures.items()},
        "non_finite": len(score) - len(finite),
        "below_zero": float((finite < 0).mean()),  # the share of the finite scores
        "quantiles": {
            f"{percent}%": round(value, 6)
            for percent, value in zip(QUANTILES_PERCENT, quantiles, strict=True)
        },
        "domains": {
            name: {key: values[number] for key, values in figures.items()}
            for number, name in enumerate(names)
        },
    }


def _print_summary(selection: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("domain", title="Selection", show_footer=True)
    table.columns[0].footer = "all"
    for key in ("kept", "dropped", "kept_tokens", "dropped_tokens"):
        heading = key.replace("_", " ") if "tokens" in key else f"{key} chunks"
        table.add_column(heading, footer=f"{selection[key]:,}", justify="right")
    for name, part in selection["domains"].items():
        # Text: a domain's name may look like markup.
        table.add_row(Text(printable(name)), *(f"{value:,}" for value in part.values()))
    nats = "nats" if selection["rule"].get("aggregate") == "sum" else "nats per token"
    quantiles = Table(*selection["quantiles"], title=f"Score quantiles ({nats})")
    quantiles.add_row(*(f"{value:.4f}" for value in selection["quantiles"].values()))
    Console().print(table, quantiles)
    print(
        f"below 0: {selection['below_zero']:.1%} of the finite scores; not finite: "
        f"{selection['non_finite']:,}\nrefined corpus: {printable(output)}"
    )
    if repeats := selection.get("repeats"):
        print(
            f"near-duplicates: {repeats['chunks']:,} chunks in {repeats['groups']:,} groups; left out "
            f"before the cut: {repeats['dropped']:,}"
        )
