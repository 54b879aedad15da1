"""Watches a training from outside, whoever wrote it, and keeps what parity compares.

    with Evidence() as evidence:
        net = main(args)  # any code: a loop by hand, trainer.fit
    found = evidence.found(net)

The code that is watched knows nothing of it. Both sides are seen by the same observers, at the
places that PyTorch itself passes through: `Tensor.backward` is told the loss, `Optimizer.step`
holds the weights, a DataLoader hands out the images in their order. None of them computes anything
in a step; they keep what is there, and the digests are made when all is over.

A run that may be killed names a file. Then all that has come is appended to it before a checkpoint
is written: where a checkpoint is, the evidence up to its step is, too. Each line says from which
step to which it reaches; whoever resumes from a checkpoint takes the lines that lead to its step.
So are the rows of metrics.csv: a logger may be killed while it writes that file anew.
Of several processes each has a file; the first one appends before it saves, the others when a
validation begins, which all begin before the first one can save.
"""

from common.batches import DeviceBatches
from common.data import EpochSampler, Images, processes
from common.folders import read_rows
from common.proof.evidence_file import form, of_rank, read, together
from common.proof.fingerprints import (
    fingerprint,
    fingerprints,
    optimizer_fingerprints,
    random_state,
    sha256,
)

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

Order = dict[int, list[int]]  # the samples of each epoch


@contextlib.contextmanager
def observed(owner: Any, name: str, observer: Callable[[Any], Any]) -> Iterator[None]:
    """Put `observer(usual)` in the place of owner.name while the block runs."""
    usual = getattr(owner, name)
    setattr(owner, name, observer(usual))
    try:
        yield
    finally:
        setattr(owner, name, usual)


