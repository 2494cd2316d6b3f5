"""The page in a real browser: it opens from disk without errors, filters, shows values, fits and prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preln.report.html import render_page
from preln.report.load import load_run

from . import browser as chromium

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium on PATH"),
]


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    """A browser for all tests: starting one takes seconds."""
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def page(window: chromium.Browser, built: Path) -> chromium.Browser:
    """The page of one run, freshly loaded into a desktop window."""
    window.problems.clear()
    window.requests.clear()
    window.open((built / "index.html").as_uri())
    window.screen(1200)
    return window


def cells(page: chromium.Browser, measure: str, run: int = 0) -> list[str]:
    """What the table of values says of a measure, block by block."""
    row = f'tr[data-measure="{measure}"][data-run="{run}"]'
    return page.value(
        f"[...document.querySelector('{row}').querySelectorAll('td[data-v]')].map(c => c.textContent)"
    )


def spot(page: chromium.Browser, measure: str, layer: int) -> tuple[float, float]:
    """The middle of a block's column in a panel, in the window's coordinates, after scrolling there."""
    panel = f"document.querySelector('[data-panel=\"{measure}\"]')"
    page.value(f"{panel}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    page.settle()
    box = page.value(
        f"(() => {{const svg = {panel};"
        "const b = svg.getBoundingClientRect(), v = svg.viewBox.baseVal;"
        "return [b.left, b.top, b.width, b.height, v.width]})()"
    )
    layers = page.value("document.querySelectorAll('table.values thead th.n').length")
    left, right, scale = 56, 10, box[2] / box[4]
    across = left + (layer + 0.5) * (box[4] - left - right) / layers
    return box[0] + across * scale, box[1] + box[3] / 2


def readout(page: chromium.Browser) -> str:
    return page.value("document.querySelector('[data-readout]').innerText")


def pick(page: chromium.Browser, selector: str, value: Any) -> None:
    """Set a control as a reader would, and tell the page."""
    page.value(
        f"(() => {{const c = document.querySelector({selector!r});"
        f"if (c.type === 'checkbox') c.checked = {str(bool(value)).lower()}; else c.value = {value!r};"
        "c.dispatchEvent(new Event('input', {bubbles: true}))})()"
    )


def test_it_opens_from_disk_without_errors_and_fetches_nothing(page: chromium.Browser) -> None:
    assert page.problems == []
    assert page.value("document.readyState") == "complete"
    assert page.value("document.querySelectorAll('[data-panel]').length") > 0  # the script did run
    outside = [address for address in page.requests if not address.startswith(("file:", "data:"))]
    assert outside == [] and page.requests


def test_errors_and_requests_would_be_noticed(window: chromium.Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<!doctype html><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('a'); throw Error('b')</script>"
    )
    window.problems.clear()
    window.requests.clear()
    window.open((tmp_path / "bad.html").as_uri())
    assert any(problem.startswith("error") for problem in window.problems)
    assert any("Error: b" in problem for problem in window.problems)
    assert any(address.startswith("http:") for address in window.requests)


def test_the_ledger_filters(page: chromium.Browser) -> None:
    visible = (
        "[...document.querySelectorAll('.claim')].filter(c => c.offsetParent).map(c => c.dataset.status)"
    )
    everything = page.value(visible)
    assert sorted(set(everything)) == ["open", "proved", "refuted", "untested"]
    pick(page, "form select[name=status]", "refuted")
    assert page.value(visible) == ["refuted"]
    assert page.value("document.querySelector('[data-count]').textContent") == f"1 of {len(everything)} shown"
    pick(page, "form select[name=status]", "")
    pick(page, "form select[name=kind]", "hypothesis")
    assert page.value(visible) == ["untested"]
    pick(page, "form select[name=kind]", "")
    pick(page, "form select[name=evidence]", "smt")
    assert page.value(
        "[...document.querySelectorAll('.claim')].filter(c => c.offsetParent).map(c => c.id)"
    ) == ["r1-claim-RMS-NORM"]
    pick(page, "form select[name=evidence]", "")
    pick(page, "form input[name=words]", "STK-GROWTH")
    assert page.value(visible) == ["open"]
    pick(page, "form input[name=words]", "no such words")
    assert page.value(visible) == []


def test_hovering_shows_a_blocks_values(page: chromium.Browser) -> None:
    values = cells(page, "residual_rms")
    assert len(set(values[:6])) == 6
    for layer in (3, 1):
        page.mouse(*spot(page, "residual_rms", layer))
        page.settle()
        text = readout(page)
        assert text.startswith(f"Block {layer}"), text
        line = re.search(r"residual_rms\s+(\S+)", text)
        assert line is not None and line[1] == values[layer]
    page.mouse(2, 2)  # leaving keeps the last block
    page.settle()
    assert readout(page).startswith("Block 1")


def test_touch_keyboard_and_slider_show_values_too(page: chromium.Browser) -> None:
    values = cells(page, "grad_hidden")
    page.screen(390, 844, phone=True)
    page.tap(*spot(page, "grad_hidden", 4))
    page.settle()
    assert readout(page).startswith("Block 4")
    page.value("document.querySelector('[data-panel=\"grad_hidden\"]').focus()")
    page.press("ArrowRight")
    page.settle()
    assert readout(page).startswith("Block 5") and values[5] in readout(page)
    pick(page, "input[name=block]", "2")
    assert readout(page).startswith("Block 2") and values[2] in readout(page)
    spoken = page.value("document.querySelector('input[name=block]').getAttribute('aria-valuetext')")
    assert spoken.startswith("Block 2") and values[2] in spoken


def test_pruned_blocks_are_marked(page: chromium.Browser, built: Path) -> None:
    for place, prune in enumerate(load_run(built.parent / "quickstart").prunes):
        pick(page, "select[name=plan]", str(place))
        cut = "document.querySelectorAll('[data-panel=\"residual_rms\"] .cut').length"
        assert page.value(cut) == len(prune["drop"])
        for layer in range(6):
            pick(page, "input[name=block]", str(layer))
            assert (", pruned" in readout(page)) == (layer in prune["drop"])
    pick(page, "select[name=plan]", "")
    assert page.value("document.querySelectorAll('.cut').length") == 0


def test_measures_can_be_chosen(page: chromium.Browser) -> None:
    panels = "[...document.querySelectorAll('[data-panel]')].map(p => p.dataset.panel)"
    first = page.value(panels)
    assert sorted(first) == ["grad_hidden", "norm_sigma", "residual_rms"]
    pick(page, "input[value='damage']", True)
    assert sorted(page.value(panels)) == sorted([*first, "damage"])
    assert "damage" in readout(page)
    for name in page.value(panels):
        pick(page, f"input[value='{name}']", False)
    assert page.value(panels) == []
    assert "No measure" in page.value("document.querySelector('[data-panels]').innerText")
    assert page.problems == []


def test_drawn_points_stand_where_the_numbers_say(page: chromium.Browser) -> None:
    """The order of heights is the order of values: an oracle that shares no code with the script."""
    heights = page.value(
        "[...document.querySelectorAll('[data-panel=\"residual_rms\"] path[transform]')]"
        ".map(p => +p.getAttribute('transform').match(/ ([-0-9.]+)[)]/)[1])"
    )
    values = [float(text.replace(",", "")) for text in cells(page, "residual_rms") if text != "–"]
    assert len(heights) == len(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert order == sorted(range(len(values)), key=lambda place: -heights[place])


def test_every_picture_has_alternative_text(page: chromium.Browser) -> None:
    bare = (
        "[...document.querySelectorAll('svg, img, [role=img]')].filter(p => !("
        "(p.getAttribute('aria-label') || '').length >= 20"
        " || (p.getAttribute('aria-hidden') === 'true' && p.closest('[role=img], .key'))))"
        ".map(p => p.outerHTML.slice(0, 99))"
    )
    assert page.value(bare) == []
    page.value("document.querySelector('[data-panel]').removeAttribute('aria-label')")
    assert len(page.value(bare)) == 1


def test_evidence_leads_to_the_file(page: chromium.Browser) -> None:
    row = "document.getElementById('r1-file-probe-layers-parquet')"
    assert page.value(f"{row}.checkVisibility()") is False
    page.value("document.querySelector('.verdict a[href=\"#r1-file-probe-layers-parquet\"]').click()")
    page.settle()
    assert page.value(f"{row}.checkVisibility()") is True


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_hangs_over_the_edge(page: chromium.Browser, width: int) -> None:
    page.screen(width, 844, phone=True)
    assert page.value("document.documentElement.scrollWidth - innerWidth") <= 0
    over = (
        "[...document.querySelectorAll('main *')]"
        ".filter(e => !e.closest('.scroll, svg, .readout, details:not([open])') && e.checkVisibility())"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert page.value(over) == []
    # a column of single letters is no column: the values of provenance have room
    values = "[...document.querySelectorAll('dl.facts dd')].filter(e => e.checkVisibility())"
    assert page.value(f"Math.min(...{values}.map(e => e.clientWidth))") > 90


def test_dark_is_dark_and_paper_is_white(page: chromium.Browser) -> None:
    light = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]"
    ink = "getComputedStyle(document.body).color.match(/[0-9]+/g).map(Number)[0]"
    assert page.value(light) > 200 > 100 > page.value(ink)
    page.screen(1200, scheme="dark")
    assert page.value(light) < 60 < 180 < page.value(ink)
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.value(light) > 200
    page.send("Emulation.setEmulatedMedia", media="")
    assert page.pdf().startswith(b"%PDF")


def test_runs_are_overlaid_and_can_be_taken_away(
    window: chromium.Browser, built: Path, tmp_path: Path
) -> None:
    run = load_run(built.parent / "quickstart")
    (tmp_path / "two.html").write_text(render_page([(run, []), (run, [])], tmp_path), encoding="utf-8")
    window.problems.clear()
    window.open((tmp_path / "two.html").as_uri())
    window.screen(1200)
    lines = "document.querySelectorAll('[data-panel=\"residual_rms\"] path[stroke]').length"
    assert window.value(lines) == 2
    assert "residual_rms, quickstart (2)" in readout(window)
    pick(window, "input[name=run][value='1']", False)
    assert window.value(lines) == 1
    assert "residual_rms, quickstart (2)" not in readout(window)
    assert window.value("document.querySelectorAll('#compare td .badge').length") == 2 * len(run.verdicts)
    assert window.problems == []
