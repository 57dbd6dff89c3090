"""A character-level transformer in plain PyTorch, and text cut into windows for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Block", "Transformer", "encode", "windows"]


class Block(nn.Module):
    """Causal self-attention and a feed-forward net, each after a layer norm and around a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(N, T, width)`` to the same shape; ``mask (T, T)`` is -inf where a position must not look."""
        normed = self.before_attention(x)
        attended, _ = self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)
        x = x + attended
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Next-character logits ``(N, T, C)`` of characters ``(N, T)``; nothing in it knows of posteriors.

    Args:
        classes: size of the alphabet, C.
        context: longest window.
        width: of the embeddings.
        heads: attention heads of a block.
        layers: blocks.
    """

    def __init__(self, classes: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T)`` indices to ``(N, T, C)`` logits."""
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        hidden = self.characters(x) + self.positions(torch.arange(length, device=x.device))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(self.norm(hidden))


def windows(codes: Tensor, context: int, most: int = 0) -> tuple[Tensor, Tensor]:
    """Text cut into windows that do not overlap, and the same one character later.

    Args:
        codes: ``(L,)`` character indices.
        context: characters of a window, T.
        most: how many windows at most, evenly spread over the text; 0 for all.

    Returns:
        Inputs and targets ``(N, T)``.

    Raises:
        ValueError: if the text is shorter than a window.
    """
    count = (len(codes) - 1) // context
    if count < 1:
        raise ValueError(f"a text of {len(codes)} characters has no window of {context} and one more")
    inputs, targets = (codes[i : i + count * context].reshape(count, context) for i in (0, 1))
    if most and most < count:
        chosen = torch.linspace(0, count - 1, most).round().long()
        return inputs[chosen], targets[chosen]
    return inputs, targets


def encode(text: str, alphabet: str) -> Tensor:
    """The place ``(L,)`` in ``alphabet`` of every character of ``text``.

    Raises:
        KeyError: for a character that the alphabet lacks.
    """
    index = {character: number for number, character in enumerate(alphabet)}
    return torch.tensor([index[character] for character in text])
