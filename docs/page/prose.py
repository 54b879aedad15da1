"""Pages in Markdown as HTML: translated before they are parsed, with links to other pages."""

from common import ROOT, SIDES, THIRD
from common.proof.lessons import lessons
from docs.page.lessons import LETTER, PYTHON
from docs.page.rewrite import SHELL, shell
from docs.page.texts import Texts

import re
from pathlib import PurePosixPath

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import BashLexer, DiffLexer, TextLexer

LEXERS = {"python": PYTHON, "sh": BashLexer(), "bash": BashLexer(), "diff": DiffLexer()}
TOP = {"README.md": "index.html", "CONTRIBUTING.md": "contributing.html"}


def markdown(texts: Texts, source: str) -> MarkdownIt:
    """Return a renderer; its `env` must say in which `folder` of the repository the page lies.

    `source` is the address of the repository's files, for what is no page.
    """
    # HTML in a page is ours: details, anchors and tables. It is shown as it is.
    md = MarkdownIt("commonmark", {"highlight": code}).enable("table")

    def translate(state):
        for token in state.tokens:
            if token.type == "inline":
                token.meta["english"] = token.content
                token.content = texts(token.content)
            if token.type == "fence" and token.info in SHELL:
                token.content = shell(token.content, texts)

    def lead(state):
        ids: list[str] = []
        for token in state.tokens:
            if token.type == "table_open":  # it scrolls by itself where it is too wide
                token.attrSet("tabindex", "0")
        for opening, inline in zip(state.tokens, state.tokens[1:], strict=False):
            if opening.type == "heading_open":
                # In every language the same, or no link would find it.
                opening.attrSet("id", heading_id(inline.meta["english"], ids))
        for token in (child for parent in state.tokens for child in parent.children or []):
            for name in ("href", "src"):
                if url := token.attrGet(name):
                    token.attrSet(
                        name, target(str(url), state.env["folder"], source, texts.language)
                    )
            if token.type == "image":
                token.attrs |= {"loading": "lazy", "alt": token.content}

    md.core.ruler.before("inline", "translate", translate)
    md.core.ruler.push("lead", lead)
    return md


def heading_id(text: str, ids: list[str]) -> str:
    """Return a heading's address, by GitHub's rule; `ids` are those that the page has already."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).strip().lower()
    slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
    ids.append(slug)
    return slug if ids.count(slug) == 1 else f"{slug}-{ids.count(slug) - 1}"


def code(text: str, language: str, _attributes: str) -> str:
    lexer = LEXERS.get(language, TextLexer())
    colored = highlight(text, lexer, HtmlFormatter(nowrap=True))
    return f'<pre class="plate" tabindex="0"><code>{colored}</code></pre>'


def target(url: str, folder: str, source: str, language: str) -> str:
    """Return where a link leads: to our pages and their lines, or to the file's own place.

    ValueError where there is no such file.
    """
    if re.match(r"[a-z]+:|#|\.\./\.\./actions/", url):
        return url
    path, _, place = url.partition("#")
    parts: list[str] = []
    for part in PurePosixPath(folder, path).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    name = "/".join(parts)
    if not (ROOT / name).exists():
        raise ValueError(f"a link leads nowhere: {url} from {folder or 'README.md'}")
    stem, anchor = PurePosixPath(name).stem, f"#{place}" if place else ""
    if name in TOP:
        return f"{TOP[name]}{anchor}"
    if parts[0] == "docs" and name.endswith(".md") and len(parts) == 2:
        return f"{stem}.html{anchor}"
    for lesson, third in THIRD.items():
        if name == third:
            return f"{lesson}.html" + (anchor.replace("#L", "#T") or "#trainer")
    if parts[0] in SIDES and stem in lessons():
        letter = LETTER[parts[0]]
        return f"{stem}.html" + (anchor.replace("#L", f"#{letter}") or f"#{parts[0]}")
    if name.endswith((".png", ".svg")):
        return ("" if language == "en" else "../") + name.removeprefix("docs/")
    return f"{source}/{name}{anchor}"


def split_page(page: str) -> tuple[str, str, dict[str, list[str]], str]:
    """Return a lesson's page as title, beginning, what each cell does on each side, the rest."""
    table = re.search(r"^\| cell \|.*?\n\n", page, re.MULTILINE | re.DOTALL)
    if table is None:
        raise ValueError(f"this page has no table of cells: {page[:60]}")
    title, start = page[: table.start()].split("\n", 1)
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]
    does = {row[0]: row[1:] for row in rows if len(row) >= 3}
    return title.lstrip("# "), start, does, page[table.end() :]
