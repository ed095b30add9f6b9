"""The runs of a report: their losses side by side, speed, cost and what evaluate says of them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...runtime.artifacts import MANIFEST
from ...training.metrics import read_metrics
from ..ledger import Run, compare, run_costs
from ..ledger_tables import sentence
from ..provenance import Provenance, read_provenance
from .charts import Axis, Chart, Layer, bounds, line
from .sources import Sources

MAX_RUNS = 12  # in a chart and a table
MAX_DOMAINS = 10  # columns of a table
WARM_UP = 0.05  # share of a run whose high losses do not settle the chart's height


class Training(NamedTuple):
    """A run; role: "teacher", "reference" or "student"; lines: of its metrics; costs: what run_costs says."""

    path: Path
    name: str
    role: str
    provenance: Provenance
    manifest: dict[str, Any]
    lines: list[dict[str, Any]]
    costs: dict[str, Any]

    @property
    def learnt_from_selected(self) -> bool:
        """Whether its corpus was selected by Difference Sampling."""
        return self.provenance.corpus is not None and self.provenance.corpus.by_score

    def median(self, key: str) -> float | None:
        """Of a figure of its lines."""
        values = [value for each in self.lines if (value := each.get(key)) is not None]
        return statistics.median(values) if values else None


def read_training(sources: Sources, path: Path) -> Training:
    """The run in a training output; UserError where it is damaged."""
    manifest = sources.outputs[path]
    return Training(
        path,
        path.name,
        sources.role(path),
        read_provenance(manifest, path / MANIFEST),
        manifest,
        read_metrics(path),
        run_costs(str(path), manifest, sources.pool),
    )


def styles(trainings: Sequence[Training]) -> dict[Path, str]:
    """The class of each run's line: students have colours, a teacher and a reference are grey."""
    students = [each.path for each in trainings if each.role == "student"]
    colours = {path: f"c{number % 6}" for number, path in enumerate(students)}
    return {each.path: colours.get(each.path, f"grey-{each.role}") for each in trainings}


def curves(trainings: Sequence[Training], key: str, title: str) -> Chart | None:
    """A figure of the runs over the tokens that they were trained on; None where no run has it."""
    points = {
        each.path: [(line_["tokens"] / 1e6, line_[key]) for line_ in each.lines if key in line_]
        for each in trainings
    }
    points = {path: found for path, found in points.items() if any(value is not None for _, value in found)}
    if not points:
        return None
    longest = max(found[-1][0] for found in points.values())
    settled = [
        value
        for found in points.values()
        for at, value in found
        if value is not None and (at >= WARM_UP * longest or len(found) < 3)
    ] or [value for found in points.values() for _, value in found if value is not None]
    low, high = bounds(min(settled), max(settled))
    margin = (high - low) * 0.06
    x = Axis("million tokens", 0.0, longest or 1.0)
    y = Axis("nats per token", low - margin, high + margin)
    style = styles(trainings)
    layers = [Layer(f"line {style[path]}", line(found, x, y)) for path, found in points.items()]
    legend = [
        (f"line {style[each.path]}", each.name + _role(each.name, each.role))
        for each in trainings
        if each.path in points
    ]
    return Chart(title, x, y, layers, legend=legend)


def comparisons(trainings: Sequence[Training]) -> list[str]:
    """What the students that learnt from selected text save against the first that did not, a sentence
    each."""
    students = [each for each in trainings if each.role == "student"]
    chosen = [each for each in students if each.learnt_from_selected]
    baseline = next((each for each in students if each not in chosen), None)
    if baseline is None:
        return []
    first = _run(baseline)
    names = {"baseline": baseline.name}
    return [sentence({"run": each.name} | names | compare(first, _run(each))) for each in chosen]


def _run(training: Training) -> Run:
    return Run(str(training.path), training.manifest, training.costs)


# ---- evaluations ----


class Cell(NamedTuple):
    text: str
    best: bool = False


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def loss_tables(sources: Sources) -> list[Table]:
    """Held-out losses, a table for each corpus: a row per model, a column for the whole and for each of the
    largest domains."""
    corpora: dict[str, list[dict[str, Any]]] = {}
    for each in sources.evaluations.values():
        if "corpus" in each:
            corpora.setdefault(each["corpus"], []).append(each)
    tables = []
    for found in corpora.values():
        sizes = found[0]["domains"]
        domains = sorted(sizes, key=lambda name: -sizes[name]["tokens"])[:MAX_DOMAINS]
        columns = [[each["loss"] for each in found]]
        columns += [[each["domains"].get(name, {}).get("loss") for each in found] for name in domains]
        rows = _rows(sources, found, columns, min, "{:.4f}")
        title = f"{found[0]['source']}, {found[0]['tokens']:,} tokens, in nats per token"
        tables.append(Table(title, ["model", "all", *domains], rows))
    return tables


def task_table(sources: Sources) -> Table | None:
    """Accuracies on tasks in percent, a row per model; None where there are none."""
    found = [each for each in sources.evaluations.values() if each.get("tasks")]
    if not found:
        return None
    names = list(dict.fromkeys(name for each in found for name in each["tasks"]))
    columns = [[_percent(each.get("average")) for each in found]]
    columns += [[_percent(each["tasks"].get(name, {}).get("value")) for each in found] for name in names]
    rows = _rows(sources, found, columns, max, "{:.1f}")
    return Table("Zero-shot accuracy in percent", ["model", "average", *names], rows)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _rows(
    sources: Sources,
    found: Sequence[Mapping[str, Any]],
    columns: Sequence[Sequence[float | None]],
    best: Callable[..., float],
    form: str,
) -> list[tuple[str, list[Cell]]]:
    """A row per evaluation, with the best student of each column marked where there are several."""
    roles = {each: sources.role(path) for path, each in sources.hashes.items()}
    students = [number for number, each in enumerate(found) if roles.get(each["weights"]) == "student"]
    rows: list[tuple[str, list[Cell]]] = [
        (each["model"] + _role(each["model"], roles.get(each["weights"])), []) for each in found
    ]
    for column in columns:
        values = [value for number in students if (value := column[number]) is not None]
        winner = best(values) if len(values) > 1 else None
        for number, value in enumerate(column):
            text = "–" if value is None else form.format(value)
            rows[number][1].append(Cell(text, number in students and value is not None and value == winner))
    return rows


def _role(name: str, role: str | None) -> str:
    """What to add to a model's name."""
    return f" ({role})" if role in ("teacher", "reference") and role != name else ""
