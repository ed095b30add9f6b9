"""The noise bench: known noise added to clean text, and which rule of selection drops it.

    python experiments/noise.py add TEXT.jsonl NOISY.jsonl --documents 0 800 --per-kind 40 --seed 10
    python experiments/noise.py measure NOISY.jsonl --teacher M --reference blind=RUN aware=RUN --output DIR

`add` writes documents of TEXT.jsonl and, of each of eight kinds of noise, documents made of some of them.
TEXT.jsonl has a column "text"; the order of its documents is shuffled once, equally for all runs, so that
ranges of --documents are disjoint random parts: one for training a reference model, one to be judged.

`measure` runs prepare and score on such a file and applies rules: Difference Sampling with each reference,
without and with --max-repeats 1; the teacher's or a reference's log-probability alone (higher is kept); the
zlib ratio (compressed bytes by bytes; higher is kept); random. Each document is a domain of its own, so that
chunk i is document i. It writes DIR/noise.json and prints the tables. What was expected and what came out:
docs/experiments/noise.md.
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miniplm.config import PrepareConfig, ScoreConfig, SelectConfig
from miniplm.data.corpus import Corpus
from miniplm.data.repeats import without_repeats
from miniplm.data.scores import read_scores
from miniplm.data.selection import choose
from miniplm.demo.noise import CLEAN, COPIES, KINDS
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json, write_json

MIN_LETTERS, MAX_LETTERS = 300, 1_200  # of a document
MAX_LENGTH = 4_096  # predictions: no document is cut


def add_noise(texts: Sequence[str], per_kind: int, seed: int) -> list[dict[str, str]]:
    """The texts and `per_kind` documents of each kind in random order: {"text", "kind", "domain"}, the kind
    of a clean one being "clean", the domain a name of its own."""
    rng = random.Random(seed)
    rows = [(CLEAN, text) for text in texts]
    repeated = rng.sample(texts, max(per_kind // COPIES, 1))
    for kind, make in KINDS.items():
        others = repeated if kind == "boilerplate" else texts
        rows += [(kind, make(text, others, rng)) for text in rng.sample(texts, per_kind)]
    rng.shuffle(rows)
    return [{"text": text, "kind": kind, "domain": str(row)} for row, (kind, text) in enumerate(rows)]


def clean_texts(path: str | Path, start: int, stop: int) -> list[str]:
    """The documents start … stop − 1 of a JSONL file in an order shuffled with a fixed seed; of those that
    are too short none, of long ones the beginning."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts = sorted({text[:MAX_LETTERS] for text in texts if len(text) >= MIN_LETTERS})
    return random.Random(0).sample(texts, len(texts))[start:stop]


# ---- the rules ----


