"""What `test` and `predict` leave in a run's folder: numbers, pictures with scores in them, and maps.

.. code-block:: text

    metrics.json    of a test: metrics, sensitivity and specificity with intervals, thresholds, and where they come from
    scores.csv      every image: label if known, score, decision, threshold, and overlap of masks where there are masks
    images/...      a picture of every image
    maps/...        maps, where :class:`SaveMaps` is asked for
"""

import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.utils import LabelName
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

from .data.reading import read_image
from .data.scan_files import NIFTI_SUFFIXES, stem_of, write_like_nifti
from .data.scans import origin_of
from .data.support import draw
from .io import atomic_write, commit, device_name, explain_failed_write, to_csv, versions
from .model.export import ChoicePostProcessor
from .model.thresholds import BEST_F1, rates

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

SCORES = "scores.csv"
METRICS = ("image_", "pixel_")
LABELS = ("normal", "abnormal")
CALLED = ("decision", "label")
"""What an image is called: by the model, and in truth."""
WHITE = 2**16 - 1
"""Value in a map's file of the highest value that there is, 1."""
FONT, SMALL_FONT = 20, 12
"""Size of titles in pixels, and the smallest where a picture is narrow."""
Look = Callable[[Any, ImageBatch, Sequence[int]], dict[str, Any]]


class Recorder(Callback):
    """Keeps what a function makes of each test batch; of chosen images only where ``counts`` are given.

    Args:
        look: Function of the torch model, the batch and the rows to look at; returns values by name, one for each row.
        counts: How many normal and abnormal images to choose, the same ones for every method; all by default.

    Attributes:
        kept: Values of the last test by name, "paths" of images among them.
    """

    def __init__(self, look: Look, counts: Mapping[LabelName, int] | None = None) -> None:
        self._look, self._counts = look, counts
        self.kept: dict[str, list[Any]] = {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401  # Lightning's
        """Forget earlier tests, and choose images."""
        del pl_module
        self.kept, self._chosen = {}, None
        if self._counts is not None:
            samples = trainer.datamodule.test_data.samples
            of_kind = {kind: samples[samples.label_index == kind] for kind in self._counts}
            self._chosen = {path for kind, n in self._counts.items() for path in draw(of_kind[kind], n, 0).image_path}

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: ImageBatch, *args: Any) -> None:  # noqa: ANN401
        """Look at the images of a batch."""
        del trainer, outputs, args
        paths = batch.image_path or []
        rows = [row for row, path in enumerate(paths) if self._chosen is None or path in self._chosen]
        if rows:
            with torch.no_grad():
                found = self._look(pl_module.model, batch, rows)
            for name, values in {"paths": [paths[row] for row in rows], **found}.items():
                self.kept.setdefault(name, []).extend(values)


def threshold_in_use(post_processor: Any) -> float:  # noqa: ANN401  # anomalib's, another's or none
    """Return the image threshold in the scale of :func:`scores_of`, NaN if there is none."""
    is_own = isinstance(post_processor, ChoicePostProcessor) and post_processor.enable_normalization
    return float(getattr(post_processor, "image_threshold" if is_own else "normalized_image_threshold", math.nan))


def scores_of(batch: ImageBatch) -> list[float]:
    """Return image scores as the model gives them; with other post-processors than ours, as these give them."""
    return torch.as_tensor(getattr(batch, "raw_score", batch.pred_score)).float().flatten().tolist()


