"""Parts of the report by hand: tokens of a megabyte, letters of several tokens, extremes, ticks."""

import numpy as np
import pytest

from miniplm.analysis.report.charts import Axis, line
from miniplm.analysis.report.chunks import coloured, split, style_of
from miniplm.analysis.report.scores import SLICE, extremes, histogram


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "漢字 🙂 é", "\x1b[31m\x00", "", "🙂" * 9])
def test_letters_of_several_ids_stay_together(text):
    parts = split(Bytes(), list(text.encode()))
    assert [part for part, _ in parts] == list(text)
    assert [count for _, count in parts] == [len(letter.encode()) for letter in text]


def test_bytes_that_are_no_letter_do_not_run_on():
    parts = split(Bytes(), [0xFF] * 40 + list(b"end"))
    assert sum(count for _, count in parts) == 43 and max(count for _, count in parts) <= 8
    assert "".join(text for text, _ in parts).endswith("end")


def test_a_long_token_is_cut_and_a_letter_has_the_mean_of_its_ids():
    values = np.array([np.nan, 1.0, 2.0, np.nan, -4.0])
    pieces = coloured([("x" * 1_000_000, 1), ("é", 2), ("a", 1), ("b", 1)], values)
    assert len(pieces[0][0].text) == 81
    assert [piece.value for piece, _ in pieces] == [None, 1.5, None, -4.0]
    assert [piece.style for piece, _ in pieces] == ["", "p3", "", "n4"]
    assert style_of(0.2) == style_of(-0.2) == "" and style_of(-0.25) == "n1"


def test_extremes_and_bins_over_many_slices():
    rng = np.random.default_rng(0)
    score = rng.normal(size=2 * SLICE + 5).astype(np.float32)
    score[::7] = np.nan
    among = rng.random(len(score)) < 0.5
    best, worst = extremes(score, among, 4)
    finite = np.flatnonzero(among & np.isfinite(score))
    order = finite[np.argsort(score[finite], kind="stable")]
    assert best.tolist() == order[::-1][:4].tolist() and worst.tolist() == order[:4].tolist()
    edges = np.linspace(-1, 1, 9)
    inside = np.clip(score[np.isfinite(score)].astype(np.float64), -1, np.nextafter(1, 0))
    assert histogram(score, edges).tolist() == np.histogram(inside, edges)[0].tolist()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 4.1), (5.61, 5.64), (0, 8e6), (-1e-7, 1e-7)])
def test_ticks_are_round_and_within(low, high):
    ticks = Axis("x", low, high).ticks
    assert 2 <= len(ticks) <= 6 and all(-1e-6 <= at <= 100 + 1e-6 for at, _ in ticks)
    for at, label in ticks:
        assert float(label.replace(",", "")) == pytest.approx(low + at / 100 * (high - low), abs=1e-9)


def test_a_line_breaks_where_a_figure_is_missing():
    x = y = Axis("", 0, 10)
    path = line([(0, 0), (5, 10), (6, None), (7, 5)], x, y)
    assert path == "M0.0 1000.0L500.0 0.0M700.0 500.0"
    assert line([(5, 5)], x, y).endswith("h0") and line([(1, None)], x, y) == ""
    assert line([(at / 1_000, 1.0) for at in range(5_000)], x, y).count("L") < 400
