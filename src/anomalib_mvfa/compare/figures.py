"""Pictures as data URIs, and charts as SVG that takes the colours of the page around it.

Axes: H x W pixels, N images.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

SIDE = 160
"""Height and width of an image in pixels."""
JPEG_QUALITY = 82
OUTLINE = (64, 224, 255)
"""Colour of the ground truth's outline, which neither the images nor the maps have."""
MAP_COLOURS = "inferno"
MAP_SHARE = 0.72
"""Share of the map's colours where a map is laid over its image."""

SERIES = 8
"""Colours that the page defines, ``--series-0`` and so on."""
MARKERS = "os^DvPX*"
TEXT, FAINT, PAPER = "#010101", "#020202", "#030303"
"""Stand for colours of the page; replaced in the SVG, which knows hexadecimal ones only."""
RESTS = {TEXT: "currentColor", FAINT: "var(--rule)", PAPER: "var(--paper)"}

KINDS = {"normal": 0, "abnormal": 1}
MOST_POINTS = 500
"""In a t-SNE plot; of more images, a seeded draw is shown."""
FEWEST_POINTS = 10
WIDTH = 50
"""Principal components that t-SNE starts from: it needs no more, and distances in fewer dimensions are quick."""


def picture(image: np.ndarray) -> str:
    """Return an 8-bit RGB image ``(H, W, 3)`` as a data URI."""
    return _jpeg(_resized(image))


def outlined(image: np.ndarray, mask: np.ndarray) -> str:
    """Return an image with the outline of its mask ``(H, W)`` as a data URI."""
    picture = np.array(_resized(image))
    picture[_outline(mask)] = OUTLINE
    return _jpeg(Image.fromarray(picture))


def heat(image: np.ndarray, scores: np.ndarray, mask: np.ndarray | None = None) -> str:
    """Return an anomaly map over its image as a data URI; the colours span the map's own range.

    Args:
        image: 8-bit RGB ``(H, W, 3)``.
        scores: The map ``(H, W)``.
        mask: Above 0 where abnormal ``(H, W)``; drawn as an outline.
    """
    finite = np.nan_to_num(scores.astype(float), posinf=0, neginf=0)
    span = finite.max() - finite.min()
    level = Image.fromarray(((finite - finite.min()) / (span if span > 0 else 1)).astype(np.float32))
    values = np.asarray(level.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).clip(0, 1)
    colours = mpl.colormaps[MAP_COLOURS](values)[..., :3] * 255  # (SIDE, SIDE, 3)
    grey = np.asarray(_resized(image).convert("L"), dtype=float)[..., None]
    picture = (MAP_SHARE * colours + (1 - MAP_SHARE) * grey).round().astype(np.uint8)
    if mask is not None:
        picture[_outline(mask)] = OUTLINE
    return _jpeg(Image.fromarray(picture))


