"""Settings for every test, and the count of what was compared, printed at the end."""

import os

# Before PyTorch is imported: on a busy machine, several threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import COMPARED, count, real_data


@pytest.fixture(autouse=True)
def one_thread():
    """Runs set their number of threads; the next test must not inherit it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group():
    """A run of the lesson parallel opens one; the next run must open its own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def kept_twins(tmp_path_factory):
    """What the twins of exercises reached, for all tests of a file."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def workspace(tmp_path, monkeypatch, kept_twins):
    """A learner's folder, whose files are checked in forked processes."""
    from common.exercises import check
    from common.exercises.workspace import Workspace

    from graded import Forked

    monkeypatch.setattr(check, "start", Forked)
    monkeypatch.setattr(check, "KEPT", kept_twins)
    return Workspace(tmp_path / "exercises")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: it tells the first one
        session.config.workeroutput["compared"] = COMPARED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for what, how_many in getattr(node, "workeroutput", {}).get("compared", {}).items():
        count(what, how_many)


def pytest_terminal_summary(terminalreporter):
    images = f"the real images in {real_data()}" if real_data() else "the built-in shapes"
    terminalreporter.write_line(f"Tested on {images}.")
    for what, how_many in sorted(COMPARED.items()):
        terminalreporter.write_line(f"compared: {how_many} {what}")
