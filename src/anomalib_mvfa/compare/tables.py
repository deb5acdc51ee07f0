"""From the results of jobs to tables: means over seeds, their intervals, and differences from a reference.

Axes: N images, R resamples.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pandas import DataFrame, Series

from ..data.bmad import CATEGORIES
from ..data.support import group_of
from .paper import paper_table
from .results import JobResult, job_folder, read_arrays, read_results
from .statistics import Estimate, draw, estimate, f1, holm, image_auroc, pixel_auroc

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
TESTED = ("image_AUROC", "pixel_AUROC", "image_F1Score")
"""Metrics with intervals and tests."""
AVERAGE = "Average"
SIGNIFICANCE = 0.05
NOT_COMPARED = {
    **dict.fromkeys(["reference", "verdict", "why"], ""),
    **dict.fromkeys(["difference", "difference_low", "difference_high", "p"], np.nan),
    "paired": 0,
}
JOB = ["method", "protocol", "category", "k_shot", "seed"]
LINE = ["protocol", "method"]
LEGEND = """\
In percent: mean over seeds ± standard deviation [95 % interval of the mean over seeds and test images; of one seed,
over test images alone]. † Backbone with random weights: the scores mean nothing clinically. ‡ Epoch chosen on the test
images, which is optimistic. Differences are paired: the same seeds and the same test images. Their p-values are
adjusted for all comparisons of a column (Holm, 1979): with the reference, or all pairs if it is just the best."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that spreadsheets take for a formula."""


@dataclass(frozen=True)
class Outcome:
    """What a run was asked for, and the jobs of it that have ended.

    Args:
        run: Its folder.
        config: The comparison, with all its keys.
        categories: In the order of tables.
        results: Jobs that have ended, in the order of tables.
    """

    run: Path
    config: dict[str, Any]
    categories: list[str]
    results: list[JobResult]

    @property
    def finished(self) -> list[JobResult]:
        """The jobs that have numbers."""
        return [result for result in self.results if result.finished]

    def categories_of(self, method: str) -> list[str]:
        """Return the categories that a method was asked for."""
        only = (self.config["methods"][method] or {}).get("categories") or self.categories
        return [name for name in self.categories if name in only]


def load(run: Path) -> Outcome:
    """Read a run's config and results; those that the config no longer asks for are left out.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no comparison.
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
    methods, k_shots, seeds = list(config["methods"]), config.get("k_shots"), config.get("seeds")
    found = [result for result in read_results(run) if result.method in methods]
    categories = config.get("categories") or _ordered({result.category for result in found}, CATEGORIES)
    outcome = Outcome(run, config, list(categories), [])
    for result in found:
        asked = result.category in outcome.categories_of(result.method) and (not seeds or result.seed in seeds)
        if asked and (result.k_shot is None or not k_shots or result.k_shot in k_shots):
            outcome.results.append(result)
    outcome.results.sort(
        key=lambda job: (methods.index(job.method), categories.index(job.category), job.k_shot or 0, job.seed)
    )
    if not outcome.finished:
        errors = "".join(f"\n{result.job}: {result.error}" for result in outcome.results[:3])
        msg = f"No job in {str(run)!r} has finished, {len(outcome.results)} failed. Run the comparison first.{errors}"
        raise ValueError(msg)
    return outcome


def _ordered(names: Collection[str], order: Collection[str]) -> list[str]:
    return [name for name in order if name in names] + sorted({*names} - {*order})


def lacking(outcome: Outcome) -> list[tuple[str, str | None, int | None, list[int]]]:
    """Return what was asked for and has not ended: method, category, K and seeds.

    Of a method none of whose jobs has ended, it is not known whether it has shots: category and K are None.
    """
    asked = outcome.config.get("seeds") or []
    lack: list[tuple[str, str | None, int | None, list[int]]] = []
    for method in outcome.config["methods"]:
        own = [result for result in outcome.results if result.method == method]
        if not own and outcome.categories_of(method):
            lack.append((method, None, None, asked))
            continue
        for category in outcome.categories_of(method):
            for k_shot in [None] if own[0].k_shot is None else outcome.config.get("k_shots") or []:
                there = {job.seed for job in own if (job.category, job.k_shot) == (category, k_shot)}
                if seeds := [seed for seed in asked if seed not in there]:
                    lack.append((method, category, k_shot, seeds))
    return lack


def per_image(outcome: Outcome) -> DataFrame:
    """Return a line for each image that a finished job tested.

    Columns: method, protocol, category, k_shot, seed, group, image, label, score and predicted.
    """
    tables = [_scores(outcome, job) for job in outcome.finished]
    return pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)


def _scores(outcome: Outcome, job: JobResult) -> DataFrame:
    path = job_folder(outcome.run, job.job) / "scores.csv"
    columns = ["image", "label", "score", "predicted"]
    table = pd.read_csv(path, dtype={"image": str}) if path.is_file() else DataFrame(columns=columns)
    groups = [group_of(image, outcome.config.get("group_by")) for image in table.image]
    named = table.assign(**{name: getattr(job, name) for name in JOB}, group=groups)
    return named[[*JOB, "group", *columns]].astype({"k_shot": "Int64"})


def _values(outcome: Outcome, resamples: int) -> Iterator[dict[str, Any]]:
    """Yield each metric of each finished job, as it came out and on resampled images, the same for all jobs."""
    scores = {job.job: _scores(outcome, job) for job in outcome.finished}
    for category in outcome.categories:
        jobs = [job for job in outcome.finished if job.category == category]
        groups = pd.Index(sorted({group for job in jobs for group in scores[job.job].group}))
        draws = draw(len(groups), resamples, list(category.encode()))
        for job in jobs:
            table = scores[job.job]
            pixels = job_folder(outcome.run, job.job) / "pixels.npz"
            counts = read_arrays(pixels)["counts"].astype(float) if pixels.is_file() else None
            resampled = _resample(table, counts, draws[:, groups.get_indexer(table.group)])
            abnormal = {"image_F1Score": table.label.mean()}
            if counts is not None:
                abnormal["pixel_F1Score"] = counts[:, 1].sum() / counts.sum()
            for metric, value in job.metrics.items():
                yield {
                    **{name: getattr(job, name) for name in (*JOB, "random_weights")},
                    "test_set": str(job.test_set),
                    "metric": metric,
                    "value": value,
                    "resampled": resampled.get(metric, np.full(resamples, np.nan)),
                    "groups": table.group.nunique(),
                    "rare": min(table.group[table.label == label].nunique() for label in (0, 1)),
                    "trivial": 2 / (1 + 1 / abnormal.get(metric, np.nan)),
                    "optimistic": job.selected_epoch is not None,
                }


def _resample(table: DataFrame, counts: np.ndarray | None, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return metrics of resamples ``(R)``, given a job's scores and how often each image is in each ``(R, N)``."""
    if table.empty:
        return {}
    labels = table.label.to_numpy(int)
    resampled = {"image_AUROC": image_auroc(table.score.to_numpy(float), labels, weights)}
    if table.predicted.notna().all():
        resampled["image_F1Score"] = f1(table.predicted.to_numpy(int), labels, weights)
    if counts is not None:
        resampled["pixel_AUROC"] = pixel_auroc(counts, weights)
    return resampled


