"""Runs that are killed at random points (SIGKILL): the next run ends as one that was never interrupted.

A driver imports anomalib once and forks a child for every run. The child tells the driver what it does to files, and
the driver kills it shortly after a drawn one of these operations.
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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from anomalib_mvfa.compare.results import read_results
from anomalib_mvfa.data.phantom import write_phantom
from recipe import TINY, write_clip
from scan_recipe import write_nifti

pytestmark = pytest.mark.slow

KILLS = {"fit": 24, "test": 10, "compare": 14, "BMAD": 8, "Phantom": 6, "Scans": 20}
IN_A_ROW = 3
"""Most kills before a run may end."""
DELAYS = (0.004, 0.4)
"""Seconds; a kill comes at most one of these after its operation: amid it, or between two."""
LIMIT = 300
"""Seconds; a run that takes longer hangs, even on a busy machine."""
CHANGES = {"os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
EPOCHS = 3


# ---------------------------------------------------------------------------------------------------------- the driver


def forked(work, folder, operation=None, delay=0.0):
    """Run a function in a child of this process; return the number of its operations on files and its result.

    The child and its own are killed some seconds after an operation; the result of a killed run is None.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_child(work, folder, writer)
    os.close(writer)
    os.setpgid(pid, pid)
    told, due, deadline = b"", False, time.monotonic() + LIMIT
    while True:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.killpg(pid, signal.SIGKILL)
            deadline += LIMIT
        elif chunk := os.read(reader, 2**16):
            told += chunk
            if operation is not None and not due and told.count(b"\n") > operation:
                due, deadline = True, time.monotonic() + delay
        else:  # the child has ended, and so have all of its own
            break
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)  # a run that had ended before the kill reached it is one that ended
    lines = told.decode().splitlines()
    if (killed and operation is None) or (status and not killed):
        msg = f"{lines[-3:]}\n{folder.with_suffix('.log').read_text()[-5000:]}"
        raise RuntimeError(msg)
    return len(lines), None if killed else json.loads(lines[-1])


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
            opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (opens or event in CHANGES) and not str(arguments[0]).startswith(("/dev/", "/proc/")):
                os.write(writer, f"{event} {arguments[0]}\n".encode())

        sys.addaudithook(tell)
        result = work()
        os.write(writer, f"{json.dumps(result)}\n".encode())
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


