"""The website shows what the files say: every line, every behaviour on both sides, every link."""

from common import ROOT, SIDES, sides_of
from common.environment import WITH_PROCESSES
from common.proof import ledger as ledger_module
from docs.page import notebooks
from docs.page.build import build
from docs.page.lessons import LETTER, blocks, read_cells, read_ledger, read_lesson
from docs.page.prose import heading_id, target
from docs.page.texts import Texts, update

import os
import re
from pathlib import Path

import nbformat
import pytest
from helpers import count, lessons
from test_docs import PAGES

SOURCE = "https://example.org/blob/main"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build(out, SOURCE)
    return out


def read(site, name):
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_twice_the_same_bytes(site, tmp_path):
    (tmp_path / "left over.html").touch()
    build(tmp_path, SOURCE)
    files = [
        sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (site, tmp_path)
    ]
    assert files[0] == files[1] and len(files[0]) >= 40
    for name in files[0]:
        assert (site / name).read_bytes() == (tmp_path / name).read_bytes(), name
        count("files of the site, twice the same")


def test_every_page_of_the_repository_is_there(site):
    for page in PAGES:
        if page.parent == ROOT / "docs":
            assert (site / f"{page.stem}.html").exists()
            count("pages of the site")


def test_every_line_of_every_lesson_is_there_once(site):
    for name in lessons():
        page = read(site, name)
        for side in SIDES:
            source = (ROOT / side / f"{name}.py").read_text()
            lines = [line for title, cell in read_cells(source).items() if title for line in cell]
            shown = re.findall(rf' id="{LETTER[side]}(\d+)"', page)
            assert [int(n) for n in shown] == [line.number for line in lines]
            told = {
                n for line in lines for n in range(line.number, max(line.number, line.last) + 1)
            }
            first = min(line.number for line in lines)
            for number, text in enumerate(source.splitlines(), 1):
                if number >= first and text.strip() and not text.startswith("# %%"):
                    assert number in told, f"{side}/{name}.py:{number} is not on the page"
            count("lines on the pages", len(lines))


def test_blocks_keep_the_order_and_lose_nothing():
    for name in lessons():
        left, right = (read_cells((ROOT / s / f"{name}.py").read_text()) for s in SIDES)
        for title in left:
            pairs = blocks(left[title], right[title])
            assert [line for pair in pairs for line in pair[0]] == left[title]
            assert [line for pair in pairs for line in pair[1]] == right[title]
            count("cells side by side")


def test_every_behaviour_has_its_lines_on_both_sides(site):
    rows = read_ledger()
    assert len(rows) == len(ledger_module.rows()) >= 61
    for row in rows:
        page, slides = read(site, row.lesson), read(site, f"{row.lesson}-slides")
        assert page.count(f'id="{row.slug}"') == slides.count(f'id="{row.slug}"') == 1, row.slug
        assert f'href="{row.lesson}.html#{row.slug}"' in read(site, "ledger")
        for side in SIDES:
            for lesson, number, _ in row.lines[side]:
                mark = rf'class="line[^"]*\br{row.number}\b[^"]*" id="{LETTER[side]}{number}"'
                assert lesson != row.lesson or re.search(mark, page), (row.title, lesson, number)
                count("lines of the ledger on the site")


def test_a_line_that_many_behaviours_hang_on_names_them_all(site):
    fit = read_lesson("cifar", read_ledger()).crowded()
    assert any("trainer.fit(" in line.source for line in fit)
    page = read(site, "cifar")
    for line in fit:
        card = re.search(rf'<li class="card l{line.number}">.*?</li>\s*(?=<li class="card|</ol>)',
                         page, re.DOTALL)[0]  # fmt: skip
        assert card.count("<li><a href=") == len(line.rows) >= 2
        count("crowded lines")


def test_nothing_is_asked_of_another_host(site):
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".js")]
    loads = r'(?:src|srcset|poster|data)="([^"]+)"|<link rel="(?:stylesheet|icon)" href="([^"]+)"'
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "@import" not in text and "fetch(" not in text
        for url in filter(None, (part for found in re.findall(loads, text) for part in found)):
            assert not re.match(r"(https?:)?//", url), (path, url)
            assert url.startswith("data:") or (path.parent / url).exists(), (path, url)
        count("files that ask no other host")
    assert len(pages) > 30


def dead_links(site):
    """Return (page, file, anchor) of each link between the pages that leads nowhere."""
    pages = {path.relative_to(site): path.read_text("utf-8") for path in site.rglob("*.html")}
    ids = {path: re.findall(r' id="([^"]+)"', page) for path, page in pages.items()}
    dead = []
    for path, page in pages.items():
        assert len(ids[path]) == len(set(ids[path])), f"{path}: an address twice"
        links = r'<a [^>]*?href="(?![a-z]+:|\.\./\.\./actions)([^"#?]*)(?:#([^"]*))?"'
        for name, place in re.findall(links, page):
            other = path if not name else Path(os.path.normpath(path.parent / name))
            if other not in pages or (place and place not in ids[other]):
                dead.append((str(path), name, place))
            count("links between the pages")
    return dead


def test_every_link_between_the_pages_has_its_place(site, tmp_path):
    assert dead_links(site) == []
    page = read(site, "glossary").replace('href="hooks.html"', 'href="hocks.html"', 1)
    (tmp_path / "glossary.html").write_text(page.replace('href="optimize.html"', 'href="#none"', 1))
    found = dead_links(tmp_path)
    assert ("glossary.html", "hocks.html", "") in found and ("glossary.html", "", "none") in found


