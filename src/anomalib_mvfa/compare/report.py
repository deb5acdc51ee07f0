"""A report of a comparison: a self-contained HTML page, tables in Markdown, LaTeX and CSV, and every image's scores."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from ..io import atomic_write
from . import figures, tables
from .paper import paper_table
from .results import job_folder, read_arrays

TEMPLATE = "report.html.jinja"
MAIN = ("image_AUROC", "pixel_AUROC")
"""Metrics that are shown from the start; others are folded."""
SHOWN_K = 4
"""K of the images, as in the paper's figures; the largest one where there is none of 4."""
SHOWN_IMAGES = (4, 2)
"""How many abnormal and normal images of a category are shown at most."""
LEVEL_IMAGES = (2, 0)
UNITS = {
    "s": {"h": 3600, "min": 60, "s": 1, "ms": 1e-3},
    "MiB": {"GiB": 1024, "MiB": 1},
    "": {"G": 1e9, "M": 1e6, "k": 1e3, "": 1},
}


def report(run: Path, resamples: int = 1000) -> Path:
    """Write index.html, results.csv, results.md, results.tex and scores.csv to ``RUN/report``, each by an atomic write.

    Args:
        run: Folder of a comparison, see :mod:`anomalib_mvfa.compare.results`.
        resamples: Number of resamples of the bootstrap.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no comparison.
        ValueError: No job has finished, ``resamples`` is below 1, or the config names a table that the paper does not
            have.
    """
    if resamples < 1:
        msg = f"resamples={resamples} must be at least 1."
        raise ValueError(msg)
    outcome = tables.load(run)
    cells, images = tables.cells(outcome, resamples), tables.per_image(outcome)
    files = {
        "scores.csv": tables.to_csv(images),
        "results.csv": tables.to_csv(outcome.results),
        "results.md": tables.to_markdown(outcome, cells),
        "results.tex": tables.to_latex(outcome, cells),
        "index.html": render(outcome, cells, images, resamples),
    }
    for name, text in files.items():
        with atomic_write(run / "report" / name) as partial:
            partial.write_text(text, "utf-8", errors="backslashreplace")  # names of files may be no text
    return run / "report" / "index.html"


def render(outcome: tables.Outcome, cells: pd.DataFrame, images: pd.DataFrame, resamples: int) -> str:
    """Return the page.

    Args:
        outcome: What was compared.
        cells: See :func:`~anomalib_mvfa.compare.tables.cells`.
        images: See :func:`~anomalib_mvfa.compare.tables.per_image`.
        resamples: Number of resamples behind the intervals.
    """
    shots = cells.k_shot.dropna().drop_duplicates().sort_values().tolist()
    shown_k = SHOWN_K if SHOWN_K in shots else max(shots, default=None)
    random = {result.method for result in outcome.finished if result.random_weights}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["known"] = pd.notna
    environment.filters |= {
        "breakable": breakable,
        "named": lambda name: breakable(name) + Markup("&nbsp;†") * (name in random),
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f}",
        "points": lambda share, sign="+": f"{100 * share:{sign}.1f}".replace("-", "\N{MINUS SIGN}"),
        "scaled": scaled,
        "by": lambda table, column: {getattr(line, column): line for line in table.itertuples()},
        "parts": lambda table, *names: table.groupby([*names] if names[1:] else names[0], sort=False, dropna=False),
        "each": lambda results, name: each(getattr(result, name) for result in results),
    }
    return environment.get_template(TEMPLATE).render(
        outcome=outcome,
        cells=cells.join(tables.sentences(cells).rename("sentence")),
        images=images,
        resamples=resamples,
        paper=paper_table(outcome.config["paper"]) if outcome.config["paper"] else None,
        lacking=tables.lacking(outcome),
        tables=tables,
        figures=figures,
        main=MAIN,
        shots=shots,
        shown_k=shown_k,
        charts=_charts(cells, list(outcome.config["methods"])),
        costs=_costs(outcome),
        versions=each(" ".join(item) for result in outcome.finished for item in result.versions.items()),
        **_pictures(outcome, shown_k),
    )


