"""generate against a loop over transformers' logits, where it stops, what it prints, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniplm.config import GenerateConfig
from miniplm.data.tokenizer import load_tokenizer
from miniplm.runtime.errors import UserError
from miniplm.stages.generate import generate

PROMPT = "the teacher keeps\nrare (data) 漢字 🙂"


def run(model, prompt=PROMPT, **settings):
    return generate(
        GenerateConfig(
            model=str(model),
            prompt=prompt,
            device="cpu",
            dtype="float32",
            **{"max_new_tokens": 12, **settings},
        )
    )


def greedy(folder, ids, count, stop=()):
    """(text, ids) of the likeliest continuation, one forward pass over everything per token."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    ids = tokenizer(ids)["input_ids"] if isinstance(ids, str) else list(ids)
    new = []
    while len(new) < count and not (new and new[-1] in stop):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True), new


def edit(path, change):
    value = json.loads(Path(path).read_text())
    change(value)
    Path(path).write_text(json.dumps(value))


def poison(model, name, change):
    tensors = load_file(Path(model) / "model.safetensors")
    change(tensors[name])
    save_file(tensors, Path(model) / "model.safetensors", metadata={"format": "pt"})


def test_greedy_text_and_what_is_printed(tiny_model, tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    text, _ = greedy(model, PROMPT, 12)
    assert text.strip()
    assert run(model, temperature=0) == text
    assert capsys.readouterr().out == PROMPT + text + "\n"


def test_what_a_terminal_obeys_is_written_out(tiny_model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    prompt, tokenizer = "\x1b[31mred\u202e\tx\a\n漢\u3000字\u200d🙂", load_tokenizer(model)
    (escape,) = tokenizer("\x1b")["input_ids"]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model).model
        hidden = base(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1]
    poison(model, "lm_head.weight", lambda weight: weight[escape].copy_(10 * hidden))
    text, _ = greedy(model, prompt, 12)
    assert text.startswith("\x1b") and run(model, prompt, temperature=0) == text
    printed = capsys.readouterr().out
    assert printed.startswith("\\x1b[31mred\\u202e\tx\\x07\n漢\u3000字\u200d🙂\\x1b")
    assert "\x1b" not in printed and "\u202e" not in printed


def test_sampling_is_seeded_and_bounded(tiny_model, tmp_path):
    model = tiny_model(tmp_path / "model")
    text, _ = greedy(model, PROMPT, 12)
    first = run(model, seed=1)
    torch.manual_seed(99)  # what went before does not count
    assert run(model, seed=1) == first
    assert len({first, *(run(model, seed=seed, temperature=1.5, top_p=1.0) for seed in range(4))}) == 5
    assert run(model, seed=1, top_p=1e-9, temperature=1.5) == text  # the likeliest token alone is left
    for temperature in (1e-3, 1e-7, 1e-40, 5e-324):  # by the last two logits cannot be divided
        assert run(model, seed=1, temperature=temperature) == text


def test_sampling_follows_the_temperature(tiny_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, TextStreamer

    model = tiny_model(
        tmp_path / "model", initializer_range=0.05
    )  # a flat distribution: transformers' own top_k of 50 would show
    tokenizer = load_tokenizer(model)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(**tokenizer("data", return_tensors="pt")).logits[
            0, -1
        ]
    probability, order = (logits / 1.3).softmax(-1).sort(descending=True)
    beyond = probability[50:].sum().item()
    drawn = []
    monkeypatch.setattr(TextStreamer, "put", lambda streamer, ids: drawn.append(ids.flatten()[-1].item()))
    for seed in range(60):
        run(model, "data", seed=seed, temperature=1.3, top_p=1.0, max_new_tokens=1)
    share = sum(token in order[50:] for token in drawn[1::2]) / 60
    assert (
        len(drawn) == 120
        and 0.2 < beyond < 0.95
        and abs(share - beyond) < 4 * math.sqrt(beyond * (1 - beyond) / 60)
    )


def test_end_tokens_stop_it(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    _, new = greedy(model, PROMPT, 12)
    end = new[5]
    edit(Path(model) / "generation_config.json", lambda config: config.update(eos_token_id=[499, end]))
    text, short = greedy(model, PROMPT, 12, stop=[end])
    assert 1 <= len(short) < 12 and run(model, temperature=0) == text

    with torch.no_grad():  # the tokenizer's EOS counts too, though the model's settings name another one
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(model)
        hidden = loaded.model(**load_tokenizer(model)(PROMPT, return_tensors="pt")).last_hidden_state[0, -1]
    poison(model, "lm_head.weight", lambda weight: weight[0].copy_(hidden))
    assert greedy(model, PROMPT, 1)[1] == [0]
    put = []
    monkeypatch.setattr(
        "transformers.TextStreamer.put", lambda streamer, ids: put.append(ids.flatten().tolist())
    )
    assert run(model, temperature=0) == "" and put[1:] == [[0]]


def test_other_generation_settings_of_the_model_do_not_count(tiny_model, tmp_path):
    model = tiny_model(tmp_path / "model")
    text, sampled = run(model, temperature=0, max_new_tokens=40), run(model, max_new_tokens=40)
    assert text == greedy(model, PROMPT, 40)[0]
    edit(
        Path(model) / "generation_config.json",
        lambda config: config.update(
            repetition_penalty=5.0, top_k=2, min_new_tokens=3, do_sample=True, temperature=0.1, num_beams=2
        ),
    )
    assert (run(model, temperature=0, max_new_tokens=40), run(model, max_new_tokens=40)) == (text, sampled)


def test_empty_prompt_starts_a_document(tiny_model, tmp_path):
    model = tiny_model(tmp_path / "model")
    assert run(model, "", temperature=0) == greedy(model, [0], 12)[0]
    token = load_tokenizer(model).convert_ids_to_tokens(300)
    edit(Path(model) / "tokenizer_config.json", lambda config: config.update(bos_token=token))
    bos = load_tokenizer(model).bos_token_id
    assert bos == 300
    assert run(model, "", temperature=0) == greedy(model, [bos], 12)[0]


def test_context(tiny_model, tmp_path, capsys):
    model = tiny_model(tmp_path / "model", max_position_embeddings=16)
    tokenizer = load_tokenizer(model)
    ids = tokenizer("data token chunk score " * 20)["input_ids"]
    fits, full = tokenizer.decode(ids[:10]), tokenizer.decode(ids[:16])
    assert (len(tokenizer(fits)["input_ids"]), len(tokenizer(full)["input_ids"])) == (10, 16)
    assert run(model, fits, temperature=0) == greedy(model, fits, 6)[0]
    assert "room for 6 new tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="the prompt has 16 tokens"):
        run(model, full)
    with pytest.raises(UserError, match=f"the prompt has {len(ids)} tokens"):
        run(model, "data token chunk score " * 20)


def test_training_output_and_another_architecture(tiny_model, tmp_path):
    from transformers import GPT2Config

    for step in (5, 10):
        tiny_model(
            tmp_path / "run" / "checkpoints" / f"step-{step:08d}",
            seed=step,
            config_class=GPT2Config,
            n_embd=32,
            n_head=4,
            n_layer=2,
        )
    latest, older = (
        greedy(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", PROMPT, 12)[0] for step in (10, 5)
    )
    assert latest != older
    assert run(tmp_path / "run", temperature=0) == latest


@pytest.mark.parametrize("temperature", [0, 1])
def test_output_that_is_not_finite(tiny_model, tmp_path, temperature):
    model = tiny_model(tmp_path / "model")
    poison(model, "model.norm.weight", lambda weight: weight.fill_(math.nan))
    with pytest.raises(UserError, match="not finite"):
        run(model, temperature=temperature)


def test_bad_models(tiny_model, tmp_path):
    with pytest.raises(UserError, match="missing"):
        run(tmp_path / "missing" / "model")
    model = Path(tiny_model(tmp_path / "model", vocab_size=300))
    with pytest.raises(UserError, match=r"more ids than the model \(300\)"):
        run(model)
    model = Path(tiny_model(tmp_path / "other"))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError) as caught:
        run(model)
    assert "\n" not in str(caught.value)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run(model)


def test_empty_prompt_without_a_token_to_start_from(tiny_model, tmp_path):
    from transformers import LlamaConfig

    model = tiny_model(tmp_path / "model", config_class=LlamaConfig)
    edit(Path(model) / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        run(model, "")


def test_weights_that_are_missing(tiny_model, tmp_path):
    model = tiny_model(tmp_path / "model")
    tensors = load_file(Path(model) / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, Path(model) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\)"):
        run(model)


def test_gguf_file(tiny_model, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    folder = Path(tiny_model(tmp_path / "model"))
    config, tokenizer = (
        json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json")
    )
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    fields = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "head_count_kv": "num_key_value_heads",
        "feed_forward_length": "intermediate_size",
        "head_count": "num_attention_heads",
        "layer_norm_rms_eps": "rms_norm_eps",
    }
    for field, key in fields.items():
        getattr(writer, f"add_{field}")(config[key])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(vocabulary) - 1)])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    prompt = "teacher"
    assert run(tmp_path / "tiny.gguf", prompt, temperature=0) == greedy(folder, prompt, 12)[0]
    assert capsys.readouterr().out.startswith(prompt)
