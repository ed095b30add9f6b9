"""Zero-shot tasks through lm-eval, by the paper's rule, beside the paper's figures.

A task's figure is acc_norm where it has one, else acc; a model's is their plain mean (arXiv 2410.17215).
Beside it stand the bits per byte of the gold answers, which move long before accuracy does, and of held-out
text (tasks of the type loglikelihood_rolling): models with other tokenizers compare in both.
"""

import importlib.util
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.base import LanguageModel
from ..runtime.errors import UserError, reason
from ..runtime.files import fingerprint
from ..runtime.text import printable

NINE_TASKS = (
    "hellaswag",
    "lambada_openai",
    "winogrande",
    "openbookqa",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "social_iqa",
    "storycloze_2018",
)
LOCAL = "local_"  # before the name of one of the nine: its questions from a file
# Parameters of the published students → method → accuracy in % on NINE_TASKS, in their order
PUBLISHED: dict[int, dict[str, tuple[float, ...]]] = {
    203_000_000: {
        "Pre-train": (31.1, 32.4, 49.9, 27.6, 38.9, 23.1, 61.8, 36.4, 58.1),
        "Vanilla KD": (30.4, 31.0, 51.4, 26.6, 40.1, 23.1, 62.2, 36.9, 57.3),
        "MiniPLM": (32.7, 35.4, 51.4, 27.2, 40.6, 23.7, 63.3, 37.0, 60.0),
    },
    464_000_000: {
        "Pre-train": (35.8, 40.1, 51.0, 30.2, 41.7, 24.4, 65.4, 38.2, 61.4),
        "Vanilla KD": (37.0, 39.9, 51.7, 29.4, 45.1, 24.2, 65.8, 38.0, 61.6),
        "MiniPLM": (39.0, 42.6, 52.2, 30.2, 45.8, 24.9, 67.0, 39.0, 62.2),
    },
    1_161_000_000: {
        "Pre-train": (39.4, 44.5, 51.8, 28.4, 46.0, 25.7, 67.0, 39.5, 62.2),
        "Vanilla KD": (40.7, 43.3, 53.2, 29.8, 46.1, 25.5, 67.3, 39.2, 63.5),
        "MiniPLM": (42.8, 46.2, 53.3, 31.0, 46.8, 26.9, 68.3, 39.8, 64.0),
    },
}


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks, by name.

    Args:
        names: of the harness's tasks (groups stand for theirs; several in one text with commas), or .yaml
            files that define one.
    Raises:
        UserError: lm-eval is missing, there is no such task, its questions cannot be read, or it generates
            text.
    """
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("tasks need the package lm-eval: pip install miniplm[eval]")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [part for name in names for part in ([name] if _is_file(name) else name.split(","))]
    files_only = all(map(_is_file, names))  # then the harness need not look through its own, which takes long
    manager, loaded = TaskManager(include_defaults=not files_only), dict[str, Any]()
    for name in dict.fromkeys(names):
        if _is_file(name) and not Path(name).is_file():
            raise UserError(f"task file {name} does not exist")
        if not _is_file(name) and name not in manager.all_tasks:
            raise UserError(
                f"task {name} is not one of lm-eval's: give a name such as {NINE_TASKS[0]}, or a .yaml file"
            )
        try:
            loaded |= manager.load(str(Path(name).resolve()) if _is_file(name) else name)["tasks"]
        except Exception as error:  # of the harness, of datasets, of the network
            raise UserError(
                f"task {name} cannot be read ({reason(error)}): look at its file, and see that its data can "
                f"be reached"
            ) from error
    for name, task in loaded.items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
            raise UserError(
                f"task {name} is of the type {task.OUTPUT_TYPE}: give tasks that compare probabilities"
            )
    return loaded


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def harness_version() -> str:
    import lm_eval

    return f"lm-eval {lm_eval.__version__}"


def questions_fingerprint(task: Any) -> str:
    """A fingerprint of a task's version, questions and answers, as the model is asked them."""
    asked = []
    for doc in task.eval_docs:
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
        asked.append([task.doc_to_text(doc), task.doc_to_target(doc), choices])
    return fingerprint({"version": task.VERSION, "asked": asked, "delimiter": task.config.target_delimiter})


