"""The experiment's result as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from miniplm.runtime.text import printable


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, with an empty one after it."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def shown(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def interval(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{low:+.4f} … {high:+.4f}"


def report(result: dict[str, Any]) -> str:
    """Tables of tables.py's result."""
    lines = [f"Version: {result['version']}", ""]
    for student, figures in result["students"].items():
        lines += [f"## Student {student}: {figures['decision']}", ""]
        if nats := figures.get("nats_per_token"):
            ends = interval(nats["low"], nats["high"])
            lines += [f"M − C in nats per token: {nats['mean']:+.4f} ({ends}).", ""]
        lines += arms(figures["arms"]) + contrasts(figures["contrasts"]) + costs(figures["costs"])
        lines += asked(figures["tasks"])
        if saved := figures["saving"]:
            factor = saved["factor"]
            factor = factor if isinstance(factor, str) else f"{factor:.2f}"
            lines += [f"C needs {factor} times M's tokens for M's bits per byte.", ""]
        if rate := figures.get("rate"):
            losses = ", ".join(f"{each}: {loss:.4f}" for each, loss in rate["in_pool_loss"].items())
            lines += [f"Learning rate {rate['rate']:g}; in-pool losses of C by rate: {losses}.", ""]
    if "kept" in result:
        lines += kept(result["kept"])
    return "\n".join(lines)


def arms(found: dict[str, Any]) -> list[str]:
    sets = list(next(iter(found.values()))["sets"])
    rows = [
        [arm, str(len(each["seeds"])), shown(each["primary"]), *(shown(each["sets"][name]) for name in sets)]
        for arm, each in found.items()
    ]
    lines = [
        "Bits per byte, means over seeds:",
        "",
        *table(["arm", "seeds", "mean of the sets", *sets], rows),
    ]
    rows = [[arm, *(shown(value) for value in each["seeds"].values())] for arm, each in found.items()]
    most = max(len(row) for row in rows) - 1
    head = ["arm", *(f"seed {place + 1}" for place in range(most))]
    lines += [
        "Mean of the sets by seed:",
        "",
        *table(head, [row + [""] * (most + 1 - len(row)) for row in rows]),
    ]
    domains = list(next(iter(found.values()))["in_pool_by_domain"])
    rows = [
        [arm, shown(each["in_pool"]), *(shown(each["in_pool_by_domain"].get(name)) for name in domains)]
        for arm, each in found.items()
    ]
    return lines + ["In-pool loss, nats per token:", "", *table(["arm", "all", *domains], rows)]


def contrasts(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{each['mean']:+.4f}",
            interval(each["low"], each["high"]),
            interval(*each["bootstrap"]) if "bootstrap" in each else "–",
            shown(each["p"], ".3g"),
            shown(each.get("holm"), ".3g"),
        ]
        for name, each in found.items()
    ]
    head = ["contrast", "mean", "95% over seeds", "95% over documents", "p", "p, Holm"]
    return ["Contrasts (bits per byte; in-pool: nats per token):", "", *table(head, rows)]


def costs(found: dict[str, Any]) -> list[str]:
    rows = [
        [arm, f"{each['tokens']:,}", f"{each['training']:.3g}", f"{each['all_in']:.3g}"]
        for arm, each in found.items()
    ]
    head = ["arm", "tokens", "FLOPs, training", "FLOPs, all-in"]
    return ["Cost of one student; all-in has the scores and the reference model:", "", *table(head, rows)]


def asked(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            arm,
            name,
            f"{each['accuracy']:.3f} ({each['low']:.3f} … {each['high']:.3f})" if "accuracy" in each else "–",
            shown(each["gold_bits_per_byte"]),
        ]
        for arm, tasks in found.items()
        for name, each in tasks.items()
    ]
    head = ["arm", "task", "accuracy, 95% over questions", "gold answers, bits per byte"]
    return ["Tasks:", "", *table(head, rows)] if rows else []


def kept(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{each['chunks']:,}", f"{each['kept']:.1%}", f"{each['score']:+.3f}"]
        for name, each in found["domains"].items()
    ]
    head = ["domain", "chunks", "kept by M", "mean score"]
    lines = ["## What M keeps", "", *table(head, rows)]
    for which, chunks in found["chunks"].items():
        lines += [f"### {which}", ""]
        for chunk in chunks:
            text = printable(" ".join(chunk["text"].split())[:200]).replace("|", r"\|").replace("`", "'")
            lines.append(f"- {chunk['score']:+.3f}, {chunk['domain']}: `{text}`")
        lines.append("")
    return lines
