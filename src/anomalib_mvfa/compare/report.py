"""A report of a comparison: a self-contained HTML page, tables in Markdown, LaTeX and CSV, and every image's scores."""

from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from ..arguments import check_bounds
from ..io import atomic_write, to_csv
from . import figures, tables
from .results import job_folder, read_arrays

SHOWN_K = 4
"""K of the images, as in the paper's figures; the largest one where there is none of 4."""


def report(run: Path, resamples: int = 1000) -> Path:
    """Write index.html, results.csv, results.md, results.tex and scores.csv to ``RUN/report``, each by an atomic write.

    Args:
        run: Folder of a comparison, see :mod:`anomalib_mvfa.compare.results`.
        resamples: Number of resamples of the bootstrap.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no comparison.
        ValueError: No job has given a metric, ``resamples`` is below 1, or the comparison is not valid.
    """
    check_bounds("resamples", resamples, 1)
    outcome = tables.load(run)
    cells = tables.cells(outcome, resamples)
    files = {
        "scores.csv": to_csv(outcome.images),
        "results.csv": to_csv(outcome.jobs),
        "results.md": tables.to_markdown(outcome, cells),
        "results.tex": tables.to_latex(outcome, cells),
        "index.html": render(outcome, cells, resamples),
    }
    for name, text in files.items():
        with atomic_write(run / "report" / name) as partial:
            partial.write_text(text, "utf-8", errors="backslashreplace")  # names of files may be no text
    return run / "report" / "index.html"


def render(outcome: tables.Outcome, cells: pd.DataFrame, resamples: int) -> str:
    """Return the page, given :func:`~anomalib_mvfa.compare.tables.cells` and the number of resamples behind them."""
    shots = sorted(cells.k_shot.dropna().unique())
    shown_k = SHOWN_K if SHOWN_K in shots else max(shots, default=None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["known"] = pd.notna
    environment.filters |= {
        "breakable": lambda name: escape(name).replace("_", Markup("_<wbr>")),
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f}",
        "points": lambda share, sign="+": f"{100 * share:{sign}.1f}".replace("-", "\N{MINUS SIGN}"),
        "median": median,
        "each": lambda column: column.dropna().unique().tolist(),
        "parts": lambda table, *names: table.groupby([*names] if names[1:] else names[0], observed=True, dropna=False),
    }
    return environment.get_template("report.html.jinja").render(
        outcome=outcome,
        comparison=outcome.comparison,
        cells=cells,
        resamples=resamples,
        tables=tables,
        side=figures.SIDE,
        shots=shots,
        shown_k=shown_k,
        random={*cells.method[cells.random_weights]},
        pictures=[*_pictures(outcome, shown_k)],
        scatters=[*_scatters(outcome, shown_k)],
    )


def median(costs: pd.Series, unit: float) -> str:
    """Return the median of costs in some unit, to three digits."""
    middle = costs.median() / unit
    return "\N{EN DASH}" if pd.isna(middle) else f"{float(f'{middle:.3g}'):,g}"


def _first(outcome: tables.Outcome, shown_k: int | None, file: str) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return a file of the first seed that has it, by category and method."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {category: {} for category in outcome.comparison.sources()}
    for job in outcome.finished:
        path, methods = job_folder(outcome.run, job.job) / file, found[job.category]
        if job.k_shot in (shown_k, None) and job.method not in methods and path.is_file():
            methods[job.method] = read_arrays(path)
    return found


def _pictures(outcome: tables.Outcome, shown_k: int | None) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield test images, abnormal ones first: a title, and data URIs of the image and of maps by their captions."""
    for category, methods in _first(outcome, shown_k, "pictures.npz").items():
        maps: dict[str, dict[str, np.ndarray]] = {}  # by caption and path of the image
        for method, saved in methods.items():
            maps[method] = dict(zip(saved["paths"], saved["maps"], strict=True))
            for at, level in enumerate(saved.get("levels", ())):
                maps[f"{method}, block {level}"] = dict(zip(saved["paths"], saved["level_maps"][:, at], strict=True))
        for saved in [*methods.values()][:1]:
            for index in np.argsort(-saved["labels"], kind="stable"):
                path, image = saved["paths"][index], saved["images"][index]
                mask = saved["masks"][index] if "masks" in saved else None
                tiles: dict[str, str | None] = {"Image": figures.picture(image)}
                if mask is not None:
                    tiles["Ground truth"] = figures.picture(image, mask=mask)
                for caption, found in maps.items():
                    tiles[caption] = figures.picture(image, found[path], mask) if path in found else None
                yield f"{category}, {'ab' * int(saved['labels'][index])}normal: {Path(path).name}", tiles


def _scatters(outcome: tables.Outcome, shown_k: int | None) -> Iterator[tuple[str, list[list[float]]]]:
    """Yield t-SNE plots of features before and after adaptation: a title, and places and labels of images."""
    for category, methods in _first(outcome, shown_k, "features.npz").items():
        for method, saved in methods.items():
            for features in ("frozen", "adapted"):
                if points := figures.embed(saved[features], saved["labels"]).tolist():
                    yield f"{category}, {method}, {features}", points
