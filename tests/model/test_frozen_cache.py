"""Tokens of images that come again: kept once, bounded, and never of another image."""

import copy
import pickle

import pytest
import torch

from anomalib_mvfa.model.frozen_cache import FrozenCache
from recipe import TINY, images


class Counter:
    """Makes tokens ``(l, B, L, D)`` of images, and counts them."""

    def __init__(self):
        self.images = 0

    def __call__(self, image):
        self.images += len(image)
        return image.flatten(1)[None, :, :8].reshape(1, len(image), 2, 4) * 2


@pytest.fixture
def picture():
    return images("cache", 5, 16)


def test_an_image_is_computed_once_whatever_its_place_in_a_batch(picture):
    cache, compute = FrozenCache(), Counter()
    first = cache.tokens(picture[:3], compute)
    again = cache.tokens(picture[[4, 2, 0]], compute)
    assert compute.images == 4
    assert len(cache) == 4
    torch.testing.assert_close(again, Counter()(picture[[4, 2, 0]]), atol=0, rtol=0)
    torch.testing.assert_close(cache.tokens(picture[:3], compute), first, atol=0, rtol=0)
    assert compute.images == 4


def test_the_smallest_change_makes_another_image(picture):
    cache, compute = FrozenCache(), Counter()
    cache.tokens(picture[:1], compute)
    changed = picture[:1].clone()
    changed[0, 2, 15, 15] = torch.nextafter(changed[0, 2, 15, 15], torch.tensor(2.0))
    cache.tokens(changed, compute)
    cache.tokens(picture[:1].flip(-1), compute)
    cache.tokens(picture[:1].transpose(-1, -2), compute)
    assert compute.images == len(cache) == 4


def test_memory_is_bounded_and_what_does_not_fit_is_right_all_the_same(picture):
    cache, compute = FrozenCache(limit=2 * 8 * 4), Counter()  # two images of 8 floats
    for _ in range(2):
        found = cache.tokens(picture, compute)
        torch.testing.assert_close(found, Counter()(picture), atol=0, rtol=0)
    assert len(cache) == 2
    assert compute.images == 5 + 3


def test_another_condition_forgets_everything_and_kept_tokens_are_copies(picture):
    cache, compute = FrozenCache(), Counter()
    cache.tokens(picture, compute, condition="float32")
    cache.tokens(picture, compute, condition="bfloat16").zero_()
    assert compute.images == 10
    assert len(cache) == 5
    assert cache.tokens(picture, compute, condition="bfloat16").any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])  # noqa: S301
def test_copies_are_empty(picture, duplicate):
    cache = FrozenCache(limit=1000)
    cache.tokens(picture, Counter())
    other = duplicate(cache)
    assert (len(other), other.limit) == (0, 1000)


@pytest.mark.parametrize("adaptation", ["adapter", "projector"])
def test_training_is_the_same_with_it(build, text, adaptation):
    model = build(adaptation=adaptation).train()
    image = images("cache", 3, TINY.image_size)
    gradients = []
    for cache in (None, FrozenCache()):
        model.cache = cache
        for _ in range(2):  # the second time from what is kept
            model.zero_grad()
            sum(output[:, 1].sum() for output in model(image, text).seg_maps).backward()
            gradients.append(model.seg_adapters[0].fc1[0].weight.grad.clone())
    assert len(model.cache) == 3
    assert gradients[0].any()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=0, rtol=0)


def test_scores_do_not_fill_it(tiny_model):
    tiny_model.cache = FrozenCache()
    tiny_model.tokens(images("cache", 2, TINY.image_size))
    assert len(tiny_model.cache) == 0
