"""select: what is written. The rule has tests of its own in data/test_selection.py."""

import random
from pathlib import Path

import numpy as np
import pytest
from corpora import chunks_of, write_corpus, write_scores
from outputs import contents, kill_and_restart
from scoring_runs import run_score
from selections import DOMAINS, LENGTHS, NAN, REFERENCE, SCORES, TEACHER, kept_chunks, make_corpus, run_select

from miniplm.analysis import model_card
from miniplm.analysis.overlap import overlap
from miniplm.analysis.provenance import Rule
from miniplm.data import corpus as storage
from miniplm.data.corpus import Corpus
from miniplm.data.token_scores import TokenScores
from miniplm.runtime.artifacts import read_manifest
from miniplm.runtime.errors import UserError
from miniplm.stages import select as stage


@pytest.fixture
def corpus(tiny_tokenizer, tmp_path) -> str:
    return make_corpus(tmp_path / "corpus", tiny_tokenizer)


def test_refined_corpus(tmp_path, corpus, capsys):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    output = tmp_path / "refined"
    run_select(corpus, scores, output)
    kept = [0, 3, 6, 9, 10]  # int(0.5 * 11) = 5
    refined = Corpus(output)
    assert kept_chunks(output) == kept
    assert [row.tolist() for row in refined.rows(range(5))] == [
        list(range(row, row + LENGTHS[row])) for row in kept
    ]
    table = refined.table.to_pydict()
    columns = {
        "domain": DOMAINS,
        "num_tokens": LENGTHS,
        "score": SCORES,
        "teacher_log_prob": TEACHER,
        "reference_log_prob": REFERENCE,
    }
    for name, values in columns.items():
        assert table[name] == [values[row] for row in kept], name
    assert contents(output / "tokenizer") == contents(Path(corpus) / "tokenizer")

    manifest, parent = refined.manifest, read_manifest(corpus)
    assert {key: manifest[key] for key in ("rows", "tokens", "predictions")} == {
        "rows": 5,
        "tokens": sum(LENGTHS[row] for row in kept),
        "predictions": sum(LENGTHS[row] - 1 - (row == 0) for row in kept),  # the first id of row 0 is EOS
    }
    assert manifest["domains"] == {
        "code": {"rows": 3, "tokens": 14},
        "[bold]x[/]": {"rows": 1, "tokens": 2},
        "books": {"rows": 1, "tokens": 1},
    }
    for key in ("bad_records", "eos_token_id", "vocab_size", "tokenizer_fingerprint", "max_length", "source"):
        assert manifest[key] == parent[key]
    assert manifest["parent"] == parent["fingerprint"] != manifest["fingerprint"]
    models = {"teacher": "big", "reference": "small"}
    facts = {"dtype": "float32", "vocab_size": 999, "document_mask": False}
    assert manifest["scores"] == [models | facts]
    selection, finite = manifest["selection"], [value for value in SCORES if value is not None]
    assert selection["rule"] == {"ratio": 0.5}
    assert (selection["kept"], selection["dropped"]) == (5, 6)
    assert (selection["non_finite"], selection["below_zero"]) == (3, 2 / 8)
    assert (selection["kept_tokens"], selection["dropped_tokens"]) == (17, 23)
    assert selection["quantiles"] == {
        f"{percent}%": round(float(np.percentile(finite, percent)), 6)
        for percent in (1, 5, 25, 50, 75, 95, 99)
    }
    assert selection["domains"]["null"] == {"kept": 0, "dropped": 2, "kept_tokens": 0, "dropped_tokens": 3}

    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines()]
    assert (
        ["code", "3", "1", "14", "5"] in lines
        and ["[bold]x[/]", "1", "0", "2", "0"] in lines
        and ["all", "5", "6", "17", "23"] in lines
    )
    assert "below 0: 25.0% of the finite scores; not finite: 3" in printed


def test_per_domain_and_a_domain_without_scores(tmp_path, corpus):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    run_select(corpus, scores, tmp_path / "r", ratio=0.5, per_domain=True)
    # 2 of 4 in code and books, int(0.5 * 1) = 0 of the third, none of the domain without scores
    assert kept_chunks(tmp_path / "r") == [0, 1, 9, 10]


