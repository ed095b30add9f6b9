"""What the card of an exported model says, and what it never says."""

import dataclasses
import json
import re
import shutil

import pytest
from export_runs import PLAN, card, publish, rewrite, rewrite_losses
from hostile import NAMES, shown
from rendered import RENDERERS, read

from miniplm.models.loading import model_hash
from miniplm.runtime.artifacts import MANIFEST
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json, write_json
from miniplm.training.checkpoints import latest_checkpoint

LINK = "[a/b](https://huggingface.co/a/b)"


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


def test_other_rules_and_sources(student_run, tmp_path):
    def change(manifest):
        manifest["corpus"] |= {"source": "monology/pile-uncopyrighted"}
        manifest["corpus"]["selection"]["rule"] = {"token_budget": 12_345, "per_domain": True}
        manifest["corpus"]["scores"] = [
            {"teacher": "Qwen/Qwen1.5-1.8B", "dtype": "bfloat16"},
            {"reference": "ref", "dtype": "float32"},
        ]
        manifest["identity"] |= {"init_from": "0123456789abcdef", "shuffle": False, "document_mask": True}

    rewrite(student_run, change)
    found = card(publish(student_run, tmp_path / "model"))
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
    assert card(publish(student_run, tmp_path / "other", datasets=["a/b", "c/d"])).data.datasets == [
        "a/b",
        "c/d",
    ]
    rewrite(student_run, lambda manifest: manifest["corpus"]["selection"].update(rule={"threshold": -0.25}))
    assert "those with a score of at least -0.25" in card(publish(student_run, tmp_path / "third")).text


def test_tokens_that_count(student_run, tmp_path):
    for number, (rule, models, said) in enumerate(
        [
            (
                "difference",
                {"teacher": "a/b", "reference": "x_y"},
                rf"highest log-probability under {LINK} minus that under x\_y",
            ),
            ("reference_loss", {"reference": "x"}, "lowest log-probability under x"),
            ("teacher_loss", {}, "lowest log-probability under the teacher"),
        ]
    ):

        def change(manifest, rule=rule, models=models):
            manifest["identity"]["tokens"] = {"rule": rule, "ratio": 0.6, "scores": {}, "content": ""}
            manifest["token_models"] = models

        rewrite(student_run, change)
        text = card(publish(student_run, tmp_path / str(number))).text
        assert f"| Tokens in the loss | the share of 0.6 of each step's with the {said} |" in text


def test_run_that_was_stopped(student_run, tmp_path):
    """Before its end the manifest holds the identity alone: the card says what is known."""
    manifest = read_json(student_run / MANIFEST)
    write_json(
        student_run / MANIFEST, {"stage": "train", "complete": False, "identity": manifest["identity"]}
    )
    shutil.rmtree(student_run / "checkpoints" / "step-00000006")
    with (student_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    found = card(publish(student_run, tmp_path / "model"))
    assert found.data.tags == ["pretraining"] and "teacher" not in found.text.lower()
    assert "| Steps | 3 of 6 planned: the run had not ended here |" in found.text
    assert f"| Corpus | fingerprint {manifest['identity']['corpus']} |" in found.text


def test_losses_that_are_not_finite(student_run, work, tmp_path):
    def unsealed(line):
        return {key: value for key, value in line.items() if key not in ("after", "checksum")}

    def forget(line):
        return {**unsealed(line), **{key: None for key in ("loss", "eval_loss") if key in line}}

    lines = [json.loads(line) for line in (student_run / "metrics.jsonl").read_text().splitlines()]
    (student_run / "metrics.jsonl").write_text("".join(json.dumps(forget(line)) + "\n" for line in lines))
    rewrite(student_run, lambda manifest: manifest.update(forget(manifest)))

    def change(losses):
        losses["domains"]["books"] |= {"loss": None, "perplexity": None}
        losses["corpus"] = "another"
        nothing = {"tokens": 0, "loss": None, "perplexity": None}
        losses["domains"]["empty"] = {"rows": 1, "non_finite_rows": 0, **nothing}

    losses = rewrite_losses(work, tmp_path / "losses.json", change)
    text = card(publish(student_run, tmp_path / "model", evaluation=losses)).text
    assert "| Training loss | not finite |" in text and "| Held-out loss | not finite |" in text
    tokens = read_json(losses)["domains"]["books"]["tokens"]
    assert f"| books | {tokens:,} | not finite | not finite |" in text and "| empty | 0 | – | – |" in text
    assert "Loss on held-out text: tiny.jsonl, corpus fingerprint another." in text


def test_evaluation_must_be_one_of_this_checkpoint(work, tmp_path):
    with pytest.raises(UserError, match="other weights"):
        publish(
            work / "refined-student" / "checkpoints" / "step-00000003",
            tmp_path / "out",
            evaluation=str(work / "losses.json"),
        )
    write_json(tmp_path / "x.json", {"loss": 1})
    for name, message in [("x.json", "is not an evaluation"), ("missing.json", "does not exist")]:
        with pytest.raises(UserError, match=message):
            publish(work / "refined-student", tmp_path / "out", evaluation=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_hostile_names_stay_text(student_run, work, tmp_path):
    """From the manifest, the evaluation and the settings to the file; test_model_card.py tries all names."""

    def publish_named(name, output):
        def change(manifest):
            manifest["corpus"] |= {"source": name, "scores": [{"teacher": name, "reference": name}]}

        def change_losses(losses):
            losses["domains"] = {name: losses["domains"]["books"]}
            losses["source"] = name

        rewrite(student_run, change)
        losses = rewrite_losses(work, tmp_path / "losses.json", change_losses)
        settings = {"name": name, "license": name, "language": [name], "datasets": [name]}
        return publish(student_run, output, evaluation=losses, **settings) / "README.md"

    ordinary = publish_named("name", tmp_path / "ordinary").read_text(encoding="utf-8")
    for number, name in enumerate(name for name in NAMES[::8] if "\0" not in name):
        written = publish_named(name, tmp_path / f"model-{number}").read_text(encoding="utf-8")
        assert written.replace("\n", "").isprintable()
        data = card(tmp_path / f"model-{number}").data
        assert (data.license, data.language, data.datasets) == (name, [name], [name])
        body, plain = (re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S) for text in (written, ordinary))
        for renderer in RENDERERS:
            elements, texts = read(body, renderer)
            assert elements == read(plain, renderer)[0]
            assert [text for _, text in texts].count(shown(name)) >= 4  # title, teacher, reference, domain
