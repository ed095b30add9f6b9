"""configs/runs/: the runs that the paper compares, as written and end to end at toy size."""

import json
import random
from pathlib import Path

import pytest
import yaml
from texts import make_text

import miniplm
from miniplm.config import TrainConfig, from_arguments
from miniplm.models.loading import model_hash
from miniplm.pipeline import plan_stages, read_stages, run_stages
from miniplm.runtime.files import read_json

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = ["conventional", "miniplm", "vanilla_kd", "seqkd", "miniplm_vanilla_kd", "data_limited"]
TOKENS = 105e9  # of the text that the shares are made for


def stages(run: str) -> dict:
    return read_stages(CONFIGS / "runs" / f"{run}.yaml")


def test_every_run_is_tested():
    assert sorted(RUNS) == sorted(path.stem for path in (CONFIGS / "runs").glob("*.yaml"))


@pytest.mark.parametrize("run", RUNS)
def test_models_are_trained_as_their_presets_say(run):
    planned = plan_stages(stages(run), "out")
    trained = [(name, settings) for name, kind, settings in planned if kind == "train"]
    assert len(trained) == (1 if run in ("conventional", "vanilla_kd", "seqkd") else 2)
    for name, settings in trained:
        preset = "qwen_104m_reference" if name == "reference" else "qwen_200m"
        arguments = ["--config", str(CONFIGS / f"{preset}.yaml"), "--data", "corpus", "--output", "run"]
        published = from_arguments(TrainConfig, arguments, prog="miniplm train")
        with_teacher = "vanilla_kd" in name
        for field in ("model", "optimizer", "batch_tokens", "shuffle", "seed", "document_mask"):
            assert getattr(settings, field) == getattr(published, field), field
        assert settings.steps == (25_000 if with_teacher else published.steps)
        if with_teacher:
            assert settings.distill.teacher == "Qwen/Qwen1.5-1.8B"
            assert (settings.distill.alpha, settings.distill.temperature) == (0.5, 1.0)
        else:
            assert settings.distill.teacher is None


def test_steps_with_a_teacher_cost_what_those_without_do():
    """The paper's count: a step costs 3 N of the student and N of the teacher."""
    student, teacher = 203e6, 1.84e9
    assert round(100_000 * 3 * student / (3 * student + teacher), -3) == 25_000


def test_stages_of_one_name_are_the_same_stage():
    seen = {}
    for run in RUNS:
        for name, values in stages(run).items():
            assert seen.setdefault(name, values) == values, f"{run}: {name}"


def test_shares_of_the_text():
    takes = {
        name: values["take"]
        for run in RUNS
        for name, values in stages(run).items()
        if values["stage"] == "prepare"
    }
    tokens = {name: (stop - start) * TOKENS / 1e9 for name, (start, stop) in takes.items()}
    assert tokens["reference_split"] == pytest.approx(5, abs=0.1)
    assert tokens["pool"] == pytest.approx(100, abs=0.1)
    assert tokens["half_pool"] == pytest.approx(50, abs=0.1)
    assert takes["validation"][1] == takes["reference_split"][0]
    assert takes["reference_split"][1] == takes["pool"][0] == takes["half_pool"][0]
    select = stages("data_limited")["refined_quarter"]
    steps, batch = (stages("data_limited")["data_limited_200m"][key] for key in ("steps", "batch_tokens"))
    assert steps * batch / (select["ratio"] * tokens["half_pool"] * 1e9) == pytest.approx(
        4, abs=0.2
    )  # epochs


# ---- at toy size ----

TOY_TAKES = {
    "validation": [0.0, 0.15],
    "reference_split": [0.15, 0.3],
    "pool": [0.3, 1.0],
    "half_pool": [0.3, 0.65],
}
TOY_STEPS = 6
TOY_PROMPT = 960  # of up to 1,025: few tokens to write
TOY_MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 500,
}


def toy(name: str, values: dict, text: str, tokenizer: str, teacher: str) -> dict:
    """A stage with its own keys, all of them, and toy values in those that set the size."""
    small = {}
    if values["stage"] == "prepare":
        small = {"data": text, "tokenizer": tokenizer, "take": TOY_TAKES[name]}
    elif values["stage"] == "score":
        small = {"teacher": teacher}
    elif values["stage"] == "synthesize":
        small = {"teacher": teacher, "prompt_tokens": TOY_PROMPT}
    elif values["stage"] == "train":
        small = {
            "model": values["model"] | TOY_MODEL,
            "optimizer": values["optimizer"] | {"lr": 1e-2, "warmup_steps": 2},
            "batch_tokens": 2048,
            "steps": TOY_STEPS,
        }
    if "distill" in values:
        small["distill"] = values["distill"] | {"teacher": teacher}
    assert small.keys() <= values.keys()
    return values | small