def cells(outcome: Outcome, resamples: int = 1000) -> DataFrame:
    """Return a line per metric, K, category and method, in the order of tables; several categories have an average.

    Columns:
        metric, k_shot, category, protocol, method: Methods without shots are in the table of every K.
        mean, sd, low, high: Over seeds; the 95 % interval is NaN where there is none.
        seeds, missing: How many the mean is over, and how many of those asked for are missing.
        random_weights, optimistic: Whether a job's backbone had random weights, or its epoch was chosen on test images.
        trivial: F1 of calling everything abnormal; NaN for other metrics.
        paper: The paper's figure, or NaN.
        reference, difference, difference_low, difference_high, paired: The method's mean less the reference's, over the
            seeds that both have; how many these are. Of one, the interval is over images alone.
        p: Of the difference, adjusted for all comparisons of the column (Holm, 1979).
        verdict, why: "reference", "above", "below", "not told apart", "not comparable" and the reason, or "".
    """
    paper = paper_table(outcome.config["paper"]) if outcome.config.get("paper") else None
    tested = {job.category for job in outcome.finished}
    values = DataFrame(_values(outcome, resamples)).astype({"k_shot": "Int64"})
    values = values.sort_values("protocol", key=lambda names: names.map([*PROTOCOLS].index), kind="stable")
    rows = []
    for metric in _ordered(values.metric.unique(), METRICS):
        for k_shot in sorted(values.k_shot.dropna().unique()) or [None]:
            table = values[(values.metric == metric) & (values.k_shot.isna() | (values.k_shot == k_shot))]
            columns = {name: table[table.category == name] for name in outcome.categories}
            defined = [name for name, column in columns.items() if column.value.notna().any()]
            if len(defined) > 1:
                columns[AVERAGE] = _average(table, defined)
            for category, column in columns.items():
                for row in _column(column, outcome.config, metric in TESTED):
                    level, _, kind = metric.partition("_")
                    if paper and kind == "AUROC" and not row["random_weights"]:
                        which = level, row["method"], row["protocol"], k_shot
                        if category == AVERAGE:
                            row["paper"] = paper.average(*which, defined, tested)
                        else:
                            row["paper"] = paper.figure(*which, category)
                    rows.append({"metric": metric, "k_shot": k_shot, "category": category, **row})
    return DataFrame(rows).astype({"k_shot": "Int64"})


