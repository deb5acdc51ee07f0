"""From the rows of jobs to tables: means over seeds, intervals over test images, and ranks.

A cell is what one method did on one category with one K, over all seeds.
"""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..data.bmad import CATEGORIES
from ..data.support import group_of
from .bootstrap import Scores, bootstrap
from .paper import PaperTable
from .results import Row, job_folder, read_rows

PROTOCOLS = {
    "full_normal": "Full-normal: all normal training images",
    "few_normal": "Few-normal: K normal images",
    "few_shot": "Few-shot: K normal and K abnormal images",
    "leave_one_out": "Leave-one-out: labelled images of other categories",
    "zero_shot": "Zero-shot: no images",
}
MAIN = {
    "image_AUROC": "Image AUROC (AC, anomaly classification)",
    "pixel_AUROC": "Pixel AUROC (AS, anomaly segmentation)",
}
OTHERS = {
    "image_F1Score": "Image F1 at the threshold",
    "pixel_AUPR": "Pixel AUPR",
    "pixel_AUPRO": "Pixel AUPRO",
    "pixel_F1Score": "Pixel F1 at the threshold",
}


@dataclass(frozen=True)
class Outcome:
    """What a run was asked for, and the jobs of it that have ended.

    Args:
        title: Heading of the report.
        paper: Name of a table of the paper, or None.
        methods: Settings by name, in the order of tables.
        categories: In the order of tables.
        k_shots: Each K that was asked for.
        seeds: Each seed that was asked for.
        group_by: See :func:`~anomalib_mvfa.compare.bootstrap.bootstrap`.
        rows: Finished jobs, in the order of tables.
        failed: Failed jobs, likewise.
        only: Categories of methods that are not for all, by method.
    """

    title: str
    paper: str | None
    methods: list[str]
    categories: list[str]
    k_shots: list[int]
    seeds: list[int]
    group_by: str | None
    rows: list[Row]
    failed: list[Row]
    only: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A metric, as it came out.

    Args:
        mean: Over seeds, in [0, 1].
        spread: Standard deviation over seeds; None for one seed.
        interval: 95 % interval of the mean over resampled test images; of AUROC only.
    """

    mean: float
    spread: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Summary:
    """A cell: one method on one category with one K.

    Args:
        method: Its name.
        protocol: What it learns from.
        category: What was tested.
        k_shot: K, or None where the protocol has no shots.
        rows: The finished jobs, one per seed.
        figures: By metric.
        images: How many test images are "normal" and "abnormal", and from how many "groups"; empty without scores.
    """

    method: str
    protocol: str
    category: str
    k_shot: int | None
    rows: list[Row]
    figures: dict[str, Figure]
    images: dict[str, int] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Seeds that the mean is over."""
        return [row.seed for row in self.rows]

    @property
    def random_weights(self) -> bool:
        """Whether any of the jobs had a backbone with random weights."""
        return any(row.random_weights for row in self.rows)


@dataclass
class Cell:
    """A cell of a table.

    Args:
        figure: What came out; None where nothing did.
        paper: The paper's figure in [0, 1], if there is one to compare with.
        rank: 1 and 2 for the best and the second of a column.
        seeds: How many the mean is over.
        missing: How many seeds, or of an average categories, are still missing.
    """

    figure: Figure | None = None
    paper: float | None = None
    rank: int | None = None
    seeds: int = 0
    missing: int = 0


@dataclass
class Line:
    """A line of a table.

    Args:
        method: Its name.
        protocol: What it learns from.
        k_shot: K, or None where the protocol has no shots.
        random_weights: Whether its backbone had random weights in any job of the line.
        cells: By category.
        average: Over the categories.
    """

    method: str
    protocol: str
    k_shot: int | None
    random_weights: bool
    cells: dict[str, Cell]
    average: Cell


@dataclass
class Table:
    """Methods by categories, for one metric and one K.

    Args:
        metric: By anomalib's name.
        k_shot: K of the methods that have shots; None if none has.
        categories: Those with this metric.
        lines: Grouped by protocol.
        unlike: Categories whose test images are not the same in all lines, so that lines are not ranked.
    """

    metric: str
    k_shot: int | None
    categories: list[str]
    lines: list[Line]
    unlike: list[str]


