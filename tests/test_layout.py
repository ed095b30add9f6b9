"""The house stays in order: imports go downwards only, a format has one owner, files and functions are short,
and the tree of docs/tree.md is the disk's."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from source_tree import PACKAGE, ROOT, imports, parse, python_files, room

# room → level; what is in a room imports only from its own and from lower ones, and stages never one another
LEVELS = {
    "runtime": 0,
    "config": 1,
    "kernels": 1,
    "data": 2,
    "models": 2,
    "training": 3,
    "huggingface": 3,
    "analysis": 4,
    "stages": 5,
    "pipeline": 6,
    "demo": 7,
    "cli": 8,
    "__main__": 9,
    "api": 9,
    "": 10,  # miniplm/__init__.py
}
# what only one module writes down: names of files, and how the names of numbered files begin
OWNERS = {
    "manifest.json": "runtime/artifacts.py",
    "data-": "data/corpus.py",
    "dataset_info.json": "data/corpus.py",
    "state.json": "data/corpus.py",
    "scores-": "data/scores.py",
    "tokens-": "data/token_scores.py",
    "wall_time.json": "runtime/wall_time.py",
    "progress.json": "data/progress_file.py",
    "metrics.jsonl": "training/checkpoints.py",
    "trainer_state.json": "training/checkpoints.py",
    "optimizer.safetensors": "training/checkpoints.py",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
TILE_LOOPS = {  # Triton kernels: what a tile goes through is read in one piece
    "kernels/attention.py": ["_forward_kernel"],
    "kernels/attention_backward.py": ["_key_kernel", "_query_kernel"],
    "kernels/attention_backward_single.py": ["_single_kernel"],
    "kernels/distillation.py": ["_combine_kernel"],
    "kernels/divergence.py": ["_divergence_kernel"],
    "kernels/logits.py": ["_logits_kernel"],
}


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_imports_go_downwards(module):
    here = room(module)
    for name in imports(PACKAGE[module]):
        assert room(name) != "miniplm", f"{module} imports {name}: inside the package imports are relative"
        if not name.startswith("."):
            continue
        target, there = name[1:], room(name[1:])
        assert target in PACKAGE, f"{module} imports {target}, which is not there"
        if (module, target) == ("cli", ""):
            continue  # __version__
        assert here == there or LEVELS[there] < LEVELS[here], f"{module} imports {target}, not below it"
        assert (here, there) != ("stages", "stages"), f"stages meet in files: {module} imports {target}"


def test_no_import_circles():
    graph = {
        module: {name[1:] for name in imports(path) if name[:1] == "."} for module, path in PACKAGE.items()
    }
    graph["cli"] -= {""}  # __version__
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_kernels_know_nothing_of_miniplm():
    for path in python_files("kernels"):
        names = {name for name in imports(path) if not name.startswith(".kernels")}
        foreign = {name for name in names if room(name) not in {"torch", "triton", *sys.stdlib_module_names}}
        assert not foreign, f"{path.name} imports {foreign}"


def test_every_folder_is_a_room():
    assert {room(module) for module in PACKAGE} == set(LEVELS)
    for path in PACKAGE.values():
        assert (path.parent / "__init__.py").exists(), (
            f"{path.parent} has no __init__.py: it is not installed"
        )


def string_constants(path: Path) -> Iterator[str]:
    """The strings in a file's code, also as parts of f-strings; without doc strings."""
    module = parse(path)
    doc_strings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in doc_strings:
            yield node.value


def test_one_owner_per_format():
    found = defaultdict(set)
    for path in python_files("miniplm"):
        for text in string_constants(path):
            name = re.sub(r"(?<=-)\*.*", "", text).split("/")[-1]  # of a pattern, what is before its star
            if name in OWNERS:
                found[name].add(path.relative_to(ROOT / "miniplm").as_posix())
    assert found == {name: {owner} for name, owner in OWNERS.items()}


