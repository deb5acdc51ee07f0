"""One job: what it measures and keeps, and that it equals what anomalib's command line does."""

import errno
import json
import os
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from lightning import seed_everything
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_mvfa.compare import execute as module
from anomalib_mvfa.compare.execute import execute
from anomalib_mvfa.compare.job import identify, jobs_of
from anomalib_mvfa.compare.recorders import SIDE, ScoreRecorder
from anomalib_mvfa.compare.results import read_arrays, read_result, read_results


@pytest.fixture
def finished(comparison, tmp_path):
    """Return a function that runs one job of a comparison and returns its result and folder."""

    def finish(method, category="Brain", **changes):
        jobs = jobs_of(comparison(**changes))
        job = next(job for job in jobs if (job.name, job.category) == (method, category))
        return execute(job, tmp_path / "run"), tmp_path / "run" / "jobs" / job.folder

    return finish


def test_patchcore_equals_anomalibs_command_line(finished, two_categories, tmp_path):
    result, folder = finished("PatchCore")
    scores = pd.read_csv(folder / "scores.csv")
    assert list(scores.predicted) != list(scores.score > 0.5)  # distances, not yet normalised to a threshold of 0.5
    assert result.metrics["image_AUROC"] == pytest.approx(roc_auc_score(scores.label, scores.score), abs=1e-6)
    assert result.metrics["image_F1Score"] == pytest.approx(f1_score(scores.label, scores.predicted), abs=1e-6)
    options = {
        "--model": "Patchcore",
        "--model.backbone": "test_resnet",
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
    assert result.error is None
    assert len(result.metrics) == 6
    assert result.metrics == pytest.approx({name: expected[name] for name in result.metrics}, abs=1e-6)


def test_a_result_says_where_it_comes_from(finished, comparison):
    result, folder = finished("MVFA")
    assert result == read_result(folder.parents[1], result.job)
    assert (result.method, result.protocol, result.category, result.k_shot, result.seed) == (
        "MVFA",
        "few_shot",
        "Brain",
        2,
        0,
    )
    assert result.digest == identify(jobs_of(comparison()))[result.job]
    assert result.images == {"train": 44, "validate": 4, "test": 6}
    assert (result.random_weights, result.weights, result.epochs, result.selected_epoch) == (True, "random", 1, None)
    assert result.seconds["job"] > result.seconds["fit"] > result.seconds["image"] > 0
    assert result.parameters["all"] > result.parameters["trained"] > 0
    assert 100 < result.memory_mb < 20000
    assert result.device.startswith("CPU")
    assert {"anomalib", "torch", "anomalib-mvfa"} <= set(result.versions)
    other, _ = finished("PatchCore")
    assert other.test_set == result.test_set
    assert other.parameters["trained"] == 0
    unmasked, folder = finished("MVFA", "Chest")
    assert unmasked.test_set != result.test_set
    assert set(unmasked.metrics) == {"image_AUROC", "image_F1Score"}
    pictures = read_arrays(folder / "pictures.npz")
    assert "masks" not in pictures
    assert pictures["maps"].std(axis=(1, 2)).min() > 0  # data without masks have maps all the same
    assert not (folder / "pixels.npz").exists()


def test_pictures_are_the_same_images_for_every_method_with_maps_of_each(finished):
    _, folder = finished("MVFA")
    mvfa, patchcore = (read_arrays(one / "pictures.npz") for one in (folder, finished("PatchCore")[1]))
    for name in ("paths", "labels", "images", "masks"):
        np.testing.assert_array_equal(mvfa[name], patchcore[name])
    assert mvfa["labels"].tolist() == [0, 1, 1, 1]
    assert mvfa["masks"].any(axis=(1, 2)).tolist() == [False, True, True, True]
    with Image.open(mvfa["paths"][0]) as image:
        expected = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(mvfa["images"][0], expected)
    assert mvfa["maps"].shape == (4, SIDE, SIDE)
    assert not np.allclose(mvfa["maps"], patchcore["maps"])
    assert mvfa["levels"].tolist() == [1, 2, 3, 4]
    assert mvfa["level_maps"].shape == (4, 4, SIDE, SIDE)
    assert patchcore["levels"].size == 0

    features = read_arrays(folder / "features.npz")  # of the model with adapters alone
    assert sorted(features["labels"]) == [0, 0, 0, 1, 1, 1]
    assert features["frozen"].shape == (6, 4 * 128)  # levels and width
    assert features["adapted"].shape == (6, 4 * 24)  # levels and joint width
    assert not np.allclose(features["frozen"][:, :128], features["frozen"][:, 128:256])
    assert not (folder.parent / "PatchCore-Brain-k2-s0" / "features.npz").exists()


def test_the_epoch_chosen_on_the_test_is_the_best_and_its_scores_are_kept(finished, comparison):
    mvfa = comparison().methods["MVFA"].model
    longer = {"protocol": "few_shot", "model": {**mvfa, "init_args": {**mvfa["init_args"], "max_epochs": 3}}}
    methods = {"MVFA": {**longer, "data": {"train_batch_size": 11}}}
    last, _ = finished("MVFA", methods=methods)
    best, folder = finished("MVFA", methods=methods, select_epoch_on_test=True)
    assert best.epochs == last.epochs == 3
    assert 1 <= best.selected_epoch <= 3

    def quality(result):
        return result.metrics["image_AUROC"] + result.metrics["pixel_AUROC"]

    assert quality(best) >= quality(last) - 1e-6
    scores = pd.read_csv(folder / "scores.csv")
    assert best.metrics["image_AUROC"] == pytest.approx(roc_auc_score(scores.label, scores.score), abs=1e-6)


def test_a_failure_is_a_result_and_leaves_its_traceback(finished, tmp_path, comparison):
    patchcore = comparison().methods["PatchCore"].model
    broken = {"protocol": "few_normal", "model": patchcore, "trainer": {"max_steps": "many"}}
    result, folder = finished("broken", methods={"broken": broken})
    assert (result.status, result.metrics) == ("failed", {})
    assert result.error
    assert "\n" not in result.error
    assert "Traceback" in (folder / "error.txt").read_text()
    assert json.loads((folder / "result.json").read_text())["error"] == result.error
    assert read_results(tmp_path / "run") == [result]
    assert sorted(path.name for path in folder.iterdir()) == ["error.txt", "result.json"]


def test_scores_that_are_not_finite_are_no_result(finished, monkeypatch):
    score = PatchcoreModel.compute_anomaly_score
    monkeypatch.setattr(PatchcoreModel, "compute_anomaly_score", lambda *args: score(*args) * torch.nan)
    result, _ = finished("PatchCore")
    assert "ValueError: The pred_score that Patchcore gives" in result.error
    assert result.metrics == {}


def test_no_epoch_is_chosen_by_metrics_that_are_not_defined(finished, two_categories, tmp_path):
    chest = shutil.copytree(two_categories / "Chest", tmp_path / "data" / "Chest")
    shutil.rmtree(chest / "test" / "good")
    data = {"class_path": "BMADOneClass", "init_args": {"root": str(chest.parent), "num_workers": 0}}
    changes = {"data": data, "categories": ["Chest"]}
    result, _ = finished("MVFA", "Chest", **changes, select_epoch_on_test=True)
    assert result.error.startswith("ValueError: select_epoch_on_test needs test images of both kinds")
    result, _ = finished("MVFA", "Chest", **changes)
    assert set(map(str, result.metrics.values())) == {"nan"}


def test_what_was_cut_short_is_no_result(finished, tmp_path, monkeypatch):
    def stop(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScoreRecorder, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        finished("PatchCore")
    assert list((tmp_path / "run" / "jobs").iterdir()) == []


def test_a_full_disk_is_this_jobs_error(finished, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ScoreRecorder, "save", full)
    result, folder = finished("PatchCore")
    assert result.error.startswith(f"OSError: {folder} was not written (No space left on device)")
    assert sorted(path.name for path in folder.iterdir()) == ["error.txt", "result.json"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process keeps its parent's number")
def test_a_job_whose_parent_has_ended_before_it_began_ends(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        module._end_with(os.getppid() + 1)


def test_arguments_that_a_job_sets_follow_its_data_and_shots(comparison, tmp_path, monkeypatch):
    seen = {}

    def built(model, weights, **defaults):
        seen.update(defaults)
        raise RuntimeError

    monkeypatch.setattr(module, "build_model", built)
    (job,) = [job for job in jobs_of(comparison(seeds=[3])) if job.folder == "MVFA-Chest-k2-s3"]
    execute(job, tmp_path)
    assert seen == {"seed": 3, "k_shot": 2, "class_name": "Chest X-ray film"}
