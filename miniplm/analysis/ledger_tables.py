"""The ledger for reading: a table of costs, and a sentence for each comparison."""

from typing import Any

from tqdm import tqdm

from ..runtime.text import printable

NOT_RECORDED = "not recorded"


def print_tables(result: dict[str, Any]) -> None:
    """Print what `ledger` returns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    runs = result["runs"]
    table = Table("", title="What runs cost: training as the paper counts it, and all-in")
    for run in runs:
        table.add_column(Text(printable(run["name"])), justify="right", overflow="fold")
    for label, cells in [
        ("steps", [f"{run['steps']:,}" for run in runs]),
        ("tokens seen", [f"{run['tokens']:,}" for run in runs]),
        ("held-out loss", [shown(run["eval_loss"], ".4f") for run in runs]),
        ("training FLOPs", [shown(run["training_flops"], ".4g") for run in runs]),
        ("all-in FLOPs", [shown(run["all_in_flops"], ".4g", _unknown(run)) for run in runs]),
        ("training time", [time_shown(run["training_seconds"]) for run in runs]),
        ("all-in time", [time_shown(run["all_in_seconds"], _unknown(run)) for run in runs]),
    ]:
        table.add_row(label, *cells)
    Console().print(table)
    for run in runs:
        for entry in run["offline"]:
            cost = f"{shown(entry['flops'], '.4g')} FLOPs, {time_shown(entry['seconds'])}"
            print(printable(f"offline work for {run['name']}: {entry['stage']} {entry['name']}: {cost}"))
        for missing in run["missing"]:
            print(printable(f"{run['name']}: not found: {missing}: name its folder with --inputs"))
    for comparison in result["comparisons"]:
        print(printable(sentence(comparison)))


def sentence(comparison: dict[str, Any]) -> str:
    """A comparison (of ledger, with "run" and "baseline") in words."""
    names = f"{comparison['run']} against {comparison['baseline']}"
    if "reason" in comparison:
        return f"{names}: not compared: {comparison['reason']}"
    saving, tokens, all_in = (
        shown(comparison[key], ".2f") for key in ("saving", "token_saving", "all_in_saving")
    )
    repaid = comparison["students"]
    end = {None: "", 0: "; there is none to repay", "never": "; never repaid"}.get(
        repaid, f"; repaid from {repaid} students on"
    )
    return (
        f"{names}, where both reach a held-out loss of {comparison['loss']:.4f}: saving factor {saving} in "
        f"training FLOPs, {tokens} in tokens; {all_in} with the offline work for one student{end}"
    )


def _unknown(run: dict[str, Any]) -> str:
    """Why an all-in cost is not known."""
    return "incomplete" if run["missing"] else NOT_RECORDED


def shown(value: float | None, form: str, unknown: str = NOT_RECORDED) -> str:
    """A figure in this form, or the word for one that is not known."""
    return unknown if value is None else format(value, form)


def time_shown(seconds: float | None, unknown: str = NOT_RECORDED) -> str:
    """Hours, minutes and seconds, or the word for a time that is not known."""
    return unknown if seconds is None else tqdm.format_interval(seconds)
