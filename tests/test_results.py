"""What a run leaves in its folder: numbers, pictures with scores in them, and maps; and where it cannot."""

import errno
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_mvfa import BMADFewShot, Mvfa, SaveMaps, results
from anomalib_mvfa.results import Results, with_title

WIDE = (90, 40)
"""Width and height of images that are no square."""


@pytest.fixture(scope="module")
def run(tiny_config, phantom_root, tmp_path_factory):
    """Fit to normal images alone, without validation, test on one kind and predict; return folders, model and log."""
    root, films, lines = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("films"), []
    listener, logger = logging.Handler(), logging.getLogger("anomalib.mvfa")
    listener.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56)
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}
    engine = Engine(default_root_dir=root, callbacks=[SaveMaps()], max_epochs=1, limit_val_batches=0, **quiet)
    folders = {"normal_dir": "train/good/img", "normal_test_dir": "test/good/img"}
    own = Folder("own", root=phantom_root / "Brain", **folders, val_split_mode="same_as_test", num_workers=0)
    engine.train(model, datamodule=own)
    tested = shutil.copytree(engine.trainer.default_root_dir, root / "tested")
    rng = np.random.default_rng(0)
    for name in ("=a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (*WIDE[::-1], 3), np.uint8)).save(films / name)
    engine.predict(model, data_path=films)
    logger.removeHandler(listener)
    logger.setLevel(logging.NOTSET)
    return tested, Path(engine.trainer.default_root_dir), films, model, lines


def test_undefined_metrics_are_null(run):
    folder, *_ = run
    written = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["metrics"]["image_AUROC"] is written["metrics"]["image_sensitivity"] is None
    assert [*written["intervals_95"]] == ["image_specificity"]
    assert written["images"] == {"normal": 4, "abnormal": 0}
    assert written["threshold"]["from"] == "support"
    assert written["threshold"]["learnt_from"] is False
    assert list(pd.read_csv(folder / "scores.csv")) == ["image", "label", "score", "decision", "threshold"]


def test_without_abnormal_images_the_threshold_is_the_highest_score_of_normal_ones(run):
    *_, model, lines = run
    with torch.no_grad():
        left_out = [float(model.model.fuse(scores).pred_score) for scores, _ in model.state.support]
    assert len(left_out) == 4
    assert float(model.post_processor.image_threshold) == pytest.approx(max(left_out))
    text = "(the highest score of normal images, as there are no abnormal ones). On 4 normal and 0 abnormal support"
    assert sum(text in line for line in lines) == 1


def test_prediction_leaves_scores_that_spreadsheets_take_for_no_formula(run):
    _, folder, films, model, _ = run
    table = pd.read_csv(folder / "scores.csv")
    assert list(table) == ["image", "score", "decision", "threshold"]
    assert list(table.image) == [str(films / "=a.png"), str(films / "b.jpg")]
    assert np.float32(table.threshold[0]) == model.post_processor.image_threshold.numpy()  # in full


def test_maps_and_pictures(run):
    _, folder, films, _, _ = run
    found = np.asarray(Image.open(folder / "maps" / films.name / "b.png"))
    assert (found.dtype, found.shape) == (np.uint16, WIDE[::-1])
    assert found.std() > 0
    with Image.open(folder / "images" / films.name / "=a.png") as picture:
        top = np.asarray(picture)[:40]
        assert picture.size == (3 * 256, 256 + 40)
    assert top.any()


@pytest.mark.parametrize("width", [20, 300, 2000])
def test_titles_are_not_cut_off(width):
    titled = np.asarray(with_title(Image.new("RGB", (width, 10)), "abnormal: score 1.2345e+05, threshold 9.876e-05"))
    columns = np.flatnonzero(titled.any(axis=(0, 2)))
    assert columns[-1] < titled.shape[1] - 5
    assert titled.shape[1] >= width
    assert titled[-10:].max() == 0


def test_a_folder_that_cannot_be_written_to_is_named_before_training(monkeypatch, tiny_config, phantom_root, tmp_path):
    def refuse(dir):  # noqa: A002  # tempfile's name
        raise OSError(errno.EROFS, "Read-only file system", str(Path(dir, "x")))

    monkeypatch.setattr(results.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Mvfa, "on_fit_start", pytest.fail)
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, visualizer=False)
    assert isinstance(model.configure_callbacks()[-1], Results)
    with pytest.raises(OSError, match=r"scores\.csv was not written \(Read-only file system\)"):
        Engine(default_root_dir=tmp_path, accelerator="cpu").fit(model, datamodule=BMADFewShot(phantom_root, k_shot=1))
