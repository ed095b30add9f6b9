"""benchmarks/score.py at toy size, on a CPU that has instructions for bfloat16 or passes for one."""

import json
import sys

import pytest

TOY = "--teacher 16,32,1,2 --reference 8,16,1,2 --vocab-size 8000 --rows 8 --max-length 64 --repeats 1"


@pytest.mark.slow
def test_contenders(module, monkeypatch, tmp_path, capsys):
    score = module("score")
    monkeypatch.setattr(score, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(sys, "argv", ["score.py", *TOY.split(), "--json", str(tmp_path / "report.json")])
    score.main()
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert all(report[name]["tokens_per_second"] > 0 for name in ("padded", "miniplm", "bfloat16"))
    assert report["largest_difference"] < 1e-4
    agreement = report["bfloat16_agreement"]
    assert agreement["rows"] == 8 and 0.5 < agreement["spearman"] <= 1
    assert "bfloat16: " in printed and "of 8 chunks selected or dropped alike" in printed
