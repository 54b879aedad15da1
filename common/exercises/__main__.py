"""The exercises' commands: `python -m common.exercises list`, or `make exercise`.

list, start NUMBER, check NUMBER or --all, hint NUMBER, solution NUMBER, watch [NUMBER]. Exit
status of check: 0 where it is solved, 1 where it is not yet, 2 where there is nothing to check.
"""

from common.exercises.catalog import KINDS, Exercise, exercises, find, paragraphs
from common.exercises.workspace import OURS, Workspace
from common.messages import BadInput, Parser, clear_messages, printable

import json
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

NOT_YET = 1
# What a learner calls the stages of a comparison, where they are equal.
EQUAL = {
    "data": "the data and its order",
    "start": "the initial weights",
    "steps": "the loss of every step",
    "weights": "the final weights",
    "optimizer": "the optimizer's state",
    "random": "the random-number generators",
    "checkpoints": "the checkpoints",
}


def main(argv: list[str]) -> int:
    """Do one of the commands; return the exit status."""
    parser = Parser(prog="python -m common.exercises", description=__doc__)
    parser.add_argument("command", choices=("check", *COMMANDS))
    parser.add_argument("number", nargs="?", default="", help="of an exercise, such as 07")
    parser.add_argument("--all", action="store_true", help="check all that were begun")
    parser.add_argument("--json", action="store_true", help="say it for machines")
    parser.add_argument("--workspace", type=Path, default=OURS, help="the learner's folder")
    args = parser.parse_args(argv)
    workspace = Workspace(args.workspace.expanduser().absolute())
    if args.command not in ("list", "watch") and not args.number and not args.all:
        raise BadInput(
            f"which exercise? Name its number: make {args.command} N=01; `make exercise` lists "
            "them all."
        )
    if args.command == "check" and args.all:
        return check_all(workspace, args.json)
    exercise: Any = find(args.number) if args.number else None
    if args.command == "check":
        return check_one(exercise, workspace, args.json)
    return COMMANDS[args.command](workspace, exercise)


def show_list(workspace: Workspace, _: Exercise | None) -> int:
    """Print all exercises, what is solved, and the next one."""
    noted = workspace.progress()
    solved = sum(noted.get(each.name, {}).get("solved", False) for each in exercises().values())
    print(f"Exercises: {solved} of {len(exercises())} are solved.")
    for lesson, group in groupby(exercises().values(), key=lambda each: each.lesson):
        print(f"\n{lesson}")
        for each in group:
            is_solved = noted.get(each.name, {}).get("solved", False)
            begun = "begun" if workspace.path(each).exists() else ""
            state = "solved" if is_solved else begun
            about = f"{KINDS[each.kind]}, level {each.level}, {each.minutes} minutes"
            print(f"  {each.label}  {state:7} {each.title:52} {about}")
    if following := next_one(workspace):
        print(f"\nThe next one: {workspace.typed('exercise', following)}")
    else:
        print("\nAll are solved.")
    return 0


def next_one(workspace: Workspace, after: int = 0) -> Exercise | None:
    """Return the first exercise after that number that is not solved, else the first of all."""
    noted = workspace.progress()
    left = [e for e in exercises().values() if not noted.get(e.name, {}).get("solved")]
    return next((e for e in left if e.number > after), left[0] if left else None)


def start(workspace: Workspace, exercise: Exercise) -> int:
    """Write the file of an exercise, and say what to do."""
    said = workspace.said(exercise)
    if workspace.begin(exercise):
        print(f"Exercise {exercise.label} is written: {said}\n")
    else:
        print(f"{said} is there already, and is left as it is; remove it to begin again.\n")
    print(f"{exercise.title} ({exercise.about})\n")
    print(paragraphs(exercise.task))
    if exercise.kind == "predict":
        print(f"\nThe answers stand in {said}. Write the letter of yours into it, then type")
    else:
        print(f"\nIts twin is {exercise.twin}. Open {said}, change it, save it, then type")
    print(f"    {workspace.typed('check', exercise)}      {workspace.typed('hint', exercise)}")
    return 0


def graded(exercise: Exercise, workspace: Workspace) -> Any:
    """Check a file, and note where it is solved; return what came of it."""
    from common.exercises import check

    outcome = check.check(exercise, workspace)
    if outcome.solved:
        workspace.note(exercise, solved=True)
    return outcome


