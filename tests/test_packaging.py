"""What is installed is complete and declared, and importing is light."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions

import pytest
from source_tree import PACKAGE, ROOT, imports, room

# import name → name on the package index: imported where it is used, with a message where it is missing
OPTIONAL = {"accelerate": "accelerate", "gguf": "gguf", "lm_eval": "lm-eval", "ray": "ray"}
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "pandas", "triton"}


def run_python(code: str) -> str:
    """What it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_is_imported_is_declared():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)[1]
    declared = {name.lower().replace("_", "-") for name in re.findall(r'^\s*"([\w-]+)', dependencies, re.M)}
    distributions = packages_distributions()
    for path in PACKAGE.values():
        for name in set(map(room, imports(path))) - {"", *OPTIONAL, *sys.stdlib_module_names}:
            names = {each.lower().replace("_", "-") for each in (name, *distributions.get(name, []))}
            assert names & declared, f"{path.relative_to(ROOT)} imports {name}: not declared"
    for name in OPTIONAL.values():
        assert re.search(rf'"{name}\b', project), f"{name} is in no extra"


def test_a_wheel_has_it_all(tmp_path):
    """Every module, and every file of settings and every template, without setup.py being told of them."""
    pytest.importorskip("setuptools", "77")
    for name in ("miniplm", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import setuptools.build_meta as build; build.build_wheel('.')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        installed = {name for name in content.namelist() if ".dist-info/" not in name}
    files = [path for path in (tmp_path / "miniplm").rglob("*") if path.is_file()]
    expected = {path.relative_to(tmp_path).as_posix() for path in files}
    expected |= {f"miniplm/kernels/{path.name}" for path in (tmp_path / "kernels").iterdir()}
    assert installed == expected


@pytest.mark.parametrize("package", ["datasets", "triton", "tensorboard"])
def test_everything_imports_without(package):
    """`datasets` is needed only where a corpus is read or written, Triton only where a kernel is launched."""
    own = {"triton"} if package == "triton" else set()
    names = [
        name for name, path in PACKAGE.items() if not (own | OPTIONAL.keys()) & set(map(room, imports(path)))
    ]
    modules = [f"miniplm.{name}".rstrip(".") for name in names if name != "__main__"]
    run_python(
        f"import importlib, sys; sys.modules[{package!r}] = None\n"
        f"for name in {modules}: importlib.import_module(name)"
    )


def heavy_after(code: str) -> set[str]:
    return HEAVY & set(run_python(f"import sys; {code}; print('\\n', *sys.modules)").splitlines()[-1].split())


def test_importing_is_light():
    assert not heavy_after("import miniplm; miniplm.__version__; dir(miniplm)")
    assert "torch" in heavy_after("import miniplm.kernels")


@pytest.mark.parametrize("command", ["", "prepare", "score", "train", "run"])
def test_help_is_light(command):
    assert not heavy_after(f"from miniplm.cli import main; main({[*command.split(), '--help']})")


def test_help_takes_less_than_a_second():
    """Of a processor's time, which other work on the machine does not change."""
    code = "from miniplm.cli import main; main(['--help']); import time; print(time.process_time())"
    assert min(float(run_python(code).splitlines()[-1]) for _ in range(3)) < 1


def test_the_folder_kernels_does_not_shadow_the_package_of_that_name(tmp_path):
    """From the repository's root, where `kernels/` is importable, transformers must not take it for the PyPI
    package."""
    code = (
        "from transformers import LlamaForCausalLM; import miniplm.kernels; from transformers.utils "
        "import is_kernels_available as a; print(a())"
    )
    assert run_python(code).strip() == "False"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True")
    run_python(
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.real; from "
        f"miniplm.kernels import rms_norm"
    )
