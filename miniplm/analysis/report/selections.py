"""The scores of a report and what was selected by them, ready for the page."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...data.corpus import Corpus
from ...data.scores import ROLES, WRITERS
from ...runtime.artifacts import MANIFEST
from ...runtime.errors import UserError
from ...runtime.progress import note
from ...runtime.schema import Count, Record, read_record
from ..provenance import Rule
from ..provenance import Selection as SelectionCounts
from .charts import SIZE, Axis, Chart, Layer, bars, density
from .chunks import ChunkReader, Examples
from .scores import Folder, Scored, histogram, read_scored, refined_columns
from .sources import Sources

MAX_DOMAINS = 40  # rows of a table; a corpus can have thousands of domains
MAX_SELECTIONS = 6  # of one corpus's scores


class _Counts(Record):
    kept: Count
    dropped: Count
    kept_tokens: Count
    dropped_tokens: Count


class _Counted(SelectionCounts):
    """What the manifest of a refined corpus says of the selection."""

    domains: dict[str, _Counts]


class Share(NamedTuple):
    """What was kept of a domain."""

    domain: str
    kept: int
    chunks: int
    kept_tokens: int
    tokens: int

    @property
    def percent(self) -> float:
        return 100 * self.kept / self.chunks if self.chunks else 0.0

    @property
    def token_percent(self) -> float:
        return 100 * self.kept_tokens / self.tokens if self.tokens else 0.0


class Bin(NamedTuple):
    low: float
    high: float
    kept: int
    dropped: int


class Selection(NamedTuple):
    """A refined corpus; cut: the lowest score that was kept, None where there is no one cut; more: domains
    that are not listed."""

    name: str
    rule: str
    whole: Share
    shares: list[Share]
    more: int
    cut: float | None
    chart: Chart | None
    bins: list[Bin]
    examples: list[Examples]
    is_coloured: bool


class ScoredSection(NamedTuple):
    """The scores of a corpus and what was selected by them."""

    name: str
    models: list[tuple[str, str, str]]  # role, name, hash
    rows: int
    finite: int
    mean: float | None
    below_zero: float | None
    chart: Chart | None  # where nothing was selected
    bins: list[Bin]
    density: Chart | None
    selections: list[Selection]


def scored_sections(sources: Sources) -> list[ScoredSection]:
    """One for each scoring of a corpus; why something is missing goes to sources.left_out."""
    groups: dict[tuple[Path, ...], list[Path]] = {}
    selected = sources.of("select").items()
    # those by score first, controls at random after them
    for path, manifest in sorted(selected, key=lambda each: "random_seed" in each[1]["identity"]["rule"]):
        identities = manifest["identity"]["scores"].values()
        found = [sources.scores(identity) for identity in identities]
        if None in found:
            sources.left_out.append(f"Scores behind {path.name}: they are not beside it.")
        groups.setdefault(tuple(dict.fromkeys(each for each in found if each)), []).append(path)
    used = {path for group in groups for path in group}
    groups |= {(path,): [] for path in sources.of(*WRITERS) if path not in used}
    if not groups:
        sources.left_out.append("Scores and selection: no output of score or select is here.")
    sections = []
    for folders, selections in groups.items():
        try:
            sections.append(_section(sources, folders, selections))
        except UserError as error:
            note(str(error))
            names = " and ".join(path.name for path in (*folders, *selections))
            sources.left_out.append(f"{names}: damaged, or a part of it is missing or not finite.")
    return sections


def _section(sources: Sources, paths: tuple[Path, ...], refined: list[Path]) -> ScoredSection:
    folders: list[Folder] = [(path, sources.outputs[path]) for path in paths]
    scored, name = None, " and ".join(path.name for path in paths)
    roles = {role for _, each in folders for role in ROLES if each["identity"].get(role)}
    if folders and (len(roles) == len(ROLES) or folders[0][1]["identity"].get("proxy")):
        place = sources.corpus(folders[0][1]["identity"]["corpus"])
        if place is None:
            sources.left_out.append(f"Chunks to read: the corpus that {name} is of is not beside it.")
        scored = read_scored(folders, Corpus(place) if place else None)
    elif folders:
        sources.left_out.append(f"Difference score of {name}: it holds one model's scores alone.")
    if len(refined) > MAX_SELECTIONS:
        sources.left_out.append(f"{len(refined) - MAX_SELECTIONS} more selections by {name}.")
    reader = ChunkReader(scored, scored.corpus) if scored and scored.corpus and refined else None
    selections = [_selection(sources, path, scored, reader) for path in refined[:MAX_SELECTIONS]]
    if reader and not reader.is_coloured:
        sources.left_out.append(f"Colours of the tokens of {name}: it was not scored with --tokens.")
    finite = scored.score[np.isfinite(scored.score)] if scored else np.zeros(0, np.float32)
    cut = next((each.cut for each in selections if each.cut is not None), None)
    return ScoredSection(
        name=name,
        models=[
            (role, str(each.get(role)), str(each["identity"][role]))
            for _, each in folders
            for role in ROLES
            if each["identity"].get(role)
        ],
        rows=len(scored.score) if scored else 0,
        finite=len(finite),
        mean=float(finite.mean(dtype=np.float64)) if len(finite) else None,
        below_zero=float((finite < 0).mean()) if len(finite) else None,
        chart=_distribution(scored, None, None) if scored and not refined else None,
        bins=_bins(scored, None) if scored and not refined else [],
        density=_density(scored, cut) if scored else None,
        selections=selections,
    )


def _selection(sources: Sources, path: Path, scored: Scored | None, reader: ChunkReader | None) -> Selection:
    manifest = sources.outputs[path]
    what = f"{path / MANIFEST} is not as select wrote it"
    counted = read_record(_Counted, manifest["selection"], what, "run select again")
    shares = [_share(name, each) for name, each in counted.domains.items()]
    shares.sort(key=lambda each: -each.chunks)
    chart, bins, examples, cut = None, [], list[Examples](), None
    by_score = counted.rule.random_seed is None
    if scored:
        columns = refined_columns(Corpus(path))
        kept = histogram(columns["score"], scored.edges)
        cut = float(columns["score"].min()) if _has_one_cut(counted.rule) else None
        chart = _distribution(scored, kept, cut)
        bins = _bins(scored, kept)
        if reader and by_score:
            examples = reader.examples(scored.is_kept(columns))
    coloured = bool(reader and reader.is_coloured)
    return Selection(
        path.name,
        _rule_in_words(counted.rule),
        _share("all", counted),
        shares[:MAX_DOMAINS],
        len(shares[MAX_DOMAINS:]),
        cut,
        chart,
        bins,
        examples,
        coloured,
    )


def _share(name: str, counts: _Counts | _Counted) -> Share:
    chunks, tokens = counts.kept + counts.dropped, counts.kept_tokens + counts.dropped_tokens
    return Share(name, counts.kept, chunks, counts.kept_tokens, tokens)


def _has_one_cut(rule: Rule) -> bool:
    """Whether what was dropped scores lower than what was kept (but for chunks that were too short or
    repeated)."""
    return (
        rule.random_seed is None
        and rule.score == "difference"
        and rule.aggregate == "mean"
        and not (rule.per_domain or rule.domain_shares or rule.temperature or rule.document_scores)
    )


def _rule_in_words(rule: Rule) -> str:
    if rule.ratio is not None:
        kept = f"a share of {rule.ratio:g}"
    elif rule.token_budget is not None:
        kept = f"what fits into {rule.token_budget:,} tokens"
    else:
        kept = f"scores of at least {rule.threshold:g}"
    parts = [
        kept,
        "of each domain" if rule.per_domain else "",
        f"at random (seed {rule.random_seed})" if rule.random_seed is not None else "",
        f"by {rule.score}" if rule.score != "difference" else "",
        f"drawn at temperature {rule.temperature:g}" if rule.temperature else "",
        f"{rule.aggregate} over the tokens" if rule.aggregate != "mean" else "",
        "whole documents compared" if rule.document_scores else "",
        f"domains in settled shares ({len(rule.domain_shares)})" if rule.domain_shares else "",
        f"chunks of at least {rule.min_tokens:,} tokens" if rule.min_tokens is not None else "",
        f"at most {rule.max_repeats:,} of near-duplicates" if rule.max_repeats else "",
    ]
    return ", ".join(part for part in parts if part)


# ---- charts ----


def _bins(scored: Scored, kept: np.ndarray | None) -> list[Bin]:
    """The distribution as a table."""
    kept = np.zeros_like(scored.distribution) if kept is None else kept
    edges, dropped = scored.edges.tolist(), (scored.distribution - kept).tolist()
    return [Bin(*each) for each in zip(edges[:-1], edges[1:], kept.tolist(), dropped, strict=True)]


def _distribution(scored: Scored, kept: np.ndarray | None, cut: float | None) -> Chart:
    edges, every = scored.edges, scored.distribution
    x = Axis("difference score, nats per token", float(edges[0]), float(edges[-1]))
    y = Axis("chunks", 0.0, max(1.0, float(every.max()) * 1.06))
    if kept is None:
        layers, legend = [Layer("bar kept", bars(every, np.zeros_like(every), y))], []
    else:
        dropped = every - kept
        layers = [
            Layer("bar dropped", bars(dropped, np.zeros_like(every), y)),
            Layer("bar kept", bars(kept, dropped, y)),
        ]
        legend = [("bar kept", "kept"), ("bar dropped", "dropped")]
    marker = None
    if cut is not None and x.low <= cut <= x.high:
        marker = x.at(cut) / SIZE * 100, f"cut {cut:.3f}"
    return Chart("Distribution of the difference score", x, y, layers, marker, legend=legend)


def _density(scored: Scored, cut: float | None) -> Chart | None:
    """Chunks by both models, with the line of equal log-probabilities and that of the cut."""
    if scored.density is None:
        return None
    counts, ranges = scored.density
    x, y = (
        Axis(f"{role}, nats per token", *limits)
        for role, limits in zip(("reference", "teacher"), ranges, strict=True)
    )
    layers, legend = density(counts), [("diagonal", "both alike")]
    layers.append(Layer("diagonal", _line_above(0.0, x, y)))
    if cut is not None:
        layers.append(Layer("cut", _line_above(cut, x, y)))
        legend.append(("cut", "the cut: kept above it"))
    return Chart("Teacher against reference, log-probability", x, y, layers, legend=legend)


def _line_above(difference: float, x: Axis, y: Axis) -> str:
    """The line teacher = reference + difference."""
    ends = (x.low, x.low + difference), (x.high, x.high + difference)
    (x0, y0), (x1, y1) = ((x.at(a), SIZE - y.at(b)) for a, b in ends)
    return f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"
