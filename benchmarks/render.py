"""The measurements on GPUs in a folder → tables in Markdown, written into the README between the two lines of
MARKERS.

    python benchmarks/render.py [--results FOLDER] [--readme FILE]      FILE "-": print them

Read are the reports of pipeline.py and of the ops' benchmarks, of each device and op the newest; files of
another kind, toys and figures of a CPU are passed over. Where there is matplotlib, plots are drawn into the
folder; what lies there is shown.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import harness
from report import ratio as time_ratio

RESULTS, README = harness.ROOT / "benchmarks" / "results", harness.ROOT / "README.md"
MARKERS = "<!-- GPU figures, written by benchmarks/render.py -->", "<!-- end of the GPU figures -->"
PIPELINE = ("train", "score")
TITLES = {"train": "`train`", "score": "`score`", "loss curve": "Loss curve"}


def read(folder: Path) -> list[dict]:
    """The newest report of each op and GPU: those of the pipeline first."""
    newest = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            report = json.loads(path.read_text())
        except ValueError:
            print(f"{path} is not JSON: passed over", file=sys.stderr)
            continue
        if (
            isinstance(report, dict)
            and report.get("device") == "cuda"
            and {"op", "environment", "records"} <= report.keys()
        ):
            key = report["op"], report["environment"]["device"]
            if key not in newest or newest[key]["environment"]["date"] < report["environment"]["date"]:
                newest[key] = report
    order = list(TITLES)
    return sorted(
        newest.values(),
        key=lambda report: (order.index(report["op"]) if report["op"] in order else len(order), report["op"]),
    )


def machine(report: dict) -> str:
    """Where, with what and when."""
    where, ceilings = report["environment"], report["ceilings"]
    parts = [
        f"torch {where['torch']}",
        *(f"{name} {where[name]}" for name in harness.PACKAGES if where.get(name)),
        f"CUDA {where.get('cuda')}",
        f"bf16 GEMM {number(ceilings['gemm_tflops'], '.0f')} TFLOP/s",
        f"copy {number(ceilings['copy_gb_per_s'], ',.0f')} GB/s",
        "commit " + re.sub("(?<=[0-9a-f]{12})[0-9a-f]+", "", where["commit"] or "unknown"),
    ]
    return f"{where['device']}, {where['date']}; {', '.join(parts)}"


def number(value, form: str) -> str:
    return "–" if value is None else format(float(value), form)


def table(head, rows) -> list[str]:
    return [" | ".join(["", *map(str, row), ""]).strip() for row in (head, ["---"] * len(head), *rows)]


def pipeline_table(report: dict) -> list[str]:
    """A row for each contender: its speed, and how many times as fast miniplm is."""
    ours = {
        json.dumps(record["shape"]): record
        for record in report["records"]
        if record["contender"] == harness.OURS and "mfu" in record
    }
    rows = []
    for record in report["records"]:
        row = [harness.describe(record["shape"]), record["contender"]]
        if "skipped" in record:
            rows.append([*row, f"did not run: {record['skipped'].replace('|', '/')}", *[""] * 6])
            continue
        base = ours.get(json.dumps(record["shape"]))
        rows.append(
            [
                *row,
                number(record["tokens_per_second"], ",.0f"),
                number(base and base["tokens_per_second"] / record["tokens_per_second"], ".2f"),
                number(record["mfu"] and 100 * record["mfu"], ".1f"),
                number(record["peak_bytes"] and record["peak_bytes"] / 1e9, ".1f"),
                record["chunks_per_batch"],
                number(max(map(float, record["error"].values())), ".1e")
                + " (inaccurate)" * (not record["accurate"])
                + ranks(record.get("agreement")),
                ", ".join(f"{part} {100 * share:.0f}%" for part, share in record["split"].items()),
            ]
        )
    return table(
        [
            "shape",
            "",
            "tokens/s",
            "miniplm is × as fast",
            "MFU, %",
            "peak GB",
            "chunks a batch",
            "error",
            "time",
        ],
        rows,
    )


def ranks(agreement) -> str:
    """How well the scores agree with miniplm's."""
    if not agreement:
        return ""
    return (
        f"; ranks {number(agreement['spearman'], '.4f')}, {100 * agreement['equal_selections']:.1f}% "
        f"selected alike"
    )


