"""Pages as people see them: on a phone and on a desk, in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE

LOOK = (Path(__file__).parent / "look.js").read_text()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    """Opens the page at a width and in a scheme; the test fails on whatever the console says."""
    contexts, said = [], []

    def open_at(width: int, scheme: str = "light", **options: Any) -> Any:
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, **options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda r: r.url.startswith("file:") or said.append(f"loads {r.url:.80}"))
        tab.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        tab.goto(page.as_uri())
        return tab

    yield open_at
    for context in contexts:
        context.close()
    assert not said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_reads(opened: Any, width: int, scheme: str) -> None:
    tab = opened(width, scheme)
    assert tab.locator("h1").count() == 1
    assert not tab.evaluate(LOOK)
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 23, 29)"
    assert dark == (scheme == "dark")


def test_nothing_of_the_checkpoint_runs_or_hides(opened: Any, page: Path) -> None:
    tab = opened(1400)
    assert "owned" not in tab.title() or page.stem == "hostile"  # where it is the name itself
    title = tab.evaluate("document.title")
    tab.wait_for_timeout(100)
    assert tab.evaluate("document.title") == title != "owned"
    assert tab.locator("img, iframe, object, link").count() == 0
    assert tab.locator("script:not([type])").count() == 1
    if page.stem == "hostile":
        assert HOSTILE[0] in tab.locator("body").inner_text()


def test_a_head_sorts_its_table_and_words_filter_it(opened: Any, page: Path) -> None:
    tab = opened(390, has_touch=True)
    tables = tab.locator("table.sorts")
    assert tables.count()
    found = tables.last
    head = found.locator("th button").last
    head.scroll_into_view_if_needed()
    numbers = (
        "t => [...t.tBodies[0].rows].map(r => r.cells[r.cells.length - 1])"
        ".map(c => c.getAttribute('data-v')).filter(Boolean).map(Number)"
    )
    for order in (-1, 1):
        head.click()
        values = found.evaluate(numbers)
        if all(isinstance(value, int | float) for value in values):
            assert values == sorted(values, key=lambda value: order * value)
    if page.stem == "large":
        tab.locator("#groups-filter").fill("layers.5. down")
        assert tab.locator("#groups tbody tr:visible").count() == 1
        assert tab.locator("#groups-count").inner_text() == "1 of 576 rows"


def test_a_value_is_shown_under_the_pointer(opened: Any) -> None:
    tab = opened(1400)
    mark = tab.locator("[data-t]:visible").first
    mark.scroll_into_view_if_needed()
    mark.dispatch_event("pointerover")
    tip = tab.locator("#tip")
    assert tip.is_visible() and tip.inner_text().strip()


def test_the_chosen_linear_has_its_histogram(opened: Any, page: Path) -> None:
    tab = opened(1400)
    choice = tab.locator("select.linears").first
    if page.stem in ("analysis", "job"):
        assert not choice.count()
        return
    assert choice.locator("option").count() > 1
    bars = "[...document.querySelectorAll('figure rect')].map(r => r.getAttribute('height')).join()"
    note = tab.locator(".dim[id$=-note]").first
    before = tab.evaluate(bars), note.inner_text()
    choice.select_option(index=1)
    after = tab.evaluate(bars), note.inner_text()
    assert all(after) and (page.stem in ("large", "hostile") or before != after)


def test_it_is_read_without_its_script(opened: Any) -> None:
    tab = opened(390, java_script_enabled=False)
    assert len(tab.locator("body").inner_text()) > 500
