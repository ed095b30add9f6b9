"""Stage 3, select: Difference Sampling. Scores → refined corpus.

Kept are the chunks x with the largest r(x) = mean log p_teacher(x) − mean log p_reference(x), in nats per
token (Gu et al., arXiv 2410.17215; the mean over the tokens, not the sum, is what the authors run). Ties go
to the lower row, a score that is not finite is never kept, and the kept chunks stay in corpus order.
"""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..config import SelectConfig
from ..data.corpus import SCORE_COLUMNS, Corpus, write_dataset_files, write_shard
from ..runtime.artifacts import MANIFEST, complete_output, open_output, read_manifest
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, read_json
from ..runtime.progress import Progress

SHARD_BYTES = 128 * 2**20  # of a file of the refined corpus; bounds the memory of the writing
QUANTILES = (1, 5, 25, 50, 75, 95, 99)  # of the summary, in percent
ROLES = ("teacher", "reference")
# Two folders may be combined when these agree: they decide which distribution was scored. Dtype, device,
# batch and shard sizes may differ (they change rounding only): a large teacher in bfloat16 on a GPU goes with
# a small reference in float32.
MUST_AGREE = ("vocab_size", "document_mask")


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
    sources = _score_folders(config.scores, corpus)
    rule = {
        name: value
        for name in ("ratio", "token_budget", "threshold", "random_seed")
        if (value := getattr(config, name)) is not None
    }
    rule |= {"per_domain": True} if config.per_domain else {}
    identity = {
        "corpus": corpus.fingerprint,
        "scores": {role: manifest["identity"] for role, (_, manifest) in sources.items()},
        "rule": rule,
    }
    output = Path(config.output)
    if (output / MANIFEST).exists() and open_output(output, "select", identity):
        print(f"The refined corpus {output} is complete, nothing to do.")
        return

    columns = _read_sources(sources, len(corpus))
    domain, names = corpus.domains
    keep = choose(config, columns["score"], corpus.num_tokens, domain)
    if not keep.any():
        raise UserError(f"nothing of corpus {config.data} is kept: {_why_nothing(config, columns['score'])}")
    selection = _summary(rule, keep, columns["score"], corpus.num_tokens, domain, names)
    columns = {name: values[keep] for name, values in columns.items()}

    open_output(
        output, "select", identity
    )  # claimed only now: a rule that keeps nothing leaves no folder behind
    hashes = _write_rows(corpus, keep, columns, output)
    if not (output / "tokenizer").exists():
        with atomic_folder(output / "tokenizer") as folder:
            shutil.copytree(corpus.tokenizer, folder, dirs_exist_ok=True)
    carried = ("bad_records", "eos_token_id", "vocab_size", "tokenizer_fingerprint", "max_length", "source")
    complete_output(
        output,
        {
            "fingerprint": write_dataset_files(output, hashes, with_scores=True),
            "rows": selection["kept"],
            "tokens": selection["kept_tokens"],
            "predictions": int(columns["num_tokens"].sum(dtype=np.int64)),
            "domains": {
                name: {"rows": part["kept"], "tokens": part["kept_tokens"]}
                for name, part in selection["domains"].items()
                if part["kept"]
            },
            **{key: corpus.manifest[key] for key in carried},
            "parent": corpus.fingerprint,
            "selection": selection,
            "scores": _score_summaries(sources),
        },
    )
    _print_summary(selection, output)


def choose(config: SelectConfig, score, num_tokens, domain) -> np.ndarray:
    """The rule: which rows to keep, bool [rows].

    Args:
        score: float32 [rows], nats per token; rows that are not finite are never kept.
        num_tokens: int [rows], the lengths that count against a token budget.
        domain: int [rows], the number of the domain, 0, 1, …

    The ratio counts all rows, those without a finite score too: int(ratio * rows). A token budget keeps the
    longest run of the best rows that fits. A domain's share of the budget is its share of the tokens, rounded
    down.
    """
    finite = np.isfinite(score)
    if config.threshold is not None:
        return finite & (score >= config.threshold)
    if config.random_seed is not None:
        ranked = np.random.default_rng(config.random_seed).permutation(np.flatnonzero(finite))
    else:
        ranked = best_first(score)
    if config.per_domain:
        ranked = ranked[
            np.argsort(domain[ranked], kind="stable")
        ]  # the domains one after the other, each in rank order
    else:
        domain = np.zeros(len(score), np.int8)
    rows = np.bincount(domain)
    if config.token_budget is not None:
        tokens = np.bincount(domain, weights=num_tokens).astype(int).tolist()
        total = sum(tokens)
    keep = np.zeros(len(score), bool)
    for number, (start, stop) in enumerate(
        pairwise(np.searchsorted(domain[ranked], np.arange(len(rows) + 1)))
    ):
        group = ranked[start:stop]
        if config.token_budget is not None:
            budget = config.token_budget * tokens[number] // total
            count = np.searchsorted(np.cumsum(num_tokens[group]), budget, side="right")
        else:
            count = int(config.ratio * rows[number])
        keep[group[:count]] = True
    return keep