def breakable(name: str) -> Markup:
    """Return a name that may break after underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def scaled(value: float, unit: str = "") -> str:
    """Return a time in seconds ("s"), a memory in MiB ("MiB") or a count (""), to three digits."""
    scale, name = next(((s, name) for name, s in UNITS[unit].items() if value >= s), (1, unit))
    return "–" if pd.isna(value) else f"{float(f'{value / scale:.3g}'):g} {name}".rstrip()


def each(values: Iterable[Any]) -> list[Any]:
    """Return the values once each, in their order, without None."""
    return [value for value in dict.fromkeys(values) if value is not None]


def _charts(cells: pd.DataFrame, methods: list[str]) -> list[dict[str, Any]]:
    """Return AUROC against K of each metric and category that has more than one K."""
    known = cells[cells.metric.isin(MAIN) & cells["mean"].notna() & cells.k_shot.notna()]
    return [
        {"metric": metric, "category": category, **figures.shots_chart(part, methods)}
        for (metric, category), part in known.groupby(["metric", "category"], sort=False)
        if part.k_shot.nunique() > 1
    ]


def _costs(outcome: tables.Outcome) -> pd.DataFrame:
    """Return medians over categories and seeds, of each method, K and device."""
    keys = ["method", "k_shot", "device"]
    costs = pd.DataFrame(
        {
            "method": result.method,
            "k_shot": result.k_shot,
            "device": result.device,
            "fit": result.seconds.get("fit"),
            "image": result.seconds.get("image"),
            "parameters": result.parameters.get("all"),
            "trained": result.parameters.get("trained"),
            "memory": result.memory_mb,
        }
        for result in outcome.finished
    )
    costs = costs.astype({"k_shot": "Int64"} | dict.fromkeys(costs.columns.drop(keys), float))
    groups = costs.groupby(keys, sort=False, dropna=False)
    return groups.median().assign(jobs=groups.size()).reset_index()


def _pictures(outcome: tables.Outcome, shown_k: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return the methods side by side, the maps of levels, and t-SNE plots; one category after the other."""
    found: dict[str, list[dict[str, Any]]] = {"grids": [], "levels": [], "scatters": []}
    for category in outcome.categories:
        pictures = _first(outcome, category, shown_k, "pictures.npz")
        if pictures:
            found["grids"].append({"category": category, "method": None, "strips": _side_by_side(pictures)})
        for method, saved in pictures.items():
            if len(saved.get("levels", ())):
                strips = [_levels(saved, index) for index in _chosen(saved["labels"], LEVEL_IMAGES)]
                found["levels"].append({"category": category, "method": method, "strips": strips})
        for method, saved in _first(outcome, category, shown_k, "features.npz").items():
            for features in ("frozen", "adapted") if _spread_out(saved) else ():
                shown = figures.drawn(len(saved["labels"]))
                points = np.column_stack([figures.embed(saved[features][shown]), saved["labels"][shown]]).tolist()
                plot = {"features": features, "points": points, "images": len(saved["labels"])}
                found["scatters"].append({"category": category, "method": method, **plot})
    return found


def _first(outcome: tables.Outcome, category: str, k_shot: int | None, file: str) -> dict[str, dict[str, np.ndarray]]:
    """Return a file of each method's first seed that has it, by method."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for result in outcome.finished:
        path = job_folder(outcome.run, result.job) / file
        is_shown = result.category == category and result.k_shot in (k_shot, None)
        if is_shown and result.method not in found and path.is_file():
            found[result.method] = read_arrays(path)
    return found


def _chosen(labels: np.ndarray, most: tuple[int, int]) -> list[int]:
    """Return indices of images: abnormal ones first, then normal ones."""
    return [*np.flatnonzero(labels)[: most[0]], *np.flatnonzero(labels == 0)[: most[1]]]


def _strip(saved: Mapping[str, np.ndarray], index: int, maps: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    """Return an image, its ground truth if the data have masks, and its maps, as captions and data URIs."""
    image, masks = saved["images"][index], saved.get("masks")
    mask = masks[index] if masks is not None and masks[index].any() else None
    tiles = [("Image", figures.picture(image))]
    if masks is not None:
        tiles.append(("Ground truth", figures.picture(image, mask=mask)))
    for caption, scores in maps.items():
        tiles.append((caption, None if scores is None else figures.picture(image, scores, mask)))
    return {"name": Path(saved["paths"][index]).name, "abnormal": bool(saved["labels"][index]), "tiles": tiles}


def _side_by_side(pictures: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    first = next(iter(pictures.values()))
    strips = []
    for index in _chosen(first["labels"], SHOWN_IMAGES):
        there = {method: saved["maps"][saved["paths"] == first["paths"][index]] for method, saved in pictures.items()}
        strips.append(_strip(first, index, {method: next(iter(maps), None) for method, maps in there.items()}))
    return strips


def _levels(saved: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
    maps = dict(zip([f"Block {level}" for level in saved["levels"]], saved["level_maps"][index], strict=True))
    return _strip(saved, index, {**maps, "All blocks": saved["maps"][index]})


def _spread_out(features: Mapping[str, np.ndarray]) -> bool:
    """Whether there is something to see: enough normal and abnormal images, and features that differ."""
    values = [features["frozen"], features["adapted"]]
    differ = all(np.isfinite(one).all() and np.ptp(one, axis=0).any() for one in values)
    return differ and len(np.unique(features["labels"])) > 1 and len(features["labels"]) >= figures.FEWEST_POINTS