def auroc(clean: np.ndarray, noise: np.ndarray) -> float:
    """How probable it is that a clean document has the higher value than a noisy one, equal ones counting
    half: 1 where a threshold parts them, 0.5 where nothing does."""
    ordered = np.sort(noise)
    below, up_to = (np.searchsorted(ordered, clean, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(noise))


def zlib_ratio(text: str) -> float:
    """Compressed bytes by bytes."""
    encoded = text.encode()
    return len(zlib.compress(encoded, 9)) / len(encoded)


def judged(values: np.ndarray, dropped: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    """The figures of a rule, by kind and over all noise: what share it drops (of noise: its recall), the
    share of noise among what is dropped of clean and that kind (its precision), and AUROC.

    Args:
        values: float [documents], what the rule compares by, higher is kept.
        dropped: bool [documents]; kinds: str [documents].
    """
    clean = kinds == CLEAN
    figures: dict[str, Any] = {
        CLEAN: {"documents": int(clean.sum()), "dropped": float(dropped[clean].mean())}
    }
    for kind in (*KINDS, "all noise"):
        noise = ~clean if kind == "all noise" else kinds == kind
        both = int(dropped[clean | noise].sum())
        figures[kind] = {
            "documents": int(noise.sum()),
            "dropped": float(dropped[noise].mean()),
            "precision": float(dropped[noise].sum() / both) if both else None,
            "auroc": auroc(values[clean], values[noise]),
        }
    return figures


def rules(
    teacher: np.ndarray, references: dict[str, np.ndarray], texts: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """What each rule compares by, float32 [documents], from the models' mean log-probabilities."""
    values = {f"difference, {name}": teacher - reference for name, reference in references.items()}
    values["teacher"] = teacher
    values |= {f"reference, {name}": reference for name, reference in references.items()}
    values["zlib"] = np.array([zlib_ratio(text) for text in texts])
    values["random"] = np.random.default_rng(seed).random(len(texts))
    return {name: value.astype(np.float32) for name, value in values.items()}


def measure(
    noisy: str, teacher: str, references: dict[str, str], output: Path, ratio: float, seed: int
) -> dict[str, Any]:
    """Prepare, score and judge; the stages' outputs lie under `output`, complete ones are not made again."""
    from miniplm.stages.prepare import prepare
    from miniplm.stages.score import score

    with open(noisy, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prepare(
        PrepareConfig(
            data=noisy,
            tokenizer=teacher,
            output=str(output / "corpus"),
            domain_column="domain",
            max_length=MAX_LENGTH,
            workers=1,
        )
    )
    corpus = Corpus(output / "corpus")
    codes, names = corpus.domains
    if [names[code] for code in codes] != [row["domain"] for row in rows]:
        raise UserError(f"{noisy} has documents of more than {MAX_LENGTH:,} tokens: cut them")
    log_probs = {}
    for name, role, model in [
        ("teacher", "teacher", teacher),
        *((name, "reference", model) for name, model in references.items()),
    ]:
        folder = output / f"scores-{name}"
        settings = {role: model, "device": "auto", "batch_tokens": 4_096, "shard_chunks": 200}
        score(ScoreConfig(data=str(corpus.folder), output=str(folder), **settings))
        files = read_json(folder / "manifest.json")["files"]
        column = f"{role}_log_prob"
        log_probs[name] = read_scores(folder, len(corpus), [column], files)[column]
    texts, kinds = [row["text"] for row in rows], np.array([row["kind"] for row in rows])
    config = SelectConfig(data=str(corpus.folder), scores=[str(output)], output=str(output), ratio=ratio)
    result, values_of = {}, rules(log_probs.pop("teacher"), log_probs, texts, seed)
    for name in log_probs:
        capped, _ = without_repeats(corpus, values_of[f"difference, {name}"], 1)
        values_of[f"difference, {name}, max_repeats"] = np.where(np.isnan(capped), -np.inf, capped)
    for name, values in values_of.items():
        keep = choose(config, values, corpus.num_tokens, np.zeros(len(rows), np.int32))
        result[name] = judged(values, ~keep, kinds)
    return {"documents": len(rows), "tokens": int(corpus.num_tokens.sum()), "ratio": ratio, "rules": result}


def tables(result: dict[str, Any]) -> str:
    """Share dropped, AUROC and precision as Markdown: a row per kind, a column per rule."""
    names = list(result["rules"])
    lines = []
    for figure, title in (("dropped", "share dropped"), ("auroc", "AUROC"), ("precision", "precision")):
        lines += [f"| {title} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for kind in (*KINDS, "all noise", CLEAN):
            cells = [result["rules"][name][kind].get(figure) for name in names]
            if kind != CLEAN or figure == "dropped":
                texts = ["–" if cell is None else f"{cell:.2f}" for cell in cells]
                lines.append(f"| {kind} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def named(text: str) -> tuple[str, str]:
    """name=model."""
    name, separator, model = text.partition("=")
    if not (name and separator and model) or name == "teacher":
        raise argparse.ArgumentTypeError(f"give NAME=MODEL, got {text!r}")
    return name, model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    add = commands.add_parser("add")
    add.add_argument("text", help="a JSONL file of clean text")
    add.add_argument("output", help="the JSONL file to write")
    add.add_argument("--documents", type=int, nargs=2, default=(0, sys.maxsize), metavar=("FROM", "TO"))
    add.add_argument("--per-kind", type=int, default=40, help="noisy documents of each kind; 0: clean text")
    add.add_argument("--seed", type=int, default=10)
    judge = commands.add_parser("measure")
    judge.add_argument("noisy", help="what add wrote")
    judge.add_argument("--teacher", required=True, help="a model with its tokenizer")
    judge.add_argument("--reference", required=True, nargs="+", type=named, metavar="NAME=MODEL")
    judge.add_argument("--output", required=True, type=Path)
    judge.add_argument("--ratio", type=float, default=0.5, help="the share of the documents that is kept")
    judge.add_argument("--seed", type=int, default=10, help="of the random rule")
    options = parser.parse_args(arguments)
    if options.command == "add":
        texts = clean_texts(options.text, *options.documents)
        rows = add_noise(texts, options.per_kind, options.seed)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(options.output).write_text(lines, encoding="utf-8")
        print(f"{options.output}: {len(texts):,} clean documents, {len(rows) - len(texts):,} noisy ones")
        return
    result = measure(
        options.noisy,
        options.teacher,
        dict(options.reference),
        options.output,
        options.ratio,
        options.seed,
    )
    write_json(options.output / "noise.json", result)
    print(tables(result))


if __name__ == "__main__":
    main()