def check_one(exercise: Exercise, workspace: Workspace, as_json: bool) -> int:
    """Check a file, and print what came of it."""
    from common.exercises.check import FEW  # and PyTorch with it
    from common.proof.compare import RELATIVE

    outcome = graded(exercise, workspace)
    if as_json:
        print(json.dumps(as_data(exercise, outcome)))
        return 0 if outcome.solved else NOT_YET
    for line in shown(outcome.printed, FEW):
        print(f"  | {line}")
    if bits := [EQUAL[name] for name in outcome.compared if name in EQUAL]:
        print(f"Equal, bit for bit: {', '.join(bits)}.")
    if "metrics" in outcome.compared:
        print(f"Equal within {RELATIVE}: counts and averages.")
    if not outcome.solved:
        print(paragraphs(outcome.said) if exercise.kind == "predict" else outcome.said)
        print(f"Exercise {exercise.label} is not solved yet.")
        print(f"A hint: {workspace.typed('hint', exercise)}")
        return NOT_YET
    print(f"Exercise {exercise.label} is solved.\n")
    if outcome.said:
        print(f"{paragraphs(outcome.said)}\n")
    print(paragraphs(exercise.explanation))
    if following := next_one(workspace, after=exercise.number):
        print(f"\nThe next one: {workspace.typed('exercise', following)}")
    else:
        print("\nAll exercises are solved.")
    return 0


def shown(printed: tuple[str, ...], most: int) -> Iterator[str]:
    """Return the first lines that a file printed, and say where there are more."""
    yield from (printable(line[:120]) for line in printed[:most])
    if len(printed) > most:
        yield "... and more"


def as_data(exercise: Exercise, outcome: Any) -> dict[str, Any]:
    facts = {"number": exercise.number, "name": exercise.name, "solved": outcome.solved}
    return facts | {"stage": outcome.stage, "said": "" if outcome.solved else outcome.said}


def check_all(workspace: Workspace, as_json: bool) -> int:
    """Check all exercises that were begun; return 0 where each of them is solved."""
    from common.exercises.check import Outcome

    begun = [each for each in exercises().values() if workspace.path(each).exists()]
    if not begun:
        raise BadInput(
            f"there is no exercise in '{workspace.folder}' yet; make exercise N=01 begins one."
        )
    found = []
    for exercise in begun:
        try:
            outcome = graded(exercise, workspace)
        except BadInput as fault:
            outcome = Outcome(False, "file", f"{fault}")
        found.append(as_data(exercise, outcome))
        if not as_json:
            state = "solved" if outcome.solved else f"not yet: {outcome.said.splitlines()[0]}"
            print(f"{exercise.label}  {state}", flush=True)
    solved = sum(each["solved"] for each in found)
    if as_json:
        facts = {"workspace": str(workspace.folder), "exercises": len(exercises())}
        print(json.dumps(facts | {"begun": len(begun), "solved": solved, "checked": found}))
    else:
        print(f"Solved: {solved} of the {len(begun)} that were begun, of {len(exercises())}.")
    return 0 if solved == len(begun) else NOT_YET


def hint(workspace: Workspace, exercise: Exercise) -> int:
    """Print the next hint; after the last one, all of them."""
    seen = workspace.of(exercise).get("hints", 0)
    count = len(exercise.hints)
    shown_now = range(count) if seen >= count else [seen]
    for number in shown_now:
        print(f"Hint {number + 1} of {count} for exercise {exercise.label}")
        print(f"{paragraphs(exercise.hints[number])}\n")
    if seen + 1 < count:
        print(f"The next one: {workspace.typed('hint', exercise)}")
    else:
        print(f"There are no more. The solution: {workspace.typed('solution', exercise)}")
    workspace.note(exercise, hints=min(seen + 1, count))
    return 0


def solution(workspace: Workspace, exercise: Exercise) -> int:
    """Print the solution where it is solved, or was asked for before."""
    noted = workspace.of(exercise)
    if not noted.get("solved") and not noted.get("asked"):
        workspace.note(exercise, asked=True)
        print(
            f"Exercise {exercise.label} is not solved yet. Whoever wants to see the solution "
            f"nevertheless asks once more:\n    {workspace.typed('solution', exercise)}"
        )
        return 0
    print(f"{exercise.difference()}\n\n{paragraphs(exercise.explanation)}")
    return 0


def watch(workspace: Workspace, exercise: Exercise | None) -> int:
    """Check at each save, until Ctrl-C; go on to the next exercise where one is solved."""
    print("Each time you save, it is checked. Ctrl-C ends it.\n")
    while exercise := exercise or next_one(workspace):
        start(workspace, exercise)
        print()
        seen = None
        while not workspace.of(exercise).get("solved"):
            now = _saved(workspace.path(exercise))
            if seen is not None and now != seen:
                print(f"--- {time.strftime('%H:%M:%S')}  {workspace.said(exercise)}", flush=True)
                try:
                    check_one(exercise, workspace, as_json=False)
                except BadInput as fault:
                    print(f"{fault}")
                print(flush=True)
            seen = now
            time.sleep(0.3)
        exercise = next_one(workspace, after=exercise.number)
    print("All exercises are solved.")
    return 0


def _saved(path: Path) -> tuple[int, int]:
    """Return what changes when a file is saved."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


COMMANDS: dict[str, Any] = {
    "list": show_list, "start": start, "hint": hint, "solution": solution, "watch": watch,
}  # fmt: skip

if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
