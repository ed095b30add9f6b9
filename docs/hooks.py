"""What the documentation site has beside the files of docs/: a page per command, made of its settings; the
pages of a folder in the navigation; names in place of links that lead out of docs/. mkdocs calls what begins
with `on_`."""

import re
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from miniplm.analysis.markdown import escape as as_markdown
from miniplm.cli import COMMANDS
from miniplm.config.fields import Schema, expected, shown

LINK_OUT = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)[^)]*\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for entry in config.nav or []:
        for title, inner in entry.items() if isinstance(entry, dict) else ():
            if isinstance(inner, list):
                entry[title] = [page for name in inner for page in _pages(name, Path(config.docs_dir))]
    return config


def _pages(name: Any, docs: Path) -> list[Any]:
    """What an entry of a section stands for: `folder/` for its pages, the index first, then the newest."""
    if name == "commands/":
        return [_page_of(command) for command in COMMANDS]
    if not isinstance(name, str) or not name.endswith("/"):
        return [name]
    found = sorted(
        docs.glob(f"{name}*.md"), key=lambda path: (path.name == "README.md", path.name), reverse=True
    )
    return [path.relative_to(docs).as_posix() for path in found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for command in COMMANDS:
        files.append(File.generated(config, _page_of(command), content=command_page(command)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri == "commands.md":
        markdown += "\n## Settings of each command\n\n" + "".join(
            f"- [`miniplm {_words(command)}`]({_page_of(command)}): {as_markdown(settings.__doc__)}\n"
            for command, (settings, _) in COMMANDS.items()
        )
    return without_links_out(markdown, page.file.src_uri, Path(config.docs_dir))


def without_links_out(markdown: str, page: str, docs: Path) -> str:
    """Links to files of the repository outside docs/, which are no part of the site, as the files' names."""

    def named(match: re.Match) -> str:
        path = (docs / page).parent.joinpath(match[2]).resolve()
        if path.is_relative_to(docs) or not path.exists():
            return match[0]  # of a file that is not there mkdocs says so
        name = path.relative_to(docs.parent).as_posix()
        return f"`{name}`" if name.endswith(match[1].strip("`")) else f"{match[1]} (`{name}`)"

    return LINK_OUT.sub(named, markdown)


def _page_of(command: str) -> str:
    return f"commands/{command.replace('_', '-')}.md"


def _words(command: str) -> str:
    return command.replace("_", " ")


def command_page(command: str) -> str:
    """What `miniplm COMMAND --help` says, as a page; the lists of settings are HTML, in which Markdown reads
    nothing."""
    schema = Schema(COMMANDS[command][0])
    words = _words(command)
    required = " ".join(f"{_flag(name)} …" for name in schema.kinds if name not in schema.defaults)
    lines = [f"# {words}", "", f"<p>{escape(schema.config_class.__doc__ or '')}</p>", ""]
    lines += ["```", f"miniplm {words} {required}".rstrip(), "```", ""]
    for group in ("", *schema.groups):
        names = [name for name in schema.kinds if name.rpartition(".")[0] == group]
        lines += [f"## {group or 'Settings'}", ""]
        lines += [f"<p>{escape(schema.docs[group])}</p>", ""] if group else []
        lines += ["<dl>", *(_setting(schema, name) for name in names), "</dl>", ""]
    if schema.aliases:
        names = [f"{_code(_flag(old))} (now {_code(_flag(new))})" for old, new in schema.aliases.items()]
        lines += ["## Old names that still work", "", f"<p>{', '.join(names)}</p>", ""]
    return "\n".join(lines)


def _setting(schema: Schema, name: str) -> str:
    facts = [expected(schema.kinds[name])]
    if name not in schema.defaults:
        facts.append("required")
    elif (value := _typed(schema.defaults[name])) != "":
        facts.append(f"default {_code(value)}")
    term = f'<dt id="{escape(name)}">{_code(_flag(name))} {", ".join(facts)}</dt>'
    return f"{term}\n<dd>{escape(schema.docs[name])}</dd>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _typed(value: Any) -> str:
    """A default as it would be typed after its flag; "" where it is nothing."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_typed, value))
    return value if isinstance(value, str) else shown(value)
