from pathlib import Path

import pytest

from miniplm.pipeline import _resolve, add_report, plan_stages, read_stages, run_stages
from miniplm.runtime.errors import UserError


def test_places_are_filled_in_everywhere_and_unknown_ones_refused():
    resolved = _resolve(
        {"a": "${x-1}/checkpoints", "b": ["${y}", 3], "c": "$$5"}, {"x-1": "/o/x", "y": "/o/y"}
    )
    assert resolved == {"a": "/o/x/checkpoints", "b": ["/o/y", 3], "c": "$5"}
    with pytest.raises(ValueError, match=r"\$\{z\} is not a stage before this one; those are y"):
        _resolve("${z}", {"y": "/o/y"})
    with pytest.raises(ValueError, match=r"\$\$ for a dollar sign"):
        _resolve("5 $", {})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {"stage": "bake"}}, "choose from prepare"),
        ({"a": {"data": "x"}}, "`stage` is missing; choose from prepare"),
        ({"a": {"stage": None}}, "`stage` is null"),
        ({"a": {"stage": ["prepare"]}}, r"`stage` is \['prepare'\]"),
        ({1: {"stage": "prepare", "data": "x", "tokenizer": "t"}}, "stage 1: a name takes"),
        ({"": {"stage": "prepare", "data": "x", "tokenizer": "t"}}, "stage '': a name takes"),
        ({"a" * 300: {"stage": "prepare", "data": "x", "tokenizer": "t"}}, "a name takes up to 100"),
        ({"a": {"stage": "prepare", "data": "x", "tokenizer": "t", "output": "o"}}, "leave out `output`"),
        ({"a/b": {"stage": "prepare", "data": "x", "tokenizer": "t"}}, "letters, digits"),
        ({"a": {"stage": "prepare", "data": "x"}}, "tokenizer"),
        ({"a": {"stage": "prepare", "data": "x", "tokenizer": "t", "flavour": 1}}, "flavour"),
        (
            {
                "a": {"stage": "prepare", "data": "${b}", "tokenizer": "t"},
                "b": {"stage": "prepare", "data": "x", "tokenizer": "t"},
            },
            "not a stage before this one",
        ),
        (
            {
                "a": {"stage": "prepare", "data": "x", "tokenizer": "t"},
                "b": {"stage": "select", "data": "${a}", "scores": ["${a}"], "ratio": 2},
            },
            "ratio must be",
        ),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(stages, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_stages(stages, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [", "a: 3\n", "", "\x00", "{}", "null", "1: {stage: score}"]
)
def test_a_file_that_is_no_pipeline(text, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^pipeline file .*pipeline\.yaml") as caught:
        read_stages(path)
    assert str(caught.value).isprintable()


def test_old_names_of_settings_work_in_a_pipeline(tmp_path):
    values = {"stage": "train", "data": "d", "eval_data": "${held-out}", "keep_checkpoints": 3}
    (planned,) = plan_stages({"a": values}, tmp_path, {"held-out": "/h"})
    assert planned.name == "a" and planned.stage == "train"
    assert (planned.settings.eval.data, planned.settings.checkpoint.keep) == ("/h", 3)


def test_shipped_pipelines_are_right():
    root = Path(__file__).parents[1]
    assert len(plan_stages(read_stages(root / "configs" / "quickstart.yaml"), "out")) == 9
    assert (
        len(
            plan_stages(
                read_stages(root / "miniplm" / "demo" / "demo.yaml"),
                "out",
                {"text": "t", "tokenizer": "t", "seed": "1"},
            )
        )
        == 19
    )


TINY = """
split: &prepare
  stage: prepare
  data: "TEXT"
  tokenizer: "TOKENIZER"
  domain_column: domain
  max_length: 32
  take: [0.0, 0.3]
  workers: 1
pool: {<<: *prepare, take: [0.3, 1.0]}
teacher:
  stage: train
  data: ${pool}
  eval: {data: "${split}"}
  model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
  optimizer: {lr: 1.0e-2, warmup_steps: 2}
  steps: 8
  batch_tokens: 512
reference:
  stage: train
  data: ${split}
  model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  steps: 3
  batch_tokens: 512
scores: {stage: score, data: "${pool}", teacher: "${teacher}", reference: "${reference}"}
refined: {stage: select, data: "${pool}", scores: ["${scores}"], ratio: 0.4}
student:
  stage: train
  data: ${refined}
  model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  steps: 3
  batch_tokens: 512
loss: {stage: evaluate, model: "${student}", data: "${split}"}
model: {stage: export, checkpoint: "${student}", evaluation: "${loss}"}
sample: {stage: generate, model: "${model}", prompt: "the teacher", max_new_tokens: 4}
"""


def contents(folder):
    """Every file under a folder but TensorBoard's (its names and bytes hold the time)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


def test_text_to_model_then_skipped_when_complete(tiny_tokenizer, tmp_path, capsys):
    import json
    import random

    from texts import make_text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from miniplm.config import RunConfig
    from miniplm.pipeline import run

    rng = random.Random(5)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": make_text(rng, rng.randrange(60)), "domain": rng.choice("ab")}) + "\n"
            for _ in range(150)
        )
    )
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(TINY.replace("TEXT", str(text)).replace("TOKENIZER", tiny_tokenizer))
    settings = RunConfig(config=str(pipeline), output=str(tmp_path / "out"))
    run(settings)
    first = contents(tmp_path / "out")
    assert "Selection: refined" in first["report.html"].decode()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert (
        model.config.hidden_size == 16
        and AutoTokenizer.from_pretrained(tmp_path / "out" / "model").eos_token == "<|endoftext|>"
    )
    selected = json.loads(first["refined/manifest.json"])
    assert selected["rows"] == int(0.4 * json.loads(first["pool/manifest.json"])["rows"])
    assert (
        "the share of 0.4" in first["model/README.md"].decode() and json.loads(first["loss.json"])["loss"] > 0
    )
    capsys.readouterr()
    run(settings)
    assert capsys.readouterr().out.count("nothing to do") == 9  # every stage but generate
    assert contents(tmp_path / "out") == first
    pipeline.write_text(pipeline.read_text().replace("ratio: 0.4", "ratio: 0.5"))
    with pytest.raises(UserError, match="holds another select run"):
        run(settings)
    assert contents(tmp_path / "out") == first


def test_a_report_that_fails_is_a_line(tmp_path, capsys):
    """A run whose work is done has succeeded."""
    (tmp_path / "report.html").write_text("<p>mine")
    add_report(tmp_path)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"no report {tmp_path / 'report.html'}: output ")
    assert (tmp_path / "report.html").read_text() == "<p>mine"
