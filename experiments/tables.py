"""The experiment's tables, decision and plots, from manifests and evaluations alone.

    python experiments/tables.py --runs DIR --pack PACK --output RESULTS

DIR is run.py's --output, or what --results copied of it. Writes RESULTS/result.json and RESULTS/result.md,
and, where matplotlib is installed, RESULTS/losses.png and RESULTS/endpoint.png. What the figures are and
how they decide: docs/experiments/plan.md.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contrasts import Contrast, Evidence, bootstrap, contrast, decision, holm
from pack import read_packed
from result_text import report

from miniplm.analysis.evaluation import read_evaluation
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json, write_json

NAME = re.compile(r"(?P<arm>[A-Za-z0-9-]+)-(?P<student>[A-Z])-(?P<seed>\d+)-clean")
CONTRASTS = ["M − C", "Mp − C", "K − C", "MK − C", "MK − K", "M4 − C", "M − K", "M − Mp", "O − C"]
PRIMARY = "M − C"
BITS = 1 / math.log(2)  # of a nat


class Documents(NamedTuple):
    """The held-out documents of a pack, in its order."""

    names: list[str]
    sets: list[str]
    clusters: list[str]
    sizes: np.ndarray  # bytes, float64 [documents]


class Run(NamedTuple):
    """A student and what was measured of it."""

    arm: str
    student: str
    seed: int
    nats: np.ndarray  # −log p of each held-out document, float64 [documents]
    bits_per_byte: dict[str, float]  # by set
    nats_per_token: dict[str, float]
    in_pool: float
    in_pool_by_domain: dict[str, float | None]
    tokens: int  # trained on
    flops: dict[str, int]

    @property
    def primary(self) -> float:
        return mean(self.bits_per_byte.values())


def mean(values: Any) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def read_documents(pack: Path) -> Documents:
    rows = read_packed(pack / "held-out.jsonl.zst")
    columns = ([row[column] for row in rows] for column in ("domain", "set", "cluster"))
    return Documents(*columns, np.array([len(row["text"].encode("utf-8")) for row in rows], float))


def read_runs(folder: Path, documents: Documents) -> list[Run]:
    """The finished runs; those without one of their evaluations are not there.

    Raises:
        UserError: an evaluation is of other documents, or has a loss that is not finite.
    """
    runs = []
    for path in sorted(folder.glob("*-clean.json")):
        found = NAME.fullmatch(path.stem)
        name = path.stem.removesuffix("-clean")
        in_pool = folder / f"{name}-pool.json"
        if found and in_pool.exists():
            runs.append(_run(found, path, in_pool, read_json(folder / name / "manifest.json"), documents))
    return sorted(runs, key=lambda run: (run.student, run.arm, run.seed))


def _run(found: re.Match, path: Path, in_pool: Path, manifest: dict, documents: Documents) -> Run:
    clean, pool = read_evaluation(path), read_evaluation(in_pool)
    if set(clean.domains) != set(documents.names):
        raise UserError(f"{path} is of other documents than the pack: give the pack that run.py was given")
    figures = [clean.domains[name] for name in documents.names]
    if pool.loss is None or clean.non_finite_rows:
        raise UserError(f"{path} has losses that are not finite: leave that run out")
    nats = np.array([(each.loss or 0.0) * each.tokens for each in figures])
    tokens, of = np.array([each.tokens for each in figures], float), np.array(documents.sets)
    bits, per_token = {}, {}
    for name in sorted(set(documents.sets)):
        rows = of == name
        bits[name] = float(nats[rows].sum() * BITS / documents.sizes[rows].sum())
        per_token[name] = float(nats[rows].sum() / tokens[rows].sum())
    domains = {name: each.loss for name, each in pool.domains.items()}
    arm, student, seed = found["arm"], found["student"], int(found["seed"])
    cost = manifest.get("flops") or {}
    return Run(
        arm, student, seed, nats, bits, per_token, pool.loss, domains, int(manifest["tokens"]), dict(cost)
    )


def paired(runs: Sequence[Run], name: str) -> list[tuple[Run, Run]]:
    """The runs of the two arms of a contrast "A − B" for each seed that both have."""
    one, other = ({run.seed: run for run in runs if run.arm == arm} for arm in name.split(" − "))
    return [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]


def of_pairs(pairs: Sequence[tuple[Run, Run]], figure: Any) -> Contrast:
    return contrast([figure(one) - figure(other) for one, other in pairs])


def contrasts_of(runs: Sequence[Run], documents: Documents) -> dict[str, dict[str, Any]]:
    """What is said of each contrast of one student, by its name."""
    found = {name: pairs for name in CONTRASTS if (pairs := paired(runs, name))}
    result: dict[str, dict[str, Any]] = {}
    for name, pairs in found.items():
        primary = of_pairs(pairs, lambda run: run.primary)
        result[name] = {**primary._asdict(), "seeds": [one.seed for one, _ in pairs]}
    if PRIMARY in found:
        pairs = found[PRIMARY]
        for name in sorted(set(documents.sets)):
            each = of_pairs(pairs, lambda run, name=name: run.bits_per_byte[name])
            result[f"{PRIMARY}, {name}"] = each._asdict()
        result[f"{PRIMARY}, in-pool"] = of_pairs(pairs, lambda run: run.in_pool)._asdict()
    secondary = {
        name: each["p"] for name, each in result.items() if name != PRIMARY and each["p"] is not None
    }
    for name, p in holm(secondary).items():
        result[name]["holm"] = p
    if found:
        differences = np.column_stack(
            [mean_rows([(one.nats - other.nats) * BITS for one, other in pairs]) for pairs in found.values()]
        )
        ends = bootstrap(differences, documents.sizes, documents.sets, documents.clusters)
        for name, low, high in zip(found, *ends, strict=True):
            result[name]["bootstrap"] = [float(low), float(high)]
    return result


def mean_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(rows, axis=0)


def decided(runs: Sequence[Run], contrasts: dict[str, dict[str, Any]], sets: Sequence[str]) -> dict[str, Any]:
    """{"decision", "nats_per_token": M − C} of one student; nothing where C or M is missing."""
    if PRIMARY not in contrasts:
        return {"decision": "not run: C or M is missing"}
    as_contrast = lambda name: Contrast(*(contrasts[name][field] for field in Contrast._fields))
    nats = of_pairs(paired(runs, PRIMARY), lambda run: mean(run.nats_per_token.values()))
    by_set = {
        name: (as_contrast(f"{PRIMARY}, {name}"), contrasts[f"{PRIMARY}, {name}"].get("holm", 1.0))
        for name in sets
    }
    m_minus_k = contrasts["M − K"]["mean"] if "M − K" in contrasts else None
    within = as_contrast("Mp − C") if "Mp − C" in contrasts else None
    evidence = Evidence(as_contrast(PRIMARY), nats, by_set, m_minus_k, within)
    return {"decision": decision(evidence), "nats_per_token": nats._asdict()}


def saving(runs: Sequence[Run]) -> dict[str, Any] | None:
    """How many times M's tokens C needs for M's primary endpoint: linear in the logarithm of the tokens
    between C-half, C and C-double. None where one of the four is missing."""
    ends = {arm: [run for run in runs if run.arm == arm] for arm in ("C-half", "C", "C-double", "M")}
    if not all(ends.values()):
        return None
    curve = [
        (mean(run.tokens for run in ends[arm]), mean(run.primary for run in ends[arm]))
        for arm in ("C-half", "C", "C-double")
    ]
    tokens, reached = mean(run.tokens for run in ends["M"]), mean(run.primary for run in ends["M"])
    for (before, above), (after, below) in pairwise(curve):
        if below <= reached <= above and below < above:
            share = (above - reached) / (above - below)
            return {"factor": before * (after / before) ** share / tokens, "curve": curve}
    said = (
        f"above {curve[-1][0] / tokens:.2g}"
        if reached < curve[-1][1]
        else f"below {curve[0][0] / tokens:.2g}"
    )
    return {"factor": said, "curve": curve}


def costs(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """FLOPs by arm, of training (a teacher's passes included) and all-in: with evaluations on the way, and of
    those arms that select by score with the scores and the reference model, which all of them share."""
    offline = sum(
        sum((read_json(path).get("flops") or {}).values())
        for name in ("scores", "reference")
        if (path := folder / name / "manifest.json").exists()
    )
    result = {}
    for run in runs:
        training = sum(run.flops.get(part, 0) for part in ("forward", "backward", "teacher"))
        shared = offline if run.arm.startswith("M") else 0
        all_in = training + run.flops.get("evaluation", 0) + shared
        result.setdefault(run.arm, {"tokens": run.tokens, "training": training, "all_in": all_in})
    return result


def by_arm(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of each arm, means over its seeds."""
    result = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        these = [run for run in runs if run.arm == arm]
        domains = {}
        for name in these[0].in_pool_by_domain:
            losses = [run.in_pool_by_domain[name] for run in these]
            domains[name] = None if None in losses else mean(losses)  # None: no token of it was predicted
        result[arm] = {
            "seeds": {run.seed: run.primary for run in these},
            "primary": mean(run.primary for run in these),
            "sets": {name: mean(run.bits_per_byte[name] for run in these) for name in these[0].bits_per_byte},
            "in_pool": mean(run.in_pool for run in these),
            "in_pool_by_domain": domains,
        }
    return result


def tasks_of(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """By arm and task, means over seeds: accuracy by the paper's rule, its 95% interval (of the questions as
    a sample: seeds share them), and the bits per byte of the gold answers. Arms that were asked nothing are
    left out."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        if (path := folder / f"{run.arm}-{run.student}-{run.seed}-tasks.json").exists():
            for name, figures in read_json(path)["tasks"].items():
                found.setdefault(run.arm, {}).setdefault(name, []).append(figures)
    result: dict[str, Any] = {}
    for arm, tasks in found.items():
        for name, each in tasks.items():
            gold = [figures["gold_bits_per_byte"] for figures in each]
            entry: dict[str, Any] = {"gold_bits_per_byte": None if None in gold else mean(gold)}
            if all(figures["metric"] for figures in each):
                value = mean(figures["value"] for figures in each)
                half = 1.96 * mean(figures["standard_error"] for figures in each)
                entry |= {"accuracy": value, "low": value - half, "high": value + half}
            result.setdefault(arm, {})[name] = entry
    return result


def result_of(folder: Path, pack: Path) -> dict[str, Any]:
    """All figures, by student; folder: run.py's output."""
    documents = read_documents(pack)
    runs = read_runs(folder / "runs", documents)
    if not runs:
        raise UserError(f"{folder / 'runs'} holds no run with its evaluations: run run.py first")
    students = {}
    for student in dict.fromkeys(run.student for run in runs):
        these = [run for run in runs if run.student == student]
        contrasts = contrasts_of(these, documents)
        students[student] = {
            **decided(these, contrasts, sorted(set(documents.sets))),
            "arms": by_arm(these),
            "contrasts": contrasts,
            "saving": saving(these),
            "costs": costs(these, folder / "runs"),
            "tasks": tasks_of(these, folder / "runs"),
        }
        if (path := folder / f"rate-{student}.json").exists():
            students[student]["rate"] = read_json(path)
    result = {"version": read_json(pack / "pack.json")["version"], "students": students}
    if (path := folder / "kept.json").exists():
        result["kept"] = read_json(path)
    return result


def curves(folder: Path) -> Iterator[tuple[str, list[int], list[float]]]:
    """(run, tokens, losses) of each run's metrics."""
    for path in sorted(folder.glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line.get("loss") is not None]
        yield path.parent.name, [line["tokens"] for line in lines], [line["loss"] for line in lines]


def plot(result: dict[str, Any], folder: Path, output: Path) -> None:
    """losses.png and endpoint.png, where matplotlib is installed."""
    try:
        import matplotlib.figure
    except ImportError:
        return
    arms = list(dict.fromkeys(arm for each in result["students"].values() for arm in each["arms"]))
    colors = {arm: f"C{place}" for place, arm in enumerate(arms)}
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, tokens, losses in curves(folder / "runs"):
        found = NAME.fullmatch(f"{name}-clean")
        if found and found["arm"] in arms and (folder / "runs" / f"{name}-clean.json").exists():
            axis.plot(tokens, losses, color=colors[found["arm"]], linewidth=0.7)
    for arm in arms:
        axis.plot([], color=colors[arm], label=arm)
    axis.set(xlabel="tokens", ylabel="training loss, nats per token")
    axis.legend(title="a line per seed")
    figure.savefig(output / "losses.png", dpi=150)
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for student, figures in result["students"].items():
        seeds = sorted({seed for each in figures["arms"].values() for seed in each["seeds"]})
        for seed in seeds:
            has = {arm: each["seeds"][seed] for arm, each in figures["arms"].items() if seed in each["seeds"]}
            axis.plot(
                [f"{arm}-{student}" for arm in has], list(has.values()), "o-", linewidth=0.7, label=seed
            )
    axis.set(ylabel="bits per byte, mean of the clean sets")
    axis.legend(title="seed")
    figure.savefig(output / "endpoint.png", dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", required=True, type=Path, help="run.py's output or the copy of its results")
    parser.add_argument("--pack", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args(arguments)
    try:
        result = result_of(options.runs, options.pack)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "result.json", result)
    (options.output / "result.md").write_text(report(result), encoding="utf-8")
    plot(result, options.runs, options.output)
    print(report(result))


if __name__ == "__main__":
    main()
