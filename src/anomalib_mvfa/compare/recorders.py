"""Callbacks that keep what a report shows of a test: times, scores, pictures and features.

A trainer's callbacks run before the model's, so scores and maps are the model's own, not yet post-processed.

Axes: N images, M pictures, S side in pixels, l levels.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import LabelName
from lightning.pytorch import Callback
from PIL import Image
from torch.nn.functional import interpolate

from ..data.reading import read_image, read_mask
from ..metrics.pixel_metrics import count
from ..model.level_maps import level_maps
from ..model.torch_model import MvfaModel
from ..results import Recorder, scores_of

PIXEL_BINS = 1024
"""Number of bin edges for pixel counts; the metric itself uses finer bins. Half of the edges are evenly spaced, and
half are quantiles of the first batch, since scores may fill a small part of [0, 1]."""
SIDE = 160
"""Height and width of saved pictures and maps in pixels."""
PICTURED = {LabelName.NORMAL: 1, LabelName.ABNORMAL: 3}
"""How many normal and abnormal test images the report shows."""
FEATURED = {LabelName.NORMAL: 50, LabelName.ABNORMAL: 50}
"""How many normal and abnormal test images give features."""


class ScoreRecorder(Recorder):
    """Keeps the label and score of every tested image, and counts ``(2, bins)`` of its pixels where there are masks."""

    _edges: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__(self._scores)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Forget the edges of bins too."""
        super().on_test_start(trainer, pl_module)
        self._edges = None

    def _scores(self, _model: Any, batch: ImageBatch, _rows: Sequence[int]) -> dict[str, Any]:  # noqa: ANN401
        labels = torch.as_tensor(batch.gt_label).int().tolist()
        found: dict[str, Any] = {"labels": labels, "scores": scores_of(batch)}
        if batch.gt_mask is not None and batch.anomaly_map is not None:
            maps = batch.anomaly_map.float().squeeze(1).flatten(1)
            if self._edges is None:
                even = torch.linspace(0, 1, PIXEL_BINS // 2, device=maps.device)
                ranks = torch.linspace(0, maps.numel() - 1, PIXEL_BINS // 2, device=maps.device).long()
                self._edges = torch.cat([even, maps.flatten().sort()[0][ranks]]).sort()[0]
            pairs = zip(torch.bucketize(maps, self._edges), batch.gt_mask.flatten(1) > 0, strict=True)
            counts = [torch.stack(count(bins, mask, PIXEL_BINS + 1)) for bins, mask in pairs]
            found["pixels"] = [one.int().cpu().numpy() for one in counts]
        return found

    def save(self, folder: Path, threshold: float | None) -> None:
        """Write ``scores.csv`` and, where there are masks, ``pixels.npz``.

        Args:
            folder: Where to.
            threshold: Image scores above it are predicted abnormal; None if there is none.
        """
        table = pd.DataFrame({"image": self.kept["paths"], "label": self.kept["labels"], "score": self.kept["scores"]})
        table["predicted"] = None if threshold is None else (table.score > threshold).astype(int)
        table.to_csv(folder / "scores.csv", index=False)
        if "pixels" in self.kept:
            np.savez_compressed(folder / "pixels.npz", counts=np.stack(self.kept["pixels"]))


def maps_of(model: Any, batch: ImageBatch, rows: Sequence[int]) -> dict[str, Any]:  # noqa: ANN401  # any torch model
    """Return small anomaly maps, and those of each level where the model has levels (paper, Figure 4)."""
    found: dict[str, Any] = {}
    if batch.anomaly_map is not None:
        found["maps"] = _small(batch.anomaly_map[rows].reshape(len(rows), 1, *batch.anomaly_map.shape[-2:]))[:, 0]
    if isinstance(model, MvfaModel):
        found["level_maps"] = _small(level_maps(model, torch.as_tensor(batch.image)[rows]))
    return found


def features_of(model: Any, batch: ImageBatch, rows: Sequence[int]) -> dict[str, Any]:  # noqa: ANN401  # any torch model
    """Return features of the det branch with and without adapters, means over patches, of all levels side by side.

    They are what the paper's Figure 6 shows; models without adapters in the stream have none.
    """
    if type(model) is not MvfaModel:
        return {}
    image = torch.as_tensor(batch.image)[rows]
    found: dict[str, Any] = {"labels": torch.as_tensor(batch.gt_label)[rows].int().tolist()}
    frozen = [model.backbone.without_registers(level) for level in model.frozen_tokens(image)]
    for name, levels in (("frozen", frozen), ("adapted", model.tokens(image).det)):
        found[name] = torch.cat([level[:, 1:].mean(dim=1) for level in levels], dim=-1).float().cpu().numpy()
    return found


def save_features(recorder: Recorder, folder: Path) -> None:
    """Write ``features.npz``, where there are features: "labels" (N), "frozen" and "adapted", ``(N, D)`` each."""
    if "labels" in recorder.kept:
        arrays: dict[str, Any] = {name: np.stack(recorder.kept[name]) for name in ("labels", "frozen", "adapted")}
        np.savez_compressed(folder / "features.npz", **arrays)


def save_pictures(recorder: Recorder, folder: Path, samples: pd.DataFrame, levels: Sequence[int]) -> None:
    """Write ``pictures.npz``, unless the model has made no map.

    Arrays: "paths", "labels" (M), "images" ``(M, S, S, 3)`` and "masks" ``(M, S, S)`` in 8 bits, the latter above 0
    where abnormal and absent for data without masks, "maps" ``(M, S, S)`` in the model's own scale, "levels" (l) and
    "level_maps" ``(M, l, S, S)``.

    Args:
        recorder: What has kept :func:`maps_of`.
        folder: Where to.
        samples: Anomalib's table of the test images.
        levels: The model's levels, if it has any.
    """
    kept = recorder.kept
    if "maps" not in kept:
        return
    rows = samples.set_index("image_path", drop=False).loc[kept["paths"]].sort_values("label_index", kind="stable")
    order = [kept["paths"].index(path) for path in rows.image_path]
    images = [read_image(path) for path in rows.image_path]
    arrays: dict[str, Any] = {
        "paths": rows.image_path.tolist(),
        "labels": rows.label_index.astype(int).tolist(),
        "images": [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images],
        "maps": np.stack(kept["maps"])[order],
        "levels": list(levels) if "level_maps" in kept else [],
        "level_maps": np.stack(kept["level_maps"])[order] if "level_maps" in kept else [],
    }
    if samples.attrs.get("task") == "segmentation":
        arrays["masks"] = [_mask(row, image) for (_, row), image in zip(rows.iterrows(), images, strict=True)]
    np.savez_compressed(folder / "pictures.npz", **arrays)


class Stopwatch(Callback):
    """Measures what a model takes, without metrics and other callbacks.

    Attributes:
        fit: Seconds from the beginning to the first test batch.
        test: Seconds in the steps of the last test.
    """

    def __init__(self) -> None:
        self.fit = self.test = 0.0
        self._start = time.perf_counter()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Stop the time of fitting."""
        del trainer
        self.fit = self.fit or _now(pl_module) - self._start
        self.test = 0.0

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:  # noqa: ANN401
        """Start the time of a batch."""
        del trainer, args
        self._start = _now(pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:  # noqa: ANN401
        """Stop it."""
        del trainer, args
        self.test += _now(pl_module) - self._start


def _now(module: Any) -> float:  # noqa: ANN401  # a Lightning module
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Return the largest memory of this process, or what it had of a GPU, in 2**20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _small(maps: torch.Tensor) -> np.ndarray:
    return interpolate(maps.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True).cpu().numpy()


def _mask(row: Any, image: Image.Image) -> np.ndarray:  # noqa: ANN401  # of a samples table
    if row.label_index != LabelName.ABNORMAL or not row.mask_path:
        return np.zeros((SIDE, SIDE), np.uint8)
    return np.asarray(read_mask(row.mask_path, image.size).resize((SIDE, SIDE), Image.Resampling.NEAREST))
