"""metrics.jsonl, written and read."""

import json

from miniplm.training.metrics import Metrics
from miniplm.training.state import TrainState


def test_metrics_of_a_cut_off_line_and_of_later_steps_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in (2, 4, 6, 8)]
    for cut, kept in [
        (lines[3][:-9], lines[:3]),
        (lines[3][:-1], lines[:3]),
        (lines[3], lines[:4]),
        ("", lines[:3]),
    ]:
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + cut)
        written = Metrics(tmp_path, TrainState(step=100))
        assert written.last == json.loads(kept[-1])
        written.close()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
    written = Metrics(tmp_path, TrainState(step=5))
    written.write({"step": 6, "loss": 0.5})
    written.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2]) + '{"step": 6, "loss": 0.5}\n'
