"""What all frozen networks have in common, whose stream of tokens is adapted and compared.

Axes: B images, L tokens (class token first, then register tokens if any), D width, E joint width, G*G patches.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn


class FrozenNetwork(nn.Module, ABC):
    """A network that is never trained and always in eval mode.

    Attributes:
        depth: Number of blocks.
        width: D.
        joint_width: E, of features that are compared with text features.
        image_size: Height and width of its input in pixels.
        fingerprint: Hash of samples of the weights, whatever file they came from and whatever the image size.
        mean: Mean of the images that it was trained with, per channel ``(3, 1, 1)``.
        std: Their standard deviation.
        registers: Number of register tokens, behind the class token.
        normalizes: Whether its images are always normalised.
    """

    depth: int
    width: int
    joint_width: int
    image_size: int
    fingerprint: str
    mean: torch.Tensor
    std: torch.Tensor
    registers: int = 0
    normalizes = False

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in eval mode, whatever the mode of the model around it."""
        del mode
        return super().train(False)

    @abstractmethod
    def streams(self, image: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
        """Return the stream ``(B, L, D)`` of images ``(B, 3, H, W)`` after blocks (from 1), whose numbers increase."""

    def without_registers(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens ``(B, L, ...)`` without register tokens."""
        return torch.cat([x[:, :1], x[:, 1 + self.registers :]], dim=1) if self.registers else x


class BlockNetwork(FrozenNetwork):
    """A frozen transformer, between whose blocks adapters change the stream.

    Attributes:
        grid: G.
        has_texts: Whether it encodes prompts; others have fixed state vectors in their place.
    """

    grid: int
    has_texts = False

    @abstractmethod
    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``(B, L, D)`` that enter the first block, of images ``(B, 3, H, W)``."""

    @abstractmethod
    def blocks(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Run blocks (from 1) after ``start`` up to ``end`` on tokens ``(B, L, D)``."""

    @abstractmethod
    def encode_states(self, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return unit columns ``(E, 2)``, normal and abnormal, from the prompts for each."""

    def streams(self, image: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
        """Return the stream ``(B, L, D)`` of images ``(B, 3, H, W)`` after blocks (from 1), whose numbers increase."""
        streams = [self.embed(image)]
        for start, end in zip((0, *ends), ends, strict=False):
            streams.append(self.blocks(streams[-1], start, end))
        return streams[1:]


def grid_of(backbone: str, image_size: int, patch_size: int) -> int:
    """Return G, the number of whole patches along a side; ValueError if there is none."""
    if image_size < patch_size:
        msg = f"image_size={image_size} is smaller than one patch of {backbone}; it must be at least {patch_size}."
        raise ValueError(msg)
    return image_size // patch_size
