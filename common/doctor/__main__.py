"""The command: `samebits A.trace B.trace`, or `python -m samebits`.

Exit status 0: the runs are equal; 1: they differ; 2: they cannot be compared.
"""

import sys

from .diagnosis import compare
from .messages import Parser, clear_messages


def main(argv: list[str]) -> int:
    """Diagnose two traces; return the exit status."""
    parser = Parser(
        prog="samebits",
        description="Find the first difference of two traced runs, and name its likely cause.",
    )
    parser.add_argument("a", metavar="A.trace", help="a trace, made by samebits.Trace")
    parser.add_argument("b", metavar="B.trace", help="the trace of the other run")
    arguments = parser.parse_args(argv)
    diagnosis = compare(arguments.a, arguments.b)
    print(f"A is {arguments.a}, B is {arguments.b}.\n{diagnosis}")
    return 0 if diagnosis.equal else 1


def command() -> None:
    with clear_messages():
        sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
