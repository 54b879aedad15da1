"""What an all-reduce costs on paper, and what follows from it for 8, 64 and 1,024 devices.

`tables` computes every number that docs/scale.md gives for more devices than were measured.
"""

from common.models import Net, Transfer

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DEVICES = (8, 64, 1024)
SERVER = 8  # GPUs in one server, between which there is NVLink
BYTES = 4  # of one number: weights and gradients are float32
BUCKET = 25 * 2**20  # how many bytes of gradients DDP sends at once


@dataclass(frozen=True)
class Link:
    """A way from one device to the next."""

    name: str
    alpha: float  # latency: seconds that a message takes however short it is
    beta: float  # bandwidth: bytes in a second, in one direction


# Not measured here. Latencies: those with which NCCL itself computes which algorithm is the
# fastest (src/graph/tuning.cc: hwLat, Ring, LL128). Bandwidths: the vendor's, which nobody reaches
# in full; NVLink's 900 GB/s are both directions together.
NVLINK = Link("NVLink", 1.9e-6, 450e9)
FAST = Link("400 Gb/s", 4.0e-6, 400e9 / 8)
SLOW = Link("100 Gb/s", 4.0e-6, 100e9 / 8)
# One H100: half of the 1,979e12 that its data sheet promises for sparse matrices in bfloat16, and
# of that half the share that Llama 3 reached with 8,192 to 16,384 of them (38 to 43 %).
GPU_FLOPS = 0.4 * 1979e12 / 2


def ring(devices: int, size: float, link: Link) -> float:
    """Return the seconds of an all-reduce of `size` bytes by a ring.

    Each device sends 2 (p-1) messages of size/p bytes, one after the other.
    """
    messages = 2 * (devices - 1)
    return messages * link.alpha + messages / devices * size / link.beta


def tree(devices: int, size: float, link: Link) -> float:
    """Return the seconds by two binary trees that carry half of the bytes each.

    Up to the root and down again, in pieces, so that all links are busy at once.
    """
    if devices == 1:
        return 0.0
    return 2 * math.ceil(math.log2(devices)) * link.alpha + 2 * size / link.beta


