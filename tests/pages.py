"""The pages whose code runs: run it, and write what it prints into the page.

`python tests/pages.py` (`make pitfalls`) writes all numbers of docs/pitfalls.md, docs/sameness.md
and docs/tuning.md anew; tests/test_pages.py requires that each section prints what its page says.
A page's first python block is its preamble, which runs before each section.
"""

from common import ROOT
from common.messages import BadInput, clear_messages

import contextlib
import io
import itertools
import logging
import os
import random
import re
import sys
import tempfile
import time
import warnings
from unittest import mock

import numpy as np
import torch

PAGES = [ROOT / "docs" / name for name in ("pitfalls.md", "sameness.md", "tuning.md")]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page: str) -> list[str]:
    """Split a page before each heading `## `, or before the anchor that stands above it."""
    heads = re.finditer(r'^(?:<a id="[^"]*"></a>\n+)?## ', page, re.MULTILINE)
    starts = [0, *(head.start() for head in heads), len(page)]
    return [page[start:end] for start, end in itertools.pairwise(starts)]


def title(section: str) -> str:
    heading = re.search(r"^##? (.+)$", section, re.MULTILINE)
    return heading[1] if heading else "the beginning"


def preamble(page: str) -> str:
    first = CODE.search(page)
    return first[1] if first else ""


def blocks(section: str, preamble: str) -> list[str]:
    """The section's code, without the preamble; each section that has any must say its output."""
    found = [code for code in CODE.findall(section) if code != preamble]
    if found and len(TEXT.findall(section)) != 1:
        raise BadInput(
            f"The section '{title(section)}' needs one ```text block for what it prints."
        )
    return found


def printed(section: str) -> str:
    """What the page says that the section prints."""
    return TEXT.findall(section)[0]


@contextlib.contextmanager
def as_found():
    """Be quiet, on one thread and in an empty folder, and leave all as it was found."""
    threads, level = torch.get_num_threads(), logging.root.manager.disable
    states = random.getstate(), np.random.get_state()
    with (
        tempfile.TemporaryDirectory() as empty,
        contextlib.chdir(empty),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(action="ignore"),
        torch.random.fork_rng(devices=[]),
    ):
        logging.disable(logging.WARNING)  # Lightning's loggers set their level at their import
        torch.set_num_threads(1)
        try:
            yield
        finally:
            logging.disable(level)
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])


def run(section: str, preamble: str) -> str:
    """Run a section's code after the preamble, in a fresh namespace; return what it printed."""
    out, names = io.StringIO(), {"__name__": "page"}
    codes = [preamble, *blocks(section, preamble)]
    with as_found(), contextlib.redirect_stdout(out):
        torch.manual_seed(0)
        for code in codes:
            exec(compile(code, f"<{title(section)}>", "exec"), names)
    return out.getvalue()


def main() -> None:
    for path in filter(lambda path: path.exists(), PAGES):
        page, parts = path.read_text(), []
        for section in sections(page):
            if blocks(section, preamble(page)):
                start, before = time.monotonic(), section
                text = run(section, preamble(page))
                section = TEXT.sub(lambda _, text=text: f"```text\n{text}```", section)
                what = "as before" if section == before else "written anew"
                seconds = time.monotonic() - start
                print(f"{path.name}: {title(section)}: {what}, {seconds:.1f} s", flush=True)
            parts.append(section)
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(parts))
        temporary.replace(path)


if __name__ == "__main__":
    with clear_messages():
        sys.exit(main())
