"""train: where a run starts from, and what it refuses before it writes anything."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from training_runs import (
    EOS,
    STUDENT,
    check_equal_runs,
    make_config,
    metrics,
    plain_loss,
    stop_after,
    swap_two_tokens,
    truncate,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from miniplm.config import CheckpointConfig, EvalConfig, OptimizerConfig, StudentConfig
from miniplm.data.corpus import Corpus
from miniplm.data.order import DataOrder
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import train as stage
from miniplm.stages.train import train
from miniplm.training import loop
from miniplm.training import step as training_step
from miniplm.training.checkpoints import latest_checkpoint
from miniplm.training.starting import initial_model


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


def test_bad_input_leaves_nothing_behind(config, tiny_tokenizer, tiny_model, tmp_path):
    nothing = write_corpus(tmp_path / "nothing", [[EOS, EOS, 5], [7], [EOS]], tiny_tokenizer)
    larger = AutoTokenizer.from_pretrained(tiny_tokenizer)
    larger.add_tokens(["<more>"])
    larger.save_pretrained(tmp_path / "larger")
    other = write_corpus(tmp_path / "other", [[1, 2, 3]], str(tmp_path / "larger"))
    model = tiny_model(tmp_path / "model")
    small = tiny_model(tmp_path / "small", vocab_size=400)
    broken = Path(tiny_model(tmp_path / "broken"))
    truncate(broken / "model.safetensors")
    reordered = Path(tiny_model(tmp_path / "reordered"))
    swap_two_tokens(reordered)
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps({"model_type": "no-such-model", "vocab_size": 500}))
    (tmp_path / "text.json").write_text("{model")
    huge = replace(STUDENT, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=64, head_dim=64)
    for changed, message in [
        (dict(data=str(tmp_path / "missing")), "does not exist"),
        (dict(data=nothing), "holds no token to predict"),
        (dict(eval=EvalConfig(data=nothing)), "hold no token to predict"),
        (dict(eval=EvalConfig(data=other)), "different tokenizers"),
        (dict(batch_tokens=32), "batch_tokens 32 is below the longest chunk"),
        (dict(model=replace(STUDENT, vocab_size=499)), "vocab_size 499"),
        (dict(model=huge), r"[\d,]{15} parameters, which takes [\d,.]+ GB of memory; this machine has"),
        (dict(init_from=str(tmp_path / "missing")), "missing"),
        (dict(init_from=str(broken)), "model.safetensors is not a whole"),
        (dict(init_from=str(reordered)), "the tokenizer of .*reordered is not the corpus's"),
        (dict(init_from=small), "predicts 400 ids"),
        (dict(model_config=str(tmp_path / "missing.json")), "does not exist"),
        (dict(model_config=str(tmp_path / "text.json")), "not valid JSON"),
        (dict(model_config=str(unknown)), "is not known to transformers"),
        (dict(model_config=small), "vocab_size 400 in .* is below the corpus's 500"),
        (dict(device="cuda:77"), "cuda:77"),
        (dict(output=str(Path(model) / "config.json")), "is a file"),
        (dict(output=model), "not empty"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            train(
                replace(
                    config,
                    **({"model": StudentConfig()} if {"init_from", "model_config"} & changed.keys() else {}),
                    **changed,
                )
            )
        assert "\n" not in str(raised.value)
        assert not Path(config.output).exists()


def test_warm_up_past_the_end_is_said(config, capsys):
    train(replace(config, steps=5, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=50)))
    assert (
        "optimizer.warmup_steps 50 is not below the run's 5 steps: the learning rate only rises, to 0.001 "
        "of 0.01" in capsys.readouterr().err
    )
    assert metrics(config.output)[-1]["lr"] == pytest.approx(1e-3)


def test_starts_from_weights(config, tiny_model, tiny_corpus, tmp_path):

    start = tiny_model(tmp_path / "start", seed=3)
    train(replace(config, model=StudentConfig(), init_from=start, steps=1, log_interval=1))
    corpus = Corpus(tiny_corpus)
    rows = corpus.rows(DataOrder(corpus.num_tokens, 200, config.seed).step(0))
    with torch.no_grad():
        assert metrics(config.output)[0]["loss"] == pytest.approx(
            plain_loss(AutoModelForCausalLM.from_pretrained(start), rows).item(), rel=1e-5
        )
    train(
        replace(
            config,
            model=StudentConfig(),
            init_from=config.output,
            output=config.output + "2",
            steps=2,
            eval=EvalConfig(),
        )
    )  # a training output is one too
    assert metrics(config.output + "2")[0]["loss"] < metrics(config.output)[0]["loss"]
    with pytest.raises(UserError, match="init_from was"):
        train(
            replace(config, model=StudentConfig(), init_from=tiny_model(tmp_path / "other", seed=4), steps=1)
        )


@pytest.mark.parametrize("architecture", ["LlamaConfig", "MambaConfig"])
def test_starts_from_any_architecture(config, architecture, monkeypatch, tmp_path):
    import transformers

    sizes = dict(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    if architecture == "MambaConfig":
        sizes = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)
    getattr(transformers, architecture)(
        **sizes, bos_token_id=1, eos_token_id=2, dtype="bfloat16"
    ).save_pretrained(tmp_path / "architecture")
    config = replace(
        config,
        model=StudentConfig(),
        model_config=str(tmp_path / "architecture" / "config.json"),
        steps=6,
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(interval=6, keep=1),
    )
    train(config)
    lines = metrics(config.output)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    saved = read_json(Path(latest_checkpoint(config.output)) / "config.json")
    assert (saved["eos_token_id"], saved["dtype"]) == (EOS, "float32")
    again = replace(config, output=config.output + "2")
    stop_after(again, 3, monkeypatch)
    train(again)
    check_equal_runs(config.output, again.output)


def test_equal_seeds_give_equal_weights_and_leave_the_callers_numbers_alone(config):
    setup, sources = stage._set_up(config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = initial_model(config, setup, sources)
    assert torch.equal(torch.rand(3), expected)
    second, other = (
        initial_model(config, setup, sources),
        initial_model(replace(config, seed=11), setup, sources),
    )
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head_weight, other.head_weight)


def test_activation_checkpointing(tiny_corpus, tmp_path):
    """The same bits; and refused, with nothing left behind, where the model is not the decoder."""
    config = replace(make_config(tiny_corpus, tmp_path / "plain"), steps=3)
    again = replace(config, output=str(tmp_path / "again"), activation_checkpointing=True)
    for each in (config, again):
        train(each)
    check_equal_runs(tmp_path / "plain", tmp_path / "again")

    GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    refused = replace(
        config,
        output=str(tmp_path / "refused"),
        activation_checkpointing=True,
        model=StudentConfig(),
        model_config=str(tmp_path / "gpt2"),
    )
    with pytest.raises(
        UserError,
        match=r"^activation_checkpointing is built for Qwen2, Llama and Qwen3, not for gpt2: leave it out",
    ):
        train(refused)
    assert not (tmp_path / "refused").exists()


def test_out_of_memory_is_one_line(tiny_corpus, tmp_path, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(
        UserError,
        match=r"^out of GPU memory: lower micro_batch_tokens \(now 70\), or set activation_checkpointing; "
        r"the run continues",
    ):
        train(make_config(tiny_corpus, tmp_path / "run"))


def test_micro_batches_shrink_until_they_fit(tiny_corpus, tmp_path, monkeypatch, capsys):
    """Where their size is the program's choice and memory does not do; in the end the run is as one with that
    size. A stopped run goes on with it."""
    config = replace(
        make_config(tiny_corpus, tmp_path / "run"), micro_batch_tokens=None, batch_tokens=4000, steps=8
    )
    original, sizes = training_step.summed_loss, []

    def small_memory(model, batch, dtype):
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 1100 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, batch, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "summed_loss", small_memory)
        stop_after(config, 5, monkeypatch)
        notes = [line for line in capsys.readouterr().err.splitlines() if "out of GPU memory" in line]
        assert notes == [
            f"out of GPU memory: micro-batches of {size:,} tokens from here on" for size in (2048, 1024)
        ]
        tried = len(sizes)
        train(config)
    assert "out of GPU memory" not in capsys.readouterr().err and max(sizes[tried:]) <= 1100 < max(sizes)
    train(replace(config, output=str(tmp_path / "whole"), micro_batch_tokens=1024))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    weights = [
        next((tmp_path / name / "checkpoints").glob("step-*08/model.safetensors")).read_bytes()
        for name in ("run", "whole")
    ]
    assert weights[0] == weights[1]
