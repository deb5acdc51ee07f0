"""Runs one job of a comparison: anomalib's engine trains and tests, and callbacks keep what the report shows."""

import logging
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.pipelines.components import Job as PipelineJob
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from pandas import DataFrame
from PIL import Image
from torch.nn.functional import interpolate

from ..callbacks import ADVICE, is_out_of_memory
from ..data.reading import read_image, read_mask
from ..data.support import draw
from ..io import commit, dataset_digest, device_name, versions
from ..metrics.evaluator import default_evaluator
from ..model.export import OrderKeepingPostProcessor
from ..model.torch_model import MvfaModel
from .bootstrap import ScoreRecorder
from .level_maps import level_maps
from .memory import return_freed_memory, return_large_blocks
from .plan import Job
from .results import Features, Pictures, Row, write_row, writing
from .weights import build_model

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

SIDE = 160
"""Height and width of saved images and maps in pixels."""
PICTURED = {LabelName.NORMAL: 1, LabelName.ABNORMAL: 3}
"""How many normal and abnormal test images the report shows."""
FEATURE_IMAGES = 50
"""How many normal, and how many abnormal test images give features."""


class CompareJob(PipelineJob):
    """A job in the form that anomalib's pipelines run.

    Args:
        job: What to do.
        run: Folder of the comparison; the job's files are written there as soon as it has ended.
    """

    name = "compare"

    def __init__(self, job: Job, run: Path) -> None:
        self.job = job
        self.folder = run
        self.commit = commit()

    def run(self, task_id: int | None = None) -> Row:
        """Run the job; a failure gives a row too.

        Args:
            task_id: Index of the GPU, by default the first that there is.
        """
        return_large_blocks()
        try:
            with writing(self.folder, self.job.folder) as folder:
                row = _train_and_test(self.job, folder, task_id)
                row.commit = self.commit
                write_row(folder, row)
        except Exception as error:  # whatever a model or its data raise is this job's result
            logger.exception("%s failed.", self.job.folder)
            row = write_failure(self.job, self.folder, error, traceback.format_exc())
        finally:
            return_freed_memory()
        return row

    @staticmethod
    def collect(results: Sequence[Row]) -> DataFrame:
        """Return a table with one line per job."""
        return DataFrame([asdict(row) for row in results])

    @staticmethod
    def save(results: DataFrame) -> None:
        """Do nothing: every job has saved itself."""


def write_failure(job: Job, run: Path, error: BaseException, details: str = "") -> Row:
    """Write the row of a job that failed, and its traceback beside."""
    row = job.row()
    advice = f" {ADVICE}" if is_out_of_memory(error) else ""
    row.error = " ".join(f"{type(error).__name__}: {error}{advice}".split())
    row.date = _now()
    with writing(run, job.folder) as folder:
        (folder / "error.txt").write_text(details or row.error, "utf-8")
        write_row(folder, row)
    return row


def _train_and_test(job: Job, folder: Path, gpu: int | None) -> Row:
    start = time.perf_counter()
    seed_everything(job.seed, workers=True, verbose=False)
    datamodule = job.datamodule()
    model, origin = build_model(job.method.model, job.weights, **job_arguments(job, datamodule))
    model.post_processor = OrderKeepingPostProcessor()
    model.evaluator = default_evaluator()
    model.visualizer = None

    watch, recorder, pictures = Stopwatch(), ScoreRecorder(), PictureRecorder()
    features = FeatureRecorder() if job.is_first else None
    with TemporaryDirectory() as scratch:
        engine = Engine(
            callbacks=[callback for callback in (watch, recorder, pictures, features) if callback],
            logger=False,
            default_root_dir=scratch,
            accelerator=job.accelerator,
            devices=1 if gpu is None else [gpu],
            **{"enable_progress_bar": False, "enable_model_summary": False, **job.method.trainer},
        )
        memory = Memory()
        (tested,) = engine.train(model, datamodule=datamodule)
        trainer: Any = engine.trainer  # Lightning sets some attributes where type checkers do not see them

    recorder.scores.save(folder / "scores.npz")
    if saved := pictures.result(datamodule.test_data.samples):
        saved.save(folder / "pictures.npz")
    if features and features.labels:
        features.result().save(folder / "features.npz")
    device = trainer.strategy.root_device
    row = job.row()
    row.metrics = {name: float(value) for name, value in tested.items() if name.startswith(("image_", "pixel_"))}
    parts = {"train": "train_data", "validate": "val_data", "test": "test_data"}
    row.images = {name: len(getattr(datamodule, part, ())) for name, part in parts.items()}
    row.train_set, row.test_set = dataset_digest(datamodule.train_data), dataset_digest(datamodule.test_data)
    row.random_weights, row.weights = origin.is_random, origin.name
    row.seconds = {
        "job": time.perf_counter() - start,
        "fit": watch.fit,
        "image": watch.test / max(len(recorder.scores.paths), 1),
    }
    trained = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    row.parameters = {
        "all": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in trained),
    }
    row.memory_mb = memory.peak(device)
    row.device, row.versions, row.date = device_name(device), versions(), _now()
    return row


