"""Features of normal support images, and the distance of a patch to the nearest of them (paper, section 3.4).

Axes: B images, N support views, L tokens (class token first), P patches, E joint width, l level.
"""

from collections.abc import Sequence

import torch
from anomalib.models.components.base import DynamicBufferMixin
from torch.nn.functional import normalize

from .text_alignment import full_precision

CHUNK = 8192
"""Bank rows compared at once, so that memory does not grow with the bank."""


def nearest_distance(query: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """``min(1 - cosine)`` of every query to the rows of the bank.

    Args:
        query: Features ``(..., E)``.
        bank: Unit rows ``(M, E)``, float32.

    Returns:
        Distances ``(...)``, float32, in [0, 2].
    """
    with full_precision(query.device):
        query = normalize(query.float(), dim=-1)
        nearest = [(query @ rows.T).amax(dim=-1) for rows in bank.split(CHUNK)]
        # Rounding can take a cosine beyond 1, and metrics take scores below 0 for logits.
        return (1 - torch.stack(nearest).amax(dim=0)).clamp(min=0)


class MemoryBank(DynamicBufferMixin):
    """Normal tokens of both branches; a branch that is not in use stays empty.

    Buffers ``seg`` and ``det``: unit rows ``(l, N, L, E)``, float32, saved with the model.
    """

    seg: torch.Tensor
    det: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        device = self.seg.device if "seg" in self._buffers else None
        self.register_buffer("seg", torch.empty(0, device=device))
        self.register_buffer("det", torch.empty(0, device=device))

    def store(self, branch: str, tokens: Sequence[torch.Tensor]) -> None:
        """Replace a branch's rows.

        Args:
            branch: "seg" or "det".
            tokens: Per level, tokens ``(N, L, E)``, class token included.
        """
        setattr(self, branch, torch.stack([normalize(level.float(), dim=-1) for level in tokens]))

    def distance(
        self,
        branch: str,
        tokens: Sequence[torch.Tensor],
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean over levels of every patch's distance to the bank, ``(B, P)``; see :meth:`level_distances`."""
        return torch.stack(self.level_distances(branch, tokens, keep)).mean(dim=0)

    def level_distances(
        self,
        branch: str,
        tokens: Sequence[torch.Tensor],
        keep: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Every patch's distance to the bank, level by level.

        Args:
            branch: "seg" or "det".
            tokens: Per level, tokens ``(B, L, E)``; the class token is dropped.
            keep: Which support views ``(N,)`` to compare with, all by default.

        Returns:
            Per level, distances ``(B, P)``, float32.

        Raises:
            RuntimeError: The branch's bank is empty.
        """
        bank = self._rows(branch)
        if keep is not None:
            bank = bank[:, keep]
        return [nearest_distance(query[:, 1:], rows.flatten(0, 1)) for query, rows in zip(tokens, bank, strict=True)]

    def _rows(self, branch: str) -> torch.Tensor:
        """A branch's rows, which there must be."""
        bank = getattr(self, branch)
        if bank.numel() == 0:
            msg = (
                f"The memory bank of the {branch} branch is empty. Fit the model, load a checkpoint of its last epoch, "
                "test with a datamodule that offers support images, or set few_shot_weight to 0."
            )
            raise RuntimeError(msg)
        return bank
