"""Scoring on the CPU: `miniplm score`'s core against the loop that people write, same models and same chunks,
in one run.

    padded    transformers, right-padded batches, model(...).logits, fp32 cross-entropy, masked mean per
              chunk, one model after the other (how the published authors score); padded to the longest chunk
              of a batch
    miniplm   packed batches, both bodies on the same batch, both heads in difference_score; no [tokens,
              vocabulary] tensor
    bfloat16  the same, as --dtype bfloat16 has it, where the CPU has instructions for it: how much faster,
              and how well do the ranks agree?

Each runs in a process of its own: load, one small batch, then passes over all chunks. Memory is the highest
resident size during the passes beyond that before, sampled every 2 ms. Speed is that of the fastest pass:
other work on the machine only slows a pass. The scores of the first two must agree.
Chunk lengths are as prepare makes them: full, less the way back to the last sentence end (here geometric,
mean 20 tokens).

    python benchmarks/score.py [--teacher 384,1024,4,6] [--reference 192,512,2,3] [--vocab-size 32768]
                               [--rows 32] [--json FILE]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from miniplm.data.selection import rank_agreement
from miniplm.runtime.devices import cpu_multiplies_bf16

EOS = 0
PAGE = resource.getpagesize()
CONTENDERS = ("padded", "miniplm", "bfloat16")


def main():
    options = parse()
    if options.contender:
        return contend(options)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(options, Path(folder))
        names = CONTENDERS if cpu_multiplies_bf16() else CONTENDERS[:2]
        results = {name: run(name, folder) for name in names}
        scores = [np.load(Path(folder) / f"{name}.npy") for name in names]
    padded, ours = results["padded"], results["miniplm"]
    report = {
        "benchmark": "score",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key not in ("contender", "folder", "json")},
        **results,
        "speedup": ours["tokens_per_second"] / padded["tokens_per_second"],
        "memory_ratio": ours["extra_bytes"] / padded["extra_bytes"],
        "largest_difference": float(np.abs(scores[0] - scores[1]).max()),
    }
    if len(names) > 2:
        report["bfloat16_agreement"] = rank_agreement(*scores[1:])
    show(report)
    print(json.dumps(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if report["largest_difference"] > 1e-4:
        sys.exit("the scores differ by more than 1e-4")


def parse():
    def shape(text):
        values = [int(value) for value in text.split(",")]
        if len(values) != 4:
            raise argparse.ArgumentTypeError("give width,feed-forward width,layers,heads")
        return values

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", type=shape, default=[384, 1024, 4, 6], help="width,feed-forward width,layers,heads"
    )
    parser.add_argument("--reference", type=shape, default=[192, 512, 2, 3], help="likewise")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rows", type=int, default=32, help="chunks")
    parser.add_argument("--max-length", type=int, default=512, help="predictions per chunk")
    parser.add_argument("--batch-rows", type=int, default=8, help="chunks per batch of padded")
    parser.add_argument("--batch-tokens", type=int, default=2_048, help="positions per batch of miniplm")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(options, folder: Path):
    """Two random models as transformers saves them, the chunks, and the options for the contenders."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    for role in ("teacher", "reference"):
        width, feed_forward, layers, heads = getattr(options, role)
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=options.vocab_size,
                hidden_size=width,
                intermediate_size=feed_forward,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=options.max_length,
                tie_word_embeddings=True,
                bos_token_id=EOS,
                eos_token_id=EOS,
            )
        ).save_pretrained(folder / role)
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, options.max_length + 2 - rng.geometric(1 / 20, options.rows))
    ids = rng.integers(EOS + 1, options.vocab_size, lengths.sum())
    ids[rng.random(len(ids)) < 1 / 300] = EOS  # documents of 300 tokens
    np.savez(folder / "chunks.npz", ids=ids, lengths=lengths)
    (folder / "options.json").write_text(json.dumps(vars(options)))


def run(name: str, folder: str) -> dict:
    command = [sys.executable, __file__, "--contender", name, "--folder", folder]
    return json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    )