class Results(Callback):
    """Writes ``metrics.json`` and ``scores.csv`` at the end of a test, and ``scores.csv`` at that of a prediction.

    Each is written once, by the first process, with what all processes have scored.
    """

    def __init__(self) -> None:
        self._recorder = Recorder(_numbers_of)  # no subclass: a trainer drops its own callbacks of a model's base class

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ANN401
        """See to it that there is a folder to write to, before anything is computed.

        Raises:
            OSError: It cannot be written to.
        """
        del pl_module
        if stage != "validate" and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            with explain_failed_write(folder / SCORES):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Forget earlier tests and predictions."""
        self._recorder.on_test_start(trainer, pl_module)

    def on_test_batch_end(self, *args: Any) -> None:  # noqa: ANN401
        """Keep the numbers of a batch."""
        self._recorder.on_test_batch_end(*args)

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]  # of more positional arguments

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Say how good the threshold is."""
        if trainer.is_global_zero:
            _tell(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Write both files."""
        table = self._write_scores(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        known = table.dropna(subset=["label", "decision"])
        found = {f"image_{name}": rate for name, rate in rates(*(known[c] == LABELS[1] for c in CALLED)).items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(METRICS)}
        results = {
            "model": type(pl_module).__name__,
            "metrics": {**metrics, **{name: rate.value for name, rate in found.items()}},
            "intervals_95": {name: rate.interval for name, rate in found.items() if rate.images},
            "images": {label: int((table.label == label).sum()) for label in LABELS},
            "threshold": _about_thresholds(pl_module.post_processor),
            "seed": {"model": pl_module.hparams.get("seed"), "data": getattr(trainer.datamodule, "seed", None)},
            "device": device_name(pl_module.device),
            "commit": commit(),
            "versions": versions(),
        }
        with atomic_write(Path(trainer.default_root_dir) / "metrics.json") as partial:
            partial.write_text(json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n", "utf-8")
        if shown := ", ".join(f"{name} {rate}" for name, rate in found.items() if rate.images):
            logger.info("On the test images: %s.", shown)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Write the scores."""
        self._write_scores(trainer, pl_module)

    def _write_scores(self, trainer: Any, pl_module: Any) -> pd.DataFrame:  # noqa: ANN401
        """Write and return what all processes have scored, each image once."""
        kept: list[Any] = [self._recorder.kept]
        if trainer.world_size > 1:
            kept = [None] * trainer.world_size
            torch.distributed.all_gather_object(kept, self._recorder.kept)
        table = pd.concat([pd.DataFrame(one, columns=["paths", *CALLED, "score", "dice"]) for one in kept])
        table = table.rename(columns={"paths": "image"}).drop_duplicates("image").sort_values("image")
        threshold = threshold_in_use(pl_module.post_processor)
        table["threshold"] = threshold
        if math.isnan(threshold):
            table["decision"] = None
        table = table[["image", "label", "score", "decision", "threshold", "dice"]]
        table = table.astype(dict.fromkeys(("score", "threshold", "dice"), np.float32))
        if trainer.is_global_zero and len(table):
            path = Path(trainer.default_root_dir) / SCORES
            with atomic_write(path) as partial:
                partial.write_text(to_csv(table.dropna(axis=1, how="all")), "utf-8", "surrogateescape")
            logger.info("Scores of %d images are in %s.", len(table), path)
            _tell(pl_module)
        return table


def _tell(pl_module: Any) -> None:  # noqa: ANN401
    """Log how good the image threshold is."""
    if isinstance(pl_module.post_processor, ChoicePostProcessor):
        pl_module.post_processor.tell()


def _numbers_of(_model: Any, batch: ImageBatch, rows: Sequence[int]) -> dict[str, Any]:  # noqa: ANN401
    """Return the columns of ``scores.csv`` that a batch fills."""
    none, called = [None] * len(rows), {}
    for name, values in zip(CALLED, (batch.pred_label, batch.gt_label), strict=True):
        called[name] = none if values is None else [LABELS[one] for one in torch.as_tensor(values).int().flatten()]
    dice = none
    if batch.gt_mask is not None and batch.pred_mask is not None:
        mask, found = (torch.as_tensor(one).flatten(1) > 0 for one in (batch.gt_mask, batch.pred_mask))
        overlap = 2 * (mask & found).sum(dim=1) / (mask.sum(dim=1) + found.sum(dim=1))
        dice = torch.where(mask.any(dim=1), overlap, torch.nan).tolist()  # nothing to overlap with elsewhere
    return {**called, "score": scores_of(batch), "dice": dice}


def _about_thresholds(post_processor: Any) -> dict[str, Any]:  # noqa: ANN401
    about: dict[str, Any] = {"image": threshold_in_use(post_processor)}
    if isinstance(post_processor, ChoicePostProcessor):
        about |= {"pixel": float(post_processor.pixel_threshold), "asked": post_processor.threshold or BEST_F1}
        if evidence := post_processor.evidence:
            found = evidence.rates(about["image"])
            about |= {"from": evidence.images, "learnt_from": evidence.learnt}
            about |= {name: {"value": rate.value, "of": rate.images} for name, rate in found.items()}
            about["intervals_95"] = {name: rate.interval for name, rate in found.items() if rate.images}
    return about


def _without_nan(value: Any) -> Any:  # noqa: ANN401  # of plain types
    """Return None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ScoreVisualizer(ImageVisualizer):
    """Anomalib's visualizer, with the score and the threshold above each picture, as in ``scores.csv``.

    Colours span each map: fused scores fill a small part of [0, 1].

    Args:
        kwargs: Arguments of anomalib's visualizer.
    """

    def __init__(self, **kwargs) -> None:  # noqa: ANN003  # anomalib's
        colours = {"anomaly_map": {"colormap": True, "normalize": True}}
        # Letters at their default size would not fit.
        super().__init__(**{"overlay_fields_config": colours, "text_config": {"size": FONT}, **kwargs})

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:  # noqa: ANN401
        """Save a picture of each image."""
        del outputs, args
        threshold = threshold_in_use(pl_module.post_processor)
        for item, score in zip(batch, scores_of(batch), strict=True):
            picture: Any = self.visualize(item)
            if picture is None:
                continue
            title = f"score {score:.4g}" + ("" if math.isnan(threshold) else f", threshold {threshold:.4g}")
            if item.pred_label is not None and not math.isnan(threshold):
                title = f"{LABELS[int(item.pred_label)]}: {title}"
            folder = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
            with_title(picture, title).save(_file_for(trainer, item.image_path or "", folder))

    def on_predict_batch_end(self, *args: Any) -> None:  # noqa: ANN401
        """Save a picture of each image."""
        self.on_test_batch_end(*args)


def with_title(picture: Image.Image, title: str) -> Image.Image:
    """Return a picture below a title, in smaller letters or on a wider ground where it would not fit."""
    size = FONT
    while (width := ImageFont.load_default(size).getlength(title) + FONT) > picture.width and size > SMALL_FONT:
        size -= 1
    ground = Image.new("RGB", (max(picture.width, math.ceil(width)), picture.height + 2 * size), "black")
    ground.paste(picture, (0, 2 * size))
    ImageDraw.Draw(ground).text((FONT // 2, size), title, "white", ImageFont.load_default(size), anchor="lm")
    return ground


def _file_for(trainer: Any, path: str, folder: Path) -> Path:  # noqa: ANN401
    """Return where anomalib's visualizer files what belongs to an image, in a folder."""
    name, category = (getattr(trainer.datamodule, key, None) for key in ("name", "category"))
    return generate_output_filename(path, folder, name, category)


class SaveMaps(Callback):
    """Saves anomaly maps of a test or a prediction, to be given to the trainer.

    An image's map is a grey picture (PNG, 16 bits) of the image's own size, from 0 to 65535; what is above 32768 is
    abnormal by the pixel threshold. The maps of a NIfTI scan's slices are one NIfTI file in the scan's own geometry,
    from 0 to 1 with the threshold at 0.5.
    """

    def on_test_start(self, *args: Any) -> None:  # noqa: ANN401
        """Forget earlier runs."""
        del args
        self._saved: dict[str, Path] = {}

    on_predict_start = on_test_start  # type: ignore[assignment]

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: ImageBatch, *args: Any) -> None:  # noqa: ANN401
        """Save the maps of a batch."""
        del args
        if outputs.anomaly_map is None or not outputs.image_path:
            return
        # The trainer's callbacks run before the model's, and so before its post-processor.
        moved = pl_module.post_processor(InferenceBatch(pred_score=outputs.pred_score, anomaly_map=outputs.anomaly_map))
        for path, one in zip(outputs.image_path, torch.as_tensor(moved.anomaly_map), strict=True):
            width, height = read_image(path).size
            scaled = interpolate(one.float().reshape(1, 1, *one.shape[-2:]), (height, width), mode="bilinear")[0, 0]
            file = _file_for(trainer, path, Path(trainer.default_root_dir) / "maps")
            self._saved[path] = file = file.with_name(f"{stem_of(file)}.png")
            grey = (WHITE * scaled.clamp(0, 1)).round().cpu().numpy().astype(np.uint16)
            with atomic_write(file) as partial:
                Image.fromarray(grey).save(partial, "png")

    on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Put the maps of a NIfTI scan's slices together."""
        del pl_module
        saved: list[Any] = [self._saved]
        if trainer.world_size > 1:
            saved = [None] * trainer.world_size
            torch.distributed.all_gather_object(saved, self._saved)
        if not trainer.is_global_zero:
            return
        scans: dict[Path, dict[int, Path]] = defaultdict(dict)
        for path, file in (pair for one in saved for pair in one.items()):
            source, index = origin_of(Path(path)) or (Path(), 0)
            if source.name.lower().endswith(NIFTI_SUFFIXES):
                scans[source][index] = file
        for source, files in scans.items():
            slices = np.stack([np.asarray(Image.open(files[index]), np.float32) / WHITE for index in sorted(files)])
            target = min(files.values()).with_name(f"{stem_of(source)}.nii.gz")
            if write_like_nifti(slices, source, target):
                for file in files.values():
                    file.unlink()

    on_predict_end = on_test_end
