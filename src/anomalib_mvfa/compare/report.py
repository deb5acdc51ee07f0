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

SHOWN_K = 4
"""K of the images, as in the paper's figures; the largest one where there is none of 4."""
SHOWN_IMAGES = (4, 2)
"""How many abnormal and normal images of a category are shown at most."""
LEVEL_IMAGES = (2, 0)
MAIN = ("image_AUROC", "pixel_AUROC")
"""Metrics whose tables and verdicts are open from the start."""
UNITS = {"s": ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")), "": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))}
UNITS["MiB"] = ((1024, "GiB"), (1, "MiB"))


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
        "results.md": tables.to_markdown(cells),
        "results.tex": tables.to_latex(cells),
        "index.html": render(run, outcome, cells, images, resamples),
    }
    for name, text in files.items():
        with atomic_write(run / "report" / name) as partial:
            partial.write_text(text, "utf-8", errors="backslashreplace")  # names of files may be no text
    return run / "report" / "index.html"


def render(run: Path, outcome: tables.Outcome, cells: pd.DataFrame, images: pd.DataFrame, resamples: int) -> str:
    """Return the page.

    Args:
        run: Folder of the run, for pictures and features.
        outcome: What was compared.
        cells: See :func:`~anomalib_mvfa.compare.tables.cells`.
        images: See :func:`~anomalib_mvfa.compare.tables.per_image`.
        resamples: Number of resamples behind the intervals.
    """
    finished = outcome.finished
    shots = sorted(cells.k_shot.dropna().astype(int).unique().tolist())
    shown_k = SHOWN_K if SHOWN_K in shots else max(shots, default=None)
    random = {result.method for result in finished if result.random_weights}
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
        "named": lambda method: breakable(method) + Markup("&nbsp;†") * (method in random),
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f}",
        "points": lambda share: f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}"),
        "scaled": scaled,
        "by": lambda frame, column: {getattr(line, column): line for line in frame.itertuples()},
        "parts": lambda frame, *columns: frame.groupby([*columns] if columns[1:] else columns[0], sort=False, dropna=False),
    }
    return environment.get_template("report.html.jinja").render(
        config=outcome.config,
        results=outcome.results,
        finished=finished,
        cells=cells.join(tables.sentences(cells).rename("sentence")),
        images=images,
        lacking=tables.lacking(outcome),
        resamples=resamples,
        paper=paper_table(outcome.config["paper"]) if outcome.config.get("paper") else None,
        titles=tables.METRICS,
        protocols=tables.PROTOCOLS,
        main=MAIN,
        shots=shots,
        shown_k=shown_k,
        charts=_charts(cells, list(outcome.config["methods"])),
        markers=figures.MARKERS,
        outline=figures.OUTLINE,
        chart=figures.CHART,
        side=figures.SIDE,
        each=_each,
        **_pictures(run, outcome, shown_k),
        costs=_costs(outcome),
    )


def breakable(name: str) -> Markup:
    """Return a name that may break after underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def scaled(value: float, unit: str) -> str:
    """Return a time in seconds ("s"), a memory in MiB ("MiB") or a count (""), to two or three digits."""
    if pd.isna(value):
        return "–"
    scale, name = next(((scale, name) for scale, name in UNITS[unit] if value >= scale), UNITS[unit][-1])
    digits = 0 if value / scale >= 100 or not name else 1 if value / scale >= 10 else 2
    return f"{value / scale:.{digits}f} {name}".rstrip()


def _each(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetition, in their order; those that are None or empty are left out."""
    return [value for value in dict.fromkeys(values) if value not in (None, "")]


def _charts(cells: pd.DataFrame, methods: list[str]) -> list[dict[str, Any]]:
    """Return AUROC against K of each metric and category that has more than one K."""
    known = cells[cells.metric.isin(MAIN) & cells["mean"].notna() & cells.k_shot.notna()]
    return [
        {"metric": metric, "category": category, **figures.shots_chart(part, methods)}
        for (metric, category), part in known.groupby(["metric", "category"], sort=False)
        if part.k_shot.nunique() > 1
    ]


def _pictures(run: Path, outcome: tables.Outcome, shown_k: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return the methods side by side, the maps of levels, and t-SNE plots; one category after the other."""
    found: dict[str, list[dict[str, Any]]] = {"grids": [], "levels": [], "scatters": []}
    for category in outcome.categories:
        pictures = _first(run, outcome, category, shown_k, "pictures.npz")
        if pictures:
            found["grids"].append({"category": category, "method": None, "strips": _side_by_side(pictures)})
        for method, saved in pictures.items():
            if len(saved["levels"]):
                strips = [_levels(saved, index) for index in _chosen(saved["labels"], LEVEL_IMAGES)]
                found["levels"].append({"category": category, "method": method, "strips": strips})
        for method, saved in _first(run, outcome, category, shown_k, "features.npz").items():
            if _spread_out(saved):
                shown = figures.drawn(len(saved["labels"]))
                plots = {name: figures.embed(saved[name][shown]).tolist() for name in ("frozen", "adapted")}
                labels, all_images = saved["labels"][shown].tolist(), len(saved["labels"])
                found["scatters"].append(
                    {"category": category, "method": method, "plots": plots, "labels": labels, "images": all_images}
                )
    return found


def _first(
    run: Path, outcome: tables.Outcome, category: str, k_shot: int | None, file: str
) -> dict[str, dict[str, np.ndarray]]:
    """Return a file of each method's first seed that has it, by method."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for result in outcome.finished:
        path = job_folder(run, result.job) / file
        is_shown = result.category == category and result.k_shot in (k_shot, None)
        if is_shown and result.method not in found and path.is_file():
            found[result.method] = read_arrays(path)
    return found


def _chosen(labels: np.ndarray, most: tuple[int, int]) -> list[int]:
    """Return indices of images: abnormal ones first, then normal ones."""
    kinds = np.flatnonzero(labels)[: most[0]], np.flatnonzero(labels == 0)[: most[1]]
    return np.concatenate(kinds).tolist() or list(range(min(sum(most), len(labels))))


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


def _costs(outcome: tables.Outcome) -> pd.DataFrame:
    """Return medians over categories and seeds, of each method, K and device."""
    keys = ["method", "k_shot", "device"]
    costs = pd.DataFrame(
        [
            {
                **{key: getattr(result, key) for key in keys},
                **{name: result.seconds.get(name) for name in ("fit", "image")},
                **{name: result.parameters.get(name) for name in ("all", "trained")},
                "memory": result.memory_mb,
            }
            for result in outcome.finished
        ]
    ).astype(dict.fromkeys(("fit", "image", "all", "trained", "memory"), float))
    groups = costs.groupby(keys, sort=False, dropna=False)
    return groups.median().assign(jobs=groups.size()).reset_index()
