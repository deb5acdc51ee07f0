"""Runs that are killed at random points (SIGKILL): what the next run makes of what they leave.

A driver imports anomalib once and forks a child for every run. The child tells the driver what it does to files, and
the driver kills it at a drawn time, or shortly after a drawn one of these operations.
"""

import hashlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from anomalib_mvfa.compare.results import read_rows
from anomalib_mvfa.data.phantom import write_phantom
from recipe import TINY, write_clip

pytestmark = pytest.mark.slow

KILLS = {"fit": 24, "test": 10, "compare": 14, "BMAD": 8, "Phantom": 6, "Scans": 20}
assert sum(KILLS.values()) >= 50
IN_A_ROW = 3
"""Most kills before a run may end."""
SOON = 0.004
"""Seconds; so long after an operation on files, its kill comes at the latest."""
LIMIT = 300
"""Seconds; a run that takes longer hangs, even on a busy machine."""
CHANGES = {"os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
EPOCHS = 3


# ---------------------------------------------------------------------------------------------------------- the driver


class Moment(NamedTuple):
    """When to kill: at a time, or at an operation and then after a time; and whether the children of a run too."""

    operation: int | None
    seconds: float
    group: bool


class End(NamedTuple):
    """How a run ended: whether by a kill, after which time and operations, and what it returned."""

    killed: bool
    seconds: float
    operations: list[str]
    result: object = None


def forked(work, folder, moment=None):
    """Run a function in a folder, in a child of this process, and kill it at a moment if it lasts so long."""
    reader, writer = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_child(work, folder, writer)
    os.close(writer)
    os.setpgid(pid, pid)
    told, operations, killed, due = b"", 0, False, LIMIT
    if moment is not None and moment.operation is None:
        due = moment.seconds
    while True:
        left = start + due - time.monotonic()
        if left <= 0:
            if killed:
                os.killpg(pid, signal.SIGKILL)
                msg = "A process of a run goes on after the run was killed."
                raise RuntimeError(msg)
            (os.kill if moment is not None and not moment.group else os.killpg)(pid, signal.SIGKILL)
            killed, due = True, due + LIMIT
        elif select.select([reader], [], [], left)[0]:
            chunk = os.read(reader, 2**16)
            if not chunk:  # the child has ended, and so have all of its own
                break
            told += chunk
            operations += chunk.count(b"\n")
            if moment is not None and moment.operation is not None and operations > moment.operation and due == LIMIT:
                due = time.monotonic() - start + moment.seconds
    os.close(reader)
    seconds = time.monotonic() - start
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)  # a run that had ended before the kill reached it is one that ended
    lines = told.decode().splitlines()
    if (killed and moment is None) or (status and not killed):
        msg = f"{lines[-3:]}\n{folder.with_suffix('.log').read_text()[-5000:]}"
        raise RuntimeError(msg)
    results = [json.loads(line[1:]) for line in lines if line.startswith("=")]
    return End(killed, seconds, [line for line in lines if not line.startswith("=")], None if killed else results[0])