def told(note: Callable[..., Any]) -> Callable[[Any], Any]:
    """Make an observer that calls `note` with the arguments of each call, before it."""

    def observer(usual: Any) -> Any:
        @functools.wraps(usual)  # the Trainer reads from the signature how to make another loader
        def call(*args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return usual(*args, **kwargs)

        return call

    return observer


class Evidence:
    """What was trained on, from which weights, with which losses, and what came of it.

    `file` is where a run that can be resumed keeps it, `step` the step of the checkpoint from which
    it is resumed, `before` the file beside that checkpoint, `rows` what metrics.csv then held.
    Raises BadInput where it does not reach that step.
    """

    def __init__(
        self,
        file: Path | None = None,
        step: int = 0,
        before: Path | None = None,
        rows: list[dict[str, Any]] | None = None,
    ) -> None:
        self.losses: list[Tensor] = []
        self.start: dict[Tensor, Tensor] = {}  # each parameter as it was before its first step
        self.optimizers: dict[Optimizer, int] = {}  # with how many groups it was seen
        self.made: dict[str, Images] = {}  # of each split that a loader was made for
        self.images: dict[str, Images] = {}  # of each split that was handed out
        self.sampler: EpochSampler | None = None
        self.order: Order = {}
        self.others: dict[Any, list[Any]] = {}  # loaders of other samplers: what they handed out
        self.latest: Any = None  # of these, the one that was asked last
        self.trained: list[Any] = []  # of these, those whose batches a backward pass followed
        self.digests: dict[str, str] = {}
        self.random: dict[str, str] = {}
        self.began = self.ended = 0.0
        self.file, self.begun, self.since, self.steps = file, step, step, step
        self.rows = rows or []
        self.written, self.written_of = 0, dict[int, int]()  # losses, and samples of each epoch
        if file and (rank := processes()[0]) > 0:
            self.file = of_rank(file, rank)
        self.before = read(before or file, step) if file and step else []
        self.forms = self.before[-1]["forms"] if self.before else []  # of this step's checkpoints

    def __enter__(self) -> "Evidence":
        self.observers = contextlib.ExitStack()
        for owner, name, observer in (
            (Tensor, "backward", told(self._backward)),
            (DataLoader, "__init__", told(self._made)),
            (DataLoader, "__iter__", told(self._loader)),
            (_BaseDataLoaderIter, "_next_index", self._batch),
            (_BaseDataLoaderIter, "__next__", self._streamed),
            (DeviceBatches, "__init__", told(self._batches)),
            (EpochSampler, "__iter__", self._samples),
            (Optimizer, "load_state_dict", told(self._seen)),
            *([(torch, "save", told(self._save))] if self.file else []),
        ):
            self.observers.enter_context(observed(owner, name, observer))
        self.observers.callback(register_optimizer_step_pre_hook(self._step).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self.observers.close()
        self.random = random_state()

    @property
    def device(self) -> torch.device | None:
        """Where it was trained; None without a step in this process."""
        return self.losses[-1].device if self.losses else None

    # From here on: the observers.

    def _backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        self.losses.append(loss.detach())
        if self.latest is not None:
            self.trained.append(self.latest)
            self.latest = None

    def _step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.losses and not any(group["lr"] for group in optimizer.param_groups):
            return  # so FSDP makes an optimizer's state, to load a checkpoint's into it
        self.ended = time.perf_counter()
        self.steps += 1
        if self.optimizers.get(optimizer) == len(optimizer.param_groups):
            return
        self._seen(optimizer)
        for p in _parameters(optimizer):  # also those of a group that comes later
            if p not in self.start:
                self.start[p] = whole(p.detach()).clone()  # here, where all processes are

    def _seen(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Know an optimizer: at its first step, or where its state is loaded, if none follows."""
        self.optimizers[optimizer] = len(optimizer.param_groups)

    def _made(self, loader: DataLoader, dataset: Any = None, *_: Any, **__: Any) -> None:
        if isinstance(dataset, Images):
            self.made[dataset.split] = dataset

    def _loader(self, loader: DataLoader) -> None:
        self.began = self.began or time.perf_counter()
        if isinstance(loader.dataset, Images):
            self.images[loader.dataset.split] = loader.dataset
            if loader.dataset.split != "train" and self.file and processes()[0] > 0:
                self._append(self.steps)

    def _batches(self, batches: Any, images: Images, *_: Any, **__: Any) -> None:
        self.images[images.split] = images

    def _samples(self, usual: Any) -> Any:
        def samples(sampler: EpochSampler) -> Iterator[int]:
            self.sampler = sampler
            self.began = self.began or time.perf_counter()
            seen = self.order[sampler.epoch] = []
            for sample in usual(sampler):
                seen.append(sample)
                yield sample

        return samples

    def _batch(self, usual: Any) -> Any:
        def next_index(loader: Any) -> Any:
            indices = usual(loader)
            sampler = getattr(loader._index_sampler, "sampler", None)
            ours = isinstance(loader._dataset, Images)  # `_samples` sees their order while training
            train = ours and loader._dataset.split == "train"
            if isinstance(loader._dataset, IterableDataset):
                return indices
            if not ours or (train and not isinstance(sampler, EpochSampler)):
                self.others.setdefault(loader, []).append(indices)
                self.latest = loader
            return indices

        return next_index

    def _streamed(self, usual: Any) -> Any:
        """Note what a stream hands out: it has no samples that could be named by their numbers."""

        def following(loader: Any) -> Any:
            batch = usual(loader)
            if isinstance(loader._dataset, IterableDataset):
                parts = tree_leaves(batch)
                prints = [fingerprint(part)["sha256"] for part in parts if isinstance(part, Tensor)]
                self.others.setdefault(loader, []).append(prints)
                self.latest = loader
            return batch

        return following

    def _save(self, content: Any, *_: Any, **__: Any) -> None:
        if isinstance(content, dict) and "global_step" in content and processes()[0] == 0:
            self._append(content["global_step"], form(content))

    # From here on: what was seen.

    def _line(self, step: int, whole_process: bool = False) -> dict[str, Any]:
        """Return what has come since the last line, or since this process began."""
        since, first, firsts = self.since, self.written, self.written_of
        if whole_process:
            since, first, firsts = self.begun, 0, {}
        world, skipped = processes()[1], self.sampler.skipped if self.sampler else {}
        losses = [loss.item() for loss in self.losses[first:]]
        order = {}
        # Without a loss, what came was loaded ahead, for steps that may never be made.
        for epoch, samples in self.order.items() if losses else ():
            done = firsts.get(epoch, 0)
            # Where in the epoch they begin, of all processes together.
            order[str(epoch)] = [skipped.get(epoch, 0) + done * world, samples[done:]]
        line: dict[str, Any] = {"from": since, "global_step": step, "losses": losses}
        line |= {"order": order, "data": self._data(), "world": world}
        if since == 0:
            line["start"] = [fingerprint(value) for value in self.start.values()]
        self.written, self.since = len(self.losses), step
        if losses:
            self.written_of = {epoch: len(samples) for epoch, samples in self.order.items()}
        return line

    def _append(self, step: int, form: str = "") -> None:
        """Add a line up to a step, with the form of the checkpoint that is about to be written."""
        line: dict[str, Any] = {"global_step": step, "form": form}
        assert self.file
        if step > self.since:
            if not self.file.parent.exists():  # of a machine that has a disk of its own
                self.file.parent.mkdir(parents=True)
            # From the last step before on: its row may be written after its checkpoint.
            rows = [*self.rows, *read_rows(self.file.parent)] if processes()[0] == 0 else []
            rows = [row for row in rows if row["step"] >= self.since - 1]
            line |= self._line(step) | {"rows": rows}
        elif (
            not form or form in self.forms
        ):  # the best checkpoint and the last one may be of the same step
            return
        self.forms = [form] if len(line) > 2 else [*self.forms, form]
        with self.file.open("a") as file:
            # A line of its own, also after one that a kill cut short.
            file.write(f"\n{json.dumps(line)}\n")

    def _data(self) -> dict[str, str]:
        """Return the digests of the data that was handed out, each computed once."""
        parts: dict[str, Tensor] = {}
        for split, images in self.images.items():
            parts |= {f"{split} images": images.images, f"{split} labels": images.labels}
        found = [tensor for loader in self.trained for tensor in _tensors(loader._dataset)]
        parts |= {f"training data, tensor {n}": t for n, t in enumerate(dict.fromkeys(found))}
        for name, tensor in parts.items():
            if name not in self.digests:
                self.digests[name] = fingerprint(tensor)["sha256"]
        return dict(self.digests)

    def found(self, net: nn.Module | None = None) -> dict[str, Any]:
        """Return the part of result.json that comes from watching.

        `net` names the weights; without it, those are taken that the optimizers stepped. Of several
        processes all must call; what the first one gets is of all of them.
        """
        mine = self._line(self.steps, whole_process=True)
        lines: list[Any] = [mine]
        if distributed.is_available() and distributed.is_initialized():
            lines = [None] * distributed.get_world_size()
            distributed.all_gather_object(lines, mine)
        merged = [*self.before, together(lines)]
        data: dict[str, str] = {}
        order: Order = {}
        for line in merged:
            for name, digest in line["data"].items():
                data[name] = digest if data.get(name, digest) == digest else "changed on the way"
            for epoch, (first, samples) in line["order"].items():
                there = order.setdefault(int(epoch), [])
                # The Trainer, resumed, lets workers load ahead in an epoch that is over.
                if there[first : first + len(samples)] != samples:
                    there[first:] = samples
        for epoch, samples in order.items():
            data[f"order of epoch {epoch}"] = sha256(json.dumps(samples).encode())
        for number, loader in enumerate(dict.fromkeys(self.trained)):
            order_of_pass = json.dumps(self.others[loader], default=str).encode()
            data[f"order of pass {number}"] = sha256(order_of_pass)
        start: list[Any] = next((line["start"] for line in merged if "start" in line), [])
        names, optimizers = self._names(net), [each.state_dict() for each in self.optimizers]
        prints: dict[str, Any] = {}
        for number, state in enumerate(optimizers):
            prefix = f"optimizer {number}, " if len(optimizers) > 1 else ""
            flat = optimizer_fingerprints(whole(state))
            prints |= {prefix + name: value for name, value in flat.items()}
        weights = net.state_dict() if net else dict(zip(names, self.start, strict=True))
        return {
            "train_loss": [loss for line in merged for loss in line["losses"]],
            "fingerprints": {
                "data": data,
                "start": dict(zip(names, start, strict=True)),
                "weights": fingerprints(weights),
                "optimizer": prints,
                "random": self.random,
            },
            "train_seconds": max(0.0, self.ended - self.began),
        }

    def _names(self, net: nn.Module | None) -> list[str]:
        """Name the parameters that were seen; by their places, where `net` is another network."""
        # Without a step in this process, those of the optimizers that were loaded.
        seen = list(self.start) or [p for each in self.optimizers for p in _parameters(each)]
        names: dict[Tensor, str] = {p: name for name, p in net.named_parameters()} if net else {}
        by_place = list(names.values()) if len(names) == len(seen) else []
        if not names.keys() & set(seen) and by_place:
            return by_place
        return [names.get(p, f"parameter {number}") for number, p in enumerate(seen)]


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _tensors(dataset: Any) -> list[Tensor]:
    """Return the tensors and arrays that a data set of anyone's keeps in its attributes."""
    found = []
    for value in vars(dataset).values():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, np.ndarray) and part.dtype != object:
                found.append(torch.as_tensor(part))
            elif isinstance(part, Tensor):
                found.append(part)
    return found


def whole(state: Any) -> Any:
    """Return a state_dict with what FSDP split put together; all processes must call."""
    if not distributed.is_available() or not distributed.is_initialized():
        return state  # and spares the import, which takes a second
    from common import processes

    return processes.whole(state)
