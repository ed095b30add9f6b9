"""export --gguf: the file for llama.cpp in an exported folder."""

import dataclasses

import pytest
import torch
from export_runs import PLAN, TINY, publish
from llama_cpp_arithmetic import assert_computes
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.train import train

pytest.importorskip("gguf")
BOUNDS = torch.tensor([0, 40], dtype=torch.int32)


@torch.inference_mode()
def logits(path) -> torch.Tensor:
    model = load_model(path)
    ids = torch.randint(500, (40,), generator=torch.Generator().manual_seed(0))
    return model(ids, BOUNDS) @ model.head_weight.T


def checkpoint(run):
    return run / "checkpoints" / "step-00000006"


def test_the_file_is_the_checkpoint(work, tmp_path):
    exact = logits(checkpoint(work / "refined-student"))
    for encoding, error in (("f16", 5e-3), ("q8_0", 0.05)):
        folder = publish(work / "refined-student", tmp_path / encoding, gguf=encoding)
        file = f"model-{encoding}.gguf"
        assert file in read_json(folder / "manifest.json")["files"]
        assert 0 < (logits(folder / file) - exact).norm() < error * exact.norm()
        assert torch.equal(logits(folder), exact)  # the folder itself is as it is without


def test_a_qwen2_student_stays_one(tiny_corpus, tmp_path):
    run = tmp_path / "run"
    model = dataclasses.replace(TINY, model_type="qwen2")
    train(dataclasses.replace(PLAN, model=model, data=tiny_corpus, output=str(run), steps=6))
    folder = publish(run, tmp_path / "model", gguf="f16")
    assert read_json(folder / "config.json")["model_type"] == "llama"  # for transformers' tokenizer of qwen2
    assert load_model(folder / "model-f16.gguf").config.model_type == "qwen2"
    exact = logits(checkpoint(run))
    assert 0 < (logits(folder / "model-f16.gguf") - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("encoding", ["f16", "q8_0"])
def test_llama_cpp_computes_the_same(tiny_corpus, tmp_path, family, encoding):
    """Needs the package llama-cpp-python, which is compiled where it is installed (make llama-cpp)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = dataclasses.replace(TINY, model_type=family)
    run = str(tmp_path / "run")
    train(dataclasses.replace(PLAN, model=model, data=tiny_corpus, output=run, steps=6))
    folder = publish(run, tmp_path / "model", gguf=encoding)
    file = str(folder / f"model-{encoding}.gguf")
    llama = llama_cpp.Llama(file, n_ctx=96, n_threads=1, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The teacher keeps what the reference drops: 3.14 (small) [large]\n  é 漢字 🙂!"
    ids = tokenizer(text)["input_ids"]
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
    assert_computes(llama, AutoModelForCausalLM.from_pretrained(folder), ids, encoding)
    said = llama.create_completion(text, max_tokens=6, temperature=0.0)["choices"][0]
    assert said["finish_reason"] in ("length", "stop")


def test_an_export_with_another_file_is_another_export(work, tmp_path, capsys):
    folder = publish(work / "refined-student", tmp_path / "model", gguf="f16")
    capsys.readouterr()
    publish(work / "refined-student", folder, gguf="f16")
    assert "is complete, nothing to do" in capsys.readouterr().out
    for gguf in (None, "q8_0"):
        with pytest.raises(UserError, match="holds another export run"):
            publish(work / "refined-student", folder, gguf=gguf)
    (folder / "model-f16.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model-f16\.gguf is not as it was written"):
        publish(work / "refined-student", folder, gguf="f16")


def test_a_model_that_is_no_decoder_is_refused(tiny_corpus, tmp_path):
    GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2, n_positions=96).save_pretrained(
        tmp_path / "gpt2"
    )
    run = tmp_path / "run"
    plan = dataclasses.replace(PLAN, model=type(TINY)(), model_config=str(tmp_path / "gpt2" / "config.json"))
    train(dataclasses.replace(plan, data=tiny_corpus, output=str(run)))
    with pytest.raises(UserError, match=r"\.gguf file of a 'gpt2' model cannot be written"):
        publish(run, tmp_path / "model", gguf="f16")
    assert not (tmp_path / "model").exists()
