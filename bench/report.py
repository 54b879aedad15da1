"""What `bench.parallel` shows of its measurements: tables, a picture, the page docs/scale.md."""

from bench import ring
from bench.ring import markdown, size_text, time_text
from common import SIDES, figures
from common.folders import write_whole
from common.messages import BadInput

import io
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

COLORS = {"plain": figures.BLUE, "lightning": figures.ORANGE}
RINGS = ((figures.GREEN, "o"), (figures.PURPLE, "s"), ("black", "^"))  # by the number of processes


def fit(sizes: list[int], seconds: list[float], devices: int) -> dict[str, float]:
    """Return latency and bandwidth with which a ring of `devices` comes closest to what it took.

    And how far it is off at worst. Relative errors count: else the largest size decides alone.
    """
    size, took = np.array(sizes, dtype=float), np.array(seconds)
    terms = np.stack([np.ones_like(size), size], axis=1)
    (fixed, each), *_ = np.linalg.lstsq(terms / took[:, None], np.ones_like(took), rcond=None)
    messages = 2 * (devices - 1)
    off = np.abs((fixed + each * size) / took - 1).max()
    return {"alpha": fixed / messages, "beta": messages / devices / each, "off": float(off)}


def links(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what was fitted, by number of processes."""
    rows = found["all_reduce"]
    result = {}
    for devices in sorted({row["devices"] for row in rows}):
        points = [
            (row["bytes"], median(row["seconds"])) for row in rows if row["devices"] == devices
        ]
        sizes, seconds = zip(*points, strict=True)
        result[f"{devices}"] = fit(list(sizes), list(seconds), devices)
    return result


def ideals(alone: float, devices: int, cores: int) -> tuple[float, float]:
    """Return what a step would take, from that of one process: as told, and as the cores allow."""
    return alone / devices, alone / min(devices, cores)


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each batch size, number of processes and side; times are in seconds.

    `step` is the median of the rounds, `spread` the fastest and the slowest. `silent` is a step in
    which gradients are not sent, `waiting` the share of a step that this saves: the median of the
    rounds, the least and the most. `alone` is an all-reduce of as many bytes with nothing else to
    do, or None for one process.
    """
    steps = {
        (row["batch_size"], row["devices"], row["side"], row["sync"]): row["seconds"]
        for row in found["steps"]
    }
    own = found["setting"]["gradient_bytes"]
    sent = {r["devices"]: median(r["seconds"]) for r in found["all_reduce"] if r["bytes"] == own}
    rows = []
    for batch_size, devices, side in sorted({key[:3] for key in steps}, key=_place):
        taken, silent = (steps[batch_size, devices, side, sync] for sync in (True, False))
        one, step = median(steps[batch_size, 1, side, True]), median(taken)
        told, of_cores = ideals(one, devices, found["machine"]["cores"])
        parts = [1 - less / more for less, more in zip(silent, taken, strict=True)]
        rows.append(
            {"batch_size": batch_size, "devices": devices, "side": side, "step": step}
            | {"spread": (min(taken), max(taken)), "ideal": told, "ideal_of_cores": of_cores}
            | {"times": one / step, "silent": median(silent), "alone": sent.get(devices)}
            | {"waiting": (median(parts), min(parts), max(parts))}
        )
    return rows


def _place(key: tuple[int, int, str]) -> tuple[int, int, int]:
    return *key[:2], SIDES.index(key[2])


HEADS = ["batch", "processes", "side", "step", "rounds, ms", "ideal", "of cores", "faster"]
HEADS += ["not sent", "waiting", "all-reduce alone"]


def step_table(found: dict[str, Any]) -> list[list[str]]:
    """Return a row of texts, in the order of HEADS, for each row of the summary."""
    rows = []
    for row in summary(found):
        part, least, most = (_percent(part) for part in row["waiting"])
        low, high = (f"{1e3 * end:.3g}" for end in row["spread"])
        alone = row["alone"]
        rows.append(
            [
                f"{row['batch_size']}",
                f"{row['devices']}",
                row["side"],
                time_text(row["step"]),
                f"{low} to {high}",
                time_text(row["ideal"]),
                time_text(row["ideal_of_cores"]),
                f"{row['times']:.2f}",
                time_text(row["silent"]),
                f"{part}% ({least} to {most})",
                f"{time_text(alone)}, {_percent(alone / row['step'])}%" if alone else "",
            ]
        )
    return rows


def all_reduce_table(found: dict[str, Any]) -> list[list[str]]:
    """Return the median times of an all-reduce alone, a row for each size; first the heads."""
    rows = found["all_reduce"]
    counts = sorted({row["devices"] for row in rows})
    times = {(row["bytes"], row["devices"]): median(row["seconds"]) for row in rows}
    return [
        ["bytes", *(f"{count} processes" for count in counts)],
        *(
            [size_text(size), *(time_text(times[size, count]) for count in counts)]
            for size in sorted({size for size, _ in times})
        ),
    ]


def _percent(part: float) -> int:
    return round(100 * part)


def equalised(found: dict[str, Any]) -> str:
    """Say what is the same for all that is compared, and on what it was measured."""
    setting, machine, versions = found["setting"], found["machine"], found["versions"]
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores, with a load average of "
        f"{machine['load_average_at_start']} before it began; Python {versions['python']}, torch "
        f"{versions['torch']}, lightning {versions['lightning']}. Medians of {setting['rounds']} "
        f"rounds of {setting['steps']} steps, of the slowest process. The same for all: one thread "
        "in each process, the same batches of the built-in shapes, the same initial weights, no "
        "validation, no logging, no checkpoint, no progress bar; groups and sides take turns in "
        "each round, one at a time. One process has DDP around its network, too. A step is the "
        "lesson's: fetch the batch, forward, backward, all-reduce, update. Both sides ended each "
        "turn with the same weights, bit for bit, with gradients sent and not sent."
    )


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """Return every part of the page that is not written by hand, by name."""
    fitted = [
        [count, time_text(link["alpha"]), f"{size_text(link['beta'])}/s", f"{link['off']:.0%}"]
        for count, link in links(found).items()
    ]
    largest = max(row["batch_size"] for row in found["steps"])
    one = next(row for row in summary(found) if row["batch_size"] == largest)  # one process, plain
    measured = {"links": links(found), "cores": found["machine"]["cores"]}
    measured["seconds_per_image"] = one["silent"] / largest
    return {
        "what was measured": equalised(found),
        "steps": markdown(HEADS, *step_table(found)),
        "fit": markdown(["processes", "latency", "bandwidth", "off by, at most"], *fitted),
        **ring.tables(measured),
    }


