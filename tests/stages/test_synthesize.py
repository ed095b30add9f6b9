"""synthesize: what is continued, by what, and that a stopped run ends in the same bytes."""

import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpora import chunks_of, write_corpus
from damages import flip_bit
from outputs import contents, kill_and_restart
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from training_runs import make_config, swap_two_tokens
from transformers import AutoModelForCausalLM, GPT2Config

from miniplm.cli import main
from miniplm.config import RetokenizeConfig, SynthesizeConfig
from miniplm.data.corpus import Corpus
from miniplm.data.tokenizer import load_tokenizer
from miniplm.models.generation import Sampling, TransformersEngine
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.retokenize import retokenize
from miniplm.stages.synthesize import synthesize
from miniplm.stages.train import train

PROMPT = 24
SMALL = dict(prompt_tokens=PROMPT, shard_chunks=7, batch_chunks=3, device="cpu", dtype="float32")


def run(data, teacher, output, **settings) -> SynthesizeConfig:
    config = SynthesizeConfig(data=str(data), teacher=teacher, output=str(output), **{**SMALL, **settings})
    synthesize(config)
    return config


def manifest(config) -> dict:
    return read_json(Path(config.output) / "manifest.json")


@pytest.fixture(scope="module")
def written(tiny_corpus, teacher, tmp_path_factory):
    """The config of a run that nothing stopped."""
    return run(tiny_corpus, teacher, tmp_path_factory.mktemp("written") / "out")


def test_a_corpus_of_the_same_chunks_with_other_ends(written, tiny_corpus):
    before, after = chunks_of(tiny_corpus), chunks_of(written.output)
    assert [len(ids) for ids in after] == [len(ids) for ids in before]
    assert all(old[:PROMPT] == new[:PROMPT] for old, new in zip(before, after, strict=True))
    long = [len(ids) > PROMPT for ids in before]
    assert [old != new for old, new in zip(before, after, strict=True)] == long
    assert 0 < sum(long) < len(long)
    source, made = Corpus(tiny_corpus), Corpus(written.output)
    assert made.domains[1] == source.domains[1] and (made.domains[0] == source.domains[0]).all()
    found = made.manifest
    assert found["predictions"] == sum(token != 0 for ids in after for token in ids[:-1])
    assert found["tokens"] == source.manifest["tokens"] and found["parent"] == source.fingerprint
    assert found["synthesis"] == {
        "teacher": "teacher0",
        "prompt_tokens": PROMPT,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 10,
        "engine": "transformers",
        "new_tokens": sum(len(ids) - PROMPT for ids in before if len(ids) > PROMPT),
        "unchanged": len(long) - sum(long),
    }
    for key in ("tokenizer_fingerprint", "eos_token_id", "vocab_size", "max_length", "source"):
        assert found[key] == source.manifest[key]
    assert contents(Path(written.output) / "tokenizer") == contents(Path(tiny_corpus) / "tokenizer")


def test_it_trains(written, tmp_path):
    config = replace(make_config(written.output, tmp_path / "run"), steps=3)
    train(config)
    assert manifest(config)["identity"]["corpus"] == Corpus(written.output).fingerprint


def test_the_likeliest_tokens(tiny_corpus, teacher, tmp_path):
    """At temperature 0: against a loop without a cache."""
    config = run(tiny_corpus, teacher, tmp_path / "out", temperature=0, shard_chunks=20)
    model, compared = AutoModelForCausalLM.from_pretrained(teacher), 0
    for old, new in list(zip(chunks_of(tiny_corpus), chunks_of(config.output), strict=True))[:12]:
        ids = old[:PROMPT]
        while len(ids) < len(old):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert new == ids
        compared += len(old) > PROMPT
    assert compared > 5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.4)])
