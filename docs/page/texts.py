"""The page's texts in other languages, each under its English one, in docs/page/locale/*.po.

`python -m docs.page.texts LANGUAGE` writes the file of a language anew: a text that is new gets an
empty translation, one that is gone goes. The key is the English text itself, so that a changed
paragraph is shown in English, never in an old translation.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

LOCALE = Path(__file__).parent / "locale"
LANGUAGES = {"en": "English", "ko": "한국어"}
EXACT = re.compile(r"`[^`]+`|\]\([^)]+\)|\d[\d,.]*\d|\d")  # code, link targets, numbers


class Texts:
    """A language's texts by the English ones; called with a text, it gives the translation.

    `missing` collects what was asked for and not found.
    """

    def __init__(self, language: str, catalog: Path | None = None) -> None:
        self.language = language
        self.known: dict[str, str] = {}
        self.used: set[str] = set()
        self.missing: set[str] = set()
        path = catalog or LOCALE / f"{language}.po"
        if path.exists():
            with path.open("rb") as file:
                found = [m for m in read_po(file) if m.id and m.string and not m.fuzzy]
            self.known = {m.id: m.string for m in found}

    def __call__(self, text: str) -> str:
        key = " ".join(text.split())
        if not re.search(r"[A-Za-z]{2}", re.sub(r"`[^`]*`", "", key)):
            return text  # code and numbers alone
        self.used.add(key)
        if key not in self.known:
            self.missing.add(key)
        return self.known.get(key, text)

    def broken(self) -> list[str]:
        """Return the texts whose translation has other code, numbers or link targets."""
        parts = (
            (key, Counter(EXACT.findall(key)), Counter(EXACT.findall(text)))
            for key, text in self.known.items()
        )
        return [key for key, ours, theirs in parts if ours != theirs]


def translated() -> list[str]:
    """Return the languages of the site: English, and each one that has translations."""
    return [name for name in LANGUAGES if name == "en" or Texts(name).known]


def update(language: str, used: set[str]) -> Path:
    """Write the file of a language: a key for each used text, with its translation if any."""
    path, texts = LOCALE / f"{language}.po", Texts(language)
    LOCALE.mkdir(exist_ok=True)
    catalog = Catalog(language)
    for key in sorted(used):
        catalog.add(key, texts.known.get(key, ""))
    with path.open("wb") as file:
        write_po(file, catalog, width=100, omit_header=True)  # a header has the time in it
    return path


if __name__ == "__main__":
    from docs.page.build import build

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        used = build(Path(folder), "")["en"].used
    print(f"{update(sys.argv[1], used)}: {len(used)} texts.")
