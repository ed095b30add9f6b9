"""miniplm.model: every kind of model in, the same logits as transformers out; files that are not models are
refused."""

import json
import re
import shutil

import pytest
import torch
from random_models import ADAPTED, DECODED, documents, logits, random_model, saved, transformers_logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from miniplm.config import StudentConfig
from miniplm.models.decoder import Decoder, student_config
from miniplm.models.loading import TransformersLM, load_model, weight_files
from miniplm.runtime.errors import UserError
from miniplm.training.checkpoints import latest_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny Qwen2 (tied: 97 x 32 embedding) as transformers writes it."""
    return saved(random_model(DECODED["qwen2 mha tied"]), tmp_path / "model")


def rewrite(folder, change):
    """Apply change(tensors) to the weights in a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def test_sharded_weights_of_transformers(tmp_path):
    theirs = random_model(DECODED["llama mqa"])
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    files = weight_files(tmp_path)
    assert len(files) > 3 and files == sorted(tmp_path.glob("model-*.safetensors"))
    batch = documents()
    torch.testing.assert_close(
        logits(load_model(tmp_path), *batch), transformers_logits(theirs, *batch), atol=1e-4, rtol=0
    )
    files[1].unlink()
    with pytest.raises(
        UserError, match=f"{files[1].name} is missing, though model.safetensors.index.json names it"
    ):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json is damaged \(weight_map: it is missing\): download"):
        load_model(tmp_path)


@torch.inference_mode()
def test_half_precision_files_and_models(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    whole = load_model(folder)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight.bfloat16(), model.state_dict()[name])
    # The rotary frequencies stay in float32, also through .to(dtype).
    assert torch.equal(model.inv_freq, whole.inv_freq) and torch.equal(
        load_model(folder).to(torch.bfloat16).inv_freq, whole.inv_freq
    )
    model.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    batch = documents()
    error = logits(model, *batch).float() - logits(whole, *batch)
    assert 0 < error.norm() / logits(whole, *batch).norm() < 0.05
    widened = load_model(folder)
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}
    assert torch.equal(widened.head_weight, model.head_weight.float())


def test_loaded_weights_do_not_hang_on_the_file(folder):
    model = load_model(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.inference_mode()
def test_a_tied_head_in_the_file(folder):
    """A second copy is dropped, a lone head is the embedding, and two different matrices are two: as in
    transformers."""
    batch = documents()
    expected = logits(load_model(folder), *batch)

    def check(change, equal):
        rewrite(folder, change)
        model = load_model(folder)
        torch.testing.assert_close(
            logits(model, *batch),
            transformers_logits(AutoModelForCausalLM.from_pretrained(folder), *batch),
            atol=1e-4,
            rtol=0,
        )
        assert torch.equal(logits(model, *batch), expected) is equal
        return model

    check(
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}), True
    )
    check(lambda tensors: tensors.pop("model.embed_tokens.weight"), True)
    check(lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["lm_head.weight"] * 2}), False)


def test_old_buffers_in_the_file_are_passed_over(folder):
    expected = load_model(folder).state_dict()
    rewrite(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert load_model(folder).state_dict().keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "1 missing (model.layers.1.mlp.up_proj.weight)",
        ),
        (
            lambda t: t.update({"model.layers.9.extra": torch.ones(2)}),
            "1 not of this architecture (model.layers.9.extra)",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "1 of another shape (model.norm.weight)"),
    ],
)
def test_weights_that_do_not_fit_the_config(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(folder)


def test_adapter_weights_that_do_not_fit_the_config(tmp_path):
    saved(random_model(ADAPTED["gpt_neox"]), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("gpt_neox.final_layer_norm.weight"))
    with pytest.raises(UserError, match=r"1 missing \(gpt_neox\.final_layer_norm\.weight\)"):
        load_model(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"gpt_neox.final_layer_norm.weight": torch.ones(7)}))
    with pytest.raises(UserError, match=r"1 of another shape \(gpt_neox\.final_layer_norm\.weight\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
@pytest.mark.parametrize("name", ["qwen2 gqa", "gpt2"])
def test_truncated_weights(name, keep, tmp_path):
    saved(random_model({**DECODED, **ADAPTED}[name]), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_not_models(folder, tmp_path):
    def refused(name, message):
        with pytest.raises(UserError, match=message) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "absent", "absent does not exist")
    refused("./absent", "absent does not exist")
    refused(tmp_path / "absent.gguf", "absent.gguf does not exist")
    refused(folder / "config.json", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no config.json")
    shutil.copytree(folder, tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text("{")
    refused(tmp_path / "config", "config.json")
    (tmp_path / "config" / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    refused(tmp_path / "config", "config.json.*nonsense")
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    refused(folder, "holds no model.safetensors.*convert them to safetensors")
    AutoConfig.for_model("gpt2").save_pretrained(folder)
    refused(folder, "holds no model.safetensors.*convert them to safetensors")
    refused("nobody/nothing", "neither a local folder nor a Hugging Face model that can be reached")
    refused("not a name", "neither a local folder nor a Hugging Face model that can be reached")


def test_hugging_face_id_from_the_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(load_model("someone/tiny").head_weight, load_model(folder).head_weight)
    assert weight_files("someone/tiny") == [snapshot / "model.safetensors"]


def test_only_the_model_itself_is_downloaded(folder, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    listing = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    others = [
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.00.safetensors",
        "consolidated.safetensors",
        "onnx/config.json",
        "README.md",
    ]

    def download(name, allow_patterns, ignore_patterns):
        assert name == "someone/tiny"
        assert set(
            filter_repo_objects(
                listing + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        ) == set(listing)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert weight_files("someone/tiny") == [folder / "model.safetensors"]


def test_remote_code_runs_only_when_asked(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config.update(
        model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()
    assert type(load_model(folder, trust_remote_code=True)) is TransformersLM
    assert (tmp_path / "ran").exists()


def test_a_training_output_gives_its_latest_checkpoint(tmp_path):
    for step in (200, 1000):
        Decoder(
            student_config(
                StudentConfig(
                    hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
                ),
                step,
                1,
            )
        ).save_pretrained(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert load_model(latest_checkpoint(tmp_path)).head_weight.shape[0] == 1000
    assert weight_files(latest_checkpoint(tmp_path)) == [
        tmp_path / "checkpoints" / "step-00001000" / "model.safetensors"
    ]
