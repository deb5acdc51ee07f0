"""What is trained: residual adapters at some levels of the frozen image tower (paper, section 3.2).

Axes: B images, L tokens (class token first), P patches, D width of the tower, E joint width, l level.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .anomaly_map import to_grid
from .linear import Linear

BRANCHES = ("seg", "det")
"""Pixel-level and image-level branch."""


class Projector(nn.Module):
    """A linear layer that reads the stream and leaves it alone (paper, Table 4).

    The parameter names (``fc1.0.weight``, ``fc2.0.weight``) are those of the published adapters.

    Args:
        width: D.
        joint_width: E.
    """

    def __init__(self, width: int, joint_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(Linear(width, joint_width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature ``(B, L, E)``."""
        return self.fc1(x)


class Adapter(Projector):
    """Bottleneck of two linear layers; the first one's output is the feature, the second's goes into the stream."""

    def __init__(self, width: int, joint_width: int) -> None:
        super().__init__(width, joint_width)
        self.fc1.append(nn.LeakyReLU())
        self.fc2 = nn.Sequential(Linear(joint_width, width, bias=False), nn.LeakyReLU())

    def to_stream(self, feature: torch.Tensor) -> torch.Tensor:
        """Return the contribution of a feature ``(B, L, E)`` to the stream ``(B, L, D)``."""
        return self.fc2(feature)


class PatchAdapter(nn.Sequential):
    """Two layers that read patches of the stream, and leave it alone.

    Each patch is normalised, and the mean of it and its eight neighbours joined; half of it all is dropped in training.

    Args:
        width: D.
        joint_width: E.
    """

    HIDDEN = 128

    def __init__(self, width: int, joint_width: int) -> None:
        super().__init__(
            nn.LayerNorm(width, elementwise_affine=False),
            _WithNeighbours(),
            nn.Dropout(0.5),
            Linear(2 * width, self.HIDDEN),
            nn.GELU(),
            Linear(self.HIDDEN, joint_width, bias=False),
        )


class _WithNeighbours(nn.AvgPool2d):
    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Join patches ``(B, P, D)`` by the means of 3 x 3 of them: ``(B, P, 2D)``."""
        around = super().forward(to_grid(patches))
        return torch.cat([patches, around.flatten(2).transpose(1, 2)], dim=-1)


class BranchAdapters(nn.ModuleList):
    """One adapter (or projector) per level, of one branch.

    Args:
        levels: Number of levels.
        width: D.
        joint_width: E.
        adaptation: "adapter", "projector", "patch", or "linear": a linear layer with bias.
    """

    def __init__(self, levels: int, width: int, joint_width: int, adaptation: str = "adapter") -> None:
        kind = {"adapter": Adapter, "projector": Projector, "patch": PatchAdapter, "linear": Linear}[adaptation]
        super().__init__([kind(width, joint_width) for _ in range(levels)])

    @property
    def adapt_the_stream(self) -> bool:
        """Whether later blocks see what these adapters add."""
        return any(isinstance(adapter, Adapter) for adapter in self)

    def train_only(self, trained: Sequence[int]) -> None:
        """Let gradients reach only the adapters at these positions, and only weights that their losses depend on.

        A second layer acts on later levels alone, so one after the last trained level never gets a gradient (the
        published fourth one neither); frozen, it does not stall distributed training.
        """
        for position, adapter in enumerate(self):
            adapter.requires_grad_(position in trained)
            if isinstance(adapter, Adapter) and position >= max(trained):
                adapter.fc2.requires_grad_(False)


def add_to_stream(
    x: torch.Tensor, seg: torch.Tensor, det: torch.Tensor, ratio: float, residual: str = "pair"
) -> torch.Tensor:
    """Blend the contributions of both adapters into the stream ``(B, L, D)``, class token included.

    Args:
        x: Stream.
        seg: Contribution of the seg adapter.
        det: Contribution of the det adapter.
        ratio: g, the weight of adapters.
        residual: "pair", ``(1 - 2g) x + g seg + g det`` (published), or "single", ``(1 - g) x + g/2 (seg + det)``
            (paper, Eq. 2 in total weight).
    """
    share = ratio if residual == "pair" else ratio / 2
    return (1 - 2 * share) * x + share * seg + share * det