def job_arguments(job: Job, datamodule: Any) -> dict[str, Any]:  # noqa: ANN401  # a protocol's datamodule
    """Return arguments that a job sets where its model has them, and the method does not give them."""
    return {"seed": job.seed, "k_shot": job.k_shot or 0, "class_name": datamodule.class_name}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Stopwatch(Callback):
    """Measures what a model takes, without metrics and other callbacks.

    Attributes:
        fit: Seconds from the beginning to the first test batch.
        test: Seconds in test steps.
    """

    def __init__(self) -> None:
        self.fit = self.test = 0.0
        self._start = time.perf_counter()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the time of fitting."""
        del trainer
        self.fit = self._now(pl_module) - self._start
        self.test = 0.0

    def on_test_batch_start(self, trainer: Trainer, pl_module: AnomalibModule, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Start the time of a batch."""
        del trainer, args, kwargs
        self._start = self._now(pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: AnomalibModule, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Stop it."""
        del trainer, args, kwargs
        self.test += self._now(pl_module) - self._start

    @staticmethod
    def _now(module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


class Memory:
    """The largest memory from its making on: of the process, or on a GPU."""

    def __init__(self) -> None:
        self._resets = Path("/proc/self/clear_refs")
        if self._resets.exists():  # Linux; elsewhere the peak is that since the process began
            self._resets.write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak(self, device: torch.device) -> float:
        """Return it, in 2**20 bytes."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        if self._resets.exists():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**10
        import resource  # not on Windows

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class _Chosen(Callback, ABC):
    """Does something with some test images, the same ones for every method.

    Args:
        counts: How many normal and abnormal images.
    """

    def __init__(self, counts: dict[LabelName, int]) -> None:
        self._counts = counts
        self.paths: list[str] = []

    def on_test_start(self, trainer: Any, pl_module: LightningModule) -> None:  # noqa: ANN401  # Lightning's trainer
        """Choose them."""
        del pl_module
        samples = trainer.datamodule.test_data.samples
        self.paths = [
            path
            for kind, count in self._counts.items()
            for path in draw(samples[samples.label_index == kind], count, seed=0).image_path
        ]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        outputs: Any,  # noqa: ANN401
        batch: ImageBatch,
        *args,  # noqa: ANN002
        **kwargs,  # noqa: ANN003
    ) -> None:
        """Look at those that are in a batch."""
        del trainer, outputs, args, kwargs
        rows = [row for row, path in enumerate(batch.image_path or []) if path in self.paths]
        if rows:
            with torch.no_grad():
                self.look(pl_module.model, batch, rows)

    @abstractmethod
    def look(self, model: Any, batch: ImageBatch, rows: list[int]) -> None:  # noqa: ANN401  # any torch model
        """Do it to these rows of a batch."""


class PictureRecorder(_Chosen):
    """Keeps maps of some test images, level by level too where the model has levels."""

    def __init__(self) -> None:
        super().__init__(PICTURED)
        self._maps: dict[str, np.ndarray] = {}
        self._level_maps: dict[str, np.ndarray] = {}
        self._levels: list[int] = []

    def look(self, model: Any, batch: ImageBatch, rows: list[int]) -> None:  # noqa: ANN401
        """Keep the maps."""
        paths = [(batch.image_path or [])[row] for row in rows]
        if batch.anomaly_map is not None:
            maps = _small(batch.anomaly_map[rows].reshape(len(rows), 1, *batch.anomaly_map.shape[-2:]))
            self._maps.update(zip(paths, maps[:, 0], strict=True))
        if isinstance(model, MvfaModel):
            self._levels = model.scored_levels
            by_level = _small(level_maps(model, torch.as_tensor(batch.image)[rows]))
            self._level_maps.update(zip(paths, by_level, strict=True))

    def result(self, samples: DataFrame) -> Pictures | None:
        """Return the saved images; None where the model has made no map.

        Args:
            samples: Anomalib's table of the test images.
        """
        paths = [path for path in self.paths if path in self._maps]
        if not paths:
            return None
        rows = samples.set_index("image_path", drop=False).loc[paths]
        images = [read_image(path) for path in paths]
        masks = None
        if samples.attrs.get("task") == "segmentation":
            masks = np.stack([_mask(row, image) for (_, row), image in zip(rows.iterrows(), images, strict=True)])
        return Pictures(
            paths=paths,
            labels=rows.label_index.astype(int).tolist(),
            images=np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]),
            masks=masks,
            maps=np.stack([self._maps[path] for path in paths]),
            levels=self._levels,
            level_maps=np.stack([self._level_maps[path] for path in paths]) if self._levels else np.zeros(0),
        )


def _small(maps: torch.Tensor) -> np.ndarray:
    return interpolate(maps.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True).cpu().numpy()


def _mask(row: Any, image: Image.Image) -> np.ndarray:  # noqa: ANN401  # of a samples table
    if row.label_index != LabelName.ABNORMAL:
        return np.zeros((SIDE, SIDE), np.uint8)
    return np.asarray(read_mask(row.mask_path, image.size).resize((SIDE, SIDE), Image.Resampling.NEAREST))


class FeatureRecorder(_Chosen):
    """Keeps image features with and without adapters, of models that have adapters in the stream (paper, Figure 6)."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(PICTURED, FEATURE_IMAGES))
        self.labels: list[int] = []
        self._frozen: list[np.ndarray] = []
        self._adapted: list[np.ndarray] = []

    def look(self, model: Any, batch: ImageBatch, rows: list[int]) -> None:  # noqa: ANN401
        """Keep means over patches, of all levels side by side."""
        if type(model) is not MvfaModel:
            return
        image = torch.as_tensor(batch.image)[rows]
        for kept, levels in ((self._frozen, model.frozen_tokens(image)), (self._adapted, model.tokens(image).det)):
            kept.append(torch.cat([level[:, 1:].mean(dim=1) for level in levels], dim=-1).float().cpu().numpy())
        self.labels += torch.as_tensor(batch.gt_label)[rows].int().tolist()

    def result(self) -> Features:
        """Return them."""
        return Features(np.array(self.labels), np.concatenate(self._frozen), np.concatenate(self._adapted))
