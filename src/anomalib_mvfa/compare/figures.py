"""Pictures as data URIs, and features in two dimensions.

Axes: H x W pixels, N images.
"""

import base64
import io

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageFilter
from sklearn.manifold import TSNE

SIDE = 160
"""Height and width of a picture in pixels."""
JPEG_QUALITY = 82
OUTLINE = (64, 224, 255)
"""Colour of the ground truth's outline, which neither the images nor the maps have."""
MAP_COLOURS = "inferno"
MAP_SHARE = 0.72
"""Share of the map's colours where a map is laid over its image."""
FEWEST_POINTS = 10
"""In a t-SNE plot."""


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
        finite = np.nan_to_num(scores.astype(float), posinf=0, neginf=0)
        share = Image.fromarray(np.asarray(mpl.colors.Normalize()(finite), np.float32))
        colours = mpl.colormaps[MAP_COLOURS](np.asarray(share.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
        grey = np.asarray(resized.convert("L"), dtype=float)[..., None]
        drawn = (MAP_SHARE * 255 * colours[..., :3] + (1 - MAP_SHARE) * grey).round().astype(np.uint8)
    if mask is not None:
        large = Image.fromarray(((mask > 0) * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        drawn[np.asarray(large.filter(ImageFilter.MaxFilter(3))) > np.asarray(large)] = OUTLINE  # just around it
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def embed(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Place images in two dimensions by t-SNE, with the same settings for all features.

    Args:
        features: Features of the images ``(N, D)``.
        labels: 1 where abnormal ``(N)``.

    Returns:
        Places in the unit square and labels ``(N, 3)``; none where there is nothing to see: with few images, of one
        kind, or with features that are equal or not finite.
    """
    differ = np.isfinite(features).all() and np.ptp(features, axis=0).any() and np.ptp(labels)
    if len(features) < FEWEST_POINTS or not differ:
        return np.zeros((0, 3))
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    return np.column_stack([(points - points.min(axis=0)) / np.ptp(points, axis=0).clip(1e-9), labels])
