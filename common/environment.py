"""What the environment says of processes, where it was left over: from a job, or another shell.

PyTorch, Lightning and its loggers read these names when they are imported, and each believes them:
a lesson that is alone would wait for others, or write nothing. So they go before any import.
"""

import os
import re
import sys
from pathlib import Path

# Lessons that torchrun starts once for each device; all others are one process.
WITH_PROCESSES = ("parallel", "fabric", "fabric_trainer", "predict")
# By torchrun; by SLURM, LSF and others, whose own ways to start processes no lesson uses. And what
# Lightning takes for an argument of the Trainer.
LEFT_OVER = re.compile(
    "(LOCAL_|GROUP_|NODE_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
    "|TORCHELASTIC_.*|SLURM_(NTASKS|PROCID|LOCALID|NODEID)|JSM_NAMESPACE_.*|LSB_DJOB_RANKFILE"
    "|PL_TRAINER_.*"
)
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def clean(script: str) -> None:
    """Remove what is left over, where the program is a lesson, and say so.

    Ends the process with 2, and one sentence, where torchrun has started a lesson for it, but has
    not told it all.
    """
    path = Path(script)
    if path.parent.absolute().name not in ("plain", "lightning") or path.suffix != ".py":
        return
    of_torchrun = path.stem in WITH_PROCESSES and bool(os.environ.get("TORCHELASTIC_RUN_ID"))
    if of_torchrun and (fault := _fault()):
        print(f"error: {fault}; start the lesson by make, or by torchrun.", file=sys.stderr)
        raise SystemExit(2)
    kept = "SLURM_|JSM_|LSB_|PL_TRAINER_" if of_torchrun else ""
    found = [n for n in os.environ if LEFT_OVER.fullmatch(n) and re.match(kept, n)]
    for name in found:
        del os.environ[name]
    if found and not of_torchrun:
        print(
            f"Ignored from the environment: {', '.join(found)}: this command is one process.",
            file=sys.stderr,
        )


def _fault() -> str | None:
    """Say what is wrong with what torchrun tells a process; None if nothing is."""
    for name in NUMBERS:
        value = os.environ.get(name, "")
        if not value.isdecimal() or len(value) > 9:
            return f"the environment's {name} is {value!r}, and not a whole number"
    rank, local, world, here, port = (int(os.environ[name]) for name in NUMBERS)
    if not (rank < world and local < here <= world and 0 < port < 65536):
        return (
            f"the environment's RANK {rank} of WORLD_SIZE {world}, and LOCAL_RANK {local} of "
            f"LOCAL_WORLD_SIZE {here}, do not fit together, or MASTER_PORT {port} is none"
        )
    return None if os.environ.get("MASTER_ADDR") else "the environment has no MASTER_ADDR"
