"""The lesson `when`: each option, on both sides; when it validates, looks, saves and stops."""

from common import ROOT
from common.messages import BadInput
from common.proof import moments
from common.proof.compare import compare_results
from common.proof.lessons import load
from common.proof.recording import record_elsewhere

import ast
import copy
import itertools

import pytest
from helpers import SIDES, STAGES, WITH_CHECKPOINTS, assert_agree, count, some, train

# 15 batches of 8 in an epoch, two epochs.
OPTIONS = {
    "defaults": {},
    "a share": {"val_check_interval": 0.25},
    "a share that leaves a rest": {"val_check_interval": 0.3},
    "a number": {"val_check_interval": 4},
    "each batch, looked at once an epoch": {"val_check_interval": 1},
    "each batch of the run": {"val_check_interval": 1, "check_val_every_n_epoch": None},
    "over the whole run": {"val_check_interval": 7, "check_val_every_n_epoch": None},
    "longer than an epoch": {"val_check_interval": 25, "check_val_every_n_epoch": None},
    "once an epoch": {"val_check_interval": 1.0},
    "each second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "a share of each second epoch": {
        "check_val_every_n_epoch": 2, "max_epochs": 4, "val_check_interval": 0.5,
    },
    "never": {"check_val_every_n_epoch": 3},
    "patience within an epoch": {"val_check_interval": 2, "patience": 1, "lr": 0.3},
    "patience over epochs": {"val_check_interval": 1.0, "patience": 1, "lr": 0.3, "max_epochs": 6},
    "patience, but at least two epochs": {
        "val_check_interval": 2, "patience": 1, "lr": 0.3, "min_epochs": 2, "max_epochs": 4,
    },
    "patience at the ends, but at least four epochs": {
        "val_check_interval": 1.0, "patience": 1, "lr": 0.3, "min_epochs": 4, "max_epochs": 6,
    },
    "steps, in the middle of an epoch": {"max_steps": 19},
    "steps, before the first validation": {
        "max_steps": 2, "val_check_interval": 1.0, "num_sanity_val_steps": 0,
    },
    "steps, before the first look": {"max_steps": 2, "num_sanity_val_steps": 2},
    "no sanity check": {"num_sanity_val_steps": 0},
    "a long sanity check": {"num_sanity_val_steps": 9},
    "overfit": {"overfit_batches": 3, "val_check_interval": 1.0},
    "overfit a share": {"overfit_batches": 0.4, "val_check_interval": 2},
    "one run through": {"fast_dev_run": 3},
    "one batch": {"fast_dev_run": 1},
    "draws": {"shared_generator": True},
    "draws, with a sanity check": {"shared_generator": True, "num_sanity_val_steps": 2},
}  # fmt: skip

# What is there at the end, where it is not a best and a last checkpoint.
LEFT = {
    "never": [], "one run through": [], "one batch": [],
    "steps, before the first validation": ["last.ckpt"],
    "steps, before the first look": [],
}  # fmt: skip


@pytest.mark.parametrize("name", some(OPTIONS, 3))
def test_each_option(name, tmp_path, monkeypatch, capsys):
    runs, said = [], []
    for side in SIDES:
        runs.append(train(side, tmp_path, monkeypatch, lesson="when", **OPTIONS[name]))
        said.append([x for x in capsys.readouterr().out.splitlines() if x.startswith("Validated")])
    left = [sorted(run["checkpoints"]) for run in runs]
    assert left == [LEFT.get(name, ["best.ckpt", "last.ckpt"])] * 2
    assert_agree(compare_results(*runs), WITH_CHECKPOINTS if left[0] else STAGES)
    assert len(said[0]) == 1 and said[0] == said[1], "what both sides print differs"
    count("options of when")


PAGE = (ROOT / "docs" / "when.md").read_text(encoding="utf-8")
TABLE = PAGE.partition(moments.MARK)[2].partition(moments.END)[0]
REFUSED = {
    "--val-check-interval 0": "expected a whole number of batches",
    "--val-check-interval 1.5": "expected a whole number of batches",
    "--val-check-interval 0.5 --check-val-every-n-epoch None": "is a share of an epoch",
    "--val-check-interval 11 --limit-train-batches 10": "more than the 10 batches",
    "--check-val-every-n-epoch 0": "expected a whole number from 1",
    "--max-steps 0": "or -1 for no limit",
    "--max-steps -2": "or -1 for no limit",
    "--overfit-batches 1.5": "0 leaves it out",
    "--overfit-batches 0.00001": "--overfit-batches 1e-05 is less than one batch",
    "--num-sanity-val-steps -2": "expected a whole number from 0",
}


@pytest.mark.parametrize("side", SIDES)
def test_what_can_never_come_is_refused(side, tmp_path, monkeypatch):
    for line, words in REFUSED.items():
        names = [word.strip("-").replace("-", "_") for word in line.split()[::2]]
        values = [ast.literal_eval(value) for value in line.split()[1::2]]
        with pytest.raises(BadInput, match=words):
            train(
                side, tmp_path, monkeypatch, lesson="when", **dict(zip(names, values, strict=True))
            )
        count("settings of when refused")
    assert not list(tmp_path.glob("when/*/result.json"))


def test_the_page_shows_the_same_moments_on_both_sides():
    rows = [line for line in TABLE.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert len(rows) == 2 * len(moments.SETTINGS) >= 26
    foretold = load("plain", "when")
    for settings, plain, lightning in zip(moments.SETTINGS, rows[::2], rows[1::2], strict=True):
        assert plain[0] == moments.named(settings) and plain[2:] == lightning[2:]
        args = foretold.Args(**{"max_epochs": 4} | settings)
        batches = args.fast_dev_run or args.overfit_batches or 10
        ends = int(plain[-1])
        will = [step for step in foretold.moments(batches, args) if step <= ends]
        assert moments.short(will) == plain[2], settings
        count("rows of moments")


@pytest.mark.slow
def test_the_page_is_current():
    found = {side: record_elsewhere("common.proof.moments", side) for side in SIDES}
    made, equal = moments.table(found)
    assert equal and f"{moments.MARK}{made}\n{moments.END}" in PAGE


def test_moments_that_differ_are_told():
    moment = {what: [10, 20] for what in moments.DID}
    found = {side: [copy.deepcopy(moment) for _ in moments.SETTINGS] for side in SIDES}
    assert moments.table(found)[1]
    found["lightning"][3]["looks"].pop()
    made, equal = moments.table(found)
    assert not equal and "**different moments**" in made


@pytest.mark.parametrize("side", SIDES)
def test_how_often_it_validates_changes_the_training_only_with_a_shared_generator(
    side, tmp_path, monkeypatch
):
    trained = {}
    for shared, interval in itertools.product((False, True), (2, 5)):
        settings = dict(shared_generator=shared, val_check_interval=interval, max_epochs=1)
        run = train(side, tmp_path, monkeypatch, lesson="when", patience=1000, **settings)
        trained[shared, interval] = run["train_loss"]
    assert trained[False, 2] == trained[False, 5]
    assert trained[True, 2] != trained[True, 5]
