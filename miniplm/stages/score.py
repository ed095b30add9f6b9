"""Stage 2, score: corpus + teacher + reference model → score files.

For every chunk the mean log-probability of its unmasked tokens under each model, and their difference, the
score r(x) = mean log p_teacher(x) − mean log p_reference(x) in nats per token (Gu et al., arXiv 2410.17215).

The chunks of the corpus, or of a sample of it, are cut into files of `shard_chunks`; batches are packed
within a file only. So a file depends on nothing but its own chunks: a killed run continues at the first file
that is not there, and ends in the same bytes.
"""

from pathlib import Path
from typing import Any

import torch

from ..analysis.score_plan import ScorePlan, hashes_by_file, make_plan, whole_shards
from ..analysis.score_shards import load, score_shards
from ..analysis.scoring import Models
from ..config import ScoreConfig
from ..data.scores import ROLES, score_figures
from ..runtime.artifacts import (
    MANIFEST,
    complete_output,
    exclusive,
    open_output,
    reopen_output,
)
from ..runtime.progress import note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..training.cost import corpus_flops


def score(config: ScoreConfig) -> None:
    """Score every chunk of a corpus and print a summary.

    Raises:
        UserError: the corpus or a model is missing, incomplete or damaged; a model has another tokenizer or
            too small a head; the output folder holds another run.
    """
    plan = make_plan(config)
    complete = (plan.output / MANIFEST).exists() and open_output(plan.output, "score", plan.identity)
    whole, lost = whole_shards(plan)
    if complete and not lost:
        print(printable(f"The scores in {plan.output} are complete, nothing to do."))
        return
    plan, models, vocab_size, agreement = load(plan)
    if plan.reason:
        note(f"scoring in float32: {plan.reason}")
    open_output(plan.output, "score", plan.identity)  # claimed only now: a bad model leaves no folder behind
    with exclusive(plan.output), timed(plan.output):
        if damaged := [path for path in lost if path.exists()]:
            note(f"score file {damaged[0]} is damaged: its chunks are scored anew")
        elif complete:
            note(f"score file {lost[0]} is missing: its chunks are scored anew")
        reopen_output(plan.output, hashes_by_file(plan, whole))
        score_shards(plan, whole, models, vocab_size)
        _finish(plan, models, vocab_size, agreement)


# ---- the end ----


def _finish(plan: ScorePlan, models: Models, vocab_size: int, agreement: dict[str, Any] | None) -> None:
    """Mark the output complete, and print what came out."""
    figures = score_figures(plan.output, len(plan.shards), plan.columns[-1])
    results: dict[str, Any] = {role: _display_name(plan.names.get(role)) for role in ROLES}
    flops = corpus_flops(models, plan.corpus, plan.config.document_mask, plan.chunks)
    results |= {"vocab_size": vocab_size, **figures, "flops": flops}
    dtype = plan.identity["dtype"]
    lower, higher = (plan.config.precision, dtype) if plan.config.precision else (dtype, "float32")
    if agreement:
        results[f"{lower}_agreement"] = agreement
    complete_output(plan.output, {**results, "torch": torch.__version__})
    _print_summary(figures, plan.columns[-1], plan.output)
    if plan.config.sample is not None:
        print(f"A sample of {len(plan.corpus):,} chunks: miniplm proxy fit learns from it")
    if agreement and agreement["spearman"] is not None:
        print(
            f"{lower} against {higher} on {agreement['rows']:,} chunks: "
            f"{agreement['equal_selections']:.1%} selected or dropped alike at ratio 0.5, "
            f"Spearman's rank correlation {agreement['spearman']:.4f}"
        )


def _display_name(name: str | None) -> str | None:
    return Path(name).resolve().name if name and Path(name).exists() else name


def _print_summary(figures: dict[str, Any], column: str, output: Path) -> None:
    print(
        f"Scored {figures['rows']:,} chunks, {figures['tokens']:,} tokens; {figures['non_finite']:,} not "
        f"finite; scores in {printable(output)}"
    )
    if figures["mean"] is not None:
        below = f", {figures['below_zero']:.1%} of the chunks below 0" if column == "score" else ""
        print(f"Mean {column.replace('_', ' ')}: {figures['mean']:.4f} nats per token{below}")
