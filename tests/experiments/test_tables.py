"""tables.py on synthetic results: a known effect gives the stated decision, and the figures are those of a
restatement."""

import json
import math
import random

import pytest

from miniplm.analysis.evaluation import with_checksum

SETS = ("brown", "coqa", "lambada", "wikipedia_boolq", "wikipedia_squad")
TOKENS = 1_000_000


def losses(rows: dict[str, tuple[float, int]]) -> dict:
    """An evaluation's figures: name → (nats, tokens)."""
    figure = lambda nats, tokens: {
        "rows": 1,
        "non_finite_rows": 0,
        "tokens": tokens,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
    }
    nats, tokens = (sum(row[column] for row in rows.values()) for column in (0, 1))
    identity = {"model": "m", "weights": "w", "corpus": "c", "source": "s", "document_mask": False}
    domains = {name: figure(*row) for name, row in rows.items()}
    whole = {**identity, "dtype": "float32", **figure(nats, tokens), "flops": {"forward": 1}}
    return with_checksum({**whole, "domains": domains})


class Results:
    """A folder of results whose bits per byte are given."""

    def __init__(self, folder, pack):
        self.folder, self.pack, rng = folder, folder / "pack", random.Random(3)
        self.rows = [
            {
                "text": "x" * rng.randint(200, 900),
                "domain": f"{name}/{n}",
                "set": name,
                "cluster": str(n // 2),
            }
            for name in SETS
            for n in range(8)
        ]
        self.pack.mkdir()
        pack.write_packed(self.pack / "held-out.jsonl.zst", self.rows)
        (self.pack / "pack.json").write_text(json.dumps({"version": "toy-cpu"}))
        (folder / "runs").mkdir()
        for name, flops in (("scores", {"teacher": 700, "reference": 70}), ("reference", {"forward": 7})):
            self.manifest(name, {"flops": flops})

    def manifest(self, name, content):
        (self.folder / "runs" / name).mkdir()
        (self.folder / "runs" / name / "manifest.json").write_text(json.dumps(content))

    def add(self, arm, seed, bits, student="S", in_pool=2.0, tokens=TOKENS, spread=0.0, of_set=None):
        """A run with these bits per byte on every set (`of_set`: of one), documents ±spread around it."""
        name, clean, rng = f"{arm}-{student}-{seed}", {}, random.Random(seed)
        for row in self.rows:
            size, own = len(row["text"]), (of_set or {}).get(row["set"], bits)
            nats = (own + rng.uniform(-spread, spread)) * size * math.log(2)
            clean[row["domain"]] = (nats, size // 4)
        pool = {"essays": (100 * in_pool, 100), "code": (300 * in_pool, 300)}
        for kind, rows in (("clean", clean), ("pool", pool)):
            (self.folder / "runs" / f"{name}-{kind}.json").write_text(json.dumps(losses(rows)))
        flops = {"forward": 100, "backward": 200, "teacher": 30, "evaluation": 4}
        self.manifest(name, {"tokens": tokens, "flops": flops})


@pytest.fixture
def results(experiment, tmp_path):
    return Results(tmp_path, experiment("pack"))


SEEDS = (11, 12, 13, 14)
NOISE = {11: 0.0004, 12: -0.0003, 13: 0.0002, 14: -0.0003}  # of a seed, shared by its arms


@pytest.mark.parametrize(
    "effect, wobble, k, decision",
    [
        (-0.02, 1e-3, None, "consistent with the paper (K not tested)"),
        (-0.02, 1e-3, 1.99, "consistent with the paper"),
        (-0.02, 1e-3, 1.97, "inconclusive: M is below C, but M is above K"),
        (0.02, 1e-3, None, "refuted at this scale"),
        (0.0, 1e-4, None, "no effect"),
        (0.0, 3e-2, None, "inconclusive"),
    ],
)
def test_a_known_effect_gives_the_stated_decision(experiment, results, effect, wobble, k, decision):
    for place, seed in enumerate(SEEDS):
        results.add("C", seed, 2.0 + NOISE[seed])
        results.add("M", seed, 2.0 + NOISE[seed] + effect + wobble * (-1) ** place)
        if k:
            results.add("K", seed, k)
    found = experiment("tables").result_of(results.folder, results.pack)["students"]["S"]
    assert found["decision"] == decision
    assert found["contrasts"]["M − C"]["mean"] == pytest.approx(effect, abs=1e-9)


def test_one_set_that_is_worse(experiment, results):
    for seed in SEEDS:
        shift = NOISE[seed] * seed / 100
        results.add("C", seed, 2.0 + NOISE[seed])
        results.add("M", seed, 1.95 + NOISE[seed] + shift, of_set={"coqa": 2.01 + NOISE[seed] + shift})
    found = experiment("tables").result_of(results.folder, results.pack)["students"]["S"]
    assert found["decision"] == "inconclusive: M is below C, but coqa is worse"
    assert found["contrasts"]["M − C, coqa"]["mean"] > 0 > found["contrasts"]["M − C"]["high"]


def test_figures_are_those_of_a_restatement(experiment, results, capsys):
    tables, contrasts = experiment("tables"), experiment("contrasts")
    for seed in SEEDS:
        results.add("C", seed, 2.0, in_pool=2.0, spread=0.2)
        results.add("O", seed, 1.9 + seed / 1000, spread=0.1)
        if seed != 13:
            results.add("M", seed, 1.9, in_pool=2.1 + seed / 1000, spread=0.3)
    results.add("tune", 10, 1.0)  # of no arm
    found = tables.result_of(results.folder, results.pack)["students"]["S"]
    runs = results.folder / "runs"

    def bits(run) -> float:
        domains = json.loads((runs / f"{run}-clean.json").read_text())["domains"]
        by_set = []
        for name in SETS:
            rows = [row for row in results.rows if row["set"] == name]
            nats = sum(domains[row["domain"]]["loss"] * domains[row["domain"]]["tokens"] for row in rows)
            by_set.append(nats / math.log(2) / sum(len(row["text"]) for row in rows))
        return sum(by_set) / len(by_set)

    differences = [bits(f"M-S-{seed}") - bits(f"C-S-{seed}") for seed in (11, 12, 14)]
    said = found["contrasts"]["M − C"]
    assert said["mean"] == pytest.approx(sum(differences) / 3) and said["seeds"] == [11, 12, 14]
    half = 4.302653 * (sum((each - said["mean"]) ** 2 for each in differences) / 2 / 3) ** 0.5
    assert (said["low"], said["high"]) == pytest.approx((said["mean"] - half, said["mean"] + half), rel=1e-6)
    assert said["bootstrap"][0] < said["mean"] < said["bootstrap"][1] and "holm" not in said
    secondary = {name: each["p"] for name, each in found["contrasts"].items() if name != "M − C"}
    assert set(secondary) == {"O − C", "M − C, in-pool", *(f"M − C, {name}" for name in SETS)}
    assert {n: found["contrasts"][n]["holm"] for n in secondary} == contrasts.holm(secondary)
    in_pool = found["contrasts"]["M − C, in-pool"]["mean"]
    assert in_pool == pytest.approx(0.1 + (11 + 12 + 14) / 3000)
    assert found["arms"]["C"]["seeds"][12] == pytest.approx(bits("C-S-12"))
    assert found["costs"]["C"] == {"tokens": TOKENS, "training": 330, "all_in": 334}
    assert found["costs"]["M"]["all_in"] == 334 + 777 and found["costs"]["O"]["all_in"] == 334
    output = results.folder / "result"
    tables.main(["--runs", str(results.folder), "--pack", str(results.pack), "--output", str(output)])
    written = (output / "result.md").read_text(encoding="utf-8")
    assert f"| M − C | {said['mean']:+.4f} |" in written and written.strip() in capsys.readouterr().out
    assert json.loads((output / "result.json").read_text())["students"]["S"]["decision"] == found["decision"]


def test_the_saving_factor(experiment, results):
    """C goes from 2.0 over 1.9 to 1.8 as the tokens double; 1.85 lies half a doubling beyond C."""
    tables = experiment("tables")
    for arm, bits, times in (("C-half", 2.0, 0.5), ("C", 1.9, 1), ("C-double", 1.8, 2), ("M", 1.85, 1)):
        results.add(arm, 11, bits, tokens=int(TOKENS * times))
    saved = lambda: tables.result_of(results.folder, results.pack)["students"]["S"]["saving"]["factor"]
    assert saved() == pytest.approx(math.sqrt(2))
    for name, bits, factor in (("X", 1.7, "above 2"), ("Y", 2.1, "below 0.5")):
        results.add(name, 11, bits)
        for kind in ("clean", "pool"):
            (results.folder / "runs" / f"{name}-S-11-{kind}.json").replace(
                results.folder / "runs" / f"M-S-11-{kind}.json"
            )
        assert saved() == factor


def test_tasks(experiment, results):
    tables = experiment("tables")
    figures = {"metric": "acc", "value": 0.5, "standard_error": 0.01, "gold_bits_per_byte": 1.5}
    for seed, value in ((11, 0.5), (12, 0.6)):
        results.add("C", seed, 2.0)
        tasks = {
            "a": {**figures, "value": value},
            "b": {**figures, "metric": None, "gold_bits_per_byte": None},
        }
        (results.folder / "runs" / f"C-S-{seed}-tasks.json").write_text(json.dumps({"tasks": tasks}))
    result = tables.result_of(results.folder, results.pack)
    found = result["students"]["S"]["tasks"]["C"]
    assert found["a"] == pytest.approx(
        {"gold_bits_per_byte": 1.5, "accuracy": 0.55, "low": 0.5304, "high": 0.5696}
    )
    assert found["b"] == {"gold_bits_per_byte": None}
    assert "| C | a | 0.550 (0.530 … 0.570) | 1.5000 |" in tables.report(result)


def test_what_does_not_fit_is_one_line(experiment, results, capsys):
    tables = experiment("tables")
    command = ["--runs", str(results.folder), "--pack", str(results.pack)]
    command += ["--output", str(results.folder / "result")]
    with pytest.raises(SystemExit, match="2"):
        tables.main(command)
    assert "holds no run with its evaluations" in capsys.readouterr().err
    results.add("C", 11, 2.0)
    assert (
        tables.result_of(results.folder, results.pack)["students"]["S"]["decision"]
        == "not run: C or M is missing"
    )
    experiment("pack").write_packed(results.pack / "held-out.jsonl.zst", results.rows[1:])
    with pytest.raises(SystemExit, match="2"):
        tables.main(command)
    assert "other documents than the pack" in capsys.readouterr().err
