"""From the results of jobs to tables: means over seeds, intervals, and differences from a reference.

Axes: N images, G groups of images, R resamples, S seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ..data.bmad import CATEGORIES
from ..data.support import group_of
from .paper import PaperTable, paper_table
from .results import JobResult, job_folder, read_arrays, read_results
from .statistics import Estimate, draw, estimate, f1, holm, image_auroc, pixel_auroc

PROTOCOLS = {
    "full_normal": "Full-normal: all normal training images",
    "few_normal": "Few-normal: K normal images",
    "few_shot": "Few-shot: K normal and K abnormal images",
    "leave_one_out": "Leave-one-out: labelled images of other categories",
    "zero_shot": "Zero-shot: no images",
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
LEVEL = 0.05


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
        only = (self.config["methods"].get(method) or {}).get("categories") or self.categories
        return [name for name in self.categories if name in only]


@dataclass(frozen=True)
class Sample:
    """A metric of one seed, as it came out and on resampled images.

    Args:
        value: In [0, 1].
        resampled: The same of resamples ``(R)``, NaN where there is none.
        groups: How many groups were drawn from.
        rare: How many groups have images of the rarer kind.
        trivial: F1 of calling everything abnormal; NaN for other metrics.
        test_set: What was tested.
        result: The job; of an average, one of the jobs.
    """

    value: float
    resampled: np.ndarray
    groups: int
    rare: int
    trivial: float
    test_set: Any
    result: JobResult


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
    found = read_results(run)
    names = {result.category for result in found if result.method in config["methods"]}
    ordered = [name for name in CATEGORIES if name in names] + sorted(names - {*CATEGORIES})
    outcome = Outcome(run, config, list(config.get("categories") or ordered), [])
    methods, k_shots, seeds = list(config["methods"]), config.get("k_shots"), config.get("seeds")
    for result in found:
        asked = result.method in methods and result.category in outcome.categories_of(result.method)
        asked = asked and (not seeds or result.seed in seeds)
        if asked and (result.k_shot is None or not k_shots or result.k_shot in k_shots):
            outcome.results.append(result)
    if not outcome.finished:
        errors = "".join(f"\n{result.job}: {result.error}" for result in outcome.results[:3])
        msg = f"No job in {str(run)!r} has finished, {len(outcome.results)} failed. Run the comparison first.{errors}"
        raise ValueError(msg)
    outcome.results.sort(
        key=lambda job: (
            methods.index(job.method),
            outcome.categories.index(job.category),
            job.k_shot or 0,
            job.seed,
        )
    )
    return outcome


def lacking(outcome: Outcome) -> list[tuple[str, str | None, int | None, list[int]]]:
    """Return what was asked for and has not ended: method, category, K and seeds.

    Of a method none of whose jobs has ended, it is not known whether it has shots: category and K are None.
    """
    asked, lack = outcome.config.get("seeds") or [], []
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


def per_image(outcome: Outcome) -> pd.DataFrame:
    """Return what every test image scored: one line per job and image."""
    columns = ["method", "protocol", "category", "k_shot", "seed", "group", "image", "label", "score", "predicted"]
    tables = [pd.DataFrame(columns=columns)]
    for result in outcome.finished:
        path = job_folder(outcome.run, result.job) / "scores.csv"
        if path.is_file():
            table = pd.read_csv(path, dtype={"image": str})
            named = {name: getattr(result, name) for name in columns[:5]}
            groups = [group_of(image, outcome.config.get("group_by")) for image in table.image]
            tables.append(table.assign(**named, group=groups)[columns])
    table = pd.concat(tables[1:] or tables, ignore_index=True)
    return table.astype({"k_shot": "Int64"})


def _samples(outcome: Outcome, resamples: int) -> Iterator[tuple[str, Sample]]:
    """Yield each metric of each job."""
    images = per_image(outcome)
    keys = ["method", "category", "k_shot", "seed"]
    by_job = {
        (method, category, None if pd.isna(k_shot) else int(k_shot), seed): table
        for (method, category, k_shot, seed), table in images.groupby(keys, dropna=False)
    }
    draws = {}
    for category, table in images.groupby("category"):
        names = pd.Index(sorted(table.group.unique()))
        draws[category] = (names, draw(len(names), resamples, [*str(category).encode()]))
    for result in outcome.finished:
        table = by_job.get((result.method, result.category, result.k_shot, result.seed))
        resampled: dict[str, np.ndarray] = {}
        groups, rare, trivial = 0, 0, {}
        if table is not None:
            names, drawn = draws[result.category]
            weights = drawn[:, names.get_indexer(table.group)]
            labels = table.label.to_numpy(int)
            resampled["image_AUROC"] = image_auroc(table.score.to_numpy(float), labels, weights)
            if table.predicted.notna().all():
                resampled["image_F1Score"] = f1(table.predicted.to_numpy(int), labels, weights)
            groups = table.group.nunique()
            rare = min(table.group[labels == label].nunique() for label in (0, 1))
            trivial["image_F1Score"] = 2 * labels.mean() / (1 + labels.mean())
            pixels = job_folder(outcome.run, result.job) / "pixels.npz"
            if pixels.is_file():
                counts = read_arrays(pixels)["counts"].astype(float)
                resampled["pixel_AUROC"] = pixel_auroc(counts, weights)
                share = counts[:, 1].sum() / counts.sum()
                trivial["pixel_F1Score"] = 2 * share / (1 + share)
        nothing = np.full(resamples, np.nan)
        for metric, value in result.metrics.items():
            if not np.isnan(value):
                drawn_values = resampled.get(metric, nothing)
                yield (
                    metric,
                    Sample(value, drawn_values, groups, rare, trivial.get(metric, np.nan), result.test_set, result),
                )


def cells(outcome: Outcome, resamples: int = 1000) -> pd.DataFrame:
    """Return a line per metric, K, category (and average), protocol and method; see the code of `_line`."""
    found: dict[str, dict[tuple, dict[int, Sample]]] = {}
    for metric, sample in _samples(outcome, resamples):
        job = sample.result
        cell = (job.protocol, job.method, job.k_shot, job.category)
        found.setdefault(metric, {}).setdefault(cell, {})[job.seed] = sample
    paper = paper_table(outcome.config["paper"]) if outcome.config.get("paper") else None
    rows = []
    order = [*METRICS, *sorted(set(found) - {*METRICS})]
    for metric in [name for name in order if name in found]:
        shots = sorted({k for _, _, k, _ in found[metric] if k is not None}) or [None]
        for k_shot in shots:
            of_k = {cell: seeds for cell, seeds in found[metric].items() if cell[2] in (k_shot, None)}
            there = {cell[3] for cell in of_k}
            categories = [name for name in outcome.categories if name in there]
            lines = sorted(
                {(protocol, method) for protocol, method, _, _ in of_k},
                key=lambda line: ([*PROTOCOLS, line[0]].index(line[0]), list(outcome.config["methods"]).index(line[1])),
            )
            table = {(cell[:2], cell[3]): seeds for cell, seeds in of_k.items()}
            for category in [*categories, *([AVERAGE] if len(categories) > 1 else [])]:
                column = {}
                for line in lines:
                    if category == AVERAGE:
                        column[line] = _average([table.get((line, name), {}) for name in categories])
                    elif (line, category) in table:
                        column[line] = table[line, category]
                named = {"metric": metric, "k_shot": k_shot, "category": category}
                rows += [named | row for row in _column(column, metric, categories, category, outcome, paper)]
    return pd.DataFrame(rows).astype({"k_shot": "Int64"})


def _average(by_category: list[dict[int, Sample]]) -> dict[int, Sample]:
    """Average the seeds that all categories have."""
    common = set.intersection(*(set(seeds) for seeds in by_category))
    averages = {}
    for seed in sorted(common):
        samples = [seeds[seed] for seeds in by_category]
        averages[seed] = Sample(
            value=float(np.mean([sample.value for sample in samples])),
            resampled=np.mean([sample.resampled for sample in samples], axis=0),
            groups=sum(sample.groups for sample in samples),
            rare=len(samples) * min(sample.rare for sample in samples),
            trivial=float(np.mean([sample.trivial for sample in samples])),
            test_set=[sample.test_set for sample in samples],
            result=samples[0].result,
        )
    return averages


def _estimate(samples: list[Sample], others: list[Sample] | None = None) -> Estimate:
    points = np.array([sample.value for sample in samples])
    resampled = np.stack([sample.resampled for sample in samples])
    if others is not None:
        points = points - [sample.value for sample in others]
        resampled = resampled - np.stack([sample.resampled for sample in others])
    first = samples[0]
    return estimate(points, resampled, first.groups, first.rare, difference=others is not None)


def _column(
    column: dict[tuple[str, str], dict[int, Sample]],
    metric: str,
    categories: list[str],
    category: str,
    outcome: Outcome,
    paper: PaperTable | None,
) -> list[dict[str, Any]]:
    asked = outcome.config.get("seeds") or []
    rows = {}
    for (protocol, method), seeds in column.items():
        samples = list(seeds.values())
        values = [sample.value for sample in samples]
        mean = _estimate(samples) if samples else Estimate(np.nan, np.nan, np.nan, np.nan)
        row = {
            "protocol": protocol,
            "method": method,
            "mean": mean.value,
            "sd": np.std(values, ddof=1) if len(values) > 1 else np.nan,
            "low": mean.low,
            "high": mean.high,
            "seeds": len(values),
            "missing": len(set(asked) - set(seeds)),
            "random_weights": any(sample.result.random_weights for sample in samples),
            "optimistic": any(sample.result.selected_epoch is not None for sample in samples),
            "paper": np.nan,
            "trivial": np.mean([sample.trivial for sample in samples]) if samples else np.nan,
            "reference": "",
            "difference": np.nan,
            "difference_low": np.nan,
            "difference_high": np.nan,
            "paired": 0,
            "p": np.nan,
            "verdict": "",
            "why": "" if samples else "not all categories",
        }
        level = metric.removesuffix("_AUROC")
        if paper and samples and not row["random_weights"] and level in ("image", "pixel"):
            own_k = samples[0].result.k_shot
            if category == AVERAGE:
                tested = {result.category for result in outcome.finished}
                row["paper"] = paper.average(level, method, protocol, own_k, categories, tested)
            else:
                row["paper"] = paper.figure(level, method, protocol, own_k, category)
        rows[protocol, method] = row
    if metric in TESTED:
        _compare(rows, column, outcome.config.get("reference"))
    return list(rows.values())


def _compare(rows: dict, column: dict, named: str | None) -> None:
    """Fill in the differences from the reference."""
    there = [line for line in rows if rows[line]["seeds"]]
    if len(there) < 2:
        return
    able = [line for line in there if not rows[line]["random_weights"]] or there
    references = [line for line in able if line[1] == named] if named else able
    if not references:
        for line in there:
            rows[line] |= {"verdict": "not comparable", "why": f"no figure of {named} to compare with"}
        return
    reference = max(references, key=lambda line: rows[line]["mean"])
    pairs = [(line, reference) for line in able if line != reference] if named else list(combinations(able, 2))
    estimates, paired = {}, {}
    for a, b in pairs:
        pair = (b, a) if a == reference else (a, b)
        one, other = column[pair[0]], column[pair[1]]
        seeds = [seed for seed in one if seed in other and one[seed].test_set == other[seed].test_set]
        if seeds:
            estimates[pair] = _estimate([one[seed] for seed in seeds], [other[seed] for seed in seeds])
            paired[pair] = len(seeds)
    adjusted = dict(zip(estimates, holm([found.p for found in estimates.values()]), strict=True))
    for line in there:
        row, pair = rows[line], (line, reference)
        row["reference"] = reference[1]
        if line == reference:
            row["verdict"] = "reference"
        elif line not in able:
            row |= {"verdict": "not comparable", "why": "random weights"}
        elif pair not in estimates:
            row |= {"verdict": "not comparable", "why": "no seed with the same test images"}
        else:
            found, p = estimates[pair], adjusted[pair]
            row |= {"difference": found.value, "difference_low": found.low, "difference_high": found.high}
            row |= {"p": p, "paired": paired[pair], "verdict": "not told apart"}
            if np.isnan(p):
                row |= {"verdict": "not comparable", "why": "no scores of images"}
            elif p < LEVEL:
                row["verdict"] = "above" if found.value > 0 else "below"
