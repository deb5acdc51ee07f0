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
        "results.csv": tables.to_csv(tables.per_job(outcome)),
        "results.md": tables.to_markdown(outcome, cells),
        "results.tex": tables.to_latex(cells),
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
    marks = {"†": set(cells.method[cells.random_weights]), "‡": set(cells.method[cells.optimistic])}
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
        "named": lambda name: (
            breakable(name) + "".join(f"\N{NO-BREAK SPACE}{mark}" for mark in marks if name in marks[mark])
        ),
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f}",
        "points": lambda share, sign="+": f"{100 * share:{sign}.1f}".replace("-", "\N{MINUS SIGN}"),
        "median": median,
        "by": lambda table, column: {getattr(line, column): line for line in table.itertuples()},
        "parts": lambda table, *names: table.groupby([*names] if names[1:] else names[0], sort=False, dropna=False),
        "each": lambda results, name: each(getattr(result, name) for result in results),
    }
    return environment.get_template(TEMPLATE).render(
        outcome=outcome,
        cells=cells.join(tables.sentences(cells).rename("sentence")),
        images=images,
        resamples=resamples,
        paper=paper_table(outcome.config["paper"]) if outcome.config.get("paper") else None,
        lacking=tables.lacking(outcome),
        tables=tables,
        figures=figures,
        main=MAIN,
        shots=shots,
        shown_k=shown_k,
        versions=each(" ".join(item) for result in outcome.finished for item in result.versions.items()),
        **_pictures(outcome, shown_k),
    )


def breakable(name: str) -> Markup:
    """Return a name that may break after underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def median(costs: Iterable[float | None], unit: float) -> str:
    """Return the median of costs in some unit, to three digits."""
    middle = pd.Series([*costs], dtype=float).median() / unit
    return "\N{EN DASH}" if pd.isna(middle) else f"{float(f'{middle:.3g}'):,g}"


def each(values: Iterable[Any]) -> list[Any]:
    """Return the values once each, in their order, without None."""
    return [value for value in dict.fromkeys(values) if value is not None]


def _pictures(outcome: tables.Outcome, shown_k: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return the methods side by side, maps of their blocks, and t-SNE plots; one category after the other."""
    found: dict[str, list[dict[str, Any]]] = {"grids": [], "scatters": []}
    for category in outcome.categories:
        pictures = _first(outcome, category, shown_k, "pictures.npz")
        for first in [*pictures.values()][:1]:
            by_path = {
                method: dict(zip(saved["paths"], saved["maps"], strict=True)) for method, saved in pictures.items()
            }
            maps: dict[str, Any] = {
                method: [one.get(path) for path in first["paths"]] for method, one in by_path.items()
            }
            found["grids"].append({"category": category, "method": None, "strips": _strips(first, maps, SHOWN_IMAGES)})
        for method, saved in pictures.items():
            if len(saved.get("levels", ())):
                maps = {f"Block {level}": saved["level_maps"][:, at] for at, level in enumerate(saved["levels"])}
                strips = _strips(saved, {**maps, "All blocks": saved["maps"]}, LEVEL_IMAGES)
                found["grids"].append({"category": category, "method": method, "strips": strips})
        for method, saved in _first(outcome, category, shown_k, "features.npz").items():
            for features in ("frozen", "adapted"):
                plot = {"features": features, "points": figures.embed(saved[features], saved["labels"]).tolist()}
                if plot["points"]:
                    found["scatters"].append({"category": category, "method": method, **plot})
    return found


def _first(outcome: tables.Outcome, category: str, k_shot: int | None, file: str) -> dict[str, dict[str, np.ndarray]]:
    """Return a file of each method's first seed that has it, by method."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for job in outcome.finished:
        path = job_folder(outcome.run, job.job) / file
        if job.category == category and job.k_shot in (k_shot, None) and job.method not in found and path.is_file():
            found[job.method] = read_arrays(path)
    return found


def _strips(saved: Mapping[str, Any], maps: Mapping[str, Any], most: tuple[int, int]) -> list[dict[str, Any]]:
    """Return images, abnormal ones first, with their ground truth and maps as captions and data URIs.

    Args:
        saved: Arrays of a job's pictures, M images.
        maps: Maps ``(M, S, S)`` by caption; None in place of a map that is missing.
        most: How many abnormal and normal images are shown at most.
    """
    labels, masks, strips = saved["labels"], saved.get("masks"), []
    for index in [*np.flatnonzero(labels)[: most[0]], *np.flatnonzero(labels == 0)[: most[1]]]:
        image, mask = saved["images"][index], None if masks is None or not masks[index].any() else masks[index]
        tiles: list[tuple[str, str | None]] = [("Image", figures.picture(image))]
        if masks is not None:
            tiles.append(("Ground truth", figures.picture(image, mask=mask)))
        for caption, scores in maps.items():
            tiles.append((caption, None if scores[index] is None else figures.picture(image, scores[index], mask)))
        strips.append({"name": Path(saved["paths"][index]).name, "abnormal": bool(labels[index]), "tiles": tiles})
    return strips
