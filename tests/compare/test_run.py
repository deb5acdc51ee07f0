"""The command: what is missing is run, what has finished is kept, failures are told, and processes may die."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from anomalib_mvfa.compare import run
from anomalib_mvfa.compare.job import CompareJob, write_failure
from anomalib_mvfa.compare.plan import Comparison, Job
from anomalib_mvfa.compare.results import read_row, read_rows


@pytest.fixture
def done(monkeypatch):
    """Run jobs in this process, and return the list of those that were run."""
    jobs = []

    def one_after_the_other(missing, output, *_args):
        for job in missing:
            jobs.append(job.folder)
            yield CompareJob(job, output).run()

    monkeypatch.setattr(run, "_on_this_machine", one_after_the_other)
    return jobs


def written(output):
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("jobs/*/row.json")}


def broken(plan):
    """Return the methods of a comparison and one that fails."""
    model = plan.methods["PatchCore"].model
    wrong = {**model, "init_args": {**model["init_args"], "layers": ["layer9"]}}
    return {"broken": replace(plan.methods["PatchCore"], model=wrong), **plan.methods}


def test_a_killed_run_loses_nothing_and_goes_on(comparison, done, tmp_path):
    plan = comparison(methods=broken(comparison()))
    plan.save(tmp_path / "plan.yaml")
    output = tmp_path / "run"
    command = [sys.executable, "-c", "import sys; from anomalib_mvfa.plugin import main; sys.exit(main())", "compare"]
    command += ["--config", str(tmp_path / "plan.yaml"), "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(written(output)) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = child_processes(process.pid)
        process.send_signal(signal.SIGKILL)
    assert children
    wait_until_gone(children)
    before = written(output)
    assert 2 <= len(before) < 6
    assert len(read_rows(output)) == len(before)

    rows = run.compare(plan, output)

    assert [row.job for row in rows] == [job.folder for job in plan.jobs()]
    assert [bool(row.error) for row in rows] == [name == "broken" for name in ("broken", "PatchCore", "MVFA")] * 2
    finished = {row.job for row in rows if row.error is None}
    after = written(output)
    assert {name: after[name] for name in before if name in finished} == {
        name: moment for name, moment in before.items() if name in finished
    }
    assert set(done) == (set(after) - set(before)) | {row.job for row in rows if row.error}
    assert not list(output.glob("jobs/.*"))

    done.clear()
    run.compare(plan, output)
    assert done == ["broken-Brain-k2-s0", "broken-Chest-k2-s0"]  # what has failed is tried again, and nothing else
    assert {name: moment for name, moment in written(output).items() if name in finished} == {
        name: after[name] for name in finished
    }


def child_processes(parent):
    """Process IDs of the workers of a comparison."""
    found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/status") if parent_of(path) == parent]
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def parent_of(status):
    try:
        return int(status.read_text().split("PPid:")[1].split()[0])
    except (OSError, IndexError):  # the process has ended meanwhile
        return None


def wait_until_gone(pids):
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline, "a worker goes on after its parent was killed"
        time.sleep(0.1)


class Deadly(Job):
    """A job that ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (3,)


def test_what_a_job_prints_is_kept_apart(comparison, tmp_path, capfd):
    job = CompareJob(comparison().jobs()[0], tmp_path)
    row = run._logged(job, None)
    log = (tmp_path / "logs" / f"{row.job}.log").read_text()
    assert "image_AUROC" in log
    assert capfd.readouterr().out == ""
    print("again")  # noqa: T201
    assert capfd.readouterr().out == "again\n"


def test_a_process_that_dies_is_a_failed_job(comparison, tmp_path):
    job = comparison().jobs()[0]
    worker = run._Worker(None, 1)
    row = worker.do(Deadly(**vars(job)), tmp_path)
    assert row.error.startswith("RuntimeError: The job's process died")
    assert read_row(tmp_path, job.folder) == row
    assert worker._pool is None  # the next job gets a new process
    worker.end()


