"""GGUF files that we write, read by transformers and, where it is installed, by llama.cpp."""

import itertools
import json

import pytest
import torch
from llama_cpp_arithmetic import assert_computes, expected_logits
from random_models import SIZES, documents, logits, random_model, saved, transformers_logits
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from miniplm.data.tokenizer import load_tokenizer
from miniplm.models.gguf_file import LLAMA3_WORDS, QWEN2_WORDS, write_gguf
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError

gguf = pytest.importorskip("gguf")
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}  # rows that q8_0 takes
MULTI_HEAD = {**WIDE, "num_key_value_heads": 4}
MODELS = {
    "qwen2 tied": Qwen2Config(**WIDE, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2 gqa": Qwen2Config(
        **WIDE,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama tied": LlamaConfig(**WIDE, num_key_value_heads=4, tie_word_embeddings=True),
    "llama gqa": LlamaConfig(
        **WIDE, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def rounded_to_half(model):
    """The model with its matrices as float16 holds them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half().float())
    return model


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_f16_is_the_model_with_its_matrices_in_half_precision(name, tokenizer, tmp_path):
    theirs = random_model(MODELS[name])
    model = load_model(saved(theirs, tmp_path / "model"))
    write_gguf(model, tokenizer, tmp_path / "made" / "model.gguf", "f16", "tiny")
    found = load_model(tmp_path / "made" / "model.gguf")
    assert type(found) is type(model)
    batch = documents(vocab_size=500)
    exact = transformers_logits(rounded_to_half(theirs), *batch)
    torch.testing.assert_close(logits(found, *batch), exact, atol=1e-4, rtol=1e-5)
    full = logits(model, *batch)
    assert 0 < (exact - full).norm() / full.norm() < 5e-3


@torch.inference_mode()
@pytest.mark.parametrize("name", ["qwen2 tied", "llama gqa"])
def test_q8_0_keeps_every_weight_to_a_part_in_254_of_its_block(name, tokenizer, tmp_path):
    model = load_model(saved(random_model(MODELS[name]), tmp_path / "model"))
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "q8_0", "tiny")
    found = load_model(tmp_path / "model.gguf")
    for parameter, tensor in model.state_dict().items():
        read = found.state_dict()[parameter]
        if tensor.ndim == 1:
            assert torch.equal(read, tensor), parameter
            continue
        blocks, read_blocks = tensor.unflatten(-1, (-1, 32)), read.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127  # the scale itself is float16
        assert ((blocks - read_blocks).abs() <= 0.502 * step + blocks.abs() * 2**-10).all(), parameter
        assert not torch.equal(read, tensor)
    sizes = {
        encoding: write(model, tokenizer, tmp_path, encoding).stat().st_size for encoding in ("f16", "q8_0")
    }
    assert sizes["q8_0"] < 0.65 * sizes["f16"]


def write(model, tokenizer, folder, encoding):
    path = folder / f"{encoding}.gguf"
    write_gguf(model, tokenizer, path, encoding, "tiny")
    return path


def test_rows_that_q8_0_does_not_take_are_f16(tokenizer, tmp_path):
    config = Qwen2Config(**{**WIDE, "hidden_size": 72, "intermediate_size": 96}, num_key_value_heads=4)
    model = load_model(saved(random_model(config), tmp_path / "model"))
    types = {
        tensor.name: tensor.tensor_type.name for tensor in tensors(write(model, tokenizer, tmp_path, "q8_0"))
    }
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.0.attn_q.bias"] == "F32"


def tensors(path):
    return gguf.GGUFReader(path).tensors


@pytest.mark.parametrize("name", ["qwen2 tied", "llama tied"])
def test_the_tokenizer_comes_back(name, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>"]})
    tokenizer.add_tokens(["MiniPLM"])
    model = load_model(saved(random_model(MODELS[name]), tmp_path / "model"))
    path = write(model, tokenizer, tmp_path, "f16")
    found = load_tokenizer(str(path))
    ids = range(len(tokenizer))
    assert found.convert_ids_to_tokens(ids) == tokenizer.convert_ids_to_tokens(ids)
    assert found.eos_token_id == tokenizer.eos_token_id
    text = "the teacher keeps rare data; the reference drops noise."
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    fields = gguf.GGUFReader(path).fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[index] for index in (0, 5, 500, 501, 502, 511)] == [3, 1, 3, 4, 5, 5]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.eos_token_id


def test_equal_models_are_equal_files(tokenizer, tmp_path):
    model = load_model(saved(random_model(MODELS["llama tied"]), tmp_path / "model"))
    first = write(model, tokenizer, tmp_path, "q8_0").read_bytes()
    assert write(model, tokenizer, tmp_path, "q8_0").read_bytes() == first


# ---- how text is cut ----


def with_parts(tokenizer, **parts):
    """The tokenizer with other parts of its tokenizer.json."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in parts.items():
        if key in content:
            content[key] = value
        else:
            content["model"][key] = value
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def byte_level(use_regex, add_prefix_space=False):
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


RULES = {
    "gpt-2": {"pre_tokenizer": byte_level(True)},
    "smollm": {
        "pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, byte_level(True)),
    },
    "qwen2": {
        "pre_tokenizer": sequence(split(QWEN2_WORDS), byte_level(False)),
        "normalizer": {"type": "NFC"},
    },
    "llama-bpe": {
        "pre_tokenizer": sequence(split(LLAMA3_WORDS), byte_level(False)),
        "ignore_merges": True,
    },
}


@pytest.mark.parametrize("rules", RULES)
def test_the_rules_for_words_have_a_name(rules, tokenizer, tmp_path):
    model = load_model(saved(random_model(MODELS["qwen2 tied"]), tmp_path / "model"))
    path = write(model, with_parts(tokenizer, **RULES[rules]), tmp_path, "f16")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == rules


UNKNOWN = [
    ({"pre_tokenizer": None}, "no rules for words like"),
    ({"pre_tokenizer": byte_level(True, add_prefix_space=True)}, "no rules for words like"),
    ({"pre_tokenizer": sequence(split(r"\d"), byte_level(True))}, "no rules for words like"),
    (
        {"pre_tokenizer": sequence(split(QWEN2_WORDS, "MergedWithNext"), byte_level(False))},
        "no rules for words like",
    ),
    ({**RULES["llama-bpe"], "ignore_merges": False}, "no rules for words like"),
    ({"byte_fallback": True}, "BPE with byte fallback"),
    ({"normalizer": {"type": "NFKC"}}, "normalised by NFKC"),
]


@pytest.mark.parametrize(("parts", "message"), UNKNOWN)
def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(parts, message, tokenizer, tmp_path):
    model = load_model(saved(random_model(MODELS["qwen2 tied"]), tmp_path / "model"))
    with pytest.raises(UserError, match=message):
        write(model, with_parts(tokenizer, **parts), tmp_path, "f16")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3Config(**MULTI_HEAD, head_dim=16), "type is 'qwen3'"),
        (LlamaConfig(**WIDE, attention_bias=True), "Llama with biases"),
        (
            Qwen2Config(**MULTI_HEAD, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
            "linear",
        ),
        (Qwen2Config(**{**MULTI_HEAD, "vocab_size": 400}), "500 ids, the model 400"),
    ],
)
def test_models_that_do_not_fit_are_refused(config, message, tokenizer, tmp_path):
    model = load_model(saved(random_model(config), tmp_path / "model"))
    with pytest.raises(UserError, match=message):
        write(model, tokenizer, tmp_path, "f16")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_weights_that_half_precision_does_not_hold_are_refused(value, tokenizer, tmp_path):
    model = load_model(saved(random_model(MODELS["qwen2 tied"]), tmp_path / "model"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has weights that float16 does not hold"):
        write(model, tokenizer, tmp_path, "f16")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_without_the_package(tokenizer, tmp_path, monkeypatch):
    model = load_model(saved(random_model(MODELS["qwen2 tied"]), tmp_path / "model"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install miniplm\[gguf\]"):
        write(model, tokenizer, tmp_path, "f16")


# ---- llama.cpp ----


TEXTS = ["the teacher keeps 1234 rare  data;\n\n漢字 é🙂 don't DON'T\n", " x1 3.14\t(small) [large]?!", "a"]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, rules, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = with_parts(tokenizer, **RULES[rules])
    theirs = random_model(MODELS[name])
    path = write(load_model(saved(theirs, tmp_path / "model")), tokenizer, tmp_path, "f16")
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=True) == ids
        assert llama.detokenize(ids).decode() == text
    ids = tokenizer(TEXTS[0])["input_ids"][:40]
    assert_computes(llama, theirs, ids, "f16")
    generated = list(itertools.islice(llama.generate(ids, temp=0.0), 8))
    logits = expected_logits(theirs, ids + generated, "f16")[len(ids) - 1 : -1]
    taken = logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
    assert (logits.amax(1) - taken <= 0.03).all()  # greedy, but for ties within the error of the logits