def test_arrow_and_parquet_in_data_alone():
    """Files of both are read and written there; others give it tables and take them from it."""
    for path in python_files("miniplm"):
        names = {part for name in imports(path) for part in name.split(".")}
        names |= {node.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
        found = names & {"ipc", "parquet", "memory_map", "load_from_disk"}
        assert not found or path.parent.name == "data", f"{path.relative_to(ROOT)} has {found}"


def long_functions(path: Path) -> dict[str, int]:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    return {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("folder", ["miniplm", "kernels", "tests", "benchmarks", "experiments", "examples"])
def test_files_and_functions_are_short(folder):
    for path in python_files(folder):
        name = path.relative_to(ROOT).as_posix()
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= MAX_FILE_LINES, f"{name} has {lines} lines"
        for function, length in long_functions(path).items():
            assert function in TILE_LOOPS.get(name, []), f"{function} in {name} has {length} lines"


def test_only_tile_loops_are_excused():
    for name, functions in TILE_LOOPS.items():
        assert sorted(long_functions(ROOT / name)) == functions, f"{name} needs no such excuse"
        for node in ast.walk(parse(ROOT / name)):
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                assert any("triton.jit" in ast.unparse(each) for each in node.decorator_list), node.name


def test_no_test_imports_another():
    for path in python_files("tests"):
        for node in ast.walk(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                last = name.split(".")[-1]
                assert not last.startswith(("test_", "conftest")), f"{path.relative_to(ROOT)} imports {name}"


def tree() -> dict[str, list[str]]:
    """Folder → its entries in docs/tree.md, "" for the repository itself; by indentation."""
    page = (ROOT / "docs/tree.md").read_text(encoding="utf-8")
    entries, folders = {"": []}, [(-1, "")]
    for line in re.search(r"```\n(kernels/.*?)```", page, re.S)[1].splitlines():
        indent, entry = re.match(r"(\s*)(\S+)", line).groups()
        while folders[-1][0] >= len(indent):
            folders.pop()
        parent = folders[-1][1]
        entries[parent].append(entry)
        if entry.endswith("/"):
            folders.append((len(indent), parent + entry))
            entries[parent + entry] = []
    return entries


def on_disk(folder: str) -> set[str]:
    """What the tree must say of a folder with code: its modules, scripts and templates, and the folders that
    have some. Left out is what every package (__init__.py) and every folder of tests (test_*.py) has."""
    found = set()
    for path in (ROOT / folder).rglob("*"):
        inner = path.relative_to(ROOT / folder).parts
        named = path.suffix in {".py", ".yaml", ".jinja", ".c", ".sh"} and path.name != "__init__.py"
        if named and (len(inner) > 1 or not path.name.startswith(("test_", "conftest"))):
            found.add(inner[0] if len(inner) == 1 else f"{inner[0]}/")
    return found


def test_tree_is_the_disk():
    entries = tree()
    for folder, listed in entries.items():
        assert len(listed) == len(set(listed)), f"{folder} lists something twice"
        for entry in listed:
            path = ROOT / folder / entry
            assert path.is_dir() if entry.endswith("/") else path.is_file(), f"there is no {folder}{entry}"
    for top in ("kernels/", "miniplm/", "benchmarks/", "experiments/", "examples/", "tests/"):
        for folder in [top, *(f"{top}{entry}" for entry in on_disk(top) if entry.endswith("/"))]:
            missing = on_disk(folder) - set(entries.get(folder, []))
            assert not missing, f"docs/tree.md lacks {sorted(folder + name for name in missing)}"


def test_tree_has_the_whole_repository():
    """Its folders and files, but for hidden ones and what every repository has."""
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git repository")
    names = [Path(line).parts for line in result.stdout.splitlines()]
    top = {parts[0] + "/" * (len(parts) > 1) for parts in names if not parts[0].startswith(".")}
    assert top - {"README.md", "LICENSE"} == set(tree()[""])
