"""The website in a real browser: each behaviour lights exactly its lines; all can use it."""

from common import SIDES
from docs.page.build import build
from docs.page.lessons import read_ledger

import importlib.util
import os
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import count, lessons

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="the website is not tested in a browser: there is no chromium here; install it "
    "(Debian: apt install chromium), or name one by BROWSER_PATH",
)
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
AXE = Path(importlib.util.find_spec("axe_playwright_python").origin).with_name("axe.min.js")
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
WIDE = {"width": 1600, "height": 900}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build(out, "https://example.org/blob/main")
    return out


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield found
        found.close()


@pytest.fixture
def page(browser, site):
    """A window that notes errors and every address that it asks for."""
    yield from opened(browser, site)


def opened(browser, site, **settings):
    context = browser.new_context(**{"viewport": WIDE} | settings)
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()
    assert page.errors == []
    outside = [url for url in page.asked if not url.startswith((f"file://{site}/", "data:"))]
    assert page.asked and outside == []
    count("requests, all within the site", len(page.asked))


def names(site):
    return sorted(path.name for path in site.glob("*.html"))


LIT = """([slug, row, letters]) => {
  const lines = [...document.querySelectorAll('.line')];
  const on = (line) => getComputedStyle(line).boxShadow !== 'none';
  const cards = [...document.querySelectorAll('.card')].filter((c) => getComputedStyle(c).display !== 'none');
  const box = document.getElementById(slug).getBoundingClientRect();
  return {lit: lines.filter(on).map((line) => line.id), cards: cards.map((c) => c.className),
          seen: box.top >= 0 && box.bottom <= innerHeight};
}"""  # noqa: E501


def lights(page, site, row):
    """Choose a behaviour by its address; return which lines are lit, and which cards are shown."""
    page.goto(f"file://{site}/{row.lesson}.html#{row.slug}")
    return page.evaluate(LIT, [row.slug, row.number, "PL"])


def expected(row):
    letters = zip(SIDES, "PL", strict=True)
    return {f"{letter}{number}" for side, letter in letters
            for lesson, number, _ in row.lines[side] if lesson == row.lesson}  # fmt: skip


@EVERY
def test_every_behaviour_lights_exactly_its_lines(page, site, every):
    """Of each lesson one in four, and all under make test-slow."""
    rows = read_ledger()[:: 1 if every else 4]
    for row in rows:
        found = lights(page, site, row)
        assert set(found["lit"]) == expected(row), (row.lesson, row.slug)
        assert found["cards"] == [f"card r{row.number}"] and found["seen"], (row.slug, found)
        count("behaviours lit")
    assert len({row.lesson for row in rows}) >= 10 and len(rows) >= (111 if every else 27)
    assert not every or {row.lesson for row in rows} == set(lessons())


def test_a_click_and_the_keyboard_lead_through_the_tour(page, site):
    page.goto(f"file://{site}/cifar.html")
    page.click(".chip >> nth=2")
    first = page.evaluate("location.hash")
    cards = page.locator(".card:visible")
    assert cards.count() == 1
    # The card's arrows by keyboard: Tab to them, Enter.
    cards.locator("a", has_text="→").focus()
    page.keyboard.press("Enter")
    second = page.evaluate("location.hash")
    assert first != second and page.locator(".card:visible").count() == 1
    page.click(".card:visible .walk a >> nth=-1")  # close
    assert page.evaluate("location.hash") == "#code" and page.locator(".card:visible").count() == 0
    # From the first Tab on: skip the menu.
    page.goto(f"file://{site}/cifar.html?again")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    # What the Trainer's one call stands for.
    fit = page.locator(".lightning .jump", has_text="\u00d7").first
    fit.click()
    assert page.locator(".card:visible li").count() >= 2


COPIED = """(side) => [...document.querySelectorAll(`.side.${side}`)].map(
  (cell) => [...cell.querySelectorAll('.src')].map((line) => line.textContent).join(''))"""


def test_what_is_copied_runs(page, site):
    """A side's code, selected and copied: no line numbers, and its own indentation."""
    page.goto(f"file://{site}/cifar.html")
    for side in SIDES:
        cells = page.evaluate(COPIED, side)
        assert len(cells) == 6
        for text in cells:
            compile(text, side, "exec")
            count("cells copied, that compile")
        assert "    optimizer.step()" in "".join(cells) or side == "lightning"
    unselectable = "getComputedStyle(document.querySelector('.no')).userSelect"
    assert page.evaluate(unselectable) == "none"


def test_the_filters(page, site):
    page.goto(f"file://{site}/ledger.html")
    page.fill("#find", "hands each batch of answers")
    assert page.text_content("#count").startswith("1 / ")
    assert page.locator("#rows tr[id]:visible").count() == 1
    page.goto(f"file://{site}/ledger.html?q=&lesson=speed")
    shown = page.locator("#rows tr[id]:visible")
    assert 1 < shown.count() < 10 and page.input_value("#lesson") == "speed"
    page.goto(f"file://{site}/pitfalls.html?q=bfloat16+cache")
    assert 0 < page.locator("article h2:visible").count() < 10


