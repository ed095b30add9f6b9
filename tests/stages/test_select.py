"""select: the rule against a plain restatement, what is refused, what is written."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_scoring import files, kill_and_restart

from miniplm.config import ScoreConfig, SelectConfig
from miniplm.data import corpus as storage
from miniplm.runtime import artifacts
from miniplm.runtime.errors import UserError
from miniplm.stages import select as sampling
from miniplm.stages.score import score
from miniplm.stages.select import best_first, choose, select

NAN, INF = float("nan"), float("inf")


def make_corpus(folder, lengths, domains) -> str:
    """A complete corpus with chunks of these lengths: row r holds the ids r, r + 1, … Two Arrow files, the
    second one shorter."""
    rows = [list(range(row, row + length)) for row, length in enumerate(lengths)]
    artifacts.open_output(folder, "prepare", {"rows": rows})
    half, hashes = len(rows) // 2 + 1, []
    for number, part in enumerate([slice(0, half), slice(half, None)]):
        columns = {
            "input_ids": pa.array(rows[part], pa.list_(pa.int32())),
            "domain": pa.array(domains[part], pa.string()),
            "num_tokens": pa.array(list(lengths[part]), pa.int32()),
        }
        hashes.append(storage.write_shard(folder, number, columns))
    (Path(folder) / "tokenizer").mkdir()
    (Path(folder) / "tokenizer" / "tokenizer.json").write_text('{"some": "vocabulary"}')
    artifacts.complete_output(
        folder,
        {
            "fingerprint": storage.write_dataset_files(folder, hashes, with_scores=False),
            "rows": len(rows),
            "tokens": sum(lengths),
            "predictions": 1,
            "domains": {},
            "bad_records": 3,
            "eos_token_id": 0,
            "vocab_size": 999,
            "tokenizer_fingerprint": "f",
            "max_length": 64,
            "source": "books",
        },
    )
    return str(folder)


def make_scores(folder, corpus, teacher=None, reference=None, order=None, file_rows=4, **identity) -> str:
    """A complete score folder with these mean log-probabilities, rows in `order` over files of
    `file_rows`."""
    columns = {}
    if teacher is not None:
        columns["teacher_log_prob"] = np.float32(teacher)
    if reference is not None:
        columns["reference_log_prob"] = np.float32(reference)
    if len(columns) == 2:
        with np.errstate(invalid="ignore"):
            columns["score"] = columns["teacher_log_prob"] - columns["reference_log_prob"]
    rows = len(next(iter(columns.values())))
    order = np.arange(rows) if order is None else np.asarray(order)
    fingerprint = artifacts.read_manifest(corpus)["fingerprint"]
    artifacts.open_output(
        folder,
        "score",
        {
            "corpus": fingerprint,
            "teacher": "t" if teacher is not None else None,
            "reference": "r" if reference is not None else None,
            "dtype": "float32",
            "document_mask": False,
            "vocab_size": None,
        }
        | identity,
    )
    for number, start in enumerate(range(0, len(order), file_rows)):
        part = order[start : start + file_rows]
        table = {"index": part, "num_tokens": np.int32(part + 1)} | {
            name: values[part] for name, values in columns.items()
        }
        pq.write_table(pa.table(table), Path(folder) / f"scores-{number:05d}.parquet")
    artifacts.complete_output(
        folder, {"teacher": "big", "reference": "small", "vocab_size": 999, "rows": rows}
    )
    return str(folder)


def kept_rows(folder) -> list[int]:
    from datasets import load_from_disk

    return [ids[0] for ids in load_from_disk(str(folder))["input_ids"]]


def settings(**rule) -> SelectConfig:
    return SelectConfig(data="", scores=[""], output="", **rule)


# --- the rule ---


def plainly(config, scores, lengths, domains) -> set[int]:
    """The rule once more, row by row."""
    kept = set()
    for domain in set(domains) if config.per_domain else [None]:
        rows = [row for row in range(len(scores)) if domain in (None, domains[row])]
        ranked = sorted((row for row in rows if abs(scores[row]) < INF), key=lambda row: (-scores[row], row))
        if config.threshold is not None:
            kept |= {row for row in ranked if scores[row] >= config.threshold}
        elif config.ratio is not None:
            kept |= set(ranked[: int(config.ratio * len(rows))])
        else:
            budget = config.token_budget * sum(lengths[row] for row in rows) // sum(lengths)
            for row in ranked:
                budget -= lengths[row]
                if budget < 0:
                    break
                kept.add(row)
    return kept


RULES = [
    dict(ratio=0.5),
    dict(ratio=1.0),
    dict(ratio=0.29),
    dict(ratio=0.5, per_domain=True),
    dict(threshold=0.0),
    dict(threshold=0.25),
    dict(token_budget=1),
    dict(token_budget=200),
    dict(token_budget=10**9),
    dict(token_budget=200, per_domain=True),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 100, 257])
def test_rule(rows, rule):
    rng = np.random.default_rng(rows)
    config = settings(**rule)
    for values in (
        [0.25, -0.5, 0.0, -0.0, NAN, INF, -INF],
        rng.normal(size=1000),
        [0.0],
        [NAN, 1.0],
    ):  # few values: many ties
        scores = rng.choice(np.float32(values), rows)
        lengths, domains = rng.integers(1, 30, rows), rng.integers(0, 4, rows).astype(np.int32)
        if rows > 50:
            scores[domains == 3] = NAN
        assert set(np.flatnonzero(choose(config, scores, lengths, domains))) == plainly(
            config, scores.tolist(), lengths.tolist(), domains.tolist()
        )


def test_best_first_is_the_stable_descending_order():
    rng = np.random.default_rng(0)
    bits = (
        rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    )  # every kind of float: tiny, huge, NaN, infinite
    scores = np.concatenate(
        [bits, rng.choice(np.float32([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, NAN, INF, -INF]), 5_000)]
    )
    rng.shuffle(scores)
    rows = np.flatnonzero(np.isfinite(scores))
    assert len(rows) > 20_000
    np.testing.assert_array_equal(
        best_first(scores), rows[np.argsort(-scores[rows].astype(np.float64), kind="stable")]
    )


def test_random_control_takes_as_many_rows_at_random():
    scores = np.float32(np.linspace(1, -1, 1000))
    scores[:100] = NAN
    ones, domains = np.ones(1000, np.int64), np.repeat(np.int32([0, 1]), 500)
    best = choose(settings(ratio=0.5), scores, ones, domains)
    first, again, second = (
        choose(settings(ratio=0.5, random_seed=seed), scores, ones, domains) for seed in (1, 1, 2)
    )
    assert best.sum() == first.sum() == second.sum() == 500
    np.testing.assert_array_equal(first, again)
    assert (first != second).sum() > 300
    assert not first[:100].any() and best[100:600].all()
    assert 150 < first[550:].sum() < 350  # 250 expected, where the rule by score keeps 50
    per_domain = choose(settings(ratio=0.5, random_seed=1, per_domain=True), scores, ones, domains)
    assert per_domain[:500].sum() == per_domain[500:].sum() == 250


# --- what is written ---

LENGTHS = [3, 1, 5, 2, 8, 1, 4, 6, 2, 7, 1]
DOMAINS = ["code", "books", "code", "[bold]x[/]", "books", "null", "code", "books", "null", "code", "books"]
TEACHER = [-1.0, -2.0, -3.0, -1.5, NAN, NAN, -2.0, -1.0, -INF, -0.5, -4.0]
REFERENCE = [-2.0, -2.0, -2.5, -2.5, -1.0, NAN, -3.0, -0.5, -1.0, -3.0, -4.5]
SCORES = [1.0, 0.0, -0.5, 1.0, None, None, 1.0, -0.5, None, 2.5, 0.5]


@pytest.fixture
def corpus(tmp_path) -> str:
    return make_corpus(tmp_path / "corpus", LENGTHS, DOMAINS)


def test_refined_corpus(tmp_path, corpus, capsys):
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    output = tmp_path / "refined"
    select(SelectConfig(data=corpus, scores=[scores], output=str(output)))
    kept = [0, 3, 6, 9, 10]  # int(0.5 * 11) = 5
    refined = storage.Corpus(output)
    assert kept_rows(output) == kept
    assert [row.tolist() for row in refined.rows(range(5))] == [
        list(range(row, row + LENGTHS[row])) for row in kept
    ]
    table = refined.table.to_pydict()
    assert table["domain"] == [DOMAINS[row] for row in kept] and table["num_tokens"] == [
        LENGTHS[row] for row in kept
    ]
    assert table["score"] == [SCORES[row] for row in kept]
    assert table["teacher_log_prob"] == [TEACHER[row] for row in kept] and table["reference_log_prob"] == [
        REFERENCE[row] for row in kept
    ]
    assert files(output / "tokenizer") == files(Path(corpus) / "tokenizer")

    manifest, parent = refined.manifest, artifacts.read_manifest(corpus)
    assert {key: manifest[key] for key in ("rows", "tokens", "predictions")} == {
        "rows": 5,
        "tokens": sum(LENGTHS[row] for row in kept),
        "predictions": sum(row + 1 for row in kept),
    }
    assert manifest["domains"] == {
        "code": {"rows": 3, "tokens": 14},
        "[bold]x[/]": {"rows": 1, "tokens": 2},
        "books": {"rows": 1, "tokens": 1},
    }
    for key in ("bad_records", "eos_token_id", "vocab_size", "tokenizer_fingerprint", "max_length", "source"):
        assert manifest[key] == parent[key]
    assert manifest["parent"] == parent["fingerprint"] != manifest["fingerprint"]
    assert manifest["scores"] == [
        {
            "teacher": "big",
            "reference": "small",
            "dtype": "float32",
            "vocab_size": 999,
            "document_mask": False,
        }
    ]
    selection, finite = manifest["selection"], [value for value in SCORES if value is not None]
    assert selection["rule"] == {"ratio": 0.5}
    assert (selection["kept"], selection["dropped"], selection["non_finite"], selection["below_zero"]) == (
        5,
        6,
        3,
        2 / 8,
    )
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
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r"), ratio=0.5, per_domain=True))
    assert kept_rows(tmp_path / "r") == [
        0,
        1,
        9,
        10,
    ]  # 2 of 4 in code and books, int(0.5 * 1) = 0 of the third, none of the domain without scores


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
        scores = make_scores(tmp_path / name, corpus, TEACHER, REFERENCE, **options)
        select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / f"{name}-refined"), **rule))
        outputs.append(files(tmp_path / f"{name}-refined"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_two_folders_in_any_order_equal_one(tmp_path, corpus):
    both = make_scores(tmp_path / "both", corpus, TEACHER, REFERENCE)
    teacher = make_scores(tmp_path / "teacher", corpus, TEACHER, dtype="bfloat16")  # the dtypes may differ
    reference = make_scores(tmp_path / "reference", corpus, reference=REFERENCE)
    for number, folders in enumerate([[both], [teacher, reference], [reference, teacher]]):
        select(SelectConfig(data=corpus, scores=folders, output=str(tmp_path / f"r{number}")))
    one, two, swapped = (files(tmp_path / f"r{number}") for number in range(3))
    assert two == swapped
    del one["manifest.json"], two["manifest.json"]
    assert one == two


def test_several_files_hold_what_one_does(tmp_path, corpus, monkeypatch):
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "one"), threshold=-9.0))
    monkeypatch.setattr(sampling, "SHARD_BYTES", 1)  # every record batch a file of its own
    select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "many"), threshold=-9.0))
    assert (
        len(list((tmp_path / "one").glob("*.arrow"))) == 1
        and len(list((tmp_path / "many").glob("*.arrow"))) == 2
    )
    one, many = (storage.Corpus(tmp_path / name).table.to_pydict() for name in ("one", "many"))
    assert one == many and len(one["score"]) == 8


def test_refined_corpus_is_scored_and_refined_again(tiny_corpus, tiny_model, tmp_path):
    """The real chain, twice: the second pass meets a corpus that has score columns already."""
    models = dict(teacher=tiny_model(tmp_path / "t", seed=0), reference=tiny_model(tmp_path / "r", seed=1))
    data, values = tiny_corpus, []
    for step in ("1", "2"):
        score(ScoreConfig(data=data, output=str(tmp_path / f"s{step}"), device="cpu", **models))
        select(
            SelectConfig(data=data, scores=[str(tmp_path / f"s{step}")], output=str(tmp_path / f"c{step}"))
        )
        data = str(tmp_path / f"c{step}")
        values.append(storage.Corpus(data).table["score"].to_numpy())
    manifest = artifacts.read_manifest(data)
    assert (len(values[0]), len(values[1])) == (20, 10)
    np.testing.assert_allclose(np.sort(values[0])[10:], np.sort(values[1]), atol=1e-5)
    rows = storage.Corpus(data).rows(range(10))
    assert (
        manifest["predictions"] == sum(int((row[:-1] != 0).sum()) for row in rows)
        and manifest["source"] == "tiny.jsonl"
    )


def test_complete_run_is_left_alone_and_another_one_refused(tmp_path, corpus, capsys):
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    output = str(tmp_path / "r")
    select(SelectConfig(data=corpus, scores=[scores], output=output))
    before = {path.name: path.stat().st_ino for path in Path(output).iterdir()}
    capsys.readouterr()
    select(SelectConfig(data=corpus, scores=[scores], output=output, ratio=0.5))
    assert capsys.readouterr().out == f"The refined corpus {output} is complete, nothing to do.\n"
    for rule in (dict(ratio=0.4), dict(per_domain=True), dict(threshold=0.1), dict(random_seed=0)):
        with pytest.raises(UserError, match="another select run"):
            select(SelectConfig(data=corpus, scores=[scores], output=output, **rule))
    other = make_scores(tmp_path / "other", corpus, TEACHER, REFERENCE, teacher_dtype="float16")
    with pytest.raises(UserError, match="another select run"):
        select(SelectConfig(data=corpus, scores=[other], output=output))
    with pytest.raises(UserError, match="'prepare' run"):
        select(SelectConfig(data=corpus, scores=[scores], output=corpus))
    assert {path.name: path.stat().st_ino for path in Path(output).iterdir()} == before


def test_kill_and_restart_ends_in_the_same_bytes(tmp_path, monkeypatch):
    rows = 4_000
    corpus = make_corpus(tmp_path / "corpus", [1 + row % 7 for row in range(rows)], ["a"] * rows)
    rng = np.random.default_rng(0)
    scores = make_scores(
        tmp_path / "scores", corpus, rng.normal(size=rows), rng.normal(size=rows), file_rows=500
    )
    monkeypatch.setattr(storage, "ROWS_PER_RECORD_BATCH", 100)
    monkeypatch.setattr(sampling, "SHARD_BYTES", 1)
    call = "select(SelectConfig(data={!r}, scores=[{!r}], output={!r}))"
    select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "whole")))
    setup = (
        "import datasets, pyarrow.parquet, rich.table; import miniplm.stages.select as sampling, "
        "miniplm.data.corpus as storage; from miniplm.config import SelectConfig; "
        "from miniplm.stages.select import select; storage.ROWS_PER_RECORD_BATCH = 100; "
        "sampling.SHARD_BYTES = 1"
    )
    killed = tmp_path / "killed"
    struck = kill_and_restart(
        setup, call.format(corpus, scores, str(killed)), killed, "data-*.arrow", [0, 1, 2, 4]
    )
    assert struck >= 2
    assert files(killed) == files(tmp_path / "whole") and len(list(killed.glob("*.arrow"))) > 4


# --- refusals ---


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (dict(ratio=0.05), "ratio 0.05 of 11 chunks is less than one"),
        (dict(ratio=0.2, per_domain=True), "in any domain"),
        (dict(threshold=2.6), "the highest score is 2.5000"),
        (dict(token_budget=6), "token_budget 6"),
        (dict(token_budget=2, per_domain=True), "in any domain"),
    ],
    ids=str,
)
def test_rule_that_keeps_nothing(tmp_path, corpus, rule, words):
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    with pytest.raises(UserError, match=words):
        select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r"), **rule))
    assert not (tmp_path / "r").exists()


def test_no_finite_score(tmp_path, corpus):
    scores = make_scores(tmp_path / "scores", corpus, [NAN] * 11, REFERENCE)
    for rule in (dict(ratio=1.0), dict(threshold=-9.0), dict(token_budget=99), dict(random_seed=1)):
        with pytest.raises(UserError, match="no chunk has a finite score"):
            select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r"), **rule))


def test_corpus_of_one_row(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", [4], ["a"])
    scores = make_scores(tmp_path / "scores", corpus, [-1.0], [-2.0])
    with pytest.raises(UserError, match="of 1 chunks is less"):
        select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r")))
    select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r"), ratio=1.0))
    assert kept_rows(tmp_path / "r") == [0]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([*range(10)], "10 entries for the 11 rows of the corpus and none for 1"),
        ([*range(11), 5], "12 entries"),
        ([*range(10), 5], "none for 1"),
        ([], "none for 11"),
    ],
    ids=["missing", "twice", "twice and missing", "no files"],
)
def test_every_row_exactly_once(tmp_path, corpus, order, words):
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE, order=np.array(order, np.int64))
    with pytest.raises(UserError, match=words):
        select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


def test_unusable_score_files(tmp_path, corpus):
    scores = make_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    path = tmp_path / "scores" / "scores-00001.parquet"
    whole, table = path.read_bytes(), pq.read_table(path)

    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r")))
        assert "scores-00001.parquet" in str(caught.value) and "\n" not in str(caught.value)

    for wrong in (whole[:-9], whole[:40], b"", b"nonsense" * 50):
        path.write_bytes(wrong)
        refused("cannot be read")
    pq.write_table(table.drop_columns(["score"]), path)
    refused("cannot be read")
    pq.write_table(table.set_column(0, "index", pa.array(["a"] * 4)), path)
    refused("cannot be read")
    for index in ([4, 5, 6, 11], [-1, 5, 6, 7], [None, 5, 6, 7]):
        pq.write_table(table.set_column(0, "index", pa.array(index)), path)
        refused("does not have")
    path.write_bytes(whole)
    select(SelectConfig(data=corpus, scores=[scores], output=str(tmp_path / "r")))


def test_folders_that_do_not_fit(tmp_path, corpus):
    other = make_corpus(tmp_path / "other", LENGTHS[::-1], DOMAINS)
    both = make_scores(tmp_path / "both", corpus, TEACHER, REFERENCE)
    foreign = make_scores(tmp_path / "foreign", other, TEACHER, REFERENCE)
    teacher = make_scores(tmp_path / "teacher", corpus, TEACHER)
    masked = make_scores(tmp_path / "masked", corpus, reference=REFERENCE, document_mask=True)
    small = make_scores(tmp_path / "small", corpus, reference=REFERENCE)
    artifacts.write_json(
        tmp_path / "small" / "manifest.json",
        {**artifacts.read_json(tmp_path / "small" / "manifest.json"), "vocab_size": 500},
    )
    unfinished = Path(shutil.copytree(both, tmp_path / "unfinished"))
    (unfinished / "manifest.json").write_text(
        json.dumps({**artifacts.read_json(unfinished / "manifest.json"), "complete": False})
    )
    for folders, words in [
        ([foreign], "another corpus"),
        ([teacher], "no scores of a reference"),
        ([small], "no scores of a teacher"),
        ([both, teacher], "both hold scores of a teacher"),
        ([teacher, teacher], "both hold"),
        ([both, both], "both hold"),
        ([teacher, masked], "document_mask is False and True"),
        ([small, teacher], "vocab_size is 999 and 500"),
        ([unfinished], "is not complete"),
        ([corpus], "'prepare'"),
        ([str(tmp_path / "nowhere")], "does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            select(SelectConfig(data=corpus, scores=folders, output=str(tmp_path / "r")))
    with pytest.raises(UserError, match="expected that of"):
        select(SelectConfig(data=both, scores=[both], output=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()
