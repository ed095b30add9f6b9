"""What the demo prints: every domain, lost or won, and losses that are not finite."""

import io

import pytest
from rich.console import Console

from miniplm.demo.result import dropped_table, loss_table, verdicts
from miniplm.demo.shares import Share

STUDENTS = {
    "global": {"all": 3.0, "docs": 4.5, "[b]x": 2.0, "code": None},
    "per domain": {"all": 2.9, "docs": 4.25, "[b]x": 2.00001, "code": None},
    "random": {"all": None, "docs": 4.125, "[b]x": 2.5, "code": None},
}


def printed(table) -> list[list[str]]:
    """The cells of a table's lines."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]


def test_one_line_per_domain_says_who_won():
    assert verdicts(STUDENTS) == [
        "docs: random wins with 4.1250; global 4.5000, per domain 4.2500",
        "[b]x: global and per domain are level with 2.0000; random 2.5000",
        "code: no student's loss is finite",
        "all: per domain wins with 2.9000; global 3.0000, random not finite",
    ]


def test_losses_side_by_side():
    table = loss_table({"teacher": dict.fromkeys(STUDENTS["random"], 1.5), **STUDENTS})
    assert [str(column.header) for column in table.columns] == ["model", "all", "docs", "[b]x", "code"]
    assert printed(table) == [
        ["teacher", *["1.5000"] * 4],
        ["global", "3.0000", "4.5000", "2.0000", "not finite"],
        ["per domain", "2.9000", "4.2500", "2.0000", "not finite"],
        ["random", "not finite", "4.1250", "2.5000", "not finite"],
    ]


def test_shares_of_each_kind():
    shares = [
        Share("typos", 1234, {"global": 0.995, "per domain": 0.0, "random": 0.5}),
        Share("clean: [b]x", 20, {"global": 1.0, "per domain": 0.25, "random": 0.125}),
    ]
    assert printed(dropped_table(shares)) == [
        ["typos", "1,234", "100%", "0%", "50%"],
        ["clean: [b]x", "20", "100%", "25%", "12%"],
    ]


@pytest.mark.parametrize("order", [["random", "global"], ["global", "random"]])
def test_the_order_of_the_students_decides_nothing(order):
    (line,) = verdicts({name: {"all": STUDENTS[name]["docs"]} for name in order})
    assert line == "all: random wins with 4.1250; global 4.5000"
