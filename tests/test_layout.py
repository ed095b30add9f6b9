"""The house stays in order: imports go one way, importing is light, the README's tree is the disk's."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# module → level; a module imports only from lower levels, so stages never import one another
LEVELS = {
    "artifacts": 0,
    "config": 0,
    "progress": 0,
    "signals": 0,
    "hardware": 0,
    "batches": 1,
    "storage": 1,
    "tokenizer": 1,
    "sources": 1,
    "checkpoints": 1,
    "processes": 1,
    "float8": 1,
    "trace": 1,
    "demo_text": 2,
    "data_order": 2,
    "decoder": 2,
    "model": 3,
    "huggingface": 3,
    "corpus": 4,
    "scoring": 4,
    "sampling": 4,
    "training": 4,
    "evaluation": 4,
    "generation": 4,
    "export": 4,
    "pipeline": 5,
    "cli": 6,
}


def imports(path: Path):
    """Every module that a file imports, at the top or inside a function: relative ones as ".name"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from (
                [f"{dots}{node.module}"] if node.module else [f"{dots}{alias.name}" for alias in node.names]
            )


def modules():
    return sorted(path.stem for path in (ROOT / "miniplm").glob("*.py") if path.stem != "__init__")


def test_every_module_has_a_level():
    assert sorted(LEVELS) == modules()


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    for name in imports(ROOT / "miniplm" / f"{module}.py"):
        assert not name.startswith("miniplm"), (
            f"{module} imports {name}: inside the package imports are relative"
        )
        if name.startswith(".") and not name.startswith(".kernels") and name != ".__version__":
            target = name[1:].split(".")[0]
            assert LEVELS[target] < LEVELS[module], f"{module} imports {target}, which is not below it"


def test_kernels_know_nothing_of_miniplm():
    standard = set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports(path):
            assert not name.startswith(".."), f"{path.name} imports {name}"
            assert name.startswith(".") or name.split(".")[0] in {"torch", "triton", *standard}, (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize("module", ["batches", "decoder", "model", "training", "scoring", "evaluation"])
def test_datasets_only_where_a_corpus_is_read_or_written(module):
    code = f"import sys; sys.modules['datasets'] = None; import miniplm.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_import_without_triton():
    subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['triton'] = None; import miniplm.kernels"], check=True
    )


def test_help_is_light():
    code = (
        "import sys; from miniplm.cli import main; main(['--help']); sys.exit('torch' in sys.modules or "
        "'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_readme_tree_is_the_disk():
    tree = re.search(r"```\n(kernels/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(
        1
    )
    folder, listed = "", set()
    for line in tree.splitlines():
        indent, entry = re.match(r"(\s*)(\S+)", line).groups()
        if not indent:
            folder = entry if entry.endswith("/") else ""
            listed.add(entry)
        else:
            listed.add(folder + entry)
    for folder in ("kernels", "miniplm", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if folder != "tests":
                assert f"{folder}/{path.name}" in listed or path.name == "__init__.py", (
                    f"{folder}/{path.name} is not in the README's tree"
                )
    for entry in listed:
        assert (ROOT / entry).exists(), f"the README's tree lists {entry}, which does not exist"


def test_the_folder_kernels_does_not_shadow_the_package_of_that_name(tmp_path):
    """From the repository's root, where `kernels/` is importable, transformers must not take it for the PyPI
    package."""
    code = (
        "from transformers import LlamaForCausalLM; import miniplm.kernels; from transformers.utils "
        "import is_kernels_available as a; print(a())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == "False"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.real; from "
        f"miniplm.kernels import rms_norm"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
