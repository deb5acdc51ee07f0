"""What a comparison leaves behind: one folder per job, written atomically.

.. code-block:: text

    RUN/config.yaml              the comparison, as it was asked for last
    RUN/jobs/<job>/row.json      the job's row; the last file that is written
    RUN/jobs/<job>/scores.npz    what every test image scored, see `anomalib_mvfa.compare.bootstrap.Scores`
    RUN/jobs/<job>/pictures.npz  some test images and their maps, see `Pictures`
    RUN/jobs/<job>/features.npz  features with and without adapters, see `Features`; of MVFA only
    RUN/jobs/<job>/error.txt     the traceback of a job that failed
    RUN/logs/<job>.log           what the job printed
    RUN/superseded/              folders of jobs that have been asked for otherwise since
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..io import explain_full_disk
from .bootstrap import read_arrays


@dataclass
class Row:
    """A finished or failed job.

    Args:
        method: Its name in the comparison.
        protocol: What it learns from: "full_normal", "few_normal", "few_shot", "leave_one_out" or "zero_shot".
        category: What is tested.
        k_shot: K, or None where the protocol has no shots.
        seed: Seed of draws, orders and initial weights.
        job: Name of the job's folder.
        digest: Digest of the job's configuration; a job with another digest is another job.
        config: The same in full.
        error: What went wrong, in one line; None for a finished job.
        metrics: Values in [0, 1] by anomalib's names, such as "image_AUROC"; no pixel metrics without masks.
        images: How many images "train", "validate" and "test".
        train_set: Digest of the contents of images that were learnt from, with their labels and masks; of few-shot,
            that is the support.
        test_set: The same of the tested ones: rows with different ones can't be compared.
        random_weights: Whether the frozen backbone's weights are random, so that scores mean nothing clinically.
        weights: Name of the file that the backbone's weights came from, or what the model takes by itself.
        seconds: "fit", and "image", to score one test image.
        parameters: "all" of the model's, and those "trained".
        memory_mb: Largest memory of the process (CPU) or on the device (GPU) while the job ran, in 2**20 bytes.
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
    digest: str
    config: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    train_set: str | None = None
    test_set: str | None = None
    random_weights: bool = False
    weights: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    memory_mb: float | None = None
    device: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None


@dataclass
class Pictures:
    """Some test images, the same ones for every method, and the maps that a method made of them.

    Axes: M images, S side in pixels, l levels.

    Args:
        paths: Paths of the images (M,).
        labels: 1 where abnormal (M,).
        images: 8-bit RGB ``(M, S, S, 3)``.
        masks: 8-bit, above 0 where abnormal ``(M, S, S)``; None for data without masks.
        maps: The method's own scores ``(M, S, S)``, higher is more abnormal; only their order is comparable.
        levels: Blocks of the backbone that have maps of their own (l,); empty for methods without levels.
        level_maps: Their maps ``(M, l, S, S)``.
    """

    paths: list[str]
    labels: list[int]
    images: np.ndarray
    masks: np.ndarray | None
    maps: np.ndarray
    levels: list[int]
    level_maps: np.ndarray

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file."""
        _save(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Pictures":
        """Read what :meth:`save` wrote."""
        saved = read_arrays(path)
        for name in ("paths", "labels", "levels"):
            saved[name] = saved[name].tolist()
        return cls(**{"masks": None, **saved})


@dataclass
class Features:
    """Image features of the det branch, means over patches, all levels side by side (paper, Figure 6).

    Args:
        labels: 1 where abnormal (N,).
        frozen: Features of the frozen image tower ``(N, l * D)``.
        adapted: Features of the trained adapters ``(N, l * E)``.
    """

    labels: np.ndarray
    frozen: np.ndarray
    adapted: np.ndarray

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file."""
        _save(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Read what :meth:`save` wrote."""
        return cls(**read_arrays(path))


def _save(path: Path, arrays: dict[str, Any]) -> None:
    kept: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    np.savez_compressed(path, **kept)


def job_folder(run: Path, job: str) -> Path:
    """Return the folder of a job."""
    return run / "jobs" / job


def read_row(run: Path, job: str) -> Row | None:
    """Return a job's row, or None if it has not ended."""
    path = job_folder(run, job) / "row.json"
    if not path.is_file():
        return None
    try:
        return Row(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        msg = f"{path} is no row of a job ({error}). Remove its folder, and the job is run again."
        raise ValueError(msg) from error


def read_rows(run: Path) -> list[Row]:
    """Return the rows of all jobs that have ended, sorted by job."""
    jobs = sorted(path.name for path in (run / "jobs").glob("[!.]*"))  # those with a dot were cut short
    return [row for row in (read_row(run, job) for job in jobs) if row is not None]


@contextmanager
def writing(run: Path, job: str) -> Iterator[Path]:
    """Yield a folder for a job's files; it replaces the job's folder once it is complete."""
    partial = job_folder(run, f".{job}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target = job_folder(run, job)
    try:
        with explain_full_disk(target):
            partial.mkdir(parents=True)
            yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def supersede(run: Path, row: Row) -> None:
    """Move a job's folder away, for a job of the same name with another configuration."""
    target = run / "superseded" / f"{row.job}-{row.digest[:8]}"
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    job_folder(run, row.job).replace(target)


def write_row(folder: Path, row: Row) -> None:
    """Write a job's row into its folder."""
    (folder / "row.json").write_text(json.dumps(asdict(row), indent=2) + "\n", "utf-8")
