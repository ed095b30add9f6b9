"""The ledger: what runs have cost, in FLOPs and seconds, from their manifests.

Two costs stand side by side. *Training* is the paper's convention: forward, backward, and a teacher's forward
passes in Vanilla KD. *All-in* adds the evaluations on the way and the offline work: the training of the
reference model, the scores, a teacher's text. The offline work is done once for any number of students; a
teacher is taken as given. Manifests hold contents and no places, so the offline work is found by its content
in the folders beside the runs and in those that are named.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ..config import LedgerConfig
from ..data.corpus import WRITERS
from ..data.scores import WRITERS as SCORE_WRITERS
from ..models.loading import model_hash
from ..runtime.artifacts import MANIFEST, is_as_written, read_manifest, recorded
from ..runtime.errors import UserError
from ..runtime.schema import Count, Record
from ..runtime.wall_time import wall_time
from ..training.checkpoints import checkpoint_folders
from ..training.cost import training_flops_of
from ..training.metrics import read_metrics
from .ledger_tables import print_tables

Folders = dict[Path, dict[str, Any]]  # complete outputs with their manifests


class _Run(Record):
    """What is needed of a training output's manifest."""

    identity: dict[str, Any]
    steps: Count
    tokens: Annotated[int, Field(gt=0)]


class Run(NamedTuple):
    """A training output, its manifest, and what run_costs says of it."""

    path: str
    manifest: dict[str, Any]
    costs: dict[str, Any]


class Entry(NamedTuple):
    """A piece of work; None where its cost is not recorded."""

    stage: str
    name: str
    flops: int | None
    seconds: float | None


class Evaluation(NamedTuple):
    """A held-out loss on the way of a run."""

    tokens: int
    flops: float | None  # of the training until then
    loss: float


def ledger(config: LedgerConfig) -> dict[str, Any]:
    """Print what the runs of `config` have cost, and what each saves against the first; return it.

    Returns:
        {"runs": [what run_costs returns], "comparisons": [{"run", "baseline"} and what compare returns]}
    Raises:
        UserError: a folder holds no finished training run.
    """
    manifests = [read_manifest(run, "train", what="run", schema=_Run) for run in config.runs]
    folders = complete_outputs(
        [*(Path(run).resolve().parent for run in config.runs), *map(Path, config.inputs)]
    )
    first, *others = [
        Run(path, manifest, run_costs(path, manifest, folders))
        for path, manifest in zip(config.runs, manifests, strict=True)
    ]
    comparisons = [
        {"run": other.costs["name"], "baseline": first.costs["name"]} | compare(first, other)
        for other in others
    ]
    result = {"runs": [run.costs for run in (first, *others)], "comparisons": comparisons}
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)
    return result


# ---- one run ----


def run_costs(run: str, manifest: dict[str, Any], folders: Folders) -> dict[str, Any]:
    """The costs of a run: "training_flops" (the paper's convention), "offline" (the work that is done once
    for any number of students), "missing" (what of that was not found), "all_in_flops", and the seconds of
    each. None: not recorded, or a part of it is missing."""
    flops, offline = training_flops_of(manifest, Path(run) / MANIFEST), _Offline(folders)
    offline.add_corpus(manifest["identity"].get("corpus"))
    if tokens := manifest["identity"].get("tokens"):
        offline.add_scores(tokens["scores"])
    entries = list(offline.entries.values())
    offline_flops = None if offline.missing else _sum(entry.flops for entry in entries)
    offline_seconds = None if offline.missing else _sum(entry.seconds for entry in entries)
    seconds = wall_time(run)
    return {
        "name": Path(run).resolve().name,
        **{key: manifest.get(key) for key in ("steps", "tokens", "parameters", "loss", "eval_loss")},
        "flops": flops and flops.model_dump(),
        "training_flops": flops and flops.training,
        "training_seconds": seconds,
        "offline": [entry._asdict() for entry in entries],
        "missing": offline.missing,
        "offline_flops": offline_flops,
        "offline_seconds": offline_seconds,
        "all_in_flops": _sum([flops and flops.training + flops.evaluation, offline_flops]),
        "all_in_seconds": _sum([seconds, offline_seconds]),
    }


