"""The network of the lesson tokens: a GPT of characters, its attention written out."""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Each place of a text looks at all places before it, and at itself, with several heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the places of x, float [batch, places, width]."""
        batch, places, width = x.shape
        shape = (batch, places, self.heads, width // self.heads)
        q, k, v = (
            part.view(shape).transpose(1, 2)  # [batch, heads, places, width of a head]
            for part in self.queries_keys_values(x).split(width, dim=2)
        )
        # How much each place asks for each other one. The root keeps it near 1 for wide heads.
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        # No place sees what comes after it: that is what it has to foretell.
        later = torch.ones(places, places, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(3)
        mixed = self.dropout(weights) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, places, width))


class Block(nn.Module):
    """Attention, then a small network for each place alone; both add to what was there."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A character GPT with three blocks: 635,100 parameters for 92 letters.

    Source: https://github.com/karpathy/nanoGPT, whose smallest settings it has, but for its sizes.
    """

    def __init__(
        self,
        letters: int = 92,
        width: int = 128,
        heads: int = 4,
        blocks: int = 3,
        context: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.context = context
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn tokens, int64 [batch, places], into logits of those that follow.

        The logits are float [batch, places, letters].
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.letters(tokens) + self.places(places)
        return self.head(self.norm(self.blocks(x)))
