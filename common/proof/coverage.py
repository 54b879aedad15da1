"""Writes docs/coverage.md: what of Lightning the lessons use, and what not.

`python -m common.proof.coverage`, or `make coverage`. The names are read from the installed
library's source, so that a new version shows what is missing; where they are used, from the
scripts in lightning/. Nothing here imports Lightning.
"""

from common import ROOT
from common.messages import clear_messages
from common.proof.ledger import LIBRARY, VERSION

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

PAGE = ROOT / "docs" / "coverage.md"
COMMANDS = ("```sh", "`make ")  # make setup is no hook
PYTORCH, FABRIC = LIBRARY / "pytorch", LIBRARY / "fabric"
HEAD = f"""\
# What of Lightning the lessons cover

Every argument of the Trainer, every callback, hook and method of Lightning {VERSION}, read from the
installed library, and where a lesson on Lightning's side uses it. `make coverage` writes this page;
a test fails where it is not current.

Not all of it belongs into a lesson: what is left out is named, so that nobody has to search.
"""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def klass(path: Path, name: str) -> ast.ClassDef:
    return next(n for n in tree(path).body if isinstance(n, ast.ClassDef) and n.name == name)


def methods(path: Path, name: str) -> list[str]:
    """Return the public methods that a class defines, without its properties."""
    found = []
    for node in klass(path, name).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
            if not marks & {"property", "setter", "overload"}:
                found.append(node.name)
    return list(dict.fromkeys(found))


def arguments(path: Path, name: str) -> list[str]:
    init = next(n for n in klass(path, name).body if getattr(n, "name", "") == "__init__")
    assert isinstance(init, ast.FunctionDef)
    return [each.arg for each in (*init.args.args[1:], *init.args.kwonlyargs)]


def exported(path: Path) -> list[str]:
    """Return the names in a module's __all__."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def names() -> dict[str, list[str]]:
    """Return what the library has, by kind."""
    hooks = PYTORCH / "core" / "hooks.py"
    own = [
        *(n for k in ("ModelHooks", "DataHooks", "CheckpointHooks") for n in methods(hooks, k)),
        *methods(PYTORCH / "callbacks" / "callback.py", "Callback"),
    ]
    module = methods(PYTORCH / "core" / "module.py", "LightningModule")
    return {
        "Arguments of the Trainer": arguments(PYTORCH / "trainer" / "trainer.py", "Trainer"),
        "Entry points of the Trainer": methods(PYTORCH / "trainer" / "trainer.py", "Trainer"),
        "Callbacks": exported(PYTORCH / "callbacks" / "__init__.py"),
        "Loggers": exported(PYTORCH / "loggers" / "__init__.py"),
        "Hooks, of modules, data modules and callbacks": list(dict.fromkeys(own)),
        "Methods of the LightningModule": module,
        "Methods of Fabric": methods(FABRIC / "fabric.py", "Fabric"),
    }


def uses(script: Path) -> Iterator[tuple[str, str, int]]:
    """Yield what a script uses: as an argument of a call, by defining it, or by its name."""
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            for keyword in node.keywords:
                yield f"{called}(", keyword.arg or "", keyword.value.lineno
        if isinstance(node, ast.FunctionDef):
            yield "def", node.name, node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield "def", ast.unparse(target), node.lineno
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield "name", node.id, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "import", alias.name, node.lineno


def fits(kind: str, way: str) -> bool:
    """Tell whether a way of use counts for a kind of name."""
    if kind.startswith("Arguments"):
        return way in ("L.Trainer(", "Trainer(")
    if kind.startswith("Entry"):
        return way == "trainer"
    if kind in ("Callbacks", "Loggers"):
        return way == "name"
    if kind.startswith("Hooks"):
        return way == "def"
    if kind.endswith("Fabric"):
        return way in ("fabric", "L")
    return way in ("def", "self", "model", "super()")


def covered() -> dict[str, dict[str, list[tuple[str, int]]]]:
    """Return for each kind and name where the lessons use it: script and first line."""
    found: dict[str, dict[str, list[tuple[str, int]]]] = {
        kind: {name: [] for name in own} for kind, own in names().items()
    }
    for script in sorted((ROOT / "lightning").glob("*.py")):
        for way, name, line in sorted(uses(script), key=lambda use: use[2]):
            for kind, own in found.items():
                known = name in own and fits(kind, way)
                if known and script.stem not in [place for place, _ in own[name]]:
                    own[name].append((script.stem, line))
    return found


def pages_of(name: str) -> list[str]:
    """Return links to the pages that tell of a name, as code; this page and the ledger aside."""
    found = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.stem in ("coverage", "ledger", "hooks"):
            continue
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
        code = [block for block in blocks if not block.startswith(COMMANDS)]
        if any(re.search(rf"\b{name}\b", block) for block in code):
            found.append(f"[{path.stem}]({path.name})")
    return found


def page() -> str:
    text = HEAD
    for kind, own in covered().items():
        used = [name for name, places in own.items() if places]
        text += f"\n## {kind}: {len(used)} of {len(own)}\n\n| name | in |\n| --- | --- |\n"
        for name in used:
            places = ", ".join(
                f"[{script}](../lightning/{script}.py#L{line})" for script, line in own[name]
            )
            text += f"| `{name}` | {places} |\n"
        told = {name: pages_of(name) for name, places in own.items() if not places}
        for name, pages in told.items():
            if pages:
                text += f"| `{name}` | on a page: {', '.join(pages)} |\n"
        if left := [name for name, pages in told.items() if not pages]:
            words = textwrap.fill(" ".join(left), 100, break_on_hyphens=False)
            text += f"\nNowhere:\n\n```text\n{words}\n```\n"
    return text


if __name__ == "__main__":
    with clear_messages(failed=2):
        PAGE.write_text(page(), encoding="utf-8")
        counts = [f"{sum(map(bool, own.values()))} of {len(own)}" for own in covered().values()]
        print(f"{PAGE.relative_to(ROOT)}: {', '.join(counts)}.")