def read_outcome(run: Path) -> Outcome:
    """Read a run's config and rows; those that the config no longer asks for are left out.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no outcome.
        ValueError: No job has finished.
    """
    if not run.is_dir():
        msg = f"There is no folder {str(run)!r}. Give the folder that a comparison was written to."
        raise FileNotFoundError(msg)
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else None
    if not isinstance(config, dict) or not isinstance(config.get("methods"), dict):
        msg = (
            f"{str(run)!r} holds no comparison: {path.name} is missing, or has no methods. Give the folder that a "
            "comparison was written to."
        )
        raise FileNotFoundError(msg)
    methods = [str(name) for name in config["methods"]]
    only = {
        name: method["categories"] for name, method in config["methods"].items() if (method or {}).get("categories")
    }
    asked = {"method": methods, "category": config.get("categories"), "seed": config.get("seeds")}
    k_shots = config.get("k_shots") or []
    rows = [
        row
        for row in read_rows(run)
        if all(values is None or getattr(row, name) in values for name, values in asked.items())
        and (row.k_shot is None or not k_shots or row.k_shot in k_shots)
        and row.category in only.get(row.method, [row.category])
    ]
    finished = [row for row in rows if row.error is None]
    if not finished:
        errors = "".join(f"\n{row.job}: {row.error}" for row in rows[:3])
        msg = f"No job in {str(run)!r} has finished, {len(rows)} failed. Run the comparison first.{errors}"
        raise ValueError(msg)
    categories = list(config.get("categories") or _ordered({row.category for row in rows}, list(CATEGORIES)))

    def key(row: Row) -> tuple[int, ...]:
        return methods.index(row.method), categories.index(row.category), row.k_shot or 0, row.seed

    return Outcome(
        title=str(config.get("title") or run.resolve().name),
        paper=config.get("paper"),
        methods=methods,
        categories=categories,
        k_shots=list(k_shots),
        seeds=list(config.get("seeds") or []),
        group_by=config.get("group_by"),
        rows=sorted(finished, key=key),
        failed=sorted((row for row in rows if row.error is not None), key=key),
        only=only,
    )


def _ordered(names: set[str], order: Sequence[str]) -> list[str]:
    return [name for name in order if name in names] + sorted(names - {*order})


def summarise(run: Path, rows: Sequence[Row], group_by: str | None = None, resamples: int = 1000) -> list[Summary]:
    """Return the cells of finished jobs: means and spreads over seeds, and intervals over test images.

    Args:
        run: Folder of the run, which has the scores of each job.
        rows: Finished jobs.
        group_by: See :func:`~anomalib_mvfa.compare.bootstrap.bootstrap`.
        resamples: Number of resamples of the bootstrap.
    """
    cells: dict[tuple[str, str, str, int | None], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.method, row.protocol, row.category, row.k_shot), []).append(row)
    return [_summary(run, *key, jobs, group_by, resamples) for key, jobs in cells.items()]


def _summary(
    run: Path,
    method: str,
    protocol: str,
    category: str,
    k_shot: int | None,
    rows: list[Row],
    group_by: str | None,
    resamples: int,
) -> Summary:
    files = [job_folder(run, row.job) / "scores.npz" for row in rows]
    scores = [Scores.load(file) for file in files if file.is_file()]
    intervals: dict[str, list[float]] = {}
    images = {}
    if scores and len(scores) == len(rows):  # an interval of the mean needs every run's scores
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # normal or abnormal test images only
            intervals = bootstrap(scores, group_by, resamples)
        labels = scores[0].labels
        images = {"normal": labels.count(0), "abnormal": labels.count(1)}
        images["groups"] = len({group_of(path, group_by) for path in scores[0].paths})
    figures = {}
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        values = [*_by_seed(rows, name).values()]
        if not values:
            continue
        low, high = intervals.get(name, (math.nan, math.nan))
        figures[name] = Figure(
            mean=statistics.fmean(values),
            spread=statistics.stdev(values) if len(values) > 1 else None,
            interval=None if math.isnan(low) else (low, high),
        )
    return Summary(method, protocol, category, k_shot, rows, figures, images)


def lacking(outcome: Outcome) -> list[tuple[str, str | None, int | None, list[int]]]:
    """Return what was asked for and has not ended: method, category, K and seeds.

    Of a method none of whose jobs has ended, it is not known whether it has shots: category and K are None.
    """
    ended = outcome.rows + outcome.failed
    lack: list[tuple[str, str | None, int | None, list[int]]] = []
    for method in outcome.methods:
        categories = [name for name in outcome.categories if name in outcome.only.get(method, outcome.categories)]
        own = [row for row in ended if row.method == method]
        if not own and categories:
            lack.append((method, None, None, outcome.seeds))
            continue
        for category in categories:
            for k_shot in [None] if own[0].k_shot is None else outcome.k_shots:
                there = {row.seed for row in own if (row.category, row.k_shot) == (category, k_shot)}
                if seeds := [seed for seed in outcome.seeds if seed not in there]:
                    lack.append((method, category, k_shot, seeds))
    return lack


