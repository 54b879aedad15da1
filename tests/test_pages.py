"""The pages whose code runs print what they say. tests/pages.py runs it."""

from common import ROOT
from common.messages import BadInput

import os
import platform
import re
import shutil
import subprocess
import sys

import pages
import pytest
import torch
from helpers import count
from torch import nn
from torch.utils.data import DataLoader

PITFALLS = pages.PAGES[0].read_text()
ANCHORS = """
    seed-and-layers order own-generator validation-and-order set-epoch steps mean-of-means scaling
    augmentation split train-and-eval summary precision layer reduction loss targets zero-grad
    accumulation clipping frozen learning-rate schedule weight-decay optimizer parameter-groups
    batch-size-and-devices best-or-last f1-per-batch micro-or-macro train-loss
    logits-or-probabilities log-every-n-steps guessed-batch-size checkpoint-keys sanity-check
    inference-mode percent autocast-cache frequency checkpoint-from-url compiled-sanity-check
""".split()


# Ten seconds and more: they start processes, or train for long.
SLOW = ('id="script-runs-twice"', "## Search a batch size", "## Another processor",
        "## How rounding grows")  # fmt: skip


def with_code(page):
    return [part for part in pages.sections(page) if pages.blocks(part, pages.preamble(page))]


def cases():
    for path in filter(lambda path: path.exists(), pages.PAGES):
        page = path.read_text()
        for section in with_code(page):
            name = f"{path.stem}: {pages.title(section)}"
            marks = [pytest.mark.slow] * any(title in section for title in SLOW)
            yield pytest.param(section, pages.preamble(page), path.stem, id=name, marks=marks)


@pytest.mark.parametrize("section, preamble, page", list(cases()))
def test_a_section_prints_what_its_page_says(section, preamble, page):
    if page == "sameness" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the page was measured on an x86 processor; others add in other orders")
    assert pages.run(section, preamble) == pages.printed(section)
    count(f"{page} run", 1)


def test_no_pitfall_is_missing():
    anchors = re.findall(r'<a id="([^"]+)"></a>', PITFALLS)
    assert len(anchors) == len(set(anchors)) == len(with_code(PITFALLS))
    assert set(ANCHORS) <= set(anchors)
    assert sum(anchor.startswith("belief-") for anchor in anchors) >= 4
    assert len(with_code(PITFALLS)) >= 36
    count("anchors of the pitfalls", len(anchors))


