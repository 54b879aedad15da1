"""The files of the real images: found, downloaded, checked by their md5 sums, and read.

Only a download needs torchvision, whose import takes seconds.
"""

from common.files import read_bytes
from common.folders import is_writable
from common.messages import BadInput

import contextlib
import hashlib
import os
import pickle
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA_DIR = Path("data")  # where the images lie unless --data-dir or DATA_DIR says otherwise
MOST_ARCHIVE = 2**28  # bytes; CIFAR-10's has 170 million
NETWORK_SECONDS = 8.0  # how long to wait for the server before saying that there is no network

# Images, uint8 [count, channels, height, width], and their labels, int64 [count].
Part = tuple[Tensor, Tensor]
# The names of the classes, the images to train on, those to test on.
Contents = tuple[tuple[str, ...], Part, Part]


@dataclass(frozen=True)
class Source:
    """Where a real data set lies and comes from, with md5 sums, and how it is read."""

    title: str
    folder: str  # below the data folder
    files: dict[str, str]  # name in the folder: md5 sum
    archives: tuple[tuple[str, str, str], ...]  # (address, file name, md5 sum)
    read: Callable[[dict[str, bytes]], Contents]  # from what the files hold, by name


def _read_cifar10(files: dict[str, bytes]) -> Contents:
    # The files come from Python 2. Unpickling could run code: only what was checked comes here.
    batches = {name: pickle.loads(content, encoding="latin1") for name, content in files.items()}
    classes = tuple(batches.pop("batches.meta")["label_names"])
    test = batches.pop("test_batch")
    train = [batches[name] for name in sorted(batches)]

    def part(batches: list) -> Part:
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = [label for batch in batches for label in batch["labels"]]
        return torch.from_numpy(images), torch.tensor(labels)

    return classes, part(train), part([test])


def _read_fashionmnist(files: dict[str, bytes]) -> Contents:
    def part(name: str) -> Part:
        # Before the bytes of the pixels come 4 numbers of 4 bytes each; before the labels, 2.
        pixels = np.frombuffer(files[f"{name}-images-idx3-ubyte"], np.uint8, offset=16)
        labels = np.frombuffer(files[f"{name}-labels-idx1-ubyte"], np.uint8, offset=8)
        # Copies, since the bytes of a file cannot be written to.
        return torch.tensor(pixels).view(-1, 1, 28, 28), torch.tensor(labels).long()

    return FASHION_CLASSES, part("train"), part("t10k")


FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# What torchvision has of them, too; it lacks the sums of FashionMNIST's unpacked files.
SOURCES = {
    "cifar10": Source(
        title="CIFAR-10",
        folder="cifar-10-batches-py",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        archives=(
            (
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "cifar-10-python.tar.gz",
                "c58f30108f718f92721af3b95e74349a",
            ),
        ),
        read=_read_cifar10,
    ),
    "fashionmnist": Source(
        title="FashionMNIST",
        folder="FashionMNIST/raw",
        files={
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
        archives=tuple(
            (FASHION + name, name, md5)
            for name, md5 in (
                ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
            )
        ),
        read=_read_fashionmnist,
    ),
}


class Unreachable(Exception):
    """The data could not be downloaded; the text says why."""


def source(name: str) -> Source:
    """Return what is known of a real data set: cifar10 or fashionmnist."""
    return SOURCES[name]


def is_here(folder: Path, name: str) -> bool:
    """Tell whether the real images are in a data folder, whole or damaged."""
    return (folder / source(name).folder).is_dir()


def read_real(name: str, folder: Path) -> Contents:
    """Read a real data set, after a download where it is not here.

    Raises BadInput where a file is damaged, or the folder is missing or cannot be written to, and
    Unreachable where there is no network.
    """
    real = source(name)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--data-dir '{folder}' is a file; name the folder that holds the images.")
    if (folder / next(iter(real.files))).exists():
        above = folder.absolute().parents[len(Path(real.folder).parts) - 1]
        raise BadInput(
            f"--data-dir '{folder}' holds the data files themselves; name the folder above it, "
            f"'{above}', in which they lie as {real.folder}."
        )
    if folder != DATA_DIR and not folder.is_dir():
        raise BadInput(
            f"the data folder '{folder}' is not there; create it, or leave out --data-dir and "
            f"DATA_DIR to use '{DATA_DIR}'."
        )
    if not is_here(folder, name):
        _download(real, folder)
    return real.read({file: _checked(folder / real.folder / file, md5)
                      for file, md5 in real.files.items()})  # fmt: skip


def _checked(path: Path, md5: str) -> bytes:
    """Return what a file holds; raise BadInput where it is missing, cut short or altered."""
    content = b""
    with contextlib.suppress(OSError):  # also where it is no regular file, or far too large
        content = read_bytes(path)
    if _md5(content) != md5:
        raise BadInput(
            f"the data file '{path}' is missing, cut short or altered (its md5 sum is not {md5}); "
            f"remove the folder '{path.parent}' to have it downloaded again, or use --data shapes."
        )
    return content


def _md5(content: bytes) -> str:
    # Some machines forbid md5 as a safeguard; here it finds damage.
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(real: Source, folder: Path) -> None:
    """Bring a data set into `folder`, whole or not at all.

    Raises Unreachable: within NETWORK_SECONDS where the server does not answer at all.
    """
    if folder.exists() and not is_writable(folder):
        raise BadInput(
            f"{real.title} is not in '{folder}', and nothing can be written there to download it; "
            "choose another --data-dir, or use --data shapes."
        )
    if missing := [url for url, name, _ in real.archives if not (folder / name).exists()]:
        probe(missing[0])
    from torchvision.datasets.utils import download_url, extract_archive

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        unpacked = Path(temporary, real.folder)
        for url, name, md5 in real.archives:
            archive = folder / name
            if not archive.exists():
                archive = Path(temporary, name)
                with giving_up():
                    download_url(url, temporary, name, md5)
            if not archive.is_file() or _md5(read_bytes(archive, MOST_ARCHIVE)) != md5:
                raise BadInput(
                    f"the data file '{archive}' is cut short or altered (its md5 sum is not "
                    f"{md5}); remove it to have it downloaded again, or use --data shapes."
                )
            # CIFAR-10's archive brings its folder along, FashionMNIST's files do not.
            into = unpacked.parent if ".tar" in name else unpacked
            into.mkdir(parents=True, exist_ok=True)
            extract_archive(str(archive), str(into))
        (folder / real.folder).parent.mkdir(exist_ok=True)
        os.replace(unpacked, folder / real.folder)


@contextlib.contextmanager
def giving_up() -> Iterator[None]:
    """Raise Unreachable where a download breaks off, or stands still for 30 seconds."""
    socket.setdefaulttimeout(30)  # torchvision sets none: a dead line would hang for ever
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise Unreachable(f"the download broke off: {error}") from None
    finally:
        socket.setdefaulttimeout(None)


def probe(url: str) -> None:
    """Raise Unreachable unless the server answers within NETWORK_SECONDS.

    In a thread of its own: no time-out of Python's covers the look-up of the server's name, which
    can hang for minutes where there is no network.
    """
    problem: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
            problem.append("")
        except Exception as error:  # a proxy can raise anything; the thread must say what it was
            problem.append(f"the server was not reached: {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    if not problem:
        raise Unreachable(f"the server gave no answer in {NETWORK_SECONDS:.0f} seconds")
    if problem[0]:
        raise Unreachable(problem[0])
