"""Pictures as data URIs, and what the charts of the report draw.

Axes: H x W pixels, N images.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageFilter
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

SIDE = 160
"""Height and width of a picture in pixels."""
JPEG_QUALITY = 82
OUTLINE = (64, 224, 255)
"""Colour of the ground truth's outline, which neither the images nor the maps have."""
MAP_COLOURS = "inferno"
MAP_SHARE = 0.72
"""Share of the map's colours where a map is laid over its image."""

MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",  # circle
    "M-3-3h6v6h-6z",  # square
    "M0-4L4 3h-8z",  # triangle
    "M0 4L4-3h-8z",
    "M0-4.5L4 0L0 4.5L-4 0z",  # diamond
    "M-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",  # plus
    "M-4 0L3-4v8z",
    "M4 0L-3-4v8z",
)
"""Outlines around (0, 0), which tell methods apart without colours; the page has as many colours."""

CHART = (320, 220)
"""Width and height of a chart."""
MOST_POINTS = 500
"""In a t-SNE plot; of more images, a seeded draw is shown."""
FEWEST_POINTS = 10
WIDTH = 50
"""Principal components that t-SNE starts from: it needs no more, and distances in fewer dimensions are quick."""


def picture(image: np.ndarray, scores: np.ndarray | None = None, mask: np.ndarray | None = None) -> str:
    """Return an image, with an anomaly map over it and the outline of its lesion where given, as a data URI.

    Args:
        image: 8-bit RGB ``(H, W, 3)``.
        scores: The map ``(H, W)``; its colours span its own range.
        mask: Above 0 where abnormal ``(H, W)``.
    """
    resized = Image.fromarray(image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    drawn = np.array(resized)
    if scores is not None:
        grey = np.asarray(resized.convert("L"), dtype=float)[..., None]
        drawn = (MAP_SHARE * _colours(scores) + (1 - MAP_SHARE) * grey).round().astype(np.uint8)
    if mask is not None:
        large = Image.fromarray(((mask > 0) * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        drawn[np.asarray(large.filter(ImageFilter.MaxFilter(3))) > np.asarray(large)] = OUTLINE  # just around it
    buffer = io.BytesIO()
    is_grey = (drawn == drawn[..., :1]).all()
    Image.fromarray(drawn[..., 0] if is_grey else drawn).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colours(scores: np.ndarray) -> np.ndarray:
    """Return the colours of a map ``(SIDE, SIDE, 3)``, from 0 to 255."""
    finite = np.nan_to_num(scores.astype(float), posinf=0, neginf=0)
    span = finite.max() - finite.min()
    level = Image.fromarray(((finite - finite.min()) / (span if span > 0 else 1)).astype(np.float32))
    values = np.asarray(level.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).clip(0, 1)
    return mpl.colormaps[MAP_COLOURS](values)[..., :3] * 255


def shots_chart(cells: pd.DataFrame, methods: Sequence[str]) -> dict[str, Any]:
    """Lay out a chart of a metric against K, in pixels from the upper left of ``CHART``.

    Args:
        cells: Lines of one metric and category, see :func:`~anomalib_mvfa.compare.tables.cells`.
        methods: All methods, in the order of colours and markers.

    Returns:
        "x": places by K; "y": heights by round shares; "lines": the cells with "index" of the method, "x", and the
        heights "y" of the mean, "top" and "bottom" of its interval, and "y_paper" of the paper's figure.
    """
    (width, height), edge = CHART, 30
    shares = cells[["mean", "low", "high", "paper"]].to_numpy(float)
    low, high = np.nanmin(shares), np.nanmax(shares)
    marks = MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=2).tick_values(low, high).round(4)
    low, high = max(marks[0], 0), min(marks[-1], 1)
    shots = np.unique(cells.k_shot.astype(int))
    places = dict(zip(shots.tolist(), np.linspace(2 * edge, width - edge, len(shots)).tolist(), strict=True))

    def tall(share: Any) -> Any:  # noqa: ANN401  # a number or a column of a table
        return 10 + (height - 10 - edge) * (high - share) / (high - low)

    index = cells.method.map(list(methods).index)
    columns = {"y": "mean", "top": "high", "bottom": "low", "y_paper": "paper"}
    aside = 3 * (index - (len(methods) - 1) / 2)  # intervals of several methods beside each other
    lines = cells.assign(index=index, x=cells.k_shot.map(places) + aside, **{k: tall(cells[v]) for k, v in columns.items()})
    return {"x": places, "y": {share: tall(share) for share in marks[(marks >= low) & (marks <= high)].tolist()}, "lines": lines}


def embed(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return features ``(N, D)`` in two dimensions ``(N, 2)``, by t-SNE with the same settings for all.

    The points span the unit square.
    """
    if min(features.shape) > WIDTH:
        features = PCA(WIDTH, svd_solver="full").fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", max_iter=1000, random_state=seed).fit_transform(features)
    return (points - points.min(axis=0)) / np.ptp(points, axis=0).clip(1e-9)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Return which of ``count`` images a t-SNE plot shows, at most ``MOST_POINTS``."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:MOST_POINTS])