def test_the_table_names_every_section_in_its_order():
    headings = re.findall(r'<a id="([^"]+)"></a>\n## (\d+)\. (.+)', PITFALLS)
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\(#([^)]+)\) \| \w+ \| .+ \|$", PITFALLS, re.MULTILINE)
    assert [(anchor, number, name) for number, name, anchor in rows] == headings
    assert [int(number) for number, _, _ in rows] == list(range(1, len(headings) + 1))


def test_every_pitfall_says_where_it_was_seen():
    for section in with_code(PITFALLS):
        links = re.findall(r"\[([\w./-]+)#(\d+)\]\((https://github\.com/\S+)\)", section)
        for repository, number, url in links:
            assert re.fullmatch(rf".*{repository}/(issues|pull)/{number}", url), url
        seen = re.search(r"^Seen in: \[", section, re.MULTILINE) and links
        assert seen or "No public thread was found." in section, pages.title(section)
        count("threads named", len(links))


@pytest.mark.slow  # compiling takes a minute or two
def test_without_the_sanity_check_a_compiled_port_equals_the_loop(tmp_path, monkeypatch):
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "clang++")
    if not shutil.which(compiler):
        pytest.skip(f"torch.compile needs a C++ compiler; there is no {compiler}")
    # PyTorch's own folder may hold what was compiled for other instructions, and then fails.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    names = {}
    exec(pages.preamble(PITFALLS), names)
    train, val = (DataLoader(names["data"], size, drop_last=True) for size in (16, 70))

    class Port(names["Port"]):
        def __init__(self, model):
            super().__init__(model)
            self.losses = []

        def training_step(self, batch, batch_idx):
            self.losses.append(super().training_step(batch, batch_idx))
            return self.losses[-1]

        def validation_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    def compiled():
        torch.compiler.reset()
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        return torch.compile(nn.Sequential(*layers))

    model, by_hand = compiled(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, labels in train:
        optimizer.zero_grad()
        by_hand.append(nn.functional.cross_entropy(model(inputs), labels))
        by_hand[-1].backward()
        optimizer.step()
    for steps in (2, 0):
        port = Port(compiled())
        names["trainer"](max_epochs=1, num_sanity_val_steps=steps).fit(port, train, val)
        apart = [abs(a - b).item() for a, b in zip(by_hand, port.losses, strict=True)]
        print(f"{steps} batches of sanity check: losses apart by {apart}")
        assert len(apart) == 4 and max(apart) < 1e-6
    assert apart == [0] * 4  # without the sanity check; with it, some processors have a difference
    count("losses of compiled networks", len(apart))


PAGE = """# A page
```python
number = 41
```
## 1. A sum
```python
number += 1
```
```python
print(number)
```
```text
42
```
## 2. The same names anew
```python
print(number)
```
```text
41
```
"""


def test_the_runner_notices_a_wrong_number():
    section = with_code(PAGE)[0]
    assert pages.run(section, pages.preamble(PAGE)) == pages.printed(section) == "42\n"
    wrong = section.replace("42", "43")
    assert pages.run(wrong, pages.preamble(PAGE)) != pages.printed(wrong)
    pitfall = next(part for part in with_code(PITFALLS) if 'id="mean-of-means"' in part)
    numbers = pages.printed(pitfall)
    digit = re.search(r"\d(?=\n)", numbers)
    other = str((int(digit[0]) + 1) % 10)
    changed = numbers[: digit.start()] + other + numbers[digit.end() :]
    wrong = pitfall.replace(numbers, changed)
    assert pages.run(wrong, pages.preamble(PITFALLS)) == numbers != pages.printed(wrong) == changed


def test_the_runner_writes_the_numbers_anew(tmp_path, monkeypatch, capsys):
    path = tmp_path / "page.md"
    path.write_text(PAGE.replace("42", "43"))
    monkeypatch.setattr(pages, "PAGES", [path, tmp_path / "absent.md"])
    pages.main()
    assert path.read_text() == PAGE and list(tmp_path.iterdir()) == [path]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "written anew" in lines[0] and "as before" in lines[1]


def test_code_without_its_output_is_refused():
    section = "## 3. Mute\n```python\nprint(1)\n```\n"
    with pytest.raises(BadInput, match=r"'3\. Mute' needs one ```text block"):
        pages.run(section, "")


REPORTS = {
    "check-interval-one": "1",
    "lbfgs-accumulation": None,  # the norms depend on the processor: they grow
    "nested-toggles": "[True, True, False, False]",
    "stream-steps": "0.0",
    "swa-last-step": "False",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_for_upstream_reproduces_its_bug(name, tmp_path):
    """It turns red on the day the bug is mended: then the report goes, and its pitfall."""
    folder = ROOT / "docs" / "upstream"
    assert {path.stem for path in folder.glob("*-*.md")} == set(REPORTS)
    report = (folder / f"{name}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", report, re.DOTALL)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    if REPORTS[name] is None:
        norms = [float(line) for line in said if re.fullmatch(r"\d+\.\d+", line)]
        assert norms[-1] > 2 * norms[1]
    else:
        assert REPORTS[name] in said
    count("reports reproduced")


def test_every_section_on_tuning_compares_both():
    page = (ROOT / "docs" / "tuning.md").read_text()
    own = [section for section in with_code(page)]
    assert len(own) == 7
    for section in own:
        said = pages.printed(section)
        assert "False" not in said and ("True" in said or "by the Tuner" in said), said
        count("sections on tuning")