def test_links_lead_on():
    assert target("../plain/cifar.py#L12", "docs", "S", "en") == "cifar.html#P12"
    assert target("../lightning/cifar.py", "docs", "S", "en") == "cifar.html#lightning"
    assert target("machines.md#slurm", "docs", "S", "en") == "machines.html#slurm"
    assert target("../common/data.py#L3", "docs", "S", "en") == "S/common/data.py#L3"
    assert target("../README.md", "docs", "S", "en") == "index.html"
    assert target("speed/overhead.png", "docs", "S", "ko") == "../speed/overhead.png"
    assert target("https://a.b/c", "docs", "S", "en") == "https://a.b/c"
    with pytest.raises(ValueError, match="leads nowhere"):
        target("gone.md", "docs", "S", "en")
    ids = []
    found = [heading_id(text, ids) for text in ("A `b`, c!", "[x](y)", "x")]
    assert found == ["a-b-c", "x", "x-1"]


# Texts in other languages.


def test_a_changed_paragraph_is_shown_in_english(tmp_path, monkeypatch):
    monkeypatch.setattr("docs.page.texts.LOCALE", tmp_path)
    monkeypatch.setattr("docs.page.texts.COMPLETE", {"ko": ("a", "b")})
    key = "Gradients add up until they are cleared."
    path, other = update("ko", {"a": {key: None, "`lr` is 0.02": None}, "b": {key: None}})
    text = path.read_text(encoding="utf-8")
    assert text.count("msgid") == 2 and "msgid" not in other.read_text("utf-8")  # each once
    path.write_text(
        text.replace('cleared."\nmsgstr ""', 'cleared."\nmsgstr "지워질 때까지"'), "utf-8"
    )
    texts = Texts("ko", tmp_path / "ko")
    assert texts("Gradients add up until they are\n  cleared.") == "지워질 때까지"  # wrapped anew
    assert texts("`lr`") == "`lr`" and not texts.missing
    changed = "Gradients add up until you clear them."
    assert texts(changed) == changed and texts.missing == {changed}
    # The file written anew keeps what is still there.
    update("ko", {"a": {key: None, changed: None}})
    assert "지워질 때까지" in path.read_text("utf-8") and "0.02" not in path.read_text("utf-8")


def test_a_translation_with_other_numbers_or_code_is_broken():
    texts = Texts("en")
    texts.known = {"2 of `a`": "`a` 2", "3 of `a`": "`b` 3", "[x](y) 4": "[x](y) 5"}
    assert texts.broken() == ["3 of `a`", "[x](y) 4"]


# Notebooks


def test_the_notebooks_are_current():
    """`make notebooks` would change nothing."""
    for name in lessons():
        path = notebooks.FOLDER / f"{name}.ipynb"
        assert path.read_text(encoding="utf-8") == notebooks.text(name), name
        count("notebooks")
    assert len(list(notebooks.FOLDER.glob("*.ipynb"))) == len(lessons())


def test_a_notebook_holds_both_scripts():
    for name in lessons():
        cells = notebooks.notebook(name).cells
        for side in SIDES:
            code = [c.source for c in cells if c.source.startswith(f"%%{side}\n")]
            source = (ROOT / side / f"{name}.py").read_text().replace("#: ", "# ")
            for line in "\n".join(code).splitlines():
                assert line.startswith("%%") or line in source.splitlines(), line
            for wanted in re.findall(r"^(?:def|class) \w+", source, re.MULTILINE):
                assert wanted in "\n".join(code)
                count("definitions in the notebooks")


@pytest.mark.parametrize(
    "name", [n if n == "cifar" else pytest.param(n, marks=pytest.mark.slow) for n in lessons()]
)
def test_a_notebook_runs_and_both_sides_end_alike(name, tmp_path):
    from nbclient import NotebookClient

    made = notebooks.notebook(name)
    titles = [cell.source.partition("\n")[0] for cell in made.cells]
    cell = made.cells[titles.index("## The proof") + 1]
    proof = re.sub(r"(limit.train.batches.)\d+", r"\g<1>10", cell.source)
    by_command = name in WITH_PROCESSES
    if by_command:
        proof = proof.replace("runs/notebook", str(tmp_path))
    else:
        proof = proof[:-1] + f", runs_dir=Path({str(tmp_path)!r}))"
    cell.source = proof
    # Opened where it lies: the first cell finds the repository from there.
    place = {"metadata": {"path": str(notebooks.FOLDER)}}
    # An exercise waits for the learner.
    options = dict(timeout=600, kernel_name="python3", resources=place)
    NotebookClient(made, skip_cells_with_tag="skip-execution", **options).execute()
    said = "".join(output.get("text", "") for output in cell.outputs)
    sums = re.findall(r"^(plain|lightning): sha256 of the weights (\w{64})$", said, re.MULTILINE)
    if by_command:
        said = re.sub(r"\x1b\[[\d;]*m", "", said)  # on a notebook's screen it has colours
        sums = re.findall(r"(sha256) of the weights . +(\w{16})", said)
    assert len(sums) == len(sides_of(name)) and len({digest for _, digest in sums}) == 1, said
    assert "The two sides agree" in said and "Tip" not in said
    shown = any("image/png" in output.get("data", {}) for output in cell.outputs)
    assert shown or by_command
    nbformat.validate(made)
    count("notebooks executed")
