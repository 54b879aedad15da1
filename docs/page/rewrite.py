"""Markdown and comments in another language: the texts are translated, all else stays as it is."""

from docs.page.texts import Texts

import re
import unicodedata
from typing import Any

from markdown_it import MarkdownIt

COLUMNS = 88  # of a comment in code
SHELL = ("sh", "bash")
LEFT = ("[![", "<!--")  # how lines begin that hold no text: badges, marks


def markdown(source: str, texts: Texts) -> str:
    """Return a page of Markdown with its texts translated.

    A text is a heading, a paragraph, an item of a list or a table's cell. It stands on one line
    then; code, the bars of tables, pictures and HTML stay as they are.
    """
    lines: list[Any] = list(source.split("\n"))  # None: what went into the line before
    cells: dict[int, list[str]] = {}
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.map is None:
            continue
        begin, end = token.map
        if token.type == "fence" and token.info in SHELL:
            lines[begin + 1 : end - 1] = shell("\n".join(lines[begin + 1 : end - 1]), texts).split(
                "\n"
            )
        if token.type != "inline":
            continue
        first = str(lines[begin])
        if first.startswith("|"):
            cells.setdefault(begin, []).append(texts(token.content))
        elif not token.content.startswith(LEFT):
            prefix = re.match(r"\s*(?:#+ |[-*] |\d+\. )?", first)
            lines[begin] = f"{prefix[0] if prefix else ''}{texts(token.content)}"
            lines[begin + 1 : end] = [None] * (end - begin - 1)
    for number, row in cells.items():
        lines[number] = f"| {' | '.join(row)} |"
    return "\n".join(line for line in lines if line is not None)


def shell(code: str, texts: Texts) -> str:
    """Return commands with their comments translated; the commands stay where they are."""
    return re.sub(r"(?<=# ).+$", lambda found: texts(found[0]), code, flags=re.MULTILINE)


def comments(code: str, texts: Texts, mark: str = "#: ") -> str:
    """Return code with its comments translated: runs of lines that begin with `mark`."""

    def translate(run: re.Match) -> str:
        indent = run[1]
        told = " ".join(
            line.strip().removeprefix(mark.strip()).strip() for line in run[0].split("\n")
        )
        if texts.language == "en":
            texts(told)
            return run[0]
        return "\n".join(
            f"{indent}{mark}{line}" for line in wrapped(texts(told), COLUMNS - len(indent) - 3)
        )

    return re.sub(rf"^([ ]*){mark}.*(?:\n\1{mark}.*)*", translate, code, flags=re.MULTILINE)


def wrapped(text: str, columns: int) -> list[str]:
    """Break a text into lines; a Korean syllable is two columns wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if width(longer) > columns and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
