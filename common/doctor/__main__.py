"""The command: `samebits A.trace B.trace`, `samebits check RUN.trace`, or `python -m samebits`.

Exit status 0: the runs are equal, or nothing is wrong; 1: they differ; 2: they cannot be compared.
"""

import json
import sys
from pathlib import Path

from .messages import PAGES, Parser, clear_messages, printable


def main(argv: list[str]) -> int:
    """Diagnose two traces, or check one; return the exit status."""
    if argv[:1] == ["check"]:
        return _check(argv[1:])
    parser = Parser(
        prog="samebits",
        description="Find the first difference of two traced runs, and name its likely cause. "
        "`samebits check RUN.trace` says what is wrong with one run alone.",
    )
    parser.add_argument("a", metavar="A.trace", help="a trace, made by samebits.Trace")
    parser.add_argument("b", metavar="B.trace", help="the trace of the other run")
    parser.add_argument("--json", action="store_true", help="print the diagnosis for machines")
    parser.add_argument("--html", metavar="PAGE", help="write it as one page, too")
    parser.add_argument(
        "--zoom", action="store_true",
        help="name the operator and the line of code; both traces were made with zoom=STEP",
    )  # fmt: skip
    parser.add_argument(
        "--nudged", metavar="A2.trace",
        help="A's run once more, traced with nudge=True: tells how much rounding makes",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    from .diagnosis import to_json
    from .page import page
    from .ranks import compare_ranks
    from .zoom import zoom

    diagnosis = compare_ranks(arguments.a, arguments.b, arguments.nudged)
    if arguments.html:
        content = page(diagnosis, arguments.a, arguments.b)
        target = Path(arguments.html)
        part = target.with_name(f"{target.name}.part")
        part.write_text(content, encoding="utf-8")
        part.replace(target)
    if arguments.json:
        print(to_json(diagnosis))
    else:
        print(printable(f"A is {arguments.a}, B is {arguments.b}.\n{diagnosis}"))
    if arguments.zoom:
        print(printable(zoom(arguments.a, arguments.b)))
    return 0 if diagnosis.equal else 2 if diagnosis.stage is None else 1


def _check(argv: list[str]) -> int:
    parser = Parser(prog="samebits check", description="Say what is wrong with one run alone.")
    parser.add_argument("run", metavar="RUN.trace", help="a trace, made by samebits.Trace")
    parser.add_argument("--json", action="store_true", help="print it for machines")
    arguments = parser.parse_args(argv)
    from .ranks import check_ranks

    causes = check_ranks(arguments.run)
    if arguments.json:
        print(json.dumps([vars(cause) for cause in causes], indent=2))
        return 1 if causes else 0
    for number, cause in enumerate(causes, start=1):
        page = f" ({PAGES}#{cause.page})" if cause.page else ""
        print(printable(f"{number}. {cause.name}{page}\n   {cause.evidence}"))
    if not causes:
        print(printable(f"Nothing is wrong with {arguments.run}, as far as one run alone tells."))
    return 1 if causes else 0


def command() -> None:
    with clear_messages():
        sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
