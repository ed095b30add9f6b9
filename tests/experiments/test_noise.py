"""The noise bench: every kind of noise is what it says, the figures are those of a restatement, and the whole
runs at toy size."""

import base64
import json
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from texts import make_text, write_jsonl

TEXTS = [make_text(random.Random(seed), 80) for seed in range(12)]


def windows(text) -> list[list[str]]:
    words = text.split()
    return [sorted(words[start : start + 5]) for start in range(0, len(words), 5)]


def check_shuffled_words(text, made):
    assert sorted(made.split()) == sorted(text.split()) and windows(made) != windows(text)


def check_shuffled_locally(text, made):
    assert windows(made) == windows(text) and made.split() != text.split()


def check_unigram(text, made):
    words = {word for other in TEXTS for word in other.split()}
    assert len(made.split()) == len(text.split()) and set(made.split()) <= words
    assert len(set(made.split()) & (words - set(text.split()))) > 5


def check_base64(text, made):
    assert len(base64.b64decode(made)) == len(text) * 3 // 4
    assert {len(line) for line in made.split("\n")[:-1]} == {76}


def check_hexdump(text, made):
    lines = made.split("\n")
    assert all(re.fullmatch(r"[0-9a-f]{8}  [0-9a-f]{2}( [0-9a-f]{2}){15}", line) for line in lines)
    assert {int(two[:8], 16) - int(one[:8], 16) for one, two in pairwise(lines)} == {16}
    assert len(text) / 2 < len(made) <= len(text)


def check_repeated_line(text, made):
    lines = made.split("\n")
    assert len(set(lines)) == 1 and text.replace("\n", " ").startswith(lines[0].replace("\n", " "))
    assert len(lines) > 2 and abs(len(made) - len(text)) <= len(lines[0]) + 1


def check_boilerplate(text, made):
    assert made in TEXTS


def check_typos(text, made):
    wrong = [(one, other) for one, other in zip(text, made, strict=True) if one != other]
    assert 0.06 < len(wrong) / len(text) < 0.18 and all(
        other in "abcdefghijklmnopqrstuvwxyz " for _, other in wrong
    )


@pytest.mark.parametrize(
    "check",
    [
        check_shuffled_words,
        check_shuffled_locally,
        check_unigram,
        check_base64,
        check_hexdump,
        check_repeated_line,
        check_boilerplate,
        check_typos,
    ],
)
def test_kinds(noise, check):
    kind = check.__name__.removeprefix("check_")
    make = noise.KINDS[kind]
    for seed, text in enumerate(TEXTS):
        made = make(text, TEXTS, random.Random(seed))
        check(text, made)
        assert made == make(text, TEXTS, random.Random(seed))
    others = {make(TEXTS[0], TEXTS, random.Random(seed)) for seed in range(20)}
    assert len(others) == 1 if kind == "repeated_line" else len(others) > 5


def test_every_kind_is_added_as_often(noise):
    rows = noise.add_noise(TEXTS, 10, seed=1)
    assert rows == noise.add_noise(TEXTS, 10, seed=1) != noise.add_noise(TEXTS, 10, seed=2)
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in noise.KINDS} == dict.fromkeys(noise.KINDS, 10)
    assert sorted(row["text"] for row in rows if row["kind"] == "clean") == sorted(TEXTS)
    assert len({row["text"] for row in rows if row["kind"] == "boilerplate"}) == 1
    assert [row["domain"] for row in rows] == [str(row) for row in range(len(rows))]
    assert kinds[:12] != ["clean"] * 12 and len(noise.add_noise(TEXTS, 0, seed=1)) == len(TEXTS)


def test_parts_of_the_text_are_disjoint(noise, tmp_path):
    texts = [f"{number:04d} " * 100 for number in range(30)] + ["short", "0003 " * 100]
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    first, second = noise.clean_texts(path, 0, 10), noise.clean_texts(path, 10, 99)
    assert len(first) == 10 and sorted(first + second) == sorted({text[:1200] for text in texts[:30]})
    long = write_jsonl(tmp_path / "long.jsonl", ["a" * 5000])
    assert noise.clean_texts(long, 0, 1) == ["a" * 1200]


