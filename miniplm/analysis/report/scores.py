"""The scores of a report: their distribution, teacher against reference, and which chunks were kept.

Arrays of the size of the corpus are read once and gone through in slices: 20M chunks take about a gigabyte.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...data.corpus import Corpus
from ...data.sampling import sampled_chunks
from ...data.scores import ROLES, SCORE_COLUMNS, read_scores
from ...runtime.errors import UserError
from .charts import bounds

BINS, CELLS = 72, 56  # of the distribution; of the density, on each side
SLICE = 2**20  # chunks that are looked at together
SAMPLE = 2**20  # chunks that settle what the axes show
TAILS_PERCENT = (0.2, 99.8)  # what lies beyond is counted in the first and the last bin

Folder = tuple[Path, dict[str, Any]]  # a score folder and its manifest


@dataclass
class Scored:
    """The scores of a corpus, from one folder with both models or from two.

    columns: SCORE_COLUMNS, float32 [chunks], NaN where there is none; corpus: None where it is not found.
    """

    folders: list[Folder]
    corpus: Corpus | None
    columns: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return " and ".join(path.name for path, _ in self.folders)

    @property
    def score(self) -> np.ndarray:
        return self.columns["score"]

    @cached_property
    def edges(self) -> np.ndarray:
        """float64 [BINS + 1], of the bins of the distribution."""
        return np.linspace(*_range(self.score), BINS + 1)

    @cached_property
    def distribution(self) -> np.ndarray:
        """int64 [BINS], how many chunks have a score in each bin."""
        return histogram(self.score, self.edges)

    @cached_property
    def density(self) -> tuple[np.ndarray, list[tuple[float, float]]] | None:
        """(int64 [CELLS, CELLS], chunks by the reference's and the teacher's log-probability; what the two
        axes show). None where the models' own are not there."""
        teacher, reference = (self.columns[f"{role}_log_prob"] for role in ROLES)
        if not all(np.isfinite(_thinned(each)).any() for each in (teacher, reference)):
            return None
        ranges = [_range(reference), _range(teacher)]
        counts = np.zeros(CELLS * CELLS, np.int64)
        for part in _slices(len(teacher)):
            both = np.isfinite(teacher[part]) & np.isfinite(reference[part])
            x, y = (
                _bin(each[part][both], *limits, CELLS)
                for each, limits in zip((reference, teacher), ranges, strict=True)
            )
            counts += np.bincount(x * CELLS + y, minlength=CELLS * CELLS)
        return counts.reshape(CELLS, CELLS), ranges

    def is_kept(self, refined: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [chunks]: whether a refined corpus has a chunk with these scores. (Its rows do not say which
        they were; a chunk that was dropped with the very scores of a kept one counts as kept.)"""
        wanted = np.sort(_keys(refined, slice(None)))
        result = np.zeros(len(self.score), bool)
        for part in _slices(len(result)):
            keys = _keys(self.columns, part)
            order = np.argsort(keys)  # in order they are found many times as fast
            places = np.searchsorted(wanted, keys[order])
            found = wanted[np.minimum(places, len(wanted) - 1)] == keys[order]
            result[part][order] = found
        return result


def read_scored(folders: list[Folder], corpus: Corpus | None) -> Scored:
    """The scores in these folders.

    Raises:
        UserError: they are damaged, or of a sample of a corpus that is not there.
    """
    path, manifest = folders[0]
    rows, sample = manifest["rows"], None
    if (share := manifest["identity"].get("sample")) is not None:
        if corpus is None:
            raise UserError(f"the corpus that {path.name} holds a sample of is not beside it")
        sample, rows = sampled_chunks(corpus, share, manifest["identity"]["seed"]), len(corpus)
    if len(folders) == 1:
        columns = read_scores(path, rows, SCORE_COLUMNS, manifest.get("files"), sample)
        return Scored(folders, corpus, {name: columns[name] for name in SCORE_COLUMNS})
    columns = {}
    for (path, manifest), name in zip(folders, SCORE_COLUMNS, strict=False):
        columns[name] = read_scores(path, rows, [name], manifest.get("files"))[name]
    with np.errstate(invalid="ignore"):  # inf − inf
        columns["score"] = columns["teacher_log_prob"] - columns["reference_log_prob"]
    return Scored(folders, corpus, columns)


def refined_columns(corpus: Corpus) -> dict[str, np.ndarray]:
    """SCORE_COLUMNS of a refined corpus, float32 [chunks], NaN where there is none."""
    return {name: corpus.table.column(name).to_numpy() for name in SCORE_COLUMNS}


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """int64 [bins], how many finite values are in each bin of equal width; what lies beyond the edges counts
    in the first and the last."""
    counts = np.zeros(len(edges) - 1, np.int64)
    for part in _slices(len(values)):
        some = values[part][np.isfinite(values[part])]
        counts += np.bincount(_bin(some, edges[0], edges[-1], len(counts)), minlength=len(counts))
    return counts


def extremes(score: np.ndarray, among: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(those with the highest, those with the lowest finite score, the most extreme first) of the chunks
    where `among` (bool [chunks]) holds: int64."""
    best, worst, negated = np.zeros(0, np.int64), np.zeros(0, np.int64), -score
    for part in _slices(len(score)):
        rows = np.flatnonzero(among[part] & np.isfinite(score[part])) + part.start
        best = _lowest(negated, np.concatenate([best, rows]), count)
        worst = _lowest(score, np.concatenate([worst, rows]), count)
    return best, worst


def _lowest(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Of these rows the `count` with the lowest values, the lowest first."""
    if len(rows) > count:
        rows = rows[np.argpartition(values[rows], count - 1)[:count]]
    return rows[np.lexsort((rows, values[rows]))]


def _keys(columns: Mapping[str, np.ndarray], part: slice) -> np.ndarray:
    """uint64: the bits of the score and of the teacher's log-probability, of which the reference's
    follows."""
    score, teacher = (
        np.ascontiguousarray(np.nan_to_num(columns[name][part], nan=0.0), np.float32).view(np.uint32)
        for name in ("score", "teacher_log_prob")
    )
    return (score.astype(np.uint64) << np.uint64(32)) | teacher


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, min(start + SLICE, length)) for start in range(0, length, SLICE))


def _thinned(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, len(values) // SAMPLE)]


def _range(values: np.ndarray) -> tuple[float, float]:
    """What an axis shows: all but the tails."""
    finite = _thinned(values)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        raise UserError("no chunk has a finite score")
    low, high = np.percentile(finite.astype(np.float64), TAILS_PERCENT).tolist()
    return bounds(low, high)


def _bin(values: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    """int64, the bin of each finite value."""
    places = (values.astype(np.float64) - low) * (bins / (high - low))
    return np.clip(places, 0, bins - 1).astype(np.int64)
