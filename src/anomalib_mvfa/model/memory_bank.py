"""Features of normal support images, and the distance of a patch to the nearest of them (paper, section 3.4).

Axes: B images, N support views, L tokens (class token first), P patches, E joint width, l level.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from .adapters import BRANCHES
from .linear import linear
from .text_alignment import full_precision

QUERIES, ROWS = 1024, 4096
"""Features compared at once: memory does not grow with batch and bank, and similarities fit a CPU's cache."""


def nearest_distance(query: torch.Tensor, bank: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """``min(1 - cosine)`` of every query to the rows of the bank.

    Args:
        query: Features ``(..., E)``.
        bank: Unit rows ``(M, E)``, float32.
        keep: Which rows ``(M,)`` to compare with, all by default.

    Returns:
        Distances ``(...)``, float32, in [0, 2].
    """
    with full_precision(query.device):
        query = normalize(query.float(), dim=-1)
        # An exported graph has no loop over a batch of any size.
        parts = [query] if torch.compiler.is_compiling() else query.flatten(0, -2).split(QUERIES)
        nearest = [torch.full_like(part[..., 0], -torch.inf) for part in parts]
        for start in range(0, len(bank), ROWS):
            rows = bank[start : start + ROWS]
            if keep is not None:
                rows = rows[keep[start : start + ROWS]]
            if len(rows):
                nearest = [
                    torch.maximum(best, linear(part, rows).amax(dim=-1))
                    for best, part in zip(nearest, parts, strict=True)
                ]
        # Rounding can take a cosine beyond 1, and metrics take scores below 0 for logits.
        return (1 - torch.cat(nearest).view(query.shape[:-1])).clamp(min=0)


def spread_out(rows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Return the numbers, in order, of a coreset: a share of rows ``(M, E)`` that leaves no other row far from them.

    The seed draws the first row, and the projection in which distances are measured.
    """
    from anomalib.models.components import KCenterGreedy  # here, since it loads Lightning

    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(seed)
        sampler = KCenterGreedy(rows, share)
        # A generator: by a mere seed, every direction of the projection would be made of the same features.
        sampler.model.random_state = np.random.RandomState(seed)  # type: ignore[assignment]  # sklearn's
        return torch.tensor(sampler.select_coreset_idxs(), device=rows.device).sort().values


class MemoryBank(nn.Module):
    """Normal tokens of both branches; a branch that is not in use stays empty.

    Buffers ``seg`` and ``det``: unit rows ``(l, M, E)``, float32, saved with the model; M is ``N * L`` or a share.

    Args:
        coreset: Share of the tokens of a level that are kept, by :func:`spread_out`; all by default.
        seed: Seed of that choice.
    """

    seg: torch.Tensor
    det: torch.Tensor

    def __init__(self, coreset: float | None = None, seed: int = 0) -> None:
        super().__init__()
        self.coreset = coreset
        self.seed = seed
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        for branch in BRANCHES:
            self._allocate(branch, torch.Size([0]))
        self._views: dict[str, list[torch.Tensor]] = {}  # per branch and level, of which view a row is

    def _allocate(self, branch: str, shape: torch.Size) -> None:
        device = getattr(self, branch).device if branch in self._buffers else None
        self.register_buffer(branch, torch.empty(shape, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Take a bank of whatever size a checkpoint has."""
        for branch in BRANCHES:
            if prefix + branch in state_dict:
                self._allocate(branch, state_dict[prefix + branch].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def filled(self) -> set[str]:
        """Branches that have rows."""
        return {branch for branch in BRANCHES if getattr(self, branch).numel()}

    def store(self, branch: str, tokens: Iterable[torch.Tensor]) -> None:
        """Replace a branch's rows.

        Args:
            branch: "seg" or "det".
            tokens: Per level, tokens ``(N, L, E)``, class token included.
        """
        stored, self._views[branch] = [], []
        for level in tokens:
            rows = normalize(level.float(), dim=-1).flatten(0, 1)  # (M, E)
            views = torch.arange(len(rows), device=rows.device) // level.shape[1]
            if self.coreset is not None:
                chosen = spread_out(rows, self.coreset, self.seed)
                rows, views = rows[chosen], views[chosen]
            stored.append(rows)
            self._views[branch].append(views)
        setattr(self, branch, torch.stack(stored))

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
        """Return every patch's distance to the bank, ``(B, P)`` per level, float32.

        Args:
            branch: "seg" or "det".
            tokens: Per level, tokens ``(B, L, E)``; the class token is dropped.
            keep: Which support views ``(N,)``, of those last stored, to compare with; all by default.

        Raises:
            RuntimeError: The branch's bank is empty.
        """
        bank = self._rows(branch)
        kept = [None] * len(bank) if keep is None else [keep[views] for views in self._views[branch]]
        return [
            nearest_distance(query[:, 1:], rows, of_rows)
            for query, rows, of_rows in zip(tokens, bank, kept, strict=True)
        ]

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
