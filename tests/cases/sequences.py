"""Tokens: language models, padding, masks, states that are carried on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from . import Case, F, Lit, choices, descend, fit


class Lm(nn.Module):
    """An LSTM that takes its state and gives it back."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 16, batch_first=True)
        self.out = nn.Linear(16, 20)

    def forward(self, tokens, state=None):
        hidden, state = self.lstm(self.embedding(tokens), state)
        return self.out(hidden), state


TEXT = choices(0, 0, 20, 4, 61)
CHUNKS = [(TEXT[:, i : i + 10], TEXT[:, i + 1 : i + 11]) for i in range(0, 60, 10)]


def next_token(logits, labels, **more):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **more)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), 1e-2)


class CarriedState(Case):
    source = "Lightning-AI/pytorch-lightning#655, #5372"
    mistake = "the state of the LSTM is not carried on to the next chunk"
    stage, cause = "batch", "The argument state is missing in B: a state that A carries on"
    build = staticmethod(Lm)

    def loop(self, net):
        optimizer, state = sgd(net), None
        for tokens, labels in CHUNKS:
            logits, state = net(tokens, state)
            state = tuple(part.detach() for part in state)
            descend(optimizer, next_token(logits, labels))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            state = None

            def training_step(self, batch):
                logits, state = self.net(batch[0], self.state)
                if self.fixed:
                    self.state = tuple(part.detach() for part in state)
                return next_token(logits, batch[1])

        fit(Port(net, fixed, sgd), CHUNKS, callbacks)


class ClippingByHand(Case):
    source = "Lightning-AI/pytorch-lightning#14598"
    mistake = "in manual optimization nobody clips the gradients, here of a GRU"
    stage, cause = "clipping", "The gradients' norm is clipped in A"

    def build(self):
        return nn.ModuleDict({"e": nn.Embedding(20, 8), "r": nn.GRU(8, 12, batch_first=True),
                              "o": nn.Linear(12, 20)})  # fmt: skip

    @staticmethod
    def loss(net, tokens, labels):
        hidden, _ = net["r"](net["e"](tokens))
        return next_token(net["o"](hidden), labels)

    def loop(self, net):
        optimizer = adamw(net)
        for batch in CHUNKS:
            optimizer.zero_grad()
            self.loss(net, *batch).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            automatic_optimization = False

            def training_step(self, batch):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(case.loss(self.net, *batch))
                if self.fixed:
                    self.clip_gradients(optimizer, gradient_clip_val=0.01)
                optimizer.step()

        fit(Port(net, fixed, adamw), CHUNKS, callbacks)


def padded(seed, fill):
    """Labels [4, 12] that end with padding."""
    labels = choices(seed, 1, 20, 4, 12)
    for row, length in enumerate(choices(seed + 50, 3, 13, 4).tolist()):
        labels[row, length:] = fill
    return labels


PADDED = [(choices(100 + i, 1, 20, 4, 12), padded(i, -100)) for i in range(8)]


class TokenMean(Case):
    source = "huggingface/transformers#34191, karpathy/nanochat#59"
    mistake = "gradients are accumulated: a mean of each batch instead of one of all tokens"
    stage, cause = "loss", "A mean over another count"

    def build(self):
        return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))

    def loop(self, net):
        optimizer = adamw(net)
        for i in range(0, 8, 2):
            count = sum((labels != -100).sum() for _, labels in PADDED[i : i + 2])
            optimizer.zero_grad()
            for tokens, labels in PADDED[i : i + 2]:
                (next_token(net(tokens), labels, reduction="sum") / count).backward()
            optimizer.step()

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch, batch_idx):
                logits = self.net(batch[0])
                if not self.fixed:
                    return next_token(logits, batch[1])
                pair = PADDED[batch_idx // 2 * 2 :][:2]
                count = sum((labels != -100).sum() for _, labels in pair)
                return next_token(logits, batch[1], reduction="sum") / count * 2

        fit(Port(net, fixed, adamw), PADDED, callbacks, accumulate_grad_batches=2)


@dataclass
class Decoded:
    """An output that is no tuple and no dict."""

    logits: torch.Tensor
    hidden: torch.Tensor


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 20)

    def forward(self, tokens):
        hidden = self.norm(self.embedding(tokens))
        return Decoded(self.out(hidden).transpose(1, 2), hidden)  # [batch, classes, length]


class PaddingCounts(Case):
    source = "lukas-blecher/LaTeX-OCR#305"
    mistake = "padding counts in the loss: ignore_index is not passed"
    stage, cause = "loss", "Padding, or a mask, does not count in A's loss"
    build = staticmethod(Decoder)
    batches: ClassVar = [(choices(200 + i, 1, 20, 4, 12), padded(i, 0)) for i in range(6)]

    def loop(self, net):
        optimizer = adamw(net)
        for tokens, labels in self.batches:
            descend(optimizer, F.cross_entropy(net(tokens).logits, labels, ignore_index=0))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                ignored = {"ignore_index": 0} if self.fixed else {}
                return F.cross_entropy(self.net(batch[0]).logits, batch[1], **ignored)

        fit(Port(net, fixed, adamw), self.batches, callbacks)