def _resized(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return where a mask's outline is, just outside of it, one pixel wide."""
    large = Image.fromarray(((mask > 0) * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.asarray(large.filter(ImageFilter.MaxFilter(3))) > np.asarray(large)


def _jpeg(image: Image.Image) -> str:
    channels = np.asarray(image)
    if (channels == channels[..., :1]).all():
        image = image.convert("L")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Series:
    """A method in a chart of AUROC against K, in percent.

    Args:
        index: Tells colours and markers apart.
        points: Values by K.
        spreads: Spreads by K, of points that have one.
        constant: Value of a method without shots, in place of points.
        paper: The paper's points, by K.
    """

    index: int
    points: dict[int, float] = field(default_factory=dict)
    spreads: dict[int, float] = field(default_factory=dict)
    constant: float | None = None
    paper: dict[int, float] = field(default_factory=dict)


def shots_chart(series: Sequence[Series], name: str) -> str:
    """Return the SVG of AUROC against K.

    Args:
        series: Methods.
        name: Name of the chart in the HTML report, which its identifiers begin with.
    """
    shots = sorted({k for one in series for k in (*one.points, *one.paper)})
    edges = np.log2(shots[0]) - 0.15, np.log2(shots[-1]) + 0.15
    figure, axes = _axes(3.2, 2.3)
    for one in series:
        colour, marker = _colour(one.index), _marker(one.index)
        if one.constant is not None:
            axes.axhline(one.constant, color=colour, linestyle=(0, (5, 3)), linewidth=1.6)
            axes.plot(edges[1], one.constant, color=colour, marker=marker, markersize=5, clip_on=False)
        if one.points:
            x, y = np.log2([*one.points]), [*one.points.values()]
            spreads = [one.spreads.get(k, 0) for k in one.points]
            axes.errorbar(x, y, yerr=spreads, color=colour, linewidth=0, elinewidth=1, capsize=2, alpha=0.7)
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6)
        if one.paper:
            x, y = np.log2([*one.paper]), [*one.paper.values()]
            axes.plot(
                x, y, color=PAPER, marker=marker, markersize=5, markerfacecolor="none", linewidth=1, linestyle=":"
            )
    axes.set_xticks(np.log2(shots), [str(k) for k in shots])
    axes.set_xlim(*edges)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(max(high, low + 1), 100.5))
    axes.set_xlabel("K")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    return _svg(figure, name)


def key(index: int, name: str, *, constant: bool = False, paper: bool = False) -> str:
    """Return the SVG of a line and marker for a chart's legend.

    Args:
        index: As in :class:`Series`.
        name: As in :func:`shots_chart`.
        constant: A method without shots.
        paper: The paper's points.
    """
    figure, axes = _axes(0.42, 0.18)
    axes.set_axis_off()
    colour, marker = PAPER if paper else _colour(index), _marker(index)
    style: str | tuple[int, tuple[int, int]] = ":" if paper else (0, (4, 2)) if constant else "-"
    axes.plot([0, 1], [0, 0], color=colour, linewidth=1 if paper else 1.6, linestyle=style)
    fill = "none" if paper else colour
    axes.plot([0.5], [0], color=colour, marker=marker, markersize=5, markerfacecolor=fill)
    axes.set_position((0.02, 0, 0.96, 1))
    return _svg(figure, name)


def embed(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return features ``(N, D)`` in two dimensions ``(N, 2)``, by t-SNE with the same settings for all."""
    if min(features.shape) > WIDTH:
        features = PCA(WIDTH, svd_solver="full").fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", max_iter=1000, random_state=seed).fit_transform(features)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Return which of ``count`` images a t-SNE plot shows, at most ``MOST_POINTS``."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:MOST_POINTS])


def scatter(points: np.ndarray, labels: np.ndarray, name: str) -> str:
    """Return the SVG of points ``(N, 2)``, normal and abnormal ones told apart by shape and colour."""
    figure, axes = _axes(2.6, 2.6)
    for kind, label in KINDS.items():
        _kind(axes, points[labels.astype(bool) == bool(label)], kind, size=5 if len(points) < MOST_POINTS / 4 else 3.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT)
    axes.margins(0.06)
    axes.set_position((0.01, 0.01, 0.98, 0.98))
    return _svg(figure, name)


def kind_key(kind: str, name: str) -> str:
    """Return the SVG of the mark of "normal" or "abnormal" images, for a legend."""
    figure, axes = _axes(0.18, 0.18)
    axes.set_axis_off()
    _kind(axes, np.zeros((1, 2)), kind, size=6)
    axes.set_position((0, 0, 1, 1))
    return _svg(figure, name)


def _kind(axes: Axes, points: np.ndarray, kind: str, size: float) -> None:
    colour, marker = (_colour(0), "o") if kind == "normal" else (_colour(1), "^")
    fill = "none" if kind == "normal" else colour
    axes.plot(*points.T, color=colour, marker=marker, markersize=size, markerfacecolor=fill, linestyle="none")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches, not pyplot's, which would keep it."""
    figure = Figure((width, height))
    axes = figure.add_axes((0.15, 0.19, 0.83, 0.78))
    axes.patch.set_visible(False)
    axes.tick_params(colors=TEXT, labelsize=9, length=3)
    axes.xaxis.label.set_color(TEXT)
    axes.spines[:].set_color(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _colour(index: int) -> str:
    return f"#0a0b{index % SERIES:02x}"


def _marker(index: int) -> str:
    """Return a marker that differs where colours come again."""
    return MARKERS[(index + index // SERIES) % len(MARKERS)]


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG for the inside of a page: its own identifiers, the page's colours and fonts."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\sid="([^"]*)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    colours = RESTS | {_colour(index): f"var(--series-{index})" for index in range(SERIES)}
    for colour, rest in colours.items():
        svg = svg.replace(colour, rest)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
