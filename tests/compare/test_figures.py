"""Pictures and charts: what they show, pixel for pixel and point for point."""

import base64
import io
import re

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
    picture = pixels(figures.heat(black, 5 + scale * scores))
    assert brightness(picture, slice(10, 60), slice(10, 60)) > 120
    assert brightness(picture, slice(100, 150), slice(100, 150)) < 10


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_map_without_a_range_is_dark(black, value):
    assert pixels(figures.heat(black, np.full((24, 24), value))).mean() < 10


def test_the_outline_goes_around_the_lesion_and_not_over_it(black):
    mask = np.zeros((24, 24), np.uint8)
    mask[6:18, 6:18] = 1
    picture = pixels(figures.outlined(black, mask))
    edge = 6 * figures.SIDE // 24 - 1
    assert brightness(picture, edge, slice(50, 110)) > 100
    assert brightness(picture, slice(60, 100), slice(60, 100)) < 10
    assert brightness(picture, slice(0, 20), slice(0, 20)) < 10


def test_a_chart_has_a_place_for_each_k_and_the_pages_colours():
    series = [
        figures.Series(0, {2: 80.0, 8: 90.0}, {2: 1.0}, paper={2: 85.0}),
        figures.Series(9, constant=70.0),
    ]
    svg = figures.shots_chart(series, "chart")
    assert re.findall(r">(\d+)</text>", svg)[:2] == ["2", "8"]
    assert all(colour in svg for colour in ("var(--series-0)", "var(--series-1)", "var(--paper)", "currentColor"))
    assert "xmlns" not in svg
    assert "http" not in svg
    assert all(name.startswith("chart-") for name in re.findall(r'\sid="([^"]*)"', svg))


def test_embedding_keeps_neighbours_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    features = rng.normal(size=(40, 60)) + 6 * labels[:, None]
    points = figures.embed(features)
    assert points.shape == (40, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(40)
    assert (labels[distances.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(figures.embed(features), points)


def test_large_data_are_drawn_from_without_repetition():
    shown = figures.drawn(10 * figures.MOST_POINTS)
    assert len(set(shown.tolist())) == figures.MOST_POINTS
    assert figures.drawn(7).tolist() == list(range(7))


def test_normal_and_abnormal_differ_in_shape_and_colour():
    normal, abnormal = (figures.kind_key(kind, "key") for kind in figures.KINDS)
    shapes = [re.search(r"<path id[^>]* d=\"([^\"]*)\"", svg).group(1) for svg in (normal, abnormal)]
    assert shapes[0] != shapes[1]
    assert "series-0" in normal
    assert "series-1" in abnormal
