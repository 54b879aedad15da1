"""The page's texts in other languages, each under its English one, in docs/page/locale/LANGUAGE/.

`python -m docs.page.texts LANGUAGE` writes a language's files anew, one for each page that is
complete: a text that is new gets an empty translation, one that is gone goes. The key is the
English text itself, so that a changed paragraph is shown in English, never in an old translation.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

LOCALE = Path(__file__).parent / "locale"
LANGUAGES = {"en": "English", "ko": "한국어"}
# The pages of which every text is translated. This list may only grow.
COMPLETE = {
    "ko": (
        "index", "cifar", "fashion", "callbacks", "resume", "optimize", "ledger", "README",
        "notebooks",
    ),
}  # fmt: skip
# Code, link targets, places for numbers, numbers.
EXACT = re.compile(r"`[^`]+`|\]\([^)]+\)|\{\w+\}|\d[\d,.]*\d|\d")


class Texts:
    """A language's texts by the English ones; called with a text, it gives the translation.

    `page` is the page that is being written, `pages` has the texts that each page asked for, in
    their order, and `missing` what was not found.
    """

    def __init__(self, language: str, folder: Path | None = None) -> None:
        self.language = language
        self.page = ""
        self.known: dict[str, str] = {}
        self.pages: dict[str, dict[str, None]] = {}
        self.missing: set[str] = set()
        for path in sorted((folder or LOCALE / language).glob("*.po")):
            with path.open("rb") as file:
                found = [m for m in read_po(file) if m.id and m.string and not m.fuzzy]
            self.known |= {m.id: m.string for m in found}

    def __call__(self, text: str) -> str:
        key = " ".join(text.split())
        if not re.search(r"[A-Za-z]{2}", re.sub(r"`[^`]*`", "", key)):
            return text  # code and numbers alone
        self.pages.setdefault(self.page, {})[key] = None
        if key not in self.known:
            self.missing.add(key)
        return self.known.get(key, text)

    @property
    def used(self) -> set[str]:
        """All texts that were asked for."""
        return {key for page in self.pages.values() for key in page}

    def is_complete(self, page: str) -> bool:
        """Tell whether every text of a page is translated; of slides, whether its lesson's are."""
        wanted = COMPLETE.get(self.language, ())
        return self.language == "en" or page.removesuffix("-slides") in wanted

    def broken(self) -> list[str]:
        """Return the texts whose translation has other code, numbers or link targets."""
        parts = (
            (key, Counter(EXACT.findall(key)), Counter(EXACT.findall(text)))
            for key, text in self.known.items()
        )
        return [key for key, ours, theirs in parts if ours != theirs]


def translated() -> dict[str, Texts]:
    """Return the languages of the site: English, and each one that has translations."""
    found = {name: Texts(name) for name in LANGUAGES}
    return {name: texts for name, texts in found.items() if name == "en" or texts.known}


def update(language: str, pages: dict[str, dict[str, None]]) -> list[Path]:
    """Write the files of a language, one for each complete page, and return them.

    `pages` has the texts of each page. A file has those of its page that no file before it has, in
    their order, each with its translation, if any.
    """
    texts, paths, done = Texts(language), [], set[str]()
    (LOCALE / language).mkdir(parents=True, exist_ok=True)
    for page in COMPLETE[language]:
        catalog = Catalog(language)
        for key in (*pages.get(page, {}), *pages.get(f"{page}-slides", {})):
            if key not in done:
                catalog.add(key, texts.known.get(key, ""))
                done.add(key)
        paths.append(LOCALE / language / f"{page}.po")
        with paths[-1].open("wb") as file:
            write_po(file, catalog, width=100, omit_header=True)  # a header has the time in it
    return paths


def all_texts() -> dict[str, dict[str, None]]:
    """Return the English texts of each page, of the README and of the notebooks."""
    from docs.page import notebooks, readme
    from docs.page.build import build

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        texts = build(Path(folder), "")["en"]
    readme.translated(texts)
    for lesson in notebooks.of_language("ko"):
        notebooks.notebook(lesson, texts)
    return texts.pages


if __name__ == "__main__":
    written = update(sys.argv[1], all_texts())
    untold = sum(path.read_text("utf-8").count('msgstr ""\n\n') for path in written)
    print(f"{LOCALE.name}/{sys.argv[1]}: {len(written)} files, {untold} texts to translate.")
