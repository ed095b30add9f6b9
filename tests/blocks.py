"""The code blocks of Markdown pages, and the commands of miniplm in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from source_tree import ROOT

from miniplm.cli import COMMANDS
from miniplm.config.fields import Schema

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
NOT_RUN = re.compile(r"# not run: \S+")
EVERYWHERE = {"help", "debug", "config", "print_config"}  # flags of every command


class Block(NamedTuple):
    """`language` "" where none is named; `line`, where it begins; `run`, whether it does not begin with
    `# not run: reason`."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def run(self) -> bool:
        return not NOT_RUN.match(self.text)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = FENCE.finditer(text)
    return [Block(page, text.count("\n", 0, each.start()) + 1, each[1], each[2]) for each in found]


def lines(block: Block) -> Iterator[list[str]]:
    """The words of each line that calls miniplm, torchrun, make or Python; what is optional there
    (`[--flag VALUE]`, `[RUN …]`) is taken, and the number N is 1."""
    text = re.sub(r"\[([-A-Z][^\]]*)\]", r"\1", block.text.replace("\\\n", " ").replace("…", ""))
    for line in text.splitlines():
        if re.match(r"(\S*/)?(miniplm|torchrun|make|python) ", line):
            yield ["1" if word == "N" else word for word in shlex.split(line, comments=True)]


def commands(block: Block) -> Iterator[list[str]]:
    """What stands after `miniplm` in each line of shell that calls it."""
    for words in lines(block):
        if Path(words[0]).name == "miniplm":
            yield words[1:]
        elif words[0] == "torchrun" and "miniplm" in words:
            yield words[words.index("miniplm") + 1 :]


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """(command as COMMANDS has it, or "", what follows) of words as they are typed."""
    for count in (2, 1):
        if (name := "_".join(words[:count])) in COMMANDS:
            return name, words[count:]
    return "", words


def unknown_flags(code: str) -> list[str]:
    """The flags in code within a sentence that no command has, or not the one that is named."""
    words = code.split()
    name, rest = command_of(words[1:] if words[0] == "miniplm" else words)
    if not name and not words[0].startswith("--"):
        return []  # of another program
    schemas = [Schema(settings) for each, (settings, _) in COMMANDS.items() if name in ("", each)]
    flags = re.findall(r"(?<!\S)--([\w.-]+\w)", " ".join(rest))
    return [flag for flag in flags if not any(has_flag(schema, flag.replace("-", "_")) for schema in schemas)]


def has_flag(schema: Schema, flag: str) -> bool:
    names = {*schema.kinds, *schema.groups, *schema.aliases, *EVERYWHERE}
    return flag in names or (flag.startswith("no_") and flag.removeprefix("no_") in names)


def code_in_sentences(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
