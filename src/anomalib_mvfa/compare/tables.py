"""From the results of jobs to tables: means over seeds, their intervals, and differences from a reference.

Axes: N images, R resamples.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import CategoricalDtype, DataFrame, Series

from ..data.support import group_of
from .config import Comparison
from .job import jobs_of
from .paper import PaperTable, paper_table
from .results import JobResult, job_folder, read_arrays, read_result
from .statistics import Estimate, draw, estimate, f1, holm, image_auroc, pixel_aupr, pixel_auroc

PROTOCOLS = {
    "full_normal": "Full-normal: all normal training images",
    "few_normal": "Few-normal: K normal images",
    "few_shot": "Few-shot: K normal and K abnormal images",
    "leave_one_out": "Leave-one-out: labelled images of other categories",
    "zero_shot": "Zero-shot: no images",
    "own_split": "Own split: what the data give for training",
}
METRICS = {
    "image_AUROC": "Image AUROC (AC, anomaly classification)",
    "pixel_AUROC": "Pixel AUROC (AS, anomaly segmentation)",
    "image_F1Score": "Image F1 at the threshold",
    "pixel_AUPR": "Pixel AUPR",
    "pixel_AUPRO": "Pixel AUPRO",
    "pixel_F1Score": "Pixel F1 at the threshold",
}
TESTED = ("image_AUROC", "pixel_AUROC", "pixel_AUPR", "image_F1Score")
"""Metrics with intervals and tests."""
SIGNS = {"above": "▲", "below": "▼", "not told apart": "≈", "not comparable": "\N{MULTIPLICATION SIGN}"}
"""What a method can be in comparison with a reference, and its sign."""
AVERAGE = "Average"
SIGNIFICANCE = 0.05
COLUMN, LINE = ["metric", "k_shot", "category"], ["protocol", "method"]
LEGEND = """\
In percent: mean over seeds ± standard deviation [95 % interval of the mean over seeds and test images; of one seed,
over test images alone]. † Backbone with random weights: the scores mean nothing clinically. Differences are paired: the
same seeds and the same test images. Their p-values are adjusted for all comparisons of a column (Holm, 1979): with the
reference, or all pairs if it is just the best."""
OPTIMISTIC = "The epochs were chosen on the test images, as in the paper: the figures are optimistic."
JOB = ["method", "protocol", "category", "k_shot", "seed"]


@dataclass(frozen=True)
class Outcome:
    """A comparison and how far it has come.

    Args:
        run: Its folder.
        comparison: What was asked for.
        results: Results of all its jobs, in their order; those of jobs that have not ended are "missing".
    """

    run: Path
    comparison: Comparison
    results: list[JobResult]

    @property
    def finished(self) -> list[JobResult]:
        """The jobs that have numbers."""
        return [result for result in self.results if result.finished]

    @property
    def progress(self) -> str:
        """How many jobs have finished, failed and so on."""
        counts = Counter(job.status for job in self.results)
        return ", ".join(f"{count} {status}" for status, count in counts.most_common())

    @property
    def paper(self) -> PaperTable | None:
        """The paper's figures that stand beside."""
        return paper_table(self.comparison.paper) if self.comparison.paper else None

    @cached_property
    def images(self) -> DataFrame:
        """A line for each image that a finished job tested; the index begins with the job's name.

        Columns: method, protocol, category, k_shot, seed, group, image, label, score and predicted.
        """
        tables = {}
        for job in self.finished:
            names = {name: getattr(job, name) for name in JOB}
            scores = pd.read_csv(job_folder(self.run, job.job) / "scores.csv", dtype={"image": str})
            groups = [group_of(image, self.comparison.group_by) for image in scores.image]
            table = scores.assign(**names, group=groups).astype({"k_shot": "Int64"})
            tables[job.job] = table[[*names, "group", "image", "label", "score", "predicted"]]
        return pd.concat(tables)

    @property
    def jobs(self) -> DataFrame:
        """A line for each job, with all that its result says."""
        table = pd.json_normalize([{**asdict(job), "depends_on": json.dumps(job.depends_on)} for job in self.results])
        return table.astype({"k_shot": "Int64"})