def test_tokens_are_drawn_from_the_distribution(teacher, temperature, top_p):
    """The first token of 4,000 chunks with one prompt, against its probabilities."""
    number, prompt = 4_000, np.arange(5, 15)
    engine = TransformersEngine(
        teacher, torch.float32, torch.device("cpu"), False, Sampling(temperature, top_p, 3, 500)
    )
    drawn = engine.complete([prompt] * number, [1] * number, range(number))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        probability = (model(torch.tensor(prompt)[None]).logits[0, -1] / temperature).softmax(-1).double()
    likeliest, order = probability.sort(descending=True)
    kept = order[: int((likeliest.cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(probability)
    expected[kept] = probability[kept] / probability[kept].sum()
    counts = Counter(int(ids[0]) for ids in drawn)
    assert set(counts) <= set(kept.tolist())
    for token in expected.argsort(descending=True)[:20].tolist():
        share = expected[token].item()
        assert abs(counts[token] - number * share) < 5 * (number * share * (1 - share)) ** 0.5 + 1
    assert len(counts) > 3


def test_each_chunk_has_its_seed(written, tiny_corpus, teacher, tmp_path):
    """So shards and batches change nothing but rounding, which on this model changes no token; equal prompts
    are continued differently; another seed gives another text."""
    others = run(tiny_corpus, teacher, tmp_path / "others", shard_chunks=40, batch_chunks=8)
    assert chunks_of(others.output) == chunks_of(written.output)
    assert manifest(others)["fingerprint"] != manifest(written)["fingerprint"]  # other files
    again = run(tiny_corpus, teacher, tmp_path / "again")
    assert contents(again.output) == contents(written.output)
    seeded = run(tiny_corpus, teacher, tmp_path / "seeded", seed=11)
    changed = zip(chunks_of(seeded.output), chunks_of(written.output), strict=True)
    assert sum(one != other for one, other in changed) > 20


def test_equal_prompts_are_continued_differently(tiny_corpus, teacher, tmp_path):
    ids = max(chunks_of(tiny_corpus), key=len)
    tokenizer = Path(tiny_corpus) / "tokenizer"
    data = write_corpus(tmp_path / "corpus", [ids] * 6, tokenizer)
    written = chunks_of(run(data, teacher, tmp_path / "out").output)
    assert len({tuple(ids) for ids in written}) == 6


@pytest.fixture(scope="module")
def few_chunks(tiny_corpus, tmp_path_factory) -> str:
    chunks = [ids for ids in chunks_of(tiny_corpus) if len(ids) != 1][:8]
    folder = tmp_path_factory.mktemp("few") / "corpus"
    return write_corpus(folder, chunks, Path(tiny_corpus) / "tokenizer")


def test_what_it_costs(few_chunks, teacher, tmp_path):
    """Layers and head by torch's count; attention, which it does not count on every device, by hand."""
    with FlopCounterMode(display=False) as counter:
        config = run(few_chunks, teacher, tmp_path / "out", batch_chunks=1, shard_chunks=40)
    lengths = [len(ids) for ids in chunks_of(few_chunks) if len(ids) > PROMPT]
    width = 2 * 32  # layers · width
    causal = sum(2 * width * (n - 1) * n for n in lengths)
    products = {"aten.mm", "aten.addmm", "aten._scaled_mm"}
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in products)
    assert manifest(config)["flops"] == {"teacher": counted + causal}
    forward = load_model(teacher).flops_per_token(0)
    assert manifest(config)["flops"]["teacher"] < sum((n - 1) * forward for n in lengths) + causal


def test_longer_heads_write_no_unknown_ids(tiny_corpus, tiny_model, tmp_path):
    model = tiny_model(tmp_path / "model", seed=4, vocab_size=900, tie_word_embeddings=False)
    config = run(tiny_corpus, model, tmp_path / "out", temperature=3)
    assert 490 < Corpus(config.output).highest_id < 500


def test_other_architectures(tiny_corpus, tiny_model, tmp_path):
    settings = dict(config_class=GPT2Config, n_embd=48, n_layer=1, n_head=2, n_positions=128)
    config = run(tiny_corpus, tiny_model(tmp_path / "model", **settings), tmp_path / "out")
    assert manifest(config)["flops"]["teacher"] > 0 and len(Corpus(config.output)) == 40


def test_retokenized_its_chunks_stay_apart(tiny_corpus, tmp_path):
    """A chunk of it does not continue the one before, as those of prepare do."""
    tokenizer = Path(tiny_corpus) / "tokenizer"
    ids = load_tokenizer(str(tokenizer))("the teacher keeps rare data")["input_ids"]
    found = []
    for synthesis in ({}, {"synthesis": {"teacher": "t"}}):
        data = write_corpus(tmp_path / f"corpus{len(found)}", [ids, ids], tokenizer, **synthesis)
        output = str(tmp_path / f"out{len(found)}")
        retokenize(RetokenizeConfig(data=data, tokenizer=str(tokenizer), output=output, workers=1))
        found.append(chunks_of(output))
        assert read_json(Path(output) / "manifest.json").get("synthesis") == synthesis.get("synthesis")
    assert found == [[ids + ids], [ids, ids]]


# ---- stops, damage ----

SETUP = """
from transformers import GenerationConfig, Qwen2ForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper
from miniplm.config import SynthesizeConfig
from miniplm.stages.synthesize import synthesize
"""


@pytest.mark.slow
def test_killed_at_any_time_it_ends_in_the_same_bytes(few_chunks, teacher, tmp_path):
    whole = run(few_chunks, teacher, tmp_path / "whole", shard_chunks=2)
    config = replace(whole, output=str(tmp_path / "out"))
    call = f"synthesize(SynthesizeConfig(**{vars(config)!r}))"
    struck = kill_and_restart(SETUP, call, tmp_path / "out", "data-*.arrow", [1, 3])
    assert struck == 2
    assert contents(config.output) == contents(whole.output)


def test_what_is_whole_is_not_made_again(written, tmp_path, capsys, monkeypatch):
    config = replace(written, output=str(shutil.copytree(written.output, tmp_path / "out")))
    before = {path.name: path.stat().st_ino for path in Path(config.output).iterdir()}
    synthesize(config)
    assert "complete, nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_ino for path in Path(config.output).iterdir()} == before
    flip_bit(Path(config.output) / "data-00002.arrow", random.Random(0))
    calls, original = [], TransformersEngine.complete
    monkeypatch.setattr(
        TransformersEngine,
        "complete",
        lambda self, prompts, new, chunks: calls.append(chunks) or original(self, prompts, new, chunks),
    )
    synthesize(config)
    assert {chunk // 7 for batch in calls for chunk in batch} == {2}
    assert contents(config.output) == contents(written.output)
    assert "was complete, but" in capsys.readouterr().err


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_tokens": 65},
            "no chunk of corpus .* is longer than a prompt of 65 tokens: lower prompt_tokens",
        ),
        ({"data": "nowhere"}, "corpus nowhere does not exist"),
        ({"teacher": "./nowhere"}, "nowhere"),
        ({"engine": "vllm"}, "vllm needs the package vllm, which is not installed here"),
    ],
)
def test_what_cannot_be_used(tiny_corpus, teacher, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(**{"data": tiny_corpus, "teacher": teacher, "output": tmp_path / "out", **settings})
    assert not (tmp_path / "out").exists()


def test_teachers_that_do_not_fit(tiny_corpus, tiny_model, tmp_path):
    other = tiny_model(tmp_path / "other")
    swap_two_tokens(other)
    short = tiny_model(tmp_path / "short", max_position_embeddings=40)
    few = tiny_model(tmp_path / "few", vocab_size=300)
    broken = tiny_model(tmp_path / "broken")
    weights = load_file(f"{broken}/model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, f"{broken}/model.safetensors", metadata={"format": "pt"})
    for model, message in [
        (other, "tokenizer of .*other is not the corpus's"),
        (short, "reads at most 40 tokens, the longest chunk of corpus .* has 65"),
        (few, "knows 300 ids, corpus .* has ids up to"),
    ]:
        with pytest.raises(UserError, match=message):
            run(tiny_corpus, model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="the model's output is not finite"):
        run(tiny_corpus, broken, tmp_path / "out")


def test_another_run_is_refused(written, capsys):
    arguments = ["synthesize", "--data", written.data, "--teacher", written.teacher]
    arguments += ["--output", written.output, "--prompt-tokens", "24", "--device", "cpu"]
    assert main(arguments) == 2
    assert "holds another synthesize run (batch_chunks was 3, is now 8)" in capsys.readouterr().err
    assert main([*arguments, "--temperature", "-1"]) == 2
    assert "temperature must not be negative" in capsys.readouterr().err


# ---- vLLM, by a stand-in that has the parts of its public interface which are used ----


@pytest.fixture
def vllm(monkeypatch):
    """What was asked of vLLM; it writes the sum of a prompt's ids, and on from there."""
    asked = SimpleNamespace(models=[], requests=[], short=False)

    class LLM:
        def __init__(self, model, *, tokenizer, dtype, trust_remote_code):
            if "broken" in model:
                raise RuntimeError("a traceback\nof many lines")
            asked.models.append((model, tokenizer, dtype, trust_remote_code))

        def generate(self, prompts, sampling_params, *, use_tqdm=True):
            asked.requests += zip(prompts, sampling_params, strict=True)
            found = []
            for prompt, parameters in zip(prompts, sampling_params, strict=True):
                first = sum(prompt["prompt_token_ids"]) % 400
                ids = list(range(first, first + parameters.max_tokens - asked.short))
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]))
            return found

    module = SimpleNamespace(LLM=LLM, SamplingParams=lambda **values: SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return asked


def test_vllm(vllm, tiny_corpus, teacher, tmp_path):
    config = run(tiny_corpus, teacher, tmp_path / "out", engine="vllm", temperature=0.7, top_p=0.9)
    assert vllm.models == [(teacher, f"{tiny_corpus}/tokenizer", "float32", False)]
    before = chunks_of(tiny_corpus)
    long = [number for number, ids in enumerate(before) if len(ids) > PROMPT]
    for (prompt, parameters), number in zip(vllm.requests, long, strict=True):
        assert prompt == {"prompt_token_ids": before[number][:PROMPT]}
        assert vars(parameters) == {
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": Sampling(0.7, 0.9, 10, 500).seed_of(number),
            "max_tokens": len(before[number]) - PROMPT,
            "ignore_eos": True,
            "detokenize": False,
            "allowed_token_ids": list(range(500)),
        }
    for old, new in zip(before, chunks_of(config.output), strict=True):
        first = sum(old[:PROMPT]) % 400
        assert new == old[:PROMPT] + list(range(first, first + len(old) - PROMPT))
    assert manifest(config)["synthesis"]["engine"] == "vllm"
    json.dumps(manifest(config))


def test_vllm_that_fails(vllm, tiny_corpus, tiny_model, teacher, tmp_path):
    broken = tiny_model(tmp_path / "broken")
    with pytest.raises(UserError, match=r"vLLM cannot load .*broken \(RuntimeError") as raised:
        run(tiny_corpus, broken, tmp_path / "out", engine="vllm")
    assert "traceback" not in str(raised.value)
    vllm.short = True
    with pytest.raises(UserError, match="vLLM ended a text after"):
        run(tiny_corpus, teacher, tmp_path / "out", engine="vllm")
