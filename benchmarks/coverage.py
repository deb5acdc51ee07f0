"""How often the 95 % intervals of a comparison hold the truth, on simulated scores; prints a table in Markdown.

Scores are binormal, so that the true AUROC is known. Seeds differ in how far they separate normal from abnormal images;
part of an image's score is the same under every seed, and some of this under every method.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from anomalib_mvfa.compare.statistics import draw, estimate, image_auroc

ABNORMAL = 0.4
"""Share of the images."""
PARTS = {"image": 0.3, "method": 0.3, "seed": 0.4}
"""Of the variance of scores of one kind: the image's whatever the method, the image's under a method, and the rest."""


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Args:
        images: How many.
        seeds: How many.
        auroc: Of the mean seed.
        spread: Standard deviation of a seed's AUROC, roughly.
        per_patient: Images of a patient, who are all normal or all abnormal, and share half of `SHARED`.
        other: AUROC of a second method, which makes the paired difference the truth to hold.
    """

    images: int
    seeds: int
    auroc: float
    spread: float = 0.0
    per_patient: int = 1
    other: float | None = None


SETTINGS = [
    *[
        Setting(images, seeds, auroc, spread)
        for seeds in (2, 3, 5)
        for images in (50, 300)
        for auroc, spread in ((0.7, 0.01), (0.7, 0.1), (0.95, 0.01), (0.95, 0.03))
    ],
    *[Setting(images, 1, auroc) for images in (50, 100, 300) for auroc in (0.7, 0.95)],
    *[Setting(300, seeds, 0.8, 0.03 * (seeds > 1), per_patient) for seeds in (1, 2, 3) for per_patient in (3, 10)],
    *[
        Setting(images, seeds, 0.8, 0.03 * (seeds > 1), other=other)
        for seeds in (1, 2, 3, 5)
        for images in (50, 300)
        for other in (0.8, 0.9)
    ],
]


def coverage(setting: Setting, draws: int = 1000, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """Return the share of draws whose 95 % interval holds the truth: ours, and that of percentiles.

    The latter is the plain two-level bootstrap, which draws seeds and images with replacement.
    """
    rng = np.random.default_rng(seed)
    patients = setting.images // setting.per_patient
    patient = np.arange(patients).repeat(setting.per_patient)
    abnormal = round(ABNORMAL * patients)
    labels = (patient < abnormal).astype(int)
    aurocs = np.array([setting.auroc] if setting.other is None else [setting.auroc, setting.other])
    apart = np.sqrt(2) * norm.ppf(aurocs)  # means of abnormal scores; those of normal ones are 0
    varies = setting.spread / norm.pdf(apart / np.sqrt(2)) * np.sqrt(2)
    truths = norm.cdf(apart / np.sqrt(2 + varies**2))
    signs = [1, -1][: len(aurocs)]
    held = np.zeros(2)
    for _ in range(draws):
        weights = np.vstack([np.ones(len(patient)), draw(patients, resamples, rng)[:, patient]])
        image = _images(rng, patient)
        areas = np.zeros((setting.seeds, resamples + 1))
        for sign, mean, spread in zip(signs, apart, varies, strict=True):
            method = np.sqrt(PARTS["image"]) * image + np.sqrt(PARTS["method"]) * _images(rng, patient)
            for row in areas:
                scores = method + np.sqrt(PARTS["seed"]) * rng.normal(size=len(patient))
                scores += labels * rng.normal(mean, spread)
                row += sign * image_auroc(scores, labels, weights)
        found = estimate(areas[:, 0], areas[:, 1:], patients, min(abnormal, patients - abnormal), len(signs) > 1)
        picked = rng.integers(setting.seeds, size=(setting.seeds, resamples))
        both = np.take_along_axis(areas[:, 1:], picked, axis=0).mean(axis=0)
        for at, (low, high) in enumerate([(found.low, found.high), np.nanpercentile(both, [2.5, 97.5])]):
            held[at] += low <= truths @ signs <= high
    return held / draws


def _images(rng: np.random.Generator, patient: np.ndarray) -> np.ndarray:
    """Draw effects of images, half of whose variance is the patient's."""
    return np.sqrt(0.5) * (rng.normal(size=patient[-1] + 1)[patient] + rng.normal(size=len(patient)))


def main() -> None:
    """Print the table."""
    head = ["Seeds", "Images", "Patients", "AUROC", "Its spread over seeds", "Interval of", "Ours", "Percentiles"]
    sys.stdout.write(f"| {' | '.join(head)} |\n{'| --- ' * len(head)}|\n")
    with ProcessPoolExecutor() as pool:
        for setting, held in zip(SETTINGS, pool.map(coverage, SETTINGS), strict=True):
            patients = str(setting.images // setting.per_patient) if setting.per_patient > 1 else ""
            aurocs = str(setting.auroc) if setting.other is None else f"{setting.auroc} and {setting.other}"
            of = "the mean" if setting.other is None else "the difference"
            shares = [f"{100 * share:.1f} %" for share in held]
            cells = [setting.seeds, setting.images, patients, aurocs, setting.spread, of, *shares]
            sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
