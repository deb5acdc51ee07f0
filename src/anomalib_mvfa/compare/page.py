"""The page of a report: what each of its sections shows, for the template beside this module to lay out.

Axes: M images, l levels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from . import figures
from .paper import PaperTable
from .results import Features, Pictures, Row, job_folder
from .summary import (
    MAIN,
    PROTOCOLS,
    Outcome,
    Summary,
    Table,
    lacking,
    shots,
    tabulate,
    tabulate_all,
    unlike_categories,
)

TEMPLATE = "report.html.jinja"
SHOWN_K = 4
"""K of the images, as in the paper's figures; the largest one where there is none of 4."""
SHOWN_IMAGES = (4, 2)
"""How many abnormal and normal images of a category are shown at most."""
LEVEL_IMAGES = (2, 0)
SECONDS = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass
class Tile:
    """An image of a strip.

    Args:
        caption: What it shows.
        alt: The same for those who do not see it.
        picture: Data URI; None where there is no image.
    """

    caption: str
    alt: str
    picture: str | None


@dataclass
class Strip:
    """An image and what was made of it."""

    name: str
    abnormal: bool
    tiles: list[Tile]


@dataclass
class Grid:
    """Strips of a category."""

    category: str
    method: str | None
    strips: list[Strip]


def render(
    run: Path,
    outcome: Outcome,
    summaries: Sequence[Summary],
    paper: PaperTable | None,
    resamples: int,
) -> str:
    """Return the page.

    Args:
        run: Folder of the run, for images and features.
        outcome: What was compared.
        summaries: The cells.
        paper: Figures to put beside.
        resamples: Number of resamples behind the intervals.
    """
    each_k = [k for k in shots(summaries) if k is not None]
    shown_k = SHOWN_K if SHOWN_K in each_k else max(each_k, default=None)
    grids, levels = _grids(run, outcome, shown_k)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "percent": percent,
        "protocol": protocol,
        "as": lambda value, form: {"seconds": seconds, "count": count, "memory": memory}[form](value),
        "groupby_in_order": lambda values, name: groupby(values, attrgetter(name)),  # jinja's own sorts
    }
    return environment.get_template(TEMPLATE).render(
        outcome=outcome,
        paper=paper,
        resamples=resamples,
        notices=notices(outcome, summaries),
        failed=outcome.failed,
        lacking=lacking(outcome),
        lack=sum(len(seeds) for *_, seeds in lacking(outcome)),
        facts=facts(outcome),
        data=_data(outcome, summaries),
        blocks=[(k_shot, *_split(tabulate_all(summaries, outcome, k_shot, paper))) for k_shot in shots(summaries)],
        charts=_charts(outcome, summaries, each_k, paper) if len(each_k) > 1 else None,
        shown_k=shown_k,
        side=figures.SIDE,
        outline=figures.OUTLINE,
        grids=grids,
        levels=levels,
        scatters=_scatters(run, outcome, shown_k),
        kind_keys=[(kind, Markup(figures.kind_key(kind, f"kind-{kind}"))) for kind in figures.KINDS],  # noqa: S704  # ours
        costs=_costs(outcome),
        weights=_weights(outcome.rows),
    )


def breakable(name: str) -> Markup:
    """Return a name that may break after underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.2f}"


def seconds(value: float) -> str:
    """Return a time, to two or three digits."""
    return _scaled(value, SECONDS, "s")


def count(value: float) -> str:
    """Return a count, to three digits."""
    return _scaled(value, COUNTS, "") if value >= COUNTS[-1][0] else f"{value:.0f}"


def memory(value: float) -> str:
    """Return a memory of so many MiB."""
    return f"{value:.0f} MiB" if value < 1024 else f"{value / 1024:.1f} GiB"


def _scaled(value: float, units: Sequence[tuple[float, str]], rest: str) -> str:
    scale, unit = next(((scale, unit) for scale, unit in units if value >= scale), (1, rest))
    scaled = value / scale
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}".rstrip()


def protocol(name: str) -> tuple[str, str]:
    """Return a protocol's title and what it learns from."""
    title, _, learns = PROTOCOLS.get(name, name).partition(": ")
    return title, learns


