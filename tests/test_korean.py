"""The Korean edition says what the English one says, as far as a program can tell."""

from common import ROOT
from docs.page import notebooks, readme, texts
from docs.page.build import build
from docs.page.korean import AGREED, GLOSSARY, STYLE, faults, particles, refused
from docs.page.lessons import read_cells
from docs.page.rewrite import comments, markdown, shell, width, wrapped
from docs.page.texts import COMPLETE, LOCALE, Texts, all_texts, update

import ast
import re
import shutil

import pytest
from babel.messages.pofile import read_po
from helpers import count

KO = Texts("ko")


@pytest.fixture(scope="module")
def used():
    return all_texts()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build(out, "https://example.org/blob/main")
    return out


def entries(page):
    with (LOCALE / "ko" / f"{page}.po").open("rb") as file:
        return [message for message in read_po(file) if message.id]


# Each text of a complete page has a translation, and no other has one.


def test_the_complete_pages_are_complete(used):
    """The list may only grow."""
    assert set(COMPLETE["ko"]) >= {
        "README", "index", "ledger", "cifar", "fashion", "callbacks", "resume", "optimize",
        "notebooks",
    }  # fmt: skip
    for page in COMPLETE["ko"]:
        wanted = {*used[page], *used.get(f"{page}-slides", {})}
        assert len(wanted) > 8 and wanted <= set(KO.known), wanted - set(KO.known)
        count("Korean texts on complete pages", len(wanted))


def test_no_entry_is_stale_fuzzy_or_twice(used):
    every = {key for page in used.values() for key in page}
    found = [message for page in COMPLETE["ko"] for message in entries(page)]
    assert {path.stem for path in (LOCALE / "ko").glob("*.po")} == set(COMPLETE["ko"])
    assert len(found) == len({message.id for message in found}) > 900
    for message in found:
        assert message.id in every and message.string and not message.fuzzy, message.id
        count("Korean entries")


