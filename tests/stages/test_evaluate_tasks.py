"""evaluate --tasks: what it writes, takes as it is, and refuses."""

import json
import random

import pytest
import yaml
from texts import WORDS, make_text

from miniplm.analysis.evaluation import read_evaluation, with_checksum
from miniplm.cli import main
from miniplm.config import EvaluateConfig
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import evaluate as stage
from miniplm.stages.evaluate import evaluate

pytest.importorskip("lm_eval")


@pytest.fixture
def task(tmp_path) -> str:
    """The .yaml file of a task of 20 questions."""
    rng, path = random.Random(2), tmp_path / "rain.yaml"
    rows = [
        {"question": make_text(rng, 8), "choices": rng.sample(WORDS, 3), "label": rng.randrange(3)}
        for _ in range(20)
    ]
    (tmp_path / "rain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "task": "rain",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rain.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(model, **settings) -> dict:
    return evaluate(EvaluateConfig(model=model, device="cpu", dtype="float32", **settings))


def test_losses_and_tasks_in_one_file(task, tiny_corpus, tiny_model, tmp_path, capsys, monkeypatch):
    model, output = tiny_model(tmp_path / "model"), str(tmp_path / "figures.json")
    both = run(model, data=tiny_corpus, tasks=(task,), output=output)
    shown = capsys.readouterr().out
    assert "acc_norm" in shown and "perplexity" in shown
    assert read_json(output) == both
    alone = {key: value for key, value in run(model, data=tiny_corpus).items() if key != "checksum"}
    assert alone.items() <= both.items()
    assert read_evaluation(output).loss == alone["loss"]  # what export takes for the card
    assert both["tasks"]["rain"]["questions"] == 20 and both["harness"].startswith("lm-eval ")
    assert both["average"] == both["tasks"]["rain"]["value"]
    monkeypatch.setattr(stage, "run_tasks", None)  # nothing is computed again
    assert run(model, data=tiny_corpus, tasks=(task,), output=output) == both


def test_tasks_alone(task, tiny_model, tmp_path, capsys):
    model, output = tiny_model(tmp_path / "model"), str(tmp_path / "figures.json")
    result = run(model, tasks=(task,), output=output)
    assert "corpus" not in result and "loss" not in result
    assert "perplexity" not in capsys.readouterr().out
    assert run(model, tasks=(task,), output=output) == result
    assert "is complete, nothing to do" in capsys.readouterr().out
    changed = {**result, "tasks": {"rain": {**result["tasks"]["rain"], "value": 1.0}}}
    for content, message in [
        (changed, "not as evaluate wrote it"),
        (with_checksum({"asked": {"rain": "other"}}), "holds something other than this evaluation"),
    ]:
        (tmp_path / "figures.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            run(model, tasks=(task,), output=output)


def test_other_questions_are_another_evaluation(task, tiny_model, tmp_path):
    model, output = tiny_model(tmp_path / "model"), str(tmp_path / "figures.json")
    run(model, tasks=(task,), output=output)
    rows = (tmp_path / "rain.jsonl").read_text().splitlines()
    (tmp_path / "rain.jsonl").write_text("\n".join(rows[:-1]))
    with pytest.raises(UserError, match="holds something other than this evaluation"):
        run(model, tasks=(task,), output=output)


def test_on_the_command_line(task, tiny_model, tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    assert main(["evaluate", "--model", model, "--tasks", task, "--device", "cpu"]) == 0
    assert "rain" in capsys.readouterr().out
    assert main(["evaluate", "--model", model]) == 2
    assert "give data, tasks, or both" in capsys.readouterr().err
    assert main(["evaluate", "--model", model, "--tasks", "no_such.yaml"]) == 2
    assert "task file no_such.yaml does not exist" in capsys.readouterr().err
