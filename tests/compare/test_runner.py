"""What is missing is run, what has finished is kept, failures are told, and processes may die or be told to stop."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from filelock import FileLock

from anomalib_mvfa import BMADOneClass
from anomalib_mvfa.callbacks import TERMINATED
from anomalib_mvfa.compare import cli, runner
from anomalib_mvfa.compare.execute import execute, main, write_failure
from anomalib_mvfa.compare.job import identify, jobs_of
from anomalib_mvfa.compare.results import read_result, read_results

ENDLESS = """
import os, time
parent = os.getppid()
while not os.path.exists(os.path.join(RUN, "go", JOB)):
    if os.getppid() != parent and not WAITS:
        os._exit(1)
    time.sleep(0.02)
"""
"""Waits for a file; where it does not wait on, it ends with its parent, as a real job does."""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Return a function that has jobs run a script in place of training, before they leave an empty result."""

    def script(plan, text):
        digests = identify(jobs_of(plan))
        (tmp_path / "go").mkdir(exist_ok=True)

        def command(job, run, *options):
            result = job.result(digest=digests[job.folder], seconds={"job": 1.0})
            content = json.dumps(vars(result))
            write = (
                f"f = os.path.join(RUN, 'jobs', JOB); os.makedirs(f)\nopen(f + '/result.json', 'w').write({content!r})"
            )
            code = f"import os\nRUN, JOB = {str(run)!r}, {job.folder!r}\nprint('hello', flush=True)\n{text}\n{write}"
            return [sys.executable, "-c", code]

        monkeypatch.setattr(runner, "_command", command)
        monkeypatch.setattr(cli, "report", lambda run: run)

    return script


def small(comparison, **changes):
    """Return a comparison of two jobs."""
    return comparison(categories=["Chest"], **changes)


def test_what_has_finished_is_kept_and_what_changed_is_moved_away(comparison, done, tmp_path):
    plan = small(comparison)
    (tmp_path / "jobs" / ".PatchCore-Chest-k2-s0.partial").mkdir(parents=True)  # remains of a killed run
    for job in jobs_of(plan):
        write_failure(job, tmp_path, "earlier")
    (before, _) = runner.compare(plan, tmp_path)
    folders = [job.folder for job in jobs_of(plan)]
    assert done == folders
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == sorted(folders)
    done.clear()
    assert runner.compare(plan, tmp_path)[0] == before
    assert done == []
    plan.methods["PatchCore"].data["train_batch_size"] = 1
    runner.compare(plan, tmp_path)
    assert done == [before.job]
    assert (tmp_path / "superseded" / f"{before.job}-{before.digest[:8]}" / "result.json").is_file()
    assert [result.job for result in read_results(tmp_path)] == sorted(folders)


def test_data_are_downloaded_before_they_are_looked_at(comparison, done, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(BMADOneClass, "prepare_data", lambda data: asked.append((data.category, len(done))))
    runner.compare(comparison(methods={"PatchCore": comparison().methods["PatchCore"]}), tmp_path)
    assert asked[:2] == [("Brain", 0), ("Chest", 0)]


def test_two_comparisons_do_not_share_a_folder(comparison, done, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="Another process is running"):
        runner.compare(comparison(), tmp_path)
    assert done == []


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("os._exit(3)", "failed", "The job's process ended with exit code 3. See logs/PatchCore-Chest-k2-s0.log."),
        ("os.kill(os.getpid(), 9)", "failed", "ended by signal SIGKILL, perhaps because memory ran out"),
        ("os.kill(os.getpid(), 15)", "interrupted", None),
        ("os._exit(143)", "interrupted", None),
    ],
)
def test_how_a_process_ended_is_told_and_it_is_run_again(comparison, scripted, tmp_path, text, status, message):
    plan = small(comparison)
    scripted(plan, f"if JOB.startswith('Patch') and not os.path.exists(RUN + '/go/x'): {text}")
    first, second = runner.compare(plan, tmp_path)
    assert (first.status, second.status) == (status, "finished")
    assert message in first.error if message else first.error is None
    assert (tmp_path / "logs" / f"{first.job}.log").read_text() == "hello\n"
    assert read_result(tmp_path, first.job) == first
    (tmp_path / "go" / "x").touch()
    assert [result.status for result in runner.compare(plan, tmp_path)] == ["finished"] * 2


def test_a_job_that_runs_too_long_is_ended(comparison, scripted, tmp_path, monkeypatch):
    plan = small(comparison, timeout_min=1)
    scripted(plan, "if JOB.startswith('Patch'):\n    import time; time.sleep(600)")
    clock = time.monotonic
    monkeypatch.setattr(runner.time, "monotonic", lambda: 100 * clock())
    first, second = runner.compare(plan, tmp_path, workers=2)
    assert first.error.startswith("The job's process ran longer than timeout_min=1. See logs/")
    assert second.finished