def test_slides_move_by_the_arrow_keys(browser, site):
    for page in opened(browser, site, viewport={"width": 1280, "height": 720}):
        page.goto(f"file://{site}/cifar-slides.html")
        hashes = []
        for key in ("ArrowRight", "PageDown", "ArrowLeft"):
            page.keyboard.press(key)
            hashes.append(page.evaluate("location.hash"))
        assert len(set(hashes)) == 2 and hashes[0] == hashes[2]
        size = page.evaluate("getComputedStyle(document.querySelector('.slide pre')).fontSize")
        assert float(size.removesuffix("px")) >= 20
        over = page.evaluate("[...document.querySelectorAll('.slide')].filter("
                             "(s) => s.scrollHeight > 1.5 * innerHeight).length")  # fmt: skip
        assert over == 0


@EVERY
def test_no_page_scrolls_sideways(page, site, every):
    pages = (*names(site), *KOREAN) if every else (*FEW, *KOREAN[:2], "pitfalls.html")
    for name in pages:
        page.goto(f"file://{site}/{name}")
        for width in (360, 800, 1600):
            page.set_viewport_size({"width": width, "height": 800})
            over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert over <= 0, f"{name} at {width}: {over} px too wide"
            count("widths of pages")
    assert len(pages) >= (25 if every else 7)


def test_the_language_is_remembered_page_by_page(page, site):
    """Once it is chosen, each page opens in it, at the same place; and back."""
    page.goto(f"file://{site}/cifar.html#P65")
    assert page.evaluate("document.documentElement.lang") == "en"
    page.click(".languages a[lang=ko]")
    assert page.url == f"file://{site}/ko/cifar.html#P65"
    page.goto(f"file://{site}/optimize.html#L20")  # a link from elsewhere leads to the English one
    page.wait_for_url(f"file://{site}/ko/optimize.html#L20")
    page.click("nav a[href='ledger.html']")
    assert page.url == f"file://{site}/ko/ledger.html"
    page.click(".languages a[lang=en]")
    assert page.url == f"file://{site}/ledger.html"
    page.goto(f"file://{site}/ko/cifar.html")
    page.wait_for_url(f"file://{site}/cifar.html")


KOREAN = ("ko/index.html", "ko/cifar.html", "ko/ledger.html", "ko/optimize-slides.html")
FEW = ("index.html", "cifar.html", "cifar-slides.html", "ledger.html")


@pytest.mark.parametrize(
    "scheme, width", [("light", 1600), pytest.param("dark", 390, marks=pytest.mark.slow)]
)
@EVERY
def test_axe_finds_nothing(browser, site, scheme, width, every):
    """WCAG 2.1 AA, as far as a program can tell; on every page under make test-slow."""
    settings = dict(color_scheme=scheme, viewport={"width": width, "height": 900})
    for page in opened(browser, site, **settings):
        for name in (*names(site), *KOREAN) if every else (FEW[1], KOREAN[0]):
            page.goto(f"file://{site}/{name}")
            assert violations(page) == {}, name
            count("pages without an obstacle")


def violations(page):
    page.evaluate(AXE.read_text(encoding="utf-8"))
    rules = "{preload: false, runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}"
    found = defaultdict(list)
    for each in page.evaluate(f"axe.run({rules})")["violations"]:
        found[each["id"]] += [node["html"][:150] for node in each["nodes"][:3]]
    return dict(found)


def test_without_javascript(browser, site):
    for page in opened(browser, site, java_script_enabled=False):
        page.goto(f"file://{site}/cifar.html")
        page.click(".chip >> nth=3")
        assert page.locator(".card:visible").count() == 1
        page.click("#only-plain")
        assert not page.locator(".side.lightning >> nth=0").is_visible()
        page.goto(f"file://{site}/ledger.html")
        assert page.locator("#rows tr[id] >> nth=5").is_visible()
        assert not page.locator(".filter").is_visible()


DAMAGES = {
    "contrast": ("index.html", "</head>", "<style>.prose p{color:#bbb}</style></head>"),
    "a foreign host": ("index.html", "</head>", '<link rel="stylesheet" href="https://example.org/a.css"></head>'),
    "an address twice": ("cifar.html", '<div class="heads"', '<p id="P65"></p><div class="heads"'),
    "a row that lights nothing": ("cifar.html", ".line.r", ".none.r"),
    "too wide": ("index.html", "<h1>", '<div style="width: 3000px">x</div><h1>'),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found(browser, site, tmp_path, damage):
    name, old, new = DAMAGES[damage]
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    text = (copy / name).read_text(encoding="utf-8")
    assert old in text
    (copy / name).write_text(text.replace(old, new), encoding="utf-8")
    context = browser.new_context(viewport=WIDE, offline=True)
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{copy}/{name}")
    if damage == "contrast":
        assert "color-contrast" in violations(page)
    elif damage == "a foreign host":
        assert [url for url in asked if not url.startswith(f"file://{copy}/")]
    elif damage == "an address twice":
        twice = "(() => {const i = [...document.querySelectorAll('[id]')].map((e) => e.id);"
        assert page.evaluate(twice + "return i.length - new Set(i).size})()") == 1
    elif damage == "a row that lights nothing":
        row = next(row for row in read_ledger() if row.lesson == "cifar")
        assert set(lights(page, copy, row)["lit"]) != expected(row)
    else:
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") > 0
    context.close()
    count("damages found")
