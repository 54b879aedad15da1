"""The lesson `tokens`: each option on both sides; the stream, the mean per token, the sample."""

from common import SIDES, text
from common.messages import BadInput
from common.models_text import GPT, Attention
from common.proof.compare import compare_results
from common.proof.lessons import load

import hashlib
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import WITH_CHECKPOINTS, assert_agree, count, small_text, some, train
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

# 45 pieces in batches of 8: six batches, the last one of five pieces.
FEW = dict(lesson="tokens", batch_size=8, max_epochs=2, warmup_steps=3, sample_length=10)
OPTIONS = {
    "defaults": {},
    "a window that is not full": {"accumulate_grad_batches": 4},
    "no accumulation": {"accumulate_grad_batches": 1},
    "three, which is no power of two": {"accumulate_grad_batches": 3, "batch_size": 7},
    "clipped hard": {"gradient_clip_val": 0.05},
    "not clipped": {"gradient_clip_val": 0.0},
    "bfloat16": {"precision": "bf16-mixed"},
    "no warm-up, no decay": {"warmup_steps": 0, "weight_decay": 0.0},
    "a number of batches": {"limit_train_batches": 3, "limit_val_batches": 1},
    "processes that load": {"num_workers": 2},
    "another sample": {"temperature": 1.5, "sample_length": 150},
    "all at once": {
        "accumulate_grad_batches": 4, "gradient_clip_val": 0.5, "precision": "bf16-mixed",
        "seed": 5, "max_epochs": 3, "weight_decay": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", some(OPTIONS))
def test_each_option(name, tmp_path, monkeypatch):
    settings = FEW | OPTIONS[name]
    runs = [train(side, tmp_path, monkeypatch, **settings) for side in SIDES]
    assert_agree(compare_results(*runs), WITH_CHECKPOINTS)
    batches = min(-(-45 // settings["batch_size"]), settings.get("limit_train_batches", 99))
    assert len(runs[0]["train_loss"]) == settings["max_epochs"] * batches
    steps = settings["max_epochs"] * -(-batches // settings.get("accumulate_grad_batches", 2))
    assert f"step {steps}," in runs[0]["checkpoints"]["last.ckpt"]
    assert set(runs[0]["scores"]) == {"val_loss", "test_loss"}
    samples = [(tmp_path / "tokens" / side / "sample.txt").read_text() for side in SIDES]
    assert samples[0] == samples[1] and len(samples[0]) == settings["sample_length"] + 1
    count("options of tokens")


# A change on one side, and what must differ first.
CHANGES = {
    "the same pass each time": (
        "plain", "data", {}, ("        train_loader.dataset.set_epoch(epoch)\n", ""),
    ),
    "a mean of means": (
        "plain", "steps", {},
        ('loss = summed_loss(net, batch) * batch["share"] * group',
         'loss = summed_loss(net, batch) / (batch["target"] >= 0).sum()'),
    ),
    "padding counts": (
        "plain", "steps", {},
        ('targets = batch["target"].flatten()', 'targets = batch["target"].flatten().clamp(min=0)'),
    ),
    "not looked ahead": (
        "plain", "steps", {"accumulate_grad_batches": 4},
        ("if number % group and not last:", "if number % group:"),
    ),
    "decay for biases and norms, too": (
        "plain", "steps", {"weight_decay": 1.0}, ('{"params": others, "weight_decay": 0.0}',
                                                  '{"params": others}'),
    ),
    "a warm-up that is one step longer": (
        "plain", "steps", {}, ("(step + 1) / (args.warmup_steps + 1)",
                               "(step + 1) / (args.warmup_steps + 2)"),
    ),
    "a schedule that knows no end": (
        "lightning", "steps", {},
        ("steps = self.args.max_epochs * self.batches",
         "steps = self.trainer.estimated_stepping_batches"),
    ),
    "the schedule by epoch": (
        "lightning", "steps", {}, ('"interval": "step"', '"interval": "epoch"'),
    ),
    "no set_epoch": (
        "lightning", "data", {},
        ("        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)\n",
         "        pass\n"),
    ),
    "a mean per piece": (
        "lightning", "metrics", {},
        (".double() / tokens", '.double() / len(batch["input"])'),
    ),
    "gradients left over": ("plain", "steps", {}, ("            optimizer.zero_grad()\n", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, tmp_path, monkeypatch):
    side, stage, settings, *changes = CHANGES[name]
    settings = FEW | settings
    changed = train(side, tmp_path / "changed", monkeypatch, *changes, **settings)
    (other,) = set(SIDES) - {side}
    run = train(other, tmp_path, monkeypatch, **settings)
    first = compare_results(changed, run).first_difference
    assert first and first.name == stage, first
    count("negative controls")


# The stream.


def args(**more):
    limits = dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches"), 1.0)
    usual = dict(data="auto", seed=0, batch_size=8, accumulate_grad_batches=2, num_workers=0)
    return SimpleNamespace(**limits | usual | more)


def test_a_stream_has_no_length_and_the_same_pass_for_seed_and_epoch():
    passes = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        loader, *_ = text.make_streams(small_text(), args(seed=seed))
        with pytest.raises(TypeError):
            len(loader)
        loader.dataset.set_epoch(epoch)
        batches = [batch["input"].flatten().tolist() for batch in loader]
        assert passes.setdefault((seed, epoch), batches) == batches and len(batches) == 6
    assert passes[0, 0] != passes[0, 1]


def test_processes_that_load_hand_out_the_same():
    alone, three = (
        [batch["target"] for batch in text.make_streams(small_text(), args(num_workers=n))[0]]
        for n in (0, 3)
    )
    assert len(alone) == len(three) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, three, strict=True))


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_each_token_of_a_window_counts_the_same(window):
    loader, *_ = text.make_streams(small_text(), args(accumulate_grad_batches=window))
    batches = list(loader)
    for first in range(0, len(batches), window):
        own = batches[first : first + window]
        tokens = sum(int((batch["target"] >= 0).sum()) for batch in own)
        assert all(batch["share"].item() == pytest.approx(1 / tokens) for batch in own)
        count("windows")


def test_a_target_is_the_letter_that_follows():
    own = small_text()
    batch = next(iter(text.make_streams(own, args())[0]))
    for inputs, targets in zip(batch["input"], batch["target"], strict=True):
        length = int((targets >= 0).sum())
        assert torch.equal(inputs[1:length], targets[: length - 1])
        assert own.say(inputs[:length]) in own.say(own.train)
        assert (targets[length:] == text.NOTHING).all()


def test_the_mean_per_token_is_that_of_one_large_batch():
    """Weighted by tokens the window's gradient is the large batch's; a mean of means is not."""
    torch.manual_seed(0)
    own, batches = small_text(), None
    net = GPT(len(own.letters), width=16, heads=2, blocks=1, dropout=0.0).double()
    loader, *_ = text.make_streams(own, args(accumulate_grad_batches=6))
    batches = list(loader)

    def gradient(weigh):
        net.zero_grad()
        for batch in batches:
            logits = net(batch["input"]).flatten(0, 1)
            loss = F.cross_entropy(logits, batch["target"].flatten(), reduction="sum")
            (loss * weigh(batch)).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    tokens = sum(int((batch["target"] >= 0).sum()) for batch in batches)
    large = gradient(lambda _: 1 / tokens)
    ours = gradient(lambda batch: batch["share"].double())
    means = gradient(lambda batch: 1 / len(batches) / (batch["target"] >= 0).sum())
    assert (ours - large).norm() / large.norm() < 1e-6
    assert (means - large).norm() / large.norm() > 1e-2


def test_a_share_is_refused_and_so_are_images(capsys):
    for more, words in (
        (dict(limit_train_batches=0.5), "does not know how long"),
        (dict(data="cifar10"), "asks for images"),
    ):
        with pytest.raises(BadInput, match=words):
            text.load_text(args(**more))
        count("settings of tokens refused")
    assert text.load_text(args(data="shapes")).letters


def test_the_text_is_the_one_whose_numbers_the_page_shows():
    content = text.MANUAL.read_bytes()
    assert len(content) == 199_986 and content.isascii()
    assert hashlib.sha256(content).hexdigest()[:16] == "3ddd7f05ff200de0"
    licence = text.MANUAL.with_name("manual.LICENSE.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licence and "pydoc_data.topics" in licence


# The network.


def test_attention_is_pytorchs():
    torch.manual_seed(0)
    ours = Attention(16, 4, dropout=0.0).eval()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.queries_keys_values.weight)
        theirs.in_proj_bias.copy_(ours.queries_keys_values.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        x = torch.randn(2, 9, 16)
        later = torch.ones(9, 9, dtype=torch.bool).triu(1)
        expected, _ = theirs(x, x, x, attn_mask=later, need_weights=False)
        torch.testing.assert_close(ours(x), expected)


def test_no_place_sees_what_comes_after_it():
    net = GPT(10, width=16, heads=2, blocks=2).eval()
    tokens = torch.randint(0, 10, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 10
    with torch.no_grad():
        assert torch.equal(net(tokens)[:, :12], net(changed)[:, :12])
        assert not torch.equal(net(tokens)[:, 12:], net(changed)[:, 12:])


@pytest.mark.parametrize("side", SIDES)
def test_the_schedule_grows_and_falls(side):
    module = load(side, "tokens")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = module.warm_up_and_cosine(optimizer, 100, SimpleNamespace(warmup_steps=9))
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and rates[-1] < 0.001
    assert rates[54] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 91)))


# What docs/tokens.md tells of the Trainer.


class Endless(IterableDataset):
    def __iter__(self):
        yield from torch.ones(6, 1)


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.trainer.is_last_batch)
        return self.net(batch).sum()

    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_trainer_knows_the_last_batch_of_a_stream_but_not_how_many_steps_there_are():
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = Lit()
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=4,
                        enable_model_summary=False, **quiet)  # fmt: skip
    trainer.fit(module, DataLoader(Endless()))
    assert module.seen == [False] * 5 + [True] and trainer.global_step == 2
    assert module.steps == -1
