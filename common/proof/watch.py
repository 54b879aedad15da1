"""Trains under observation, and writes what came of it: result.json, weights.pt, pictures, a table.

`watch(main, args)` is what `common.run.run` does with a lesson, and what the tests do.
"""

from common import checkpoints, figures, signals
from common.data import Data, Images, count_samples, processes
from common.folders import (
    EVIDENCE,
    put_back,
    read_metrics,
    read_rows,
    settle,
    write_rows,
    write_whole,
)
from common.messages import notice, printable
from common.networks import classifies
from common.proof.evidence import Evidence
from common.proof.fingerprints import code_sha256, fingerprints, sha256, versions
from common.run import evidence_file

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Result = dict[str, Any]  # what result.json holds


def watch(main: Callable[[Any], nn.Module], args: Any) -> Result:
    """Train, write the results into args.folder, and return what result.json holds.

    Of several processes, the first one writes, and the others get {}. A number that is not finite,
    as after too large a learning rate, becomes None: JSON has no other word for it.
    """
    with until_a_step(args):
        return _watch(main, args)


def _watch(main: Callable[[Any], nn.Module], args: Any) -> Result:
    torch.set_num_threads(args.threads)
    before = args.ckpt_path.resolve().parents[1] / EVIDENCE if args.begun_at else None
    with Evidence(evidence_file(args), args.begun_at, before, args.rows_before) as evidence:
        net = main(args)
    found = evidence.found(net)
    if processes()[0] > 0:
        return {}
    # The Trainer has moved the network back to the CPU: it is tested again where it was trained.
    device = evidence.device or next(net.parameters()).device
    net.to(device)
    folder = args.folder
    if args.rows_before:  # the logger of each process begins metrics.csv anew
        write_rows(folder / "metrics.csv", [*args.rows_before, *read_rows(folder)])
    is_classifier = classifies(args.lesson)
    if is_classifier:
        measured = of_classifier(net, evidence.images["test"], args)
    else:
        measured = {"scores": scores(folder)}
    content = io.BytesIO()  # into a file by name, torch.save would write that name too
    torch.save({name: value.detach().cpu() for name, value in net.state_dict().items()}, content)
    weights = content.getvalue()
    result = {
        "lesson": args.lesson,
        "side": args.side,
        "data": evidence.images["test"].name if is_classifier else args.used_data,
        "seed": args.seed,
        "hyperparameters": hyperparameters(args),
        "versions": versions(),
        "device": device.type,  # without the number that one side gives
        "threads": args.threads,
        "train_loss": found["train_loss"],
        **measured,
        "checkpoints": written(folder),
        "train_seconds": found["train_seconds"],
        "weights_sha256": sha256(weights),
        "code_sha256": code_sha256(args.side),
        "fingerprints": found["fingerprints"],
    }
    result = finite(result)
    write_whole(folder / "weights.pt", lambda path: path.write_bytes(weights))
    if is_classifier:
        # A run that was resumed from its last step may make no loader to train or to validate.
        test = evidence.images["test"]
        data = Data(*(evidence.made.get(split, test) for split in ("train", "val", "test")))
        pictures = figures.draw(net.cpu().eval(), data, result, read_rows(folder))
    else:
        pictures = {"curves.png": figures.curves(result)}
    for name, figure in pictures.items():
        write_whole(folder / name, figure.savefig)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"  # a line for each name
    # Last: where it is, the rest is too.
    write_whole(folder / "result.json", lambda path: path.write_text(text))
    return result


def of_classifier(net: nn.Module, test: Images, args: Any) -> dict[str, Any]:
    """Return what result.json holds of a network that names classes."""
    folder, count, names = args.folder, count_samples(test, args), ("loss", "accuracy", "f1")
    val, rows = read_metrics(folder, "val"), read_metrics(folder, "test")
    counts = confusion(net, test, count, getattr(args, "precision", ""))
    # With --fast-dev-run nothing is logged.
    tested = rows[-1] if rows else averages(net, test, count, counts)
    per_class = (counts.diag() / counts.sum(1).clamp(min=1)).tolist()
    return {
        **{f"val_{name}": [row[name] for row in val] for name in names},
        **{f"test_{name}": tested[name] for name in names},
        "test_accuracy_per_class": dict(zip(test.classes, per_class, strict=True)),
        "confusion_matrix": counts.tolist(),
    }


def scores(folder: Path) -> dict[str, Any]:
    """Return what another network's run logged: of each validation a list, of the test a number."""
    val, test = read_metrics(folder, "val"), read_metrics(folder, "test")
    names = {f"val_{name}": [row[name] for row in val] for row in val[:1] for name in row}
    return names | {f"test_{name}": value for name, value in (test[-1] if test else {}).items()}


@contextlib.contextmanager
def until_a_step(args: Any) -> Iterator[None]:
    """Put back what made way for a run that fails before an optimizer made its first step.

    A run that makes none, since all is trained, has to come to the block's end.
    """

    settled = False  # asked in each step: the folder is looked at in the first one alone

    def made(optimizer: Any, *_: Any) -> None:
        nonlocal settled
        # FSDP makes a step with a learning rate of 0 for an optimizer's state to exist.
        if not settled and args.started and any(group["lr"] for group in optimizer.param_groups):
            settle(args.place)
            settled = True

    hook = register_optimizer_step_post_hook(made)
    try:
        yield
    except BaseException:
        if args.started:
            signals.hear_of_no_process()  # or its error would break off what follows
            put_back(args.place)
        raise
    finally:
        hook.remove()
    if args.started:
        settle(args.place)


