"""examples/launch: every option of miniplm in it is one, and the tools that the files are for read them,
where they are installed: make launch-files."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from miniplm.cli import main

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "launch"
JOBS, SCRIPTS = sorted(FOLDER.glob("*_job.yaml")), sorted(FOLDER.glob("*.sbatch"))
RAY = FOLDER / "ray_cluster.yaml"


def command_of(path: Path) -> list[str]:
    """The words of the line that starts miniplm."""
    if path in JOBS:
        job = list(yaml.safe_load_all(path.read_text()))[-1]
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        return shlex.split(words[2]) if words[:2] == ["sh", "-c"] else words
    text = path.read_text().replace("\\\n", " ")
    return shlex.split(re.search(r"miniplm (score|train)\b[^\n\"]*", text)[0])


@pytest.mark.parametrize("path", [*JOBS, *SCRIPTS, RAY], ids=lambda path: path.name)
def test_miniplm_knows_the_options(path, capsys):
    words = command_of(path)
    words = words[words.index("miniplm") + 1 :]
    with pytest.raises(SystemExit):
        main([words[0], "--help"])
    known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert "--config" in options and options <= {*known}


def test_there_is_one_of_each():
    assert [path.name for path in JOBS] == ["score_job.yaml", "train_job.yaml"]
    assert [path.name for path in SCRIPTS] == ["score_array.sbatch", "train.sbatch"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_kubernetes_knows_the_objects(path):
    validator = pytest.importorskip("kubernetes_validate", reason="make launch-files")
    for document in yaml.safe_load_all(path.read_text()):
        validator.validate(document, validator.latest_version(), strict=True)
    document["spec"]["completionsMode"] = document["spec"].pop("completionMode")
    with pytest.raises(validator.ValidationError):
        validator.validate(document, validator.latest_version(), strict=True)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_jobs_ask_for_all_that_they_number(path):
    """The world of the ranks is the number of pods; a service gives them the name that they look for."""
    *services, job = yaml.safe_load_all(path.read_text())
    spec, words = job["spec"], command_of(path)
    assert spec["parallelism"] == spec["completions"]
    if path.name == "score_job.yaml":
        assert int(words[words.index("--world") + 1]) == spec["completions"]
    else:
        pod = spec["template"]["spec"]
        assert f"--nnodes={spec['completions']}" in words
        gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert f"--nproc-per-node={gpus}" in words
        name = job["metadata"]["name"]
        assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29500" in words
        assert services[0]["metadata"]["name"] == pod["subdomain"]
        assert services[0]["spec"]["selector"] == {"job-name": name}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_the_scripts(path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_the_options(path, tmp_path):
    """Up to where it would ask the cluster, which is not there."""
    if not shutil.which("sbatch"):
        pytest.skip("SLURM is not installed")
    settings = [
        "ClusterName=some",
        "SlurmctldHost=localhost",
        "SlurmctldPort=1",
        "MessageTimeout=2",
        "GresTypes=gpu",
    ]
    settings.append("SelectType=select/cons_tres")
    (tmp_path / "slurm.conf").write_text("\n".join(settings) + "\n")
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}

    def answer(script: Path) -> str:
        command = ["sbatch", "--test-only", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    assert answer(path).endswith("Unable to contact slurm controller (connect failure)\n")
    (tmp_path / "bad.sbatch").write_text(path.read_text().replace("--requeue", "--requeues"))
    assert "unrecognized option '--requeues'" in answer(tmp_path / "bad.sbatch")


def test_ray_knows_the_cluster():
    pytest.importorskip("ray", reason="make launch-files")
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(RAY.read_text()))
    validate_config(config)
    with pytest.raises(ValidationError):
        validate_config(config | {"workers": 2})
