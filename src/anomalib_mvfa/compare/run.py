"""``anomalib-mvfa compare``: runs what is missing of a comparison, and reports."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..io import commit, explain_full_disk
from .estimate import Estimate, duration
from .job import CompareJob, write_failure
from .plan import Comparison, Job
from .report import report
from .results import Row, read_row, supersede

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
STREAMS = (1, 2)
"""Standard output and error, as the system counts them."""
OVERRIDES = {
    "categories": list[str],
    "k_shots": list[int],
    "seeds": list[int],
    "weights": dict[str, str | None],
    "accelerator": str,
}
"""Arguments of a comparison that the command line may give in place of the file."""


def compare(comparison: Comparison, output: Path, workers: int | None = None) -> list[Row]:
    """Run the jobs of a comparison that have not finished yet; :func:`~anomalib_mvfa.compare.report.report` shows them.

    A job that has finished is never run again; one that has failed is, and so is one that asks for something else now,
    whose earlier results are moved away.

    Args:
        comparison: What to compare.
        output: Folder of the results.
        workers: Jobs at a time on this machine; by default as many as there are GPUs, or one.

    Returns:
        Rows of all jobs, in their order; failed ones have an ``error``.

    Raises:
        ValueError: The comparison names what does not exist.
        RuntimeError: Another process works in this folder.
    """
    jobs = comparison.jobs()
    commit()  # of what is loaded now
    gpus = torch.cuda.device_count() if comparison.accelerator in {"auto", "gpu", "cuda"} else 0
    workers = max(gpus, 1) if workers is None else workers
    if workers < 1:
        msg = f"workers={workers} must be at least 1."
        raise ValueError(msg)
    with _alone_in(output):
        comparison.save(output / "config.yaml")
        rows = {job.folder: row for job in jobs if (row := job.finished(output))}
        missing = [job for job in jobs if job.folder not in rows]
        for job in missing:
            earlier = read_row(output, job.folder)
            if earlier is not None and earlier.digest != job.digest:
                supersede(output, earlier)
        if rows and missing:
            Console().print(f"{len(rows)} of {len(jobs)} jobs have finished before.")
        if missing:
            results = (
                _on_cluster(missing, output, dict(comparison.cluster))
                if comparison.cluster
                else _on_this_machine(missing, output, workers, gpus)
            )
            parallel = len(missing) if comparison.cluster else workers
            for row in _shown(results, Estimate(jobs, output), missing, parallel):
                rows[row.job] = row
    return [rows[job.folder] for job in jobs]


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, and run or list a comparison.

    Args:
        arguments: Arguments of the command line.

    Returns:
        Exit code: 0 if every job has finished, 1 if one has failed, 130 after an interrupt.
    """
    parser = ArgumentParser(
        prog="anomalib-mvfa compare",
        description="Train and test several methods on the same images, and report. A run that was cut short goes on.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a comparison, see configs/compare.")
    for name, kind in OVERRIDES.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help="Replaces the value in the file.")
    parser.add_argument(
        "--output", type=Path, default=None, help="Folder of the results; by default named by the file."
    )
    parser.add_argument("--workers", type=int | None, default=None, help="Jobs at a time; by default one a GPU.")
    parser.add_argument("--dry_run", action="store_true", help="List the jobs and how long they may take.")
    options = parser.parse_args(list(arguments))
    output = options.output or Path("results/compare", options.config.stem)
    try:
        overrides = {name: options[name] for name in OVERRIDES if options[name] is not None}
        comparison = Comparison.load(options.config, **overrides)
        if options.dry_run:
            _list(comparison, output)
            return 0
        rows = compare(comparison, output, options.workers)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command goes on with the jobs that are missing.\n")
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    console = Console()
    failed = [row for row in rows if row.error is not None]
    for row in failed:
        console.print(f"failed: {row.job}: {row.error}", style="red", markup=False)
    if len(failed) < len(rows):
        console.print(f"Report: {report(output)}", markup=False)
    return 1 if failed else 0


