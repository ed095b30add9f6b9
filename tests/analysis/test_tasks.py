"""Tasks through lm-eval: its own model for transformers, asked by hand, says the same."""

import json
import math
import random

import pytest
import torch
import yaml
from texts import WORDS, make_text
from transformers import GPT2Config, LlamaConfig

from miniplm.analysis.tasks import (
    NINE_TASKS,
    PUBLISHED,
    load_tasks,
    print_tasks,
    published_beside,
    questions_fingerprint,
    run_tasks,
)
from miniplm.data.tokenizer import load_tokenizer
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError

PUBLISHED_MEANS = {
    "Pre-train": (39.9, 43.2, 44.9),
    "Vanilla KD": (39.9, 43.6, 45.4),
    "MiniPLM": (41.3, 44.8, 46.6),
}


@pytest.mark.parametrize("method", PUBLISHED_MEANS)
def test_the_published_rows_have_the_published_means(method):
    for figures, mean in zip(PUBLISHED.values(), PUBLISHED_MEANS[method], strict=True):
        assert sum(figures[method]) / len(NINE_TASKS) == pytest.approx(mean, abs=0.11)  # of rounded figures


def test_the_nearest_published_student_stands_beside():
    for parameters, size in [
        (1_000, "203M"),
        (2e8, "203M"),
        (3.2e8, "464M"),
        (9e8, "1.16B"),
        (7e10, "1.16B"),
    ]:
        assert published_beside(int(parameters))[0] == size
    assert published_beside(int(2e8))[1]["MiniPLM"]["storycloze_2018"] == 60.0


# ---- with lm-eval ----

METRICS = {
    "both": ["acc", "acc_norm"],
    "plain": ["acc"],
    "contexts": ["acc"],
    "last_word": ["acc"],
    "text": ["bits_per_byte"],
}
TEMPLATES = {
    "both": {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"},
    "plain": {
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices[label]}}",
    },
    "contexts": {"doc_to_text": "label", "doc_to_choice": "{{choices}}", "doc_to_target": "{{question}}"},
    "last_word": {"doc_to_text": "{{question}}", "doc_to_target": "{{' ' + choices[label]}}"},
    "text": {"doc_to_text": "", "doc_to_target": "{{question}}"},
}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory) -> dict[str, str]:
    """A local task of each kind, its questions in a file beside it."""
    pytest.importorskip("lm_eval")
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(4)
    paths = {}
    for name, template in TEMPLATES.items():
        rows = [
            {
                "question": make_text(rng, 200 if name == "text" else rng.randrange(1, 30)),
                "choices": [" ".join(rng.choices(WORDS, k=rng.randrange(1, 6))) for _ in range(4)],
                "label": rng.randrange(4),
            }
            for _ in range(25)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        kinds = {"last_word": "loglikelihood", "text": "loglikelihood_rolling"}
        config = {
            "task": f"tiny_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "output_type": kinds.get(name, "multiple_choice"),
            "test_split": "test",
            **template,
            "metric_list": [{"metric": metric} for metric in METRICS[name]],
            "metadata": {"version": 2.5},
        }
        paths[name] = str(folder / f"{name}.yaml")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return paths


def figures(folder, paths, batch_tokens=300):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return run_tasks(model, tokenizer, load_tasks(paths), torch.device("cpu"), batch_tokens)


def by_hand(folder, paths, **options):
    """What lm-eval says of transformers' own model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3, **options)
    loaded = TaskManager(include_defaults=False).load(list(paths))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=1)


@pytest.mark.parametrize("architecture", ["decoder", "another", "bos"])
def test_equal_to_lm_eval_by_hand(architecture, task_files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("miniplm.analysis.harness.ROLLING_WINDOW", 50)
    options = dict(config_class=LlamaConfig)  # whose folder transformers cuts text by its tokenizer.json
    if architecture == "another":
        options = dict(config_class=GPT2Config, n_embd=32, n_layer=2, n_head=2)
    folder = tiny_model(tmp_path / "model", **options)
    if architecture == "bos":
        start_with_bos(folder)
    ours = figures(folder, task_files.values())
    theirs = by_hand(folder, task_files.values()) | {
        "rolling": by_hand(folder, [task_files["text"]], max_length=50)["results"]["tiny_text"]
    }
    assert set(ours["tasks"]) == {f"tiny_{name}" for name in TEMPLATES}
    for name, metric in {"both": "acc_norm", "plain": "acc", "contexts": "acc", "last_word": "acc"}.items():
        found, expected = ours["tasks"][f"tiny_{name}"], theirs["results"][f"tiny_{name}"]
        assert found["metric"] == metric and found["questions"] == 25 and found["version"] == 2.5
        assert found["value"] == expected[f"{metric},none"]
        assert found["standard_error"] == expected[f"{metric}_stderr,none"]
        samples = theirs["samples"][f"tiny_{name}"]
        bits = [gold_bits(name, sample) for sample in samples]
        assert found["gold_bits_per_byte"] == pytest.approx(sum(bits) / len(bits), rel=1e-4)
        assert found["bits_per_byte"] is None
    assert 0 < ours["tasks"]["tiny_both"]["value"] < 1
    text = ours["tasks"]["tiny_text"]
    assert text["bits_per_byte"] == pytest.approx(theirs["rolling"]["bits_per_byte,none"], rel=1e-5)
    assert text["metric"] is None and text["gold_bits_per_byte"] is None
    values = [ours["tasks"][f"tiny_{name}"]["value"] for name in ("both", "plain", "contexts", "last_word")]
    errors = [
        ours["tasks"][f"tiny_{name}"]["standard_error"] for name in ("both", "plain", "contexts", "last_word")
    ]
    assert ours["average"] == pytest.approx(sum(values) / 4)
    assert ours["average_standard_error"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 4)


def start_with_bos(folder):
    """Make the tokenizer in the folder begin every text with a BOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder)("a")["input_ids"][0] == 0


