"""Stage 2, score: corpus + teacher + reference model → score files.

For every chunk the mean log-probability of its unmasked tokens under each model, and their difference, the
score r(x) = mean log p_teacher(x) − mean log p_reference(x) in nats per token (Gu et al., arXiv 2410.17215).

The chunks of the corpus, or of a sample of it, are cut into files of `shard_chunks`; batches are packed
within a file only. So a file depends on nothing but its own chunks: a killed run continues at the first file
that is not there, and ends in the same bytes. For the same reason several processes (ranks) share the files
without waiting for one another: each writes every world-th one and its hash beside it, and who finds that all
are there completes the manifest.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..analysis.score_plan import ScorePlan, hashes_by_file, make_plan, whole_shards
from ..analysis.score_ray import RayScorer, joined, ray_device
from ..analysis.score_shards import Scorer
from ..config import ScoreConfig
from ..data.scores import ROLES, remove_shard_hashes, score_figures, unfinished_shards
from ..runtime.artifacts import (
    MANIFEST,
    complete_output,
    exclusive,
    open_output,
    recorded,
    remove_free_locks,
    reopen_output,
)
from ..runtime.distributed import Place
from ..runtime.errors import UserError
from ..runtime.launchers import place_among_shards
from ..runtime.locks import PATIENCE, Occupied, lock
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed


def score(config: ScoreConfig) -> None:
    """Score every chunk of a corpus and print a summary.

    Raises:
        UserError: the corpus or a model is missing, incomplete or damaged; a model has another tokenizer or
            too small a head; the output folder holds another run.
    """
    with joined(config.ray) as ray:
        _score(config, ray)


def _score(config: ScoreConfig, ray: Any) -> None:
    place = Place() if ray else place_among_shards(config.rank, config.world)
    plan = make_plan(config, place, ray_device(ray, config.device) if ray else None)
    complete = (plan.output / MANIFEST).exists() and open_output(plan.output, "score", plan.identity)
    whole, lost = whole_shards(plan, plan.own)
    if complete and not lost:
        print(printable(f"The scores in {plan.output} are complete, nothing to do."))
        return
    if place.world > 1:
        note(f"process {place.rank} of {place.world}: {len(plan.own)} of {len(plan.shards)} score files")
        if not lost and _left_to_others(plan):
            return
    scorer = RayScorer(ray, plan) if ray else Scorer(plan)
    plan = scorer.plan
    if plan.reason:
        note(f"scoring in float32: {plan.reason}")
    # Claimed only now: a bad model leaves no folder behind.
    open_output(plan.output, "score", plan.identity, wait=PATIENCE if place.world > 1 else 0.0)
    with _at_work(plan), timed(plan.output):
        if damaged := [path for path in lost if path.exists()]:
            note(f"score file {damaged[0]} is damaged: its chunks are scored anew")
        elif complete:
            note(f"score file {lost[0]} is missing: its chunks are scored anew")
        if place.world == 1:
            reopen_output(plan.output, hashes_by_file(plan, whole))
        whole |= _score_lost(scorer, whole)
        if place.world == 1:
            _finish(scorer, whole)
        elif not _left_to_others(plan):
            _finish_alone(scorer)


def _at_work(plan: ScorePlan) -> contextlib.AbstractContextManager[None]:
    """Keep out who would do the same: of a process alone any other alone, of one of several its double."""
    rank, world, _ = plan.place
    if world == 1:
        return exclusive(plan.output)
    refusal = f"process {rank} of {world} is writing to {plan.output} already: wait for it, or stop it"
    return lock(plan.output / f".rank-{rank}-of-{world}.lock.tmp", refusal)


def _score_lost(scorer: Scorer | RayScorer, whole: dict[int, list[str]]) -> dict[int, list[str]]:
    """Score the files of this process that are not whole, and return their hashes."""
    plan = scorer.plan
    positions = plan.corpus.num_tokens - 1
    sizes = {number: int(positions[plan.shards[number]].sum()) for number in plan.own}
    done = sum(sizes[number] for number in whole)
    with Progress("score", sum(sizes.values()), done=done) as progress:
        todo = [number for number in plan.own if number not in whole]
        return scorer.score(todo, progress.update)


def _left_to_others(plan: ScorePlan) -> bool:
    """Whether files are missing that are other processes'; says so."""
    if missing := unfinished_shards(plan.output, recorded(plan.output), len(plan.shards)):
        print(
            printable(
                f"The files of process {plan.place.rank} of {plan.place.world} are done; "
                f"{len(missing)} of {len(plan.shards)} in {plan.output} are not ({missing[0].name}, …): "
                f"who is last completes the folder, and any number of processes finishes what is left"
            )
        )
    return bool(missing)


# ---- the end ----


def _finish_alone(scorer: Scorer | RayScorer) -> None:
    """Complete the folder, unless another process does, or has done so."""
    plan = scorer.plan
    try:
        with exclusive(plan.output):
            if not open_output(plan.output, "score", plan.identity):
                whole, lost = whole_shards(plan, range(len(plan.shards)))
                if lost:
                    raise UserError(f"{lost[0]} is not as written: run score again, it writes it anew")
                reopen_output(plan.output, hashes_by_file(plan, whole))
                _finish(scorer, whole)
            remove_shard_hashes(plan.output)
    except Occupied:
        print(printable(f"All scores are there; another process completes {plan.output}."))


def _finish(scorer: Scorer | RayScorer, whole: dict[int, list[str]]) -> None:
    """Mark the output complete, and print what came out."""
    plan, agreement = scorer.plan, scorer.agreement
    figures = score_figures(plan.output, len(plan.shards), plan.columns[-1])
    results: dict[str, Any] = hashes_by_file(plan, whole)
    results |= {role: _display_name(plan.names.get(role)) for role in ROLES}
    results |= {"vocab_size": scorer.vocab_size, **figures, "flops": scorer.flops()}
    dtype = plan.identity["dtype"]
    lower, higher = (plan.config.precision, dtype) if plan.config.precision else (dtype, "float32")
    if agreement:
        results[f"{lower}_agreement"] = agreement
    complete_output(plan.output, {**results, "torch": torch.__version__})
    remove_shard_hashes(plan.output)
    remove_free_locks(plan.output)
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
