"""report: its figures against those of manifests and files, what is left out, hostile text."""

import json
import shutil

import numpy as np
import pyarrow
import pytest
from corpora import read_score_files
from export_runs import rewrite_losses
from pages import Page
from scoring_runs import run_score
from selections import run_select

import miniplm
from miniplm.cli import main
from miniplm.data.corpus import Corpus
from miniplm.runtime.files import read_json

COLUMNS = ("teacher_log_prob", "reference_log_prob")


def make_report(output, *runs) -> Page:
    miniplm.report(runs=[str(run) for run in runs], output=str(output))
    return Page(output)


def number(text) -> float:
    return float(text.replace(",", "").rstrip("%"))


@pytest.fixture(scope="module")
def page(work, tmp_path_factory) -> Page:
    return make_report(tmp_path_factory.mktemp("report") / "report.html", work)


@pytest.fixture(scope="module")
def coloured(tiny_corpus, teacher, reference, tmp_path_factory):
    """A folder with a corpus, its scores with those of the tokens, and what was selected."""
    root = tmp_path_factory.mktemp("coloured")
    shutil.copytree(tiny_corpus, root / "pool")
    run_score(root / "pool", root / "scores", teacher=teacher, reference=reference, tokens=True)
    run_select(root / "pool", root / "scores", root / "refined", ratio=0.5)
    return root


@pytest.mark.slow
def test_figures_are_those_of_the_files(page, work):
    manifest = read_json(work / "refined" / "manifest.json")
    counts = manifest["selection"]
    columns = read_score_files(work / "scores")
    kept = Corpus(work / "refined").table["score"].to_numpy()
    bins = np.array([[number(cell) for cell in row] for row in page.table("from", "to", "kept", "dropped")])
    assert bins[:, 2].sum() == len(kept) == counts["kept"]
    assert bins[:, 3].sum() == np.isfinite(columns["score"]).sum() - len(kept)
    assert len(bins) > 50
    for low, high, inside, outside in bins[1:-1]:  # the outer ones have the tails too
        # edges are written with four digits
        sure = (columns["score"] > low + 1e-4) & (columns["score"] < high - 1e-4)
        may_be = (columns["score"] > low - 1e-4) & (columns["score"] < high + 1e-4)
        assert sure.sum() <= inside + outside <= may_be.sum()
        assert (inside == 0) or high >= kept.min() - 1e-4
    assert f"the lowest score that was kept is {kept.min():.4f}" in page.text
    shares = {row[0]: row[1:] for row in page.table("domain", "", "kept")}
    assert list(shares) == ["all", *sorted(counts["domains"], key=lambda name: -_chunks(counts, name))]
    for name, part in [("all", counts), *counts["domains"].items()]:
        chunks = part["kept"] + part["dropped"]
        tokens = part["kept_tokens"] + part["dropped_tokens"]
        assert [number(cell) for cell in shares[name][1:]] == [
            round(100 * part["kept"] / chunks, 1),
            part["kept"],
            chunks,
            round(100 * part["kept_tokens"] / tokens, 1),
        ]


def _chunks(counts, name) -> int:
    return counts["domains"][name]["kept"] + counts["domains"][name]["dropped"]


@pytest.mark.slow
def test_runs_losses_and_costs(page, work):
    rows = {row[0]: row for row in page.table("run", "role")}
    costs = {row[0]: row for row in page.table("run", "training FLOPs")}
    assert list(rows) == ["refined-student", "random-student"] == list(costs)
    for name, row in rows.items():
        manifest = read_json(work / name / "manifest.json")
        assert row[1] == "student" and row[9] == "float32"
        assert [number(cell) for cell in row[2:5]] == [
            manifest[key] for key in ("parameters", "steps", "tokens")
        ]
        assert row[5:7] == [f"{manifest['loss']:.4f}", f"{manifest['eval_loss']:.4f}"]
        lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second") is not None]
        assert number(row[7]) == round(float(np.median(speeds)))
        flops = manifest["flops"]
        assert costs[name][1] == f"{flops['forward'] + flops['backward']:.4g}"
        assert costs[name][2] == "incomplete"  # the reference model's training is not there
    losses = read_json(work / "losses.json")
    head, row = next(table for table in page.tables if table[0][:2] == ["model", "all"])
    assert head[2:] == sorted(losses["domains"], key=lambda name: -losses["domains"][name]["tokens"])
    assert row == [
        "refined-student",
        *(f"{each['loss']:.4f}" for each in (losses, *(losses["domains"][name] for name in head[2:]))),
    ]
    assert "saving factor" in page.text and "refined-student against random-student" in page.text


@pytest.mark.slow
def test_charts_are_there(page):
    styles = {style for chart in page.charts for style in chart}
    assert {"bar kept", "bar dropped", "diagonal", "cut", "line c0", "line c1", "d7"} <= styles


@pytest.mark.slow
@pytest.mark.parametrize("named", ["refined-student", "losses.json"])
def test_what_belongs_together_is_found_beside_it(named, work, tmp_path):
    page = make_report(tmp_path / "r.html", work / named)
    assert "Selection: refined" in page.text and "Selection: random" not in page.text
    assert [row[0] for row in page.table("run", "role")] == ["refined-student"]
    assert page.table("model", "all")[0][0] == "refined-student"


@pytest.mark.slow
def test_what_was_selected_by_named_scores_is_found(coloured, tmp_path):
    page = make_report(tmp_path / "r.html", coloured / "scores")
    assert "Selection: refined" in page.text and "no finished run of train is here" in page.text


