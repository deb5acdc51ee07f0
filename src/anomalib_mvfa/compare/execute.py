"""Runs one job in a process of its own: ``python -m anomalib_mvfa.compare.execute RUN JOB``.

Anomalib's engine trains and tests; callbacks keep what the report shows. The exit code is 0 once a result is written,
be it a failure; a process that is told to end (SIGTERM) leaves none.
"""

import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning import seed_everything
from lightning.pytorch import Callback

from ..callbacks import ADVICE, TERMINATED, FiniteNumbers, FreedMemory, is_out_of_memory
from ..io import commit, device_name, versions
from ..metrics.evaluator import default_evaluator
from ..model.export import OrderKeepingPostProcessor
from . import recorders
from .config import Comparison
from .job import PARTS, Job, digest_of, image_digests, jobs_of
from .models import Origin, build_model
from .results import JobResult, writing

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


def execute(job: Job, run: Path, gpu: int | None = None) -> JobResult:
    """Train and test, and write the job's folder; a failure is a result too.

    Args:
        job: What to do.
        run: Folder of the comparison.
        gpu: Index of the GPU, by default the first that there is.
    """
    commit()  # of what is loaded now
    try:
        with writing(run, job.folder) as folder:
            result = _train_and_test(job, folder, gpu)
            result.write(folder)
    except Exception as error:  # whatever a model or its data raise is this job's result
        logger.exception("%s failed.", job.folder)
        advice = f" {ADVICE}" if is_out_of_memory(error) else ""
        message = " ".join(f"{type(error).__name__}: {error}{advice}".split())
        result = write_failure(job, run, message, traceback.format_exc())
    return result


def write_failure(job: Job, run: Path, error: str | None, details: str = "") -> JobResult:
    """Write the result of a job that has failed or was interrupted.

    Args:
        job: The job.
        run: Folder of the comparison.
        error: What went wrong, in one line; None if it was interrupted.
        details: The traceback.
    """
    result = job.result(status="failed" if error else "interrupted", error=error, date=_now())
    with writing(run, job.folder) as folder:
        if error:
            (folder / "error.txt").write_text(details or error, "utf-8")
        result.write(folder)
    return result


def _train_and_test(job: Job, folder: Path, gpu: int | None) -> JobResult:
    start = time.perf_counter()
    datamodule: Any = job.datamodule()
    depends_on = job.depends_on(image_digests(datamodule))
    model, origin = _model(job, datamodule)
    watch, scores = recorders.Stopwatch(), recorders.ScoreRecorder()
    pictures = recorders.Recorder(recorders.maps_of, recorders.PICTURED)
    features = recorders.Recorder(recorders.features_of, recorders.FEATURED)
    select, epoch = job.comparison.select_epoch_on_test, None
    with TemporaryDirectory() as scratch:
        every_epoch = ModelCheckpoint(scratch, filename="{epoch}", save_top_k=-1)
        kept = [watch, scores, pictures, features, *([every_epoch] if select else [])]
        engine = _engine(job, [FiniteNumbers(), FreedMemory(), *kept], scratch, gpu)
        (tested,) = engine.train(model, datamodule=datamodule)
        trainer: Any = engine.trainer  # Lightning sets some attributes where type checkers do not see them
        epochs = trainer.current_epoch
        trained = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        if select:
            epoch, tested = _best_epoch(engine, model, datamodule, Path(scratch))

    threshold = getattr(model.post_processor, "image_threshold", None)
    scores.save(folder, None if threshold is None or threshold.isnan() else float(threshold))
    levels = getattr(model.model, "scored_levels", ())
    recorders.save_pictures(pictures, folder, datamodule.test_data.samples, levels)
    recorders.save_features(features, folder)
    device = trainer.strategy.root_device
    return job.result(
        digest=digest_of(depends_on),
        depends_on=depends_on,
        metrics={
            name: float(value)
            for name, value in tested.items()
            if name.startswith("image_") or (name.startswith("pixel_") and "pixels" in scores.kept)
        },
        images={name: len(getattr(datamodule, part, None) or ()) for name, part in PARTS.items()},
        test_set=depends_on["images"]["test"],
        epochs=epochs,
        selected_epoch=epoch,
        random_weights=origin.is_random,
        weights=origin.name,
        seconds={
            "job": time.perf_counter() - start,
            "fit": watch.fit,
            "image": watch.test / max(len(scores.kept["paths"]), 1),
        },
        parameters={
            "all": sum(parameter.numel() for parameter in model.parameters()),
            "trained": sum(parameter.numel() for parameter in trained),
        },
        memory_mb=recorders.peak_memory(device),
        device=device_name(device),
        commit=commit(),
        versions=versions(),
        date=_now(),
    )


def _model(job: Job, datamodule: Any) -> tuple[AnomalibModule, Origin]:  # noqa: ANN401  # any datamodule
    """Return the job's model, with the same post-processing and metrics for every method."""
    seed_everything(job.seed, workers=True, verbose=False)
    defaults = job.model_defaults(getattr(datamodule, "class_name", None))
    model, origin = build_model(job.method.model, job.weights, **defaults)
    model.post_processor = OrderKeepingPostProcessor()
    model.evaluator = default_evaluator()
    model.visualizer = None
    return model, origin


def _engine(job: Job, callbacks: list[Callback], folder: str, gpu: int | None) -> Engine:
    return Engine(
        callbacks=callbacks,
        logger=False,
        default_root_dir=folder,
        accelerator=job.comparison.accelerator,
        devices=1 if gpu is None else [gpu],
        **{"enable_progress_bar": False, "enable_model_summary": False, **job.method.trainer},
    )


def _best_epoch(engine: Engine, model: Any, datamodule: Any, folder: Path) -> tuple[int, Any]:  # noqa: ANN401
    """Return the epoch with the best image plus pixel AUROC on the test images, and its metrics."""

    def test(path: Path) -> Any:  # noqa: ANN401  # Lightning's metrics
        return engine.test(model=model, datamodule=datamodule, ckpt_path=path, verbose=False)[0]

    def quality(path: Path) -> float:
        tested = test(path)
        defined = [tested[name] for name in ("image_AUROC", "pixel_AUROC") if not math.isnan(tested[name])]
        if not defined:
            msg = "select_epoch_on_test needs test images of both kinds, normal and abnormal. Add some, or turn it off."
            raise ValueError(msg)
        return sum(defined)

    paths = {int(path.stem.split("=")[1]) + 1: path for path in folder.glob("epoch=*.ckpt")}
    best = max(sorted(paths), key=lambda epoch: quality(paths[epoch]))
    return best, test(paths[best])  # again, so that the recorders hold this epoch's scores


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _end_with(parent: int) -> None:
    """End this process when its parent ends, or has ended before."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Run the job of this name in a comparison's folder; return the exit code."""
    parser = ArgumentParser(prog="python -m anomalib_mvfa.compare.execute")
    parser.add_argument("run", type=Path)
    parser.add_argument("job")
    parser.add_argument("--gpu", type=int)
    parser.add_argument("--parent", type=int, help="Process with which this one ends, even if that is killed.")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # Lightning's own handler calls this one too
    if options.parent is not None:
        threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    jobs = {job.folder: job for job in jobs_of(Comparison.load(options.run / "config.yaml"))}
    execute(jobs[options.job], options.run, options.gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