def notices(outcome: Outcome, summaries: Sequence[Summary]) -> dict[str, str]:
    """Return what a reader must know before the figures: of "random" weights, and of test images that are "unlike"."""
    found = {}
    random = sum(row.random_weights for row in outcome.rows)
    if random:
        which = "All jobs" if random == len(outcome.rows) else f"{random} of {len(outcome.rows)} jobs"
        found["random"] = (
            f"{which} (marked †) had a backbone with random weights. Their scores mean "
            "nothing clinically, and are neither ranked with others nor put beside figures of the paper."
        )
    unlike = unlike_categories(summaries, outcome)
    if unlike:
        found["unlike"] = (
            f"Not all jobs on {', '.join(unlike)} were tested on the same images: there (‡), methods are neither "
            "comparable nor ranked. Delete the folders of the older jobs, and run the comparison again."
        )
    return found


def _split(tables: dict[str, Table]) -> tuple[dict[str, Table], dict[str, Table]]:
    """Part the main tables from the others, by title."""
    main = {title: table for title, table in tables.items() if table.metric in MAIN}
    return main, {title: table for title, table in tables.items() if title not in main}


def _each(values: Iterable[Any]) -> list[Any]:
    return [value for value in dict.fromkeys(values) if value is not None]


def facts(outcome: Outcome) -> dict[str, Any]:
    """Return what was compared, on which data, and where the numbers come from."""
    rows = outcome.rows
    dates = sorted(row.date[:10] for row in rows if row.date)
    return {
        "methods": _each(row.method for row in rows),
        "categories": [name for name in outcome.categories if name in {row.category for row in rows}],
        "shots": sorted(_each(row.k_shot for row in rows)),
        "seeds": sorted(_each(row.seed for row in rows)),
        "devices": _each(row.device for row in rows),
        "commits": _each(row.commit for row in rows),
        "dates": _each([dates[0], dates[-1]]) if dates else [],
        "versions": _versions(rows),
        "test_sets": {name: _test_sets(row for row in rows if row.category == name) for name in outcome.categories},
    }


def _test_sets(rows: Iterable[Row]) -> list[str]:
    """Return the digests of what was tested, one unless rows are not comparable."""
    return _each(row.test_set for row in rows)


