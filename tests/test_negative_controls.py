"""A comparison that cannot fail proves nothing: one change on one side, and it must name the stage.

Each change replaces lines of one script; what it does is what people forget or get wrong.
"""

from common.messages import BadInput
from common.proof.compare import compare_results

import copy

import pytest
from helpers import SIDES, Noisy, count, small_data, train

MAIN = "    net = Net().to(device)\n"
# The largest weight: a small one's last bit can be lost when a step makes it larger.
ONE_ULP = (
    "w = {0}.head.weight.data.flatten()\n{1}i = w.abs().argmax()\n"
    "{1}w[i] = torch.nextafter(w[i], torch.tensor(9.0))\n"
)
RETURN = "    return net\n"
CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "other seed": (
        "plain", "start", ("seed_everything(args.seed)", "seed_everything(args.seed + 1)"),
    ),
    "a layer built before the model": (
        "lightning", "start",
        ("    model = LitClassifier(", "    torch.nn.Linear(2, 2)\n    model = LitClassifier("),
    ),
    "other shuffle": (
        "plain", "data",
        ("sampler.set_epoch(epoch)", "sampler.set_epoch(max(1, epoch))"),
    ),
    "no set_epoch": ("plain", "data", ("        train_loader.sampler.set_epoch(epoch)\n", "")),
    "one batch less": (
        "plain", "data",
        ("make_loaders(data, args)\n",
         "make_loaders(data, args)\n    train_loader.sampler.first -= args.batch_size\n"),
    ),
    "validation on the images to train on": (
        "lightning", "data",
        ("return make_loader(self.data.val, self.args)",
         "from dataclasses import replace\n"
         "        images = replace(self.data.train, split='val')\n"
         "        return make_loader(images, self.args)"),
    ),
    "no zero_grad": ("plain", "steps", ("        optimizer.zero_grad()\n", "")),
    "another learning rate": ("plain", "steps", ("lr=args.lr, m", "lr=1.001 * args.lr, m")),
    "no momentum": ("plain", "steps", ("momentum=args.momentum", "momentum=0")),
    "weight decay on one side": (
        "lightning", "steps",
        ("lr=lr, momentum=momentum", "lr=lr, momentum=momentum, weight_decay=1e-4"),
    ),
    "sum instead of mean": (
        "plain", "steps",
        ("loss = F.cross_entropy(model(images), labels)",
         "loss = F.cross_entropy(model(images), labels, reduction='sum')"),
    ),
    "no model.train after validation": ("plain", "steps", ("    model.train()\n", "")),
    "no model.eval before validation": ("plain", "steps", ("    model.eval()\n", "")),
    "one step more": (
        "plain", "weights",
        ("        optimizer.step()\n",
         "        optimizer.step()\n"
         "        if step + 1 == 2 * len(loader):\n            optimizer.step()\n"),
    ),
    "a weight missing": (
        "lightning", "weights",
        ("    return model.model",
         "    model.model.backbone[1].num_batches_tracked = None\n    return model.model"),
    ),
    "optimizer changed after training": (
        "lightning", "optimizer",
        ("    trainer.test(", "    trainer.optimizers[0].param_groups[0]['lr'] /= 10\n"
         "    trainer.test("),
    ),
    "a random number drawn at the end": (
        "plain", "random", (RETURN, "    torch.rand(1)\n" + RETURN),
    ),
    "batch mean instead of sample-weighted": (
        "plain", "metrics",
        (".item() * len(labels)", ".item()"),
        ("return total_loss, confusion",
         "return total_loss / len(loader) * confusion.sum().item(), confusion"),
    ),
    "a metric averaged over batches": (
        "lightning", "metrics",
        ("self.log_dict(metrics)",
         "self.log_dict(metrics(logits, labels), batch_size=len(labels))"),
    ),
    "macro instead of micro": ("lightning", "metrics", ('"micro"', '"macro"')),
    "rows and columns exchanged": (
        "plain", "metrics",
        ("f1 = (2 * right / (true + predicted))", "f1 = (2 * right / (true + true))"),
    ),
    "one weight, one unit in the last place": (
        "plain", "start", (MAIN, MAIN + "    " + ONE_ULP.format("net", "    ")),
    ),
    "one weight, one unit in the last place, after a step": (
        "lightning", "steps",
        ("    def validation_step(",
         "    def on_train_batch_end(self, outputs, batch, batch_idx):\n"
         "        if batch_idx == 3 and self.current_epoch == 0:\n"
         "            " + ONE_ULP.format("self.model", "            ") + "\n"
         "    def validation_step("),
    ),
    "one weight, one unit in the last place, at the end": (
        "lightning", "weights",
        ("    trainer.test(", "    " + ONE_ULP.format("model.model", "    ") + "    trainer.test("),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("unchanged")
        results = {side: train(side, folder, monkeypatch) for side in SIDES}
    assert compare_results(results["plain"], results["lightning"]).agree
    return results


def test_there_are_enough():
    assert len(CHANGES) >= 24
    assert {change[0] for change in CHANGES.values()} == set(SIDES)
    assert {change[1] for change in CHANGES.values()} == {
        "data", "start", "steps", "weights", "optimizer", "random", "metrics",
    }  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train(side, tmp_path, monkeypatch, *changes)
    (other,) = set(SIDES) - {side}
    comparison = compare_results(changed, unchanged[other])
    assert comparison.first_difference.name == stage, comparison.first_difference
    # What follows the first difference is not compared.
    after = [s.name for s in comparison.stages].index(stage) + 1
    assert all(s.compared == 0 and not s.difference for s in comparison.stages[after:])
    count("negative controls")


def test_other_pixels_are_found(unchanged, tmp_path, monkeypatch):
    images = small_data()
    images.train.images[7, 0, 0, 0] ^= 1
    changed = train("lightning", tmp_path, monkeypatch, images=images)
    images.train.images[7, 0, 0, 0] ^= 1  # the tensor is shared by all tests
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
    a["train_loss"][3] = b["train_loss"][3] = None  # how result.json says NaN
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
        (("hyperparameters", "max_epochs"), 9), (("hyperparameters", "momentum"), 0.5),
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
