"""Text from anywhere as Markdown."""

import re

MAX_LETTERS = 200  # of a name; longer ones are cut
WITH_BACKSLASH = r"\`*_{}[]()#+!"  # every renderer knows these escapes
AS_ENTITY = "&<>|~$@:^="  # not every renderer knows a backslash before these, but all know HTML's entities
ESCAPES = str.maketrans(
    {letter: f"\\{letter}" for letter in WITH_BACKSLASH}
    | {letter: f"&#{ord(letter)};" for letter in AS_ENTITY}
)


def escape(text: object) -> str:
    """Any text as inline Markdown that shows it on one line: no markup, HTML, link, mention or table cell
    comes of it.

    What would not be seen (control characters, marks that turn the direction of writing) becomes �.
    """
    line = " ".join(str(text).split())
    if len(line) > MAX_LETTERS:
        line = line[:MAX_LETTERS] + "…"
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return re.sub(r"(www)\.", r"\1\\.", line.translate(ESCAPES), flags=re.IGNORECASE)