def fill(page: str, parts: dict[str, str], by: str = "bench.parallel") -> str:
    """Return the page with each part between its two comments, in place of what is there."""
    for name, text in parts.items():
        begin, end = f"<!-- {name}: written by {by} -->\n", "<!-- end -->"
        assert page.count(begin) == 1, f"the page lacks a place for '{name}'"
        before, _, rest = page.partition(begin)
        page = before + begin + text + "\n" + rest[rest.index(end) :]
    return page


def read_measured(path: Path) -> dict[str, Any]:
    """Return what was measured before; raise BadInput where nothing was."""
    if not path.is_file():
        raise BadInput(f"there is no '{path}' yet; measure first, without --tables.")
    return json.loads(path.read_text())


def draw(found: dict[str, Any]) -> Figure:
    """Draw the time of a step over the processes, a panel for each batch size; and all-reduces."""
    rows = summary(found)
    batch_sizes = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(4.6 * (len(batch_sizes) + 1), 4.2), layout="constrained")
    *panels, last = figure.subplots(1, len(batch_sizes) + 1)
    for axis, batch_size in zip(panels, batch_sizes, strict=True):
        for side in SIDES:
            mine = [r for r in rows if (r["batch_size"], r["side"]) == (batch_size, side)]
            counts = [r["devices"] for r in mine]
            steps = 1e3 * np.array([r["step"] for r in mine])
            ends = 1e3 * np.array([r["spread"] for r in mine]).T
            bars = np.abs(ends - steps)
            places = np.array(counts) + 0.04 * SIDES.index(side)  # beside each other
            axis.errorbar(places, steps, bars, fmt="o-", color=COLORS[side], capsize=4,
                          label=figures.SIDES[side])  # fmt: skip
            silent = [1e3 * r["silent"] for r in mine]
            label = f"{figures.SIDES[side]}, gradients not sent"
            axis.plot(counts, silent, "x--", color=COLORS[side], label=label, alpha=0.7)
        plain = [r for r in rows if (r["batch_size"], r["side"]) == (batch_size, "plain")]
        for name, style in (("ideal", ":"), ("ideal_of_cores", "-.")):
            label = "plain, ideal" if name == "ideal" else "plain, ideal of the cores"
            axis.plot(counts, [1e3 * r[name] for r in plain], style, color="gray", label=label)
        axis.set(title=f"{batch_size} images in a step", ylim=(0, None), xticks=counts)
        axis.set(xlabel="processes", ylabel="milliseconds of a step")
        axis.legend(fontsize=8)
    for number, (count, link) in enumerate(links(found).items()):
        mine = [row for row in found["all_reduce"] if row["devices"] == int(count)]
        sizes = np.array([row["bytes"] for row in mine])
        color, mark = RINGS[number % len(RINGS)]
        last.loglog(sizes, [1e3 * median(row["seconds"]) for row in mine], mark, color=color)
        way = ring.Link("", link["alpha"], link["beta"])
        line = [1e3 * ring.ring(int(count), size, way) for size in sizes]
        last.loglog(sizes, line, color=color, label=f"{count} processes, and the ring fitted")
    own = found["setting"]["gradient_bytes"]
    last.axvline(own, color="gray", linestyle=":", label=f"the gradients: {size_text(own)}")
    last.set(title="an all-reduce alone", xlabel="bytes", ylabel="milliseconds")
    last.legend(fontsize=8)
    return figure


def write(found: dict[str, Any], folder: Path) -> None:
    """Print the tables; write the picture into the folder, and all into the page beside it."""
    parts, console = blocks(found), Console()
    console.width = max(console.width, 100)  # narrower, it would break every cell
    steps, sizes = step_table(found), all_reduce_table(found)
    for title, heads, rows in (
        ("a training step", HEADS[:8], [row[:8] for row in steps]),
        (
            "how much of it is communication",
            [*HEADS[:4], *HEADS[8:]],
            [r[:4] + r[8:] for r in steps],
        ),
        ("an all-reduce alone", sizes[0], sizes[1:]),
    ):
        table = Table(*heads, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    print(*(f"{text}\n" for name, text in parts.items() if name != "steps"), sep="\n")
    drawing = io.BytesIO()
    draw(found).savefig(drawing, dpi=110)
    # 64 colours are enough for it, and make the file a third as large.
    picture = Image.open(drawing).convert("RGB").quantize(64)
    write_whole(folder / "parallel.png", lambda path: picture.save(path, optimize=True))
    page = folder.with_suffix(".md")
    if page.is_file():
        text = fill(page.read_text(encoding="utf-8"), parts)
        write_whole(page, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"The tables of {page} are written anew.")
    print(f"Written to {folder}/: parallel.json, parallel.png")
