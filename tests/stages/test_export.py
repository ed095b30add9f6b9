"""export of a model that the real stages made: what is in the folder, who can read it, what the card says and
what it never says."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import seal

from miniplm.config import (
    CheckpointConfig,
    EvalConfig,
    EvaluateConfig,
    ExportConfig,
    OptimizerConfig,
    ScoreConfig,
    SelectConfig,
    StudentConfig,
    TrainConfig,
)
from miniplm.models.loading import model_hash
from miniplm.runtime.artifacts import MANIFEST
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import fingerprint, read_json, write_json
from miniplm.stages.evaluate import evaluate
from miniplm.stages.export import export
from miniplm.training.checkpoints import latest_checkpoint

TINY = StudentConfig(
    model_type="llama",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    initializer_range=0.3,
)
PLAN = TrainConfig(
    data="",
    output="",
    model=TINY,
    optimizer=OptimizerConfig(warmup_steps=2, lr=1e-2),
    batch_tokens=256,
    steps=6,
    eval=EvalConfig(interval=3),
    checkpoint=CheckpointConfig(interval=3),
    log_interval=2,
    device="cpu",
    dtype="float32",
    peak_tflops=1.0,
)


@pytest.fixture(scope="module")
def work(tiny_corpus, tiny_model, tmp_path_factory) -> Path:
    """A folder with scores, a refined and a random corpus, a student of each, and the refined one's
    evaluation."""
    from miniplm.stages.score import score
    from miniplm.stages.select import select
    from miniplm.stages.train import train

    root = tmp_path_factory.mktemp("work")
    teacher, reference = (
        tiny_model(root / "big-teacher", seed=1),
        tiny_model(root / "small_reference", seed=2, hidden_size=16),
    )
    score(
        ScoreConfig(
            data=tiny_corpus,
            output=str(root / "scores"),
            teacher=teacher,
            reference=reference,
            device="cpu",
            dtype="float32",
        )
    )
    for name, seed in (("refined", None), ("random", 3)):
        select(
            SelectConfig(
                data=tiny_corpus, scores=[str(root / "scores")], output=str(root / name), random_seed=seed
            )
        )
        train(
            dataclasses.replace(
                PLAN,
                data=str(root / name),
                output=str(root / f"{name}-student"),
                eval=EvalConfig(data=tiny_corpus, interval=3),
            )
        )
    evaluate(
        EvaluateConfig(
            model=str(root / "refined-student"),
            data=tiny_corpus,
            output=str(root / "losses.json"),
            device="cpu",
            dtype="float32",
        )
    )
    return root


@pytest.fixture
def run(work, tmp_path) -> Path:
    """A training output of one's own."""
    return Path(shutil.copytree(work / "refined-student", tmp_path / "run"))


def publish(checkpoint, output, **settings) -> Path:
    export(ExportConfig(checkpoint=str(checkpoint), output=str(output), **settings))
    return Path(output)


def card(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md")


def logits(folder, **settings):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **settings)(torch.randint(500, (2, 40))).logits


