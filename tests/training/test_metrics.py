"""metrics.jsonl, written and read: what a kill, a disk or a hand does to it."""

import json

import pytest

from miniplm.runtime.errors import UserError
from miniplm.training.metrics import Metrics, latest_figures, read_metrics
from miniplm.training.state import TrainState

LINES = [json.dumps({"step": step, "loss": step / 3}).encode() + b"\n" for step in (2, 4, 6, 8)]
"""As runs wrote them before lines had checksums."""
DAMAGED = {
    "no object": b"[6]",
    "null": b"null",
    "no step": b'{"loss": 2.0}',
    "a step in text": b'{"step": "6", "loss": 2.0}',
    "a step that is a flag": b'{"step": true, "loss": 2.0}',
    "a step below 1": b'{"step": 0, "loss": 2.0}',
    "NaN": b'{"step": 6, "loss": NaN}',
    "infinite": b'{"step": 6, "loss": 1e999}',
    "a figure in text": b'{"step": 6, "loss": "low"}',
    "a huge number": b'{"step": 6, "loss": ' + b"9" * 400 + b"}",
    "more digits than Python reads": b'{"step": 6, "loss": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "no UTF-8": b'{"step": 6, "lo\xff": 2.0}',
    "empty": b"",
    "half": LINES[2][:-9],
}


def test_lines_that_a_kill_cut_off_and_lines_of_later_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for cut, kept in [(LINES[3][:-9], 3), (LINES[3][:-1], 3), (LINES[3], 4), (b"", 3)]:
        path.write_bytes(b"".join(LINES[:3]) + cut)
        written = Metrics(tmp_path, TrainState(step=100))
        assert written.last == json.loads(LINES[kept - 1])
        written.close()
        assert path.read_bytes() == b"".join(LINES[:kept])
    written = Metrics(tmp_path, TrainState(step=5))
    written.write({"step": 6, "loss": 0.5})
    written.close()
    *old, last = path.read_bytes().splitlines(keepends=True)
    line = json.loads(last)
    assert old == LINES[:2] and len(line.pop("checksum")) == 16
    assert line == {"step": 6, "loss": 0.5, "after": 4} and read_metrics(tmp_path)[2].items() >= line.items()


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_lines_are_left_out_with_a_word(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:2]) + DAMAGED[damage] + b"\n" + LINES[3])
    whole = [json.loads(LINES[index]) for index in (0, 1, 3)]
    assert read_metrics(tmp_path) == whole
    assert capsys.readouterr().err == f"{path}: 1 damaged lines are left out\n"
    with pytest.raises(UserError, match=f"1 lines of {path} are damaged or missing: restore it"):
        latest_figures(tmp_path, ("loss",), 7)
    Metrics(tmp_path, TrainState(step=8)).close()
    assert f"{path}: 1 lines are damaged or missing; the others are kept\n" in capsys.readouterr().err
    assert path.read_bytes() == LINES[0] + LINES[1] + LINES[3]
    assert latest_figures(tmp_path, ("loss", "eval_loss"), step=7) == {"loss": (4, 4 / 3)}


@pytest.fixture
def sealed(tmp_path):
    """The file with four lines as they are written today."""
    metrics = Metrics(tmp_path, TrainState())
    for step in (2, 4, 6, 8):
        metrics.write({"step": step, "loss": step / 3, "skipped": True})
    metrics.close()
    return tmp_path / "metrics.jsonl"


def test_no_bit_of_a_line_flips_unseen(sealed, capsys):
    content, whole = sealed.read_bytes(), read_metrics(sealed.parent)
    for bit in range(0, 8 * len(content), 5):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        sealed.write_bytes(changed)
        same = read_metrics(sealed.parent) == whole  # the last digit of a number may not count
        assert same != ("damaged lines are left out" in capsys.readouterr().err), bit


def test_a_line_that_is_gone_or_elsewhere_is_told_once(sealed, capsys):
    lines = sealed.read_bytes().splitlines(keepends=True)
    for changed in (lines[:1] + lines[2:], [lines[0], lines[2], lines[1], lines[3]], [lines[0], *lines]):
        sealed.write_bytes(b"".join(changed))
        with pytest.raises(UserError, match="damaged or missing"):
            latest_figures(sealed.parent, ("loss",), 8)
        Metrics(sealed.parent, TrainState(step=8)).close()
        assert "damaged or missing" in capsys.readouterr().err
        assert latest_figures(sealed.parent, ("loss",), 8) == {"loss": (8, 8 / 3)}


def test_lines_that_are_lost_are_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for kept, lost in [(LINES, False), (LINES[:3], False), (LINES[:2], True), ([], True)]:
        path.write_bytes(b"".join(kept))
        Metrics(tmp_path, TrainState(step=8, last_logged_step=6)).close()
        assert (f"{path}: the last lines up to step 6 are lost" in capsys.readouterr().err) == lost


def test_latest_figures_of_an_early_step(tmp_path):
    assert read_metrics(tmp_path) == [] and latest_figures(tmp_path, ("loss",), 3) == {}
    lines = [{"step": 2, "loss": 1.5, "eval_loss": 2.5}, {"step": 4, "loss": None}, {"step": 6, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert latest_figures(tmp_path, ("loss", "eval_loss"), 5) == {"loss": (4, None), "eval_loss": (2, 2.5)}
    assert latest_figures(tmp_path, ("loss",), 6, logged=6) == {"loss": (6, 0.5)}
    assert latest_figures(tmp_path, ("loss",), 8, logged=7) == {}
