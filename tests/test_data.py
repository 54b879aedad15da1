"""The images: the right ones, whole, split without overlap, normalised to the bit."""

from common import ROOT, download
from common import data as data_module
from common.data import EpochSampler, Images, load_images, make_loader
from common.messages import BadInput
from common.networks import CIFAR10, IMAGENET, TO_ONE
from common.run import Options
from common.shapes import draw_grey_shapes, draw_shapes

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from helpers import count, real_data
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor, v2

TORCHVISIONS = {"cifar10": datasets.CIFAR10, "fashionmnist": datasets.FashionMNIST}
# For each data set: the transform of its images as the tutorials write it and as the lessons do,
# the format of its images, and how many there are to train on.
TRANSFORMS = {
    "cifar10": Compose([ToPILImage(), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]),
    "fashionmnist": Compose([ToPILImage(), ToTensor()]),
}
OURS = {"cifar10": TO_ONE, "fashionmnist": None}
FORMATS = {"cifar10": (3, 32, 32), "fashionmnist": (1, 28, 28)}
COUNTS = {"cifar10": 45_000, "fashionmnist": 55_000}
each_data_set = pytest.mark.parametrize("name", OURS)


def options(**settings):
    """A lesson's Args, as far as loading images needs them."""
    args = Options(**{"data": "auto", "data_dir": Path("data"), **settings})
    args.batch_size = 4
    return args


def load(name="cifar10", **settings):
    return load_images(name, options(**settings), OURS[name])


def one_by_one(images, name):
    """The tutorial's way: each image through PIL, ToTensor and, in colour, Normalize."""
    return torch.stack([TRANSFORMS[name](image) for image in images])


@functools.cache
def two_thousand(name):
    """2,000 images in a data set's format: real ones where DATA_DIR has them, else shapes."""
    if folder := real_data(name):
        test = load(name, data=name, data_dir=folder).test
        return replace(test, images=test.images[:2000], labels=test.labels[:2000])
    draw = {"cifar10": draw_shapes, "fashionmnist": draw_grey_shapes}[name]
    return Images(*draw(2000, seed=3), OURS[name])


@each_data_set
def test_batches_equal_the_tutorials_images_bit_for_bit(name):
    images = two_thousand(name)
    batch, labels = images.__getitems__(list(range(2000)))
    assert torch.equal(batch, one_by_one(images.images, name))
    assert torch.equal(labels, images.labels)
    lowest = {"cifar10": -1, "fashionmnist": 0}[name]
    assert batch.dtype == torch.float32 and batch.min() == lowest and batch.max() == 1
    assert batch.shape == (2000, *FORMATS[name])
    count("images, normalised at once and one by one", len(batch))


@each_data_set
def test_every_value_of_a_byte_is_normalised_right(name):
    channels, height, width = FORMATS[name]
    every = torch.arange(channels * height * width).to(torch.uint8).view(1, channels, height, width)
    assert len(every.unique()) == 256
    transform = OURS[name]
    batch, _ = Images(every, torch.zeros(1, dtype=torch.int64), transform).__getitems__([0])
    assert torch.equal(batch, one_by_one(every, name))
    # Why the code divides by 255: torchvision's v2.ToDtype rounds otherwise.
    other = v2.ToDtype(torch.float32, scale=True)(every)
    assert not torch.equal(transform(other) if transform else other, batch)


def test_a_batch_goes_through_both_transforms():
    colours, labels = draw_shapes(20, seed=0)
    halved = Images(colours, labels, transform=lambda x: x / 2, target_transform=lambda y: y + 10)
    batch, targets = halved.__getitems__([3, 17])
    assert torch.equal(batch, colours[[3, 17]] / 255 / 2)
    assert torch.equal(targets, labels[[3, 17]] + 10)
    assert torch.equal(halved.labels, labels)  # those of the split stay class numbers


def test_normalize_takes_the_mean_away_and_divides():
    black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 3, 1, 1)
    assert TO_ONE(black_and_white.clone()).flatten().tolist() == [-1, -1, -1, 1, 1, 1]
    # (0 - mean) / std and (1 - mean) / std, with the numbers of torchvision's documentation.
    black = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    white = [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]
    assert IMAGENET(black_and_white.clone()).flatten().tolist() == pytest.approx([*black, *white])
    if folder := real_data():  # CIFAR-10's own images have mean 0 and spread 1 then
        images = load(data_dir=folder).train.images[:5000]
        pixels = CIFAR10(images.float() / 255)
        assert pixels.mean((0, 2, 3)).abs().max() < 0.02
        assert (pixels.std((0, 2, 3)) - 1).abs().max() < 0.02