def load(run: Path) -> Outcome:
    """Read a run's comparison and the results of its jobs.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no comparison.
        ValueError: Its comparison or a result is corrupt, or no job has given a metric.
    """
    path = run / "config.yaml"
    if not path.is_file():
        msg = f"There is no folder {str(run)!r} with a {path.name}. Give the folder that a comparison was written to."
        raise FileNotFoundError(msg)
    comparison = Comparison.load(path)
    results = [read_result(run, job.folder) or job.result(status="missing") for job in jobs_of(comparison)]
    outcome = Outcome(run, comparison, results)
    if not any(job.metrics for job in outcome.finished):
        errors = "".join(f"\n{job.job}: {job.error}" for job in [job for job in results if job.error][:3])
        msg = f"No job in {str(run)!r} has given a metric ({outcome.progress}). Run the comparison first.{errors}"
        raise ValueError(msg)
    return outcome


def cells(outcome: Outcome, resamples: int = 1000) -> DataFrame:
    """Return a line per metric, K, category and method, in the order of tables; several categories have an average.

    Columns:
        metric, k_shot, category, protocol, method: Methods without shots are in the table of every K.
        mean, sd, low, high: Over seeds; the 95 % interval is NaN where there is none.
        seeds: How many the mean is over.
        random_weights: Whether a job's backbone had random weights.
        trivial: F1 of calling everything abnormal; NaN for other metrics.
        paper: The paper's figure, or NaN.
        reference, difference, difference_low, difference_high: The method's mean less the reference's, over the seeds
            that both have. Of one, the interval is over images alone.
        p: Of the difference, adjusted for all comparisons of the column (Holm, 1979).
        verdict: "reference", one of ``SIGNS``, or "".
        sentence: What the comparison says, or why there is no figure.
    """
    comparison, paper = outcome.comparison, outcome.paper
    values = DataFrame(_values(outcome, resamples)).astype({"k_shot": "Int64"})
    parts = [
        values[values.k_shot.isna() | (values.k_shot == k_shot)].assign(k_shot=k_shot)
        for k_shot in [*values.k_shot.dropna().unique()] or [pd.NA]
    ]
    parts += [_average(lines) for part in parts for _, lines in part.groupby("metric")]
    orders: dict[str, Iterable[str]] = {
        "metric": dict.fromkeys([*METRICS, *sorted(values.metric)]),
        "category": [*comparison.sources(), AVERAGE],
        "protocol": PROTOCOLS,
        "method": comparison.methods,
    }
    ordered = {name: CategoricalDtype([*order], ordered=True) for name, order in orders.items()}
    groups = pd.concat(parts).astype(ordered).groupby([*COLUMN, *LINE], observed=True, dropna=False)
    table = groups.agg(
        categories=("categories", "first"),
        mean=("value", "mean"),
        sd=("value", "std"),
        seeds=("value", "count"),
        random_weights=("random_weights", "any"),
        trivial=("trivial", "mean"),
    ).reset_index()
    found = [lines.dropna(subset="value") for _, lines in groups]
    table[["low", "high"]] = [(mean.low, mean.high) for mean in map(_estimate, found)]
    table["paper"] = [
        paper.figure(line.metric, line.method, line.protocol, line.k_shot, line.categories)
        if paper and line.seeds and not line.random_weights
        else np.nan
        for line in table.itertuples()
    ]
    why = np.where(table.category == AVERAGE, "not all categories", "undefined, as all images are of one kind")
    table = table.assign(reference="", verdict="", sentence=np.where(table.seeds == 0, why, ""))
    table[["difference", "difference_low", "difference_high", "p"]] = np.nan
    columns = table[table.metric.isin(TESTED)].groupby(COLUMN, observed=True, dropna=False)
    compared = {index: line for _, column in columns for index, line in _compare(column, found, comparison.reference)}
    table.update(DataFrame.from_dict(compared, orient="index"))
    return table