def _sum(parts: Iterable[Any]) -> Any:
    """Of numbers; None where one is not known."""
    parts = list(parts)
    return None if None in parts else sum(parts)


def complete_outputs(places: Sequence[Path]) -> Folders:
    """The complete outputs that are at these places, or in folders there."""
    found: Folders = {}
    for place in places:
        for path in [place, *(sorted(place.iterdir()) if place.is_dir() else [])]:
            try:
                manifest = recorded(path)
            except UserError:  # not of ours, or damaged
                continue
            if manifest.get("complete") and is_as_written(manifest):
                found[path.resolve()] = manifest
    return found


class _Offline:
    """The work behind the corpus of a run, and what of it is not in the folders."""

    def __init__(self, folders: Folders):
        self.folders = folders
        self.entries: dict[Path, Entry] = {}
        self.lost: dict[str, None] = {}  # a set in order

    @property
    def missing(self) -> list[str]:
        return list(self.lost)

    def find(self, what: str, fits: Callable[[dict[str, Any]], bool]) -> Path | None:
        """The first folder whose manifest fits, unless it is counted already; what is not there is lost."""
        folder = next((folder for folder, manifest in self.folders.items() if fits(manifest)), None)
        if folder is None:
            self.lost[what] = None
        return None if folder in self.entries else folder

    def enter(self, folder: Path, flops: int | None) -> dict[str, Any]:
        """Count a folder's work; its manifest."""
        manifest = self.folders[folder]
        self.entries[folder] = Entry(manifest["stage"], folder.name, flops, wall_time(folder))
        return manifest

    def add_corpus(self, fingerprint: Any) -> None:
        """Of a corpus that was selected also the scores and what it was selected from."""
        folder = self.find(
            f"corpus {fingerprint}",
            lambda each: each["stage"] in WRITERS and each.get("fingerprint") == fingerprint,
        )
        if folder is None:
            return
        # The others compute no model.
        synthesized = self.folders[folder]["stage"] == "synthesize"
        manifest = self.enter(folder, _recorded_flops(self.folders[folder]) if synthesized else 0)
        scores = manifest["identity"].get("scores")
        for identity in scores.values() if isinstance(scores, dict) else ():
            self.add_scores(identity)
        retokenized = manifest["stage"] == "retokenize"
        if before := manifest["identity"].get("corpus") if retokenized else manifest.get("parent"):
            self.add_corpus(before)

    def add_scores(self, identity: Any) -> None:
        """Of scores with a reference model also its training; of predicted ones what predicted them, and the
        scores that it was fitted to."""
        folder = self.find(
            f"scores of corpus {identity.get('corpus')}",
            lambda each: each["stage"] in SCORE_WRITERS and each["identity"] == identity,
        )
        if folder is None:
            return
        self.enter(folder, _recorded_flops(self.folders[folder]))
        if identity.get("proxy"):
            self.add_proxy(identity["proxy"])
        elif identity.get("reference"):
            self.add_model(identity["reference"])

    def add_proxy(self, checksum: str) -> None:
        """The fit of the proxy whose manifest has this checksum, and the scores behind it."""
        folder = self.find(
            f"proxy {checksum}",
            lambda each: each["stage"] == "proxy fit" and each.get("checksum") == checksum,
        )
        if folder is not None:
            manifest = self.enter(folder, _recorded_flops(self.folders[folder]))
            self.add_scores(manifest["identity"]["scores"])

    def add_model(self, weights: str) -> None:
        """The training of the model with this hash, and what is behind its corpus."""
        for folder, manifest in self.folders.items():
            if manifest["stage"] == "train" and last_hash(folder) == weights:
                flops = training_flops_of(manifest, folder / MANIFEST)
                total = None if flops is None else flops.training + flops.evaluation
                self.enter(folder, total)
                self.add_corpus(manifest["identity"].get("corpus"))
                return
        self.lost[f"training of the reference model {weights}"] = None