def _average(values: DataFrame, categories: list[str]) -> DataFrame:
    """Return averages over categories, one line per method and seed; NaN where the seed lacks one of them."""
    means = {
        "value": ("value", lambda found: found.mean() if found.count() == len(categories) else np.nan),
        "resampled": ("resampled", lambda found: np.mean(list(found), axis=0)),
        "groups": ("groups", "sum"),
        "rare": ("rare", lambda found: len(found) * found.min()),
        "trivial": ("trivial", "mean"),
        "test_set": ("test_set", ",".join),
        "random_weights": ("random_weights", "any"),
        "optimistic": ("optimistic", "any"),
    }
    counted = values[values.category.isin(categories)]
    return counted.groupby([*LINE, "seed"], sort=False).agg(**means).reset_index()


def _column(column: DataFrame, config: dict[str, Any], is_tested: bool) -> list[dict[str, Any]]:
    """Return what :func:`cells` says of the methods in a column of a table."""
    rows: dict[str, dict[str, Any]] = {}
    defined: dict[str, DataFrame] = {}
    for protocol, method in column[LINE].drop_duplicates().to_numpy():
        found = column[(column.protocol == protocol) & (column.method == method)]
        seeds = defined[method] = found.dropna(subset="value").set_index("seed")
        mean = _estimate(seeds) if len(seeds) else Estimate(np.nan)
        rows[method] = {
            "protocol": protocol,
            "method": method,
            "mean": mean.value,
            "sd": seeds.value.std(),
            "low": mean.low,
            "high": mean.high,
            "seeds": len(seeds),
            "missing": len({*(config.get("seeds") or [])} - {*seeds.index}),
            "random_weights": bool(found.random_weights.any()),
            "optimistic": bool(found.optimistic.any()),
            "trivial": seeds.trivial.mean(),
            "paper": np.nan,
            **NOT_COMPARED,
        }
        if seeds.empty:
            rows[method]["why"] = "undefined, as all images are of one kind, or missing"
    if is_tested:
        _compare(rows, defined, config.get("reference"))
    return list(rows.values())


def _estimate(seeds: DataFrame, others: DataFrame | None = None) -> Estimate:
    points, resampled = seeds.value.to_numpy(), np.stack(list(seeds.resampled))
    if others is not None:
        points, resampled = points - others.value.to_numpy(), resampled - np.stack(list(others.resampled))
    return estimate(points, resampled, seeds.groups.max(), seeds.rare.min(), difference=others is not None)


def _compare(rows: dict[str, dict[str, Any]], seeds: dict[str, DataFrame], named: str | None) -> None:
    """Fill in the differences of a column from the reference: the named method, or else the best."""
    there = [method for method in rows if len(seeds[method])]
    if len(there) < 2:
        return
    able = [method for method in there if not rows[method]["random_weights"]] or there
    reference = named or max(able, key=lambda method: rows[method]["mean"])
    pairs = [(method, reference) for method in able if method != reference]
    if not named:  # the numbers themselves choose the best, so that any pair may be compared
        pairs += [pair for pair in combinations(able, 2) if reference not in pair]
    found = {}
    for method, other in pairs if reference in able else []:
        one, two = seeds[method], seeds[other]
        common = [seed for seed in one.index.intersection(two.index) if one.test_set[seed] == two.test_set[seed]]
        if common:
            found[method, other] = len(common), _estimate(one.loc[common], two.loc[common])
    adjusted = dict(zip(found, holm([difference.p for _, difference in found.values()]), strict=True))
    for method in there:
        row, pair = rows[method], (method, reference)
        row |= {"reference": reference, "verdict": "not comparable"}
        if method == reference:
            row["verdict"] = "reference"
        elif reference not in there:
            row["why"] = f"{reference} has no figure here"
        elif method not in able or reference not in able:
            row["why"] = "random weights"
        elif pair not in found:
            row["why"] = "no seed has the same test images"
        elif np.isnan(adjusted[pair]):
            row["why"] = "the scores of images are missing"
        else:
            paired, difference = found[pair]
            differs = "above" if difference.value > 0 else "below"
            row |= {
                "difference": difference.value,
                "difference_low": difference.low,
                "difference_high": difference.high,
                "p": adjusted[pair],
                "paired": paired,
                "verdict": differs if adjusted[pair] < SIGNIFICANCE else "not told apart",
            }


def sentences(table: DataFrame) -> Series:
    """Return a sentence for each line of :func:`cells` that is compared with a reference, by the line's index."""
    compared = table[~table.verdict.isin(["", "reference"])]
    return Series({index: _sentence(row) for index, row in compared.iterrows()}, dtype=str)


