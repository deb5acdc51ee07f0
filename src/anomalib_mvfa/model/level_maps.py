"""Anomaly maps of single levels (paper, Figure 4)."""

import torch

from .fusion import fuse
from .torch_model import BranchScores, MvfaModel


@torch.no_grad()
def level_maps(model: MvfaModel, image: torch.Tensor) -> torch.Tensor:
    """Score images by each level alone.

    Args:
        model: Calibrated model in eval mode.
        image: RGB in [0, 1], ``(B, 3, image_size, image_size)``.

    Returns:
        Anomaly maps ``(B, l, H, W)`` of the scored levels, each fused with the weights and value ranges of the whole.
    """
    scoring, tokens = model.scoring, model.tokens(image)
    logits, distances = model.logits(tokens, scoring.map_branch, model.text_features), None
    if scoring.weights.few > 0:
        distances = model.bank.level_distances(scoring.map_branch, model.scored_tokens(tokens, scoring.map_branch))
    ranges = model.ranges[0] if scoring.normalised else None
    maps = []
    for level in range(len(model.scored_levels)):
        of_text = logits[:, [level]] if logits is not None else None
        of_bank = distances[level] if distances is not None else None
        maps.append(fuse(*model.maps(BranchScores(of_text, of_bank, None, None)), scoring.weights, ranges))
    return torch.stack(maps, dim=1)
