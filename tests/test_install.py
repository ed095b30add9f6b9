"""What is to be installed can be: for every Python and system that is supported, from the public index."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
SYSTEMS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin"]
# Not pinned: what builds packages, and the GPU's libraries, of which PyTorch asks for exact versions itself.
FREE = re.compile(r"setuptools|nvidia-.*|cuda-.*|torch")


def compile_requirements(*arguments: str) -> subprocess.CompletedProcess:
    """`uv pip compile` as on a machine on which nothing is set up: only wheels, only the public index."""
    uv = pytest.importorskip("uv", reason="needs uv (pip install uv)")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    command = [uv.find_uv_bin(), "pip", "compile", "--no-config", "--no-python-downloads", "--quiet"]
    options = ["--only-binary", ":all:", "--no-annotate", "--no-header"]
    return subprocess.run([*command, *options, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)


def resolve(*arguments: str) -> dict[str, str]:
    """Name → version of all that would be installed."""
    result = compile_requirements(*arguments)
    assert result.returncode == 0, result.stderr
    return dict(re.findall(r"^([\w.-]+)==(\S+)", result.stdout, re.M))


@pytest.fixture(scope="module", autouse=True)
def index(tmp_path_factory):
    """Skips where the index cannot be asked."""
    file = tmp_path_factory.mktemp("index") / "requirements.txt"
    file.write_text("iniconfig")
    result = compile_requirements(str(file))
    if result.returncode:
        pytest.skip(f"uv cannot reach the package index: {result.stderr.strip().splitlines()[-1]}")


def pairs(file: str) -> list[tuple[str, str]]:
    """(name, version) of every pin in a file of constraints."""
    return re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / file).read_text(encoding="utf-8"), re.M)


def pins(file: str) -> dict[str, set[str]]:
    """Name → its versions, one for each Python or system."""
    return {name: {version for other, version in pairs(file) if other == name} for name, _ in pairs(file)}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_what_make_installs(python, system):
    """constraints.txt can be met, and says the version of all that is installed."""
    options = ["--python-version", python, "--python-platform", system, "--extra", "test"]
    found, pinned = resolve("pyproject.toml", "-c", "constraints.txt", *options), pins("constraints.txt")
    loose = {name for name in found if name not in pinned and not FREE.fullmatch(name)}
    assert not loose, (
        f"not in constraints.txt: {', '.join(f'{name}=={found[name]}' for name in sorted(loose))}"
    )
    if "linux" in system:
        assert {found["torch"]} == pinned["torch"] and {found["triton"]} == pinned["triton"]
    else:
        assert "torch" in found and "triton" not in found


def test_no_pin_is_stale():
    found = resolve("pyproject.toml", "--universal", "--python-version", PYTHONS[0], "--extra", "test")
    assert pins("constraints.txt").keys() <= found.keys()


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_newest_of_all(python, system):
    """The package alone, in an environment that knows of no constraints, GPU or not."""
    found = resolve(
        "pyproject.toml", "--python-version", python, "--python-platform", system, "--extra", "gguf"
    )
    assert "torch" in found and ("triton" in found) == ("linux" in system)


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_the_oldest_of_all(python):
    """constraints-oldest.txt has the lowest version of each range in pyproject.toml, and they go together."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)[1]
    lowest = dict(re.findall(r'^\s*"([\w-]+)>=([\d.]+)', dependencies, re.M))
    oldest = dict(pairs("constraints-oldest.txt"))
    assert "torch" in lowest and {name: oldest.get(name) for name in lowest} == lowest
    options = ["--python-version", python, "--python-platform", SYSTEMS[0], "--extra", "test"]
    found = resolve("pyproject.toml", "-c", "constraints-oldest.txt", *options)
    assert {name: found[name.replace("_", "-")] for name in lowest} == lowest


def test_one_version_of_ruff():
    hook = re.search(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))[1]
    assert pins("constraints.txt")["ruff"] == {hook}
