"""miniplm.decoder against transformers: logits, gradients, initialisation, FLOPs, and what it saves."""

import json

import pytest
import torch
import torch._dynamo.testing
from random_models import (
    ADAPTED,
    DECODED,
    LENGTHS,
    documents,
    logits,
    random_model,
    saved,
    transformers_logits,
)
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from miniplm.config import StudentConfig
from miniplm.models import decoder
from miniplm.models.decoder import Decoder, student_config
from miniplm.models.loading import load_model, weight_files
from miniplm.runtime.errors import UserError


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DECODED)
@torch.inference_mode()
def test_decoder_equals_transformers(name, seed, tmp_path):
    theirs = random_model(DECODED[name], seed)
    ours = load_model(saved(theirs, tmp_path))
    assert type(ours) is Decoder and not ours.training
    assert set(ours.state_dict()) == {
        key for key in theirs.state_dict() if key != "lm_head.weight" or not theirs.config.tie_word_embeddings
    }
    batch = documents(seed=seed)
    expected = transformers_logits(theirs, *batch)
    torch.testing.assert_close(logits(ours, *batch), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(ours, *batch, max_seqlen=max(LENGTHS)), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5  # the comparison is not one of zeros


def test_every_document_starts_at_position_zero(monkeypatch):
    """The logits hardly tell: attention sees differences of positions only."""
    seen = []
    monkeypatch.setattr(
        decoder, "apply_rotary", lambda q, k, positions, inv_freq: seen.append(positions) or (q, k)
    )
    Decoder(DECODED["llama mqa"])(*documents())
    assert len(seen) == 3
    for positions in seen:
        assert positions.tolist() == [position for length in LENGTHS for position in range(length)]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 3]])
@torch.inference_mode()
def test_decoder_on_few_tokens(lengths):
    torch.manual_seed(0)
    model = Decoder(DECODED["qwen3 gqa"])
    input_ids, cu_seqlens = documents([*lengths, 7])
    few = model(input_ids[: sum(lengths)], cu_seqlens[:-1])
    torch.testing.assert_close(few, model(input_ids, cu_seqlens)[: sum(lengths)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama llama3", "llama biased tied", "qwen3 biased tied yarn"])
def test_gradients_equal_transformers(name, tmp_path):
    theirs = random_model(DECODED[name])
    ours = load_model(saved(theirs, tmp_path))
    input_ids, cu_seqlens = documents()
    targets = input_ids.roll(-1)
    F.cross_entropy(logits(ours, input_ids, cu_seqlens), targets).backward()
    F.cross_entropy(transformers_logits(theirs, input_ids, cu_seqlens), targets).backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


def test_new_decoder_is_initialised_as_in_transformers():
    torch.manual_seed(0)
    config = student_config(
        StudentConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
        1000,
        5,
    )
    weights, theirs = Decoder(config).state_dict(), AutoModelForCausalLM.from_config(config).state_dict()
    for name, weight in weights.items():
        assert weight.shape == theirs[name].shape and weight.dtype == torch.float32
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05) and abs(weight.mean()) < 1e-3, name
        else:
            assert torch.equal(weight, theirs[name]), name
    torch.manual_seed(0)
    assert all(torch.equal(weight, weights[name]) for name, weight in Decoder(config).state_dict().items())
    assert config.dtype == torch.float32


def test_flops_are_those_of_the_matrix_products(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    config = DECODED["qwen3 gqa"]
    theirs = random_model(config)
    theirs.set_attn_implementation("eager")
    ours = load_model(saved(theirs, tmp_path))
    context = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(input_ids=documents([context])[0][None])
    counts = (
        counter.get_flop_counts()
    )  # some versions write the angles of the rotary embedding as a matrix product
    flops = sum(counts["Global"].values()) - sum(counts.get("Qwen3ForCausalLM.model.rotary_emb", {}).values())
    # This attention computes all context² pairs, of which context·(context + 1)/2 are causal.
    per_pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert context * ours.flops_per_token(context) == flops - per_pair * context * (context - 1) // 2
    assert ours.num_parameters() == theirs.num_parameters()


def test_student_config_carries_every_setting():
    student = StudentConfig(
        model_type="llama",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        initializer_range=0.01,
    )
    config = student_config(student, vocab_size=300, eos_token_id=7)
    for name in (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rms_norm_eps",
        "max_position_embeddings",
        "initializer_range",
    ):
        assert getattr(config, name) == getattr(student, name), name
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (300, 7, 7)
    assert student_config(StudentConfig(vocab_size=512), 300, 7).vocab_size == 512
    for model_type in (
        "qwen2",
        "qwen3",
    ):  # the default width of a head is d / heads, whatever transformers' own default
        config = student_config(StudentConfig(model_type=model_type), 300, 7)
        with torch.device("meta"):
            assert (
                Decoder(config).model.layers[0].self_attn.head_dim == 64 and config.num_key_value_heads == 12
            )


def test_student_config_refuses(monkeypatch):
    with pytest.raises(UserError, match="vocab_size 200 is below the tokenizer's 300"):
        student_config(StudentConfig(vocab_size=200), 300, 7)

    def refuse(*args, **settings):
        raise ValueError("a rule\nof its own")

    monkeypatch.setattr(AutoConfig, "for_model", refuse)
    with pytest.raises(UserError, match="transformers refuses this model: a value in it cannot be used"):
        student_config(StudentConfig(), 300, 7)


def test_decoder_refuses_what_it_cannot_compute():
    with pytest.raises(UserError, match="sliding windows"):
        Decoder(ADAPTED["qwen2 sliding window"])


@pytest.mark.parametrize("name", ["qwen2 gqa", "llama llama3", "llama biased tied", "qwen3 biased tied yarn"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@torch.inference_mode()
def test_saved_decoder_opens_in_transformers(name, shard_size, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "MAX_SHARD_SIZE", shard_size)
    torch.manual_seed(3)
    model = Decoder(DECODED[name])
    model.save_pretrained(tmp_path)
    files = weight_files(tmp_path)
    assert len(files) == 1 if shard_size == "5GB" else len(files) > 3
    found = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            found |= set(opened.keys())
    assert ("lm_head.weight" in found) != model.config.tie_word_embeddings
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == 2
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    batch = documents()
    torch.testing.assert_close(logits(model, *batch), transformers_logits(theirs, *batch), atol=1e-4, rtol=0)
    again = load_model(tmp_path)
    assert all(torch.equal(weight, model.state_dict()[key]) for key, weight in again.state_dict().items())


def test_equal_models_are_equal_bytes(tmp_path):
    for name in "ab":
        torch.manual_seed(0)
        Decoder(DECODED["qwen2 gqa"]).save_pretrained(tmp_path / name)
        load_model(tmp_path / name).save_pretrained(tmp_path / f"{name}2")
    for file in (tmp_path / "a").iterdir():
        for other in ("b", "a2", "b2"):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), (other, file.name)