@pytest.mark.parametrize(
    "rule", [dict(ratio=0.5), dict(token_budget=20), dict(threshold=0.5), dict(random_seed=3)], ids=str
)
def test_order_and_number_of_score_files_do_not_matter(tmp_path, corpus, rule):
    shuffled = random.Random(5).sample(range(11), 11)
    outputs = []
    for name, options in (
        ("one", dict(file_rows=11)),
        ("many", dict(file_rows=1)),
        ("shuffled", dict(order=shuffled, file_rows=3)),
    ):
        scores = write_scores(tmp_path / name, corpus, TEACHER, REFERENCE, **options)
        run_select(corpus, scores, tmp_path / f"{name}-refined", **rule)
        outputs.append(contents(tmp_path / f"{name}-refined"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_two_folders_in_any_order_equal_one(tmp_path, corpus):
    both = write_scores(tmp_path / "both", corpus, TEACHER, REFERENCE)
    teacher = write_scores(tmp_path / "teacher", corpus, TEACHER, dtype="bfloat16")  # the dtypes may differ
    reference = write_scores(tmp_path / "reference", corpus, reference=REFERENCE)
    for number, folders in enumerate([[both], [teacher, reference], [reference, teacher]]):
        run_select(corpus, folders, tmp_path / f"r{number}")
    one, two, swapped = (contents(tmp_path / f"r{number}") for number in range(3))
    assert two == swapped
    del one["manifest.json"], two["manifest.json"]
    assert one == two


def test_several_files_hold_what_one_does(tmp_path, corpus, monkeypatch):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    run_select(corpus, scores, tmp_path / "one", threshold=-9.0)
    monkeypatch.setattr(stage, "SHARD_BYTES", 1)  # every record batch a file of its own
    run_select(corpus, scores, tmp_path / "many", threshold=-9.0)
    assert (
        len(list((tmp_path / "one").glob("*.arrow"))) == 1
        and len(list((tmp_path / "many").glob("*.arrow"))) == 2
    )
    one, many = (Corpus(tmp_path / name).table.to_pydict() for name in ("one", "many"))
    assert one == many and len(one["score"]) == 8


def test_refined_corpus_is_scored_and_refined_again(tiny_corpus, tiny_model, tmp_path):
    """The real chain, twice: the second pass meets a corpus that has score columns already."""
    models = dict(teacher=tiny_model(tmp_path / "t", seed=0), reference=tiny_model(tmp_path / "r", seed=1))
    data, values = tiny_corpus, []
    for step in ("1", "2"):
        run_score(data, tmp_path / f"s{step}", **models)
        run_select(data, tmp_path / f"s{step}", tmp_path / f"c{step}")
        data = str(tmp_path / f"c{step}")
        values.append(Corpus(data).table["score"].to_numpy())
    manifest = read_manifest(data)
    assert (len(values[0]), len(values[1])) == (20, 10)
    np.testing.assert_allclose(np.sort(values[0])[10:], np.sort(values[1]), atol=1e-5)
    rows = Corpus(data).rows(range(10))
    assert (
        manifest["predictions"] == sum(int((row[:-1] != 0).sum()) for row in rows)
        and manifest["source"] == "tiny.jsonl"
    )


def test_complete_run_is_left_alone_and_another_one_refused(tmp_path, corpus, capsys):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    output = str(tmp_path / "r")
    run_select(corpus, scores, output)
    before = {path.name: path.stat().st_ino for path in Path(output).iterdir()}
    capsys.readouterr()
    run_select(corpus, scores, output, ratio=0.5)
    assert capsys.readouterr().out == f"The refined corpus {output} is complete, nothing to do.\n"
    for rule in (dict(ratio=0.4), dict(per_domain=True), dict(threshold=0.1), dict(random_seed=0)):
        with pytest.raises(UserError, match="another select run"):
            run_select(corpus, scores, output, **rule)
    other = write_scores(tmp_path / "other", corpus, TEACHER, REFERENCE, teacher_dtype="float16")
    with pytest.raises(UserError, match="another select run"):
        run_select(corpus, other, output)
    with pytest.raises(UserError, match="'prepare' run"):
        run_select(corpus, scores, corpus)
    assert {path.name: path.stat().st_ino for path in Path(output).iterdir()} == before


def test_kill_and_restart_ends_in_the_same_bytes(tiny_tokenizer, tmp_path, monkeypatch):
    rows = 4_000
    corpus = make_corpus(
        tmp_path / "corpus", tiny_tokenizer, [1 + row % 7 for row in range(rows)], ["a"] * rows
    )
    rng = np.random.default_rng(0)
    scores = write_scores(
        tmp_path / "scores", corpus, rng.normal(size=rows), rng.normal(size=rows), file_rows=500
    )
    monkeypatch.setattr(storage, "ROWS_PER_RECORD_BATCH", 100)
    monkeypatch.setattr(stage, "SHARD_BYTES", 1)
    call = "select(SelectConfig(data={!r}, scores=[{!r}], output={!r}))"
    run_select(corpus, scores, tmp_path / "whole")
    setup = (
        "import datasets, pyarrow.parquet, rich.table; import miniplm.stages.select as stage, "
        "miniplm.data.corpus as storage; from miniplm.config import SelectConfig; "
        "from miniplm.stages.select import select; storage.ROWS_PER_RECORD_BATCH = 100; "
        "stage.SHARD_BYTES = 1"
    )
    killed = tmp_path / "killed"
    struck = kill_and_restart(
        setup, call.format(corpus, scores, str(killed)), killed, "data-*.arrow", [0, 1, 2, 4]
    )
    assert struck >= 2
    assert contents(killed) == contents(tmp_path / "whole") and len(list(killed.glob("*.arrow"))) > 4


@pytest.mark.parametrize("order", ["score", "random"])
def test_the_order_of_writing(tmp_path, corpus, order, monkeypatch):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    monkeypatch.setattr(stage, "SHARD_BYTES", 60)
    monkeypatch.setattr("miniplm.data.corpus.ROWS_PER_RECORD_BATCH", 2)  # the first file has three chunks
    run_select(corpus, scores, tmp_path / "plain")
    run_select(corpus, scores, tmp_path / "out", order=order, seed=1)
    assert len(list((tmp_path / "out").glob("data-*.arrow"))) > 1
    expected = [9, 0, 3, 6, 10] if order == "score" else kept_chunks(tmp_path / "out")
    assert kept_chunks(tmp_path / "out") == expected != kept_chunks(tmp_path / "plain")
    plain, ordered = (Corpus(tmp_path / name) for name in ("plain", "out"))
    rows = [[SCORES[chunk], DOMAINS[chunk], LENGTHS[chunk]] for chunk in expected]
    assert ordered.table.select(["score", "domain", "num_tokens"]).to_pylist() == [
        dict(zip(["score", "domain", "num_tokens"], row, strict=True)) for row in rows
    ]
    same = ("rows", "tokens", "predictions", "parent")
    assert [ordered.manifest[key] for key in same] == [plain.manifest[key] for key in same]
    assert ordered.manifest["selection"]["rule"] == {"ratio": 0.5, "order": order} | (
        {"seed": 1} if order == "random" else {}
    )


def test_beside_another_selection(tmp_path, corpus, capsys):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    run_select(corpus, scores, tmp_path / "one", ratio=0.3)  # 0, 3, 9
    capsys.readouterr()
    run_select(corpus, scores, tmp_path / "two", score="reference", compare=str(tmp_path / "one"))
    assert overlap(Corpus(tmp_path / "two"), Corpus(tmp_path / "one")) == {
        name: (
            sum(DOMAINS[row] == name for row in kept_chunks(tmp_path / "two")),
            sum(DOMAINS[row] == name for row in (0, 3, 9)),
            sum(DOMAINS[row] == name for row in {0, 3, 9} & {*kept_chunks(tmp_path / "two")}),
        )
        for name in {DOMAINS[row] for row in (0, 3, 9, *kept_chunks(tmp_path / "two"))}
    }
    assert "in both" in capsys.readouterr().out


def test_a_rule_of_all_kinds_is_in_manifest_and_card(tmp_path, corpus):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    rule = dict(ratio=0.4, temperature=0.5, seed=2, min_tokens=2, score="normalised", order="score")
    shares = ("code=0.5", "books=0.25,[bold]x[/]=0.25")
    run_select(corpus, scores, tmp_path / "out", domain_shares=shares, **rule)
    manifest = read_manifest(tmp_path / "out")
    expected = rule | {"domain_shares": {"code": 0.5, "books": 0.25, "[bold]x[/]": 0.25}}
    assert manifest["selection"]["rule"] == manifest["identity"]["rule"] == expected
    found = model_card._rule(Rule.model_validate(expected))
    assert found.startswith(
        "the share of 0.4 drawn by their scores at the temperature 0.5, in shares of the domains ("
    )
    assert found.endswith("of chunks of at least 2 tokens, the best first")


def test_a_cap_on_near_duplicates(tmp_path, tiny_tokenizer, capsys):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(1, 500, 60).tolist() for _ in range(2))
    chunks = [first, second, [*first[:59], 7], first, [*first[:30], *second[:30]], second]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer)
    teacher = [-1.0, -3.0, -0.5, -1.0, -2.0, NAN]
    scores = write_scores(tmp_path / "scores", corpus, teacher, [-2.0] * 6)
    run_select(corpus, scores, tmp_path / "two", ratio=1.0, max_repeats=2)
    run_select(corpus, scores, tmp_path / "one", ratio=1.0, max_repeats=1)
    assert chunks_of(tmp_path / "two") == [first, second, chunks[2], chunks[4]]
    assert chunks_of(tmp_path / "one") == [second, chunks[2], chunks[4]]
    assert "near-duplicates: 3 chunks in 1 groups; left out before the cut: 2" in capsys.readouterr().out
    selection = read_manifest(tmp_path / "one")["selection"]
    assert selection["rule"] == {"ratio": 1.0, "max_repeats": 1} and selection["non_finite"] == 3
    assert selection["repeats"] == {"jaccard": 0.8, "groups": 1, "chunks": 3, "dropped": 2}


