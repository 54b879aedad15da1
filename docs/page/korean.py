"""What a Korean translation must not do: `faults(english, korean)` names it.

The terms are those of docs/page/locale/ko/glossary.tsv: one English term, one Korean term. A word
that the glossary refuses with a cross is refused here. That a sentence means the same, no program
can tell.
"""

from docs.page.texts import LOCALE

import csv
import functools
import re

from markdown_it import MarkdownIt

GLOSSARY = LOCALE / "ko" / "glossary.tsv"
# Where a refused word is also a part of others.
WITHIN = {
    "로스": r"(?<![가-힣])로스",
    "파라미터": r"(?<!하이퍼)파라미터",
    "로드하다": r"로드[하되한할해합]",
    "기차": r"(?<![가-힣])기차",
    "시대": r"(?<![가-힣])시대",
    "순위": r"(?<!우선)순위",
    "인수": r"(?<![가-힣])인수",
}
STYLE = {
    "a passive with 에 의해": r"에 의(해|하여)",
    "a double passive": r"(되어|지어)[지집진져]|여지다",
    "a pronoun": r"(?<![가-힣])(우리|당신|여러분)(는|가|의|를|도)?(?![가-힣])",
    "two particles at once": r"[은이을와]\((는|가|를|과)\)",
    "a plain ending": r"(?<!니)다\.(?=\s|$)",
    "하십시오": r"하십시오",
    "a space before a particle": r"`\s+(은|는|이|가|을|를|의|에|로|으로|와|과|도|만)(?=[\s,.])",
    "a space before (english)": r"[가-힣]\s\([a-z]+\)",
    "a letter that ruff refuses": "[\u2018\u2019\u2013\u00d7\uff1a\uff0c\u3002]",
}
# Terms with one sense on these pages, and how they are said. All others are a reader's matter.
AGREED = {
    r"gradients?": "변화도",
    r"optimizers?": "옵티마이저|optimizer",
    r"learning rates?": "학습률",
    r"checkpoints?": "체크포인트|체크포인터",
    r"epochs?": "에폭|epoch",
    r"batch(es)?": "배치|batch",
    r"dropout": "드롭아웃",
    r"momentum": "모멘텀",
    r"(validation|validates?|validated)": "검증",
    r"accurac(y|ies)": "정확도",
    r"confusion matri(x|ces)": "혼동 행렬",
    r"seeds?": "시드",
    r"lessons?": "단원",
    r"ledger": "장부",
    r"hooks?": "훅",
    r"callbacks?": "콜백|callbacks",
    r"weight decay": "가중치 감쇠|감쇠",
    r"early stopping": "조기 종료",
    r"labels?": "레이블",
    r"samplers?": "샘플러",
    r"pitfalls?": "함정",
    r"doctor": "진단 도구",
    r"twin": "짝",
    r"loss(es)?": "손실|return loss",
    r"hints?": "힌트",
    r"BatchNorm": "BatchNorm",
    r"(?<!Without )(?<!no )networks?": "신경망",
    r"process(es)?": "프로세스",
    r"devices?": "장치",
    r"dis[ck]s?": "디스크",
    r"progress bar": "진행 표시줄",
    r"moving average": "이동 평균",
    r"bit for bit": "비트 단위로",
    r"schedules?": "스케줄",
    r"step": "스텝|step|밟",
}
# How the last syllable of a name sounds: closed by a consonant, by ㄹ, or open.
CLOSED = ("step", "fit", "train", "main", "item()", "set_epoch", "test_loop", "train_loop",
          "train_epoch", "training_step", "result.json", "float16", "bfloat16", "Adam",
          "parameter.grad")  # fmt: skip
OPEN = ("zero_grad", "backward", "loss", "test", "state_dict", "weights.pt", "evaluate", "Trainer",
        "float32", "min_delta", "patience", "make_metrics", "compute_metrics", "LitMLP",
        "wait", "callbacks")  # fmt: skip
AFTER_CLOSED, AFTER_OPEN = ("은", "이", "을", "과"), ("는", "가", "를", "와")


@functools.cache
def refused() -> dict[str, str]:
    """Return the patterns of the words that the glossary refuses, by the word."""
    with GLOSSARY.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    words = {w.strip() for row in rows for w in re.findall(r"✗([가-힣 ]+)", row[-1])}
    return {word: WITHIN.get(word, re.escape(word)) for word in sorted(words)}


def faults(english: str, korean: str) -> list[str]:
    """Return what is wrong with a translation, as far as a program can tell."""
    prose, told = (re.sub(r"`[^`]*`", "`c`", text) for text in (korean, english))
    # Names of works, links and quotations of programs stay in English.
    told = re.sub(r"\]\([^)]*\)|\"[^\"]*\"|\*\w+\*", "", told)
    found = [f"a refused word: {word}" for word, p in refused().items() if re.search(p, prose)]
    found += [why for why, pattern in STYLE.items() if re.search(pattern, prose)]
    if "**" in _as_html(korean):
        found.append("bold that does not close")
    for term, said in AGREED.items():
        if re.search(rf"(?<![\w.*/-]){term}(?![\w(.=/-]*\w*[(=_/])(?!\w)", told) and not re.search(
            said, korean
        ):
            found.append(f"'{term}' is not said as agreed: {said}")
    found += [f"a particle that does not fit: {each}" for each in particles(korean)]
    return found


def particles(korean: str) -> list[str]:
    """Return names whose particle does not fit how they sound."""
    found = []
    for names, wrong in ((CLOSED, AFTER_OPEN), (OPEN, AFTER_CLOSED)):
        for name in names:
            pattern = rf"(?<![\w.])`?(?:\w+\.)*{re.escape(name)}`?({'|'.join(wrong)})(?=[\s,.:]|$)"
            found += [match[0] for match in re.finditer(pattern, korean)]
    return found


def _as_html(text: str) -> str:
    """Return a text as CommonMark shows it, without code."""
    html = MarkdownIt("commonmark").renderInline(text)
    return re.sub(r"<code>.*?</code>", "", html)
