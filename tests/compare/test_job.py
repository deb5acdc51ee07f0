"""One job: what it measures and keeps, and that it equals what anomalib's command line does."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.pipelines.components import Job as PipelineJob
from lightning import seed_everything
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.compare.bootstrap import Scores
from anomalib_mvfa.compare.job import SIDE, CompareJob, Memory
from anomalib_mvfa.compare.results import Features, Pictures, read_row, read_rows


@pytest.fixture
def finished(comparison, tmp_path):
    """Return a function that runs one job of a comparison and returns its row and folder."""

    def finish(method, category="Brain", **changes):
        job = next(job for job in comparison(**changes).jobs() if (job.name, job.category) == (method, category))
        row = CompareJob(job, tmp_path / "run").run()
        return row, tmp_path / "run" / "jobs" / job.folder

    return finish


def test_patchcore_equals_anomalibs_command_line(finished, two_categories, tmp_path):
    row, folder = finished("PatchCore")
    scores = Scores.load(folder / "scores.npz")
    assert max(scores.values) > 1  # distances, not yet normalised
    assert row.metrics["image_AUROC"] == pytest.approx(roc_auc_score(scores.labels, scores.values), abs=1e-6)
    options = {
        "--model": "Patchcore",
        "--model.backbone": "resnet18",
        "--model.pre_trained": "false",
        "--model.post_processor": "anomalib_mvfa.model.export.OrderKeepingPostProcessor",
        "--model.evaluator": "anomalib_mvfa.metrics.evaluator.default_evaluator",
        "--model.visualizer": "false",
        "--data": "BMADFewShot",
        "--data.root": two_categories,
        "--data.k_shot": 2,
        "--data.abnormal_shots": 0,
        "--data.train_batch_size": 2,
        "--data.num_workers": 0,
        "--trainer.accelerator": "cpu",
        "--default_root_dir": tmp_path / "cli",
    }
    seed_everything(0, workers=True, verbose=False)  # anomalib 2.7 takes --seed_everything and ignores it
    cli = AnomalibCLI(["train", *(str(part) for option in options.items() for part in option)])
    expected = {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items() if "_" in name}
    assert row.error is None
    assert len(row.metrics) == 6
    assert row.metrics == pytest.approx({name: expected[name] for name in row.metrics}, abs=1e-6)


def test_a_row_says_where_it_comes_from(finished):
    row, folder = finished("MVFA")
    assert row == read_row(folder.parents[1], row.job)
    assert (row.method, row.protocol, row.category, row.k_shot, row.seed) == ("MVFA", "few_shot", "Brain", 2, 0)
    assert row.images == {"train": 44, "validate": 4, "test": 6}
    assert (row.random_weights, row.weights) == (True, "random")
    assert row.seconds["job"] > row.seconds["fit"] > row.seconds["image"] > 0
    assert row.parameters["all"] > row.parameters["trained"] > 0
    assert 100 < row.memory_mb < 20000
    assert row.device.startswith("CPU")
    assert {"anomalib", "torch", "anomalib-mvfa"} <= set(row.versions)
    other, _ = finished("PatchCore")
    assert other.test_set == row.test_set
    assert other.parameters["trained"] == 0
    unmasked, folder = finished("MVFA", "Chest")
    assert unmasked.test_set != row.test_set
    assert set(unmasked.metrics) == {"image_AUROC", "image_F1Score"}
    pictures = Pictures.load(folder / "pictures.npz")
    assert pictures.masks is None
    assert pictures.maps.std(axis=(1, 2)).min() > 0  # data without masks have maps all the same


def test_pictures_are_the_same_images_for_every_method_with_maps_of_each(finished):
    _, folder = finished("MVFA")
    mvfa = Pictures.load(folder / "pictures.npz")
    patchcore = Pictures.load(finished("PatchCore")[1] / "pictures.npz")
    assert mvfa.paths == patchcore.paths
    assert mvfa.labels == [0, 1, 1, 1]
    np.testing.assert_array_equal(mvfa.images, patchcore.images)
    np.testing.assert_array_equal(mvfa.masks, patchcore.masks)
    assert mvfa.masks.any(axis=(1, 2)).tolist() == [False, True, True, True]
    with Image.open(mvfa.paths[0]) as image:
        expected = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(mvfa.images[0], expected)
    assert mvfa.maps.shape == (4, SIDE, SIDE)
    assert not np.allclose(mvfa.maps, patchcore.maps)
    assert mvfa.levels == [1, 2, 3, 4]
    assert mvfa.level_maps.shape == (4, 4, SIDE, SIDE)
    assert patchcore.levels == []


def test_features_are_kept_of_mvfa_and_the_first_seed_alone(finished):
    _, folder = finished("MVFA", seeds=[1, 2])
    features = Features.load(folder / "features.npz")
    assert sorted(features.labels) == [0, 0, 0, 1, 1, 1]
    assert features.frozen.shape == (6, 4 * 128)  # levels and width
    assert features.adapted.shape == (6, 4 * 24)  # levels and joint width
    assert not np.allclose(features.frozen[:, :128], features.frozen[:, 128:256])
    assert not (finished("PatchCore")[1] / "features.npz").exists()


def test_a_failure_is_a_row_and_leaves_its_traceback(finished, tmp_path):
    broken = {
        "protocol": "few_normal",
        "model": {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "pre_trained": False}},
        "trainer": {"max_steps": "many"},
    }
    row, folder = finished("broken", methods={"broken": broken})
    assert row.error
    assert "\n" not in row.error
    assert row.metrics == {}
    assert "Traceback" in (folder / "error.txt").read_text()
    assert json.loads((folder / "row.json").read_text())["error"] == row.error
    assert read_rows(tmp_path / "run") == [row]
    assert sorted(path.name for path in folder.iterdir()) == ["error.txt", "row.json"]


def test_what_was_cut_short_is_no_result(finished, tmp_path, monkeypatch):
    def stop(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("anomalib_mvfa.compare.job.write_row", stop)
    with pytest.raises(KeyboardInterrupt):
        finished("PatchCore")
    assert list((tmp_path / "run" / "jobs").iterdir()) == []


def test_a_full_disk_is_this_jobs_error(finished, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("anomalib_mvfa.compare.bootstrap.Scores.save", full)
    row, folder = finished("PatchCore")
    assert row.error.startswith(f"OSError: {folder} was not written (No space left on device)")
    assert sorted(path.name for path in folder.iterdir()) == ["error.txt", "row.json"]


def test_arguments_that_a_job_sets_follow_its_data_and_shots(comparison, tmp_path, monkeypatch):
    seen = {}

    def built(model, weights, **defaults):
        seen.update(defaults)
        raise RuntimeError

    monkeypatch.setattr("anomalib_mvfa.compare.job.build_model", built)
    (job,) = [job for job in comparison(seeds=[3]).jobs() if job.folder == "MVFA-Chest-k2-s3"]
    CompareJob(job, tmp_path).run()
    assert seen == {"seed": 3, "k_shot": 2, "class_name": "Chest X-ray film"}


def test_a_job_is_one_of_anomalibs_pipelines(comparison, tmp_path):
    job = CompareJob(comparison().jobs()[0], tmp_path)
    assert isinstance(job, PipelineJob)
    row = job.job.row()
    assert CompareJob.collect([row, row]).method.tolist() == ["PatchCore", "PatchCore"]


def held_memory():
    """Return the process's memory in 2**20 bytes."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux shows it")
def test_memory_of_a_job_is_the_systems_again_before_the_next(comparison, tmp_path, monkeypatch):
    ends, kept = iter([None, "no"]), []

    def train_and_test(job, *_):
        blocks = [np.ones(2**13) for _ in range(8 * 2**10)]  # 512 MiB, in pieces that the C library's heap holds
        kept.extend(blocks[:: 2**8])  # some that last lie among them, so that the heap cannot shrink
        if message := next(ends):
            raise RuntimeError(message)
        return job.row()

    monkeypatch.setattr(f"{CompareJob.__module__}._train_and_test", train_and_test)
    monkeypatch.setattr(f"{CompareJob.__module__}.logger.exception", lambda *_: None)  # pytest keeps what is logged
    before = held_memory()
    for error in (None, "RuntimeError: no"):
        assert CompareJob(comparison().jobs()[0], tmp_path / "run").run().error == error
        assert held_memory() < before + 100


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="elsewhere peaks are those of the whole process")
def test_memory_is_the_peak_since_its_making():
    block = np.ones(400 * 2**17)  # 400 MiB
    del block
    memory = Memory()
    block = np.ones(200 * 2**17)
    held = held_memory()
    del block
    assert held - 1 <= memory.peak(torch.device("cpu")) < held + 150
