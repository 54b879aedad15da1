"""Writes the README in other languages, README.ko.md: `python -m docs.page.readme`."""

from common import ROOT
from common.messages import clear_messages
from docs.page.rewrite import markdown
from docs.page.texts import LANGUAGES, Texts

import re

# Between the two, README.md and its translations link to each other.
SWITCH = re.compile(r"^<!-- languages -->.*?<!-- end -->$", re.MULTILINE | re.DOTALL)
NAMES = {"en": "README.md", "ko": "README.ko.md"}


def switch(language: str) -> str:
    """Return the line that leads to the other languages."""
    names = [
        LANGUAGES[each] if each == language else f"[{LANGUAGES[each]}]({NAMES[each]})"
        for each in NAMES
    ]
    return f"<!-- languages -->\n{' · '.join(names)}\n<!-- end -->"


def translated(texts: Texts) -> str:
    """Return the README in a language."""
    texts.page = "README"
    source = (ROOT / "README.md").read_text(encoding="utf-8")
    before, after = SWITCH.split(source)
    return markdown(before, texts) + switch(texts.language) + markdown(after, texts)


def main() -> None:
    """Write the README of each language but English."""
    for language, name in NAMES.items():
        if language != "en":
            (ROOT / name).write_text(translated(Texts(language)), encoding="utf-8")
            print(f"{name} is written.")


if __name__ == "__main__":
    with clear_messages():
        main()
