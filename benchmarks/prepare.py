"""`miniplm prepare` against the bare fast tokenizer: the same text, the same ids, in one run.

    bare       tokenizers' own multi-threaded encode_batch_fast over texts that are in memory; the ids are not
               even fetched
    prepare    a .jsonl file → a complete corpus folder: worker processes are started, lines read, parsed and
               checked, chunks cut, files written and hashed

Text: the sources of Python's standard library. Each round runs both; speed is that of the fastest round, for
other work on the machine only slows one. CPU seconds, workers' included, show the work itself.

    python benchmarks/prepare.py [--megabytes 24] [--rounds 3] [--workers N] [--tokenizer FOLDER]
                                 [--json FILE]
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import sysconfig
import tempfile
import time
from pathlib import Path

from miniplm.config import PrepareConfig
from miniplm.data.corpus import Corpus
from miniplm.data.tokenizer import load_tokenizer
from miniplm.stages.prepare import prepare

BATCH = 1_000  # texts per call of the bare tokenizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=24, help="text to tokenize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--tokenizer", help="default: a byte-level BPE of 16,384 ids, trained on a tenth of the text"
    )
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    texts = library_text(options.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = options.tokenizer or train_tokenizer(texts[::10], folder / "tokenizer")
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (folder / "small.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n")
        run_prepare(folder, "small.jsonl", tokenizer, options.workers)  # the imports do not count
        rounds = [
            (run_bare(texts, tokenizer), run_prepare(folder, "text.jsonl", tokenizer, options.workers))
            for _ in range(options.rounds)
        ]
        tokens = Corpus(folder / "corpus").manifest["tokens"]
    size = sum(len(text.encode()) for text in texts)
    results = {}
    for name, runs in zip(("bare", "prepare"), zip(*rounds, strict=True), strict=True):
        seconds, cpu = (min(values) for values in zip(*runs, strict=True))
        results[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "tokens_per_second": tokens / seconds,
            "bytes_per_second": size / seconds,
        }
    report = {
        "benchmark": "prepare",
        "cores": len(os.sched_getaffinity(0)),
        "workers": options.workers,
        "documents": len(texts),
        "bytes": size,
        "tokens": tokens,
        **results,
        "rate_ratio": results["bare"]["seconds"] / results["prepare"]["seconds"],
        "cpu_ratio": results["bare"]["cpu_seconds"] / results["prepare"]["cpu_seconds"],
    }
    show(report)
    print(json.dumps(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def library_text(size: float) -> list[str]:
    """Source files of the standard library in a seeded random order, repeated or cut to about `size`
    bytes."""
    paths = [
        path
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        if "site-packages" not in path.parts
    ]
    random.Random(0).shuffle(paths)
    files = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    texts, total = [], 0
    while total < size:
        texts.append(files[len(texts) % len(files)])
        total += len(texts[-1])
    return texts


def train_tokenizer(texts, folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=16_384,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


def timed(call) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of those that it ended meanwhile."""

    def cpu():
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    start, cpu_start = time.perf_counter(), cpu()
    call()
    return time.perf_counter() - start, cpu() - cpu_start


def run_bare(texts, name: str) -> tuple[float, float]:
    tokenizer = load_tokenizer(name).backend_tokenizer

    def call():
        for start in range(0, len(texts), BATCH):
            tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)

    return timed(call)


def run_prepare(folder: Path, data: str, tokenizer: str, workers: int) -> tuple[float, float]:
    import shutil

    shutil.rmtree(folder / "corpus", ignore_errors=True)
    config = PrepareConfig(
        data=str(folder / data), tokenizer=tokenizer, output=str(folder / "corpus"), workers=workers
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return timed(lambda: prepare(config))


def show(report: dict):
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "",
        *("seconds", "CPU seconds", "tokens/s", "MB/s"),
        title=f"{report['tokens']:,} tokens, {report['workers']} workers",
    )
    for name in ("bare", "prepare"):
        values = report[name]
        table.add_row(
            name,
            f"{values['seconds']:.2f}",
            f"{values['cpu_seconds']:.2f}",
            f"{values['tokens_per_second']:,.0f}",
            f"{values['bytes_per_second'] / 1e6:.2f}",
        )
    table.add_row("ratio", f"{report['rate_ratio']:.2f}", f"{report['cpu_ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
