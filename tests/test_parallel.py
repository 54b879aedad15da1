"""The lesson `parallel`, in real groups of one to four processes that talk through gloo.

torchrun takes half a minute to start a group here. These processes are forked instead, from one
that has imported both sides and trained nothing, and are told what torchrun would tell them.
test_machines.py starts torchrun itself.
"""

from common import ROOT, SIDES, checkpoints, processes, run
from common import data as data_module
from common.data import Images
from common.environment import WITH_PROCESSES
from common.messages import BadInput, clear_messages
from common.models import Net, NormNet
from common.proof import fingerprints
from common.proof.compare import compare_results
from common.proof.evidence import Evidence
from common.proof.lessons import load
from common.proof.watch import watch as run_watched

import contextlib
import csv
import io
import itertools
import json
import math
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    ALONE,
    WITH_CHECKPOINTS,
    Noisy,
    arguments,
    assert_agree,
    count,
    free_port,
    give,
    load_lesson,
    small_data,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, DistributedSampler

LOST = "lost another process"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
slow = partial(pytest.param, marks=pytest.mark.slow)

# Settings: no dropout and no BatchNorm; as many digits as there are; BatchNorm; FSDP.
NET = dict(model=Net)
DOUBLE = dict(model=Net, precision="64-true")
NORM = dict(model=NormNet, batch_norm=True)
FSDP = dict(model=Net, strategy="fsdp")
# An image is left out of each epoch, and two processes do not divide those to evaluate on.
ODD = dict(sizes=(121, 33, 35))


# Groups of processes.


@dataclass(repr=False)
class Ended:
    """What one process of a group had when its run ended, and what was seen of it meanwhile.

    `result` is that of the first process, {} in the others. `seen` has the indices that were
    `given` to the training with the length of their split, the paths that were `written`, the
    number of checkpoints `saved` and of `steps`, what the evidence `found`, and what a `patch`
    adds.
    """

    result: dict
    weights: bytes
    folder: Path
    seen: dict

    @property
    def losses(self):
        return self.result["train_loss"]

    def state(self):
        return torch.load(io.BytesIO(self.weights))

    def metrics(self):
        with (self.folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))


