"""Writes docs/notebooks/: each lesson as a notebook, both sides cell by cell, and the proof.

`python -m docs.page.notebooks`, or `make notebooks`. Made from the scripts' own cells; a test holds
that the committed files are current.
"""

from common import ROOT, SIDES
from common.environment import WITH_PROCESSES
from common.exercises.catalog import KINDS, of_lesson, parts
from common.messages import clear_messages
from common.proof.lessons import lessons
from common.proof.sidebyside import cells
from docs.page.build import PROJECT, REPOSITORY
from docs.page.prose import split_page
from docs.page.rewrite import comments, markdown
from docs.page.texts import COMPLETE, LANGUAGES, Texts

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = ROOT / "docs" / "notebooks"
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = """\
#: Find the repository, or fetch it, as on Colab, whose own PyTorch stays. The bits may then be
#: others than on your machine; both sides still have the same ones.
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
#: Both sides, as the cells above define them: change one, run it again, and prove again.
prove("{lesson}", {options})"""
PROVE_BY_COMMAND = """\
#: A notebook's own process cannot be one of several: this runs both scripts, in two processes.
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


def notebook(lesson: str, texts: Texts | None = None) -> nbformat.NotebookNode:
    """Return a lesson's notebook; its cells have fixed ids, so that each build is the same."""
    texts = texts or Texts("en")
    texts.page = "notebooks"
    sides = {side: cells((ROOT / side / f"{lesson}.py").read_text("utf-8")) for side in SIDES}
    page = (ROOT / "docs" / f"{lesson}.md").read_text(encoding="utf-8")
    title, start, does, _ = split_page(page)
    wanted = " ".join(PROJECT["optional-dependencies"]["lessons"])
    pinned = " ".join(re.findall(r"(?:lightning|torchmetrics)==[\d.]+", wanted))
    place = folder_of(texts.language).relative_to(ROOT).as_posix()
    badge = f"[![Open in Colab]({BADGE})]({COLAB}/blob/main/{place}/{lesson}.ipynb)"
    up = "../" if texts.language == "en" else "../../"
    start = markdown(re.sub(r"```sh.*?```", "", start, flags=re.DOTALL), texts)
    about = re.sub(r"\]\((?!http)([^)]+)\)", rf"]({up}\1)", start)

    def code(text: str) -> str:
        return comments(text, texts).replace("#: ", "# ")

    made = [
        new_markdown_cell(f"# {texts(title)}\n\n{badge}\n\n{about.strip()}"),
        new_code_cell(code(SETUP.format(repository=REPOSITORY, pinned=pinned))),
    ]
    for name in (title for title in sides["plain"] if title):
        told = [
            f"**{side}**: {texts(does[name][n])}" for n, side in enumerate(SIDES) if name in does
        ]
        made.append(new_markdown_cell("\n\n".join([f"## {name}", *told])))
        for side in SIDES:
            own = "\n".join(sides[side][name]).strip("\n")
            own = re.sub(r'\n*if __name__ == "__main__":\n    run\(main, Args\)', "", own)
            if re.search(r"^[^#\s]", own, re.MULTILINE):  # not comments alone
                made.append(new_code_cell(f"%%{side}\n{code(own.strip())}"))
            elif own.strip():
                alone = re.sub(r"#:? ?", "", comments(own.strip(), texts))
                made.append(new_markdown_cell(f"*{side}*: {alone}"))
    chosen = SHORT | OPTIONS.get(lesson, {})
    proof = PROVE.format(lesson=lesson, options=", ".join(f"{k}={v!r}" for k, v in chosen.items()))
    if lesson in WITH_PROCESSES:
        options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in chosen.items())
        proof = PROVE_BY_COMMAND.format(lesson=lesson, options=options)
    made += [new_markdown_cell(f"## {texts('The proof')}"), new_code_cell(code(proof))]
    made += _exercises(lesson, texts)
    for number, cell in enumerate(made):
        cell["id"] = f"{lesson}-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = new_notebook(cells=made, metadata={"kernelspec": kernel})
    nbformat.validate(whole)
    return whole


def _exercises(lesson: str, texts: Texts) -> list[nbformat.NotebookNode]:
    """Return the exercises of a lesson: a cell that writes the file, and one that checks it.

    They are not run when the notebook is tested: they wait for the learner.
    """
    made = [new_markdown_cell(markdown(EXERCISES, texts))]
    for each in of_lesson(lesson):
        level, minutes = texts("level {n}"), texts("{n} minutes")
        about = [
            texts(KINDS[each.kind]),
            level.format(n=each.level),
            minutes.format(n=each.minutes),
        ]
        task = "\n\n".join(_told(part, texts) for part in parts(each.task))
        made.append(
            new_markdown_cell(
                f"### {each.label} {texts(each.title)}\n\n*{' · '.join(about)}*\n\n{task}"
            )
        )
        for command in ("start", "check"):
            cell = f"!{{sys.executable}} -m common.exercises {command} {each.label}"
            made.append(new_code_cell(cell, metadata={"tags": ["skip-execution"]}))
    return made


def _told(part: str, texts: Texts) -> str:
    """Return a paragraph of a task; one that is indented as the items of a list."""
    if part.startswith("    "):
        return "\n".join(f"- {texts(line.strip())}" for line in part.splitlines())
    return texts(" ".join(part.split()))


def of_language(language: str) -> list[str]:
    """Return the lessons that have a notebook in a language."""
    return [name for name in lessons() if language == "en" or name in COMPLETE[language]]


def folder_of(language: str) -> Path:
    return FOLDER if language == "en" else FOLDER / language


def text(lesson: str, language: str = "en") -> str:
    """Return a notebook as its file has it."""
    return nbformat.writes(notebook(lesson, Texts(language))) + "\n"


def main() -> None:
    """Write all notebooks, of each language."""
    for language in LANGUAGES:
        folder_of(language).mkdir(parents=True, exist_ok=True)
        for lesson in of_language(language):
            path = folder_of(language) / f"{lesson}.ipynb"
            path.write_text(text(lesson, language), encoding="utf-8")
        print(f"{folder_of(language).relative_to(ROOT)}: {len(of_language(language))} notebooks.")


if __name__ == "__main__":
    with clear_messages():
        main()
