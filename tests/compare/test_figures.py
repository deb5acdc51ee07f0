"""Pictures and places of features: what they show, pixel for pixel and point for point."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.compare import figures


def pixels(uri):
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))).convert("RGB")
    )


def brightness(picture, rows, columns):
    return picture[rows, columns].astype(float).mean()


@pytest.fixture
def black():
    return np.zeros((24, 24, 3), np.uint8)


def test_pictures_are_small_and_keep_their_colours():
    image = np.zeros((300, 300, 3), np.uint8)
    image[..., 0] = 200
    picture = pixels(figures.picture(image))
    assert picture.shape == (figures.SIDE, figures.SIDE, 3)
    assert np.abs(picture.mean(axis=(0, 1)) - [200, 0, 0]).max() < 5


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_colours_span_the_range_of_each_map(black, scale):
    scores = np.zeros((24, 24))
    scores[:12, :12] = 1
    picture = pixels(figures.picture(black, 5 + scale * scores))
    assert brightness(picture, slice(10, 60), slice(10, 60)) > 120
    assert brightness(picture, slice(100, 150), slice(100, 150)) < 10


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_map_without_a_range_is_dark(black, value):
    assert pixels(figures.picture(black, np.full((24, 24), value))).mean() < 10


def test_the_outline_goes_around_the_lesion_and_not_over_it(black):
    mask = np.zeros((24, 24), np.uint8)
    mask[6:18, 6:18] = 1
    picture = pixels(figures.picture(black, mask=mask))
    edge = 6 * figures.SIDE // 24 - 1
    assert brightness(picture, edge, slice(50, 110)) > 100
    assert brightness(picture, slice(60, 100), slice(60, 100)) < 10
    assert brightness(picture, slice(0, 20), slice(0, 20)) < 10


def test_embedding_keeps_neighbours_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    features = rng.normal(size=(40, 60)) + 6 * labels[:, None]
    embedded = figures.embed(features, labels)
    points = embedded[:, :2]
    assert (embedded[:, 2] == labels).all()
    assert (points.min(), points.max()) == (0, 1)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(40)
    assert (labels[distances.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(figures.embed(features, labels), embedded)


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.filterwarnings("error")
def test_features_without_differences_are_not_drawn(value):
    labels = np.arange(20) % 2
    assert not len(figures.embed(np.full((20, 4), value), labels))
    assert not len(figures.embed(np.random.default_rng(0).normal(size=(20, 4)), np.zeros(20)))
    assert not len(figures.embed(np.random.default_rng(0).normal(size=(5, 4)), labels[:5]))
