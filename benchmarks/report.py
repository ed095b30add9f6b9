"""Reports of the benchmarks: written whole or not at all, shown as a table, drawn as a plot."""

import json
import os
from pathlib import Path
from typing import Optional

OURS = "miniplm"  # names of our contenders begin with it


def write_json(path, report: dict):
    """Replace the file in one step: neither a reader nor a run that is cut sees half a file."""
    aside = f"{path}.tmp"
    Path(aside).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(aside, path)


def describe(shape: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


def ratio(report: dict, record: dict) -> Optional[float]:
    """The record's time over that of the baseline in the same shape and pass."""
    for other in report["records"]:
        if (
            other["contender"] == report["baseline"]
            and "ms" in other
            and all(other[key] == record[key] for key in ("shape", "pass"))
        ):
            return record["ms"] / other["ms"]
    return None


def table(report: dict) -> str:
    heads = ("ms", "host ms", "ratio", "TFLOP/s", "GB/s", "% ceiling", "extra MB", "error")
    lines = [f"{'pass':<10}{'contender':<26}" + "".join(f"{head:>10}" for head in heads)]
    shape = None
    for record in report["records"]:
        if record["shape"] != shape:
            shape = record["shape"]
            lines.append(describe(shape))
        line = f"{record['pass']:<10}{record['contender']:<26}"
        if "skipped" in record:
            lines.append(line + "  skipped: " + record["skipped"])
            continue
        extra = None if record["extra_bytes"] is None else record["extra_bytes"] / 1e6
        error = max(map(float, record["error"].values()), default=None)
        cells = (
            (record["ms"], ".3f"),
            (record["host_ms"], ".3f"),
            (ratio(report, record), ".3f"),
            (record["tflops"], ".1f"),
            (record["gb_per_s"], ".0f"),
            (record["percent_of_ceiling"], ".1f"),
            (extra, ".1f"),
            (error, ".1e"),
        )
        lines.append(
            line
            + "".join(f"{'-' if value is None else format(value, form):>10}" for value, form in cells)
            + "  inaccurate" * (record["accurate"] is False)
            + "  host-bound" * ((record["host_ms"] or 0) > record["ms"])
        )
    return "\n".join(lines)


def plot(report: dict, path, by: str):
    """Time over that of the baseline against the size `by`; a panel for each pass and remaining sizes with
    two points or more."""
    try:
        import matplotlib.figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    panels = {}
    for record in report["records"]:
        if "ms" in record and by in record["shape"] and (value := ratio(report, record)):
            rest = describe({key: size for key, size in record["shape"].items() if key != by})
            panels.setdefault(f"{record['pass']}, {rest}", {}).setdefault(record["contender"], []).append(
                (record["shape"][by], value)
            )
    panels = {title: lines for title, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not panels:
        print(f"no plot: no contender ran with two values of {by} beside {report['baseline']}")
        return
    figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            axis.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                label=name,
                linewidth=3 if name.startswith(OURS) else 1,
            )
        axis.set(title=title, xlabel=by, ylabel=f"time / {report['baseline']}", yscale="log")
        axis.legend(fontsize=7)
    figure.suptitle(f"{report['op']}, {report['environment']['device']}" + ", toy sizes" * report["toy"])
    figure.savefig(path)