def last_hash(training_output: Path) -> str | None:
    """Of the model in the last checkpoint; None where there is no whole one."""
    try:
        return model_hash(checkpoint_folders(training_output)[-1])
    except (UserError, IndexError):
        return None


def _recorded_flops(manifest: dict[str, Any]) -> int | None:
    """What a stage says that its models have computed in all."""
    flops = manifest.get("flops")
    parts = list(flops.values()) if isinstance(flops, dict) else []
    return sum(parts) if parts and all(type(part) is int for part in parts) else None


# ---- two runs ----


def compare(baseline: Run, other: Run) -> dict[str, Any]:
    """What a run saves against a baseline at equal loss: the lowest held-out loss that both reach.

    Returns:
        {"reason": why they do not compare}, or "loss"; "baseline_flops" and "flops", what their training cost
        up to there; "saving", the quotient; "token_saving", that of the tokens; "all_in_saving", that of one
        student's training with the offline work; "students", from how many on the offline work is repaid
        ("never"; 0: there is none to repay). None: not known.
    """
    for key in ("eval_corpus", "eval_rows"):
        first, second = (run.manifest["identity"].get(key) for run in (baseline, other))
        if first is None or first != second:
            return {"reason": "their held-out losses are not those of one corpus (eval.data, eval.chunks)"}
    curves = [evaluations(run) for run in (baseline, other)]
    if not all(curves):
        return {"reason": "the metrics of one hold no held-out loss"}
    loss = max(min(point.loss for point in curve) for curve in curves)
    (tokens, flops), (other_tokens, other_flops) = (reached(curve, loss) for curve in curves)
    result: dict[str, Any] = {"loss": loss, "token_saving": tokens / other_tokens}
    result |= {"baseline_flops": flops, "flops": other_flops}
    unknown = dict.fromkeys(("saving", "all_in_saving", "students"))
    if flops is None or other_flops is None:
        return result | unknown
    result |= unknown | {"saving": flops / other_flops}
    offline, other_offline = (run.costs["offline_flops"] for run in (baseline, other))
    if offline is not None and other_offline is not None:
        result["all_in_saving"] = (flops + offline) / (other_flops + other_offline)
        result["students"] = students(flops - other_flops, other_offline - offline)
    return result


def students(saved: float, offline: float) -> int | str:
    """From how many students on the offline work is repaid, where each saves so much."""
    if offline <= 0:
        return 0
    return math.ceil(offline / saved) if saved > 0 else "never"


def evaluations(run: Run) -> list[Evaluation]:
    """The held-out losses on the way of a run, the earliest first. Its cost grows with its tokens."""
    flops, tokens = run.costs["training_flops"], run.manifest["tokens"]
    return [
        Evaluation(line["tokens"], flops and flops * line["tokens"] / tokens, line["eval_loss"])
        for line in read_metrics(run.path)
        if line.get("eval_loss") is not None
    ]


def reached(curve: list[Evaluation], loss: float) -> tuple[float, float | None]:
    """(tokens, training FLOPs) at which a curve first comes down to a loss that it reaches; between two
    evaluations by a straight line. One that starts there is taken at its first evaluation."""
    index = next(index for index, point in enumerate(curve) if point.loss <= loss)
    point, before = curve[index], curve[max(index - 1, 0)]
    share = 1.0 if before.loss <= point.loss else (before.loss - loss) / (before.loss - point.loss)
    tokens = before.tokens + share * (point.tokens - before.tokens)
    if point.flops is None or before.flops is None:
        return tokens, None
    return tokens, before.flops + share * (point.flops - before.flops)