def _be_child(work, folder, writer):
    """Do the work, and end this process."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)
        tempfile.tempdir = str(folder.with_suffix(".tmp"))  # what killed runs leave there is left to pytest
        Path(tempfile.tempdir).mkdir(exist_ok=True)

        def tell(event, arguments):
            if event in CHANGES:
                path = arguments[1 if event in {"os.rename", "os.symlink"} else 0]
            elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                path = arguments[0]
            else:
                return
            if not str(path).startswith(("/dev/", "/proc/")):
                os.write(writer, f"{event} {path}\n".encode())

        sys.addaudithook(tell)
        result = work()
        os.write(writer, f"={json.dumps(result)}\n".encode())
        status = 0
    except BaseException:  # noqa: BLE001  # which else would go on as a second driver
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="module")
def run():
    """Return :func:`forked` in a process that has imported anomalib and has no threads."""
    with ProcessPoolExecutor(1, get_context("spawn")) as driver:
        yield lambda *arguments: driver.submit(forked, *arguments).result()


@pytest.fixture(scope="module")
def hits(request):
    """Count where kills hit; the count is printed at the end."""
    found = {}
    start = time.monotonic()
    yield found
    parts = [f"{kind} {sum(hit.values())} ({_listed(hit)})" for kind, hit in found.items()]
    total = sum(sum(hit.values()) for hit in found.values())
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write(f"\n{total} kills in {time.monotonic() - start:.0f} s: {'; '.join(parts)}\n")


def _listed(hit):
    return ", ".join(f"{where} {count}" for where, count in sorted(hit.items()))


def kill_again_and_again(kind, run, hits, fresh, works, where, check):
    """Kill runs until there are as many kills as there must be; after some in a row, let one end, and check it.

    Args:
        kind: A key of ``KILLS``.
        run: The fixture.
        hits: The fixture.
        fresh: Makes a new folder of a name to work in.
        works: What a run does, one of which is drawn.
        where: Tells from a folder where the last kill hit.
        check: Sees whether a folder is right, of which a run by one of ``works`` has just returned a result.
    """
    rng = np.random.default_rng([*kind.encode()])
    whole = [run(work, fresh(f"whole{index}")) for index, work in enumerate(works)]
    for index, end in enumerate(whole):
        check(fresh.made(f"whole{index}"), index, end.result)
    hits[kind] = Counter()
    series = 0
    while hits[kind].total() < KILLS[kind]:
        folder = fresh(f"killed{series}")
        for _ in range(rng.integers(1, IN_A_ROW + 1)):
            choice = rng.integers(len(works))
            longest = whole[choice]
            moment = Moment(None, rng.uniform(0, longest.seconds), bool(rng.random() < 0.5))
            if rng.random() < 0.5:
                moment = Moment(int(rng.integers(len(longest.operations))), rng.uniform(0, SOON), moment.group)
            end = run(works[choice], folder, moment)
            if not end.killed:
                check(folder, choice, end.result)
            else:
                hits[kind][where(folder)] += 1
        choice = int(rng.integers(len(works)))
        check(folder, choice, run(works[choice], folder).result)
        series += 1
    assert hits[kind].total() >= KILLS[kind]


def appeared(paths, known):
    """Whether some of these have not been seen before, after an earlier kill."""
    new = {(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths} - known
    known |= new
    return bool(new)


@pytest.fixture
def fresh(tmp_path):
    """Return a function that makes folders."""

    def make(name):
        folder = made(name)
        folder.mkdir()
        return folder

    def made(name):
        return tmp_path / name

    make.made = made
    return make


# --------------------------------------------------------------------------------------------------------- fit and test


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """A folder with images and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("clinic")
    write_clip(folder, TINY)
    write_phantom(folder / "data", size=64, train=4, valid=6, test=4)
    return folder