def best_first(score) -> np.ndarray:
    """The rows with a finite score (float32 [rows]) in descending order of it, ties in ascending order of the
    row: uint32.

    Score and row share one int64 key, so that a plain sort in place does it: a third of the time and memory
    of a stable argsort.
    """
    rows = np.flatnonzero(np.isfinite(score)).astype(np.uint32)
    bits = (np.float32(0) - score[rows]).view(
        np.int32
    )  # a difference is never −0, which has other bits than 0
    bits ^= (
        bits >> 31
    ) & 0x7FFFFFFF  # IEEE floats sort as integers once the negative ones have their other bits flipped
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= rows
    keys.sort()
    rows[:] = keys  # their low halves
    return rows


def _why_nothing(config: SelectConfig, score) -> str:
    if not np.isfinite(score).any():
        return "no chunk has a finite score; check the models that scored it"
    if config.threshold is not None:
        return (
            f"the highest score is {score[np.isfinite(score)].max():.4f}, below the threshold "
            f"{config.threshold}; lower the threshold"
        )
    where = " in any domain" if config.per_domain else ""
    if config.token_budget is not None:
        return (
            f"the best chunk alone{where} has more tokens than token_budget {config.token_budget} "
            f"allows; raise it"
        )
    return (
        f"ratio {config.ratio} of {len(score)} chunks is less than one chunk with a finite score{where}; "
        f"raise it"
    )


def _score_folders(folders, corpus: Corpus) -> dict:
    """{"teacher": (folder, manifest), "reference": …}; one folder may be both. UserError unless they fit
    corpus and each other."""
    sources = {}
    for folder in folders:
        manifest = read_manifest(folder, "score", what="score folder")
        if manifest["identity"]["corpus"] != corpus.fingerprint:
            raise UserError(
                f"score folder {folder} holds the scores of another corpus than {corpus.folder}: score this "
                f"one, or give the other"
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
                f"{' and '.join(map(str, folders))}: no scores of a {role}: score the corpus with --{role} "
                f"and give that folder too"
            )
    (teacher, first), (reference, second) = (sources[role] for role in ROLES)
    for key in MUST_AGREE:
        if (one := _fact(first, key)) != (other := _fact(second, key)):
            raise UserError(
                f"score folders {teacher} and {reference} do not go together ({key} is {one} and {other}): "
                f"score again with equal {key}"
            )
    return {role: sources[role] for role in ROLES}


def _score_summaries(sources: dict) -> list[dict]:
    """What each score manifest says about the models, for the manifest of the refined corpus and the cards
    that follow from it."""
    manifests = {str(folder): manifest for folder, manifest in sources.values()}.values()
    return [
        {role: manifest[role] for role in ROLES if manifest["identity"][role] is not None}
        | {key: _fact(manifest, key) for key in ("dtype", *MUST_AGREE)}
        for manifest in manifests
    ]


def _fact(manifest: dict, key: str):
    """What came of a setting (vocab_size: the ids that the softmax covered), else the setting itself."""
    return manifest.get(key, manifest["identity"].get(key))


def _read_sources(sources: dict, rows: int) -> dict[str, np.ndarray]:
    """num_tokens (int32 [rows]) and the score columns (float32 [rows]) from one folder with both models or
    from two."""
    (teacher, _), (reference, _) = sources.values()
    if teacher == reference:
        return read_scores(teacher, rows, SCORE_COLUMNS)
    columns = read_scores(teacher, rows, SCORE_COLUMNS[:1])
    columns["reference_log_prob"] = read_scores(reference, rows, SCORE_COLUMNS[1:2])["reference_log_prob"]
    with np.errstate(invalid="ignore"):  # inf − inf
        columns["score"] = columns["teacher_log_prob"] - columns["reference_log_prob"]
    return columns


