"""Write a diagnosis as one page of HTML that needs nothing else: a picture, a table, the causes."""

import html

from .diagnosis import STAGES, Diagnosis
from .messages import PAGES, printable

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; }
table { border-collapse: collapse; } td, th { padding: .2em 1em; text-align: left; }
tr { border-bottom: 1px solid #ccc; } .first { background: #f6d5c9; } .later { color: #888; }"""
GREEN, RED, GREY = "#009e73", "#d55e00", "#cccccc"


def page(diagnosis: Diagnosis, a: str, b: str) -> str:
    """Return the page; `a` and `b` are what the two runs are called."""
    lines = str(diagnosis).splitlines()
    causes = "".join(
        f"<li><b>{_safe(cause.name)}</b>{_link(cause.page)}<br>{_safe(cause.evidence)}</li>"
        for cause in diagnosis.causes
    )
    remarks = "".join(f"<p>{_safe(remark)}</p>" for remark in diagnosis.remarks)
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>samebits</title><style>{STYLE}</style>
<h1>{_safe(lines[0])}</h1>
<p>A is {_safe(a)}, B is {_safe(b)}.</p>
{_picture(diagnosis)}
{"".join(f"<p>{_safe(line)}</p>" for line in lines[1:3] if diagnosis.stage)}
<ol>{causes}</ol>
<table><tr><th>stage</th><th>what it is</th><th></th></tr>{_rows(diagnosis)}</table>
{remarks}
</html>
"""


def _safe(text: str) -> str:
    return html.escape(printable(text))


def _link(name: str) -> str:
    return f' (<a href="{_safe(PAGES)}#{_safe(name)}">more</a>)' if name else ""


def _verdicts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Return what is known of each stage at the first difference: equal, differs, or later."""
    found, verdicts = False, []
    for stage in STAGES:
        found = found or stage == diagnosis.stage
        is_first = stage == diagnosis.stage
        verdicts.append((stage, "differs first" if is_first else "later" if found else "equal"))
    return verdicts


def _rows(diagnosis: Diagnosis) -> str:
    kinds = {"differs first": "first", "later": "later", "equal": "equal"}
    rows = ""
    for stage, verdict in _verdicts(diagnosis):
        what = f"{verdict}: {diagnosis.what}" if verdict == "differs first" else verdict
        rows += f'<tr class="{kinds[verdict]}"><td>{stage}</td><td>{_safe(STAGES[stage])}</td>'
        rows += f"<td>{_safe(what)}</td></tr>"
    return rows


def _picture(diagnosis: Diagnosis) -> str:
    """Draw the steps as a line, green up to the first difference, and the stages of that step."""
    total = max(diagnosis.steps, diagnosis.step, 1)
    at = diagnosis.step / total if diagnosis.stage else 1.0
    colours = {"equal": GREEN, "differs first": RED, "later": GREY}
    boxes = "".join(
        f'<rect x="{20 + 72 * n}" y="60" width="68" height="34" fill="{colours[verdict]}"/>'
        f'<text x="{54 + 72 * n}" y="82" font-size="13" text-anchor="middle" '
        f'fill="{"#000" if verdict == "later" else "#fff"}">{stage}</text>'
        for n, (stage, verdict) in enumerate(_verdicts(diagnosis))
    )
    width = 72 * len(STAGES) - 4
    end = f"step {diagnosis.step:,}" if diagnosis.stage else f"{diagnosis.steps:,} steps, all equal"
    return f"""<svg viewBox="0 0 {width + 40} 110" role="img" aria-label="the first difference">
<rect x="20" y="20" width="{width}" height="10" fill="{GREY if diagnosis.stage else GREEN}"/>
<rect x="20" y="20" width="{width * at:.1f}" height="10" fill="{GREEN}"/>
<text x="{min(20 + width * at, width - 60):.1f}" y="48" font-size="13">{end}</text>{boxes}</svg>"""
