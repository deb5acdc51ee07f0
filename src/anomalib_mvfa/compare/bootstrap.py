"""What every tested image scored, and how far to trust an AUROC: intervals from resampled images.

Axes: N images, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..data.support import group_of
from ..metrics.pixel_metrics import auroc, count

PIXEL_BINS = 1024
"""Number of bin edges for the interval of pixel AUROC; the metric itself uses finer bins. Half of the edges are evenly
spaced, and half are quantiles of the first batch, since scores may fill a small part of [0, 1]."""
METRICS = ("image_AUROC", "pixel_AUROC")
COVERAGE = 0.95


@dataclass
class Scores:
    """What the images of a test scored.

    Args:
        paths: Paths of the images (N).
        labels: 1 where abnormal (N).
        values: Image scores (N), higher is more abnormal.
        pixels: Counts of normal and abnormal pixels in bins of increasing scores, ``(2, bins)`` per image; empty where
            there are no masks.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file."""
        arrays: dict[str, Any] = {"paths": np.array(self.paths), "labels": self.labels, "values": self.values}
        if self.pixels:
            arrays["pixels"] = np.stack(self.pixels)
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read what :meth:`save` wrote."""
        saved = read_arrays(path)
        pixels = list(saved.get("pixels", []))
        return cls(saved["paths"].tolist(), saved["labels"].tolist(), saved["values"].tolist(), pixels)


class ScoreRecorder(Callback):
    """Keeps what every tested image scored, which the metrics alone do not.

    A trainer's callbacks run before the model's, so these are the model's own scores, not yet post-processed.

    Attributes:
        scores: Scores of the last test.
    """

    def __init__(self) -> None:
        self.scores = Scores()
        self._edges: torch.Tensor | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier tests."""
        del trainer, pl_module
        self.scores, self._edges = Scores(), None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep paths, labels, scores and pixel counts of a batch."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        self.scores.paths += batch.image_path or []
        self.scores.labels += torch.as_tensor(batch.gt_label).int().tolist()
        self.scores.values += torch.as_tensor(batch.pred_score).float().flatten().tolist()
        if batch.gt_mask is not None and batch.anomaly_map is not None:
            maps = batch.anomaly_map.float().squeeze(1).flatten(1)
            if self._edges is None:
                even = torch.linspace(0, 1, PIXEL_BINS // 2, device=maps.device)
                order = maps.flatten().sort().values
                quantiles = order[torch.linspace(0, order.numel() - 1, PIXEL_BINS // 2, device=maps.device).long()]
                self._edges = torch.cat([even, quantiles]).sort().values
            bins = torch.bucketize(maps, self._edges)
            for row, mask in zip(bins, batch.gt_mask.flatten(1) > 0, strict=True):
                counts = torch.stack(count(row, mask, PIXEL_BINS + 1))  # (2, PIXEL_BINS + 1)
                self.scores.pixels.append(counts.int().cpu().numpy())


def image_aurocs(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Image AUROC of resamples; ties count half.

    Args:
        scores: Scores of images ``(N)``.
        labels: 1 where abnormal ``(N)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no normal or no abnormal image.
    """
    distinct, bins = np.unique(scores, return_inverse=True)
    counts = torch.zeros(2, len(distinct), len(weights), dtype=torch.float64)
    for label in (0, 1):
        chosen = labels == label
        counts[label].index_add_(0, torch.from_numpy(bins[chosen]), torch.from_numpy(weights.T[chosen]))
    return auroc(*counts.transpose(1, 2)).numpy()


def pixel_aurocs(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pixel AUROC of resamples.

    Args:
        counts: Counts of normal and abnormal pixels in bins of increasing scores ``(N, 2, bins)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no normal or no abnormal pixel.
    """
    normal, abnormal = (torch.from_numpy(weights @ counts[:, label]) for label in (0, 1))
    return auroc(normal, abnormal).numpy()


def bootstrap(runs: Sequence[Scores], group_by: str | None, resamples: int, seed: int = 0) -> dict[str, list[float]]:
    """Return the 95 % interval of each metric's mean over runs, from resamples of images, or of groups of images.

    Args:
        runs: Scores of tests, one per seed.
        group_by: Regular expression on paths that names an image's group, see
            :class:`~anomalib_mvfa.data.few_shot.FewShot`.
        resamples: R.
        seed: Seed of the resampling.
    """
    groups = sorted({group_of(path, group_by) for run in runs for path in run.paths})
    index = {group: position for position, group in enumerate(groups)}
    draws = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), resamples)
    areas: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for run in runs:
        weights = draws[:, [index[group_of(path, group_by)] for path in run.paths]].astype(float)
        areas["image_AUROC"].append(image_aurocs(np.array(run.values), np.array(run.labels), weights))
        if run.pixels:
            areas["pixel_AUROC"].append(pixel_aurocs(np.stack(run.pixels), weights))
    tails = [50 * (1 - COVERAGE), 50 * (1 + COVERAGE)]
    return {name: np.nanpercentile(np.mean(rows, axis=0), tails).tolist() for name, rows in areas.items() if rows}


def read_arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of an ``.npz`` file written by this package.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            return dict(saved)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever NumPy and zipfile raise on a corrupt file
        msg = f"{path} cannot be read; it may be cut short. Remove its folder, and run again what wrote it."
        raise ValueError(msg) from error