def _list(comparison: Comparison, output: Path) -> None:
    """Print the jobs, one a line, with what they have taken or may take."""
    jobs = comparison.jobs()
    estimate = Estimate(jobs, output, probe=True)
    width = max(len(job.folder) for job in jobs)
    total = 0.0
    for job in jobs:
        if row := job.finished(output):
            status = f"finished, took {duration(row.seconds['job'])}"
        else:
            seconds = estimate.seconds(job)
            total += seconds or 0.0
            status = f"about {duration(seconds)}" if seconds is not None else "unknown"
        sys.stdout.write(f"{job.folder:{width}}  {job.method.protocol:13}  {status}\n")
    sys.stdout.write(f"{len(jobs)} jobs; what is missing takes about {duration(total)}, one job at a time.\n")


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Keep other processes out of a folder, and clear away what a killed one was writing."""
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", timeout=0)
    try:
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


def _shown(results: Iterator[Row], estimate: Estimate, missing: list[Job], parallel: int) -> Iterator[Row]:
    """Pass rows on, and show how far it has come and how long it may take."""
    left = {job.folder: job for job in missing}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("jobs", total=len(missing), left="")
        for row in results:
            del left[row.job]
            estimate.learn(row)
            seconds = estimate.left(list(left.values())) / parallel
            progress.update(task, advance=1, left=f"about {duration(seconds)} left" if left else "")
            outcome = f"failed: {row.error}" if row.error else _figures(row)
            progress.console.print(f"{row.job}: {outcome}", markup=False, highlight=False)
            yield row


def _figures(row: Row) -> str:
    areas = [f"{name} {row.metrics[name]:.4f}" for name in ("image_AUROC", "pixel_AUROC") if name in row.metrics]
    return f"{', '.join(areas)} ({duration(row.seconds['job'])})"


def _on_this_machine(jobs: list[Job], run: Path, workers: int, gpus: int) -> Iterator[Row]:
    """Run jobs in processes of their own, so that one that dies takes no other with it."""
    free: SimpleQueue[_Worker] = SimpleQueue()
    threads_each = max((os.cpu_count() or 1) // workers, 1)
    pool = [_Worker(index % gpus if gpus else None, threads_each) for index in range(workers)]
    for worker in pool:
        free.put(worker)

    def do(job: Job) -> Row:
        worker = free.get()
        try:
            return worker.do(job, run)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(workers)
    futures = [threads.submit(do, job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:  # an interrupt, most likely
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in pool:
            worker.kill()
        raise
    threads.shutdown()
    for worker in pool:
        worker.end()


class _Worker:
    """A process that does one job after the other, and is replaced when it dies.

    Args:
        gpu: Index of its GPU, if it has one.
        threads: Number of threads of computations on the processor.
    """

    def __init__(self, gpu: int | None, threads: int) -> None:
        self._gpu = gpu
        self._threads = threads
        self._pool: ProcessPoolExecutor | None = None

    def do(self, job: Job, run: Path) -> Row:
        """Run a job; return its row."""
        if self._pool is None:
            start = (os.getpid(), self._threads)
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=start)
        try:
            return self._pool.submit(_logged, CompareJob(job, run), self._gpu).result()
        except BrokenProcessPool:
            self._pool = None
            msg = f"The job's process died, perhaps out of memory. See logs/{job.folder}.log and the system's log."
            return write_failure(job, run, RuntimeError(msg))

    def end(self) -> None:
        """End the process, which has nothing to do."""
        if self._pool is not None:
            self._pool.shutdown()

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):  # noqa: SLF001  # there is no public way
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)


def _logged(job: CompareJob, gpu: int | None) -> Row:
    """Run a job, and keep what it prints, down to the libraries below Python, in a log of its own."""
    path = job.folder / "logs" / f"{job.job.folder}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path), path.open("w") as log:
        saved = [os.dup(stream) for stream in STREAMS]
        try:
            for stream in STREAMS:
                os.dup2(log.fileno(), stream)
            with redirect_stdout(log), redirect_stderr(log):
                return job.run(gpu)
        finally:
            for stream, before in zip(STREAMS, saved, strict=True):
                os.dup2(before, stream)
                os.close(before)


def _prepare(parent: int, threads: int) -> None:
    """Let this process end when its parent does, even if that is killed, and leave interrupts to the parent."""
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_cluster(jobs: list[Job], run: Path, parameters: dict[str, Any]) -> Iterator[Row]:
    """Run jobs by submitit, as one job array."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        msg = "cluster needs the package submitit: pip install 'anomalib-mvfa[cluster]'."
        raise ValueError(msg) from error
    executor = submitit.AutoExecutor(folder=run / "cluster", cluster=parameters.pop("cluster", None))
    executor.update_parameters(**parameters)
    run = run.resolve()
    with executor.batch():
        handles = [executor.submit(CompareJob(job, run).run) for job in jobs]
    waiting: dict[Any, Job] = dict(zip(handles, jobs, strict=True))
    for handle in submitit.helpers.as_completed(handles):
        job = waiting.pop(handle)
        try:
            yield handle.result()
        except Exception as error:  # noqa: BLE001  # a job that died, was cancelled or ran out of time
            yield write_failure(job, run, error)
