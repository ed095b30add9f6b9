"""Text from anywhere on a terminal: names and messages may hold what a terminal obeys."""

# For `keep`, where the text is not a name but something to read: line breaks, tabs, spaces of other widths,
# and what joins or parts letters (Persian, emoji).
IN_PROSE = "\n\t\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\u200c\u200d"


def printable(text: object, keep: str = "") -> str:
    """The text with all that is not to be seen written out instead of sent to the terminal.

    Control characters (escape sequences, line breaks), marks that turn the direction of writing, invisible
    and unassigned letters, halves of surrogate pairs (bytes of a file's name that are no UTF-8) become what a
    Python literal holds for them: `\\x1b`, `\\n`, `\\u202e`. So does every space but the plain one.

    Args:
        text: a string, or anything whose str() is to be printed (a path, an error).
        keep: letters that stay as they are.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else repr(letter)[1:-1] for letter in text
    )
