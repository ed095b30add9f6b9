"""Names that try to be markup, through two renderers."""

import pytest
from hostile import NAMES, PIECES, shown
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import RENDERERS, read

from miniplm.analysis.markdown import MAX_LETTERS, escape

PLACES = {  # where a card has names
    "h1": "# {}",
    "td": "| name | figure |\n| --- | --- |\n| {} | 1 |",
    "p": "Loss on {}: 1.\n\nNext.",
}


def check(name: str, renderer: str):
    text = escape(name)
    assert "\n" not in text and text.isprintable()
    for place, around in PLACES.items():
        elements, texts = read(around.format(text), renderer)
        assert elements == read(around.format("name"), renderer)[0], (name, place)
        expected = shown(name)
        if place == "p":
            expected = f"Loss on {expected}: 1."
        if place == "h1" and not expected:
            continue  # an empty heading
        assert next(found for tag, found in texts if tag == place) == expected, (name, place)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_hostile_names_are_shown_and_nothing_else(renderer):
    for name in NAMES:
        check(name, renderer)


@pytest.mark.slow
@pytest.mark.parametrize("renderer", RENDERERS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES) | st.characters(), max_size=30).map("".join))
def test_any_text_is_shown_and_nothing_else(renderer, name):
    check(name, renderer)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_renderers_of_plain_text_link(name):
    """GitHub and others look at the text itself for links, mentions and mathematics."""
    text = escape(name)
    for trigger in ("http:", "https:", "ftp:", "mailto:", "www.", "@", "$", "<", ">", "|", "~"):
        assert trigger not in text.lower()


def test_ordinary_names_stay_readable():
    assert escape("small_reference") == r"small\_reference"
    assert escape("MiniPLM demo student, 2.5 of it - 'x'") == "MiniPLM demo student, 2.5 of it - 'x'"
    assert escape("en.wikipedia.org/wiki") == "en.wikipedia.org/wiki"
    assert escape(3) == "3"


def test_long_names_are_cut():
    assert escape("x" * MAX_LETTERS) == "x" * MAX_LETTERS
    assert escape("x" * (MAX_LETTERS + 1)) == "x" * MAX_LETTERS + "…"
    assert len(escape("@" * 10**6)) < 10 * MAX_LETTERS