def rewrite(run, change):
    """Change the manifest of a training output, and its checkpoints so that they belong to it."""
    manifest = read_json(run / MANIFEST)
    change(manifest)
    write_json(run / MANIFEST, manifest)
    for checkpoint in run.glob("checkpoints/step-*"):
        seal(checkpoint, fingerprint(manifest["identity"]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the folder ----


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


def test_snippet_on_the_card_runs(work, tmp_path, monkeypatch, capsys):
    folder = publish(work / "refined-student", tmp_path / 'it\'s "a" `model`')
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card(folder).text, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("The")


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
    assert (
        again.pop("README.md") == before.pop("README.md").replace(b"'model'", b"'empty'") and again == before
    )  # equal runs, equal bytes


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


def test_bad_checkpoints(work, run, tmp_path, tiny_model):
    latest = run / "checkpoints" / "step-00000006"
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
    publish(run, tmp_path / "fine")
    whole = (latest / "model.safetensors").read_bytes()
    (latest / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"damaged \(model.safetensors"):
        publish(run, tmp_path / "out")
    (latest / "tokenizer.json").unlink()
    (latest / "model.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"damaged \(tokenizer.json"):
        publish(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(run, tmp_path):
    from safetensors.torch import load_file, save_file

    path = run / "checkpoints" / "step-00000006" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6  # finite, but not in float16
    save_file(tensors, path, metadata={"format": "pt"})
    seal(path.parent)
    with pytest.raises(UserError, match=r"1 tensors .* not finite in float16 \(model.norm.weight\)"):
        publish(run, tmp_path / "out", dtype="float16")
    publish(run, tmp_path / "out")


def test_tokenizer_that_auto_tokenizer_reads_otherwise(work, tiny_tokenizer, tmp_path):
    """transformers 5 takes the words of Qwen2 for the tokenizer of any qwen2 model: written as a Llama unless
    the tokenizer has those words."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    from miniplm.stages.train import train

    run = Path(work / "qwen2-student")
    train(
        dataclasses.replace(
            PLAN,
            data=str(work / "refined"),
            output=str(run),
            steps=1,
            model=dataclasses.replace(TINY, model_type="qwen2"),
        )
    )
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


# ---- the card ----


def test_card_says_what_was_trained_on_what(work, tmp_path):
    folder = publish(
        work / "refined-student",
        tmp_path / "MiniPLM-tiny",
        evaluation=str(work / "losses.json"),
        license="mit",
        language=["en", "zh"],
    )
    data, text = card(folder).data.to_dict(), card(folder).text
    assert data == {
        "language": ["en", "zh"],
        "library_name": "transformers",
        "license": "mit",
        "metrics": ["perplexity"],
        "pipeline_tag": "text-generation",
        "tags": ["pretraining", "miniplm", "knowledge-distillation", "data-selection"],
    }
    manifest, scored = (
        read_json(work / "refined-student" / MANIFEST),
        read_json(work / "refined" / MANIFEST)["selection"],
    )
    parameters = sum(value.numel() for value in load(folder).parameters())
    losses = read_json(work / "losses.json")
    assert losses["weights"] == model_hash(latest_checkpoint(work / "refined-student"))
    for line in [
        "# MiniPLM-tiny",
        "| Architecture | LlamaForCausalLM: 2 layers, 32 wide, 64 wide feed-forward, 500 ids, 4 heads (2 "
        "for keys and values), tied embeddings |",
        f"| Parameters | {parameters:,} |",
        "| Teacher | big-teacher |",
        r"| Reference model | small\_reference |",
        f"| Selection | the share of 0.5 with the highest scores: 20 of 40 chunks, "
        f"{scored['kept_tokens']:,} of "
        f"{scored['kept_tokens'] + scored['dropped_tokens']:,} tokens |",
        f"| Corpus | tiny.jsonl: 20 chunks of at most 65 tokens, {manifest['corpus']['tokens']:,} tokens in "
        f"2 domains |",
        "| Steps | 6 |",
        "| Tokens per step | 256 |",
        "| Seed | 10 |",
        "| Data order | shuffled in every epoch |",
        "| Learning rate | 2 steps of linear warm-up to 0.01, then a cosine to 0.001 at step 6 |",
        f"| Training loss | {manifest['loss']:.4f} nats per token at step 6 |",
        f"| Held-out loss | {manifest['eval_loss']:.4f} nats per token at step 6 |",
        f"| books | {losses['domains']['books']['tokens']:,} | {losses['domains']['books']['loss']:.4f} | "
        f"{losses['domains']['books']['perplexity']:.2f} |",
        f"| **all** | {losses['tokens']:,} | {losses['loss']:.4f} | {losses['perplexity']:.2f} |",
    ]:
        assert f"\n{line}\n" in text, line
    tokens = re.search(r"\| Training tokens \| ([\d,]+) \((\d\.\d\d) passes", text)
    assert int(tokens[1].replace(",", "")) == manifest["tokens"]
    assert (
        "Loss on the text that it was trained on: tiny.jsonl, corpus fingerprint " + losses["corpus"] in text
    )  # half of it was selected
    assert "@inproceedings{gu2025miniplm," in text and "https://arxiv.org/abs/2410.17215" in text
    assert abs(manifest["eval_loss"] - losses["loss"]) < 1e-4  # evaluate and train agree on the held-out loss


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_card_without_a_selection_by_score_claims_nothing(work, tiny_corpus, tmp_path):
    from miniplm.stages.train import train

    train(dataclasses.replace(PLAN, data=tiny_corpus, output=str(tmp_path / "run"), steps=2))
    plain = card(publish(tmp_path / "run", tmp_path / "plain"))
    control = card(publish(work / "random-student", tmp_path / "control"))
    for found in (plain, control):
        assert found.data.tags == ["pretraining"]
        assert not re.search("miniplm|distill|teacher|2410|score \\|", found.content, re.I), found.content
    assert "Selection" not in plain.text and "Held-out" not in plain.text
    assert (
        "| Selection | a share of 0.5, chosen at random (seed 3; the control of a selection by score): 20 "
        "of 40 chunks" in control.text
    )


def test_other_rules_and_sources(run, tmp_path):
    def change(manifest):
        manifest["corpus"] |= {"source": "monology/pile-uncopyrighted"}
        manifest["corpus"]["selection"]["rule"] = {"token_budget": 12_345, "per_domain": True}
        manifest["corpus"]["scores"] = [
            {"teacher": "Qwen/Qwen1.5-1.8B", "dtype": "bfloat16"},
            {"reference": "ref", "dtype": "float32"},
        ]
        manifest["identity"] |= {"init_from": "0123456789abcdef", "shuffle": False, "document_mask": True}

    rewrite(run, change)
    found = card(publish(run, tmp_path / "model"))
    assert found.data.datasets == ["monology/pile-uncopyrighted"] and "base_model" not in found.data.to_dict()
    for expected in [
        "those with the highest scores of each domain that fit into 12,345 tokens",
        "in corpus order",
        "within each document",
        "| Teacher | [Qwen/Qwen1.5-1.8B](https://huggingface.co/Qwen/Qwen1.5-1.8B) |",
        "| Reference model | ref |",
        "trained further",
    ]:
        assert expected in found.text
    assert "from scratch" not in found.text
    assert card(publish(run, tmp_path / "other", datasets=["a/b", "c/d"])).data.datasets == ["a/b", "c/d"]
    rewrite(run, lambda manifest: manifest["corpus"]["selection"].update(rule={"threshold": -0.25}))
    assert "those with a score of at least -0.25" in card(publish(run, tmp_path / "third")).text


def test_run_that_was_stopped(run, tmp_path):
    """Before its end the manifest holds the identity alone: the card says what is known."""
    manifest = read_json(run / MANIFEST)
    write_json(run / MANIFEST, {"stage": "train", "complete": False, "identity": manifest["identity"]})
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    found = card(publish(run, tmp_path / "model"))
    assert found.data.tags == ["pretraining"] and "teacher" not in found.text.lower()
    assert "| Steps | 3 of 6 planned: the run had not ended here |" in found.text
    assert f"| Corpus | fingerprint {manifest['identity']['corpus']} |" in found.text


def test_losses_that_are_not_finite(run, work, tmp_path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({**line, **{key: None for key in ("loss", "eval_loss") if key in line}}) + "\n"
            for line in lines
        )
    )
    losses = read_json(work / "losses.json")
    losses["domains"]["books"] |= {"loss": None, "perplexity": None}
    losses["corpus"] = "another"
    losses["domains"]["empty"] = {
        "rows": 1,
        "non_finite_rows": 0,
        "tokens": 0,
        "loss": None,
        "perplexity": None,
    }
    write_json(tmp_path / "losses.json", losses)
    text = card(publish(run, tmp_path / "model", evaluation=str(tmp_path / "losses.json"))).text
    assert "| Training loss | not finite |" in text and "| Held-out loss | not finite |" in text
    assert (
        f"| books | {losses['domains']['books']['tokens']:,} | not finite | not finite |" in text
        and "| empty | 0 | – | – |" in text
    )
    assert "Loss on held-out text: tiny.jsonl, corpus fingerprint another." in text


def test_evaluation_must_be_one_of_this_checkpoint(work, tmp_path):
    with pytest.raises(UserError, match="other weights"):
        publish(
            work / "refined-student" / "checkpoints" / "step-00000003",
            tmp_path / "out",
            evaluation=str(work / "losses.json"),
        )
    write_json(tmp_path / "x.json", {"loss": 1})
    for name, message in [("x.json", "is no evaluation"), ("missing.json", "does not exist")]:
        with pytest.raises(UserError, match=message):
            publish(work / "refined-student", tmp_path / "out", evaluation=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


NASTY = [
    "---\ntags: [evil]\n---",
    "</td><script>alert(1)</script>",
    "a | b || c",
    "![x](http://evil.example/x.png)",
    "[click](javascript:x)",
    "www.evil.example and https://evil.example",
    "`code` **bold** _em_ ~~s~~ # h",
    "@everyone &lt; $$x$$ \\(y\\)",
    "- item\n\n# Heading\n",
    "{{ jinja }} {% raw %}",
    "\x1b[31mred\u202e\x00",
    "'\": {}[],&*!|>%@`",
    "[^1]",
    "<!-- hidden",
]


def test_odd_names_stay_text(run, work, tmp_path):
    import yaml
    from markdown_it import MarkdownIt

    losses = read_json(work / "losses.json")
    losses["domains"] = {name: losses["domains"]["books"] for name in NASTY}
    losses["source"] = NASTY[1]
    write_json(tmp_path / "losses.json", losses)
    for number, name in enumerate(NASTY):

        def change(manifest, name=name):
            manifest["corpus"] |= {"source": name, "scores": [{"teacher": name, "reference": name}]}

        rewrite(run, change)
        settings = {
            "name": name,
            "license": name,
            "language": [name],
            "datasets": [name],
            "evaluation": str(tmp_path / "losses.json"),
        }
        path = publish(run, tmp_path / f"model-{number}", **settings) / "README.md"
        written = path.read_text(encoding="utf-8")
        front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", written, re.S).groups()
        data = card(path.parent).data
        assert yaml.safe_load(front) == data.to_dict()
        assert (data.license, data.language, data.datasets) == (name, [name], [name])
        assert data.tags == ["pretraining", "miniplm", "knowledge-distillation", "data-selection"]

        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
        inline = [child for token in tokens for child in token.children or []]
        assert not [
            token
            for token in [*tokens, *inline]
            if token.type in ("html_block", "html_inline", "image", "s_open", "em_open")
        ]
        links = {token.attrs["href"] for token in inline if token.type == "link_open"}
        assert links == {"https://arxiv.org/abs/2410.17215"}
        plain = re.sub(r"^```.*?^```$", "", body, flags=re.S | re.M).replace(
            "](https://arxiv.org/abs/2410.17215)", ""
        )
        assert not re.search(
            r"https?://|www\.|(?<!\\)[@<$&]", plain
        )  # what GitHub and the Hub make of plain text: links, mentions, mathematics
        assert [token.tag for token in tokens if token.type == "heading_open"] == [
            "h1",
            "h2",
            "h2",
            "h2",
            "h2",
        ]
        assert sum(token.type == "table_open" for token in tokens) == 2
        cells = [
            token.content
            for token, before in zip(tokens[1:], tokens, strict=False)
            if before.type == "td_open"
        ]
        assert len(cells) == cells.index("Held-out loss") + 2 + 4 * (len(NASTY) + 1)  # two columns, then four
        shown = "".join(letter if letter.isprintable() else "�" for letter in " ".join(name.split()))
        texts = [
            "".join(child.content for child in token.children) for token in tokens if token.type == "inline"
        ]
        assert shown in texts  # the title and the cells show the very letters
        assert texts.count(shown) >= 4  # title, teacher, reference, domain


def test_many_domains(run, work, tmp_path):
    losses = read_json(work / "losses.json")
    losses["domains"] = {
        f"site{number}": {**losses["domains"]["books"], "tokens": number} for number in range(1, 3001)
    }
    write_json(tmp_path / "losses.json", losses)
    text = card(publish(run, tmp_path / "model", evaluation=str(tmp_path / "losses.json"))).text
    assert (
        "| site3000 |" in text
        and "| site2961 |" in text
        and "| site2960 |" not in text
        and "| 2,960 smaller domains |" in text
    )


# ---- the Hub ----


class Hub:
    """HfApi as far as export uses it; keeps what it is asked."""

    endpoint = "https://huggingface.co"

    def __init__(self, failure=None):
        self.calls, self.failure = [], failure

    def __call__(self):
        return self

    def create_repo(self, repo_id, **settings):
        from huggingface_hub import RepoUrl

        self.calls.append(("create", repo_id, settings))
        if self.failure:
            raise self.failure
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(
            ("upload", repo_id, list(filter_repo_objects(names, ignore_patterns=ignore_patterns)))
        )
        self.readme = (Path(folder_path) / "README.md").read_text()


def test_push_to_hub(work, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    folder = publish(work / "refined-student", tmp_path / "model")
    assert hub.calls == [] and "from_pretrained('model')" in card(folder).text
    publish(
        work / "refined-student", tmp_path / "model", push_to_hub="tiny", private=True
    )  # a complete folder is uploaded too
    files = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hub.calls == [
        ("create", "tiny", {"private": True, "exist_ok": True}),
        ("upload", "me/tiny", files),
    ]
    assert "from_pretrained('me/tiny')" in hub.readme
    assert "me/tiny" in capsys.readouterr().out
    publish(work / "refined-student", tmp_path / "new", push_to_hub="org/tiny")
    assert hub.calls[2:] == [
        ("create", "org/tiny", {"private": False, "exist_ok": True}),
        ("upload", "org/tiny", files),
    ]


@pytest.mark.parametrize(
    "message", ["Token is required", "401 Client Error\n\nInvalid username or password."]
)
def test_push_that_fails(work, tmp_path, monkeypatch, message):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(OSError(message)))
    with pytest.raises(UserError, match="log in with `hf auth login`") as caught:
        publish(work / "refined-student", tmp_path / "model", push_to_hub="me/tiny")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.HfApi", hub := Hub())
    publish(
        work / "refined-student", tmp_path / "model", push_to_hub="me/tiny"
    )  # the folder stands, and the next run goes on from there
    assert hub.calls[-1][0] == "upload"


@pytest.mark.parametrize("name", ["me/tiny", "a/b/c", "--bad name"])
def test_push_with_the_real_client_offline(work, tmp_path, monkeypatch, name):
    """The Hub's own client, without a network (HF_HUB_OFFLINE is set for all tests): one line, whatever it
    raises."""
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with pytest.raises(UserError, match="could not be uploaded") as caught:
        publish(work / "refined-student", tmp_path / "model", push_to_hub=name)
    assert "\n" not in str(caught.value)


def test_push_without_a_connection(work, tmp_path, monkeypatch):
    """The Hub's own client against a port where nobody listens."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token=False))
    with pytest.raises(UserError, match=r"could not be uploaded.*refused"):
        publish(work / "refined-student", tmp_path / "model", push_to_hub="me/tiny")
