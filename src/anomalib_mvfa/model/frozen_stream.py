"""Torch models that leave the stream of the frozen backbone as it is: what they train reads it, and the bank holds it.

Axes: B images, N support views, L tokens (class token first), D width of the image tower.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .memory_bank import MemoryBank
from .torch_model import MvfaModel, Tokens


class StreamModel(MvfaModel):
    """A model whose bank holds the stream of the frozen backbone, without what adapters make of it."""

    def tokens(self, image: torch.Tensor, learn_seg: bool = True) -> Tokens:
        """Return the stream of the frozen backbone, per level ``(B, L, D)``, as features of both branches."""
        del learn_seg
        frozen = [self.backbone.without_registers(level) for level in self.frozen_tokens(image)]
        return Tokens(frozen, frozen)

    def adapter(self, branch: str, position: int) -> nn.Module:
        """Return a branch's adapter of the level at a position."""
        return (self.seg_adapters if branch == "seg" else self.det_adapters)[position]


class PatchBank(MemoryBank):
    """A bank without class tokens."""

    def store(self, branch: str, tokens: Iterable[torch.Tensor]) -> None:
        """Replace a branch's rows by those of patches, of tokens ``(N, L, D)`` per level."""
        super().store(branch, (level[:, 1:] for level in tokens))