def _values(outcome: Outcome, resamples: int) -> Iterator[dict[str, Any]]:
    """Yield each metric of each finished job, as it came out and on resampled images, the same for all jobs."""
    draws = {}
    for category, groups in outcome.images.groupby("category").group:
        names = sorted({*groups})
        draws[category] = DataFrame(draw(len(names), resamples, list(str(category).encode())).T, names)
    for job in outcome.finished:
        table, pixels = outcome.images.loc[job.job], job_folder(outcome.run, job.job) / "pixels.npz"
        weights, labels = draws[job.category].loc[table.group].to_numpy().T, table.label.to_numpy()
        resampled = {
            "image_AUROC": image_auroc(table.score.to_numpy(), labels, weights),
            "image_F1Score": f1(table.predicted.to_numpy(float), labels, weights),
        }
        abnormal = {"image_F1Score": labels.mean()}
        counted = {"groups": table.group.nunique(), "rare": table.groupby("label").group.nunique().min()}
        if pixels.is_file():
            counts = read_arrays(pixels)["counts"].astype(float)
            resampled["pixel_AUROC"] = pixel_auroc(counts, weights)
            resampled["pixel_AUPR"] = pixel_aupr(counts, weights)
            abnormal["pixel_F1Score"] = counts[:, 1].sum() / counts.sum()
        for metric, value in job.metrics.items():
            yield {
                **{name: getattr(job, name) for name in (*JOB, "random_weights")},
                **counted,
                "categories": [job.category],
                "test_set": str(job.test_set),
                "metric": metric,
                "value": value,
                "resampled": resampled.get(metric, np.full(resamples, np.nan)),
                "trivial": 2 / (1 + 1 / abnormal.get(metric, np.nan)),
            }


def _average(values: DataFrame) -> DataFrame:
    """Return averages over several categories that have the metric, by method and seed; NaN where one is missing."""
    names = values.category[values.value.notna()].unique()

    def mean(found: Series) -> float:
        return found.sum(min_count=len(names)) / len(names)

    means = {
        "categories": ("category", list),
        "test_set": ("test_set", ",".join),
        "value": ("value", mean),
        "resampled": ("resampled", lambda found: np.mean(list(found), axis=0)),
        "groups": ("groups", "sum"),
        "rare": ("rare", lambda found: len(found) * found.min()),
        "trivial": ("trivial", mean),
        "random_weights": ("random_weights", "any"),
    }
    lines = values[values.category.isin(names) & (len(names) > 1)]
    averages = lines.groupby(["metric", "k_shot", *LINE, "seed"], dropna=False).agg(**means).reset_index()
    return averages.assign(category=AVERAGE)


def _estimate(seeds: DataFrame, difference: bool = False) -> Estimate:
    if seeds.empty:
        return Estimate(np.nan)
    points, resampled = seeds.value.to_numpy(), np.stack([*seeds.resampled])
    return estimate(points, resampled, seeds.groups.max(), seeds.rare.min(), difference=difference)


def _difference(one: DataFrame, other: DataFrame) -> DataFrame:
    """Return the differences of two methods on the seeds that tested both on the same images."""
    both = one.merge(other, on=["seed", "test_set"], suffixes=("", "_other"))
    return both.assign(value=both.value - both.value_other, resampled=both.resampled - both.resampled_other)


