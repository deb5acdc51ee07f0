"""The 11 views, by hand; `tests/model` compares them with the reference figures."""

import pytest
import torch

from anomalib_mvfa.data.augmentation import VIEWS, view

IMAGE = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))


def same(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_there_are_eleven_different_views_of_the_same_shape():
    views = torch.stack([view(IMAGE, index) for index in range(VIEWS)])
    assert views.shape == (11, 3, 20, 20)
    assert torch.equal(views[0], IMAGE)
    assert all(not torch.allclose(views[i], views[j]) for i in range(VIEWS) for j in range(i))
    assert 0 <= views.min() < views.max() <= 1
    for index in (-1, 11):
        with pytest.raises(IndexError, match=rf"View {index} does not exist; views are numbered 0 to 10\."):
            view(IMAGE, index)


def test_what_the_views_are():
    assert torch.equal(view(IMAGE, 9), IMAGE.flip(-1))
    assert torch.equal(view(IMAGE, 10), IMAGE.flip(-2))
    # 0.1 of a grid that is 2 wide is one of 20 pixels: the first shift shows what lies one pixel right and down.
    same(view(IMAGE, 5)[:, :-1, :-1], IMAGE[:, 1:, 1:])
    same(view(IMAGE, 7)[:, 1:, 1:], IMAGE[:, :-1, :-1])
    symmetric = IMAGE.flip(-1) + IMAGE
    for one, other in ((1, 4), (2, 3)):  # rotations are opposite in pairs
        same(view(symmetric, one).flip(-1), view(symmetric, other))
