"""Somebody's training loop: what is this piece of text - a date, a price, a time, or a telephone?

It has nothing to do with the lessons of this repository: a text model, a loop of its own, and none
of our code. docs/migration.md moves it to Lightning and checks that nothing changed.
"""

import math
import random

import torch
from torch import nn

KINDS = ("date", "price", "time", "telephone")
LENGTH = 16  # characters; shorter texts end with zeros
LR = 0.01


def make_texts(count, seed):
    """Draw texts and their kinds: codes [count, 16] of characters, and numbers of KINDS [count]."""
    draw = random.Random(seed)
    texts, kinds = [], []
    for _ in range(count):
        d = [draw.randrange(10) for _ in range(9)]
        kind = draw.randrange(4)
        text = (
            f"{1 + d[0]}.{1 + d[1]}.20{d[2]}{d[3]}",
            f"{d[0]}{d[1]}.{d[2]}{d[3]} {draw.choice(['EUR', 'USD', 'kr.'])}",
            f"{d[0]}:{d[1]}{d[2]}{draw.choice(['', ' am', ' pm', '.' + str(d[3])])}",
            f"{draw.choice(['+', '0'])}{d[0]}{d[1]} {d[2]}{d[3]}{d[4]}.{d[5]}{d[6]}{d[7]}",
        )[kind]
        texts.append([ord(c) for c in text] + [0] * (LENGTH - len(text)))
        kinds.append(kind)
    return torch.tensor(texts), torch.tensor(kinds)


class TextNet(nn.Module):
    """Characters to vectors, their mean, and a network with one hidden layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 16, padding_idx=0)
        self.hidden = nn.Linear(16, 32)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(32, len(KINDS))

    def forward(self, codes):
        x = self.embedding(codes).mean(1)
        return self.out(self.dropout(self.hidden(x).relu()))


def train(net, texts, kinds, epochs=3, batch_size=50):
    steps = epochs * math.ceil(len(texts) / batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(epoch))
        net.train()
        for batch in order.split(batch_size):
            loss = nn.functional.cross_entropy(net(texts[batch]), kinds[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            schedule.step()


def accuracy(net, texts, kinds):
    net.eval()
    with torch.no_grad():
        return (net(texts).argmax(1) == kinds).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    net = TextNet()
    train(net, *make_texts(1000, seed=0))
    print(f"accuracy on new texts: {accuracy(net, *make_texts(1000, seed=1)):.1%}")
