"""Runs what is missing of a comparison, each job in a process of its own, on this machine or on a cluster.

Both ways run the same command, :mod:`anomalib_mvfa.compare.execute`. On this machine a plain subprocess does, since
submitit's local executor needs signals that Windows does not have.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..arguments import check_bounds
from ..callbacks import TERMINATED
from ..io import explain_failed_write
from .config import Comparison
from .execute import write_failure
from .job import Job, build_datamodule, finished_result, identify, jobs_of
from .results import JobResult, job_folder, read_result, supersede

GRACE = 10
"""Seconds that a process has to end when told to."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(16 * 2**20)}
"""Lets the GNU C library return large blocks to the system at once. By default it keeps blocks of up to 32 MiB, which
grew to 18 GB in a coreset whose every step takes and frees a block of 31 MB."""
PREEMPTED = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "REVOKED")
"""States of Slurm that say nothing about the job itself."""


def compare(comparison: Comparison, output: Path, workers: int | None = None) -> list[JobResult]:
    """Run the jobs of a comparison that have not finished yet; :func:`~anomalib_mvfa.compare.report.report` shows them.

    A finished job is run again only if something changed that its numbers depend on; its earlier results are moved
    away. A job that has failed or was interrupted is run again.

    Args:
        comparison: What to compare.
        output: Folder of the results.
        workers: Jobs at a time on this machine; by default as many as there are GPUs, or one.

    Returns:
        Results of all jobs, in their order.

    Raises:
        ValueError: The comparison names what does not exist.
        RuntimeError: Another process works in this folder.
    """
    jobs = jobs_of(comparison)
    gpus = torch.cuda.device_count() if comparison.accelerator in {"auto", "gpu", "cuda"} else 0
    workers = max(gpus, 1) if workers is None else workers
    check_bounds("workers", workers, 1)
    for source in comparison.sources().values():
        build_datamodule(source).prepare_data()  # downloads what it can, once for all jobs
    digests = identify(jobs)
    with _alone_in(output):
        comparison.save(output / "config.yaml")
        results = {name: found for name, digest in digests.items() if (found := finished_result(output, name, digest))}
        missing = [job for job in jobs if job.folder not in results]
        for job in missing:
            earlier = read_result(output, job.folder)
            if earlier is not None and earlier.finished:
                supersede(output, earlier)
            elif earlier is not None:
                shutil.rmtree(job_folder(output, job.folder))
        if results and missing:
            Console().print(f"{len(results)} of {len(jobs)} jobs have finished before.")
        if comparison.cluster:
            ended = _on_cluster(missing, output, comparison.timeout_min, dict(comparison.cluster))
        else:
            ended = _on_this_machine(missing, output, comparison.timeout_min, workers, gpus)
        for result in _shown(ended, [*results.values()], missing, len(missing) if comparison.cluster else workers):
            results[result.job] = result
    return [results[job.folder] for job in jobs]


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Keep other processes out of a folder, and clear away what a killed one was writing."""
    lock = FileLock(output / ".lock", timeout=0)
    try:
        with explain_failed_write(output):
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        msg = f"Another process is running a comparison in {output}. Wait for it, or give another output."
        raise RuntimeError(msg) from error
    try:
        for partial in (output / "jobs").glob(".*.partial"):
            shutil.rmtree(partial)
        yield
    finally:
        lock.release()


def _shown(
    ended: Iterable[JobResult], before: list[JobResult], missing: list[Job], parallel: int
) -> Iterator[JobResult]:
    """Pass results on, and show how far it has come and how long it may take."""
    took: dict[str, list[float]] = {}
    left = [job.name for job in missing]

    def learn(result: JobResult) -> None:
        if result.finished:
            took.setdefault(result.method, []).append(result.seconds["job"])

    for result in before:
        learn(result)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[left]}"), disable=not missing) as progress:
        task = progress.add_task("jobs", total=len(missing), left="")
        for result in ended:
            left.remove(result.method)
            learn(result)
            known = [seconds for times in took.values() for seconds in times]
            seconds = sum(fmean(took.get(name) or known) for name in left) / parallel if known else 0
            progress.update(task, advance=1, left=f"about {duration(seconds)} left" if left and known else "")
            progress.console.print(f"{result.job}: {_summary(result)}", markup=False, highlight=False)
            yield result


def _summary(result: JobResult) -> str:
    if not result.finished:
        return f"failed: {result.error}" if result.error else "interrupted"
    areas = [f"{name} {result.metrics[name]:.4f}" for name in ("image_AUROC", "pixel_AUROC") if name in result.metrics]
    return f"{', '.join(areas)} ({duration(result.seconds['job'])})"


def duration(seconds: float) -> str:
    """Return a time in words: ``42 s``, ``7 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _command(job: Job, run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.execute", str(run.resolve()), job.folder, *options]


def _environment(threads: int) -> dict[str, str]:
    """Return the environment of jobs: as here, importing from the same places."""
    paths = os.pathsep.join(filter(None, sys.path))
    return {"OMP_NUM_THREADS": str(threads), **ENVIRONMENT, **os.environ, "PYTHONPATH": paths}


def _on_this_machine(
    jobs: list[Job], run: Path, timeout_min: int | None, workers: int, gpus: int
) -> Iterator[JobResult]:
    """Run jobs in processes; whatever ends this one, such as Ctrl-C, ends them too and marks them interrupted."""
    environment = _environment(max((os.cpu_count() or 1) // workers, 1))
    waiting, free = jobs[::-1], [*range(workers)][::-1]
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by worker
    try:
        while waiting or running:
            while waiting and free:
                job, worker = waiting.pop(), free.pop()
                running[worker] = job, _start(job, run, worker % gpus if gpus else None, environment), time.monotonic()
            time.sleep(0.1)
            for worker, (job, process, start) in [*running.items()]:
                late = timeout_min is not None and time.monotonic() - start > 60 * timeout_min
                if late:
                    _end([process])
                if process.poll() is not None:
                    del running[worker]
                    free.append(worker)
                    yield _result(job, run, process.returncode, f"ran longer than timeout_min={timeout_min}" * late)
    finally:
        _end([process for _, process, _ in running.values()])
        for job, *_ in running.values():
            if read_result(run, job.folder) is None:
                write_failure(job, run, None)


def _start(job: Job, run: Path, gpu: int | None, environment: dict[str, str]) -> subprocess.Popen:
    """Start a job's process, in a session of its own, which Ctrl-C in the terminal does not reach."""
    log = run / "logs" / f"{job.folder}.log"
    log.parent.mkdir(exist_ok=True)
    command = _command(job, run, "--parent", str(os.getpid()), *(["--gpu", str(gpu)] if gpu is not None else []))
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with explain_failed_write(log), log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, env=environment, start_new_session=True, **streams)  # noqa: S603  # ours


def _end(processes: list[subprocess.Popen]) -> None:
    """End processes and what they have started; those that do not heed the request are killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if hasattr(os, "killpg"):  # not on Windows
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _result(job: Job, run: Path, code: int, problem: str) -> JobResult:
    """Return the result that a process has left, or write one that says how it ended."""
    result = read_result(run, job.folder)
    if result is not None:
        return result
    if not problem and code in {-signal.SIGTERM, TERMINATED}:
        return write_failure(job, run, None)
    if not problem:
        killed = code == -getattr(signal, "SIGKILL", 9)
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        problem = f"ended {how}{', perhaps because memory ran out' if killed else ''}"
    return write_failure(job, run, f"The job's process {problem}. See logs/{job.folder}.log.")


def _on_cluster(jobs: list[Job], run: Path, timeout_min: int | None, parameters: dict[str, Any]) -> Iterator[JobResult]:
    """Run jobs by submitit, as one job array."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        msg = "cluster needs the package submitit: pip install 'anomalib-mvfa[cluster]'."
        raise ValueError(msg) from error
    executor = submitit.AutoExecutor(folder=run / "cluster", cluster=parameters.pop("cluster", None))
    executor.update_parameters(**{"timeout_min": timeout_min} if timeout_min else {}, **parameters)
    function = submitit.helpers.CommandFunction
    with executor.batch():
        handles = [executor.submit(function(_command(job, run), env=ENVIRONMENT)) for job in jobs]
    waiting = dict(zip(handles, jobs, strict=True))
    try:
        for handle in submitit.helpers.as_completed(handles, poll_frequency=1):
            job, ended, state = waiting.pop(handle), handle.exception(), handle.state
            result = read_result(run, job.folder)
            if result is None and state.startswith(PREEMPTED):
                result = write_failure(job, run, None)
            message = " ".join(f"{state}: {ended}. See {handle.paths.stderr}.".split())
            yield result or write_failure(job, run, message)
    finally:
        for handle, job in waiting.items():
            handle.cancel()
            if read_result(run, job.folder) is None:
                write_failure(job, run, None)
