"""A comparison that cannot fail proves nothing: one change on one side, and it must name the stage.

Each change replaces lines of one script; what it does is what people forget or get wrong.
"""

from common.messages import BadInput
from common.parity import compare_results

import copy

import pytest
from helpers import SIDES, Noisy, count, small_data, train

CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "other seed": (
        "plain", "start", ("seed_everything(recipe.seed)", "seed_everything(recipe.seed + 1)"),
    ),
    "a layer built before the model": (
        "lightning", "start",
        ("    net = recipe.model()", "    torch.nn.Linear(2, 2)\n    net = recipe.model()"),
    ),
    "other shuffle": (
        "plain", "data",
        ("loader.sampler.set_epoch(epoch)", "loader.sampler.set_epoch(max(1, epoch))"),
    ),
    "no set_epoch": ("plain", "data", ("        loader.sampler.set_epoch(epoch)\n", "")),
    "one batch less": (
        "plain", "data", ("recipe.max_epochs * batches if", "recipe.max_epochs * batches - 1 if"),
    ),
    "no zero_grad": ("plain", "steps", ("            optimizer.zero_grad()\n", "")),
    "another learning rate": ("plain", "steps", ("lr=recipe.lr, m", "lr=1.001 * recipe.lr, m")),
    "no momentum": ("plain", "steps", ("momentum=recipe.momentum", "momentum=0")),
    "weight decay on one side": (
        "lightning", "steps",
        ("momentum=self.recipe.momentum", "momentum=self.recipe.momentum, weight_decay=1e-4"),
    ),
    "sum instead of mean": (
        "plain", "steps",
        ("loss = F.cross_entropy(model(images), labels)",
         "loss = F.cross_entropy(model(images), labels, reduction='sum')"),
    ),
    "no model.train after validation": ("plain", "steps", ("        model.train()\n", "")),
    "no model.eval before validation": ("plain", "steps", ("    model.eval()\n", "")),
    "one step more": (
        "plain", "weights",
        ("            optimizer.step()\n",
         "            optimizer.step()\n"
         "            if len(losses) + 1 == steps:\n                optimizer.step()\n"),
    ),
    "a weight missing": (
        "lightning", "weights",
        ("    trained = (net,", "    del net.backbone[1].bias\n    trained = (net,"),
    ),
    "optimizer changed after training": (
        "lightning", "optimizer",
        ("    trained = (net,", "    trainer.optimizers[0].param_groups[0]['lr'] /= 10\n"
         "    trained = (net,"),
    ),
    "a random number drawn at the end": (
        "plain", "random", ("    trained = (net,", "    torch.rand(1)\n    trained = (net,"),
    ),
    "batch mean instead of sample-weighted": (
        "plain", "metrics",
        (".item() * len(labels)", ".item()"),
        ("return compute_metrics(total_loss, confusion)",
         "n = count_batches(len(loader), limit)\n"
         "    return compute_metrics(total_loss / n * confusion.sum().item(), confusion)"),
    ),
    "a metric averaged over batches": (
        "lightning", "metrics",
        ("self.log_dict(self.metrics[stage])",
         "self.log_dict(self.metrics[stage](logits, labels), batch_size=len(labels))"),
    ),
    "macro instead of micro": ("lightning", "metrics", ('"micro"', '"macro"')),
    "rows and columns exchanged": (
        "plain", "metrics", ("10 * labels + logits.argmax(1)", "labels + 10 * logits.argmax(1)"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("unchanged")
        results = {side: train(side, folder, monkeypatch).result() for side in SIDES}
    assert compare_results(results["plain"], results["lightning"]).agree
    return results


def test_there_are_enough():
    assert len(CHANGES) >= 20
    assert {change[0] for change in CHANGES.values()} == set(SIDES)
    assert {change[1] for change in CHANGES.values()} == {
        "data", "start", "steps", "weights", "optimizer", "random", "metrics",
    }  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train(side, tmp_path, monkeypatch, *changes).result()
    (other,) = set(SIDES) - {side}
    comparison = compare_results(changed, unchanged[other])
    assert comparison.first_difference.name == stage, comparison.first_difference
    # What follows the first difference is not compared.
    after = [s.name for s in comparison.stages].index(stage) + 1
    assert all(s.compared == 0 and not s.difference for s in comparison.stages[after:])
    count("negative controls")


def test_other_pixels_are_found(unchanged, tmp_path, monkeypatch):
    data = small_data()
    data.train.images[7, 0, 0, 0] ^= 1
    changed = train("lightning", tmp_path, monkeypatch, data=data).result()
    data.train.images[7, 0, 0, 0] ^= 1  # the tensor is shared by all tests
    difference = compare_results(unchanged["plain"], changed).first_difference
    assert difference.name == "data" and "train images" in difference.difference
    count("negative controls")


def test_nothing_to_compare_is_a_failure(unchanged):
    for part in ("data", "start", "weights", "optimizer", "random"):
        a, b = (copy.deepcopy(unchanged[side]) for side in SIDES)
        a["fingerprints"][part] = b["fingerprints"][part] = {}
        assert compare_results(a, b).first_difference.name == part
        count("negative controls")
    a, b = (copy.deepcopy(unchanged[side]) for side in SIDES)
    a["train_loss"] = b["train_loss"] = []
    assert compare_results(a, b).first_difference.name == "steps"


def test_a_run_that_learned_nothing_does_not_agree(unchanged):
    a, b = (copy.deepcopy(unchanged[side]) for side in SIDES)
    a["train_loss"][3] = b["train_loss"][3] = None  # how result() says NaN
    assert "nothing was learned" in compare_results(a, b).first_difference.difference
    a, b = (copy.deepcopy(unchanged[side]) for side in SIDES)
    for result in (a, b):
        result["fingerprints"]["weights"] = result["fingerprints"]["start"]
    assert "nothing was trained" in compare_results(a, b).first_difference.difference


def test_a_last_step_that_diverges_does_not_agree(unchanged):
    """Every training loss is a number, but the weights after the last step give none."""
    a, b = (copy.deepcopy(unchanged[side]) for side in SIDES)
    a["test_loss"] = b["test_loss"] = None
    assert compare_results(a, b).first_difference.name == "metrics"
    count("negative controls")


def test_a_missing_name_is_found_on_either_side(unchanged):
    for part in ("data", "start", "weights", "optimizer", "random"):
        for side in SIDES:
            results = copy.deepcopy(unchanged)
            name, _ = results[side]["fingerprints"][part].popitem()
            difference = compare_results(*(results[s] for s in SIDES)).first_difference
            assert difference.name == part and name in difference.difference
            count("negative controls")


@pytest.mark.parametrize(
    "path, value",
    [
        (("data",), "another"), (("seed",), 9), (("threads",), 7), (("device",), "cuda"),
        (("lesson",), "another"), (("versions", "torch"), "1.0"),
        (("hyperparameters", "lr"), 9.0), (("hyperparameters", "batch_size"), 9),
        (("hyperparameters", "max_steps"), 9), (("hyperparameters", "optimizer"), "adam"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(unchanged, path, value):
    a, b = (copy.deepcopy(unchanged[side]) for side in SIDES)
    part = b
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(BadInput, match=path[-1]):
        compare_results(a, b)
    count("refusals")


def test_the_small_network_shows_its_mode():
    assert any("BatchNorm" in type(layer).__name__ for layer in Noisy().backbone)
    assert any("Dropout" in type(layer).__name__ for layer in Noisy().backbone)