class Groups:
    """Trains in groups of processes. A call returns one Ended for each process, by rank."""

    def __init__(self, folder):
        self.folder, self.numbers, self.ended = folder, itertools.count(), {}
        command = [sys.executable, "-c", "import test_parallel; test_parallel.serve()"]
        # In a session of its own, so that all can be ended together.
        self.server = subprocess.Popen(
            command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip

    def __call__(self, world, side, *changes, refused=False, seconds=120, **settings):
        """Train one side in `world` processes; the same settings again give the same answers.

        `changes` are made in the side's parallel.py, those in `sibling=(NAME, change...)` in the
        file NAME.py beside it. `patch` is called in each process before it trains. `adam` trains
        with Adam, `eval_size` are the images in a batch to evaluate. With `refused`, the answers
        are the texts of BadInput instead. A group is ended after `seconds`.
        """
        key = repr((world, side, changes, sorted(settings.items(), key=repr)))
        if key not in self.ended:
            folder = self.folder / f"{next(self.numbers)}"
            folder.mkdir()
            runs_dir = settings.pop("runs_dir", folder)
            job = dict(world=world, seconds=seconds, side=side, changes=changes, runs_dir=runs_dir,
                       settings=settings)  # fmt: skip
            (folder / "job").write_bytes(pickle.dumps(job))
            self.ended[key] = self._answers(folder, seconds, str if refused else Ended)
        return self.ended[key]

    def _answers(self, folder, seconds, expected):
        print(folder, file=self.server.stdin, flush=True)
        ready, _, _ = select.select([self.server.stdout], [], [], 60 + seconds)
        line = ready and self.server.stdout.readline()
        assert line, "the server of the groups does not answer"
        statuses = json.loads(line)
        answers = [
            pickle.loads((folder / f"{rank}").read_bytes()) if status == 0 else status
            for rank, status in enumerate(statuses)
        ]
        if not all(isinstance(answer, expected) for answer in answers):
            told = ["ended" if isinstance(answer, Ended) else answer for answer in answers]
            said = [(folder / f"said {rank}").read_text()[-3000:] for rank in range(len(answers))]
            raise AssertionError("\n".join([f"by rank: {told}", *said]))
        return answers

    def close(self):
        with self.server:  # closes its pipes, and waits for it
            os.killpg(self.server.pid, signal.SIGKILL)
        shutil.rmtree(self.folder)  # hundreds of checkpoints


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with contextlib.closing(Groups(tmp_path_factory.mktemp("groups"))) as groups:
        yield groups


def serve():
    """Fork a group for each folder named on stdin, and print with what statuses it ended."""
    torch.set_num_threads(1)
    small_data(lesson="parallel")  # drawn once, for all of them
    for side in SIDES:
        load_lesson(side, "parallel")  # and with it Lightning
    assert threading.active_count() == 1  # a fork copies no other thread
    for line in sys.stdin:
        folder = Path(line.removesuffix("\n"))
        print(json.dumps(together(folder, pickle.loads((folder / "job").read_bytes()))), flush=True)


def together(folder, job):
    """Fork the processes of one group and wait for them; end those that hang."""
    port, running, statuses = free_port(), {}, [None] * job["world"]
    for rank in range(job["world"]):
        if not (child := os.fork()):
            work(folder, job, rank, port)
        running[child] = rank
    deadline = time.monotonic() + job["seconds"]
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            statuses[running.pop(child)] = code = os.waitstatus_to_exitcode(status)
            if code:  # the others may wait for it in vain
                deadline = min(deadline, time.monotonic() + 5)
        elif time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
            deadline = math.inf
        else:
            time.sleep(0.005)
    return statuses


def work(folder, job, rank, port):
    """Do the part of one process, leave its answer in the folder, and end the process."""
    said = os.open(folder / f"said {rank}", os.O_WRONLY | os.O_CREAT)
    status, world = 1, str(job["world"])
    for stream in (1, 2):
        os.dup2(said, stream)
    os.environ |= ALONE | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world,
                           "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            try:
                answer = train_one(rank, job, monkeypatch)
            except BadInput as refusal:
                answer = str(refusal)
            except RuntimeError as error:
                if not processes.is_lost(error):
                    raise
                answer = LOST  # the other one says why
        (folder / f"{rank}").write_bytes(pickle.dumps(answer))
        if dist.is_initialized():
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # nothing of what the server would do at the end


def train_one(rank, job, monkeypatch):
    settings = {"lesson": "parallel", "devices": job["world"]} | job["settings"]
    seen = {"rank": rank, "fetched": [], "written": [], "saved": 0, "steps": 0}
    observe(monkeypatch, seen, str(job["runs_dir"]))
    if patch := settings.pop("patch", None):
        settings |= patch(monkeypatch, seen) or {}
    if settings.pop("adam", False):
        adam = lambda parameters, lr, momentum: torch.optim.Adam(parameters, lr)  # noqa: E731
        monkeypatch.setattr(torch.optim, "SGD", adam)
    side, lesson = job["side"], settings.pop("lesson")
    if sibling := settings.pop("sibling", None):
        sys.modules[sibling[0]] = load_lesson(side, *sibling)
    module = load_lesson(side, lesson, *job["changes"])
    images = small_data(*settings.pop("sizes", (120, 130, 140)), lesson="parallel")
    give(module, images, settings.pop("model", Noisy), lesson, monkeypatch)
    if size := settings.pop("eval_size", None):
        monkeypatch.setattr(data_module, "EVAL_BATCH_SIZE", size)
    args = arguments(module, side, lesson, job["runs_dir"], **settings)
    if lesson in WITH_PROCESSES:
        processes.begin(args)
    content = io.BytesIO()

    def main(args):
        net = module.main(args)
        seen["given"] = list(seen["fetched"])  # without those of the confusion matrix
        torch.save(net.state_dict(), content)
        return net

    result = json.loads(json.dumps(run_watched(main, args)))  # what parity reads
    return Ended(result, content.getvalue(), job["runs_dir"] / lesson / side, seen)


def observe(monkeypatch, seen, runs_dir):
    """Note what this process fetches, writes and saves, and how many steps it takes."""

    def fetch(images, indices, fetch=Images.__getitems__):
        seen["fetched"].append((len(images), list(indices)))
        return fetch(images, indices)

    def save(content, *arguments, save=torch.save, **more):
        seen["saved"] += isinstance(content, dict) and "global_step" in content
        save(content, *arguments, **more)

    def found(evidence, net, found=Evidence.found):
        seen["found"] = found(evidence, net)
        return seen["found"]

    def audit(event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        opens = event == "open" and (arguments[2] or 0) & WRITING
        if (changes or opens) and str(arguments[0]).startswith(runs_dir):
            seen["written"].append(str(arguments[0]))

    def step(optimizer, *_):
        # The Trainer's FSDP makes an optimizer's state, to load into it, by a step with an lr of 0.
        seen["steps"] += optimizer.param_groups[0]["lr"] > 0

    monkeypatch.setattr(Images, "__getitems__", fetch)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(Evidence, "found", found)
    sys.addaudithook(audit)
    register_optimizer_step_post_hook(step)


# What is compared.


def assert_same(ours, theirs):
    """Assert that two runs have the same bits."""
    comparison = compare_results(ours.result, theirs.result)
    assert_agree(comparison, WITH_CHECKPOINTS)
    assert ours.weights == theirs.weights and len(ours.weights) > 10_000


def distance(ours, theirs, steps=None):
    """Return the largest relative difference of the losses; infinite where one has more."""
    if len(ours.losses) != len(theirs.losses):
        return math.inf
    pairs = list(zip(ours.losses, theirs.losses, strict=True))[:steps]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def assert_close(ours, theirs, within=1e-12):
    """Assert that two runs in double precision differ by rounding alone."""
    assert distance(ours, theirs) < within
    a, b = ours.state(), theirs.state()
    assert a.keys() == b.keys() and len(a) == 10
    for name in a:
        assert a[name].dtype == torch.float64
        torch.testing.assert_close(a[name], b[name], rtol=within, atol=within)
    assert ours.result["confusion_matrix"] == theirs.result["confusion_matrix"]
    for name in ("val_loss", "val_accuracy", "val_f1", "test_loss"):
        assert ours.result[name] == pytest.approx(theirs.result[name], rel=1e-6)


# Both sides, bit for bit.

PAIRS = {
    # name: (processes, settings, batches trained on, rows of metrics.csv)
    "dropout and BatchNorm": (2, ODD, 30, 9),
    "FSDP, an incomplete group": (2, FSDP | dict(accumulate_grad_batches=2, adam=True), 30, 6),
    "four processes": (4, NET, 30, 9),
    "BatchNorm, an incomplete group": (
        2, NORM | dict(accumulate_grad_batches=3, limit_train_batches=10), 20, 4,
    ),
}  # fmt: skip
FAST_PAIRS = [name for name in PAIRS if name != "four processes"]
EVERY = [
    {}, dict(strategy="fsdp"), NET, FSDP, DOUBLE, NORM, NORM | dict(strategy="fsdp"),
    NET | dict(adam=True), FSDP | dict(adam=True), NET | dict(limit_train_batches=6),
    dict(num_workers=1), FSDP | dict(num_workers=1, limit_train_batches=4),
    dict(seed=3, threads=2), dict(limit_train_batches=0.5, limit_val_batches=1),
    *[each | dict(accumulate_grad_batches=n) for n in (2, 3) for each in ({}, NET, FSDP)],
]  # fmt: skip


@pytest.mark.parametrize("name", [*FAST_PAIRS, slow("four processes")])
def test_both_sides_have_the_same_bits(name, groups):
    world, settings, batches, rows = PAIRS[name]
    plain, lightning = (groups(world, side, **settings)[0] for side in SIDES)
    assert_same(plain, lightning)
    assert len(plain.losses) == batches
    assert len(plain.metrics()) == len(lightning.metrics()) == rows
    for ours, theirs in zip(plain.metrics(), lightning.metrics(), strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            assert (ours[name] == "") == (theirs[name] == "")
            assert not ours[name] or float(ours[name]) == pytest.approx(float(theirs[name]), 1e-6)
    count("pairs of groups of processes, bit for bit")


@pytest.mark.slow
@pytest.mark.parametrize("settings", EVERY, ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_both_sides_have_the_same_bits_in_every_combination(world, settings, groups):
    # All these divide twelve, but not the 122 images; the last batch is short.
    settings = dict(batch_size=12, sizes=(122, 34, 33)) | settings
    assert_same(*(groups(world, side, **settings)[0] for side in SIDES))
    count("pairs of groups of processes, bit for bit")


# What each process does.


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*FAST_PAIRS, slow("four processes")])
def test_all_processes_end_with_the_same_weights_and_numbers(name, side, groups):
    world, settings, *_ = PAIRS[name]
    first, *others = groups(world, side, **settings)
    assert len(others) == world - 1
    for other in others:
        assert other.weights == first.weights and other.result == {}
        ours, theirs = first.seen["found"], other.seen["found"]
        assert ours.keys() == theirs.keys() and len(ours) == 3
        for name in ("train_loss", "fingerprints"):
            assert ours[name] == theirs[name]
        count("processes that ended as the first of their group")


def assert_shared_out(ranks, sizes, batch_size=8):
    """Assert that the processes together were given the global batches, and each image once."""
    world, (images, _, tested) = len(ranks), sizes
    given = [[i for of, i in rank.seen["given"] if of == images] for rank in ranks]
    assert max(len(batch) for batches in given for batch in batches) == batch_size // world
    batches = [sorted(itertools.chain(*parts)) for parts in zip(*given, strict=True)]
    assert len(batches) % 2 == 0
    for epoch, begin in enumerate((0, len(batches) // 2)):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(images, generator=generator)[: images // world * world].tolist()
        split = [sorted(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        assert batches[begin : begin + len(batches) // 2] == split
    tests = [i for rank in ranks for of, batch in rank.seen["given"] if of == tested for i in batch]
    assert Counter(tests) == Counter(range(tested))


@pytest.mark.parametrize(
    "world, settings",
    [(2, ODD), *(slow(n, dict(sizes=(122, 34, 33), batch_size=12)) for n in (3, 4))],
)
@pytest.mark.parametrize("side", SIDES)
def test_every_image_is_given_to_one_process(side, world, settings, groups):
    assert_shared_out(groups(world, side, **settings), **settings)
    images, _, tested = settings["sizes"]
    count("images, each given to one process", 2 * (images // world * world) + tested)


def test_a_forgotten_set_epoch_gives_other_images(groups):
    ranks = groups(2, "plain", ("        train_loader.sampler.set_epoch(epoch)\n", ""), **ODD)
    with pytest.raises(AssertionError):
        assert_shared_out(ranks, **ODD)
    count("negative controls in groups of processes")


def files_of(ended):
    return sorted(str(path.relative_to(ended.folder)) for path in ended.folder.rglob("*"))


@pytest.mark.parametrize("side", SIDES)
def test_the_first_process_alone_writes(side, groups):
    (alone,), (first, other) = (groups(world, side, **NET) for world in (1, 2))
    # Its own evidence alone; whether it could write, it tried before.
    written = {Path(path) for path in other.seen["written"]} - {other.folder.parents[1]}
    assert written == {other.folder / "evidence.1.jsonl"}
    assert other.seen["saved"] == 0
    assert first.seen["saved"] == alone.seen["saved"] == 2  # one after each epoch
    assert len(first.seen["written"]) > 5 and "checkpoints/step_00000015.ckpt" in files_of(first)
    assert set(files_of(first)) == set(files_of(alone)) | {"evidence.1.jsonl"}
    count("groups of processes of which one wrote")


# Metrics.


class Guess(torch.nn.Module):
    """A linear network that guesses all ten classes without having been trained."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3072, 10)
        with torch.no_grad():
            self.layer.weight.mul_(10).sub_(self.layer.weight.mean(1, keepdim=True))

    def forward(self, x):
        return self.layer(x.flatten(1))


# One step that is too small to change any weight: all evaluate the same ones, to the bit.
STILL = dict(model=Guess, lr=1e-30, batch_size=12, max_epochs=1, limit_train_batches=1)


def counted(ended, sizes):
    """Return confusion matrix, macro F1 and loss on the test images, by loops in this process."""
    net = Guess()
    net.load_state_dict(ended.state())
    images, labels = small_data(*sizes, lesson="parallel").test.__getitems__(range(sizes[2]))
    with torch.no_grad():
        logits = net(images)
    first, second = logits.topk(2, dim=1).values.T
    assert (first - second).min() > 1e-3  # no rounding turns a guess: equal must be equal
    confusion = [[0] * 10 for _ in range(10)]
    for label, guess in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[label][guess] += 1
    assert sum(map(any, zip(*confusion, strict=True))) >= 8  # classes that were guessed
    both = [sum(confusion[c]) + sum(row[c] for row in confusion) for c in range(10)]
    f1 = [2 * confusion[c][c] / both[c] for c in range(10) if both[c]]
    return confusion, sum(f1) / len(f1), F.cross_entropy(logits, labels).item()


def assert_exact(groups, world, side, images, size, **settings):
    """Assert that several processes measure the same weights exactly as one does."""
    settings |= STILL | dict(sizes=(24, images + 1, images), eval_size=size)
    (alone,) = groups(1, side, **settings)
    confusion, f1, loss = counted(alone, settings["sizes"])
    right = sum(confusion[c][c] for c in range(10))
    assert alone.result["test_accuracy"] == pytest.approx(right / images, rel=1e-6)
    assert alone.result["test_f1"] == pytest.approx(f1, rel=1e-6)
    first, *others = groups(world, side, **settings)
    assert all(ended.weights == alone.weights for ended in (first, *others))
    for ended in (alone, first):
        assert ended.result["confusion_matrix"] == confusion
        for name in "val_accuracy val_f1 test_accuracy test_f1 test_accuracy_per_class".split():
            assert ended.result[name] == alone.result[name], name
        assert ended.result["test_loss"] == pytest.approx(loss, rel=1e-6)
        assert ended.result["val_loss"] == pytest.approx(alone.result["val_loss"], rel=1e-6)
    count("evaluations by several processes, exact")


@pytest.mark.parametrize("world", [2, slow(3)])
@pytest.mark.parametrize("side", SIDES)
def test_33_images_are_measured_exactly(side, world, groups):
    assert_exact(groups, world, side, 33, 8)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("images", [33, 34, 35, 130])
@pytest.mark.parametrize("side", SIDES)
def test_any_number_of_images_is_measured_exactly(side, images, strategy, groups):
    for world, size in itertools.product((2, 3, 4), (8, 50)):
        assert_exact(groups, world, side, images, size, strategy=strategy)


def pad(monkeypatch, seen):
    """Share out images as PyTorch's DistributedSampler does, which makes the shares equal."""

    def make_loader(images, args, make=data_module.make_loader):
        if images.split == "train":
            return make(images, args)
        rank, world = data_module.processes()
        sampler = DistributedSampler(images, world, rank, shuffle=False)
        return DataLoader(images, 50, sampler=sampler, collate_fn=lambda batch: batch)

    monkeypatch.setattr(data_module, "make_loader", make_loader)


@pytest.mark.parametrize("side", ["plain", slow("lightning")])
def test_pytorchs_sampler_would_count_an_image_twice(side, groups):
    ranks = groups(2, side, patch=pad, **STILL, sizes=(24, 34, 33))
    given = [i for rank in ranks for of, batch in rank.seen["given"] if of == 33 for i in batch]
    assert sorted(given) == [0, *range(33)]
    confusion, *_ = counted(ranks[0], (24, 34, 33))
    right, first = sum(confusion[c][c] for c in range(10)), 34 * ranks[0].result["test_accuracy"]
    assert first == pytest.approx(round(first), abs=1e-4) and round(first) in (right, right + 1)
    assert ranks[0].result["test_accuracy"] != pytest.approx(right / 33, rel=1e-3)
    count("negative controls in groups of processes")


@pytest.mark.slow
def test_the_trainer_rounds_whole_batch_sizes_down(groups):
    """130 images in four processes, in one batch each: 33, 33, 32 and 32. It divides by 4 * 32."""
    settings = STILL | dict(model=Net, lr=0.02, sizes=(24, 35, 130), eval_size=200)
    change = ("batch_size=float(len(labels))", "batch_size=len(labels)")
    right = groups(4, "plain", **settings)[0].result
    wrong = groups(4, "lightning", sibling=("cifar", change), **settings)[0].result
    assert compare_results(right, wrong).first_difference.name == "metrics"
    assert wrong["confusion_matrix"] == right["confusion_matrix"]
    assert wrong["test_loss"] == pytest.approx(right["test_loss"] * 130 / 128, rel=1e-6)
    count("negative controls in groups of processes")


# Several processes and one.


@pytest.mark.parametrize("side", SIDES)
def test_one_process_has_the_bits_of_the_lesson_cifar(side, groups):
    """There is no process group in that one, and no DistributedDataParallel."""
    (ours,), (theirs,) = groups(1, side, **NET), groups(1, side, **NET, lesson="cifar")
    assert ours.losses == theirs.losses and len(ours.losses) == 30
    assert ours.weights == theirs.weights
    for part in ("data", "start", "weights", "optimizer"):
        assert ours.result["fingerprints"][part] == theirs.result["fingerprints"][part], part
    assert ours.result["confusion_matrix"] == theirs.result["confusion_matrix"]
    for name in ("val_loss", "val_f1", "test_loss", "test_f1"):
        assert ours.result[name] == pytest.approx(theirs.result[name], rel=1e-6)
    count("runs of one process, with and without a process group")


@pytest.mark.parametrize("world, strategy", [(2, "ddp"), slow(4, "ddp"), slow(2, "fsdp")])
def test_several_processes_train_as_one(world, strategy, groups):
    """In double precision, where rounding stays small over the whole run."""
    (one,) = groups(1, "plain", **DOUBLE)
    first, *_ = groups(world, "plain", **DOUBLE, strategy=strategy)
    assert_close(first, one)
    count("groups of processes that trained as one does")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    dict(adam=True), dict(accumulate_grad_batches=3), dict(limit_train_batches=7),
    dict(max_epochs=4),
], ids=str)  # fmt: skip
def test_several_processes_train_as_one_with_other_settings(settings, groups):
    settings = DOUBLE | dict(batch_size=12) | settings
    for side, strategy in (("plain", "ddp"), ("plain", "fsdp"), ("lightning", "ddp")):
        (one,) = groups(1, side, **settings)
        for world in (2, 3, 4):
            assert_close(groups(world, side, **settings, strategy=strategy)[0], one)
            count("groups of processes that trained as one does")


@pytest.mark.parametrize(
    "world, settings", [(2, NET), *(slow(*each) for each in ((4, NET), (2, FSDP), (4, FSDP)))]
)
def test_the_first_steps_are_those_of_one_process_in_single_precision(world, settings, groups):
    (one,) = groups(1, "plain", **NET)
    assert distance(groups(world, "plain", **settings)[0], one, steps=5) < 1e-6
    count("groups of processes that trained as one does")


def forget_to_share_the_batch(monkeypatch, seen):
    """Let each process take as many images as one process would."""

    def make_loader(images, args, make=data_module.make_loader):
        return make(images, replace(args, batch_size=args.batch_size * 2))

    monkeypatch.setattr(data_module, "make_loader", make_loader)


# A network that is not wrapped has no no_sync.
NO_SYNC = ('args.strategy == "ddp" and not last', "False")


@pytest.mark.parametrize("changes, settings", [
    ([], dict(patch=forget_to_share_the_batch)),
    ([("(loss / group)", "(2 * loss / group)")], {}),  # gradients are added, not averaged
    ([("return torch.nn.parallel.DistributedDataParallel(net)", "return net"), NO_SYNC], {}),
], ids=["batch size", "sum", "nothing sent"])  # fmt: skip
def test_what_is_not_the_training_of_one_process_is_found(changes, settings, groups):
    (one,) = groups(1, "plain", **DOUBLE)
    first, *_ = groups(2, "plain", *changes, **DOUBLE, **settings)
    assert distance(first, one) > 1e-2
    with pytest.raises(AssertionError):
        assert_close(first, one)
    count("negative controls in groups of processes")


@pytest.mark.parametrize("side", [slow("plain"), slow("lightning")])
def test_batch_norm_in_several_processes_is_another_training(side, groups):
    """Each takes the averages of its own images: from the first step on, by more than rounding."""
    first, one = (groups(n, side, **NORM, precision="64-true")[0] for n in (2, 1))
    assert distance(first, one, steps=1) > 1e-4 and distance(first, one) > 1e-3
    count("negative controls in groups of processes")


def count_reductions(monkeypatch, seen):
    """Count how often DistributedDataParallel averages the gradients."""
    seen["reductions"] = 0

    def hook(group, bucket):
        seen["reductions"] += 1
        return allreduce_hook(group, bucket)

    def begin(model, *arguments, begin=DistributedDataParallel.__init__, **settings):
        begin(model, *arguments, **settings)
        model.register_comm_hook(None, hook)

    monkeypatch.setattr(DistributedDataParallel, "__init__", begin)


def test_gradients_are_sent_where_a_step_follows(groups):
    # Two epochs of 16 batches; the gradients of this network go in one message.
    settings = DOUBLE | dict(sizes=(128, 33, 35), patch=count_reductions)
    four = settings | dict(accumulate_grad_batches=4)
    each, plain, trainer, without = (
        groups(2, "plain", **settings), groups(2, "plain", **four), groups(2, "lightning", **four),
        groups(2, "plain", NO_SYNC, **four),
    )  # fmt: skip
    for ranks, reductions in ((each, 32), (plain, 8), (trainer, 8), (without, 32)):
        assert [rank.seen["reductions"] for rank in ranks] == [reductions] * 2
        count("groups of processes whose messages were counted")
    assert_same(plain[0], trainer[0])
    assert_close(without[0], plain[0])  # no_sync saves time, and changes nothing else


# Checkpoints, from which as many processes resume, or others.

STEPS = 15  # of one epoch; a checkpoint is written after each of three


class Uneven(Noisy):
    """Each process draws its own amount of random numbers: their generators drift apart."""

    def forward(self, x):
        if self.training:
            torch.rand(1 + dist.get_rank())
        return super().forward(x)


def first_checkpoint(groups, folder, world, side, **settings):
    """Train three epochs; return the answers, and what was saved after the first, in a copy."""
    ranks = groups(world, side, max_epochs=3, **settings)
    copy = folder / f"{side} of {world}, {len(list(folder.iterdir()))}"
    shutil.copytree(ranks[0].folder, copy)
    return ranks, copy / "checkpoints" / f"step_{STEPS:08d}.ckpt"


def resumed(groups, checkpoint, world, side, **settings):
    ranks = groups(world, side, max_epochs=3, ckpt_path=str(checkpoint), **settings)
    assert [rank.seen["steps"] for rank in ranks] == [2 * STEPS] * world
    assert len(ranks[0].losses) == 3 * STEPS
    return ranks


UNEVEN = dict(model=Uneven)
DROPOUT = UNEVEN | dict(strategy="fsdp", adam=True), UNEVEN | dict(num_workers=1)


@pytest.mark.parametrize(
    "settings", [UNEVEN, *map(slow, (*DROPOUT, NORM | dict(adam=True), DOUBLE))], ids=str
)
@pytest.mark.parametrize("side", SIDES)
def test_as_many_processes_resume_to_the_same_bits(side, settings, groups, tmp_path):
    never_stopped, checkpoint = first_checkpoint(groups, tmp_path, 2, side, **settings)
    first, second = checkpoints.read(checkpoint)["random"]
    drifted_apart = not torch.equal(first["torch"], second["torch"])
    assert drifted_apart == (settings["model"] is Uneven)
    ranks = resumed(groups, checkpoint, 2, side, **settings)
    assert_same(ranks[0], never_stopped[0])
    assert ranks[1].weights == never_stopped[1].weights
    assert ranks[0].metrics() == never_stopped[0].metrics()
    assert len(ranks[0].metrics()) == 9 + 3 + 1
    count("groups of processes resumed, bit for bit")


@pytest.mark.parametrize("side", SIDES)
def test_where_nothing_is_left_to_train_it_is_tested_again(side, groups, tmp_path):
    never_stopped, checkpoint = first_checkpoint(groups, tmp_path, 2, side, **UNEVEN)
    last = checkpoint.with_name(f"step_{3 * STEPS:08d}.ckpt")
    ranks = groups(2, side, max_epochs=3, ckpt_path=str(last), **UNEVEN)
    assert [rank.seen["steps"] for rank in ranks] == [0, 0]
    ours, theirs = (dict(each[0].result) for each in (ranks, never_stopped))
    for result in (ours, theirs):  # no checkpoint is written where no epoch is trained
        del result["checkpoints"], result["train_seconds"]
    assert ours == theirs
    count("groups of processes resumed, bit for bit")


def forget_the_generators(monkeypatch, seen):
    monkeypatch.setattr(processes, "take_random_states", lambda everyone: None)


def test_a_generator_that_is_not_restored_is_found(groups, tmp_path):
    never_stopped, checkpoint = first_checkpoint(groups, tmp_path, 2, "plain", **UNEVEN)
    first, *_ = resumed(groups, checkpoint, 2, "plain", **UNEVEN, patch=forget_the_generators)
    difference = compare_results(first.result, never_stopped[0].result).first_difference
    assert difference.name == "steps" and f"step {STEPS + 1}:" in difference.difference
    count("negative controls in groups of processes")


def assert_resumed(groups, folder, side, n, m, before=(), after=()):
    """Assert that `m` processes end where `n` would have, but for rounding; with other settings."""
    never_stopped, checkpoint = first_checkpoint(groups, folder, n, side, **DOUBLE | dict(before))
    ranks = resumed(groups, checkpoint, m, side, **DOUBLE | dict(after))
    assert_close(ranks[0], never_stopped[0])
    ours, theirs = (ended.result["fingerprints"]["data"] for ended in (ranks[0], never_stopped[0]))
    assert ours == theirs and "order of epoch 2" in ours
    count("groups of processes resumed by others")


@pytest.mark.parametrize("n, m", [(1, 2), slow(2, 1)])
def test_other_processes_resume(n, m, groups, tmp_path):
    assert_resumed(groups, tmp_path, "plain", n, m)


@pytest.mark.slow
@pytest.mark.parametrize("n, m", [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("side", SIDES)
def test_any_number_of_processes_resumes(side, n, m, groups, tmp_path):
    for before, after in ({}, {}), (dict(adam=True, threads=2), dict(adam=True)):
        assert_resumed(groups, tmp_path, side, n, m, before, after)


@pytest.mark.parametrize("n, m", [(2, 2), slow(2, 4), slow(4, 1), slow(1, 2), slow(3, 2)])
@pytest.mark.parametrize("strategies", [("fsdp", "ddp"), slow(("ddp", "fsdp"))])
def test_another_strategy_resumes(strategies, n, m, groups, tmp_path):
    adam = dict(adam=True, batch_size=12, sizes=(180, 130, 140))
    before, after = (dict(strategy=strategy) | adam for strategy in strategies)
    assert_resumed(groups, tmp_path, "plain", n, m, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("n, m", [(2, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("strategies", [("ddp", "fsdp"), ("fsdp", "ddp")])
@pytest.mark.parametrize("side", SIDES)
def test_another_strategy_resumes_in_single_precision(side, strategies, n, m, groups, tmp_path):
    """The Trainer's FSDP knows no double precision: rounding grows, but begins small."""
    before, after = (dict(model=Net, adam=True, strategy=each) for each in strategies)
    never_stopped, checkpoint = first_checkpoint(groups, tmp_path, n, side, **before)
    first, *_ = resumed(groups, checkpoint, m, side, **after)
    assert distance(first, never_stopped[0], steps=STEPS + 5) < 1e-6
    count("groups of processes resumed by others")


@pytest.mark.parametrize("side", SIDES)
def test_what_does_not_fit_is_not_resumed_from(side, groups, tmp_path):
    (other,) = set(SIDES) - {side}
    _, checkpoint = first_checkpoint(groups, tmp_path, 2, side, **UNEVEN)
    settings = UNEVEN | dict(max_epochs=3, ckpt_path=str(checkpoint), refused=True)
    for trains, changed, text in (
        (other, {}, f"is of the {side} side, and each side resumes its own"),
        (side, dict(lr=0.03), "lr 0.02, and now it is 0.03"),
        (side, dict(accumulate_grad_batches=2), "accumulate_grad_batches 1, and now it is 2"),
    ):
        first, second = groups(2, trains, **settings | changed)
        assert text in first and second == LOST  # the first one reads the checkpoint
        count("refusals in groups of processes")


# The evidence: each process has a file, and what is found is of all of them.


def lines_of(folder, rank):
    text = (folder / f"evidence{f'.{rank}' * (rank > 0)}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line]


@pytest.mark.parametrize("side", SIDES)
def test_each_process_keeps_its_evidence_up_to_each_checkpoint(side, groups):
    first = groups(2, side, max_epochs=3, **UNEVEN)[0]
    lines = [lines_of(first.folder, rank) for rank in range(2)]
    for own in lines:
        steps = [(line["from"], line["global_step"], len(line["losses"])) for line in own]
        assert steps == [(0, 15, 15), (15, 30, 15), (30, 45, 15)]
        assert {line["world"] for line in own} == {2}
    assert lines[0][0]["losses"] != lines[1][0]["losses"]  # each has those of its own images
    means = [sum(both) / 2 for own in zip(*lines, strict=True)
             for both in zip(*(line["losses"] for line in own), strict=True)]  # fmt: skip
    assert means == first.losses
    for epoch, own in enumerate(zip(*lines, strict=True)):
        shares = [line["order"][f"{epoch}"][1] for line in own]
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(120, generator=generator).tolist()
        assert [shares[0], shares[1]] == [order[0::2], order[1::2]]
    count("losses in the evidence of two processes", 2 * 3 * STEPS)


def without_rank_1(folder):
    (folder / "evidence.1.jsonl").unlink()


def without_its_first_epoch(folder):
    text = (folder / "evidence.1.jsonl").read_text()
    (folder / "evidence.1.jsonl").write_text(text.partition("\n\n")[2])


def cut_short(folder):
    text = (folder / "evidence.1.jsonl").read_text()
    (folder / "evidence.1.jsonl").write_text(text[:500])


def without_the_first_process(folder):
    (folder / "evidence.jsonl").unlink()


@pytest.mark.parametrize(
    "spoil", [without_rank_1, without_its_first_epoch, cut_short, without_the_first_process]
)
def test_a_run_whose_evidence_is_incomplete_is_not_resumed(spoil, groups, tmp_path):
    """Nor is the folder touched that it would be resumed in."""
    _, checkpoint = first_checkpoint(groups, tmp_path, 2, "plain", **UNEVEN)
    spoil(checkpoint.parents[1])
    settings = UNEVEN | dict(max_epochs=3, ckpt_path=str(checkpoint), runs_dir=tmp_path / "runs")
    told = groups(2, "plain", **settings, refused=True)
    # The other one says the same, or that it lost the first one, which is not told to the user.
    assert told[1] in (told[0], "lost another process")
    assert str(checkpoint.parents[1] / "evidence") in told[0]
    assert told[0].endswith("or leave out --ckpt-path to begin at the start.")
    assert not (tmp_path / "runs" / "parallel").exists()
    count("refusals in groups of processes")


def test_evidence_of_more_processes_that_is_left_over_does_not_count(groups, tmp_path):
    """Three trained before, two resume from the first epoch and again from the second."""
    settings = dict(model=Net, batch_size=12)
    _, checkpoint = first_checkpoint(groups, tmp_path, 3, "plain", **settings)
    settings |= dict(max_epochs=3)
    runs_dir = tmp_path / "runs"
    shutil.copytree(checkpoint.parents[1], runs_dir / "parallel" / "plain")
    own = runs_dir / "parallel" / "plain" / "checkpoints"
    ranks = groups(2, "plain", **settings, runs_dir=runs_dir,
                   ckpt_path=str(own / "step_00000010.ckpt"))  # fmt: skip
    again = groups(2, "plain", **settings, runs_dir=runs_dir,
                   ckpt_path=str(own / "step_00000020.ckpt"))  # fmt: skip
    assert [len(each[0].losses) for each in (ranks, again)] == [30, 30]
    assert_same(again[0], ranks[0])
    count("groups of processes resumed, bit for bit")


def test_a_later_run_begins_its_evidence_anew(groups, tmp_path):
    stopped = dict(max_epochs=3, runs_dir=tmp_path, patch=stop_in_mid_epoch, refused=True)
    groups(2, "plain", **UNEVEN, **stopped)
    assert (tmp_path / "parallel" / "plain" / "evidence.1.jsonl").exists()
    (tmp_path / "parallel" / "plain" / "checkpoints" / "step_00000015.ckpt").unlink()
    groups(1, "plain", **NET, runs_dir=tmp_path)
    names = {path.name for path in (tmp_path / "parallel" / "plain").glob("evidence*")}
    assert names == {"evidence.jsonl"}


# All agree before they begin.


def other_setting(monkeypatch, seen, name, values):
    return {name: values[seen["rank"]]}


def other_answer(monkeypatch, seen, name, values):
    """Let a function that asks for the code or the versions answer this."""
    monkeypatch.setattr(fingerprints, name, lambda *_: values[seen["rank"]])


LR = partial(other_setting, name="lr", values=(0.02, 0.03))
SEED = partial(other_setting, name="seed", values=(0, 1))
CODE = partial(other_answer, name="code_sha256", values=("ab", "cd"))
AB, CD = (fingerprints.sha256(repr(text).encode()) for text in ("ab", "cd"))
TORCH = partial(other_answer, name="versions", values=({"torch": "2.0"}, {"torch": "2.1"}))


@pytest.mark.parametrize("side, patch, ours, theirs", [
    ("plain", LR, "lr is 0.02", "0.03"), ("lightning", LR, "lr is 0.02", "0.03"),
    ("lightning", SEED, "seed is 0", "1"), ("plain", CODE, f"code is '{AB}'", f"'{CD}'"),
    ("plain", TORCH, "torch is '2.0'", "'2.1'"),
])  # fmt: skip
def test_processes_that_would_do_different_things_all_refuse(side, patch, ours, theirs, groups):
    for told in groups(2, side, patch=patch, refused=True):
        assert f" {ours} in process 0 on " in told and f" {theirs} in process 1 on " in told
        count("refusals in groups of processes")


def started_again(monkeypatch, seen):
    if seen["rank"] == 1:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def stop_in_mid_epoch(monkeypatch, seen):
    """End after step 20 of two times 15; the last checkpoint is after step 15."""

    def stop(*_):
        if seen["steps"] == 20:
            raise BadInput("stopped")

    register_optimizer_step_post_hook(stop)


@pytest.mark.parametrize("side", ["plain", slow("lightning")])
def test_all_resume_where_one_was_started_again(side, groups, tmp_path):
    settings = UNEVEN | dict(max_epochs=3)
    stopped = dict(patch=stop_in_mid_epoch, refused=True)
    assert groups(2, side, **settings, runs_dir=tmp_path, **stopped) == ["stopped"] * 2
    ranks = groups(2, side, **settings, runs_dir=tmp_path, patch=started_again)
    assert [rank.seen["steps"] for rank in ranks] == [2 * STEPS] * 2
    never_stopped = groups(2, side, **settings)
    assert_same(ranks[0], never_stopped[0])
    assert ranks[1].weights == never_stopped[1].weights
    assert ranks[0].metrics() == never_stopped[0].metrics()
    count("groups of processes resumed, bit for bit")


# Refusals that need no processes.


def refused(capsys, call, *arguments):
    """Return the one sentence with which a command ends, status 2; it says what to do."""
    with pytest.raises(SystemExit) as end, clear_messages():
        call(*arguments)
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("error: ") and told.endswith(".\n")
    assert told.count("\n") == 1 and ". " not in told
    assert re.search("; (use|leave|choose) |, or (use|name|GPUs)", told)
    count("refusals")
    return told


def parse(argv, side="plain"):
    return run.parse(load(side, "parallel").Args, str(ROOT / side / "parallel.py"), argv)


def test_what_was_refused_is_not_tried_again(monkeypatch, tmp_path):
    """torchrun starts all processes again: these end at once, with what the first ones said."""
    given = {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", processes.BEGUN: str(tmp_path / "begun")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_end_with", lambda parent: None)
    tries = []
    for _ in range(3):
        with pytest.raises(BadInput, match=r"^mend it$"), processes.in_process("start it again"):
            tries.append(1)
            raise BadInput("mend it")
    assert tries == [1]
    count("refusals")


CORES = os.cpu_count()
THREE = "--num-nodes 3 --rdzv-endpoint 10.0.0.1:29400"
REFUSED = {
    # options: (what is said of them, options that are not refused)
    f"--devices {4 * CORES + 1} --batch-size {4 * CORES + 1}": (
        f"{4 * CORES} are the most for the {CORES} cores",
        f"--devices {4 * CORES} --batch-size {4 * CORES}",
    ),
    "--devices 3 --batch-size 32": ("such as 30 or 33", "--devices 3 --batch-size 33"),
    f"--devices 2 --batch-size 32 {THREE}": (
        "--devices 2 on each of --num-nodes 3; choose a multiple of 6, such as 30 or 36",
        f"--devices 2 --batch-size 36 {THREE}",
    ),
    "--sync-batchnorm": ("--sync-batchnorm needs CUDA GPUs", "--batch-norm"),
    "--strategy dp --devices 2": ("use --strategy ddp", "--strategy dp --devices 1"),
    f"--strategy dp --devices 1 {THREE}": (
        "use --strategy ddp", f"--strategy ddp --devices 1 {THREE} --batch-size 33",
    ),
}  # fmt: skip


@pytest.mark.parametrize("argv", REFUSED)
def test_what_several_processes_cannot_do_is_refused(argv, capsys, tmp_path):
    text, instead = REFUSED[argv]
    common = ["--accelerator", "cpu", "--runs-dir", str(tmp_path)]
    assert text in refused(capsys, parse, argv.split() + common)
    parse(instead.split() + common)


def test_another_number_than_torchruns_is_refused(monkeypatch, capsys, tmp_path):
    argv = ["--devices", "2", "--accelerator", "cpu", "--runs-dir", str(tmp_path)]
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    told = refused(capsys, parse, argv)
    assert "torchrun started 4 processes, and --devices 2" in told
    assert parse(argv[2:]).devices == 4  # it counts where nothing is said


def test_more_gpus_than_there_are_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    argv = ["--devices", "2", "--runs-dir", str(tmp_path)]
    told = refused(capsys, parse, argv)
    assert "there are 1 here; use --devices 1." in told
    parse([*argv, "--accelerator", "cpu"])


@pytest.mark.parametrize(
    "argv", ["--strategy dp --devices 1", "--strategy fsdp --precision 64-true"]
)
def test_what_the_trainer_lacks_is_refused(argv, capsys, tmp_path):
    argv = [*argv.split(), "--accelerator", "cpu", "--runs-dir", str(tmp_path)]
    told = refused(capsys, parse, argv, "lightning")
    assert "Trainer" in told and told.endswith("use --strategy ddp, or the plain side.\n")
    assert parse(argv, "plain").strategy == argv[1]


# One change in one file, and the first stage that differs.

GROUPED = PAIRS["BatchNorm, an incomplete group"][1]
RESEED = "    seed_everything(args.seed)\n"
BROADCAST = "for buffer in self.model.buffers():\n            dist.broadcast(buffer, 0)"
WRAP = "    model = wrap(net, args, device)\n"
OPTIMIZER = "    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)\n"
ADD_UP = "processes.add_up(each, device)"
CHANGES = {
    # name: (file, stage, settings, (old text, new text), ...)
    "no set_epoch": (
        "plain/parallel", "data", {}, ("        train_loader.sampler.set_epoch(epoch)\n", ""),
    ),
    "another order": (
        "plain/parallel", "data", {}, ("sampler.set_epoch(epoch)", "sampler.set_epoch(epoch + 1)"),
    ),
    "each in another order": (
        "plain/parallel", "data", {},
        ("sampler.set_epoch(epoch)", "sampler.set_epoch(epoch + dist.get_rank())"),
    ),
    "other weights at the start": (
        "lightning/parallel", "start", {},
        ("seed_everything(args.seed,", "seed_everything(args.seed + 1,"),
    ),
    "one weight of one process, one unit in the last place": (
        "plain/parallel", "steps", {},
        ("    rank = dist.get_rank()\n",
         "    rank = dist.get_rank()\n"
         "    w = next(net.parameters()).data.flatten()\n    i = w.abs().argmax()\n"
         "    w[i] = torch.nextafter(w[i], torch.tensor(9.0)) if rank == 1 else w[i]\n"),
    ),
    "nothing is sent": (
        "plain/parallel", "steps", NET,
        ("return torch.nn.parallel.DistributedDataParallel(net)", "return net"), NO_SYNC,
    ),
    "the loss not divided by the group": (
        "plain/parallel", "steps", GROUPED, ("(loss / group)", "loss"),
    ),
    "zero_grad in every batch": (
        "plain/parallel", "steps", GROUPED,
        ("            with model", "            optimizer.zero_grad()\n            with model"),
    ),
    "no zero_grad": (
        "plain/parallel", "steps", GROUPED, ("                optimizer.zero_grad()\n", ""),
    ),
    "no_sync where a step follows": (
        "plain/parallel", "steps", GROUPED, ('== "ddp" and not last', '== "ddp" and last'),
    ),
    "no step at the epoch's end": (
        "plain/parallel", "steps", GROUPED, (" or batch == len(train_loader)", ""),
    ),
    "a step after every batch": (
        "lightning/parallel", "steps", NET | dict(accumulate_grad_batches=2),
        ("accumulate_grad_batches=args.accumulate_grad_batches", "accumulate_grad_batches=1"),
    ),
    "the optimizer before fully_shard": (
        "plain/parallel", "steps", FSDP, (WRAP, ""), (OPTIMIZER, OPTIMIZER + WRAP),
    ),
    "no fully_shard": (
        "lightning/parallel", "steps", FSDP,
        ('strategy == "fsdp" and not', 'strategy == "" and not'),
    ),
    "single precision": (
        "plain/parallel", "start", DOUBLE, ('args.precision == "64-true"', "False"),
    ),
    "no seed before it fits": (
        "plain/parallel", "steps", {}, (RESEED + "    if ckpt", "    if ckpt"),
    ),
    "each with another seed": (
        "plain/parallel", "steps", {},
        (RESEED + "    if ckpt", RESEED.replace(")", " + dist.get_rank())") + "    if ckpt"),
    ),
    "no train after validation": ("plain/parallel", "steps", {}, ("        model.train()\n", "")),
    "the averages of the last one": (
        "plain/parallel", "weights", NORM,
        ("dist.broadcast(buffer, 0)", "dist.broadcast(buffer, 1)"),
    ),
    "the optimizer changed at the end": (
        "plain/parallel", "optimizer", {},
        (RESEED + "    log(", "    optimizer.param_groups[0]['lr'] /= 2\n" + RESEED + "    log("),
    ),
    "no seed before it tests": (
        "plain/parallel", "random", {}, (RESEED + "    log(", "    log("),
    ),
    "each with its own averages": (
        "plain/parallel", "metrics", NORM, ("dist.broadcast(buffer, 0)", "pass"),
    ),
    "each with its own averages in the Trainer": (
        "lightning/parallel", "metrics", NORM | dict(strategy="fsdp"), (BROADCAST, "pass"),
    ),
    "each evaluates for itself": (
        "plain/parallel", "metrics", ODD, (ADD_UP, "each"),
    ),
    "each adds up its own loss": (
        "plain/parallel", "metrics", {},
        (ADD_UP, "(each if isinstance(each, float) else processes.add_up(each, device))"),
    ),
    "the mean of the processes' means": (
        "plain/parallel", "metrics", ODD,
        ("for each in count(net, loader, device)]",
         "for each in count(net, loader, device)]\n"
         "    total, own = count(net, loader, device)\n"
         "    mean = processes.add_up(total / own.sum().item(), device) / 2\n"
         "    sums[0] = mean * sums[1].sum().item()"),
    ),
    "each logs its own loss": (
        "lightning/cifar", "metrics", {},
        ("batch_size=float(len(labels)), sync_dist=True", "batch_size=float(len(labels))"),
    ),
    "a whole batch size": (
        "lightning/cifar", "metrics", ODD, ("float(len(labels))", "len(labels)"),
    ),
    "a checkpoint of the wrong epoch": (
        "plain/parallel", "checkpoints", {},
        ("    save(net, optimizer, epoch", "    save(net, optimizer, epoch + 1"),
    ),
    "a checkpoint before the last step's weights": (
        "plain/parallel", "checkpoints", {},
        ('processes.whole(net.state_dict())\n    ckpt["opt',
         '{k: v + 1e-6 for k, v in net.state_dict().items()}\n    ckpt["opt'),
    ),
}  # fmt: skip
FEW = ("nothing is sent", "the loss not divided by the group", "each evaluates for itself",
       "a whole batch size")  # fmt: skip


def test_the_changes_are_of_all_kinds():
    assert len(CHANGES) >= 25 and set(FEW) < set(CHANGES)
    assert {change[1] for change in CHANGES.values()} == set(WITH_CHECKPOINTS)
    assert {change[0].partition("/")[0] for change in CHANGES.values()} == set(SIDES)


@pytest.mark.parametrize("name", [name if name in FEW else slow(name) for name in CHANGES])
def test_one_change_is_found(name, groups):
    path, stage, settings, *changes = CHANGES[name]
    side, _, file = path.partition("/")
    (other,) = set(SIDES) - {side}
    right = groups(2, other, **settings)[0]
    assert_same(groups(2, side, **settings)[0], right)
    if file == "parallel":
        wrong = groups(2, side, *changes, **settings)[0]
    else:
        wrong = groups(2, side, **settings, sibling=(file, *changes))[0]
    difference = compare_results(wrong.result, right.result).first_difference
    assert difference and difference.name == stage, difference
    count("negative controls in groups of processes")


@pytest.mark.slow
def test_a_logged_loss_of_one_process_is_found(groups):
    """Parity does not read the losses in metrics.csv; the pairs above compare them."""
    change = ("prog_bar=True, sync_dist=True", "prog_bar=True")
    rows = [groups(2, "lightning", *each)[0].metrics() for each in ((change,), ())]
    own, mean = ([float(row["train_loss"]) for row in each if row["train_loss"]] for each in rows)
    assert len(own) == len(mean) == 6 and own != pytest.approx(mean, rel=1e-3)
    count("negative controls in groups of processes")


# The groups themselves.


def hang(monkeypatch, seen):
    if seen["rank"] == 1:
        time.sleep(1000)


def fail(monkeypatch, seen):
    if seen["rank"] == 1:
        raise ValueError("one process failed")


@pytest.mark.slow
def test_processes_that_hang_or_fail_are_ended_and_told(groups):
    with pytest.raises(AssertionError, match=r"by rank: \[-9, -9\]"):
        groups(2, "plain", patch=hang, seconds=5)
    with pytest.raises(AssertionError, match="ValueError: one process failed"):
        groups(2, "plain", patch=fail)
