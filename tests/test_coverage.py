"""docs/coverage.md: what the installed library has, and where a lesson uses it."""

from common.proof import coverage

import inspect

import lightning as L
from helpers import count


def test_the_page_is_current():
    assert coverage.PAGE.read_text(encoding="utf-8") == coverage.page()


def test_the_names_are_those_of_the_installed_library():
    names = coverage.names()
    assert names["Arguments of the Trainer"] == list(inspect.signature(L.Trainer).parameters)
    assert set(names["Callbacks"]) == set(L.pytorch.callbacks.__all__)
    for name in names["Methods of the LightningModule"]:
        assert callable(getattr(L.LightningModule, name))
    for name in names["Methods of Fabric"]:
        assert callable(getattr(L.Fabric, name))
    assert all(len(own) >= 7 for own in names.values()) and len(names) == 7
    count("names of the library", sum(map(len, names.values())))


def test_what_a_lesson_uses_is_found_where_it_is():
    found = coverage.covered()
    for kind, name, script in (
        ("Arguments of the Trainer", "val_check_interval", "when"),
        ("Callbacks", "BasePredictionWriter", "predict"),
        ("Hooks, of modules, data modules and callbacks", "on_test_start", "parallel"),
        ("Methods of the LightningModule", "toggled_optimizer", "gan"),
        ("Methods of Fabric", "no_backward_sync", "fabric"),
        ("Entry points of the Trainer", "predict", "predict"),
    ):
        places = dict(found[kind][name])
        path = coverage.ROOT / "lightning" / f"{script}.py"
        assert name in path.read_text().splitlines()[places[script] - 1], (kind, name)
    assert not found["Callbacks"]["StochasticWeightAveraging"]