def test_writing_the_files_anew_changes_nothing(used, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LOCALE", tmp_path)
    shutil.copytree(LOCALE / "ko", tmp_path / "ko")
    for path in update("ko", used):
        assert path.read_bytes() == (LOCALE / "ko" / path.name).read_bytes(), path.name


def test_a_changed_paragraph_is_shown_in_english():
    english = "Gradients add up until they are cleared."
    assert KO(english) != english
    changed = "Gradients add up until someone clears them."
    fresh = Texts("ko")
    assert fresh(changed) == changed and fresh.missing == {changed}


def test_a_changed_paragraph_is_noticed(used, tmp_path, monkeypatch):
    """An edited English paragraph is a missing key, and leaves a stale one."""
    key = next(key for key in used["cifar"] if key.startswith("**The order of a step.**"))
    edited = {page: dict.fromkeys(keys) for page, keys in used.items()}
    for keys in edited.values():
        if key in keys:
            keys[f"{key} And more."] = keys.pop(key)
    assert f"{key} And more." not in KO.known
    assert key not in {each for page in edited.values() for each in page}
    # The files written anew: the paragraph waits for its translation, and the old one is gone.
    monkeypatch.setattr(texts, "LOCALE", tmp_path)
    shutil.copytree(LOCALE / "ko", tmp_path / "ko")
    update("ko", edited)
    now = Texts("ko", tmp_path / "ko").known
    assert key not in now and f"{key} And more." not in now and len(now) == len(KO.known) - 1


# What is said.


def test_code_numbers_and_links_are_the_same():
    assert KO.broken() == []


def test_no_translation_has_a_fault():
    for english, korean in KO.known.items():
        assert not faults(english, korean), (faults(english, korean), korean)
        count("Korean texts without a fault")


PLANTED = {
    "another number": ("It takes 512 images.", "이미지 513장을 받습니다."),
    "a number more": ("One image of a batch.", "배치의 이미지 1장."),
    "other code": ("`step` is called.", "`fit`을 부릅니다."),
    "a dropped link": ("See [the page](a.md).", "글을 보세요."),
    "another link": ("See [the page](a.md).", "[글](b.md)을 보세요."),
    "a lost place": ("{n} pitfalls", "함정들"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found(name):
    english, korean = PLANTED[name]
    planted = Texts("en")
    planted.known = {english: korean}
    assert planted.broken() == [english]
    count("planted mistakes in Korean")


def test_each_refused_word_is_found():
    words = refused()
    assert len(words) >= 40
    for word in words:
        said = word.removesuffix("하다") + "합니다" if word.endswith("하다") else f"{word}입니다"
        assert any(word in each for each in faults("x", f"이것은 {said}."))
        count("planted mistakes in Korean")
    assert not faults("x", "하이퍼파라미터와 우선순위와 크로스입니다.")


STYLES = {
    "a passive with 에 의해": "Trainer에 의해 불립니다.",
    "a double passive": "손실이 계산되어집니다.",
    "a pronoun": "우리는 학습합니다.",
    "two particles at once": "손실은(는) 줄어듭니다.",
    "a plain ending": "손실을 출력한다.",
    "하십시오": "입력하십시오.",
    "a space before a particle": "`loss` 를 봅니다.",
    "a space before (english)": "변화도 (gradient)를 봅니다.",
    "a letter that ruff refuses": "\u2018손실\u2019입니다.",
    "bold that does not close": "**평가 모드(eval mode)**로 바꿉니다.",
}


@pytest.mark.parametrize("name", STYLES)
def test_each_mistake_of_style_is_found(name):
    assert set(STYLES) >= set(STYLE)
    assert name in faults("x", STYLES[name])
    count("planted mistakes in Korean")


SAID = {
    "gradients?": ("The gradients add up.", "기울임이 누적됩니다."),
    "lessons?": ("The lesson has six cells.", "이 수업은 셀이 여섯 개입니다."),
    "twin": ("Its twin grades it.", "다른 쪽이 채점합니다."),
    "(?<!Without )(?<!no )networks?": ("The network learns.", "모델이 배웁니다."),
}


@pytest.mark.parametrize("term", SAID)
def test_a_term_that_is_not_said_as_agreed_is_found(term):
    english, korean = SAID[term]
    assert [f"'{term}' is not said as agreed: {AGREED[term]}"] == faults(english, korean)
    count("planted mistakes in Korean")


def test_the_agreed_terms_are_those_of_the_glossary():
    glossary = GLOSSARY.read_text(encoding="utf-8")
    for said in AGREED.values():
        first = said.split("|")[0]
        assert first in glossary or first in ("힌트", "디스크", "비트 단위로"), first
        count("agreed terms")


@pytest.mark.parametrize("text", ["`step`를 부릅니다", "`zero_grad`을 부릅니다", "`loss`은 줄고"])
def test_a_particle_that_does_not_fit_is_found(text):
    assert len(particles(text)) == 1
    assert not particles("`step`을, `zero_grad`를, `loss`는, `t.step`이, train이")


# Where it is shown.


def test_the_readme_is_current():
    """`python -m docs.page.readme` would change nothing."""
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    korean = (ROOT / "README.ko.md").read_text(encoding="utf-8")
    assert korean == readme.translated(Texts("ko"))
    assert "(README.ko.md)" in english and "[English](README.md)" in korean
    for kind in (r"^#+ ", r"^```", r"^\| ", r"\]\((?!README)[^)]+\)", r"`[^`\n]+`"):
        found = [len(re.findall(kind, text, re.MULTILINE)) for text in (english, korean)]
        assert found[0] == found[1], (kind, found)
    # What a program prints, and code, stand in English.
    fences = [
        re.findall(r"^```\w*\n.*?^```", text, re.MULTILINE | re.DOTALL)
        for text in (english, korean)
    ]
    for ours, theirs in zip(*fences, strict=True):
        assert [re.sub(r"# .*", "", line) for line in ours.splitlines()] == [
            re.sub(r"# .*", "", line) for line in theirs.splitlines()
        ]
        count("blocks of code in the Korean README")


def test_the_korean_notebooks_are_current_and_have_the_same_code():
    names = notebooks.of_language("ko")
    assert names == ["cifar", "fashion", "callbacks", "resume", "optimize"]
    for name in names:
        path = notebooks.FOLDER / "ko" / f"{name}.ipynb"
        assert path.read_text(encoding="utf-8") == notebooks.text(name, "ko"), name
        ours, theirs = (
            notebooks.notebook(name, Texts(language)).cells for language in ("en", "ko")
        )
        assert [cell.cell_type for cell in ours] == [cell.cell_type for cell in theirs]
        for a, b in zip(ours, theirs, strict=True):
            if a.cell_type == "code" and not a.source.startswith("!") and "!git" not in a.source:
                head, codes = (
                    a.source.partition("\n")[0],
                    [re.sub(r"^%%\w+\n", "", cell.source) for cell in (a, b)],
                )
                assert ast.dump(ast.parse(codes[0])) == ast.dump(ast.parse(codes[1])), head
                lines = b.source.splitlines()
                assert all(width(line) <= 90 for line in lines if line.lstrip().startswith("#"))
                count("cells with the same code in both languages")
        prose = "\n".join(cell.source for cell in theirs if cell.cell_type == "markdown")
        for link in re.findall(r"\]\((?!http)([^)#]+)", prose):
            assert (path.parent / link).resolve().exists(), link
            count("links in Korean notebooks")


def test_every_line_has_the_same_address_in_both(site):
    """Notes are translated, and nothing moves."""
    for page in ("cifar", "optimize"):
        ids = [
            re.findall(r'\bid="([^"]+)"', (site / folder / f"{page}.html").read_text("utf-8"))
            for folder in ("", "ko")
        ]
        assert ids[0] == ids[1] and len(ids[0]) > 200
        count("addresses in both languages", len(ids[0]))
    notes = [
        line.note for cell in read_cells((ROOT / "plain/cifar.py").read_text("utf-8")).values()
        for line in cell if line.note
    ]  # fmt: skip
    assert len(notes) >= 10 and all(KO(note) != note for note in notes)


def test_a_page_says_where_it_is_not_translated(site):
    told = KO("Not all of this page is translated yet. What is missing is shown in English.")
    for path in (site / "ko").glob("*.html"):
        page = path.read_text(encoding="utf-8")
        complete = path.stem.removesuffix("-slides") in COMPLETE["ko"]
        assert (told in page) != complete, path.stem
        assert (' tabindex="-1" lang="en">' in page.split("<main")[1][:200]) != complete
        count("pages in Korean")


def test_markdown_keeps_what_is_no_text():
    class Shout(Texts):
        def __call__(self, text):
            return text.upper()

    page = (
        "# A `b`\n\nOne\ntwo.\n\n- three\n- four\n  five\n\n| a | b |\n| --- | --- |\n| c | d |\n\n"
        "```sh\nmake  # run it\n```\n\n```python\nx = 1  # one\n```\n\n[![x](y)](z)\n\n<b>\n</b>\n"
    )
    assert markdown(page, Shout("xx")) == (
        "# A `B`\n\nONE\nTWO.\n\n- THREE\n- FOUR\nFIVE\n\n| A | B |\n| --- | --- |\n| C | D |\n\n"
        "```sh\nmake  # RUN IT\n```\n\n```python\nx = 1  # one\n```\n\n[![x](y)](z)\n\n<b>\n</b>\n"
    )
    assert shell("make a  # b\nmake c", Shout("xx")) == "make a  # B\nmake c"
    code = "def f():\n    #: one\n    #: two\n    x = 1  # kept\n    #: three\n"
    assert comments(code, Shout("xx")) == (
        "def f():\n    #: ONE TWO\n    x = 1  # kept\n    #: THREE\n"
    )
    assert wrapped("가나 다라 마", 6) == ["가나", "다라", "마"] and wrapped("a b c", 3) == [
        "a b",
        "c",
    ]