@pytest.mark.slow
def test_missing_parts_are_told_in_a_line(work, tmp_path, capsys):
    shutil.copytree(work / "refined-student", tmp_path / "alone")
    rewrite_losses(work, tmp_path / "of-another.json", lambda losses: losses.update(weights="0" * 16))
    page = make_report(tmp_path / "r.html", tmp_path / "alone")
    said = capsys.readouterr().out
    for what in (
        "Scores and selection: no output of score or select is here.",
        "Held-out losses: no file of evaluate about these models is here.",
        "Tasks: none were asked",
    ):
        assert what in page.text and f"left out: {what}" in said
    assert "Selection:" not in page.text and page.table("run", "role")[0][0] == "alone"
    shutil.copytree(work / "refined", tmp_path / "refined")
    page = make_report(tmp_path / "r.html", tmp_path / "refined")
    assert "Scores behind refined: they are not beside it." in page.text
    assert page.table("domain", "")[0][0] == "all"


@pytest.mark.slow
def test_damage_leaves_out_its_section(coloured, tmp_path, capsys):
    root = shutil.copytree(coloured, tmp_path / "copy")
    path = next(root.glob("scores/scores-*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    page = make_report(tmp_path / "r.html", root)
    assert "scores and refined: damaged" in page.text and "is not as written" in capsys.readouterr().err


@pytest.mark.slow
def test_tokens_are_coloured_by_their_difference(coloured, tmp_path):
    page = make_report(tmp_path / "r.html", coloured)
    assert len(page.chunks) == 12 and len(page.coloured) > 100
    thresholds = [0.25, 0.75, 1.5, 3.0]
    for style, title, _ in page.coloured:
        value = float(title)
        assert style[0] == ("p" if value > 0 else "n")
        # titles have two digits
        assert any(
            int(style[1]) == sum(abs(value) + shift >= each for each in thresholds)
            for shift in (-0.005, 0.0, 0.005)
        )
    corpus, tokenizer = Corpus(coloured / "pool"), _tokenizer(coloured)
    score = read_score_files(coloured / "scores")["score"]
    row = int(np.nanargmax(score))
    ids = corpus.rows([row])[0].tolist()
    with pyarrow.ipc.open_stream(coloured / "scores" / f"tokens-{row // 7:05d}.arrow") as reader:
        table = reader.read_all()
    teacher, reference = (table[name][row % 7].as_py() for name in COLUMNS)
    differences = [float(one) - float(other) for one, other in zip(teacher, reference, strict=True)]
    found = iter((title, text) for _, title, text in page.coloured)  # those of the best chunk come first
    whole = [tokenizer.decode(id_) for id_ in ids[1:]]
    expected = [
        (f"{value:+.2f}", text)
        for text, value in zip(whole, differences, strict=True)
        if abs(value) >= 0.25 and "\ufffd" not in text  # not a part of a letter
    ]
    assert len(expected) > 3 and all(each in found for each in expected)
    best = tokenizer.decode(corpus.rows([int(np.nanargmax(score))])[0].tolist())
    worst = tokenizer.decode(corpus.rows([int(np.nanargmin(score))])[0].tolist())
    assert page.chunks[0] == best and page.chunks[9] == worst
    refined = Corpus(coloured / "refined").table["score"].to_numpy()
    assert f"{score[np.isin(score, refined)].min():+.3f}" == _scores_shown(page)[3]
    assert f"{np.nanmax(score[~np.isin(score, refined)]):+.3f}" == _scores_shown(page)[6]


def _tokenizer(root):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "pool" / "tokenizer")


def _scores_shown(page) -> list[str]:
    import re

    return re.findall(r"<header><b>([^<]*)</b>", page.source)


def test_hostile_text_stays_text(hostile_run, tmp_path):
    """Domains, chunks, the source and folders with all kinds of names."""
    page = make_report(tmp_path / "report.html", hostile_run)
    assert len(page.source.encode()) < 400_000
    odd = {letter for letter in page.text if not letter.isprintable()}
    assert odd <= set("\n\t\u200c\u200d\u00a0\u202f\u3000"), odd
    assert "<b>\\u202e&" in page.text and "<script>alert(1)<\\x1b]0;x\\x07" in page.text
    shown = {row[0] for table in page.tables for row in table}
    assert "</td></tr></table><script>alert(1)</script>" in shown
    text = "".join(page.chunks)
    assert page.chunks and "\x1b" not in text and "\0" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run nowhere does not exist"),
        (["empty"], "run empty holds no complete output of miniplm: name a folder that it wrote"),
        (["notes.json"], "notes.json is not an evaluation as evaluate writes it"),
        (["."], "output notes.html is no report of miniplm: choose another --output or delete it"),
        ([".", "-o", "empty"], "output empty is a folder: give the name of an .html file"),
        ([], "runs is required"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.json").write_text('{"weights": 3}')
    (tmp_path / "notes.html").write_text("<p>mine")
    output = [] if "-o" in arguments else ["-o", "notes.html" if arguments == ["."] else "r.html"]
    assert main(["report", *arguments, *output]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert (tmp_path / "notes.html").read_text() == "<p>mine" and not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_equal_outputs_give_equal_pages_and_a_report_is_replaced(coloured, tmp_path):
    first = make_report(tmp_path / "r.html", coloured).source
    assert make_report(tmp_path / "r.html", coloured).source == first
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