@pytest.fixture(scope="module")
def trained(tiny_tokenizer, tiny_model, tmp_path_factory):
    """All six runs in one output folder, and the teacher."""
    folder = tmp_path_factory.mktemp("published")
    rng = random.Random(3)
    text = folder / "text.jsonl"
    lines = [json.dumps({"text": make_text(rng, rng.randrange(400))}) for _ in range(150)]
    text.write_text("\n".join(lines))
    teacher = tiny_model(folder / "teacher")
    for run in RUNS:
        small = {
            name: toy(name, values, str(text), tiny_tokenizer, teacher)
            for name, values in stages(run).items()
        }
        path = folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(small, sort_keys=False))
        run_stages(read_stages(path), folder / "out")
    return folder / "out", teacher


def student_of(output: Path, run: str) -> dict:
    """The training manifest of a run's student, whose corpus, losses and export are checked on the way."""
    from transformers import AutoModelForCausalLM

    name = f"{run}_200m"
    manifest = read_json(output / name / "manifest.json")
    assert manifest["complete"] and manifest["steps"] == TOY_STEPS
    evaluation = read_json(output / f"{name}_loss.json")
    assert evaluation["corpus"] == read_json(output / "validation" / "manifest.json")["fingerprint"]
    assert 0 < evaluation["loss"] < 7
    assert AutoModelForCausalLM.from_pretrained(output / f"{name}_model").config.hidden_size == 16
    return manifest


def corpus(output: Path, name: str) -> dict:
    return read_json(output / name / "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["conventional", "vanilla_kd"])
def test_baselines_train_on_text_as_it_comes(trained, run):
    output, teacher = trained
    manifest = student_of(output, run)
    assert manifest["identity"]["corpus"] == corpus(output, "half_pool")["fingerprint"]
    assert manifest["identity"].get("teacher") == (model_hash(teacher) if run == "vanilla_kd" else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "pool", "refined", "ratio"),
    [
        ("miniplm", "pool", "refined", 0.5),
        ("miniplm_vanilla_kd", "pool", "refined", 0.5),
        ("data_limited", "half_pool", "refined_quarter", 0.25),
    ],
)
def test_miniplm_trains_on_what_the_teacher_prefers(trained, run, pool, refined, ratio):
    output, teacher = trained
    manifest = student_of(output, run)
    kept, whole = corpus(output, refined), corpus(output, pool)
    assert manifest["identity"]["corpus"] == kept["fingerprint"]
    assert kept["parent"] == whole["fingerprint"]
    assert kept["rows"] == int(ratio * whole["rows"])
    assert manifest["identity"].get("teacher") == (model_hash(teacher) if "vanilla_kd" in run else None)
    scores = kept["scores"][0]
    assert (scores["teacher"], scores["reference"]) == ("teacher", "reference")
    if run == "data_limited":
        assert manifest["tokens"] > kept["predictions"]  # more than one pass


@pytest.mark.slow
def test_seqkd_trains_on_the_teachers_text(trained):
    output, teacher = trained
    manifest, text = student_of(output, "seqkd"), corpus(output, "teacher_text")
    assert manifest["identity"]["corpus"] == text["fingerprint"]
    assert text["parent"] == corpus(output, "half_pool")["fingerprint"]
    assert text["identity"]["teacher"] == model_hash(teacher)
    assert stages("seqkd")["teacher_text"]["prompt_tokens"] == 768
    assert text["synthesis"]["prompt_tokens"] == TOY_PROMPT and text["synthesis"]["new_tokens"] > 100
    card = (output / "seqkd_200m_model" / "README.md").read_text()
    assert f"the first {TOY_PROMPT} tokens of each chunk, continued by teacher at temperature 1" in card
    assert "- knowledge-distillation" in card


@pytest.mark.slow
def test_the_ledger_finds_all_that_was_done_for_the_runs(trained):
    output, _ = trained
    names = ["conventional", "miniplm", "vanilla_kd", "seqkd", "data_limited"]
    result = miniplm.ledger(runs=[str(output / f"{name}_200m") for name in names], json=True)
    offline = {
        run["name"].removesuffix("_200m"): [entry["name"] for entry in run["offline"]]
        for run in result["runs"]
    }
    assert offline == {
        "conventional": ["half_pool"],
        "miniplm": ["refined", "scores", "reference", "reference_split", "pool"],
        "vanilla_kd": ["half_pool"],
        "seqkd": ["teacher_text", "half_pool"],
        "data_limited": ["refined_quarter", "half_scores", "reference", "reference_split", "half_pool"],
    }
    for run in result["runs"]:
        assert run["missing"] == [] and run["all_in_seconds"] > run["training_seconds"] > 0
        written = corpus(output, "teacher_text")["flops"]["teacher"] if run["name"] == "seqkd_200m" else 0
        scored = [
            sum(corpus(output, entry["name"])["flops"].values())
            for entry in run["offline"]
            if entry["stage"] in ("score", "train")
        ]
        assert run["offline_flops"] == written + sum(scored)
        assert (
            run["training_flops"] + run["flops"]["evaluation"] + run["offline_flops"] == run["all_in_flops"]
        )
    assert [each["run"] for each in result["comparisons"]] == [f"{name}_200m" for name in names[1:]]
    assert all(each["saving"] > 0 for each in result["comparisons"])