def arguments(clinic):
    given = {
        "model": "Mvfa",
        "model.backbone": clinic / "clip.json",
        "model.pretrained": clinic / "clip.pt",
        "model.image_size": TINY.image_size,
        "model.max_epochs": EPOCHS,
        "data": "BMADFewShot",
        "data.root": clinic / "data",
        "data.k_shot": 2,
        "data.num_workers": 0,
        "data.train_batch_size": 4,
        "trainer.accelerator": "cpu",
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def newest(folder):
    """Return the newest checkpoint, as docs/checkpoints.md says, or None."""
    found = folder.glob("results/Mvfa/BMAD/Brain/v*/weights/lightning/model.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def fit(clinic):
    from anomalib.cli.cli import AnomalibCLI

    checkpoint = newest(Path())
    AnomalibCLI(["fit", *arguments(clinic), *(["--ckpt_path", str(checkpoint)] if checkpoint else [])])


def score(clinic, checkpoint):
    from anomalib.cli.cli import AnomalibCLI

    cli = AnomalibCLI(["test", *arguments(clinic), "--ckpt_path", str(checkpoint)])
    return {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()}


def read(checkpoint):
    return torch.load(checkpoint, weights_only=False)


def same(one, other):
    """Whether two trees of tensors and values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_fit_that_was_killed_ends_as_an_unbroken_one(clinic, run, fresh, hits):
    known = set()

    def check(folder, _, __):
        expected, found = read(newest(fresh.made("whole0"))), read(newest(folder))
        assert expected["epoch"] == EPOCHS - 1
        for part in ("epoch", "global_step", "state_dict", "optimizer_states"):
            assert same(found[part], expected[part]), part

    def where(folder):
        checkpoint = newest(folder)
        amid = " amid a save" if appeared(folder.glob("results/**/.model.ckpt.partial"), known) else ""
        return f"after {read(checkpoint)['epoch'] + 1 if checkpoint else 0} epochs{amid}"

    kill_again_and_again("fit", run, hits, fresh, [partial(fit, clinic)], where, check)
    folders = [fresh.made(name) for name in ("whole0", "killed0")]
    unbroken, killed = (run(partial(score, clinic, newest(folder)), folder).result for folder in folders)
    assert killed == unbroken
    assert unbroken["image_AUROC"] > 0


def test_a_test_that_was_killed_ends_as_an_unbroken_one(clinic, run, fresh, hits):
    run(partial(fit, clinic), fresh("fitted"))
    work = partial(score, clinic, newest(fresh.made("fitted")))
    results = []

    def check(folder, _, result):
        results.append(result)
        assert result == results[0]
        assert result["image_AUROC"] > 0
        assert pictures(folder) == pictures(fresh.made("whole0"))

    def pictures(folder):
        """Those of the newest run."""
        latest = folder / "results/Mvfa/BMAD/Brain/latest"
        return contents(latest / "images") if (latest / "images").is_dir() else {}

    def where(folder):
        return f"with {len(pictures(folder)) if (folder / 'results').is_dir() else 0} pictures"

    kill_again_and_again("test", run, hits, fresh, [work], where, check)
    assert pictures(fresh.made("whole0"))


def contents(folder):
    """Return the files that are visible in a folder, as digests by their places."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(named.items())
        if not any(part.startswith(".") for part in Path(name).parts)
    }


# -------------------------------------------------------------------------------------------------------------- compare


def compare(plan):
    from anomalib_mvfa import plugin
    from anomalib_mvfa.compare import run

    # A spawned worker would import anomalib for seconds; a forked one is as mortal.
    run.get_context = lambda _: get_context("fork")
    sys.argv = ["anomalib-mvfa", "compare", "--config", str(plan), "--output", "out"]
    assert plugin.main() == 0


def test_a_comparison_that_was_killed_ends_as_an_unbroken_one(clinic, run, fresh, hits):
    backbone = {"backbone": str(clinic / "clip.json"), "image_size": TINY.image_size}
    patch_core = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "pre_trained": False}}
    plan = {
        "data": {"class_path": "BMADOneClass", "init_args": {"root": str(clinic / "data"), "num_workers": 0}},
        "categories": ["Brain"],
        "k_shots": [2],
        "seeds": [0, 1],
        "methods": {
            "PatchCore": {"protocol": "few_normal", "model": patch_core},
            "MVFA": {
                "protocol": "few_shot",
                "model": {"class_path": "Mvfa", "init_args": {**backbone, "max_epochs": 2}},
                "data": {"train_batch_size": 11},
            },
        },
        "weights": {"MVFA": str(clinic / "clip.pt")},
        "accelerator": "cpu",
    }
    (fresh("plan") / "plan.yaml").write_text(yaml.safe_dump(plan))
    finished, known = {}, set()

    def figures(folder):
        rows = read_rows(folder / "out")
        kept = ("job", "digest", "seed", "metrics", "images", "parameters", "train_set", "test_set", "error")
        scores = [dict(np.load(folder / "out/jobs" / row.job / "scores.npz")) for row in rows]
        return [
            ({name: getattr(row, name) for name in kept}, {name: array.tolist() for name, array in one.items()})
            for row, one in zip(rows, scores, strict=True)
        ]

    def note(folder):
        """Note when jobs ended; one that has ended must not be run again."""
        before = finished.setdefault(folder.name, {})
        now = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("out/jobs/[!.]*/row.json")}
        assert {name: now.get(name) for name in before} == before
        before.update(now)
        return len(now)

    def check(folder, _, __):
        assert note(folder) == 4
        assert figures(folder) == figures(fresh.made("whole0"))
        assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]
        assert (folder / "out/report/index.html").is_file()

    def where(folder):
        amid = " amid one" if appeared(folder.glob("out/jobs/.*.partial"), known) else ""
        return f"after {note(folder)} jobs{amid}"

    work = partial(compare, fresh.made("plan") / "plan.yaml")
    kill_again_and_again("compare", run, hits, fresh, [work], where, check)