def _sentence(row: Series) -> str:
    if row.verdict == "not comparable":
        return f"{row.method} is not comparable with {row.reference}: {row.why}."
    sign = -100 if row.verdict == "below" else 100
    low, high = sorted([sign * row.difference_low, sign * row.difference_high])
    points = f"{sign * row.difference:.1f} points [{low:.1f}, {high:.1f}]"
    points += ", adjusted p < 0.001" if row.p < 0.001 else f", adjusted p = {row.p:.3f}"
    points += ", over test images alone, as there is one seed" if row.paired == 1 else ""
    if row.verdict == "not told apart":
        return f"{row.method} is not told apart from {row.reference}: {points}."
    return f"{row.method} is {row.verdict} {row.reference} by {points}."


def texts(table: DataFrame) -> Iterator[tuple[str, DataFrame, list[str]]]:
    """Yield title, table of text (methods by categories) and sentences for each metric and K of :func:`cells`."""
    for _, rows in table.groupby(["metric", "k_shot"], sort=False, dropna=False):
        lines = rows.drop_duplicates("method", keep="last").set_index("method")  # the average has all, in their order
        wide = rows.assign(text=rows.apply(_text, axis=1)).pivot_table("text", "method", "category", "first")
        wide = wide.reindex(lines.index, columns=rows.category.unique()).fillna("-").rename_axis(columns=None)
        marks = np.where(lines.random_weights, " †", "") + np.where(lines.optimistic, " ‡", "")
        wide.insert(0, "Method", lines.index + marks)
        wide.insert(0, "Learns from", lines.protocol.map(lambda name: PROTOCOLS[name].partition(":")[0]))
        metric, k_shot = rows[["metric", "k_shot"]].iloc[0]
        title = METRICS.get(metric, metric) + ("" if pd.isna(k_shot) else f", K = {k_shot}")
        said = sentences(rows)
        yield title, wide, list(rows.category[said.index] + ": " + said)


def _text(row: Series) -> str:
    text = "n/a" if np.isnan(row["mean"]) else f"{100 * row['mean']:.2f}"
    text += "" if np.isnan(row.sd) else f" ± {100 * row.sd:.2f}"
    text += "" if np.isnan(row.low) else f" [{100 * row.low:.2f}, {100 * row.high:.2f}]"
    beside = {"paper": row.paper, "all abnormal": row.trivial}
    return text + "".join(f" ({name} {100 * value:.2f})" for name, value in beside.items() if not np.isnan(value))


def to_markdown(outcome: Outcome, table: DataFrame) -> str:
    """Return the tables of :func:`cells` and what the comparisons say as a document."""
    parts = [f"# {_plain(str(outcome.config.get('title') or outcome.run.resolve().name))}", LEGEND]
    for title, wide, said in texts(table):
        lines = [wide.columns, ["---"] * 2 + ["---:"] * (len(wide.columns) - 2), *wide.to_numpy()]
        rows = [" | ".join(line if line[0] == "---" else [_plain(cell) for cell in line]) for line in lines]
        parts += [f"## {_plain(title)}", "\n".join(f"| {row} |" for row in rows)]
        parts += ["\n".join(f"- {_plain(sentence)}" for sentence in said)] if said else []
    failed = [f"- {_plain(f'{job.job}: {job.error}')}" for job in outcome.results if job.status == "failed"]
    if failed:
        parts += ["## Failed jobs", "\n".join(failed)]
    if lack := sum(len(seeds) for *_, seeds in lacking(outcome)):
        parts += [f"Not all jobs have ended: {lack} are missing."]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Escape what Markdown, or the HTML in it, would take for markup."""
    text = " ".join(escape(text, quote=False).split())
    for mark in "\\`*_[]|~":
        text = text.replace(mark, f"\\{mark}")
    return text


def to_latex(table: DataFrame) -> str:
    """Return the tables of :func:`cells` for the LaTeX package booktabs, each after a comment that names it."""
    needed = "Needs the package booktabs, and fontenc with T1 for names with < > |"
    parts = [f"% {line}" for line in (needed, *LEGEND.splitlines())]
    for title, wide, _ in texts(table):
        shape = "ll" + "r" * (len(wide.columns) - 2)
        parts += ["", f"% {' '.join(title.split())}", wide.to_latex(index=False, escape=True, column_format=shape)]
    return "\n".join(parts)


def to_csv(table: DataFrame) -> str:
    """Return a table as CSV, whose cells of text spreadsheets take for no formula."""
    texts = table.select_dtypes(exclude=["number", "bool"])
    safe = texts.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell)
    return table.assign(**safe).to_csv(index=False, lineterminator="\n")


def per_job(outcome: Outcome) -> DataFrame:
    """Return a line for each job that has ended."""
    table = pd.json_normalize([{**asdict(job), "depends_on": json.dumps(job.depends_on)} for job in outcome.results])
    return table.astype({"k_shot": "Int64"})