def gold_bits(name, sample) -> float:
    """Bits per byte of the right answer of one of lm-eval's samples."""
    gold = {"last_word": 0}.get(name, sample["doc"]["label"])
    (_, answer), log_prob = sample["arguments"][gold], sample["filtered_resps"][gold][0]
    return -log_prob / math.log(2) / len(answer.encode())


def test_batches_change_nothing(task_files, tiny_model, tmp_path):
    folder = tiny_model(tmp_path / "model", config_class=None)
    small, large = (figures(folder, task_files.values(), tokens) for tokens in (1, 100_000))
    for name, found in small["tasks"].items():
        for key, value in found.items():
            assert large["tasks"][name][key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_questions_are_told_apart(task_files, tmp_path):
    def fingerprint(path):
        (task,) = load_tasks([path]).values()
        return questions_fingerprint(task)

    first = fingerprint(task_files["both"])
    assert fingerprint(task_files["both"]) == first
    config = yaml.safe_load(open(task_files["both"]))
    for change in (
        {"doc_to_text": "{{question}}?"},
        {"doc_to_choice": "{{choices[::-1]}}"},
        {"doc_to_target": 0},
        {"target_delimiter": ""},
        {"metadata": {"version": 3.0}},
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(config | change))
        assert fingerprint(str(tmp_path / "other.yaml")) != first, change


def test_the_table(task_files, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = figures(tiny_model(tmp_path / "model"), [task_files["both"], task_files["text"]])
    result["tasks"] = {
        "local_piqa": result["tasks"]["tiny_both"],
        "local_lambada_openai": result["tasks"]["tiny_both"] | {"questions": 10_042},
        "text\x1b[31m": result["tasks"]["tiny_text"],
    }
    print_tasks(result | {"model": "run\x1b[31m", "harness": "lm-eval 1", "parameters": 200_000_000})
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown and r"\x1b" in shown
    (piqa,) = (line.split() for line in shown.splitlines() if "local_piqa" in line)
    value, error = (100 * result["tasks"]["local_piqa"][key] for key in ("value", "standard_error"))
    assert f"{value:.1f}" in piqa and f"{error:.1f}" in piqa and "acc_norm" in piqa
    assert [cell for cell in piqa if cell in ("61.8", "62.2", "63.3")] == ["61.8", "62.2", "63.3"]
    (mean,) = (line.split() for line in shown.splitlines() if "mean" in line)
    assert mean[-1] == f"{(63.3 + 35.4) / 2:.1f}"  # of the published figures on the same tasks
    assert "students of 203M" in " ".join(shown.split())
    (lambada,) = (line.split() for line in shown.splitlines() if "local_lambada_openai" in line)
    assert lambada[1:3] == ["10,042", "acc_norm"] and lambada[-1] == "35.4"  # nothing is cut


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_task", "no_such_task is not one of lm-eval's"),
        ("missing.yaml", "task file missing.yaml does not exist"),
        ("BROKEN", "cannot be read"),
        ("GENERATES", "tiny_generates is of the type generate_until"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(name, message, task_files, tmp_path):
    config = yaml.safe_load(open(task_files["both"]))
    if name == "BROKEN":
        config["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "missing.jsonl")}}
    if name == "GENERATES":
        config |= {"task": "tiny_generates", "output_type": "generate_until", "doc_to_choice": None}
        config["metric_list"] = [{"metric": "exact_match"}]
    if name.isupper():
        name = str(tmp_path / "task.yaml")
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=message) as caught:
        load_tasks([name])
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install miniplm\[eval\]"):
        load_tasks(["piqa"])