@each_data_set
def test_the_real_images(name):
    if not (folder := real_data(name)):
        pytest.skip("needs the real images: set DATA_DIR")
    data = load(name, data=name, data_dir=folder)
    first_and_last = {
        "cifar10": ("airplane", "truck"),
        "fashionmnist": ("T-shirt/top", "Ankle boot"),
    }
    assert (data.classes[0], data.classes[9]) == first_and_last[name] and data.name == name
    parts = (data.train, data.val, data.test)
    assert [len(part) for part in parts] == [COUNTS[name], 5_000, 10_000]
    for part in parts:
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == FORMATS[name]
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 1000))
    labels = torch.cat([data.train.labels, data.val.labels])
    assert torch.equal(labels.bincount(), torch.full((10,), (COUNTS[name] + 5_000) // 10))
    official = TORCHVISIONS[name](
        str(folder), train=False, transform=Compose(TRANSFORMS[name].transforms[1:])
    )
    for index in range(0, 10_000, 97):
        image, label = official[index]
        batch, labels = data.test.__getitems__([index])
        assert torch.equal(batch[0], image)
        assert labels.item() == label
    count("real images, against torchvision's own", len(range(0, 10_000, 97)))


@each_data_set
def test_real_images_are_read_as_torchvision_reads_them(name):
    if not (folder := real_data(name)):
        pytest.skip("needs the real images: set DATA_DIR")
    classes, *parts = download.read_real(name, folder)
    for (images, labels), train in zip(parts, (True, False), strict=True):
        official = TORCHVISIONS[name](str(folder), train=train)
        theirs = torch.as_tensor(official.data)
        theirs = theirs.permute(0, 3, 1, 2) if name == "cifar10" else theirs[:, None]
        assert torch.equal(images, theirs) and images.dtype == theirs.dtype == torch.uint8
        assert images.is_contiguous()
        assert torch.equal(labels, torch.as_tensor(official.targets))
        assert labels.dtype == torch.int64
        assert classes == tuple(official.classes)
        count("real images, read by us and by torchvision", len(labels))


def test_addresses_and_sums_are_torchvisions():
    cifar10, fashion = download.SOURCES["cifar10"], download.SOURCES["fashionmnist"]
    theirs = TORCHVISIONS["cifar10"]
    lists = [*theirs.train_list, *theirs.test_list, (theirs.meta["filename"], theirs.meta["md5"])]
    assert list(cifar10.files.items()) == [tuple(pair) for pair in lists]
    assert cifar10.archives == ((theirs.url, theirs.filename, theirs.tgz_md5),)
    assert cifar10.folder == theirs.base_folder
    theirs = TORCHVISIONS["fashionmnist"]
    assert fashion.archives == tuple(
        (theirs.mirrors[0] + file, file, md5) for file, md5 in theirs.resources
    )
    assert [f"{file}.gz" for file in fashion.files] == [file for file, _ in theirs.resources]
    assert list(download.FASHION_CLASSES) == theirs.classes


def test_torchvision_is_not_imported_to_read_images():
    """Its import takes seconds, in every run and in every process that loads data."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(real_data() or "")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "torchvision: False, then True"


IMPORTS = """
import sys
from pathlib import Path
from common import data, download, models, pretrained
if sys.argv[1]:
    download.read_real("cifar10", Path(sys.argv[1]))
models.SmallNet()
before = "torchvision" in sys.modules
models.Transfer("mobilenet_v3_small")
print(f"torchvision: {before}, then {'torchvision' in sys.modules}")
"""


def rows(images):
    return {image.numpy().tobytes() for image in images.images}


@each_data_set
def test_the_split_is_drawn_by_the_seed_and_does_not_overlap(name):
    first, again, other = (load(name, data="shapes", seed=seed) for seed in (0, 0, 1))
    assert first.name == "shapes" and len(first.classes) == 10
    lengths = [len(part) for part in (first.train, first.val, first.test)]
    assert lengths == [COUNTS[name], 5_000, 10_000]
    assert first.train.images.shape[1:] == FORMATS[name]
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)
    parts = [rows(part) for part in (first.train, first.val, first.test)]
    assert [len(part) for part in parts] == lengths
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, draws=0):
        sampler = EpochSampler(50, seed)
        for _ in range(draws):
            list(sampler)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3, draws=2)
    assert sorted(order(0, 0)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (5, 0))}) == 3


def test_a_limit_leaves_the_first_of_each_epochs_order():
    whole, limited = EpochSampler(50, seed=3), EpochSampler(50, seed=3, first=20)
    for epoch in range(3):
        for sampler in (whole, limited):
            sampler.set_epoch(epoch)
        assert list(limited) == list(whole)[:20] and len(limited) == 20
    train = replace(two_thousand("cifar10"), split="train")
    for limit, batches in ((1.0, 500), (7, 7), (0.1, 50), (10**6, 500)):
        loader = make_loader(train, options(limit_train_batches=limit))
        assert len(loader) == len(list(loader)) == batches
        count("limits")


def test_what_was_trained_on_is_skipped_in_its_epoch_alone():
    sampler = EpochSampler(50, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    sampler.skip(1, 12)
    assert list(sampler) == orders[1][12:]  # at once: loaders that load ahead do not wait
    sampler.set_epoch(2)
    assert list(sampler) == orders[2] and len(sampler) == 50


def test_loaders_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    for split in ("train", "val"):
        loader = make_loader(replace(two_thousand("cifar10"), split=split), options())
        for batch, labels in loader:
            assert batch.shape[1:] == (3, 32, 32) and len(batch) == len(labels)
            break
    assert torch.equal(before, torch.get_rng_state())
    # Without a generator of its own, a loader moves it, even one that does not shuffle.
    next(iter(DataLoader(torch.arange(4))))
    assert not torch.equal(before, torch.get_rng_state())


def test_processes_share_the_global_batches(monkeypatch):
    args = options()
    args.batch_size = 8

    def labels_of(split):
        loader = make_loader(replace(two_thousand("cifar10"), split=split), args)
        return [labels for _, labels in loader]

    whole, evaluated = labels_of("train"), torch.cat(labels_of("val"))
    shares, evals = [], []
    for rank in range(4):
        monkeypatch.setattr(data_module, "processes", lambda rank=rank: (rank, 4))
        shares.append(labels_of("train"))
        assert {len(labels) for labels in shares[-1]} == {2}
        evals.append(torch.cat(labels_of("val")))
    for step, batch in enumerate(whole):
        together = torch.stack([share[step] for share in shares], dim=1).flatten()
        assert torch.equal(together, batch)
    assert torch.equal(torch.stack(evals, dim=1).flatten(), evaluated)


def test_why_not_a_shuffling_loader_with_its_own_generator():
    """The usual advice breaks parity: from the second epoch on, the two loops shuffle otherwise."""

    class Seen(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch.tolist())
            return self.layer(batch[:, None].float()).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    def loader(batch_size):
        own = torch.Generator().manual_seed(0)
        return DataLoader(torch.arange(12), batch_size, shuffle=True, generator=own)

    for batch_size, equal in ((4, False), (5, True)):
        plain, by_hand = [], loader(batch_size)
        for _ in range(2):
            plain += [batch.tolist() for batch in by_hand]
        module = Seen()
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=1, logger=False,
                            enable_checkpointing=False, enable_progress_bar=False,
                            enable_model_summary=False)  # fmt: skip
        trainer.fit(module, loader(batch_size))
        half = len(plain) // 2
        assert module.seen[:half] == plain[:half]
        assert (module.seen[half:] == plain[half:]) is equal


# Where there is no network, or no whole file.


def come_from(monkeypatch, address):
    """Let all archives lie at another address."""
    for name, real in download.SOURCES.items():
        archives = tuple((address + file, file, md5) for _, file, md5 in real.archives)
        monkeypatch.setitem(download.SOURCES, name, replace(real, archives=archives))


@pytest.fixture
def nobody_answers(monkeypatch):
    """The addresses of the data sets, with nobody there: a machine without network."""
    come_from(monkeypatch, "http://127.0.0.1:9/")


TITLES = {"cifar10": "CIFAR-10", "fashionmnist": "FashionMNIST"}


@each_data_set
def test_without_network_auto_draws_shapes_and_says_so(nobody_answers, name, tmp_path, capsys):
    data = load(name, data="auto", data_dir=tmp_path)
    assert data.name == "shapes" and data.train.images.shape[1:] == FORMATS[name]
    said = capsys.readouterr()
    assert f"THIS IS NOT {TITLES[name]}." in said.err and "Data: shapes" in said.out
    assert list(tmp_path.iterdir()) == []


@each_data_set
def test_without_network_the_real_images_are_refused(nobody_answers, name, tmp_path):
    with pytest.raises(BadInput, match=f"^{TITLES[name]} is not in .* could not be downloaded"):
        load(name, data=name, data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    silent = threading.Event()
    monkeypatch.setattr(download, "NETWORK_SECONDS", 0.2)
    answer = lambda *a, **k: silent.wait() and io.BytesIO()  # noqa: E731
    monkeypatch.setattr(download.urllib.request, "urlopen", answer)
    with pytest.raises(BadInput, match="gave no answer in"):
        load(data="cifar10", data_dir=tmp_path)
    silent.set()  # only now: whoever waits for the server never comes here


def test_shapes_never_look_for_anything(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module, "read_real", lambda *a: pytest.fail("looked"))
    assert load(data="shapes", data_dir=tmp_path / "none").name == "shapes"


def test_a_folder_that_is_named_must_be_there(tmp_path):
    with pytest.raises(BadInput, match="is not there"):
        load(data_dir=tmp_path / "none")


@each_data_set
def test_the_folder_of_the_files_themselves_is_refused(name, tmp_path):
    real = download.source(name)
    folder = tmp_path / real.folder
    folder.mkdir(parents=True)
    (folder / next(iter(real.files))).touch()
    right = re.escape(f"name the folder above it, '{tmp_path}', in which they lie as {real.folder}")
    with pytest.raises(BadInput, match=right):
        load(name, data_dir=folder)


@each_data_set
def test_the_real_images_are_here_where_their_folder_is(name, tmp_path):
    assert not download.is_here(tmp_path, name)
    (tmp_path / download.source(name).folder).mkdir(parents=True)
    assert download.is_here(tmp_path, name)
    (other,) = OURS.keys() - {name}
    assert not download.is_here(tmp_path, other)


def test_another_data_set_is_refused():
    with pytest.raises(BadInput, match="trains on cifar10, and --data fashionmnist"):
        load(data="fashionmnist")


def test_a_share_below_one_batch_is_refused():
    with pytest.raises(BadInput, match=r"--limit-val-batches 0\.01 is less"):
        load(data="shapes", limit_val_batches=0.01)


def md5(content):
    return hashlib.md5(content).hexdigest()


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8).numpy()


@functools.cache
def small_cifar10():
    """6,000 and 1,200 random images in CIFAR-10's format: (content by file name, by archive)."""
    files = {}
    real = download.source("cifar10")
    for name in list(real.files)[:-1]:
        batch = {"data": random_bytes(1200, 3072), "labels": [n % 10 for n in range(1200)]}
        files[name] = pickle.dumps(batch)
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {n}" for n in range(10)]})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{real.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return files, {real.archives[0][1]: archive.getvalue()}


@functools.cache
def small_fashionmnist():
    """The same in FashionMNIST's format: each file is packed by itself."""
    files = {}
    for part, length in (("train", 6000), ("t10k", 1200)):
        # What kind of numbers (8: bytes), how many dimensions, their lengths, and the bytes.
        lengths = [size.to_bytes(4, "big") for size in (length, 28, 28)]
        pixels = random_bytes(length, 28, 28).tobytes()
        files[f"{part}-images-idx3-ubyte"] = b"".join([bytes([0, 0, 8, 3]), *lengths, pixels])
        labels = bytes(n % 10 for n in range(length))
        files[f"{part}-labels-idx1-ubyte"] = b"".join([bytes([0, 0, 8, 1]), lengths[0], labels])
    packed = {f"{name}.gz": gzip.compress(files[name], 1) for name in files}
    return files, packed


@pytest.fixture
def made(name, tmp_path, monkeypatch):
    """A small data set in the real one's format: (the folder above it, archives by name).

    All md5 sums are replaced by those of its files.
    """
    files, archives = {"cifar10": small_cifar10, "fashionmnist": small_fashionmnist}[name]()
    folder = tmp_path / "made" / download.source(name).folder
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    sums = {file: md5(content) for file, content in (files | archives).items()}
    real = download.source(name)
    ours = replace(
        real,
        files={file: sums[file] for file in real.files},
        archives=tuple((url, file, sums[file]) for url, file, _ in real.archives),
    )
    monkeypatch.setitem(download.SOURCES, name, ours)
    return tmp_path / "made", archives


DAMAGES = [
    (name, file, damage)
    for name, files in (
        ("cifar10", ["data_batch_3", "test_batch", "batches.meta"]),
        ("fashionmnist", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
    )
    for file in files
    for damage in ("cut short", "altered", "missing")
]


@pytest.mark.parametrize("name, file, damage", DAMAGES)
def test_a_damaged_file_is_named(made, name, file, damage, tmp_path):
    folder = made[0]
    assert load(name, data_dir=folder).name == name
    path = folder / download.source(name).folder / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "altered":
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(BadInput, match=f"{file}.*missing, cut short or altered"):
        load(name, data_dir=folder)
    count("damaged files")


def test_only_what_was_checked_is_unpickled(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    real = download.source("cifar10")
    folder = tmp_path / real.folder
    folder.mkdir()
    for file in real.files:
        (folder / file).write_bytes(pickle.dumps(Harmful()))
    pickle.loads((folder / file).read_bytes())
    (tmp_path / "it ran").unlink()  # it does harm
    with pytest.raises(BadInput, match="altered"):
        load(data_dir=tmp_path)
    assert not (tmp_path / "it ran").exists()


@pytest.fixture
def server(made, monkeypatch):
    """A server on this machine that has the archives; with `server.cut` it breaks off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        cut = ""  # the name of the archive of which only the beginning comes
        asked: ClassVar = set()  # the archives that were asked for

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(made[1][self.path[1:]])))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            Handler.asked.add(self.path[1:])
            content = made[1][self.path[1:]]
            end = len(content) // 2 if self.path[1:] == Handler.cut else None
            self.wfile.write(content[:end])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_address[1]}/"
        come_from(monkeypatch, address)
        yield Handler
        httpd.shutdown()


@each_data_set
def test_a_download_arrives_whole(name, made, server, tmp_path, capfd):
    folder, real = tmp_path / "data", download.source(name)
    folder.mkdir()
    data = load(name, data=name, data_dir=folder)
    assert data.name == name and len(data.train) == 1_000 and len(data.test) == 1_200
    assert data.classes == (tuple(f"class {n}" for n in range(10)) if name == "cifar10"
                            else download.FASHION_CLASSES)  # fmt: skip
    assert [path.name for path in folder.iterdir()] == [Path(real.folder).parts[0]]
    for file in real.files:
        arrived = (folder / real.folder / file).read_bytes()
        assert arrived == (made[0] / real.folder / file).read_bytes()
    assert {path.name for path in (folder / real.folder).iterdir()} == set(real.files)
    assert capfd.readouterr().err.count("100%") >= len(made[1])  # a progress bar for each


@each_data_set
def test_a_download_that_breaks_off_leaves_nothing(name, made, server, tmp_path):
    server.cut = list(made[1])[-1]  # those before it arrive
    with pytest.raises(BadInput, match="the download broke off"):
        load(name, data=name, data_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["fashionmnist"])
def test_only_the_missing_archives_are_downloaded(name, made, server, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    here, *missing = made[1]
    (folder / here).write_bytes(made[1][here])
    assert load(name, data=name, data_dir=folder).name == name
    assert server.asked == set(missing)
    assert {path.name for path in folder.iterdir()} == {here, "FashionMNIST"}


@each_data_set
def test_an_archive_that_is_there_is_unpacked(name, made, nobody_answers, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for archive, content in made[1].items():
        (folder / archive).write_bytes(content)
    assert load(name, data=name, data_dir=folder).name == name
    shutil.rmtree(folder / download.source(name).folder)
    (folder / archive).write_bytes(content[:-1])
    with pytest.raises(BadInput, match=f"{archive}.*cut short or altered"):
        load(name, data=name, data_dir=folder)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that not even root can fill")
@each_data_set
def test_a_folder_that_cannot_be_written_to(nobody_answers, name):
    with pytest.raises(BadInput, match="nothing can be written there"):
        load(name, data=name, data_dir=Path("/proc"))
