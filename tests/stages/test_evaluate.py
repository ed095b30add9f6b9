"""evaluate against an independent computation from transformers' logits, and what it does with bad models,
corpora and names."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_corpus

from miniplm.config import EvaluateConfig
from miniplm.data.corpus import Corpus
from miniplm.runtime.artifacts import open_output
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.runtime.locks import lock
from miniplm.stages import evaluate as evaluation
from miniplm.stages.evaluate import evaluate

EOS = 0


def run(model, data, **settings):
    return evaluate(
        EvaluateConfig(model=str(model), data=str(data), device="cpu", dtype="float32", **settings)
    )


def truth(model, corpus: Corpus, document_mask=False) -> dict:
    """{domain: (chunks, loss sum, tokens)}, chunk by chunk from transformers' logits with the softmax in
    float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model).eval()
    codes, names = corpus.domains
    sums = {name: [0, 0.0, 0] for name in names}
    for code, row in zip(codes, corpus.rows(range(len(corpus))), strict=True):
        ids = torch.tensor(row.astype(np.int64))
        cuts = (
            [0, *((ids[:-1] == EOS).nonzero()[:, 0] + 1).tolist(), len(ids) - 1]
            if document_mask
            else [0, len(ids) - 1]
        )
        total = sums[names[code]]
        total[0] += 1
        for start, stop in pairwise(cuts):
            if start == stop:
                continue
            with torch.no_grad():
                log_probs = model(ids[None, start:stop]).logits[0].double().log_softmax(-1)
            for place in range(start, stop):
                if ids[place] != EOS:
                    total[1] -= log_probs[place - start, ids[place + 1]].item()
                    total[2] += 1
    return sums


def assert_figures(result, sums):
    everything = np.sum(list(sums.values()), axis=0)
    for figures, (rows, loss, tokens) in [
        (result, everything),
        *((result["domains"][name], sums[name]) for name in sums),
    ]:
        assert (figures["rows"], figures["tokens"], figures["non_finite_rows"]) == (rows, tokens, 0)
        assert figures["loss"] == pytest.approx(loss / tokens, abs=2e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=2e-5)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_losses_are_those_of_transformers(tiny_model, tiny_corpus, tmp_path, tied, document_mask):
    model = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    corpus = Corpus(tiny_corpus)
    sums = truth(model, corpus, document_mask)
    result = run(model, tiny_corpus, document_mask=document_mask)
    assert_figures(result, sums)
    assert list(result["domains"]) == ["books", "code"]
    assert result["tokens"] == corpus.manifest["predictions"]
    if document_mask:
        assert abs(result["loss"] - run(model, tiny_corpus)["loss"]) > 1e-3  # the mask matters on this corpus


def test_another_architecture_and_ragged_batches(tiny_model, tiny_corpus, tmp_path):
    from transformers import GPT2Config

    model = tiny_model(tmp_path / "model", config_class=GPT2Config, n_embd=32, n_head=4, n_layer=2)
    sums = truth(model, Corpus(tiny_corpus))
    for batch_tokens in (1, 70, 1_000_000):  # one row a batch, one or two, all in one
        assert_figures(run(model, tiny_corpus, batch_tokens=batch_tokens), sums)


def test_output_file(tiny_model, tiny_corpus, tmp_path, capsys, monkeypatch):
    model, output = tiny_model(tmp_path / "a model"), tmp_path / "new" / "losses.json"
    result = run(model, tiny_corpus, output=str(output))
    printed = capsys.readouterr().out
    assert read_json(output) == result
    assert {
        "model": "a model",
        "corpus": Corpus(tiny_corpus).fingerprint,
        "source": "tiny.jsonl",
        "document_mask": False,
        "dtype": "float32",
    }.items() <= result.items()
    assert str(tmp_path) not in output.read_text()
    assert f"{result['loss']:.4f}" in printed and "books" in printed and "tiny.jsonl" in printed

    monkeypatch.setattr(
        evaluation, "load_model", None
    )  # an equal evaluation loads nothing, another one is refused
    before = output.read_bytes()
    assert run(model, tiny_corpus, output=str(output)) == result
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="something other"):
        run(model, tiny_corpus, output=str(output), document_mask=True)
    with pytest.raises(UserError, match="something other"):
        run(tiny_model(tmp_path / "other", seed=1), tiny_corpus, output=str(output))
    assert output.read_bytes() == before
    output.write_text("[]")
    with pytest.raises(UserError, match="something other"):
        run(model, tiny_corpus, output=str(output))
    with pytest.raises(UserError, match="is a folder"):
        run(model, tiny_corpus, output=str(tmp_path))


