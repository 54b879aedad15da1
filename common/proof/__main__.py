"""Compares two scripts of anyone's: `python -m common.proof A.py B.py [arguments of both]`.

Each is imported in a process of its own, and its `main` is called and watched: the data and its
order, the initial weights, the loss of every backward pass, the final weights, optimizers and
random-number generators. Nothing in the scripts changes. A `main` that returns the network gives
the weights their names; a script with `Args`, as the lessons have, gets these. Exit status 0: both
do the same; 1: they differ; 2: one of them did not end.
"""

from common.messages import BadInput, clear_messages
from common.proof.compare import compare_stages
from common.proof.evidence import Evidence
from common.proof.parity import print_stages
from common.proof.watch import finite

import inspect
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

STAGES = ("data", "start", "steps", "weights", "optimizer", "random")
USAGE = "usage: python -m common.proof A.py B.py [arguments of both]"


def watch(script: Path, argv: list[str]) -> dict[str, Any]:
    """Call the `main` of a script, as if it had been typed with these arguments, and watch it.

    Raises BadInput where the script has no `main` that can be called so.
    """
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.resolve().parent))
    module = SimpleNamespace(**runpy.run_path(str(script), run_name=script.stem))
    main = getattr(module, "main", None)
    if not callable(main):
        raise BadInput(f"'{script}' has no function main; name a script whose main() trains.")
    arguments: list[Any] = []
    if hasattr(module, "Args"):
        arguments = [_arguments(module, script, argv)]
    wanted = [p for p in inspect.signature(main).parameters.values() if p.default is p.empty]
    if len(wanted) != len(arguments):
        raise BadInput(f"the main of '{script}' needs arguments; give it defaults, or an Args.")
    with Evidence() as evidence:
        net = main(*arguments)
    found = evidence.found(net if isinstance(net, torch.nn.Module) else None)
    # Python seeds its own generator, and NumPy's, by chance in each process: PyTorch's does not.
    prints = found["fingerprints"]
    prints["random"] = {"torch": prints["random"]["torch"]}
    return finite(found | {"side": str(script)})


def _arguments(module: SimpleNamespace, script: Path, argv: list[str]) -> Any:
    """Return the lesson's Args."""
    from common.run import parse

    sys.modules[script.stem] = module  # type: ignore[assignment]  # where its docstring is sought
    args = parse(module.Args, script, argv)
    torch.set_num_threads(args.threads)
    return args


def main(argv: list[str]) -> int:
    """Watch both scripts and compare; return the exit status."""
    if argv[:1] == ["--watch"]:
        found = watch(Path(argv[1]), argv[3:])
        Path(argv[2]).write_text(json.dumps(found))
        return 0
    scripts = argv[:2]
    if len(scripts) < 2 or not all(name.endswith(".py") for name in scripts):
        raise BadInput(f"two scripts are needed; {USAGE}.")
    results = []
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        for number, script in enumerate(scripts):
            if not Path(script).is_file():
                raise BadInput(f"there is no script '{script}'; {USAGE}.")
            print(f"Watching {script}.", flush=True)
            out = Path(folder, f"{number}.json")
            command = [sys.executable, "-m", "common.proof", "--watch", script, str(out)]
            status = subprocess.run([*command, *argv[2:]]).returncode
            if status:
                return status if status in (130, 143) else 2
            results.append(json.loads(out.read_text()))
    comparison = compare_stages(results[0], results[1], STAGES)
    print_stages(f"{scripts[0]} and {scripts[1]}", comparison)
    return 0 if comparison.agree else 1


if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