# ---------------------------------------------------------------------------------------------------------- preparation


def download(archive):
    """Prepare BMAD by a download of a file here, as slow as one from afar."""
    from anomalib.data.datamodules.image import bmad
    from anomalib.data.utils import DownloadInfo
    from anomalib.data.utils import download as transport

    from anomalib_mvfa import BMADOneClass

    def slowly(url, filename, reporthook):
        with archive.open("rb") as source, Path(filename).open("wb") as target:
            while block := source.read(archive.stat().st_size // 50):
                target.write(block)
                target.flush()
                time.sleep(0.004)

    transport.urlretrieve = slowly
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    bmad.DOWNLOAD_INFO = DownloadInfo(name="bmad", url="https://localhost/bmad.zip", hashsum=digest)
    data = BMADOneClass("datasets/BMAD", num_workers=0)
    data.prepare_data()
    data.setup()
    return len(data.test_data)


def draw():
    from anomalib_mvfa import BrainPhantom

    data = BrainPhantom("datasets/Phantom", size=32, num_workers=0)
    data.prepare_data()
    data.setup()
    return len(data.test_data)


def convert(hospital, windows):
    """Convert scans with one window after the other, whose pictures take the place of those of the one before."""
    from anomalib_mvfa import Scans

    folders = {"normal_dir": "healthy", "abnormal_dir": "ill", "mask_dir": "drawn"}
    found = []
    for window in windows:
        data = Scans("wards", root=hospital, pictures="datasets/wards", window=window, num_workers=0, **folders)
        data.prepare_data()
        data.setup()
        found.append([len(data.test_data), contents(Path("datasets/wards"))])
    return found


def prepare_again_and_again(kind, run, hits, fresh, works):
    """Kill preparations; the next one must find or make the same files as an unbroken one."""
    results, known = {}, set()

    def check(folder, choice, result):
        assert result == results.setdefault(choice, result)
        found = contents(folder)
        assert found == contents(fresh.made(f"whole{choice}"))
        assert len(found) > 10
        assert kind == "Phantom" or not remains(folder)  # whose docstring says that they may be left

    def remains(folder):
        hidden = folder.glob("datasets/**/.*") if (folder / "datasets").is_dir() else ()
        return [path for path in hidden if path.suffix != ".lock"]

    def where(folder):
        amid = appeared(remains(folder), known)
        return "amid writing" if amid else "when it was whole" if contents(folder) else "before"

    kill_again_and_again(kind, run, hits, fresh, works, where, check)


def test_a_download_that_was_killed_is_made_good(clinic, run, fresh, hits):
    archive = fresh("archive") / "bmad.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((clinic / "data").rglob("*.png")):
            file.write(path, path.relative_to(clinic / "data"))
    prepare_again_and_again("BMAD", run, hits, fresh, [partial(download, archive)])


def test_a_drawing_that_was_killed_is_made_good(run, fresh, hits):
    prepare_again_and_again("Phantom", run, hits, fresh, [draw])


def test_a_conversion_that_was_killed_is_made_good(run, fresh, hits):
    nibabel = pytest.importorskip("nibabel")
    hospital = fresh("hospital")
    for name in ("healthy", "ill", "drawn"):
        (hospital / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        values = rng.integers(100, 500, (24, 24, 4)).astype(np.int16)
        mask = np.zeros_like(values)
        mask[:9, :9, 1:3] = 1
        for name, content in (("healthy", values), ("ill", values + 400 * mask), ("drawn", mask)):
            nibabel.save(nibabel.Nifti1Image(content, np.eye(4)), hospital / name / f"{number}.nii")
    windows = [0, 1000], [0, 500]
    prepare_again_and_again(
        "Scans", run, hits, fresh, [partial(convert, hospital, w) for w in (windows, windows[::-1])]
    )