@pytest.fixture
def fresh(tmp_path):
    """Return a function that returns a folder of a name, and makes it if need be."""

    def fresh(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return fresh


def kill_again_and_again(kind, run, fresh, works, check):
    """Kill runs until there are as many kills as there must be; after some in a row, let one end, and check it.

    Args:
        kind: A key of ``KILLS``.
        run: The fixture.
        fresh: The fixture.
        works: What a run does, one of which is drawn.
        check: Sees whether a folder is right, in which one of ``works`` has just returned a result.
    """
    rng = np.random.default_rng([*kind.encode()])
    operations = []
    for index, work in enumerate(works):
        folder = fresh(f"whole{index}")
        made, result = run(work, folder)
        operations.append(made)
        check(folder, index, result)
    kills = 0
    for series in count():
        folder = fresh(f"killed{series}")
        for _ in range(rng.integers(1, IN_A_ROW + 1)):
            choice = rng.integers(len(works))
            moment = int(rng.integers(operations[choice])), rng.uniform(0, rng.choice(DELAYS))
            kills += run(works[choice], folder, *moment)[1] is None
        choice = int(rng.integers(len(works)))
        check(folder, choice, run(works[choice], folder)[1])
        if kills >= KILLS[kind]:
            return


def contents(folder):
    """Return the files that are visible in a folder, as digests by their places."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    return {str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in visible}


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
    return "fitted"


def score(clinic, checkpoint):
    from anomalib.cli.cli import AnomalibCLI

    cli = AnomalibCLI(["test", *arguments(clinic), "--ckpt_path", str(checkpoint)])
    return {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()}


def test_a_fit_that_was_killed_ends_as_an_unbroken_one(clinic, run, fresh):
    def check(folder, *_):
        expected, found = (torch.load(newest(made), weights_only=False) for made in (fresh("whole0"), folder))
        assert expected["epoch"] == EPOCHS - 1
        for part in ("epoch", "global_step", "state_dict", "optimizer_states"):
            torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0, equal_nan=True)

    kill_again_and_again("fit", run, fresh, [partial(fit, clinic)], check)
    folders = [fresh(name) for name in ("whole0", "killed0")]
    unbroken, killed = (run(partial(score, clinic, newest(folder)), folder)[1] for folder in folders)
    assert killed == unbroken
    assert unbroken["image_AUROC"] > 0


def test_a_test_that_was_killed_ends_as_an_unbroken_one(clinic, run, fresh):
    run(partial(fit, clinic), fresh("fitted"))
    expected = []

    def check(folder, _, result):
        images = contents(folder / "results/Mvfa/BMAD/Brain/latest/images")  # of the newest run
        expected.append((result, images))
        assert expected[-1] == expected[0]
        assert result["image_AUROC"] > 0
        assert images

    kill_again_and_again("test", run, fresh, [partial(score, clinic, newest(fresh("fitted")))], check)


# -------------------------------------------------------------------------------------------------------------- compare


def compare(plan):
    from anomalib_mvfa import plugin

    sys.argv = ["anomalib-mvfa", "compare", "--config", str(plan), "--output", "out"]
    return plugin.main()


def test_a_comparison_that_was_killed_ends_as_an_unbroken_one(clinic, run, fresh):
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
    path = fresh("plan") / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))

    def figures(folder):
        rows = read_results(folder / "out")
        kept = ("job", "digest", "seed", "metrics", "images", "parameters", "test_set", "error")
        scores = [(folder / "out/jobs" / row.job / "scores.csv").read_text() for row in rows]
        return [({name: getattr(row, name) for name in kept}, one) for row, one in zip(rows, scores, strict=True)]

    def check(folder, _, result):
        assert result == 0
        assert len(figures(folder)) == 4
        assert figures(folder) == figures(fresh("whole0"))
        assert not list(folder.rglob("*.partial"))
        assert (folder / "out/report/index.html").is_file()

    kill_again_and_again("compare", run, fresh, [partial(compare, path)], check)


# ---------------------------------------------------------------------------------------------------------- preparation


def prepare(data):
    data.prepare_data()
    data.setup()
    return len(data.test_data)


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
    return prepare(BMADOneClass("datasets/BMAD", num_workers=0))


def draw():
    from anomalib_mvfa import BrainPhantom

    return prepare(BrainPhantom("datasets/Phantom", size=32, num_workers=0))


def convert(hospital, windows):
    """Convert scans with one window after the other, each of which has a folder of its own."""
    from anomalib_mvfa import Scans

    folders = {"normal_dir": "healthy", "abnormal_dir": "ill", "mask_dir": "drawn"}
    found = []
    for window in windows:
        data = Scans("wards", root=hospital, pictures="datasets/wards", window=window, num_workers=0, **folders)
        found.append([prepare(data), contents(Path(data.test_data.samples.image_path[0]).parents[1])])
    return found


def prepare_again_and_again(kind, run, fresh, works):
    """Kill preparations; the next one must find or make the same files as an unbroken one."""
    results = {}

    def check(folder, choice, result):
        assert result == results.setdefault(choice, result)
        assert contents(folder) == contents(fresh(f"whole{choice}"))
        assert len(contents(folder)) > 10
        hidden = [path for path in folder.glob("datasets/**/.*") if path.suffix != ".lock"]
        assert kind == "Phantom" or not hidden  # whose docstring says that they may be left

    kill_again_and_again(kind, run, fresh, works, check)


def test_a_download_that_was_killed_is_made_good(clinic, run, fresh):
    archive = fresh("archive") / "bmad.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((clinic / "data").rglob("*.png")):
            file.write(path, path.relative_to(clinic / "data"))
    prepare_again_and_again("BMAD", run, fresh, [partial(download, archive)])


def test_a_drawing_that_was_killed_is_made_good(run, fresh):
    prepare_again_and_again("Phantom", run, fresh, [draw])


def test_a_conversion_that_was_killed_is_made_good(run, fresh):
    hospital = fresh("hospital")
    rng = np.random.default_rng(0)
    for number in range(8):
        values = rng.integers(100, 500, (24, 24, 4)).astype(np.int16)
        mask = np.zeros_like(values)
        mask[:9, :9, 1:3] = 1
        for name, content in (("healthy", values), ("ill", values + 400 * mask), ("drawn", mask)):
            write_nifti(hospital / name / f"{number}.nii", content)
    windows = [0, 1000], [0, 500]
    prepare_again_and_again("Scans", run, fresh, [partial(convert, hospital, w) for w in (windows, windows[::-1])])
