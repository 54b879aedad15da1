"""Writes docs/notebooks/: each lesson as a notebook, both sides cell by cell, and the proof.

`python -m docs.page.notebooks`, or `make notebooks`. Made from the scripts' own cells; a test holds
that the committed files are current.
"""

from common import ROOT, SIDES
from common.environment import WITH_PROCESSES
from common.exercises.catalog import of_lesson
from common.messages import clear_messages
from common.proof.lessons import lessons
from common.proof.sidebyside import cells
from docs.page.build import PROJECT, REPOSITORY, parts
from docs.page.prose import split_page

import re

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = ROOT / "docs" / "notebooks"
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = """\
# Find the repository, or fetch it, as on Colab, whose own PyTorch stays. The bits may then be
# others than on your machine; both sides still have the same ones.
import importlib.metadata, os, sys
from pathlib import Path

here = [p for p in (Path.cwd(), *Path.cwd().parents) if (p / "common" / "run.py").exists()]
if not here:
    !git clone -q --depth 1 {repository} repository
    !pip install -q --no-deps {pinned} lightning-utilities torchsummary
    !pip install -q tyro
    here = [Path("repository")]
os.chdir(here[0])
sys.path.insert(0, os.getcwd())
for name in ("torch", "torchvision", "lightning", "torchmetrics"):
    print(name, importlib.metadata.version(name))
%load_ext common.proof.notebook"""
PROVE = """\
# Both sides, as the cells above define them: change one, run it again, and prove again.
prove("{lesson}", {options})"""
PROVE_BY_COMMAND = """\
# A notebook's own process cannot be one of several: this runs both scripts, in two processes.
!{{sys.executable}} -m common.proof.parity {lesson} --devices 2 \\
    --runs-dir runs/notebook {options}"""
EXERCISES = """\
## Exercises

The first cell of each writes a file into `exercises/`. Open it in the list of files, change it and
save it; the second cell checks it. For a hint: `!{sys.executable} -m common.exercises hint 01`."""
# Short runs on the drawn shapes, in which every lesson learns something or shows what it is about.
SHORT = {"data": "shapes", "max_epochs": 1, "limit_train_batches": 300, "limit_val_batches": 2,
         "limit_test_batches": 2}  # fmt: skip
OPTIONS = {
    "cifar": {"batch_size": 32, "lr": 0.02},
    "fashion": {"lr": 0.1},
    "resume": {"lr": 0.05},
    "speed": {"limit_train_batches": 100},
    "gan": {"limit_train_batches": 30},
    "tokens": {"limit_train_batches": 30, "sample_length": 100},
    "finetune": {"backbone": "mobilenet_v3_small", "weights": "random", "limit_train_batches": 10},
}


def notebook(lesson: str) -> nbformat.NotebookNode:
    """Return a lesson's notebook; its cells have fixed ids, so that each build is the same."""
    sides = {side: cells((ROOT / side / f"{lesson}.py").read_text("utf-8")) for side in SIDES}
    page = (ROOT / "docs" / f"{lesson}.md").read_text(encoding="utf-8")
    title, start, does, _ = split_page(page)
    wanted = " ".join(PROJECT["optional-dependencies"]["lessons"])
    pinned = " ".join(re.findall(r"(?:lightning|torchmetrics)==[\d.]+", wanted))
    badge = f"[![Open in Colab]({BADGE})]({COLAB}/blob/main/docs/notebooks/{lesson}.ipynb)"
    about = re.sub(
        r"\]\((?!http)([^)]+)\)", _led, re.sub(r"```sh.*?```", "", start, flags=re.DOTALL)
    )
    made = [
        new_markdown_cell(f"# {title}\n\n{badge}\n\n{about.strip()}"),
        new_code_cell(SETUP.format(repository=REPOSITORY, pinned=pinned)),
    ]
    for name in (title for title in sides["plain"] if title):
        told = [f"**{side}**: {does[name][n]}" for n, side in enumerate(SIDES) if name in does]
        made.append(new_markdown_cell("\n\n".join([f"## {name}", *told])))
        for side in SIDES:
            code = "\n".join(sides[side][name]).strip("\n")
            code = re.sub(r'\n*if __name__ == "__main__":\n    run\(main, Args\)', "", code)
            if re.search(r"^[^#\s]", code, re.MULTILINE):  # not comments alone
                code = code.strip().replace("#: ", "# ")
                made.append(new_code_cell(f"%%{side}\n{code}"))
            elif code.strip():
                made.append(new_markdown_cell(f"*{side}*: " + re.sub(r"#:? ?", "", code.strip())))
    chosen = SHORT | OPTIONS.get(lesson, {})
    proof = PROVE.format(lesson=lesson, options=", ".join(f"{k}={v!r}" for k, v in chosen.items()))
    if lesson in WITH_PROCESSES:
        options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in chosen.items())
        proof = PROVE_BY_COMMAND.format(lesson=lesson, options=options)
    made += [new_markdown_cell("## The proof"), new_code_cell(proof), *_exercises(lesson)]
    for number, cell in enumerate(made):
        cell["id"] = f"{lesson}-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = new_notebook(cells=made, metadata={"kernelspec": kernel})
    nbformat.validate(whole)
    return whole


def _exercises(lesson: str) -> list[nbformat.NotebookNode]:
    """Return the exercises of a lesson: a cell that writes the file, and one that checks it.

    They are not run when the notebook is tested: they wait for the learner.
    """
    made = [new_markdown_cell(EXERCISES)]
    for each in of_lesson(lesson):
        task = "\n\n".join(parts(each.task))
        made.append(new_markdown_cell(f"### {each.label} {each.title}\n\n*{each.about}*\n\n{task}"))
        for command in ("start", "check"):
            code = f"!{{sys.executable}} -m common.exercises {command} {each.label}"
            made.append(new_code_cell(code, metadata={"tags": ["skip-execution"]}))
    return made


def _led(link: re.Match) -> str:
    """Lead a link of docs/ on from docs/notebooks/."""
    return f"](../{link[1]})"


def text(lesson: str) -> str:
    """Return a notebook as its file has it."""
    return nbformat.writes(notebook(lesson)) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for lesson in lessons():
        (FOLDER / f"{lesson}.ipynb").write_text(text(lesson), encoding="utf-8")
    print(f"{FOLDER.relative_to(ROOT)}: {len(lessons())} notebooks.")


if __name__ == "__main__":
    with clear_messages():
        main()