class Causal(nn.Module):
    """A language model that computes its loss itself, from labels that it shifts."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, input_ids, labels=None):
        logits = self.out(self.embedding(input_ids).cumsum(1))
        given = {"logits": logits}
        if labels is not None:
            given = {"loss": next_token(logits[:, :-1], labels[:, 1:])} | given
        return given


class ShiftedTwice(Case):
    source = "huggingface/transformers#47394"
    mistake = "labels are shifted by hand, and again by the network that computes the loss"
    stage, cause = "batch", "The sequences are shifted by one in B"
    build = staticmethod(Causal)
    tokens: ClassVar = [choices(300 + i, 0, 20, 4, 10) for i in range(6)]

    def loop(self, net):
        optimizer = adamw(net)
        for tokens in self.tokens:
            descend(optimizer, net(input_ids=tokens, labels=tokens)["loss"])

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, tokens):
                labels = tokens if self.fixed else tokens.roll(-1, 1)
                return self.net(input_ids=tokens, labels=labels)["loss"]

        fit(Port(net, fixed, adamw), self.tokens, callbacks)


class LossInside(Case):
    source = "huggingface/blog#2414"
    mistake = "none: arguments in another order, labels that one side does not pass"
    build = staticmethod(Causal)
    tokens: ClassVar = [choices(300 + i, 0, 20, 4, 10) for i in range(5)]

    def loop(self, net):
        optimizer = adamw(net)
        for tokens in self.tokens:
            descend(optimizer, net(input_ids=tokens, labels=tokens)["loss"])

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, tokens):
                if self.fixed:
                    logits = self.net(tokens)["logits"]
                else:
                    logits = self.net(labels=tokens, input_ids=tokens)["logits"]
                return next_token(logits[:, :-1], tokens[:, 1:])

        fit(Port(net, fixed, adamw), self.tokens, callbacks)


class Masked(nn.Module):
    def __init__(self, eps=1e-5):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.norm, self.out = nn.LayerNorm(16, eps), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None):
        padding = None if attention_mask is None else attention_mask == 0
        hidden = self.layer(self.embedding(input_ids), src_key_padding_mask=padding)
        return {"logits": self.out(self.norm(hidden[:, 0]))}


def masked_batch(i):
    tokens: ClassVar = padded(i, 0)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(),
            "labels": choices(400 + i, 0, 3, 4)}  # fmt: skip


class AttentionMask(Case):
    source = "showlab/ShowUI#78"
    mistake = "the mask of the padding is not passed"
    stage, cause = "batch", "The argument attention_mask is missing in B"
    build = staticmethod(Masked)
    batches: ClassVar = [masked_batch(i) for i in range(6)]

    def loop(self, net):
        optimizer = adamw(net)
        for batch in self.batches:
            logits = net(batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
            descend(optimizer, F.cross_entropy(logits, batch["labels"]))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                if not self.fixed:
                    inputs.pop("attention_mask")
                return {"loss": F.cross_entropy(self.net(**inputs)["logits"], batch["labels"])}

        fit(Port(net, fixed, adamw), self.batches, callbacks)


class LayerNormEpsilon(Case):
    source = "emonosuke/emoASR#13"
    mistake = "the port's last LayerNorm has another epsilon"
    stage, cause = "output", "A layer with another setting"
    batches: ClassVar = AttentionMask.batches

    def build(self):
        return Masked()

    def loop(self, net):
        AttentionMask.loop(self, net)

    def port(self, net, callbacks, fixed):
        net.norm.eps = 1e-5 if fixed else 1e-12
        AttentionMask.port(self, net, callbacks, True)


class DecayOfNorms(Case):
    source = "mmcdermott/MEDS_EIC_AR#30"
    mistake = "weight decay acts on biases and LayerNorm, too"
    stage, cause = "update", "Other groups of parameters"
    build = staticmethod(Masked)
    batches: ClassVar = AttentionMask.batches

    @staticmethod
    def optimizer(net):
        parts = [[p for p in net.parameters() if (p.dim() > 1) == decays] for decays in (1, 0)]
        groups = [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1]}]
        return torch.optim.AdamW(groups, 1e-2, weight_decay=0.0)

    def loop(self, net):
        optimizer = self.optimizer(net)
        for batch in self.batches:
            logits = net(batch["input_ids"], batch["attention_mask"])["logits"]
            descend(optimizer, F.cross_entropy(logits, batch["labels"]))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                logits = self.net(batch["input_ids"], batch["attention_mask"])["logits"]
                return F.cross_entropy(logits, batch["labels"])

        alike = lambda n: torch.optim.AdamW(n.parameters(), 1e-2, weight_decay=0.1)  # noqa: E731
        fit(Port(net, fixed, self.optimizer if fixed else alike), self.batches, callbacks)


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        else:
            self.head.weight.data = self.embedding.weight.data.clone()

    def forward(self, tokens):
        return self.head(self.middle(self.embedding(tokens)).relu())


class Untied(Case):
    source = "huggingface/accelerate#138, Modalities/modalities#400"
    mistake = "embedding and head are no longer one tensor"
    stage, cause = "start", "Weights are tied in A, and not in B"
    build = staticmethod(Tied)

    def loop(self, net):
        optimizer = sgd(net)
        for tokens, labels in CHUNKS:
            descend(optimizer, next_token(net(tokens), labels))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                return next_token(self.net(batch[0]), batch[1])

        if not fixed:
            torch.manual_seed(0)
            net = Tied(tie=False)
        fit(Port(net, fixed, sgd), CHUNKS, callbacks)


class SparseEmbedding(Case):
    source = "hustvl/LightningDiT#1"
    mistake = "another learning rate; the network has sparse gradients"
    stage, cause = "update", "Another learning rate"
    batches: ClassVar = [
        (choices(500 + i, 0, 50, 16, 5), choices(550 + i, 0, 3, 16)) for i in range(5)
    ]

    def build(self):
        return nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 3))

    def loop(self, net):
        optimizer = sgd(net)
        for tokens, labels in self.batches:
            descend(optimizer, F.cross_entropy(net(tokens), labels))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        large = lambda n: torch.optim.SGD(n.parameters(), 1.6)  # noqa: E731
        fit(Port(net, fixed, sgd if fixed else large), self.batches, callbacks)