def read_scores(folder, rows: int, names) -> dict[str, np.ndarray]:
    """The score columns `names` (float32 [rows], NaN where null) and num_tokens (int32 [rows]) of a score
    folder, by corpus row.

    The files may hold the rows in any order. UserError unless every row of the corpus is there exactly once.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema(
        {"index": pa.int64(), "num_tokens": pa.int32(), **{name: pa.float32() for name in names}}
    )
    result = {
        "num_tokens": np.zeros(rows, np.int32),
        **{name: np.full(rows, np.nan, np.float32) for name in names},
    }
    seen, entries = np.zeros(rows, bool), 0
    for path in sorted(Path(folder).glob("scores-*.parquet")):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read(schema.names).select(schema.names).cast(schema)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({str(error).splitlines()[0]}): run score again, it writes damaged "
                f"files anew"
            ) from error
        index = pc.fill_null(table["index"], -1).to_numpy()
        if len(index) and (index.min() < 0 or index.max() >= rows):
            raise UserError(
                f"{path} holds scores of rows that the corpus of {rows} rows does not have: score the "
                f"corpus again into a new folder"
            )
        seen[index] = True
        entries += len(index)
        for name, values in result.items():
            values[index] = (
                pc.fill_null(table[name], 0).to_numpy() if name == "num_tokens" else table[name].to_numpy()
            )
    if entries != rows or not seen.all():
        raise UserError(
            f"score folder {folder} has {entries} entries for the {rows} rows of the corpus and none for "
            f"{rows - seen.sum()} of them: "
            "run score again, it writes missing files anew"
        )
    return result


def _write_rows(corpus: Corpus, keep, columns: dict, output) -> list[str]:
    """Write the kept rows of the corpus with their score columns (of the kept rows) and return the hashes of
    the files."""
    hashes, written = [], 0
    with Progress("select", len(columns["score"]), unit="rows") as progress:
        for number, table in enumerate(_kept_tables(corpus, keep)):
            rows = slice(written, written + table.num_rows)
            scores = {name: _nullable(columns[name][rows]) for name in SCORE_COLUMNS}
            hashes.append(
                write_shard(
                    output, number, dict(zip(table.column_names, table.columns, strict=True)) | scores
                )
            )
            written += table.num_rows
            progress.update(table.num_rows)
    return hashes


def _kept_tables(corpus: Corpus, keep):
    """The kept rows in corpus order, as tables of about SHARD_BYTES.

    The files are read, not mapped: mapped pages would count as memory of this process until the system takes
    them back.
    """
    import pyarrow as pa

    names = ["input_ids", "domain", "num_tokens"]
    pieces, size, start = [], 0, 0
    for file in read_json(corpus.folder / "state.json")["_data_files"]:
        with pa.OSFile(str(corpus.folder / file["filename"])) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                mask = keep[start : start + batch.num_rows]
                start += batch.num_rows
                if not mask.any():
                    continue
                pieces.append(batch.select(names).filter(pa.array(mask)))
                size += pieces[-1].nbytes
                if size >= SHARD_BYTES:
                    yield pa.Table.from_batches(pieces).combine_chunks()
                    pieces, size = [], 0
    if pieces:
        yield pa.Table.from_batches(pieces).combine_chunks()


def _nullable(values):
    import pyarrow as pa

    return pa.array(values, mask=~np.isfinite(values))


def _summary(rule: dict, keep, score, num_tokens, domain, names) -> dict:
    """The figures of the selection for manifest and table: rows and tokens, kept and dropped, in all and per
    domain; the scores."""

    def count(mask, weights=None):
        return (
            np.bincount(domain[mask], None if weights is None else weights[mask], minlength=len(names))
            .astype(np.int64)
            .tolist()
        )

    figures = {
        "kept": count(keep),
        "dropped": count(~keep),
        "kept_tokens": count(keep, num_tokens),
        "dropped_tokens": count(~keep, num_tokens),
    }
    finite = score[np.isfinite(score)]
    return {
        "rule": rule,
        **{key: sum(values) for key, values in figures.items()},
        "non_finite": len(score) - len(finite),
        "below_zero": float((finite < 0).mean()),  # the share of the finite scores
        "quantiles": {
            f"{percent}%": round(float(value), 6)
            for percent, value in zip(QUANTILES, np.percentile(finite, QUANTILES), strict=True)
        },
        "domains": {
            name: {key: values[number] for key, values in figures.items()}
            for number, name in enumerate(names)
        },
    }


def _print_summary(selection: dict, output):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("domain", title="Selection", show_footer=True)
    table.columns[0].footer = "all"
    for key in ("kept", "dropped", "kept_tokens", "dropped_tokens"):
        heading = key.replace("_", " ") if "tokens" in key else f"{key} chunks"
        table.add_column(heading, footer=f"{selection[key]:,}", justify="right")
    for name, part in selection["domains"].items():
        table.add_row(
            Text(name), *(f"{value:,}" for value in part.values())
        )  # Text: a domain's name may look like markup
    quantiles = Table(*selection["quantiles"], title="Score quantiles (nats per token)")
    quantiles.add_row(*(f"{value:.4f}" for value in selection["quantiles"].values()))
    Console().print(table, quantiles)
    print(
        f"below 0: {selection['below_zero']:.1%} of the finite scores; not finite: "
        f"{selection['non_finite']:,}\nrefined corpus: {output}"
    )
