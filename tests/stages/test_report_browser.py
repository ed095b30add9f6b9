"""report in a real browser, where there is one: Chromium, driven by its own flags."""

import html
import json
import re

import pytest
from browser import Browser

import miniplm

# What is seen of a page, as an attribute of the root of the one around it.
LOOK = """<script>addEventListener("load", () => {
  const root = document.documentElement, body = document.body;
  const wide = [...document.querySelectorAll("main *")].filter((each) => !each.closest(".scroll, svg, pre")
    && each.getBoundingClientRect().right > innerWidth + 1);
  parent.document.documentElement.setAttribute("seen", JSON.stringify({
    width: innerWidth, scroll: Math.max(root.scrollWidth, body.scrollWidth), height: root.scrollHeight,
    wide: wide.map((each) => each.tagName + each.className),
    requests: performance.getEntriesByType("resource").map((each) => each.name),
    paper: getComputedStyle(body).backgroundColor,
  }));
});</script>"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    return Browser(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module", params=["work", "hostile_run"])
def report(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    miniplm.report(runs=[str(request.getfixturevalue(request.param))], output=str(path))
    return path


def look(browser, page, width, *flags) -> dict:
    """What LOOK sees of a copy of a page without the policy that forbids scripts, in a frame of this width (a
    window is 500 wide at least)."""
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    inside = html.escape(text.replace("</body>", f"{LOOK}</body>"))
    frame = page.with_name("frame.html")
    style = f"width: {width}px; height: 900px; border: 0"
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<iframe style="{style}" srcdoc="{inside}"></iframe>',
        encoding="utf-8",
    )
    shown, _, _ = browser(frame, "--window-size=1600,1000", "--dump-dom", *flags)
    return json.loads(html.unescape(re.search(' seen="([^"]*)"', shown)[1]))


@pytest.mark.parametrize("width", [390, 1400])
def test_fits_and_asks_for_nothing(browser, report, width):
    seen = look(browser, report, width)
    assert seen["width"] == width and seen["height"] > 1_000
    assert seen["scroll"] <= width and seen["wide"] == []
    assert seen["requests"] == []


@pytest.mark.parametrize("width", [390, 1400])
def test_console_is_silent(browser, report, width, tmp_path):
    picture = tmp_path / "page.png"
    _, said, asked = browser(report, f"--window-size={width},3000", f"--screenshot={picture}")
    assert "CONSOLE" not in said and asked == ["/report.html"]
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == width and picture.stat().st_size > 20_000


def test_dark_where_it_is_wished(browser, report):
    light, dark = (
        look(browser, report, 390, *flags)["paper"]
        for flags in ((), ("--blink-settings=preferredColorScheme=0",))
    )
    assert light == "rgb(251, 250, 248)" and dark == "rgb(20, 22, 26)"


def test_these_tests_can_fail(browser, report):
    """A wide element, a request and a word on the console are seen."""
    page = report.with_name("bad.html")
    text = report.read_text(encoding="utf-8")
    bad = '<p style="width: 500px">wide</p><img src="bad.png">'
    page.write_text(text.replace("<main>", f"<main>{bad}"), encoding="utf-8")
    _, said, _ = browser(page, "--screenshot=" + str(report.with_name("bad.png")))
    assert "CONSOLE" in said  # the policy forbids the picture
    seen = look(browser, page, 390)
    assert seen["wide"] and seen["scroll"] > 390 and seen["requests"]