def two_levels(devices: int, size: float, inside: Link, between: Link) -> float:
    """Return the seconds by rings within servers, and between those of the same place in each.

    Half of the inner ring leaves each GPU the sum of an eighth, which is all that it sends to the
    other servers by its own adapter; the other half hands the results round.
    """
    if devices <= SERVER:
        return ring(devices, size, inside)
    return ring(SERVER, size, inside) + ring(devices // SERVER, size / SERVER, between)


def latency_below(devices: int, link: Link) -> float:
    """Return the bytes below which a ring waits longer for latency than for bandwidth."""
    return devices * link.alpha * link.beta


def waiting(
    compute: float, size: float, all_reduce: Callable[[float], float], overlap: bool
) -> float:
    """Return the seconds of a step in which a device waits for the others' gradients.

    `compute` are those of forward and backward. Without overlap all gradients are sent at once,
    after backward. With it they are sent in buckets, each as soon as backward has filled it, one
    after the other: at best the last one alone is waited for. Backward takes two thirds of
    `compute`, and is taken to fill all buckets equally fast.
    """
    buckets = math.ceil(size / BUCKET) if overlap else 1
    each, backward = all_reduce(size / buckets), 2 / 3 * compute
    return max(each, buckets * each - backward * (buckets - 1) / buckets)


def share(compute: float, waits: float) -> float:
    """Return which part of a step is spent waiting for the others."""
    return waits / (compute + waits)


# What is trained. From here on: tables.


@dataclass(frozen=True)
class Work:
    """A training: its size, its batches, and how long a device computes."""

    name: str
    parameters: int
    unit: str
    seconds: float  # of forward and backward for one image or token
    weak: int  # images or tokens on each device, however many devices there are
    strong: int  # images or tokens on all devices together
    adam: bool = False  # else SGD with momentum

    @property
    def bytes(self) -> int:
        return BYTES * self.parameters


@functools.cache
def flops(model: type[nn.Module]) -> tuple[int, int]:
    """Return the parameters of a network, and its operations for an image, forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # without any memory
        net = model()
        net(torch.zeros(1, 3, 32, 32)).sum().backward()
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


def works(measured: dict[str, Any]) -> list[Work]:
    """Return the lesson's training on processors like the one measured, and two on H100s."""
    count, _ = flops(Net)
    vgg, operations = flops(Transfer)
    seconds = measured["seconds_per_image"]
    billion = 10**9
    return [
        Work("this lesson's CNN, on such cores", count, "image", seconds, 32, 8192),
        Work("VGG16, on H100s", vgg, "image", operations / GPU_FLOPS, 32, 8192),
        # Six operations for each parameter and token.
        Work(
            "a transformer, on H100s", billion, "token", 6 * billion / GPU_FLOPS, 2**14, 2**22, True
        ),
    ]


def tables(measured: dict[str, Any]) -> dict[str, str]:
    """Return the page's tables about what was not measured, as Markdown, by name.

    `measured` has `links`, by number of processes, `cores`, and `seconds_per_image` of one process.
    """
    return {
        "all-reduce on paper": _all_reduce(measured),
        "latency on paper": _latency(measured),
        "share on paper": _share(measured),
        "memory on paper": _memory(measured),
    }


def measured_link(measured: dict[str, Any]) -> Link:
    """Return what was measured between most processes that had a core each."""
    counts = sorted(measured["links"], key=int)
    best = max((c for c in counts if int(c) <= measured["cores"]), key=int, default=counts[0])
    fit = measured["links"][best]
    return Link(f"gloo, as between {best} processes here", fit["alpha"], fit["beta"])


def _all_reduce(measured: dict[str, Any]) -> str:
    gloo = measured_link(measured)
    ways: dict[str, Callable[[int, float], float]] = {
        f"ring, {gloo.name}": lambda p, size: ring(p, size, gloo),
        "ring, 100 Gb/s": _processors,
        "ring, 400 Gb/s": lambda p, size: ring(p, size, FAST),
        "trees, 400 Gb/s": lambda p, size: tree(p, size, FAST),
        "two levels, NVLink and 400 Gb/s": _servers,
    }
    rows = [
        [
            f"{work.parameters:,}",
            f"{p:,}",
            *(time_text(way(p, work.bytes)) for way in ways.values()),
        ]
        for work in works(measured)
        for p in DEVICES
    ]
    return markdown(["parameters", "devices", *ways], *rows)


def _latency(measured: dict[str, Any]) -> str:
    rows = []
    for link in (measured_link(measured), SLOW, FAST, NVLINK):
        sizes = [size_text(latency_below(p, link)) for p in DEVICES]
        if link is NVLINK:
            sizes[1:] = [""] * len(sizes[1:])
        rows.append([link.name, time_text(link.alpha), f"{size_text(link.beta)}/s", *sizes])
    heads = ["ring over", "latency", "bandwidth", *(f"{p:,} devices" for p in DEVICES)]
    return markdown(heads, *rows)


def _share(measured: dict[str, Any]) -> str:
    rows = []
    for work in works(measured):
        gpus = "H100" in work.name
        for scaling in ("weak", "strong"):
            cells = []
            for p in DEVICES:
                sent = functools.partial(_servers if gpus else _processors, p)
                compute = (work.weak if scaling == "weak" else work.strong / p) * work.seconds
                parts = [
                    share(compute, waiting(compute, work.bytes, sent, bool(o))) for o in (0, 1)
                ]
                times = _digits(p * (1 - parts[1]))
                cells.append(f"{parts[0]:.0%} / {parts[1]:.0%}, {times} times")
            batch = f"{work.weak:,} on each" if scaling == "weak" else f"{work.strong:,} in all"
            rows.append([work.name, f"{scaling}: {batch}", *cells])
    return markdown(["training", "images or tokens", *(f"{p:,} devices" for p in DEVICES)], *rows)


def _servers(devices: int, size: float) -> float:
    return two_levels(devices, size, NVLINK, FAST)


def _processors(devices: int, size: float) -> float:
    return ring(devices, size, SLOW)


def memory(parameters: int, optimizer: int, devices: int) -> tuple[float, float]:
    """Return the bytes that DDP and FSDP keep on each device between two steps.

    Weights, gradients, and `optimizer` numbers for each weight; and DDP's buckets, a second copy of
    the gradients.
    """
    numbers = 2 + optimizer
    return BYTES * (numbers + 1.0) * parameters, BYTES * numbers * parameters / devices


def traffic(parameters: int, devices: int) -> tuple[float, float]:
    """Return the bytes that each device sends in a step with DDP and with FSDP.

    An all-reduce is a reduce-scatter and an all-gather; FSDP gathers twice.
    """
    part = (devices - 1) / devices * BYTES * parameters
    return 2 * part, 3 * part


def _memory(measured: dict[str, Any]) -> str:
    rows = []
    for work in works(measured):
        kept = [memory(work.parameters, 2 if work.adam else 1, p) for p in DEVICES]
        row = [f"{work.parameters:,}", "Adam" if work.adam else "SGD with momentum"]
        row += [size_text(kept[0][0]), *(size_text(fsdp) for _, fsdp in kept)]
        rows.append(row + [size_text(sent) for sent in traffic(work.parameters, DEVICES[-1])])
    heads = ["parameters", "optimizer", "DDP", *(f"FSDP, {p:,} devices" for p in DEVICES)]
    return markdown([*heads, "DDP sends", "FSDP sends"], *rows)


def markdown(heads: list[str], *rows: list[str]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_text(seconds: float) -> str:
    """Write a time with three digits and a unit that fits: 8.25 ms."""
    return _text(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def size_text(size: float) -> str:
    """Write a number of bytes with three digits and a unit that fits: 248 KB."""
    return _text(size, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("bytes", 1.0)))


def _text(value: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, one = next((unit for unit in units if value >= 0.9995 * unit[1]), units[-1])
    return f"{_digits(value / one)} {unit}"


def _digits(number: float) -> str:
    """Write a number with three digits, or more before the point."""
    return f"{number:,.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"