def _compare(column: DataFrame, found: list[DataFrame], named: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield index and comparison of a column's lines with the reference: the named method, or else the best.

    Args:
        column: Lines of :func:`cells` for a metric, K and category.
        found: What each line of the whole table is the mean of.
        named: The reference that is asked for.
    """
    there = column[column.seeds > 0].reset_index().set_index("method")
    if len(there) < 2:
        return
    able = there.index if there.random_weights.all() else there.index[~there.random_weights]
    reference = named or there["mean"][able].idxmax()
    pairs = [(method, reference) for method in able if method != reference and reference in able]
    if not named:  # the numbers themselves choose the best, so that any pair may be compared
        pairs += [pair for pair in combinations(able, 2) if reference not in pair]
    paired = {pair: _difference(*(found[there["index"][method]] for method in pair)) for pair in pairs}
    estimates = {pair: _estimate(differences, difference=True) for pair, differences in paired.items()}
    adjusted = dict(zip(pairs, holm([difference.p for difference in estimates.values()]), strict=True))
    for method, index in there["index"].items():
        pair, line = (method, reference), {"reference": reference, "verdict": "not comparable"}
        if method == reference:
            line["verdict"] = "reference"
        elif pair in pairs and np.isfinite(adjusted[pair]):
            line |= _verdict(method, reference, estimates[pair], adjusted[pair], len(paired[pair]))
        else:
            why = "random weights" if reference in there.index else f"{reference} has no figure here"
            if pair in pairs:
                why = "no seed has the same test images" if paired[pair].empty else "there are too few test images"
            line["sentence"] = f"{method} is not comparable with {reference}: {why}."
        yield index, line


def _verdict(method: str, reference: str, difference: Estimate, p: float, seeds: int) -> dict[str, Any]:
    """Return what :func:`cells` says of a difference over so many seeds; p is adjusted."""
    verdict = "not told apart" if p >= SIGNIFICANCE else "above" if difference.value > 0 else "below"
    sign = -100 if verdict == "below" else 100
    low, points, high = sorted(sign * value for value in (difference.low, difference.value, difference.high))
    sentence = f"{method} is not told apart from {reference}: " if verdict == "not told apart" else ""
    sentence = sentence or f"{method} is {verdict} {reference} by "
    sentence += f"{points:.1f} points [{low:.1f}, {high:.1f}], adjusted p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    sentence += ", over test images alone, as there is one seed." if seeds == 1 else "."
    ends = {"difference_low": difference.low, "difference_high": difference.high}
    return {"difference": difference.value, **ends, "p": p, "verdict": verdict, "sentence": sentence}


def _texts(table: DataFrame) -> Iterator[tuple[str, DataFrame, list[str]]]:
    """Yield title, table of text (methods by categories) and sentences for each metric and K of :func:`cells`."""
    for _, rows in table.groupby(["metric", "k_shot"], observed=True, dropna=False):
        metric, k_shot = rows[["metric", "k_shot"]].iloc[0]
        wide = rows.assign(text=rows.apply(_text, axis=1)).pivot_table("text", LINE, "category", "first", observed=True)
        wide = wide.fillna("-").set_axis([*wide.columns], axis=1).reset_index()
        wide["protocol"] = [PROTOCOLS[name].partition(":")[0] for name in wide.protocol]
        wide["method"] = [f"{name} †" if name in {*rows.method[rows.random_weights]} else name for name in wide.method]
        wide = wide.rename(columns={"protocol": "Learns from", "method": "Method"})
        title = METRICS.get(metric, metric) + ("" if pd.isna(k_shot) else f", K = {k_shot}")
        compared = rows[rows.verdict.isin(SIGNS)]
        yield title, wide, [f"{line.category}: {line.sentence}" for line in compared.itertuples()]


def _text(row: Series) -> str:
    text = "n/a" if np.isnan(row["mean"]) else f"{100 * row['mean']:.2f}"
    text += "" if np.isnan(row.sd) else f" ± {100 * row.sd:.2f}"
    text += "" if np.isnan(row.low) else f" [{100 * row.low:.2f}, {100 * row.high:.2f}]"
    beside = {"paper": row.paper, "all abnormal": row.trivial}
    return text + "".join(f" ({name} {100 * value:.2f})" for name, value in beside.items() if not np.isnan(value))


def to_markdown(outcome: Outcome, table: DataFrame) -> str:
    """Return the tables of :func:`cells` and what the comparisons say as a document."""
    parts = [f"# {_plain(outcome.comparison.title)}", _legend(outcome)]
    for title, wide, sentences in _texts(table):
        head = [wide.columns, ["---", "---", *["---:"] * (len(wide.columns) - 2)]]
        lines = [" | ".join(line) for line in [*head, *wide.map(_plain).to_numpy()]]
        parts += [f"## {_plain(title)}", "\n".join(f"| {line} |" for line in lines)]
        parts += ["\n".join(f"- {_plain(sentence)}" for sentence in sentences)]
    parts += ["## Jobs", f"{outcome.progress}."]
    parts += ["\n".join(f"- {_plain(f'{job.job}: {job.error}')}" for job in outcome.results if job.error)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _legend(outcome: Outcome) -> str:
    optimistic = f"\n{OPTIMISTIC}" if outcome.comparison.select_epoch_on_test else ""
    return LEGEND + optimistic + (f"\nPaper: {outcome.paper.note}" if outcome.paper else "")


def _plain(text: str) -> str:
    """Escape what Markdown, or the HTML in it, would take for markup."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(escape(text, quote=False).split()))


def to_latex(outcome: Outcome, table: DataFrame) -> str:
    """Return the tables of :func:`cells` for the LaTeX package booktabs, each after a comment that names it."""
    needed = "Needs the package booktabs, and fontenc with T1 for names with < > |"
    parts = [f"% {line}" for line in (needed, *_legend(outcome).splitlines())]
    for title, wide, _ in _texts(table):
        shape = "ll" + "r" * (len(wide.columns) - 2)
        parts += ["", f"% {' '.join(title.split())}", wide.to_latex(index=False, escape=True, column_format=shape)]
    return "\n".join(parts)
