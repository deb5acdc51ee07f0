"""Torch models that leave the stream of the frozen backbone as it is: what they train reads it, and the bank holds it.

Axes: B images, N support views, L tokens (class token first), D width of the image tower, E joint width, l level.
"""

from collections.abc import Iterable

import torch

from .memory_bank import MemoryBank
from .text_alignment import patch_logits
from .torch_model import MvfaModel, Tokens


class StreamModel(MvfaModel):
    """A model whose bank holds the stream of the frozen backbone, without what adapters make of it."""

    def tokens(self, image: torch.Tensor, learn_seg: bool = True) -> Tokens:
        """Return the stream of the frozen backbone, per level ``(B, L, D)``, as features of both branches."""
        del learn_seg
        frozen = [self.backbone.without_registers(level) for level in self.frozen_tokens(image)]
        return Tokens(frozen, frozen)


class StreamReader(StreamModel):
    """A model whose adapters take the stream to the text features, and do nothing else."""

    def _joint_tokens(self, tokens: Tokens, branch: str, position: int) -> torch.Tensor:
        x = tokens.of(branch)[position]  # (B, L, D)
        adapter = (self.seg_adapters if branch == "seg" else self.det_adapters)[position]
        with torch.autocast(x.device.type, enabled=False):  # as MVFA's adapters
            return adapter(x)  # (B, L, E)

    def _patch_logits(self, tokens: Tokens, branch: str, position: int, text_features: torch.Tensor) -> torch.Tensor:
        return patch_logits(self._joint_tokens(tokens, branch, position), text_features)


class PatchBank(MemoryBank):
    """A bank without class tokens."""

    def store(self, branch: str, tokens: Iterable[torch.Tensor]) -> None:
        """Replace a branch's rows by those of patches, of tokens ``(N, L, D)`` per level."""
        super().store(branch, (level[:, 1:] for level in tokens))
