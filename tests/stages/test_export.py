"""export of a model that the real stages made: what is in the folder, who can read it, and what is
refused."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from export_runs import PLAN, TINY, card, contents, logits, publish
from training_runs import seal

from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json


def test_transformers_gives_the_same_logits_and_tokens(work, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    checkpoint = work / "refined-student" / "checkpoints" / "step-00000006"
    folder = publish(work / "refined-student", tmp_path / "model")
    assert sorted(contents(folder)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert torch.equal(logits(folder), logits(checkpoint))
    assert not torch.equal(logits(folder), logits(checkpoint.with_name("step-00000003")))
    config = read_json(folder / "config.json")
    assert (
        config["architectures"] == ["LlamaForCausalLM"]
        and config["dtype"] == config["torch_dtype"] == "float32"
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6

    ours, original = (
        AutoTokenizer.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(work / "refined" / "tokenizer"),
    )
    text = "It's the  teacher's (data), 2024é\n\n漢字 🙂<|endoftext|>x"
    assert ours.get_vocab() == original.get_vocab() and ours(text)["input_ids"] == original(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert (ours.eos_token, ours.eos_token_id, ours.model_max_length) == ("<|endoftext|>", 0, 96)
    generation = read_json(folder / "generation_config.json")
    assert (generation["eos_token_id"], generation["bos_token_id"], generation["pad_token_id"]) == (0, 0, 0)
    assert not any(
        str(tmp_path) in text.decode("utf-8", "replace") or str(work) in text.decode("utf-8", "replace")
        for text in contents(folder).values()
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(work, tmp_path, dtype):
    from safetensors.torch import load_file

    checkpoint, folder = (
        work / "refined-student" / "checkpoints" / "step-00000006",
        publish(work / "refined-student", tmp_path / "model", dtype=dtype),
    )
    written, original = load_file(folder / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name].to(getattr(torch, dtype))) for name in original)
    config = read_json(folder / "config.json")
    assert config["dtype"] == config["torch_dtype"] == dtype
    exact, rounded = logits(checkpoint), logits(folder, dtype=torch.float32)
    assert 0 < (rounded - exact).norm() < (0.05 if dtype == "bfloat16" else 0.006) * exact.norm()
    assert logits(folder).dtype == getattr(torch, dtype)


def test_one_checkpoint_and_its_own_figures(work, tmp_path):
    folder = publish(work / "refined-student" / "checkpoints" / "step-00000003", tmp_path / "model")
    assert torch.equal(logits(folder), logits(work / "refined-student" / "checkpoints" / "step-00000003"))
    lines = [
        json.loads(line) for line in (work / "refined-student" / "metrics.jsonl").read_text().splitlines()
    ]
    (line,) = [line for line in lines if line["step"] == 3]
    text = card(folder).text
    assert "| Steps | 3 of 6 planned: the run had not ended here |" in text
    assert f"| Training loss | {line['loss']:.4f} nats per token at step 3 |" in text
    assert f"| Held-out loss | {line['eval_loss']:.4f} nats per token at step 3 |" in text


def test_a_pipeline_of_transformers_generates_from_it(work, tmp_path):
    """From the folder alone, offline, and what generate of the model gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder = publish(work / "refined-student", tmp_path / "model")
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["the teacher", "a"]
    said = generate(prompts, max_new_tokens=8, do_sample=False)
    model, tokenizer = (each.from_pretrained(folder) for each in (AutoModelForCausalLM, AutoTokenizer))
    for prompt, (result,) in zip(prompts, said, strict=True):
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert result["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
        assert result["generated_text"].startswith(prompt) and len(result["generated_text"]) > len(prompt)


def test_snippets_on_the_card_run(work, tmp_path, monkeypatch, capsys):
    folder = publish(work / "refined-student", tmp_path / 'it\'s "a" `model`')
    snippets = re.findall(r"^```python\n(.*?)^```$", card(folder).text, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    said = []
    for snippet in snippets:
        capsys.readouterr()
        exec(snippet, {})
        said.append(capsys.readouterr().out)
    assert len(said) == 2 and all(text.startswith("The") for text in said)


def test_equal_export_is_left_alone_and_another_refused(work, tmp_path, capsys):
    folder = publish(work / "refined-student", tmp_path / "model")
    before, times = contents(folder), {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    publish(work / "refined-student", tmp_path / "model")
    assert "nothing to do" in capsys.readouterr().out
    assert times == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for settings in (
        {"dtype": "bfloat16"},
        {"license": "mit"},
        {"evaluation": str(work / "losses.json")},
        {"language": ["de"]},
    ):
        with pytest.raises(UserError, match="holds another export"):
            publish(work / "refined-student", folder, **settings)
    with pytest.raises(UserError, match="holds another export"):
        publish(work / "random-student", folder)
    assert contents(folder) == before
    with pytest.raises(UserError, match="'train' run"):
        publish(work / "refined-student", work / "random-student")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        publish(work / "refined-student", tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        publish(work / "refined-student", tmp_path / "mine" / "thesis.txt")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"x"}
    (tmp_path / "empty").mkdir()
    again = contents(publish(work / "refined-student", tmp_path / "empty", name="model"))
    assert again.pop("README.md") == before.pop("README.md").replace(b"'model'", b"'empty'")
    manifest, other = (json.loads(files.pop("manifest.json")) for files in (before, again))
    assert manifest["files"].pop("README.md") != other["files"].pop("README.md")
    assert (manifest, before) == (other, again)  # equal runs, equal bytes


def test_nothing_is_left_of_an_export_that_fails(work, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("miniplm.stages.export.model_card", fail)  # the last file of all
    with pytest.raises(OSError, match="No space"):
        publish(work / "refined-student", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_full_disk(work, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # less than the weights take
    try:
        with pytest.raises(OSError, match=r"[Ff]ile too large"):
            publish(work / "refined-student", tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints(work, student_run, tmp_path, tiny_model):
    latest = student_run / "checkpoints" / "step-00000006"
    with pytest.raises(UserError, match="does not exist"):
        publish(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(UserError, match="neither a training output"):
        publish(tiny_model(tmp_path / "plain"), tmp_path / "out")
    with pytest.raises(UserError, match="neither a training output"):
        publish(shutil.copytree(latest, tmp_path / "a" / "b" / "alone"), tmp_path / "out")
    with pytest.raises(UserError, match="does not belong"):
        publish(shutil.copytree(latest, work / "random-student" / "checkpoints" / "stray"), tmp_path / "out")
    shutil.rmtree(work / "random-student" / "checkpoints" / "stray")

    (latest / "optimizer.safetensors").unlink()  # not needed
    publish(student_run, tmp_path / "fine")
    whole = (latest / "model.safetensors").read_bytes()
    (latest / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"damaged \(model.safetensors"):
        publish(student_run, tmp_path / "out")
    (latest / "tokenizer.json").unlink()
    (latest / "model.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"damaged \(tokenizer.json"):
        publish(student_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(student_run, tmp_path):
    from safetensors.torch import load_file, save_file

    path = student_run / "checkpoints" / "step-00000006" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6  # finite, but not in float16
    save_file(tensors, path, metadata={"format": "pt"})
    seal(path.parent)
    with pytest.raises(UserError, match=r"1 tensors .* not finite in float16 \(model.norm.weight\)"):
        publish(student_run, tmp_path / "out", dtype="float16")
    publish(student_run, tmp_path / "out")


def test_tokenizer_that_auto_tokenizer_reads_otherwise(work, tiny_tokenizer, tmp_path):
    """transformers 5 takes the words of Qwen2 for the tokenizer of any qwen2 model: written as a Llama unless
    the tokenizer has those words."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    from miniplm.stages.train import train

    run, qwen2 = tmp_path / "qwen2-student", dataclasses.replace(TINY, model_type="qwen2")
    train(dataclasses.replace(PLAN, data=str(work / "refined"), output=str(run), steps=1, model=qwen2))
    checkpoint = run / "checkpoints" / "step-00000001"
    with torch.no_grad():
        weights = load_file(checkpoint / "model.safetensors")
        for name, weight in weights.items():  # biases start at 0, where one that is lost would not show
            weight += 0.1 * torch.randn(weight.shape) if name.endswith("bias") else 0
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    seal(checkpoint)
    publish(run, tmp_path / "llama")
    exported, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), torch.arange(60)[None]
    assert exported.config.model_type == "llama" and any("q_proj.bias" in name for name in weights)
    torch.testing.assert_close(
        exported(ids).logits,
        AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits,
        rtol=1e-6,
        atol=1e-6,
    )
    own = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer).backend_tokenizer
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "llama")("It's 2024:\n\n DON'T")["input_ids"]
        == own.encode("It's 2024:\n\n DON'T").ids
    )
    words = Qwen2Tokenizer().backend_tokenizer
    own.normalizer, own.pre_tokenizer = words.normalizer, words.pre_tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(own.to_str()), eos_token="<|endoftext|>"
    ).save_pretrained(checkpoint)
    seal(checkpoint)
    folder = publish(run, tmp_path / "out")
    text = "It's 2024 e\u0301\n\n  x"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == own.encode(text).ids
