"""How well predicted scores agree with the models' own, on chunks that were held out."""

from typing import Any

import numpy as np

from ..data.selection import rank_agreement
from ..runtime.progress import note

BINS = 10  # of the calibration, of equal numbers of chunks
MIN_SPEARMAN = (
    0.7  # below it a warning; the paper's smallest reference model (45M) ranks like one of 500M at 0.77
)


def held_out_agreement(true: np.ndarray, predicted: np.ndarray, ratio: float) -> dict[str, Any]:
    """The agreement of predictions with scores, float64 [R] each, nats per token.

    Returns:
        what rank_agreement does; "ratio"; "slope" and "intercept" of the straight line through the scores
        over the predictions (1 and 0 where they are calibrated; None where all predictions are equal);
        "bins", from the lowest predictions to the highest: {"rows", "predicted", "true"}, means of both.
    """
    found = rank_agreement(true, predicted, ratio) | {"ratio": ratio, "slope": None, "intercept": None}
    spread = predicted - predicted.mean()
    if squares := float(spread @ spread):
        found["slope"] = float(spread @ true) / squares
        found["intercept"] = float(true.mean() - found["slope"] * predicted.mean())
    parts = np.array_split(np.argsort(predicted, kind="stable"), min(BINS, len(true)))
    found["bins"] = [
        {"rows": len(part), "predicted": float(predicted[part].mean()), "true": float(true[part].mean())}
        for part in parts
    ]
    return found


def print_agreement(agreement: dict[str, Any]) -> None:
    """The figures of held_out_agreement, with a warning where they are low."""
    from rich.console import Console
    from rich.table import Table

    table = Table("predicted", "scored", title="Held-out chunks, means of tenths (nats per token)")
    for part in agreement["bins"]:
        table.add_row(f"{part['predicted']:.4f}", f"{part['true']:.4f}")
    Console().print(table)
    spearman, slope = agreement["spearman"], agreement["slope"]
    line = "" if slope is None else f"; score = {slope:.3f} · prediction {agreement['intercept']:+.4f}"
    print(
        f"{agreement['rows']:,} held-out chunks: Spearman's rank correlation {spearman:.4f}, "
        f"{agreement['equal_selections']:.1%} selected or dropped alike at ratio {agreement['ratio']}{line}"
    )
    if spearman < MIN_SPEARMAN:
        note(
            f"the predictions agree poorly with the scores: rank correlation {spearman:.4f}, below "
            f"{MIN_SPEARMAN}: score a larger sample, or score the corpus itself"
        )
