"""How long jobs may take: from jobs of the same method that have finished, or else from one timed forward pass."""

import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from .job import job_arguments
from .plan import Job
from .results import Row
from .weights import build_model

PASSES = 3
"""How many are timed; the fastest counts."""
TRAINING_PASSES = 3
"""Cost of a training image in forward passes: forward, and backward twice as much."""


class Estimate:
    """Seconds that jobs may take.

    Args:
        jobs: Jobs of the comparison.
        run: Folder of the run; the jobs that have finished there are learnt from.
        probe: Time a forward pass of methods of which no job has finished.
    """

    def __init__(self, jobs: list[Job], run: Path, probe: bool = False) -> None:
        self._probe = probe
        self._took: dict[tuple[str, str], list[float]] = {}
        self._passes: dict[str, tuple[float, float] | None] = {}
        for job in jobs:
            if row := job.finished(run):
                self.learn(row)

    def learn(self, row: Row) -> None:
        """Learn from a job that has ended."""
        if row.error is None:
            self._took.setdefault((row.method, row.category), []).append(row.seconds["job"])

    def seconds(self, job: Job) -> float | None:
        """Return what a job may take, None if nothing is known."""
        same = self._took.get((job.name, job.category)) or [
            seconds for (name, _), took in self._took.items() if name == job.name for seconds in took
        ]
        if same:
            return mean(same)
        return self._probed(job) if self._probe else None

    def left(self, jobs: list[Job]) -> float:
        """Return what jobs may take together; those of unknown methods as much as the mean of the others."""
        known = [seconds for took in self._took.values() for seconds in took]
        guess = mean(known) if known else 0.0
        return sum(guess if (seconds := self.seconds(job)) is None else seconds for job in jobs)

    def _probed(self, job: Job) -> float | None:
        """Return what the images of a job take, by the time of one forward pass of its model."""
        datamodule = job.datamodule()
        datamodule.setup()
        if job.name not in self._passes:
            self._passes[job.name] = _forward(job, datamodule)
        passes = self._passes[job.name]
        if passes is None:
            return None
        seconds, epochs = passes
        return seconds * (len(datamodule.test_data) + epochs * len(datamodule.train_data))


def _forward(job: Job, datamodule: Any) -> tuple[float, float] | None:  # noqa: ANN401  # a protocol's datamodule
    """Return seconds of a forward pass, and how often as much a training image takes in all epochs."""
    given = {name: value for name, value in job.method.model.get("init_args", {}).items() if name != "pre_trained"}
    try:  # on random weights, which need no download and take as long
        model, _ = build_model({**job.method.model, "init_args": given}, None, **job_arguments(job, datamodule))
    except ValueError:  # a model that takes no weights
        return None
    size = model.input_size or (240, 240)
    device = torch.device("cuda" if torch.cuda.is_available() and job.accelerator != "cpu" else "cpu")
    torch_model = model.model.to(device)
    epochs = job.method.trainer.get("max_epochs") or model.trainer_arguments.get("max_epochs")
    epochs = epochs or model.hparams.get("max_epochs", 1)
    learns = any(parameter.requires_grad for parameter in torch_model.parameters()) and epochs > 1
    seconds = _pass(torch_model.train(), torch.rand(1, 3, *size, device=device))
    return None if seconds is None else (seconds, epochs * (TRAINING_PASSES if learns else 1))


@torch.no_grad()
def _pass(model: Any, image: torch.Tensor) -> float | None:  # noqa: ANN401  # any torch model
    """Return seconds of a forward pass; of the backbone alone where a model can't run before it is fitted."""
    parts = [getattr(model, name) for name in ("tokens", "encode_image", "features") if hasattr(model, name)]
    for run in (model, *parts):
        took = []
        try:
            for _ in range(PASSES):
                start = time.perf_counter()
                run(image)
                took.append(time.perf_counter() - start)
        except Exception:  # noqa: BLE001, S112  # models raise all kinds of errors before they are fitted
            continue
        return min(took)
    return None


def duration(seconds: float) -> str:
    """Return a time in words: ``42 s``, ``7 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