def test_the_exit_code_and_the_output_tell(comparison, done, tmp_path, capsys):
    plan = comparison(
        methods={"broken": broken(comparison())["broken"], "PatchCore": comparison().methods["PatchCore"]}
    )
    plan = replace(plan, categories=["Chest"])
    plan.save(tmp_path / "plan.yaml")
    arguments = ["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "run")]
    assert run.main(arguments) == 1
    out = capsys.readouterr().out
    assert "failed: broken-Chest-k2-s0" in out
    assert "PatchCore-Chest-k2-s0: image_AUROC" in out
    assert (tmp_path / "run" / "report" / "index.html").is_file()

    del plan.methods["broken"]
    plan.save(tmp_path / "plan.yaml")
    done.clear()
    assert run.main(arguments) == 0
    assert done == []


def test_an_interrupt_is_no_error(comparison, tmp_path, monkeypatch, capsys):
    def interrupted(*_args):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(run, "_on_this_machine", interrupted)
    comparison().save(tmp_path / "plan.yaml")
    assert run.main(["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "run")]) == 130
    assert "The same command goes on" in capsys.readouterr().err


def test_a_dry_run_lists_jobs_and_runs_none(comparison, done, tmp_path, capsys):
    comparison().save(tmp_path / "plan.yaml")
    arguments = ["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "run")]
    assert run.main([*arguments, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    jobs = [line for line in lines if "-k2-s0" in line]
    assert [line.split()[0] for line in jobs] == [job.folder for job in comparison().jobs()]
    assert all("about" in line for line in jobs)
    assert any(line.startswith("4 jobs; what is missing takes about") for line in lines)
    assert done == []
    assert not (tmp_path / "run").exists()


def test_the_command_line_may_change_what_is_run(comparison, done, tmp_path):
    comparison().save(tmp_path / "plan.yaml")
    output = tmp_path / "run"
    changes = ["--categories", "[Chest]", "--seeds", "[7]", "--k_shots", "[1]"]
    assert run.main(["--config", str(tmp_path / "plan.yaml"), "--output", str(output), *changes]) == 0
    assert done == ["PatchCore-Chest-k1-s7", "MVFA-Chest-k1-s7"]
    assert Comparison.load(output / "config.yaml").seeds == [7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "plan.yaml", "--categories", "[Lungs]"], "BMAD has no category 'Lungs'"),
        (["--config", "plan.yaml", "--seeds", "[a]"], "seeds"),
        (["--config", "plan.yaml", "--workers", "0"], "workers=0 must be at least 1"),
        (["--config", "plan.yaml", "--weights", "{Other: null}"], "no methods of this comparison"),
    ],
)
def test_mistakes_on_the_command_line_give_one_error(comparison, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    comparison().save(tmp_path / "plan.yaml")
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert not (tmp_path / "results").exists()


def test_two_comparisons_do_not_share_a_folder(comparison, done, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="Another process is running"):
        run.compare(comparison(), tmp_path)
    assert done == []


def test_results_of_a_changed_job_are_put_aside(comparison, done, tmp_path):
    plan = comparison(categories=["Chest"])
    (tmp_path / "jobs" / ".PatchCore-Chest-k2-s0.partial").mkdir(parents=True)  # remains of a killed run
    for job in plan.jobs():
        write_failure(job, tmp_path, ValueError("earlier"))
    (before, _) = run.compare(plan, tmp_path)
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == [job.folder for job in plan.jobs()][::-1]
    plan.methods["PatchCore"].data["train_batch_size"] = 1
    done.clear()
    run.compare(plan, tmp_path)
    assert done == [before.job]
    kept = tmp_path / "superseded" / f"{before.job}-{before.digest[:8]}"
    assert (kept / "row.json").is_file()
    assert [row.job for row in read_rows(tmp_path)] == ["MVFA-Chest-k2-s0", "PatchCore-Chest-k2-s0"]


def test_jobs_run_on_a_cluster(comparison, tmp_path):
    pytest.importorskip("submitit")
    plan = comparison(categories=["Chest"], cluster={"cluster": "local", "timeout_min": 5})
    wrong = replace(plan, methods={"broken": broken(plan)["broken"], "PatchCore": plan.methods["PatchCore"]})
    rows = run.compare(wrong, tmp_path / "run")
    assert [bool(row.error) for row in rows] == [True, False]
    assert read_rows(tmp_path / "run") == sorted(rows, key=lambda row: row.job)
