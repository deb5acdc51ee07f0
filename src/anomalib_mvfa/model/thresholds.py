"""Which image threshold is used, and how sure it is: best F1, a wanted sensitivity or specificity, or a number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

BEST_F1 = "best_f1"
RATES = ("sensitivity", "specificity")


class Rate(NamedTuple):
    """A share of images: how many of how many."""

    right: int
    images: int

    @property
    def value(self) -> float:
        """The share, NaN of no images."""
        return self.right / self.images if self.images else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of Clopper and Pearson, which takes images as independent; 0 to 1 of no images."""
        if not self.images:
            return 0.0, 1.0
        low, high = binomtest(self.right, self.images).proportion_ci(method="exact")
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} ({self.right} of {self.images}, 95 % interval {low:.2f} to {high:.2f})"


def rates(decisions: Sequence[bool], labels: Sequence[int]) -> dict[str, Rate]:
    """Return sensitivity and specificity of decisions (abnormal or not)."""
    found, abnormal = np.asarray(decisions, bool), np.asarray(labels) == 1
    counts = (found & abnormal).sum(), abnormal.sum(), (~found & ~abnormal).sum(), (~abnormal).sum()
    detected, ill, cleared, healthy = map(int, counts)
    return {"sensitivity": Rate(detected, ill), "specificity": Rate(cleared, healthy)}


def parse_threshold(threshold: float | str) -> tuple[str, float]:
    """Return what the argument `threshold` asks for: a name and a value, that of "number", "sensitivity" and so on.

    Raises:
        ValueError: It is none of them.
    """
    name, _, number = str(threshold).replace(" ", "").rpartition("=")
    if (name, number) == ("", BEST_F1):
        return BEST_F1, math.nan
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) if not name else name in RATES and 0 < value <= 1):
        msg = (
            f"threshold={threshold!r} is unknown; choose best_f1, sensitivity=0.95 or specificity=0.9 (above 0, at "
            "most 1), or a number in the scale of the scores in scores.csv."
        )
        raise ValueError(msg)
    return name or "number", value


def threshold_of_rate(name: str, wanted: float, scores: Sequence[float], labels: Sequence[int]) -> float:
    """Return the highest threshold with at least the wanted sensitivity, or the lowest with the wanted specificity.

    A score above the threshold is abnormal. Thresholds lie midway between scores, so that rounding changes no decision.
    NaN where no image can tell.
    """
    values, abnormal = np.asarray(scores, float), np.asarray(labels) == 1
    of_kind = np.sort(values[abnormal if name == "sensitivity" else ~abnormal])
    if not len(of_kind):
        return math.nan
    steps = np.unique(values)
    margin = np.diff(steps).max() / 2 if len(steps) > 1 else 1e-3
    edges = np.concatenate([[steps[0] - 2 * margin], steps, [steps[-1] + 2 * margin]])
    between = (edges[:-1] + edges[1:]) / 2
    below = np.searchsorted(of_kind, between, side="right") / len(of_kind)
    reached = (1 - below if name == "sensitivity" else below) >= wanted - 1e-9
    return float(between[reached].max() if name == "sensitivity" else between[reached].min())


@dataclass
class Evidence:
    """The images that thresholds come from.

    Args:
        scores: Their scores, as the model gives them.
        labels: 1 for abnormal, 0 for normal.
        images: What they are: "validation" or "support" images.
        learnt: Whether training has shown them to the model.
    """

    scores: list[float]
    labels: list[int]
    images: str = "validation"
    learnt: bool = False

    def rates(self, threshold: float) -> dict[str, Rate]:
        """Return sensitivity and specificity on these images."""
        return rates([score > threshold for score in self.scores], self.labels)

    def describe(self, name: str, value: float, threshold: float) -> tuple[str, list[str]]:
        """Say in words where the threshold comes from, and what is to be doubted about it.

        Args:
            name: What was asked for, by :func:`parse_threshold`.
            value: Its value.
            threshold: The threshold in use; NaN if there is none.
        """
        found = self.rates(threshold)
        doubts = []
        if name in RATES:
            kind, count = "normal" if name == "specificity" else "abnormal", found[name].images
            asked = f"{name}={value:g}"
            if not count:
                doubts.append(f"threshold={asked} needs {kind} images, and none were at hand: it is that of best F1.")
                name = BEST_F1
            elif value < 1 and math.ceil(value * count - 1e-9) == count:
                doubts.append(
                    f"{count} {kind} images cannot tell a {name} of {value:g} from 1, which takes "
                    f"{math.ceil(1 / (1 - value) - 1e-9)} or more: the threshold is right for all of them."
                )
        if not self.scores:
            return f"Image threshold {threshold:.4g}. No labelled image was at hand to say how good it is.", doubts
        if self.learnt:
            doubts.append(
                f"Sensitivity and specificity on the {self.images} images are optimistic: the adapters have learnt "
                "from these very images."
            )
        rule = {BEST_F1: "best F1", "number": "as given"}.get(name, f"{name}={value:g}")
        if name == BEST_F1 and not found["sensitivity"].images:
            rule = "the highest score of normal images, as there are no abnormal ones"
        kinds = f"{found['specificity'].images} normal and {found['sensitivity'].images} abnormal"
        shown = ", ".join(f"{key} {rate}" for key, rate in found.items() if rate.images)
        return f"Image threshold {threshold:.4g} ({rule}). On {kinds} {self.images} images: {shown}.", doubts
