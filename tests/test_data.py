"""The images: the right ones, whole, split without overlap, normalised to the bit."""

from common import data as data_module
from common.data import EpochSampler, Images, eval_loader, load_data, train_loader
from common.messages import BadInput
from common.options import Options
from common.recipes import RECIPES

import hashlib
import http.server
import io
import pickle
import shutil
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import count, real_data, some_images
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor, v2

RECIPE = RECIPES["cifar"]
CIFAR10 = data_module.CIFAR10


def one_by_one(images):
    """The tutorial's way: each image through PIL, ToTensor and Normalize."""
    transform = Compose([ToPILImage(), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    return torch.stack([transform(image) for image in images])


def test_batches_equal_the_tutorials_images_bit_for_bit():
    _, _, images = some_images()
    batch, labels = images.__getitems__(list(range(2000)))
    assert torch.equal(batch, one_by_one(images.images))
    assert torch.equal(labels, images.labels)
    assert batch.dtype == torch.float32 and batch.min() == -1 and batch.max() == 1
    count("images, normalised at once and one by one", len(batch))


def test_every_value_of_a_byte_is_normalised_right():
    every = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    batch, _ = Images(every, torch.zeros(1, dtype=torch.int64)).__getitems__([0])
    assert torch.equal(batch, one_by_one(every))
    # Why the code divides by 255: torchvision's v2.ToDtype rounds otherwise.
    other = v2.Compose([v2.ToDtype(torch.float32, scale=True), Normalize((0.5,) * 3, (0.5,) * 3)])
    assert not torch.equal(other(every), batch)


@pytest.mark.skipif(not real_data(), reason="needs the real images: set DATA_DIR")
def test_the_real_images():
    data = load_data(RECIPE, Options(data="cifar10", data_dir=real_data()))
    assert data.name == "cifar10" and data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert [len(part) for part in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    for part in (data.train, data.val, data.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, 32, 32)
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 1000))
    official = CIFAR10(str(real_data()), train=False, transform=ToTensor())
    for index in range(0, 10_000, 97):
        image, label = official[index]
        batch, labels = data.test.__getitems__([index])
        assert torch.equal(batch[0], Normalize((0.5,) * 3, (0.5,) * 3)(image))
        assert labels.item() == label


def rows(images):
    return {image.numpy().tobytes() for image in images.images}


def test_the_split_is_drawn_by_the_seed_and_does_not_overlap():
    recipes = [replace(RECIPE, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (load_data(recipe, Options(data="shapes")) for recipe in recipes)
    assert first.name == "shapes" and len(first.classes) == 10
    assert [len(part) for part in (first.train, first.val, first.test)] == [45_000, 5_000, 10_000]
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)
    parts = [rows(part) for part in (first.train, first.val, first.test)]
    assert [len(part) for part in parts] == [45_000, 5_000, 10_000]
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


def test_loaders_leave_the_global_generator_alone():
    _, _, images = some_images()
    before = torch.get_rng_state()
    for loader in (train_loader(images, RECIPE, Options()), eval_loader(images, RECIPE, Options())):
        for batch, labels in loader:
            assert batch.shape[1:] == (3, 32, 32) and len(batch) == len(labels)
            break
    assert torch.equal(before, torch.get_rng_state())
    # Without a generator of its own, a loader moves it, even one that does not shuffle.
    next(iter(DataLoader(torch.arange(4))))
    assert not torch.equal(before, torch.get_rng_state())


def test_processes_share_the_global_batches(monkeypatch):
    _, _, images = some_images()
    recipe = replace(RECIPE, batch_size=8)
    whole = [labels for _, labels in train_loader(images, recipe, Options())]
    evaluated = torch.cat([labels for _, labels in eval_loader(images, recipe, Options())])
    shares, evals = [], []
    for rank in range(4):
        monkeypatch.setattr(data_module, "processes", lambda rank=rank: (rank, 4))
        loader = train_loader(images, recipe, Options())
        shares.append([labels for _, labels in loader])
        assert {len(labels) for labels in shares[-1]} == {2}
        assert len(loader.sampler.handed_out[0]) == 2000  # what all have seen, not one process
        evals.append(torch.cat([labels for _, labels in eval_loader(images, recipe, Options())]))
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


@pytest.fixture
def nobody_answers(monkeypatch):
    """The address of CIFAR-10, with nobody there: what a machine without network meets."""
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


def test_without_network_auto_draws_shapes_and_says_so(nobody_answers, tmp_path, capsys):
    data = load_data(RECIPE, Options(data="auto", data_dir=tmp_path))
    assert data.name == "shapes"
    said = capsys.readouterr()
    assert "THIS IS NOT CIFAR-10" in said.err and "Data: shapes" in said.out
    assert list(tmp_path.iterdir()) == []


def test_without_network_cifar10_is_refused(nobody_answers, tmp_path):
    with pytest.raises(BadInput, match="could not be downloaded"):
        load_data(RECIPE, Options(data="cifar10", data_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    silent = threading.Event()
    monkeypatch.setattr(data_module, "NETWORK_SECONDS", 0.2)
    answer = lambda *a, **k: silent.wait() and io.BytesIO()  # noqa: E731
    monkeypatch.setattr(data_module.urllib.request, "urlopen", answer)
    with pytest.raises(BadInput, match="gave no answer in"):
        load_data(RECIPE, Options(data="cifar10", data_dir=tmp_path))
    silent.set()  # only now: whoever waits for the server never comes here


def test_shapes_never_look_for_anything(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module, "_real_cifar10", lambda *a: pytest.fail("looked"))
    assert load_data(RECIPE, Options(data="shapes", data_dir=tmp_path / "none")).name == "shapes"


def test_a_folder_that_is_named_must_be_there(tmp_path):
    with pytest.raises(BadInput, match="is not there"):
        load_data(RECIPE, Options(data_dir=tmp_path / "none"))


def test_the_folder_of_the_files_themselves_is_refused(tmp_path):
    (tmp_path / "data_batch_1").touch()
    with pytest.raises(BadInput, match="name the folder above it"):
        load_data(RECIPE, Options(data_dir=tmp_path))


def test_a_share_below_one_batch_is_refused():
    with pytest.raises(BadInput, match=r"--limit-val-batches 0\.01 is less"):
        load_data(RECIPE, Options(data="shapes", limit_val_batches=0.01))


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of 60 images in the real one's format, with md5 sums to match, and its archive."""
    made = tmp_path / "made" / CIFAR10.base_folder
    made.mkdir(parents=True)
    sums = {}
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        pixels = torch.randint(0, 256, (1200, 3072), dtype=torch.uint8).numpy()
        content = {"data": pixels, "labels": [n % 10 for n in range(1200)]}
        (made / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"class {n}" for n in range(10)]}
    (made / "batches.meta").write_bytes(pickle.dumps(meta))
    for path in made.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    lists = [
        [[name, sums[name]] for name, _ in old] for old in (CIFAR10.train_list, CIFAR10.test_list)
    ]
    monkeypatch.setattr(CIFAR10, "train_list", lists[0])
    monkeypatch.setattr(CIFAR10, "test_list", lists[1])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(made, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    return made, archive.getvalue()


@pytest.mark.parametrize("damage", ["cut short", "altered", "missing"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_is_named(small_cifar, damage, name, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(small_cifar[0], folder / CIFAR10.base_folder)
    assert load_data(RECIPE, Options(data_dir=folder)).name == "cifar10"
    path = folder / CIFAR10.base_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "altered":
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(BadInput, match=f"{name}.*missing, cut short or altered"):
        load_data(RECIPE, Options(data_dir=folder))
    count("damaged files")


@pytest.fixture
def server(small_cifar, monkeypatch):
    """A server on this machine that has the archive; `server.cut` makes it break off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        cut = False

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(small_cifar[1])))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(small_cifar[1][: 1000 if Handler.cut else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        port = httpd.server_address[1]
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/{CIFAR10.filename}")
        yield Handler
        httpd.shutdown()


def test_a_download_arrives_whole(server, tmp_path, capfd):
    folder = tmp_path / "data"
    folder.mkdir()
    data = load_data(RECIPE, Options(data="cifar10", data_dir=folder))
    assert data.name == "cifar10" and data.classes[3] == "class 3"
    assert [path.name for path in folder.iterdir()] == [CIFAR10.base_folder]
    assert "100%" in capfd.readouterr().err  # the progress bar


def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    server.cut = True
    with pytest.raises(BadInput, match="the download broke off"):
        load_data(RECIPE, Options(data="cifar10", data_dir=tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name != "made"]


def test_an_archive_that_is_there_is_unpacked(small_cifar, nobody_answers, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / CIFAR10.filename).write_bytes(small_cifar[1])
    assert load_data(RECIPE, Options(data="cifar10", data_dir=folder)).name == "cifar10"
    shutil.rmtree(folder / CIFAR10.base_folder)
    (folder / CIFAR10.filename).write_bytes(small_cifar[1][:-1])
    with pytest.raises(BadInput, match=f"{CIFAR10.filename}.*cut short or altered"):
        load_data(RECIPE, Options(data="cifar10", data_dir=folder))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that not even root can fill")
def test_a_folder_that_cannot_be_written_to(nobody_answers):
    with pytest.raises(BadInput, match="nothing can be written there"):
        load_data(RECIPE, Options(data="cifar10", data_dir=Path("/proc")))
