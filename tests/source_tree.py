"""What the tests of the house read: the files of the packages, what they import, how they are named."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """miniplm/data/corpus.py → "data.corpus", kernels/tiles.py → "kernels.tiles", the package itself → ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kernels" else parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE = {module_name(path): path for path in python_files("miniplm", "kernels")}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file of the package imports, at the top or inside a function: those of the package
    as ".data.corpus", others as "torch.nn"."""
    package = module_name(path.parent / "__init__.py")
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if package else []
            base = parents[: len(parents) - node.level + 1] if node.level <= len(parents) + 1 else ["outside"]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield "." + (inner if inner in PACKAGE else ".".join(base))


def room(module: str) -> str:
    """ "data" of "data.corpus", "torch" of "torch.nn"."""
    return module.split(".")[0]