def _by_seed(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Return a metric's values, without undefined ones: AUROC is, where all test images are normal or all abnormal."""
    return {row.seed: row.metrics[metric] for row in rows if not math.isnan(row.metrics.get(metric, math.nan))}


def shots(summaries: Sequence[Summary]) -> list[int | None]:
    """Return each K, in order; ``[None]`` if no method has shots."""
    found = sorted({cell.k_shot for cell in summaries if cell.k_shot is not None})
    return [*found] or [None]


def unlike_categories(summaries: Sequence[Summary], outcome: Outcome) -> list[str]:
    """Return the categories where cells of one table were tested on other images with the same seed.

    With another seed or K the images may well be others, where the support is drawn from among them.
    """
    unlike = set()
    for k_shot in shots(summaries):
        tested: dict[tuple[str, int], set[str | None]] = {}
        for row in [row for cell in summaries if cell.k_shot in (k_shot, None) for row in cell.rows]:
            tested.setdefault((row.category, row.seed), set()).add(row.test_set)
        unlike |= {category for (category, _), sets in tested.items() if len(sets) > 1}
    return [name for name in outcome.categories if name in unlike]


def tabulate_all(
    summaries: Sequence[Summary],
    outcome: Outcome,
    k_shot: int | None,
    paper: PaperTable | None = None,
) -> dict[str, Table]:
    """Return the tables of all metrics that there are for one K, by title; see :func:`tabulate`."""
    unknown = sorted({name for cell in summaries for name in cell.figures} - {*MAIN, *OTHERS})
    titles = MAIN | OTHERS | {name: name for name in unknown}
    tables = {title: tabulate(summaries, outcome, name, k_shot, paper) for name, title in titles.items()}
    return {title: table for title, table in tables.items() if table.lines}


def tabulate(
    summaries: Sequence[Summary],
    outcome: Outcome,
    metric: str,
    k_shot: int | None,
    paper: PaperTable | None = None,
) -> Table:
    """Put the cells of one metric and one K in a table, with ranks; methods without shots are in the table of every K.

    Args:
        summaries: All cells.
        outcome: Gives the order.
        metric: By anomalib's name.
        k_shot: K.
        paper: Figures to put beside.
    """
    chosen = [cell for cell in summaries if metric in cell.figures and cell.k_shot in (k_shot, None)]
    categories = [name for name in outcome.categories if name in {cell.category for cell in chosen}]
    order = _ordered({cell.protocol for cell in chosen}, list(PROTOCOLS))
    lines = []
    for protocol in order:
        for method in outcome.methods:
            cells = {cell.category: cell for cell in chosen if (cell.method, cell.protocol) == (method, protocol)}
            if cells:
                lines.append(_line(method, protocol, cells, categories, outcome, metric, paper))
    unlike = [name for name in unlike_categories(chosen, outcome) if name in categories]
    ranked = [line for line in lines if not line.random_weights] or lines
    for name in categories:
        if name not in unlike:
            _rank([line.cells[name] for line in ranked])
    if not unlike:
        _rank([line.average for line in ranked])
    return Table(metric, k_shot, categories, lines, unlike)


def _line(
    method: str,
    protocol: str,
    summaries: Mapping[str, Summary],
    categories: Sequence[str],
    outcome: Outcome,
    metric: str,
    paper: PaperTable | None,
) -> Line:
    random_weights = any(cell.random_weights for cell in summaries.values())
    level = metric.removesuffix("_AUROC")
    first = next(iter(summaries.values()))
    if random_weights or level not in ("image", "pixel"):
        paper = None
    cells = {}
    for name in categories:
        if name in summaries:
            found = summaries[name]
            missing = len({*outcome.seeds} - {*found.seeds})
            cells[name] = Cell(found.figures[metric], seeds=len(found.seeds), missing=missing)
        else:
            cells[name] = Cell()
        if paper:
            cells[name].paper = _share(paper.figure(level, method, protocol, first.k_shot, name))
    average = _average(summaries, categories, metric)
    if paper:
        tested = {row.category for row in outcome.rows}
        average.paper = _share(paper.average(level, method, protocol, first.k_shot, categories, tested))
    return Line(method, protocol, first.k_shot, random_weights, cells, average)


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _average(summaries: Mapping[str, Summary], categories: Sequence[str], metric: str) -> Cell:
    """Average over all categories, or nothing: averages over different categories can't be compared."""
    missing = len(categories) - len(summaries)
    if missing:
        return Cell(missing=missing)
    mean = statistics.fmean(cell.figures[metric].mean for cell in summaries.values())
    by_seed = [_by_seed(cell.rows, metric) for cell in summaries.values()]
    seeds = by_seed[0].keys()
    spread = None
    if len(seeds) > 1 and all(values.keys() == seeds for values in by_seed):
        spread = statistics.stdev(statistics.fmean(values[seed] for values in by_seed) for seed in seeds)
    return Cell(Figure(mean, spread), seeds=len(seeds))


def _rank(cells: Sequence[Cell]) -> None:
    """Mark best and second; figures that look equal share a rank, and one alone is not the best of anything."""
    there = [(round(100 * cell.figure.mean, 2), cell) for cell in cells if cell.figure]
    if len(there) < 2:
        return
    for rank, value in enumerate(sorted({value for value, _ in there}, reverse=True)[:2], start=1):
        for _, cell in [entry for entry in there if entry[0] == value]:
            cell.rank = rank
