"""docs/experiments/: the tables are those of the results that are kept."""

import tarfile

import pytest
from source_tree import ROOT

from miniplm.runtime.files import read_json

FOLDERS = sorted((ROOT / "experiments/results").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_page_has_the_tables(folder, experiment):
    page = (ROOT / f"docs/experiments/{folder.name}.md").read_text(encoding="utf-8")
    report = experiment("result_text").report
    assert report(read_json(folder / "result.json")).rstrip() in page


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_student_has_what_its_figures_are_made_of(folder):
    """A manifest, its losses and both evaluations."""
    with tarfile.open(folder / "runs.tar.xz") as kept:
        names = {name.removeprefix("./") for name in kept.getnames()}
    for student, figures in read_json(folder / "result.json")["students"].items():
        for arm, each in figures["arms"].items():
            for seed in each["seeds"]:
                name = f"runs/{arm}-{student}-{seed}"
                made = {
                    f"{name}/manifest.json",
                    f"{name}/metrics.jsonl",
                    f"{name}-clean.json",
                    f"{name}-pool.json",
                }
                assert made <= names
