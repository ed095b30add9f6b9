"""run.py and pack.py: packs, the queue, pipelines, time that is over; both versions whole at toy size."""

import json
import random
import re
import sys
import time

import pytest
from texts import make_text, write_jsonl

from miniplm.config import RunConfig
from miniplm.data.corpus import Corpus
from miniplm.runtime.errors import UserError

DOMAINS = "essays encyclopedic dictionary kernel manuals api javadoc code ham spam".split()
SETS = ("brown", "coqa", "lambada", "wikipedia_boolq", "wikipedia_squad")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What fetch.py writes, made up."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(5)
    for part in ("pool", "held-out"):
        (folder / part).mkdir()
    for domain in DOMAINS:
        texts = [make_text(rng, 60) for _ in range(24)]
        write_jsonl(folder / "pool" / f"{domain}.jsonl", texts, [domain] * len(texts))
    for name in SETS:
        rows = [{"text": make_text(rng, 40), "domain": name, "cluster": str(row // 2)} for row in range(6)]
        (folder / "held-out" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---- packs ----


def test_a_pack_is_the_same_again_and_within_its_budgets(experiment, data, tmp_path, monkeypatch):
    pack = experiment("pack")
    for name in ("one", "two"):
        pack.main(["text", "--data", str(data), "--version", "toy-gpu", "--output", str(tmp_path / name)])
    files = ("text.jsonl.zst", "held-out.jsonl.zst", "pack.json")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    rows = pack.read_packed(tmp_path / "one" / "text.jsonl.zst")
    domains = [row["domain"] for row in rows]
    assert {domain: domains.count(domain) for domain in DOMAINS} == dict.fromkeys(DOMAINS, 24)
    assert domains != sorted(domains, key=DOMAINS.index)  # mixed
    held_out = pack.read_packed(tmp_path / "one" / "held-out.jsonl.zst")
    assert len({row["domain"] for row in held_out}) == len(held_out) and {r["set"] for r in held_out} == {
        *SETS
    }
    said = json.loads((tmp_path / "one" / "pack.json").read_text())["bytes"]
    for name in SETS:
        texts = [row["text"] for row in held_out if row["set"] == name]
        assert 0 < said[name] == sum(len(text.encode()) for text in texts) <= 2_000


def test_budgets_are_of_bytes(experiment):
    pack = experiment("pack")
    rows = [{"text": "é" * 50} for _ in range(10)]
    assert len(pack.drawn(rows, 1000)) == 10 and len(pack.drawn(rows, 999)) == 9
    assert len(pack.drawn(rows, 99)) == 0


def test_what_is_too_large_or_missing_is_told(experiment, data, tmp_path, monkeypatch, capsys):
    pack = experiment("pack")
    command = ["text", "--data", str(data), "--version", "toy-cpu", "--output", str(tmp_path / "pack")]
    monkeypatch.setattr(pack, "LARGEST", 1000)
    with pytest.raises(SystemExit, match="2"):
        pack.main(command)
    assert "lower versions.py" in capsys.readouterr().err and not (tmp_path / "pack").exists()
    with pytest.raises(SystemExit, match="2"):
        pack.main([part.replace(str(data), str(tmp_path)) for part in command])
    assert "no text of the domain 'essays'" in capsys.readouterr().err


def test_weights_in_parts(experiment, tmp_path):
    pack = experiment("pack")
    (tmp_path / "x.gguf").write_bytes(random.Random(0).randbytes(1000))
    pack.pack_weights(tmp_path / "x.gguf", tmp_path / "parts", 300)
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == ["0", "1", "2", "3"]
    pack.join_weights(tmp_path / "parts", tmp_path / "new" / "y.gguf")
    assert (tmp_path / "new" / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    part = tmp_path / "parts" / "2" / "part"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(UserError, match="not those of one file"):
        pack.join_weights(tmp_path / "parts", tmp_path / "y.gguf")
    (tmp_path / "parts" / "3").rename(tmp_path / "parts" / "away")
    with pytest.raises(UserError, match=r"has the parts \[0, 1, 2\]"):
        pack.join_weights(tmp_path / "parts", tmp_path / "y.gguf")


# ---- the queue and the pipelines ----


def test_the_queue_is_the_plans(experiment):
    run, versions = experiment("run"), experiment("versions")
    names = [job.name for job in run.queue(versions.GPU, "S")]
    assert names[:4] == ["C-S-11", "M-S-11", "C-S-12", "M-S-12"] and names[9] == "M-S-15"
    arms = ["Mp", "K", "C-half", "C-double", "MK", "M4"]
    assert names[10:] == [f"{arm}-S-{seed}" for arm in arms for seed in (11, 12, 13)]
    assert [job.name for job in run.queue(versions.CPU, "S")][:4] == ["C-S-11", "M-S-11", "O-S-11", "C-S-12"]


@pytest.mark.parametrize("version", ["cpu", "gpu"])
def test_pipelines_are_whole(experiment, tmp_path, version):
    """Every arm's file is one that `miniplm run` takes, with nothing left to fill in."""
    from miniplm.pipeline import plan_stages

    run, versions = experiment("run"), experiment("versions")
    chosen = versions.VERSIONS[version]
    made = run.Experiment(chosen, tmp_path / "pack", tmp_path / "teacher.gguf", tmp_path / "out", 1)
    arms = {path.stem for path in (run.PIPELINES / version).glob("*.yaml")} - {"shared"}
    assert arms == set(chosen.seeds)
    initial = set()
    for arm in sorted(arms):
        values = {**made.of_steps(30), "rate": 1e-3, "seed": 12, "run": f"{arm}-S-12", "run_of_C": "/C-S-12"}
        stages = made.stages(arm, **chosen.students["S"], **values)
        assert not re.search(r"<\w+>", json.dumps(stages))
        planned = {each.name: each for each in plan_stages(stages, tmp_path / "runs")}
        trained = planned[f"{arm}-S-12"].settings
        initial.add((trained.seed, trained.model))
        assert trained.optimizer.min_lr_ratio == 0 and trained.optimizer.warmup_steps == 3
        assert (trained.steps is None) == (trained.match_flops_of is not None) == (arm in ("K", "MK"))
        assert bool(trained.distill.teacher) == (arm in ("K", "MK"))
        assert {f"{arm}-S-12-clean", f"{arm}-S-12-pool"} <= set(planned)
    assert len(initial) == 1  # all arms of a seed start from the same weights


def test_filling_in(experiment):
    filled = experiment("run").filled
    values = {"run": "C-1", "steps": 7, "model": {"width": 3}}
    found = filled({"<run>-x": ["${<run>}", "<steps>", "n<steps>"], "m": "<model>", "n": 1}, values)
    assert found == {"C-1-x": ["${C-1}", 7, "n7"], "m": {"width": 3}, "n": 1}


# ---- time ----


def test_a_command_is_stopped_when_the_time_is_over(experiment, tmp_path):
    waited = experiment("run").waited
    python = lambda text: [sys.executable, "-c", text]
    assert waited(python("print('x')"), tmp_path / "log", 60) == 0
    assert waited(python("raise SystemExit(3)"), tmp_path / "log", 60) == 3
    start = time.monotonic()
    assert waited(python("import time; print('up', flush=True); time.sleep(99)"), tmp_path / "log", 2) is None
    assert time.monotonic() - start < 30 and (tmp_path / "log").read_text() == "x\nup\n"


def test_a_run_that_fails_is_left_out_and_named(experiment, tmp_path, monkeypatch):
    run, versions = experiment("run"), experiment("versions")
    toy, names = versions.VERSIONS["toy-cpu"], []
    made = run.Experiment(toy, tmp_path / "pack", tmp_path / "t.gguf", tmp_path / "out", 1)

    def fails(name, stages):
        names.append(name)
        if name == "M-S-11":
            raise UserError("M-S-11 failed")

    monkeypatch.setattr(made, "share", lambda: None)
    monkeypatch.setattr(made, "rate", lambda student: 1e-3)
    monkeypatch.setattr(made, "run", fails)
    assert run.carry_out(made) == ["M-S-11"] and names == ["C-S-11", "M-S-11", "O-S-11"]
    made.tasks = ["piqa.yaml"]
    run.carry_out(made)
    assert names[3:] == ["C-S-11", "C-S-11-tasks", "M-S-11", "O-S-11", "O-S-11-tasks"]


def test_time_is_counted_over_all_calls(experiment, tmp_path, monkeypatch):
    run, versions = experiment("run"), experiment("versions")
    made = run.Experiment(versions.CPU, tmp_path / "pack", tmp_path / "t.gguf", tmp_path / "out", 9)
    assert 530 < made.seconds_left() <= 540
    monkeypatch.setattr(run, "waited", lambda *arguments: 0)
    made.run("one", {"a": {"stage": "x"}})
    run.write_json(tmp_path / "out" / "progress.json", {"seconds": 119.5 * 60})
    assert 25 < made.seconds_left() <= 30
    made.run("two", {"a": {"stage": "x"}})
    assert made.spent >= 119.5 * 60
    run.write_json(tmp_path / "out" / "progress.json", {"seconds": 120 * 60})
    made.run("two", {"a": {"stage": "x"}})  # stands already
    with pytest.raises(run.OutOfTime):
        made.run("two", {"a": {"stage": "y"}})  # other settings


# ---- the whole ----


@pytest.fixture
def in_process(experiment, monkeypatch):
    """run.py with stages in this process, and the names of the pipelines that ran."""
    from miniplm.pipeline import run as run_pipeline

    run, ran = experiment("run"), []

    def waited(command, log, seconds):
        log.write_text("a line\n")
        settings = dict(zip(command[4::2], command[5::2], strict=True))
        ran.append(log.stem)
        if len(ran) == run.stop_at:
            return None
        try:
            run_pipeline(RunConfig(config=settings["--config"], output=settings["--output"]))
        except UserError as error:
            log.write_text(f"{error}\n")
            return 2
        return 0

    monkeypatch.setattr(run, "waited", waited)
    monkeypatch.setattr(run, "stop_at", None, raising=False)
    return run, ran


@pytest.mark.slow
@pytest.mark.parametrize("version", ["toy-cpu", "toy-gpu"])
def test_the_whole_at_toy_size(experiment, in_process, data, tiny_model, tmp_path, version, monkeypatch):
    run, ran = in_process
    versions = experiment("versions").VERSIONS
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    teacher, pack, output = tiny_model(tmp_path / "teacher"), tmp_path / "pack", tmp_path / "out"
    experiment("pack").main(["text", "--data", str(data), "--version", version, "--output", str(pack)])
    command = ["--version", version, "--pack", str(pack), "--teacher", teacher, "--output", str(output)]
    run.stop_at = 4
    run.main(command)
    assert len(ran) == 4
    run.stop_at = None
    run.main([*command, "--results", str(tmp_path / "results")])
    jobs = [job for job in run.queue(versions[version], "S")]
    first = ["split", "shared"] if version == "toy-cpu" else ["shared"]
    expected = first + ["tune-S-0", "tune-S-1"] + [job.name for job in jobs]
    assert ran == expected[:4] + expected[3:]  # what was stopped once more, nothing else twice
    rate = json.loads((output / "rate-S.json").read_text())
    losses = {float(rate): loss for rate, loss in rate["in_pool_loss"].items()}
    assert rate["rate"] == min(losses, key=losses.get) and len(losses) == 2
    for job in jobs:
        clean = json.loads((output / "runs" / f"{job.name}-clean.json").read_text())
        assert {name.partition("/")[0] for name in clean["domains"]} == {*SETS}
        manifest = json.loads((output / "runs" / job.name / "manifest.json").read_text())
        share = versions[version].steps_of.get(job.arm, 1)
        assert manifest["steps"] == 8 * share or job.arm in ("K", "MK")
    kept = json.loads((output / "kept.json").read_text())
    pool = Corpus(output / "runs" / "pool")
    assert sum(each["chunks"] for each in kept["domains"].values()) == len(pool)
    total = sum(each["chunks"] * each["kept"] for each in kept["domains"].values())
    assert total == pytest.approx(len(pool) // 2) == pytest.approx(len(Corpus(output / "runs" / "M-data")))
    ends = [[chunk["score"] for chunk in kept["chunks"][which]] for which in kept["chunks"]]
    assert ends[0] == sorted(ends[0])[::-1] and ends[1] == sorted(ends[1]) and min(ends[1]) >= max(ends[2])
    results = tmp_path / "results"
    assert (results / "runs" / "C-S-11-clean.json").exists() and (results / "kept.json").exists()
    assert not list(results.rglob("*.safetensors")) and not list(results.rglob("*.arrow"))
    tables = ["--runs", str(results), "--pack", str(pack), "--output", str(tmp_path / "tables")]
    experiment("tables").main(tables)
    student = json.loads((tmp_path / "tables" / "result.json").read_text())["students"]["S"]
    assert student["decision"] == "inconclusive: fewer than two seeds"
    assert set(student["arms"]) == set(versions[version].seeds)
    assert student["costs"]["M"]["all_in"] > 2 * student["costs"]["C"]["all_in"] > 0