@torch.no_grad()
def confusion(net: nn.Module, images: Images, count: int, precision: str) -> Tensor:
    """Test a network on the first `count` images: counts[true class, predicted class], [10, 10].

    `precision` is that of the lesson: another one would decide some images otherwise.
    """
    net.eval()
    parameter = next(net.parameters())
    device, counts = parameter.device, torch.zeros(100, dtype=torch.long)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.autocast(device.type, half, enabled=half is not None):
        for first in range(0, count, 512):
            batch, labels = images.__getitems__(list(range(first, min(first + 512, count))))
            predicted = net(batch.to(parameter)).argmax(1).cpu()
            counts += torch.bincount(10 * labels + predicted, minlength=100)
    return counts.reshape(10, 10)


@torch.no_grad()
def averages(net: nn.Module, images: Images, count: int, counts: Tensor) -> dict[str, float]:
    """Return loss, accuracy and macro F1 on the first `count` images, for a run without a logger.

    `counts` are theirs, as `confusion` returns them. The network is in eval mode already.
    """
    batch, labels = images.__getitems__(list(range(count)))
    parameter = next(net.parameters())
    loss = F.cross_entropy(net(batch.to(parameter)), labels.to(parameter.device))
    right, true, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    f1 = (2 * right / (true + predicted))[true + predicted > 0].mean()
    return {"loss": loss.item(), "accuracy": (right.sum() / count).item(), "f1": f1.item()}


def hyperparameters(args: Any) -> dict[str, Any]:
    """Return the settings that both runs of a comparison must share, as JSON can hold them."""
    settings = args.settings()
    for name in ("seed", "lesson", "data", "classes"):  # which have a place of their own
        del settings[name]
    start = Path(settings.get("start_from") or "none")
    if start.is_file():  # another content under the same name makes another run
        settings["start_from"] = f"{start}, sha256 {sha256(start.read_bytes())}"
    return settings


def written(folder: Path) -> dict[str, str]:
    """Say what the checkpoints hold that a run left: epoch, step and a digest of the weights.

    And how many answers it wrote, with their digest.
    """
    found, steps = {}, sorted((folder / "checkpoints").glob("step_*.ckpt"))
    for path in [*sorted((folder / "checkpoints").glob("[bl]*.ckpt")), *steps[-1:]]:  # best, last
        content = checkpoints.read(path)
        weights = fingerprints(checkpoints.weights(content, path))
        digest = sha256(json.dumps(weights, sort_keys=True).encode())[:8]
        found[path.name] = f"epoch {content['epoch']}, step {content['global_step']:,}, {digest}"
    if (path := folder / "answers.npy").is_file():  # what the network said, one row for each image
        answers = np.load(path, allow_pickle=False)
        found[path.name] = f"{len(answers):,} answers, {sha256(answers.tobytes())[:8]}"
    return found


def show(result: Result, args: Any) -> None:
    """Print the final table, the same on both sides."""
    if not result:
        return  # with several processes, the first one shows
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['lesson']}: test on {result['data']}", title_justify="left")
    table.add_column("")
    table.add_column(result["side"], justify="right")
    if "scores" in result:
        tested = {k[5:]: v for k, v in result["scores"].items() if k.startswith("test_")}
        for name, value in tested.items():
            table.add_row(
                name.replace("_", " "), "not a number" if value is None else f"{value:.4f}"
            )
        loss = next(iter(tested.values()), None)
    else:
        loss = result["test_loss"]
        table.add_row("loss", "not a number" if loss is None else f"{loss:.4f}")
        table.add_row("accuracy", f"{result['test_accuracy']:.2%}")
        table.add_row("macro F1", f"{result['test_f1']:.4f}", end_section=True)
        for name, accuracy in result["test_accuracy_per_class"].items():
            table.add_row(f"accuracy, {name}", f"{accuracy:.2%}")
    table.add_section()
    for name, value in result["checkpoints"].items():
        table.add_row(name, value)
    if result["checkpoints"]:
        table.add_section()
    table.add_row("training batches", f"{len(result['train_loss']):,}")
    table.add_row("seconds of training", f"{result['train_seconds']:.1f}")
    table.add_row("device, threads", f"{result['device']}, {result['threads']}")
    table.add_row("sha256 of the weights", result["weights_sha256"][:16])
    Console().print(table)
    if None in result["train_loss"]:
        step = result["train_loss"].index(None) + 1
        print(f"The loss of step {step} is not a number: nothing was learned; try a smaller --lr.")
    elif loss is None:
        print("The test loss is not a number: the last steps spoiled it; try a smaller --lr.")
    elif chance := at_chance(result):
        print(
            f"The network is still at {chance}: the run may be too short, --lr may not suit it, "
            "or the training has a mistake."
        )
    if "scores" not in result:
        _warn_of_another_network(result, args)
    files = ", ".join(sorted(path.name for path in args.folder.glob("[!.]*")))
    print(printable(f"Written to {args.folder}/: {files}"))


def _warn_of_another_network(result: Result, args: Any) -> None:
    """Say so where main returned another network than it tested."""
    tta = getattr(args, "tta", False)  # speed can test each image several times
    counts = torch.tensor(result["confusion_matrix"])
    returned = (counts.diag().sum() / counts.sum()).item()
    if not math.isclose(returned, result["test_accuracy"], abs_tol=1e-6) and not tta:
        notice(
            f"main returned a network that has {returned:.2%} of the test images right, and logged",
            f"{result['test_accuracy']:.2%}: it is not the one that was tested.",
        )


def at_chance(result: Result) -> str:
    """Say at which level pure chance is, where a network is hardly better; else return ""."""
    if "scores" in result:
        return ""
    chance = 1 / len(result["test_accuracy_per_class"])
    return f"chance level, {chance:.0%}" if result["test_accuracy"] < 1.5 * chance else ""


def finite(value: Any) -> Any:
    """Replace each number that is not finite by None, also within lists and dicts."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
