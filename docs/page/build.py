"""Builds the website: `python -m docs.page.build [--out FOLDER] [--source URL]`, or `make page`.

Each lesson's two scripts side by side, the ledger, the pages of docs/, and each lesson as slides.
Everything is read from the files that the tests hold true. A page needs nothing but itself, its
style and its pictures: no request leaves the folder. Without JavaScript only the filters and the
arrow keys are missing.
"""

from common import ROOT, SIDES, figures
from common.exercises.catalog import KINDS, of_lesson, parts
from common.exercises.catalog import exercises as every
from common.messages import Parser, clear_messages
from common.proof import hooks
from common.proof.lessons import lessons
from docs.page.lessons import LETTER, Lesson, Row, read_ledger, read_lesson
from docs.page.prose import markdown, split_page
from docs.page.readme import SWITCH
from docs.page.texts import LANGUAGES, Texts, translated

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

HERE = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["repository"]
# Pages that are no lesson, in the order in which the menu names them.
PAGES = ("ledger", "hooks", "exercises", "pitfalls", "doctor", "migration", "glossary")
# The minutes that a lesson takes, and what it asks for: a beginner, or someone who trains already.
LEVELS = {
    "cifar": (20, "first steps"),
    "fashion": (30, "first steps"),
    "callbacks": (30, "first steps"),
    "when": (30, "intermediate"),
    "resume": (45, "advanced"),
    "optimize": (45, "intermediate"),
    "gan": (30, "advanced"),
    "tokens": (40, "intermediate"),
    "parallel": (60, "advanced"),
    "fabric": (30, "intermediate"),
    "predict": (20, "intermediate"),
    "speed": (30, "intermediate"),
    "finetune": (30, "intermediate"),
}


def build(out: Path, source: str) -> dict[str, Texts]:
    """Write all pages of all languages to `out`; return the texts of each language.

    `source` is the address of the repository's files. What stood in `out` before is removed.
    """
    shutil.rmtree(out, ignore_errors=True)
    ledger = read_ledger()
    pairs = {name: read_lesson(name, ledger) for name in lessons()}
    catalogs = translated()
    names = {language: LANGUAGES[language] for language in catalogs}
    for texts in catalogs.values():
        _write_language(out, source.rstrip("/"), texts, names, ledger, pairs)
    for name in ("style.css", "filter.js", "slides.js", "languages.js"):
        shutil.copyfile(HERE / name, out / name)
    for picture in sorted((ROOT / "docs").rglob("*.png")):
        place = out / picture.relative_to(ROOT / "docs")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, place)
    return catalogs


def _write_language(
    out: Path,
    source: str,
    texts: Texts,
    languages: dict[str, str],
    ledger: list[Row],
    pairs: dict[str, Lesson],
) -> None:
    """Write the pages of one language: English at the top, others in a folder of their own."""
    language = texts.language
    folder, md = out / ("" if language == "en" else language), markdown(texts, source)
    folder.mkdir(parents=True, exist_ok=True)
    # A comment in code is prose with names in it: `backticks` mark code, all else is text.
    names_only = MarkdownIt("zero").enable("backticks")

    def note(text: str) -> Markup:
        return Markup(names_only.renderInline(texts(text)))

    def render(text: str, place: str) -> Markup:
        return Markup(md.render(text, {"folder": place}))

    env = Environment(loader=FileSystemLoader(HERE / "templates"), undefined=StrictUndefined,
                      autoescape=True, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    env.globals |= {
        "_": texts,
        "inline": lambda text: Markup(md.renderInline(text, {"folder": ""})),
        "note": note,
        "render": render,
        "text": lambda text: Markup("".join(_paragraph(note, part) for part in parts(text))),
        "language": language,
        "languages": languages,
        "source": source,
        "lessons": list(pairs),
        "pages": PAGES,
        "SIDES": SIDES,
        "KINDS": KINDS,
        "LETTER": LETTER,
        "NAMES": figures.SIDES | {"trainer": "Trainer"},
        "up": "" if language == "en" else "../",
        "version": PROJECT["version"],
    }

    def write(name: str, template: str, **values: Any) -> None:
        kind, texts.page = template.removesuffix(".html"), name
        values["is_complete"] = texts.is_complete(name)
        page = env.get_template(template).render(page=name, kind=kind, **values)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")

    for name, lesson in pairs.items():
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        title, start, does, rest = split_page(text)
        values = dict(lesson=lesson, does=does, title=title, rows=lesson.rows)
        write(name, "lesson.html", start=start, rest=rest, exercises=of_lesson(name), **values)
        write(f"{name}-slides", "slides.html", **values)
    for path in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"):
        if path.stem not in pairs and path.stem != "ledger":
            title, text = path.read_text(encoding="utf-8").split("\n", 1)
            place = "docs" if path.parent.name == "docs" else ""
            write(path.stem.lower(), "prose.html", title=title.lstrip("# "), body=text,
                  place=place)  # fmt: skip
    write("ledger", "ledger.html", ledger=ledger, title="The ledger")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = SWITCH.sub("", readme.split("\n## ")[0].split("\n", 1)[1])
    intro = re.sub(r"^\[!\[.*\n", "", start, flags=re.MULTILINE)
    about = dict(
        re.findall(r"^\| \[(\w+)\]\(docs/\w+\.md\) \|.*\| (.+?) \|$", readme, re.MULTILINE)
    )
    if list(about) != list(pairs):
        raise ValueError(f"README lists other lessons than there are: {list(about)}")
    proof = json.loads((ROOT / "docs" / "cifar" / "parity.json").read_text(encoding="utf-8"))
    write("index", "index.html", title="Plain and Lightning", about=about, levels=LEVELS,
          intro=intro, proof=proof, curves=curves(proof),
          behaviours=len(ledger), exercises=len(every()),
          moments=len(re.findall(r"^\| ", hooks.PAGE.read_text("utf-8"), re.MULTILINE)) - 2,
          pitfalls=(ROOT / "docs" / "pitfalls.md").read_text("utf-8").count("\n## "))  # fmt: skip


def _paragraph(note: Callable[[str], Markup], part: str) -> str:
    """Return a paragraph as HTML; one that is indented becomes a list of its lines."""
    if part.startswith("    "):
        lines = "".join(f"<li>{note(line.strip())}</li>" for line in part.splitlines())
        return f"<ul>{lines}</ul>"
    return f"<p>{note(' '.join(part.split()))}</p>"


def curves(proof: dict[str, Any], width: int = 640, height: int = 220) -> dict[str, str]:
    """Return the loss curves of both sides as points of an SVG polyline, by side."""
    most = max(x for side in SIDES for x in proof["losses"][side] if x is not None)
    points = {}
    for side in SIDES:
        losses = proof["losses"][side]
        step = width / max(1, len(losses) - 1)
        points[side] = " ".join(
            f"{n * step:.1f},{height * (1 - x / most):.1f}"
            for n, x in enumerate(losses)
            if x is not None
        )
    return points


def main(argv: list[str]) -> None:
    parser = Parser(prog="docs.page.build", description="Build the website.")
    parser.add_argument("--out", type=Path, default=ROOT / "site", metavar="FOLDER")
    parser.add_argument("--source", default=f"{REPOSITORY}/blob/main", metavar="URL",
                        help="where the repository's files can be read")  # fmt: skip
    arguments = parser.parse_args(argv)
    for language, texts in build(arguments.out, arguments.source).items():
        untold = "" if language == "en" else f", {len(texts.missing)} shown in English"
        print(f"{LANGUAGES[language]}: {len(texts.used)} texts{untold}.")
    print(f"Open {arguments.out / 'index.html'}")


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
