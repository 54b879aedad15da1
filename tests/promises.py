"""Says which promises a test run broke: `python tests/promises.py results.xml`, made by --junitxml.

A promise is the first line of a test module. Prints a list in Markdown, with the versions.
"""

from common import ROOT

import ast
import importlib.metadata
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def promise(module: str) -> str:
    """Return what a test module promises: the first line of its docstring."""
    text = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or module).splitlines()[0]


def broken(results: Path) -> dict[str, list[str]]:
    """Return the failed tests of a JUnit file, by the promise that they keep."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            module = case.get("classname", "").rpartition(".")[2] or case.get("name", "")
            found.setdefault(promise(module), []).append(f"{module}.py::{case.get('name')}")
    return found


def report(results: Path) -> str:
    names = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    if not results.exists():
        return f"The tests did not run to their end ({versions})."
    lines = [f"With {versions}:", ""]
    for text, tests in broken(results).items():
        lines += [f"- **broken: {text}**", *(f"  - {name}" for name in tests)]
    return "\n".join(lines if len(lines) > 2 else [*lines, "Every promise holds."])


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