def run_here(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells turn off for what runs in the background
    sys.exit(cli.main("compare", arguments))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def start():
    """Return a function that runs another in a process, which ends with the test: jobs end with it."""
    processes = []

    def run(function, *args):
        processes.append(get_context("fork").Process(target=function, args=args))
        processes[-1].start()
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.join()


POINTS = ("before the first job", "in the first job", "in the last job")
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("how", CODES, ids=lambda how: how.name)
def test_a_stopped_comparison_goes_on(comparison, scripted, start, tmp_path, monkeypatch, how, point):
    plan = small(comparison)
    plan.save(tmp_path / "plan.yaml")
    scripted(plan, f"WAITS = {how != signal.SIGKILL}\n{ENDLESS}")
    first, last = (job.folder for job in jobs_of(plan))
    arguments = ["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path)]

    def log_of(job):
        path = tmp_path / "logs" / f"{job}.log"
        return path.is_file() and path.read_text() == "hello\n"

    with monkeypatch.context() as patch:
        if point == POINTS[0]:
            patch.setattr(runner, "identify", lambda _: (tmp_path / "reading").touch() or time.sleep(60))
        process = start(run_here, arguments)
    if point == POINTS[0]:
        wait_for((tmp_path / "reading").exists)
    else:
        if point == POINTS[2]:
            (tmp_path / "go" / first).touch()
        wait_for(lambda: log_of(first if point == POINTS[1] else last))
    os.kill(process.pid, how)
    process.join(30)
    assert process.exitcode == CODES[how]
    if how != signal.SIGKILL:
        ours = f"RUN, JOB = '{tmp_path}'"
        wait_for(lambda: not [path for path in Path("/proc").glob("[0-9]*/cmdline") if ours in status(path)])

    finished = {first} if point == POINTS[2] else set()
    stopped = {POINTS[0]: set(), POINTS[1]: {first}, POINTS[2]: {last}}[point] if how != signal.SIGKILL else set()
    results = {result.job: result for result in read_results(tmp_path)}
    assert {job for job, result in results.items() if result.finished} == finished
    assert (
        {job for job, result in results.items() if result.status == "interrupted"} == stopped == set(results) - finished
    )
    assert all(result.error is None for result in results.values())

    before = (tmp_path / "jobs" / first / "result.json").stat().st_mtime_ns if finished else None
    for job in (first, last):
        (tmp_path / "go" / job).touch()
    assert cli.main("compare", arguments) == 0
    assert all(result.finished for result in read_results(tmp_path))
    after = (tmp_path / "jobs" / first / "result.json").stat().st_mtime_ns
    assert after == before if finished else after
    assert not list((tmp_path / "jobs").glob(".*"))


def endless(comparison):
    return replace(comparison().methods["MVFA"], trainer={"max_epochs": 100000})


def test_real_jobs_equal_those_of_this_process_and_end_with_their_parent(comparison, start, tmp_path):
    plan = small(comparison, methods={"PatchCore": comparison().methods["PatchCore"], "endless": endless(comparison)})
    plan.save(tmp_path / "plan.yaml")
    run = tmp_path / "run"
    process = start(run_here, ["--config", str(tmp_path / "plan.yaml"), "--output", str(run), "--workers", "2"])
    wait_for(lambda: [*(run / "jobs").glob(".endless*.partial")] and read_results(run), 120)
    found = {path.parent: status(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    (child,) = [path / "status" for path, text in found.items() if f"{run}\0endless-Chest-k2-s0" in text]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_for(lambda: "State:" not in status(child) or "State:\tZ" in status(child))
    (result,) = read_results(run)
    here = execute(jobs_of(plan)[0], tmp_path / "here")
    assert (result.metrics, result.digest, result.error) == (here.metrics, here.digest, None)
    assert "image_AUROC" in (run / "logs" / f"{result.job}.log").read_text()


def test_a_real_job_ends_when_told_to_and_leaves_nothing(comparison, start, tmp_path):
    small(comparison, methods={"A": endless(comparison)}).save(tmp_path / "config.yaml")
    process = start(lambda: sys.exit(main([str(tmp_path), "A-Chest-k2-s0"])))
    wait_for(lambda: [*(tmp_path / "jobs").glob(".*.partial")])
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == TERMINATED
    assert read_results(tmp_path) == []


def status(path):
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""


def test_jobs_run_on_a_cluster(comparison, scripted, tmp_path):
    pytest.importorskip("submitit")
    plan = small(comparison, cluster={"cluster": "local"}, timeout_min=5)
    scripted(plan, "if JOB.startswith('Patch'): os._exit(3)")
    failed, finished = runner.compare(plan, tmp_path)
    assert (failed.status, finished.status) == ("failed", "finished")
    assert "FAILED" in failed.error.upper()
    assert str(tmp_path / "cluster") in failed.error
    assert "\n" not in failed.error


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (99.6, "2 min"), (431, "7 min"), (12000, "3 h 20 min")])
def test_durations(seconds, text):
    assert runner.duration(seconds) == text