def test_auroc_is_that_of_all_pairs(noise):
    rng = np.random.default_rng(0)
    for values in ([0.0, 1.0, 2.0], [*range(1000)], [5.0]):
        clean, dirty = rng.choice(values, 40), rng.choice(values, 25)
        pairs = [(one > other) + (one == other) / 2 for one in clean for other in dirty]
        assert noise.auroc(clean, dirty) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert noise.auroc(np.array([2.0, 3.0]), np.array([1.0, -np.inf])) == 1.0


def test_figures_of_a_rule(noise):
    kinds = np.array(["clean"] * 4 + ["typos"] * 3 + [kind for kind in noise.KINDS if kind != "typos"])
    values = np.arange(len(kinds), dtype=float)[::-1]
    dropped = np.isin(np.arange(len(kinds)), [1, 4, 5, 9])
    figures = noise.judged(values, dropped, kinds)
    assert figures["clean"] == {"documents": 4, "dropped": 0.25}
    assert figures["typos"] == {"documents": 3, "dropped": 2 / 3, "precision": 2 / 3, "auroc": 1.0}
    assert figures["all noise"] == {"documents": 10, "dropped": 0.3, "precision": 0.75, "auroc": 1.0}
    whole = noise.judged(values, np.zeros(len(kinds), bool), kinds)
    assert whole["hexdump"]["precision"] is None


def test_the_whole_bench(noise, tmp_path, tiny_model, capsys):
    """With random models: what a rule compares by is the models' own log-probability of each document."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    teacher, small = tiny_model(tmp_path / "teacher"), tiny_model(tmp_path / "small", seed=1)
    clean = write_jsonl(tmp_path / "clean.jsonl", [f"{number} {text}" for number, text in enumerate(TEXTS)])
    noisy, output = tmp_path / "noisy.jsonl", tmp_path / "out"
    noise.main(["add", clean, str(noisy), "--documents", "0", "10", "--per-kind", "2", "--seed", "3"])
    models = ["--teacher", teacher, "--reference", f"one={small}", f"same={teacher}"]
    noise.main(["measure", str(noisy), *models, "--output", str(output), "--ratio", "0.5"])
    result = json.loads((output / "noise.json").read_text())
    rows = [json.loads(line) for line in noisy.read_text(encoding="utf-8").splitlines()]
    assert result["documents"] == len(rows) == 10 + 2 * len(noise.KINDS)
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(teacher),
        Tokenizer.from_file(f"{teacher}/tokenizer.json"),
    )
    means = []
    for row in rows:
        ids = torch.tensor([*tokenizer.encode(row["text"]).ids, 0])
        log_probs = loaded(ids[None]).logits[0, :-1].detach().double().log_softmax(-1)
        means.append(log_probs.gather(1, ids[1:, None]).mean().item())
    order = sorted(range(len(rows)), key=lambda row: -means[row])
    kept, kinds = set(order[: len(rows) // 2]), [row["kind"] for row in rows]
    for kind in ("clean", *noise.KINDS):
        members = [row for row in range(len(rows)) if kinds[row] == kind]
        figures = result["rules"]["teacher"][kind]
        assert figures["documents"] == len(members)
        assert figures["dropped"] == sum(row not in kept for row in members) / len(members)
        if kind not in ("clean", "boilerplate"):  # boilerplate has ties, which rounding decides
            clean = [row for row in range(len(rows)) if kinds[row] == "clean"]
            pairs = [means[one] > means[two] for one in clean for two in members]
            assert figures["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    assert result["rules"]["reference, same"] == result["rules"]["teacher"]
    assert result["rules"]["difference, same"]["all noise"]["auroc"] == 0.5  # all differences are 0
    copies = result["rules"]["difference, one, max_repeats"]["boilerplate"]
    assert (
        copies["dropped"] >= 0.5
        and copies["dropped"] >= result["rules"]["difference, one"]["boilerplate"]["dropped"]
    )
    before = (output / "noise.json").read_bytes()
    noise.main(["measure", str(noisy), *models, "--output", str(output)])
    assert (output / "noise.json").read_bytes() == before
    assert "| boilerplate |" in capsys.readouterr().out