def _data(outcome: Outcome, summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return what was tested of each category."""
    unlike = unlike_categories(summaries, outcome)
    lines = []
    for name in outcome.categories:
        cells = [cell for cell in summaries if cell.category == name]
        if cells:
            known = next((cell.images for cell in cells if cell.images), {})
            lines.append(
                {
                    "category": name,
                    "images": _each(row.images.get("test") for cell in cells for row in cell.rows),
                    **{kind: known.get(kind) for kind in ("normal", "abnormal", "groups")},
                    "masks": any(metric.startswith("pixel") for cell in cells for metric in cell.figures),
                    "unlike": name in unlike,
                    "digests": _test_sets(row for cell in cells for row in cell.rows),
                }
            )
    return lines


def _charts(
    outcome: Outcome,
    summaries: Sequence[Summary],
    each_k: Sequence[int],
    paper: PaperTable | None,
) -> dict[str, Any]:
    """Return charts of AUROC against K by metric and category, and their legend."""
    tables = [tabulate(summaries, outcome, metric, k_shot, paper) for metric in MAIN for k_shot in each_k]
    series: dict[tuple[str, str], dict[str, figures.Series]] = {}  # by metric and category, then by method
    legend: dict[str, dict[str, Any]] = {}
    for table in tables:
        for line in table.lines:
            for category, cell in line.cells.items():
                index = outcome.methods.index(line.method)
                one = series.setdefault((table.metric, category), {}).setdefault(line.method, figures.Series(index))
                shotless = line.k_shot is None
                if cell.figure and shotless:
                    one.constant = 100 * cell.figure.mean
                elif cell.figure and table.k_shot is not None:
                    one.points[table.k_shot] = 100 * cell.figure.mean
                    one.spreads[table.k_shot] = 100 * (cell.figure.spread or 0)
                if cell.paper is not None and not shotless and table.k_shot is not None:
                    one.paper[table.k_shot] = 100 * cell.paper
                if line.method not in legend:
                    key = Markup(figures.key(index, f"key{index}", constant=shotless))  # noqa: S704  # ours
                    legend[line.method] = {"key": key, "random": line.random_weights, "paper": None}
                if one.paper and not legend[line.method]["paper"]:
                    legend[line.method]["paper"] = Markup(figures.key(index, f"paper{index}", paper=True))  # noqa: S704
    charts: dict[str, list[tuple[str, Markup, str]]] = {}
    for number, ((metric, category), methods) in enumerate(series.items()):
        if any(len(one.points) > 1 for one in methods.values()):
            svg = figures.shots_chart([*methods.values()], f"shots{number}")
            said = "; ".join(filter(None, (_said(method, one) for method, one in methods.items())))
            charts.setdefault(MAIN[metric], []).append((category, Markup(svg), said))  # noqa: S704  # ours
    return {"charts": charts, "legend": legend} if charts else {}


def _said(method: str, series: figures.Series) -> str:
    """Return a method's part of a chart in words."""
    if series.constant is not None:
        return f"{method} {series.constant:.2f}"
    points = ", ".join(f"{value:.2f} at K = {k}" for k, value in series.points.items())
    return f"{method} {points}" if points else ""


def _grids(run: Path, outcome: Outcome, shown_k: int | None) -> tuple[list[Grid], list[Grid]]:
    """Return the methods side by side, and the maps of levels; one category after the other, which saves memory."""
    side_by_side, levels = [], []
    for category in outcome.categories:
        pictured = _pictured(run, outcome, category, shown_k)
        if not pictured:
            continue
        strips = _side_by_side(pictured)
        side_by_side.append(Grid(category, None, strips))
        for row, pictures in pictured:
            if pictures.levels:
                chosen = _chosen(pictures.labels, LEVEL_IMAGES)
                levels.append(Grid(category, _marked(row), [_levels(row, pictures, index) for index in chosen]))
    return side_by_side, levels


def _shown(outcome: Outcome, category: str, shown_k: int | None) -> Iterable[list[Row]]:
    """Return each method's rows that may be shown, first seed first."""
    for method in outcome.methods:
        rows = [row for row in outcome.rows if (row.method, row.category) == (method, category)]
        yield sorted((row for row in rows if row.k_shot in (shown_k, None)), key=lambda row: row.seed)


def _pictured(run: Path, outcome: Outcome, category: str, shown_k: int | None) -> list[tuple[Row, Pictures]]:
    found = []
    for rows in _shown(outcome, category, shown_k):
        files = [(row, job_folder(run, row.job) / "pictures.npz") for row in rows]
        for row, file in [entry for entry in files if entry[1].is_file()][:1]:
            pictures = Pictures.load(file)
            if pictures.paths:
                found.append((row, pictures))
    return found


def _marked(row: Row) -> str:
    return row.method + " †" * row.random_weights


def _chosen(labels: Sequence[int], most: tuple[int, int]) -> list[int]:
    """Return indices of images: abnormal ones first, then normal ones."""
    kinds = [[index for index, label in enumerate(labels) if bool(label) == kind] for kind in (True, False)]
    chosen = [index for indices, number in zip(kinds, most, strict=True) for index in indices[:number]]
    return chosen or list(range(min(sum(most), len(labels))))


def _mask(pictures: Pictures, index: int) -> np.ndarray | None:
    """Return an image's mask, or None where nothing is abnormal or there are no masks."""
    return pictures.masks[index] if pictures.masks is not None and pictures.masks[index].any() else None


def _first_tiles(pictures: Pictures, index: int) -> list[Tile]:
    """Return the image, and the ground truth if the data have masks."""
    name, image, mask = Path(pictures.paths[index]).name, pictures.images[index], _mask(pictures, index)
    tiles = [Tile("Image", f"Image {name}", figures.picture(image))]
    if pictures.masks is not None:
        truth = figures.picture(image) if mask is None else figures.outlined(image, mask)
        tiles.append(
            Tile("Ground truth", f"{name}, {'nothing abnormal' if mask is None else 'lesion outlined'}", truth)
        )
    return tiles


def _side_by_side(pictured: Sequence[tuple[Row, Pictures]]) -> list[Strip]:
    reference = pictured[0][1]
    strips = []
    for index in _chosen(reference.labels, SHOWN_IMAGES):
        path, mask = reference.paths[index], _mask(reference, index)
        tiles = _first_tiles(reference, index)
        for row, pictures in pictured:
            caption, alt = _marked(row), f"Anomaly map of {row.method} for {Path(path).name}"
            there = pictures.paths.index(path) if path in pictures.paths else None
            heat = None if there is None else figures.heat(reference.images[index], pictures.maps[there], mask)
            tiles.append(Tile(caption, alt, heat))
        strips.append(Strip(Path(path).name, bool(reference.labels[index]), tiles))
    return strips


def _levels(row: Row, pictures: Pictures, index: int) -> Strip:
    name, image, mask = Path(pictures.paths[index]).name, pictures.images[index], _mask(pictures, index)
    tiles = _first_tiles(pictures, index)
    for level, level_map in zip(pictures.levels, pictures.level_maps[index], strict=True):
        alt = f"Anomaly map of {row.method}, block {level}, for {name}"
        tiles.append(Tile(f"Block {level}", alt, figures.heat(image, level_map, mask)))
    alt = f"Anomaly map of {row.method}, all blocks, for {name}"
    tiles.append(Tile("All", alt, figures.heat(image, pictures.maps[index], mask)))
    return Strip(name, bool(pictures.labels[index]), tiles)


def _scatters(run: Path, outcome: Outcome, shown_k: int | None) -> list[dict[str, Any]]:
    """Return t-SNE plots of frozen and adapted features, of data with enough normal and abnormal images."""
    scatters: list[dict[str, Any]] = []
    for category in outcome.categories:
        for rows in _shown(outcome, category, shown_k):
            files = [(row, job_folder(run, row.job) / "features.npz") for row in rows]
            for row, file in [entry for entry in files if entry[1].is_file()][:1]:
                features = Features.load(file)
                if not _spread_out(features):
                    continue
                shown = figures.drawn(len(features.labels))
                plots = []
                for kind in ("frozen", "adapted"):
                    points = figures.embed(getattr(features, kind)[shown])
                    svg = figures.scatter(points, features.labels[shown], f"{kind}{len(scatters)}")
                    plots.append((kind, Markup(svg)))  # noqa: S704  # ours
                scatters.append(
                    {
                        "category": category,
                        "method": _marked(row),
                        "plots": plots,
                        "shown": len(shown),
                        "images": len(features.labels),
                    }
                )
    return scatters


def _spread_out(features: Features) -> bool:
    """Whether there is something to see: enough normal and abnormal images, and features that differ."""
    both = len(np.unique(features.labels.astype(bool))) == len(figures.KINDS)
    differ = all(
        np.isfinite(values).all() and np.ptp(values, axis=0).any() for values in (features.frozen, features.adapted)
    )
    return both and differ and len(features.labels) >= figures.FEWEST_POINTS


def _costs(outcome: Outcome) -> list[dict[str, Any]]:
    """Return medians over categories and seeds, for each method, K and device."""
    groups: dict[tuple[str, int | None, str | None], list[Row]] = {}
    for row in outcome.rows:
        groups.setdefault((row.method, row.k_shot, row.device), []).append(row)

    def middle(values: Iterable[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return median(there) if there else None

    return [
        {
            "method": _marked(rows[0]),
            "k_shot": k_shot,
            "jobs": len(rows),
            **{name: middle(row.seconds.get(name) for row in rows) for name in ("fit", "image")},
            **{name: middle(row.parameters.get(name) for row in rows) for name in ("all", "trained")},
            "memory": middle(row.memory_mb for row in rows),
            "device": device,
        }
        for (method, k_shot, device), rows in sorted(
            groups.items(), key=lambda item: (outcome.methods.index(item[0][0]), item[0][1] or 0, item[0][2] or "")
        )
    ]


def _versions(rows: Iterable[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for package, version in row.versions.items():
            found.setdefault(package, []).append(version)
    return {package: _each(versions) for package, versions in sorted(found.items())}


def _weights(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return methods by the weights of their backbones."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault("random" if row.random_weights else row.weights or "unknown", []).append(row.method)
    return {weights: _each(methods) for weights, methods in found.items()}
