"""The pages can be read and followed: every link leads somewhere, and no sentence is endless."""

from common import ROOT
from docs.page.prose import heading_id

import re
import subprocess

import pytest
from helpers import count

MOST_WORDS = 42  # in a sentence; the mean is 13


def pages():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return sorted(
        ROOT / name for name in listed or [p.relative_to(ROOT) for p in ROOT.glob("**/*.md")]
    )


PAGES = pages()


def without_code(text):
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "Code", text)


def anchors(path):
    """The addresses within a page, by GitHub's rule: those of headings, and those set by hand."""
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r'<a id="([^"]+)">', text))
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        found.add(heading_id(heading, headings))
    return found


def links(path):
    """The links of a page: [text](target), [name]: target, and HTML's."""
    text = without_code(path.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text)
    found += re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    return found + re.findall(r'(?:href|src)="([^"]+)"', text)


def test_every_link_leads_to_a_file_and_a_place_in_it():
    assert len(PAGES) >= 20
    for page in PAGES:
        for link in links(page):
            if re.match(r"https?://|mailto:", link):
                assert re.fullmatch(r"https?://[\w.-]+\.\w+(/\S*)?", link), f"{page}: {link}"
                continue
            if link.startswith("../../actions/"):
                continue  # GitHub's own pages beside the repository
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {link}"
            if anchor and path.suffix == ".md":
                assert anchor in anchors(path), f"{page.name}: {link}"
            elif anchor:  # a line of code
                (number,) = re.fullmatch(r"L(\d+)", anchor).groups()
                assert int(number) <= len(path.read_text().splitlines()), f"{page.name}: {link}"
            count("links followed")


def test_pages_lead_to_each_other():
    """Every page can be reached from the README."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file():
                todo.append(target)
    assert {page for page in PAGES if page.parent != ROOT / ".github"} <= reached
    count("pages that can be reached from the README", len(reached))


def sentences(path):
    text = re.sub(r"<!--.*?-->", "\n\n", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = without_code(text)
    text = re.sub(r"^\s*(\||#|\[[^\]]+\]: |!\[).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"<[^>]+>", "", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        words = " ".join(paragraph.split())
        yield from re.split(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*]*[A-Z\d])", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_endless(page):
    # What a bench writes says under which conditions it measured, one after the other.
    for sentence in sentences(page):
        if not sentence.startswith(("The same for all:", "Measured on")):
            words = re.findall(r"[\w'/%.,-]*\w[\w'/%.,-]*", sentence)
            assert len(words) <= MOST_WORDS, f"{page.name}: {sentence}"
            count("sentences")


def test_what_is_no_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n\n[a](none.md) [b](#a-b-c) `[c](code)`\n\n[d]: e.md\n")
    assert links(page) == ["none.md", "#a-b-c", "e.md"]
    assert anchors(page) == {"a-b-c"}
    page.write_text("One two. Three (four) five? Six.\n\n| seven |\n- Eight\n- Nine\n")
    assert [*sentences(page)] == ["One two.", "Three (four) five?", "Six.", "- Eight", "- Nine"]
