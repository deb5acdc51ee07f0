"""From patches to pixels: the layout, and both orders of upsampling; axes as in the module."""

import pytest
import torch

import by_hand
from anomalib_mvfa.model.anomaly_map import map_score, state_probabilities, to_grid, upsample

LOGITS = 4 * torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(0))


def test_patches_lie_row_by_row():
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    grid = to_grid(torch.stack([row, column], dim=1).unsqueeze(0))  # (1, 16, 2)
    assert grid.shape == (1, 2, 4, 4)
    assert torch.equal(grid[0, 0], torch.arange(4).view(4, 1).expand(4, 4))
    assert torch.equal(grid[0, 1], torch.arange(4).view(1, 4).expand(4, 4))


@pytest.mark.parametrize("size", [3, 7, 70, 75])
def test_upsampling_aligns_corners(size):
    grid = to_grid(LOGITS)
    found = upsample(grid, size)
    assert torch.equal(found[..., [0, 0, -1, -1], [0, -1, 0, -1]], grid[..., [0, 0, -1, -1], [0, -1, 0, -1]])
    assert torch.allclose(found.double(), by_hand.enlarge(grid, size), atol=1e-5)


def test_a_single_patch_fills_the_image():
    assert torch.equal(upsample(torch.full((1, 2, 1, 1), 0.25), 14), torch.full((1, 2, 14, 14), 0.25))


@pytest.mark.parametrize("upsampled", ["logits", "probabilities"])
def test_probabilities(upsampled):
    found = state_probabilities(LOGITS, 20, upsampled)
    assert found.shape == (2, 2, 20, 20)
    expected = by_hand.seg_map(LOGITS.double(), 20, upsampled)
    assert torch.allclose(found[:, 1].double(), expected, atol=1e-5)
    assert torch.allclose(found[:, 0].double(), 1 - expected, atol=1e-5)


@pytest.mark.parametrize(("image_score", "count"), [("map_max", 1), ("map_top", 20)])
def test_the_score_of_a_map_is_the_mean_of_its_highest_values(image_score, count):
    maps = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    expected = maps.double().flatten(1).sort(dim=1).values[:, -count:].mean(dim=1)
    assert torch.allclose(map_score(maps, image_score).double(), expected, atol=1e-6)
    assert map_score(maps[:, :2, :2], image_score).tolist() == maps[:, :2, :2].amax(dim=(1, 2)).tolist()


def test_the_orders_agree_at_patches_only():
    one, other = (state_probabilities(LOGITS, 21, order) for order in ("logits", "probabilities"))
    assert torch.allclose(one[..., ::10, ::10], other[..., ::10, ::10], atol=1e-5)
    assert (one - other).abs().max() > 0.05
