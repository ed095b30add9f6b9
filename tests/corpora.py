"""Corpora and score folders for the tests, complete as the stages leave them, without running one."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miniplm.data.corpus import file_hashes, write_dataset_files, write_shard
from miniplm.data.scores import SCORE_COLUMNS
from miniplm.data.tokenizer import content_fingerprint, load_tokenizer, tokenizer_fingerprint
from miniplm.data.verify import without_layout
from miniplm.runtime.artifacts import complete_output, open_output, read_manifest
from miniplm.runtime.files import fingerprint, read_json, write_json


def write_corpus(folder, chunks, tokenizer, domains=None, files=None, with_scores=False, **manifest) -> str:
    """A complete corpus of these chunks, as prepare leaves it.

    Args:
        chunks: lists of ids.
        tokenizer: the folder of the tokenizer that comes with it.
        domains: of each chunk; default "default".
        files: the chunks in each Arrow file; default one file.
        with_scores: the score columns too, each chunk's the number of its ids.
        manifest: what its manifest is to say instead of the truth.
    """
    domains = domains or ["default"] * len(chunks)
    loaded = load_tokenizer(str(tokenizer))
    eos, text = loaded.eos_token_id, Path(tokenizer, "tokenizer.json").read_text(encoding="utf-8")
    identity = {
        "made": fingerprint([chunks, domains]),
        "tokenizer": content_fingerprint(without_layout(text), eos),
    }
    open_output(folder, "prepare", identity)
    ends = np.cumsum(files or [len(chunks)]).tolist()
    assert ends[-1] == len(chunks)
    lengths = [len(ids) for ids in chunks]
    hashes = []
    for number, (start, end) in enumerate(pairwise([0, *ends])):
        columns = {
            "input_ids": pa.array(chunks[start:end], pa.list_(pa.int32())),
            "domain": pa.array(domains[start:end], pa.string()),
            "num_tokens": pa.array(lengths[start:end], pa.int32()),
        }
        if with_scores:
            columns |= {name: pa.array(lengths[start:end], pa.float32()) for name in SCORE_COLUMNS}
        hashes.append(write_shard(folder, number, columns))
    shutil.copytree(tokenizer, Path(folder) / "tokenizer")
    results = {
        "fingerprint": write_dataset_files(folder, hashes, with_scores),
        "rows": len(chunks),
        "tokens": sum(lengths),
        "predictions": sum(token != eos for ids in chunks for token in ids[:-1]),
        "domains": _per_domain(chunks, domains, eos),
        "bad_records": 0,
        "eos_token_id": eos,
        "vocab_size": len(loaded),
        "tokenizer_fingerprint": tokenizer_fingerprint(loaded),
        "max_length": 64,
        "source": "made.jsonl",
        "files": file_hashes(folder, hashes),
    }
    complete_output(folder, results | manifest)
    return str(folder)


def forget_checksums(folder, **changes) -> Path:
    """Make a folder one from before manifests held hashes of files and a checksum, and change what it
    says."""
    path = Path(folder) / "manifest.json"
    kept = {key: value for key, value in read_json(path).items() if key not in ("files", "checksum")}
    write_json(path, kept | changes)
    return Path(folder)


def _per_domain(chunks, domains, eos) -> dict[str, dict[str, int]]:
    counts = {name: {"documents": 0, "rows": 0, "tokens": 0} for name in dict.fromkeys(domains)}
    for ids, name in zip(chunks, domains, strict=True):
        counts[name]["documents"] += ids.count(eos)
        counts[name]["rows"] += 1
        counts[name]["tokens"] += len(ids)
    return counts


def chunks_of(corpus) -> list[list[int]]:
    """The chunks of a corpus as `datasets` sees them."""
    from datasets import load_from_disk

    return load_from_disk(str(corpus))["input_ids"][:]


def write_scores(folder, corpus, teacher=None, reference=None, order=None, file_rows=4, **identity) -> str:
    """A complete score folder of a corpus with these mean log-probabilities.

    Args:
        order: of the rows over files of `file_rows`.
        identity: what of the run's identity is to be otherwise.
    """
    columns = {}
    if teacher is not None:
        columns["teacher_log_prob"] = np.float32(teacher)
    if reference is not None:
        columns["reference_log_prob"] = np.float32(reference)
    if len(columns) == 2:
        with np.errstate(invalid="ignore"):
            columns["score"] = columns["teacher_log_prob"] - columns["reference_log_prob"]
    rows = len(next(iter(columns.values())))
    order = np.arange(rows) if order is None else np.asarray(order)
    scored = np.int32([sum(token != 0 for token in ids[:-1]) for ids in chunks_of(corpus)])
    claimed = {
        "corpus": read_manifest(corpus)["fingerprint"],
        "teacher": "t" if teacher is not None else None,
        "reference": "r" if reference is not None else None,
        "dtype": "float32",
        "document_mask": False,
        "vocab_size": None,
    }
    open_output(folder, "score", claimed | identity)
    for number, start in enumerate(range(0, len(order), file_rows)):
        part = order[start : start + file_rows]
        table = {"index": part, "num_tokens": scored[part]}
        table |= {name: values[part] for name, values in columns.items()}
        pq.write_table(pa.table(table), Path(folder) / f"scores-{number:05d}.parquet")
    complete_output(folder, {"teacher": "big", "reference": "small", "vocab_size": 999, "rows": rows})
    return str(folder)


def read_score_files(folder) -> dict[str, np.ndarray]:
    """The columns of all score files in the order of their names, NaN for null."""
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    return {
        name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names
    }