def contend(options):
    """One contender: score all chunks `repeats` times, print the figures, save the scores."""
    folder = Path(options.folder)
    settings = argparse.Namespace(**json.loads((folder / "options.json").read_text()))
    stored = np.load(folder / "chunks.npz")
    chunks = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
    start = {"padded": padded, "miniplm": packed, "bfloat16": in_bfloat16}[options.contender]
    with torch.inference_mode():
        score = start(folder, settings)
        score([chunk[:9] for chunk in chunks[:2]])  # loads the code that the passes run
        seconds = []
        with Peak() as peak:
            for _ in range(settings.repeats):
                began = time.perf_counter()
                scores = score(chunks)
                seconds.append(time.perf_counter() - began)
    np.save(folder / f"{options.contender}.npy", scores)
    positions = int((stored["lengths"] - 1).sum())
    print(
        json.dumps(
            {"tokens_per_second": positions / min(seconds), "seconds": seconds, "extra_bytes": peak.extra}
        )
    )


def padded(folder: Path, settings):
    """The loop in the style of the published code."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval()
        for role in ("teacher", "reference")
    ]
    touch(models)

    def score(chunks):
        scores = []
        for start in range(0, len(chunks), settings.batch_rows):
            rows = [torch.from_numpy(chunk) for chunk in chunks[start : start + settings.batch_rows]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOS)
            attention = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            )
            inputs, labels = ids[:, :-1], ids[:, 1:]
            counted = (inputs != EOS) & attention[:, 1:].bool()
            means = []
            for model in models:
                logits = model(input_ids=inputs, attention_mask=attention[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), labels.flatten(), reduction="none"
                ).view_as(labels)
                means.append(-(loss * counted).sum(1) / counted.sum(1))
            scores.append(means[0] - means[1])
        return torch.cat(scores).numpy()

    return score


def in_bfloat16(folder: Path, settings):
    return packed(folder, settings, torch.bfloat16)


def packed(folder: Path, settings, dtype=torch.float32):
    """What `miniplm score` does between reading the corpus and writing the files."""
    from miniplm.analysis.scoring import score_batch
    from miniplm.data.batches import pack, prefetch, split_by_tokens
    from miniplm.models.loading import load_model

    models = {role: load_model(folder / role, dtype) for role in ("teacher", "reference")}
    touch(models.values())

    def score(chunks):
        groups = split_by_tokens([len(chunk) for chunk in chunks], settings.batch_tokens)
        batches = prefetch(pack(chunks[group], EOS) for group in groups)
        return torch.cat(
            [score_batch(models, batch, settings.vocab_size)["score"] for batch in batches]
        ).numpy()

    return score


def touch(models):
    """Read every weight: a file that is only mapped would otherwise count as memory of the first pass."""
    for model in models:
        for weight in model.parameters():
            weight.sum()


class Peak:
    """The highest resident size of this process within the block, beyond that at its start; bytes in
    `extra`."""

    def __enter__(self):
        self.before, self.highest, self.stop = resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stop.wait(0.002):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.extra = max(0, self.highest - self.before)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def show(report: dict):
    from rich.console import Console
    from rich.table import Table

    table = Table("contender", title=f"Scoring on the CPU, {report['threads']} threads")
    for heading in ("tokens/s", "ratio", "extra memory, MB", "ratio"):
        table.add_column(heading, justify="right")
    first = report[CONTENDERS[0]]
    for name in [name for name in CONTENDERS if name in report]:
        speed, memory = report[name]["tokens_per_second"], report[name]["extra_bytes"]
        ratios = speed / first["tokens_per_second"], memory / first["extra_bytes"]
        table.add_row(name, f"{speed:,.0f}", f"{ratios[0]:.2f}", f"{memory / 1e6:,.0f}", f"{ratios[1]:.3f}")
    Console().print(table)
    print(f"largest difference of a score: {report['largest_difference']:.1e}")
    if agreement := report.get("bfloat16_agreement"):
        print(
            f"bfloat16: {agreement['equal_selections']:.1%} of {agreement['rows']} chunks selected or "
            f"dropped alike, Spearman's rank correlation {agreement['spearman']:.4f}"
        )


if __name__ == "__main__":
    main()