def test_two_at_once_do_not_write_one_file(tiny_model, tiny_corpus, tmp_path):
    model = tiny_model(tmp_path / "model")
    with lock(tmp_path / ".loss.json.lock.tmp", "not expected"):
        with pytest.raises(UserError, match=r"^another process is writing .*loss\.json: wait for it"):
            run(model, tiny_corpus, output=str(tmp_path / "loss.json"))
        assert not (tmp_path / "loss.json").exists()
    run(model, tiny_corpus, output=str(tmp_path / "loss.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.json", "model"]


def test_output_that_is_damaged(tiny_model, tiny_corpus, tmp_path):
    model, output = tiny_model(tmp_path / "model"), tmp_path / "losses.json"
    run(model, tiny_corpus, output=str(output))
    written = output.read_text()
    for digit in "4567":  # of the loss: still an evaluation of this model, but not what came of it
        output.write_text(re.sub(r'(?<="loss": )(\d+\.\d\d)\d', rf"\g<1>{digit}", written, count=1))
        if output.read_text() != written:
            with pytest.raises(UserError, match=r"not an evaluation .*checksum.*: evaluate again"):
                run(model, tiny_corpus, output=str(output))
    for content, message in {written[:200]: "not valid JSON", "[" * 10**5: "not valid JSON"}.items():
        output.write_text(content)
        with pytest.raises(UserError, match=message):
            run(model, tiny_corpus, output=str(output))
        assert output.read_text() == content


def test_training_output_gives_its_latest_checkpoint(tiny_model, tiny_corpus, tmp_path):
    for step in (5, 10):
        tiny_model(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", seed=step)
    latest = run(tmp_path / "run" / "checkpoints" / "step-00000010", tiny_corpus)
    result = run(tmp_path / "run", tiny_corpus)
    assert (result["loss"], result["weights"], result["model"]) == (latest["loss"], latest["weights"], "run")
    assert latest["loss"] != run(tmp_path / "run" / "checkpoints" / "step-00000005", tiny_corpus)["loss"]


def poison(model, name, change):
    """Change one tensor in a model's file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(model) / "model.safetensors")
    change(tensors[name])
    save_file(tensors, Path(model) / "model.safetensors", metadata={"format": "pt"})


def test_loss_that_is_not_finite_is_null_and_visible(tiny_model, tiny_tokenizer, tmp_path, capsys):
    model = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    poison(model, "model.embed_tokens.weight", lambda weight: weight[77].fill_(math.nan))
    rng = np.random.default_rng(0)
    chunks = [rng.integers(100, 500, length).tolist() for length in (30, 7, 12, 30, 9, 20)]
    chunks[1][3] = chunks[4][0] = 77  # row 1 and row 4 go wrong; in row 3 it is never an input
    chunks[3][-1] = 77
    domains = ["bad", "bad", "good", "good", "bad", "good"]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer, domains)
    result = run(model, corpus, output=str(tmp_path / "losses.json"))
    sums = truth(model, Corpus(corpus))
    assert math.isnan(sums["bad"][1]) and math.isfinite(sums["good"][1])
    assert_figures({**result["domains"]["good"], "domains": result["domains"]}, {"good": sums["good"]})
    for figures, rows in [(result, 6), (result["domains"]["bad"], 3)]:
        assert (figures["loss"], figures["perplexity"], figures["non_finite_rows"], figures["rows"]) == (
            None,
            None,
            2,
            rows,
        )

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "losses.json").read_text(), parse_constant=refuse) == result
    assert "not finite in 2 chunks" in capsys.readouterr().out


def test_perplexity_past_the_largest_float(tiny_model, tiny_corpus, tmp_path, capsys):
    model = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    poison(model, "lm_head.weight", lambda weight: weight.mul_(1e4))
    result = run(model, tiny_corpus, output=str(tmp_path / "losses.json"))
    assert result["loss"] > 710 and result["perplexity"] is None and result["non_finite_rows"] == 0
    assert "> 2e+308" in capsys.readouterr().out


def test_names_of_domains_are_only_text(tiny_model, tiny_tokenizer, tmp_path, capsys):
    names = ["[/red]", "[bold]x", "\x1b[2Jclear", "line\nbreak", "a\u202eb\u2069", "", "漢字 🙂"]
    chunks = [[5, 6, 7, 8, 9 + number] for number in range(len(names))] + [[3]]
    domains = [*names, "one id"]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer, domains, source="[/made] up")
    result = run(tiny_model(tmp_path / "model"), corpus)
    assert sorted(result["domains"]) == sorted([*names, "one id"])
    assert result["domains"]["one id"] == {
        "rows": 1,
        "non_finite_rows": 0,
        "tokens": 0,
        "loss": None,
        "perplexity": None,
    }
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    written_out = [r"\x1b[2Jclear", r"line\nbreak", r"a\u202eb\u2069"]
    for shown in [*written_out, "[/red]", "[bold]x", "漢字 🙂", "no tokens", "[/made] up"]:
        assert shown in printed


def test_bad_input(tiny_model, tiny_corpus, tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    model = tiny_model(tmp_path / "model")
    other = AutoTokenizer.from_pretrained(tiny_tokenizer)
    other.add_tokens(["extra"])
    with pytest.raises(UserError, match="holds no token to predict"):
        run(model, write_corpus(tmp_path / "empty", [[EOS], [4], [EOS, 5]], tiny_tokenizer))
    with pytest.raises(UserError, match="does not exist"):
        run(model, tmp_path / "missing")
    with pytest.raises(UserError, match="missing"):
        run(tmp_path / "missing" / "model", tiny_corpus)
    open_output(tmp_path / "half", "prepare", {})
    with pytest.raises(UserError, match="is not complete"):
        run(model, tmp_path / "half")
    with pytest.raises(UserError, match="knows 400 ids"):
        run(tiny_model(tmp_path / "small", vocab_size=400), tiny_corpus)

    vocabulary = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    table = vocabulary["model"]["vocab"]
    first, second = list(table)[300:302]
    table[first], table[second] = table[second], table[first]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="token"):
        run(model, tiny_corpus)
    (tmp_path / "small" / "model.safetensors").write_bytes(
        (tmp_path / "small" / "model.safetensors").read_bytes()[:5000]
    )
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run(tmp_path / "small", tiny_corpus)


def test_what_it_costs(tiny_corpus, teacher, tmp_path):
    """As torch counts it: each chunk's attention spans it, or stays within documents."""
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for document_mask in (False, True):
        output = str(tmp_path / f"{document_mask}.json")
        settings = dict(model=teacher, data=tiny_corpus, output=output, dtype="float32", device="cpu")
        with FlopCounterMode(display=False) as counter:
            result = evaluate(EvaluateConfig(**settings, document_mask=document_mask))
        assert result["flops"] == {"forward": counter.get_total_flops()}
        found.append(result["flops"]["forward"])
    assert found[1] < found[0]
