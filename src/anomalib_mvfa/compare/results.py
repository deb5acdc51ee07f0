"""What a comparison leaves behind: one folder per job, replaced as a whole once the job has ended.

.. code-block:: text

    RUN/config.yaml              the comparison, as it was last run
    RUN/jobs/<job>/result.json   a :class:`JobResult`, written last
    RUN/jobs/<job>/scores.csv    every test image: image, label, score and predicted (whether above the threshold)
    RUN/jobs/<job>/pixels.npz    counts (N, 2, bins): normal and abnormal pixels of each image in bins of rising scores
    RUN/jobs/<job>/pictures.npz  some test images and their maps, see `recorders.save_pictures`
    RUN/jobs/<job>/features.npz  features with and without adapters, see `recorders.save_features`; of MVFA only
    RUN/jobs/<job>/error.txt     the traceback of a job that failed
    RUN/logs/<job>.log           what the job printed
    RUN/superseded/              folders of jobs that something has changed for since
    RUN/report/                  the HTML report and its tables
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..io import explain_failed_write


@dataclass
class JobResult:
    """How a job ended.

    Args:
        method: Name in the comparison.
        protocol: What the method learns from, see :class:`~anomalib_mvfa.compare.config.Method`.
        category: What is tested.
        k_shot: K, None where the protocol has no shots.
        seed: Seed of draws, orders and initial weights.
        job: Name of the job's folder.
        status: An interrupted job has no error; it is run again like a failed one. A missing one has left no file.
        error: What went wrong, in one line.
        digest: SHA-256 of ``depends_on``.
        depends_on: All that the numbers depend on, see :meth:`~anomalib_mvfa.compare.job.Job.depends_on`.
        metrics: Values in [0, 1] by anomalib's names, such as "image_AUROC"; no pixel metrics without masks.
        images: How many images "train", "validate" and "test".
        test_set: Digest of the tested images, labels and masks: results with different ones can't be compared.
        epochs: Epochs of training.
        selected_epoch: The epoch chosen on the test images, which makes the metrics optimistic; None for the last one.
        random_weights: Whether the frozen backbone's weights are random, so that scores mean nothing clinically.
        weights: Name of the file that the backbone's weights came from, or what the model takes by itself.
        seconds: "job", "fit", and "image", to score one test image.
        parameters: "all" of the model's, and those "trained".
        memory_mb: Largest memory of the process (CPU) or on the device (GPU), in 2**20 bytes.
        device: Name of the device.
        commit: Commit of this package, where it runs from a checkout.
        versions: Versions of the packages that results depend on.
        date: When the job ended (ISO 8601).
    """

    method: str
    protocol: str
    category: str
    k_shot: int | None
    seed: int
    job: str
    status: Literal["finished", "failed", "interrupted", "missing"] = "finished"
    error: str | None = None
    digest: str | None = None
    depends_on: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    test_set: str | None = None
    epochs: int | None = None
    selected_epoch: int | None = None
    random_weights: bool = False
    weights: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    memory_mb: float | None = None
    device: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None

    @property
    def finished(self) -> bool:
        """Whether there are numbers."""
        return self.status == "finished"

    def write(self, folder: Path) -> None:
        """Write ``result.json`` into a folder."""
        (folder / "result.json").write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def job_folder(run: Path, job: str) -> Path:
    """Return the folder of a job."""
    return run / "jobs" / job


def read_result(run: Path, job: str) -> JobResult | None:
    """Return a job's result, None if it has not ended.

    Raises:
        ValueError: The file is corrupt.
    """
    path = job_folder(run, job) / "result.json"
    if not path.is_file():
        return None
    try:
        return JobResult(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        msg = f"{path} is no result of a job ({error}). Remove its folder, and the job is run again."
        raise ValueError(msg) from error


def read_results(run: Path) -> list[JobResult]:
    """Return the results of all jobs that have ended, sorted by job."""
    jobs = sorted(path.name for path in (run / "jobs").glob("[!.]*"))  # those with a dot were cut short
    return [result for result in (read_result(run, job) for job in jobs) if result is not None]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file of a job.

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
        msg = f"{path} cannot be read; it may be cut short. Remove its folder, and the job is run again."
        raise ValueError(msg) from error


@contextmanager
def writing(run: Path, job: str) -> Iterator[Path]:
    """Yield a folder for a job's files; it replaces the job's folder once it is complete."""
    partial, target = job_folder(run, f".{job}.partial"), job_folder(run, job)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_failed_write(target):
            partial.mkdir(parents=True)
            yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def supersede(run: Path, result: JobResult) -> None:
    """Move a job's folder away, for a job of the same name that depends on something else."""
    target = run / "superseded" / f"{result.job}-{(result.digest or 'unknown')[:8]}"
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    job_folder(run, result.job).replace(target)