def test_sums_and_scores_of_documents(tmp_path, tiny_tokenizer, capsys):
    chunks = [[1, 2, 3, 4], [5, 0], [6, 7, 8], [9, 0]]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer)
    scores = write_scores(tmp_path / "scores", corpus, [0.4, -1.0, 0.6, -9.0], [0.0] * 4)
    run_select(corpus, scores, tmp_path / "mean", ratio=0.25)
    run_select(corpus, scores, tmp_path / "sum", ratio=0.25, aggregate="sum")  # 3 · 0.4 and 2 · 0.6
    run_select(corpus, scores, tmp_path / "documents", ratio=0.5, document_scores=True)
    kept = {name: chunks_of(tmp_path / name) for name in ("mean", "sum", "documents")}
    assert kept == {"mean": [chunks[2]], "sum": [chunks[0]], "documents": chunks[:2]}
    rule = read_manifest(tmp_path / "documents")["selection"]["rule"]
    assert rule == {"ratio": 0.5, "document_scores": True}
    assert read_manifest(tmp_path / "sum")["selection"]["rule"] == {"ratio": 0.25, "aggregate": "sum"}
    assert capsys.readouterr().out.count("(nats per token)") == 2
    card = model_card._score(Rule(ratio=0.5, aggregate="sum", document_scores=True))
    assert card.endswith(", summed over the tokens, the mean over each document's chunks")