def op_table(report: dict) -> list[str]:
    """A row for each shape and pass: miniplm, the baseline, and the fastest contender that computes the
    same."""
    cells = {}
    for record in report["records"]:
        cells.setdefault((harness.describe(record["shape"]), record["pass"]), []).append(record)
    rows = []
    for (shape, name), records in cells.items():
        ours = [record for record in records if record["contender"].startswith(harness.OURS)]
        others = [record for record in records if record not in ours and record.get("accurate")]
        best = min(others, key=lambda record: record["ms"], default=None)
        for record in ours:
            row = [shape, name, record["contender"]]
            if "skipped" in record:
                rows.append([*row, f"did not run: {record['skipped'].replace('|', '/')}", *[""] * 5])
                continue
            ratio, extra = time_ratio(report, record), record["extra_bytes"]
            rows.append(
                [
                    *row,
                    number(record["ms"], ".3f"),
                    number(record["percent_of_ceiling"], ".1f"),
                    number(extra and extra / 1e6, ",.0f"),
                    number(ratio and 1 / ratio, ".2f"),
                    best["contender"] if best else "–",
                    number(best and best["ms"] / record["ms"], ".2f"),
                ]
            )
    head = [
        "shape",
        "pass",
        "",
        "ms",
        "% of ceiling",
        "extra MB",
        f"× as fast as {report['baseline']}",
        "best other",
        "× as fast as it",
    ]
    return table(head, rows)


def curve_text(report: dict) -> list[str]:
    curve = report["loss_curve"]
    far = {name: number(distance, ".1e") for name, distance in curve["distance"].items()}
    return [
        f"{curve['steps']} steps, {harness.describe(report['shape'])}, from the same weights on the same "
        f"batches; root mean square distance of "
        f"the loss from full precision: miniplm {far[harness.OURS]}, plain transformers in bf16 "
        f"{far['plain']} nats."
    ]


def plot_pipeline(report: dict, path: Path):
    """Tokens per second, a group of bars for each shape."""
    try:
        import matplotlib.figure
    except ImportError:
        return
    ran = [record for record in report["records"] if "mfu" in record]
    shapes, names = (
        list(dict.fromkeys(of(record) for record in ran))
        for of in (lambda r: r["shape"]["model"], lambda r: r["contender"])
    )
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(names):
        points = [
            (shapes.index(r["shape"]["model"]) + 0.8 * place / len(names), r["tokens_per_second"])
            for r in ran
            if r["contender"] == name
        ]
        axis.bar(*zip(*points, strict=True), width=0.8 / len(names), align="edge", label=name)
    axis.set(xticks=[place + 0.4 for place in range(len(shapes))], xticklabels=shapes, ylabel="tokens/s")
    axis.set_title(f"{report['op']}, {report['environment']['device']}")
    axis.legend()
    figure.savefig(path)


def render(folder: Path, readme: Path) -> str:
    """The text between the markers; draws the plots that it shows."""
    lines, reports = [], read(folder)
    for report in reports:
        lines += [
            "",
            f"**{TITLES.get(report['op'], report['op'])}**: "
            f"{machine(report)}{'' if report['finished'] else '; cut short'}",
            "",
        ]
        if report["op"] == "loss curve":
            lines += curve_text(report)
            continue
        lines += pipeline_table(report) if report["op"] in PIPELINE else op_table(report)
        path = folder / (re.sub(r"\W+", "-", f"{report['op']} {report['environment']['device']}") + ".png")
        if report["op"] in PIPELINE:
            plot_pipeline(report, path)
        elif "by" in report:
            harness.plot(report, path, report["by"])
        if path.exists():
            lines += ["", f"![{report['op']}]({path.relative_to(readme.parent)})"]
    return "\n".join(lines).strip() or "GPU: not measured yet."


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the reports")
    parser.add_argument(
        "--readme", type=Path, default=README, help="the file to write into; -: standard output"
    )
    options = parser.parse_args()
    if str(options.readme) == "-":
        print(render(options.results, options.results / "README.md"))
        return
    text = options.readme.read_text(encoding="utf-8")
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"{options.readme} must hold each of these lines once: {begin} and {end}")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    options.readme.write_text(
        f"{before}{begin}\n{render(options.results, options.readme)}\n{end}{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