def run_tasks(
    model: LanguageModel, tokenizer: Any, tasks: dict[str, Any], device: torch.device, batch_tokens: int
) -> dict[str, Any]:
    """The figures of a model on tasks.

    Args:
        tokenizer: transformers' PreTrainedTokenizerFast of the model.
        tasks: what load_tasks gave.
        batch_tokens: of a packed batch.

    Returns:
        {"tasks": {name: figures}, "average", "average_standard_error" (of the tasks that have a metric, None
        without one), "parameters" (of the model)}. Figures are "version" (of the task), "questions" (how
        many), "metric" ("acc_norm", "acc" or None), "value", "standard_error" (of the questions as a sample),
        "gold_bits_per_byte" (the mean over the questions, of the answer as it was asked for, its leading
        space included) with "gold_standard_error", and "bits_per_byte" (of all text, for tasks of the type
        loglikelihood_rolling). What a task does not have, and what is not finite, is None.
    Raises:
        UserError: the tokenizer is not the model's, or has no EOS.
    """
    import lm_eval

    from .harness import PackedLM

    if tokenizer.eos_token_id is None:
        raise UserError("tasks need a tokenizer with an EOS token, which stands before texts without context")
    if len(tokenizer) > len(model.head_weight):
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} ids, the model {len(model.head_weight):,}: they do not "
            f"belong together"
        )
    for task in tasks.values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own; it asks for one in zero-shot tasks too
    results = lm_eval.evaluate(
        lm=PackedLM(model, tokenizer, device, batch_tokens),
        task_dict={"tasks": tasks},
        bootstrap_iters=0,  # standard errors of means need none
        log_samples=True,
    )
    figures = {
        name: {"version": results["versions"][name], **_figures(task, results["samples"][name])}
        for name, task in tasks.items()
    }
    measured = [found for found in figures.values() if found["metric"]]
    errors = [found["standard_error"] or 0.0 for found in measured]
    return {
        "tasks": figures,
        "average": statistics.fmean(found["value"] for found in measured) if measured else None,
        "average_standard_error": math.hypot(*errors) / len(errors) if measured else None,
        "parameters": model.num_parameters(),
    }


def _figures(task: Any, samples: list[dict]) -> dict[str, Any]:
    metric = next((name for name in ("acc_norm", "acc") if name in samples[0]["metrics"]), None)
    value, error = _mean([sample[metric] for sample in samples]) if metric else (None, None)
    gold = gold_error = bits = None
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        total = sum(_bits(sample["filtered_resps"][0]) for sample in samples)
        bits = _finite(total / sum(len(sample["arguments"][0][0].encode()) for sample in samples))
    else:
        gold, gold_error = _mean([_gold_bits_per_byte(task, sample) for sample in samples])
    return {
        "questions": len(samples),
        "metric": metric,
        "value": value,
        "standard_error": error,
        "gold_bits_per_byte": gold,
        "gold_standard_error": gold_error,
        "bits_per_byte": bits,
    }


def _gold_bits_per_byte(task: Any, sample: dict) -> float:
    gold = 0
    if task.OUTPUT_TYPE == "multiple_choice":
        # Where the choices are contexts, as in Winogrande, it is the text that says which one is right.
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        gold = gold[0] if isinstance(gold, list) else gold
        gold = task.doc_to_choice(sample["doc"]).index(gold) if isinstance(gold, str) else gold
    answer, (log_prob, _) = sample["arguments"][gold][1], sample["filtered_resps"][gold]
    return _bits(log_prob) / len(answer.encode())


def _bits(log_prob: float) -> float:
    return -log_prob / math.log(2)


def _mean(values: list[float]) -> tuple[float | None, float | None]:
    """(mean, its standard error), as the harness has them."""
    from lm_eval.api.metrics import mean_stderr

    error = mean_stderr(values) if len(values) > 1 else math.nan
    return _finite(sum(values) / len(values)), _finite(error)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---- the table ----


def published_beside(parameters: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The published student that is nearest in size: (its size, method → task → accuracy in %)."""
    size = min(PUBLISHED, key=lambda published: abs(math.log(published / max(parameters, 1))))
    label = f"{size / 1e9:.2f}B" if size >= 1e9 else f"{size / 1e6:.0f}M"
    methods = PUBLISHED[size].items()
    return label, {method: dict(zip(NINE_TASKS, values, strict=True)) for method, values in methods}


def print_tasks(result: dict[str, Any]) -> None:
    """The table of what run_tasks returned, of the "model" with the "harness", beside the published figures
    of the nearest size."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    size, published = published_beside(result["parameters"])
    title = f"{printable(result['model'])}, {result['harness']}; beside it the published students of {size}"
    table = Table(title=Text(title), box=SIMPLE, padding=0)
    table.add_column("task", no_wrap=True)
    # In two lines, so that the table fits into 80 columns.
    headings = [method.replace("-", "-\n").replace(" ", "\n") for method in published]
    for heading in ("asked", "metric", "%", "bits/\nbyte", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, figures in result["tasks"].items():
        known = name.removeprefix(LOCAL)
        theirs = [f"{values[known]:.1f}" if known in values else "" for values in published.values()]
        bits = figures["bits_per_byte"] or figures["gold_bits_per_byte"]
        table.add_row(
            Text(printable(name)),
            f"{figures['questions']:,}",
            figures["metric"] or "text",
            _percent(figures["value"], figures["standard_error"]),
            "" if bits is None else f"{bits:.3f}",
            *theirs,
        )
    if result["average"] is not None:
        measured = [
            name.removeprefix(LOCAL) for name, figures in result["tasks"].items() if figures["metric"]
        ]
        table.add_section()
        theirs = [
            f"{statistics.fmean(values[name] for name in measured):.1f}"
            if set(measured) <= set(values)
            else ""
            for values in published.values()
        ]
        average = _percent(result["average"], result["average_standard_error"])
        table.add_row("mean", "", "", average, "", *theirs)
    Console().print(table)


def _percent(value: float | None, error: float | None) -> str:
    return "" if value is None or error is None else f"{100 * value:.1f} ± {100 * error:.1f}"