def test_quantiles_of_tokens(tmp_path, tiny_corpus, tiny_model, capsys):
    """From stored log-probabilities, of one folder or of two; without them it is refused in one line."""
    teacher, small = tiny_model(tmp_path / "teacher"), tiny_model(tmp_path / "small", seed=1)
    run_score(tiny_corpus, tmp_path / "both", teacher=teacher, reference=small, tokens=True)
    run_score(tiny_corpus, tmp_path / "t", teacher=teacher, tokens=True)
    run_score(tiny_corpus, tmp_path / "r", reference=small, tokens=True)
    run_score(tiny_corpus, tmp_path / "bare", reference=small)
    rule = dict(ratio=0.5, aggregate="quantile", quantile=0.25)
    run_select(tiny_corpus, tmp_path / "both", tmp_path / "one", **rule)
    run_select(tiny_corpus, [tmp_path / "t", tmp_path / "r"], tmp_path / "two", **rule)
    corpus = Corpus(tiny_corpus)
    differences = TokenScores(tmp_path / "both", corpus, "difference")
    quantiles = [np.nanquantile(differences.of([row]), 0.25) if row != 17 else -9 for row in range(40)]
    best = sorted(sorted(range(40), key=lambda row: -quantiles[row])[:20])
    kept = [corpus.rows([row])[0].tolist() for row in best]
    assert chunks_of(tmp_path / "one") == chunks_of(tmp_path / "two") == kept
    assert read_manifest(tmp_path / "one")["selection"]["rule"] == rule
    assert "the quantile 0.25 over the tokens" in model_card._score(Rule(**rule))
    with pytest.raises(
        UserError, match=r"bare holds no log-probabilities per token: run miniplm score --tokens"
    ):
        run_select(tiny_corpus, [tmp_path / "t", tmp_path / "bare"], tmp_path / "none", **rule)
    run_select(tiny_corpus, [tmp_path / "t", tmp_path / "bare"], tmp_path / "three", score="teacher", **rule)
