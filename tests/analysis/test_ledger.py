"""ledger: sums against torch's own count, where the offline work is found, and comparisons by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpora import chunks_of
from scoring_runs import needs_scaled_rows
from torch.utils.flop_counter import FlopCounterMode
from training_runs import make_config, metrics, scores_again

import miniplm
from miniplm.analysis.ledger import Evaluation, Run, compare, evaluations, reached, students
from miniplm.cli import main
from miniplm.config import (
    DistillConfig,
    EvalConfig,
    NgramConfig,
    ProxyFitConfig,
    ProxyScoreConfig,
    RetokenizeConfig,
    ScoreConfig,
    SelectConfig,
    TokensConfig,
)
from miniplm.runtime.files import read_json, write_json
from miniplm.runtime.wall_time import wall_time
from miniplm.stages.proxy_fit import proxy_fit
from miniplm.stages.proxy_score import proxy_score
from miniplm.stages.retokenize import retokenize
from miniplm.stages.score import score
from miniplm.stages.select import select
from miniplm.stages.train import train


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def house(tiny_corpus, tiny_model, tmp_path_factory):
    """A corpus, its reference model and scores, what was selected, and a student of each, with what torch
    counted of the offline work."""
    root = tmp_path_factory.mktemp("house")
    runs = root / "runs"
    corpus = str(shutil.copytree(tiny_corpus, runs / "pool"))
    teacher = tiny_model(root / "teacher", seed=7, hidden_size=64)
    base = replace(make_config(corpus, runs / "control"), eval=EvalConfig(data=corpus, interval=4, chunks=6))
    reference = replace(base, output=str(runs / "reference"), steps=8, eval=EvalConfig())
    training = counted(lambda: train(reference)) - scores_again(reference)
    scoring = ScoreConfig(
        data=corpus,
        teacher=teacher,
        reference=reference.output,
        output=str(runs / "scores"),
        device="cpu",
        dtype="float32",
    )
    scores = counted(lambda: score(scoring))
    select(SelectConfig(data=corpus, scores=[scoring.output], output=str(runs / "refined")))
    student = replace(base, data=str(runs / "refined"), output=str(runs / "student"), steps=20)
    train(base)
    train(student)
    return SimpleNamespace(
        root=root, runs=runs, training=training, scores=scores, base=base, student=student, teacher=teacher
    )


@pytest.mark.slow
def test_sums_are_what_torch_counts(house, capsys):
    result = miniplm.ledger(runs=[house.base.output, house.student.output])
    control, student = result["runs"]
    flops = read_json(house.runs / "student" / "manifest.json")["flops"]
    assert student["training_flops"] == flops["forward"] + flops["backward"] == 3 * flops["forward"]
    assert {entry["name"]: entry["flops"] for entry in student["offline"]} == {
        "refined": 0,
        "scores": house.scores,
        "reference": house.training,
        "pool": 0,
    }
    assert student["offline_flops"] == house.scores + house.training
    assert (
        student["all_in_flops"]
        == student["training_flops"] + flops["evaluation"] + house.scores + house.training
    )
    assert control["offline_flops"] == 0 and control["missing"] == student["missing"] == []
    assert [(run["steps"], run["tokens"]) for run in result["runs"]] == [
        (26, metrics(house.base.output)[-1]["tokens"]),
        (20, metrics(house.student.output)[-1]["tokens"]),
    ]
    times = [wall_time(house.runs / name) for name in ("scores", "reference", "refined", "student")]
    assert all(seconds > 0 for seconds in times)
    assert student["training_seconds"] == times[-1]
    assert student["all_in_seconds"] is None  # the pool was made by the test: its time is not recorded
    printed = capsys.readouterr().out
    assert f"{student['all_in_flops']:.4g}" in printed and "not recorded" in printed
    assert "student against control, where both reach a held-out loss of" in printed


@pytest.mark.slow
def test_json_and_what_is_not_beside_the_runs(house, tmp_path, capsys):
    alone = shutil.copytree(house.student.output, tmp_path / "alone" / "student")
    assert main(["ledger", str(alone), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["missing"] == [
        f"corpus {read_json(house.runs / 'refined' / 'manifest.json')['fingerprint']}"
    ]
    assert found["all_in_flops"] is None and found["training_flops"] > 0
    arguments = [str(alone), "--inputs", *(str(house.runs / name) for name in ("refined", "scores"))]
    assert main(["ledger", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not found: training of the reference model" in printed and "incomplete" in printed
    assert main(["ledger", str(alone), "--inputs", str(house.runs), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["missing"] == [] and found["offline_flops"] == house.scores + house.training


@pytest.mark.slow
def test_scores_of_tokens_are_offline_work(house, tmp_path):
    scored = str(tmp_path / "tokens")
    reference = str(house.runs / "reference")
    score(ScoreConfig(data=house.student.data, reference=reference, output=scored, tokens=True, device="cpu"))
    tokens = TokensConfig(scores=scored, rule="reference_loss")
    train(replace(house.student, tokens=tokens, output=str(tmp_path / "run"), steps=2))
    inputs = [str(house.runs), scored]
    (found,) = miniplm.ledger(runs=[str(tmp_path / "run")], inputs=inputs, json=True)["runs"]
    (cost,) = read_json(Path(scored, "manifest.json"))["flops"].values()
    assert found["missing"] == [] and cost > 0
    assert found["offline_flops"] == house.scores + house.training + cost
    shutil.rmtree(scored)
    (found,) = miniplm.ledger(runs=[str(tmp_path / "run")], inputs=inputs[:1], json=True)["runs"]
    assert found["missing"] == [
        f"scores of corpus {read_json(tmp_path / 'run' / 'manifest.json')['identity']['corpus']}"
    ]


@pytest.mark.slow
def test_predicted_scores_cost_the_sample_the_fit_and_the_prediction(house, tmp_path):
    corpus, here = str(house.runs / "pool"), tmp_path / "proxies"
    sample, proxy, predicted, refined = (
        str(here / name) for name in ("sample", "proxy", "predicted", "refined")
    )
    models = dict(teacher=house.teacher, reference=str(house.runs / "reference"))
    score(ScoreConfig(data=corpus, output=sample, sample=0.9, device="cpu", dtype="float32", **models))
    proxy_fit(ProxyFitConfig(corpus, sample, proxy, held_out=0.3, ngram=NgramConfig(buckets=99)))
    proxy_score(ProxyScoreConfig(corpus, proxy, predicted))
    select(SelectConfig(data=corpus, scores=[predicted], output=refined))
    train(replace(house.student, data=refined, output=str(here / "run"), steps=2))
    (found,) = miniplm.ledger(runs=[str(here / "run")], inputs=[str(house.runs)], json=True)["runs"]
    costs = {
        name: sum(read_json(here / name / "manifest.json")["flops"].values())
        for name in ("sample", "proxy", "predicted")
    }
    expected = costs | {"refined": 0, "reference": house.training, "pool": 0}
    assert {entry["name"]: entry["flops"] for entry in found["offline"]} == expected
    assert costs["predicted"] == 2 * 3 * 1 * sum(len(ids) - 1 for ids in chunks_of(corpus))
    assert costs["predicted"] < costs["proxy"] < costs["sample"] < house.scores
    assert found["missing"] == [] and found["offline_flops"] == sum(costs.values()) + house.training
    shutil.rmtree(proxy)
    (found,) = miniplm.ledger(runs=[str(here / "run")], inputs=[str(house.runs)], json=True)["runs"]
    identity = read_json(here / "predicted" / "manifest.json")["identity"]
    assert found["missing"] == [f"proxy {identity['proxy']}"] and found["all_in_flops"] is None


@pytest.mark.slow
def test_runs_and_scores_from_before(house, tmp_path, capsys):
    """Without FLOPs and times: not recorded, and nothing else is lost."""
    old = Path(shutil.copytree(house.runs, tmp_path / "old"))
    for name in ("student", "scores"):
        path = old / name / "manifest.json"
        kept = {key: value for key, value in read_json(path).items() if key not in ("flops", "checksum")}
        write_json(path, kept)
        (old / name / "wall_time.json").unlink()
    result = miniplm.ledger(runs=[str(old / "control"), str(old / "student")])
    student, (comparison,) = result["runs"][1], result["comparisons"]
    assert student["tokens"] > 0 and student["missing"] == []
    for key in ("flops", "training_flops", "offline_flops", "all_in_flops", "training_seconds"):
        assert student[key] is None, key
    assert comparison["token_saving"] > 0 and comparison["saving"] is comparison["students"] is None
    assert "not recorded" in capsys.readouterr().out


@pytest.mark.slow
def test_damaged_and_foreign_folders_are_left_out(house, tmp_path):
    other = Path(shutil.copytree(house.runs, tmp_path / "other"))
    changed = read_json(other / "scores" / "manifest.json") | {"flops": {"teacher": 1}}
    write_json(other / "scores" / "manifest.json", changed)  # its checksum is another's
    (other / "refined-not").mkdir()
    (other / "refined-not" / "manifest.json").write_text("{}")
    (other / "a file").write_text("")
    (found,) = miniplm.ledger(runs=[str(other / "student")], json=True)["runs"]
    assert found["missing"] == [
        f"scores of corpus {read_json(other / 'pool' / 'manifest.json')['fingerprint']}"
    ]


@pytest.mark.slow
def test_a_teacher_counts_in_training(house, tmp_path):
    config = replace(house.base, output=str(tmp_path / "kd"), steps=3, distill=DistillConfig(house.teacher))
    train(config)
    (run,) = miniplm.ledger(runs=[config.output], inputs=[str(house.runs)])["runs"]
    assert run["training_flops"] == 3 * run["flops"]["forward"] + run["flops"]["teacher"]
    assert run["flops"]["teacher"] > run["flops"]["forward"]


# ---- comparisons ----

CURVE = [Evaluation(100, 1000.0, 6.0), Evaluation(200, 2000.0, 4.0), Evaluation(300, 3000.0, 4.5)]


@pytest.mark.parametrize(
    ("loss", "tokens", "flops"),
    [(6.0, 100, 1000), (7.0, 100, 1000), (5.0, 150, 1500), (4.5, 175, 1750), (4.0, 200, 2000)],
)
def test_where_a_curve_reaches_a_loss(loss, tokens, flops):
    assert reached(CURVE, loss) == (tokens, flops)
    unknown = [point._replace(flops=None) for point in CURVE]
    assert reached(unknown, loss) == (tokens, None)


@pytest.mark.parametrize(
    ("saved", "offline", "expected"),
    [(10, 25, 3), (10, 30, 3), (10, 30.1, 4), (10, 0, 0), (-1, 0, 0), (0, 1, "never"), (-5, 1, "never")],
)
def test_from_how_many_students_on(saved, offline, expected):
    assert students(saved, offline) == expected


def run_of(tmp_path, name, losses, flops, offline, **identity) -> Run:
    """A run with an evaluation after each hundred tokens."""
    folder = tmp_path / name
    folder.mkdir()
    lines = [{"step": k, "tokens": 100 * k, "eval_loss": loss} for k, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = {"identity": {"eval_corpus": "e", "eval_rows": 5} | identity, "tokens": 100 * len(losses)}
    return Run(str(folder), manifest, {"training_flops": flops, "offline_flops": offline})


def test_equal_loss_by_hand(tmp_path):
    """The baseline ends at 4.0, after 400 tokens and 8,000 FLOPs; the other passes 4.0 half-way between 100
    and 200 tokens, at 15 FLOPs a token."""
    baseline = run_of(tmp_path, "baseline", [6.0, 5.0, 4.5, 4.0], 8_000, 0)
    other = run_of(tmp_path, "other", [4.5, 3.5, 3.0], 4_500, 11_000)
    assert [point.flops for point in evaluations(other)] == [1_500, 3_000, 4_500]
    assert compare(baseline, other) == {
        "loss": 4.0,
        "token_saving": 400 / 150,
        "baseline_flops": 8_000,
        "flops": 2_250,
        "saving": 8_000 / 2_250,
        "all_in_saving": 8_000 / 13_250,
        "students": 2,
    }
    back = compare(other, baseline)  # one that costs more, without offline work
    assert back["saving"] == pytest.approx(2_250 / 8_000) and back["students"] == 0
    assert compare(baseline, Run(*other[:2], other.costs | {"offline_flops": None}))["students"] is None


@pytest.mark.parametrize("identity", [{"eval_corpus": "x"}, {"eval_rows": 6}, {"eval_corpus": None}])
def test_losses_on_other_text_do_not_compare(tmp_path, identity):
    baseline, other = run_of(tmp_path, "a", [5.0], 1, 0), run_of(tmp_path, "b", [5.0], 1, 0, **identity)
    assert "one corpus" in compare(baseline, other)["reason"]


def test_runs_without_held_out_losses(tmp_path):
    baseline, other = run_of(tmp_path, "a", [5.0], 1, 0), run_of(tmp_path, "b", [None], 1, 0)
    assert "no held-out loss" in compare(baseline, other)["reason"]


@pytest.mark.slow
def test_scores_within_documents_cost_less(house, tiny_corpus, tmp_path):
    costs = {}
    for document_mask in (False, True):
        output = str(tmp_path / str(document_mask))
        config = ScoreConfig(
            data=tiny_corpus,
            teacher=house.teacher,
            output=output,
            device="cpu",
            dtype="float32",
            document_mask=document_mask,
        )
        total = counted(lambda config=config: score(config))
        costs[document_mask] = read_json(Path(output) / "manifest.json")["flops"]
        assert costs[document_mask] == {"teacher": total}
    assert costs[True]["teacher"] < costs[False]["teacher"]


@needs_scaled_rows
@pytest.mark.slow
def test_float8_costs_as_much(house, tiny_corpus, tmp_path):
    flops = []
    for precision in (None, "fp8"):
        config = ScoreConfig(
            data=tiny_corpus,
            teacher=house.teacher,
            output=str(tmp_path / str(precision)),
            device="cpu",
            dtype="float32",
            precision=precision,
        )
        score(config)
        flops.append(read_json(Path(config.output) / "manifest.json")["flops"])
    assert flops[0] == flops[1]


@pytest.mark.slow
def test_behind_a_retokenized_corpus_stands_the_selection(house, tiny_tokenizer):
    corpus = str(house.runs / "other-ids")
    settings = dict(data=str(house.runs / "refined"), tokenizer=tiny_tokenizer, max_length=20, workers=1)
    retokenize(RetokenizeConfig(output=corpus, **settings))
    run = replace(house.student, data=corpus, output=str(house.runs / "other-student"), steps=2)
    train(run)
    entries = miniplm.ledger(runs=[run.output])["runs"][0]["offline"]
    assert {each["name"] for each in entries} == {"other-ids", "refined", "scores", "reference", "pool"}
