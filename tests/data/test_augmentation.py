"""The 11 views, by hand; `tests/model` compares them with the reference figures."""

import pytest
import torch

from anomalib_mvfa.data.augmentation import VIEWS, view


@pytest.fixture
def image():
    return torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_there_are_eleven_different_views_of_the_same_shape(image):
    views = torch.stack([view(image, index) for index in range(VIEWS)])
    assert views.shape == (11, 3, 20, 20)
    assert torch.equal(views[0], image)
    assert all(not torch.allclose(views[i], views[j]) for i in range(VIEWS) for j in range(i))
    assert views.min() >= 0
    assert views.max() <= 1


def test_flips_are_left_right_and_then_top_bottom(image):
    assert torch.equal(view(image, 9), image.flip(-1))
    assert torch.equal(view(image, 10), image.flip(-2))


def test_shifts_are_in_grid_units(image):
    # 0.1 of a grid that is 2 wide is one of 20 pixels: the first shift shows what lies one pixel right and down.
    shifted = view(image, 5)
    torch.testing.assert_close(shifted[:, :-1, :-1], image[:, 1:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(view(image, 7)[:, 1:, 1:], image[:, :-1, :-1], atol=1e-5, rtol=0)


def test_rotations_are_opposite_in_pairs(image):
    image = image.flip(-1) + image  # symmetric
    for one, other in ((1, 4), (2, 3)):
        torch.testing.assert_close(view(image, one).flip(-1), view(image, other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("index", [-1, 11])
def test_there_is_no_twelfth_view(image, index):
    with pytest.raises(IndexError, match=rf"View {index} does not exist; views are numbered 0 to 10\."):
        view(image, index)
