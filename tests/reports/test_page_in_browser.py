"""The page in a real browser: no error, nothing from a network, toggles, values, keyboard, two widths."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright
from recorded_runs import EPOCHS, changed, ending, write_run

from largebatch.base.numbers import mean_and_std
from largebatch.reports.output import write
from largebatch.reports.page import page
from largebatch.reports.selection import select

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

SIZES = {"desktop": (1280, 900), "phone": (375, 750)}
FINAL = {1: (5.0, 5.5), 2: (5.0, 5.25), 4: (9.0, 9.5)}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(compose, tmp_path_factory):
    """Return the file of a page of three groups, two seeds each."""
    directory = tmp_path_factory.mktemp("page")
    for k, errors in FINAL.items():
        for seed, error in enumerate(errors):
            settings = {"epochs": EPOCHS, "warmup.name": "none", "lr.base_minibatch": 32, "k": k, "seed": seed}
            write_run(directory / "runs", changed(compose(), settings), ending(error))
    path = directory / "report.html"
    write(path, page(select([str(directory / "runs")]), 0.5).encode())
    return path


@pytest.fixture(params=SIZES)
def opened(request, browser, written):
    """Return the page opened at a size; it must load without an error or a request, and go on so."""
    width, height = SIZES[request.param]
    tab = browser.new_page(viewport={"width": width, "height": height})
    heard = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda asked: heard.append(asked.url) if asked.url != written.as_uri() else None)
    tab.goto(written.as_uri())
    yield tab
    assert heard == []
    tab.close()


def visible(tab, group):
    """Return whether the parts of a group are shown: True, False, or None where they disagree."""
    parts = tab.locator(f".chart [data-group='{group}']")
    states = parts.evaluate_all("parts => parts.map(part => getComputedStyle(part).display != 'none')")
    assert len(states) >= 5  # means and bands of two figures, and a rate
    return states[0] if len(set(states)) == 1 else None


def test_toggles(opened):
    assert [visible(opened, group) for group in range(3)] == [True, True, True]
    opened.get_by_role("checkbox", name="kn = 64").uncheck()
    assert [visible(opened, group) for group in range(3)] == [True, False, True]
    opened.get_by_role("button", name="Baseline alone").click()
    assert [visible(opened, group) for group in range(3)] == [True, False, False]
    opened.get_by_role("button", name="All").click()
    assert [visible(opened, group) for group in range(3)] == [True, True, True]


def test_values_shown_are_those_of_the_records(opened):
    cells = opened.locator("#table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(c => c.innerText))"
    )
    heads = opened.locator("#table thead th").all_inner_texts()
    shown = {int(row[heads.index("k")]): row[heads.index("error %")] for row in cells}
    assert shown == {k: "{:.2f} ± {:.2f}".format(*mean_and_std(errors)) for k, errors in FINAL.items()}

    chart = opened.locator("[data-chart=val_error]")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + box["height"] / 2)
    # Records end 9 points below the final error.
    expected = [f"{mean - 9:.2f} ± {std:.2f} %" for mean, std in map(mean_and_std, FINAL.values())]
    assert chart.locator(".reading strong").inner_text() == "epoch 6"
    assert chart.locator(".reading b").all_inner_texts() == expected
    opened.get_by_role("checkbox", name="kn = 64").uncheck()
    chart.hover()
    assert chart.locator(".reading b").count() == 2


def test_values_can_be_read_with_the_keyboard(opened):
    chart = opened.locator("[data-chart=scaling]")
    opened.get_by_role("checkbox").last.focus()
    opened.keyboard.press("Tab")
    assert chart.evaluate("chart => chart === document.activeElement")
    assert chart.get_attribute("aria-valuetext").startswith("kn = 128; ")
    opened.keyboard.press("Home")
    assert "kn = 32" in chart.get_attribute("aria-valuetext")
    opened.keyboard.press("ArrowRight")
    assert chart.get_attribute("aria-valuetext").startswith("kn = 64; ")
    assert "5.12 ± 0.18 %, undecided" in chart.get_attribute("aria-valuetext")
    assert chart.locator(".reading").is_visible()
    opened.keyboard.press("Escape")
    assert chart.locator(".reading").is_hidden()


def test_nothing_is_wider_than_the_window(opened):
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = "parts => parts.map(part => part.getBoundingClientRect())"
    charts = opened.locator(".chart > svg").evaluate_all(boxes)
    assert all(box["right"] <= opened.viewport_size["width"] for box in charts)
    labels = opened.locator(".chart > svg text").evaluate_all(boxes)
    assert min(box["height"] for box in labels) >= 8  # pixels: small, but readable on a phone too


def test_light_and_dark(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    text = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    for scheme, expected in (
        ("light", ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]),
        ("dark", ["rgb(20, 23, 27)", "rgb(232, 234, 237)"]),
    ):
        opened.emulate_media(color_scheme=scheme)
        assert opened.evaluate(f"[{ground}, {text}]") == expected


def test_on_paper_what_is_folded_away_is_open(opened):
    opened.emulate_media(media="print")
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.locator("details:not([open])").count() == 0
    assert opened.get_by_role("button", name="All").is_hidden()
