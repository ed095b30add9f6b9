"""models/loading.py on GGUF files."""

import re

import pytest
import torch
from random_models import DECODED, SIZES, documents, logits, random_model, saved, transformers_logits
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from miniplm.models.decoder import Decoder
from miniplm.models.loading import load_model, weight_files
from miniplm.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny Qwen2 (tied: 97 x 32 embedding) as transformers writes it."""
    return saved(random_model(DECODED["qwen2 mha tied"]), tmp_path / "model")


def rewrite(folder, change):
    """Apply change(tensors) to the weights in a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny random Llama as llama.cpp's converter writes it, and the transformers model it came from."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    theirs = random_model(
        LlamaConfig(
            **{**SIZES, "hidden_size": 64, "intermediate_size": 96}, num_key_value_heads=2, rms_norm_eps=1e-5
        )
    )
    config, path = theirs.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in theirs.state_dict().items():
        layer, stem = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }.get(stem)
        if heads:  # GGUF interleaves the two halves that rotary embeddings pair
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor((f"blk.{layer}." if layer else "") + names[stem] + ".weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, theirs


@torch.inference_mode()
def test_gguf_equals_the_model_it_was_made_of(gguf_file, tmp_path):
    path, theirs = gguf_file
    model = load_model(path)
    assert type(model) is Decoder and weight_files(path) == [path]
    batch = documents()
    expected = transformers_logits(theirs, *batch)
    torch.testing.assert_close(logits(model, *batch), expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "converted")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "converted"), *batch), expected, atol=1e-4, rtol=0
    )
    assert {parameter.dtype for parameter in load_model(path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_gguf_refusals(gguf_file, monkeypatch):
    path, _ = gguf_file
    content = path.read_bytes()
    for bad in (b"", content[:3], content[:300], content[:-5000], b"x" * 1000):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"tiny\.gguf") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install miniplm\[gguf\]"):
        load_model(path)
