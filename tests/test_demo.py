"""The demo says what it found, and finds it."""

import re
import shutil
from pathlib import Path

import pytest

from anomalib_mvfa import demo

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Stand in a folder with the configs and nothing else."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_names_scores_pictures_seed_and_device(checkout, capsys):
    quick = ["--model.max_epochs=1", "--model.image_size=56", "--data.source.init_args.size=64", "--data.k_shot=1"]
    scores = demo.main(["--seed=3", *quick, "--trainer.accelerator=cpu"])

    report = capsys.readouterr().out.rpartition("untrained  trained")[2]
    for metric, name in demo.METRICS.items():
        before, after = scores["untrained"][metric], scores["trained"][metric]
        assert re.search(rf"^{name} +{before:.3f} +{after:.3f}$", report, re.MULTILINE)
    pictures = Path(re.search(r"^pictures +(.+)$", report, re.MULTILINE)[1])
    assert len(list(pictures.rglob("*.png"))) == 48
    assert checkout in pictures.parents
    assert re.search(r"^seed +3$", report, re.MULTILINE)
    assert re.search(r"^device +cpu$", report, re.MULTILINE)
    assert "random weights" in report
    assert "mean nothing clinically" in report
    assert (checkout / "datasets" / "Phantom" / "size64-seed3").is_dir()  # the seed reached the images


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_pays(checkout, seed):
    scores = demo.main([f"--seed={seed}", "--model.visualizer=false", "--trainer.enable_progress_bar=false"])
    for metric in demo.METRICS:
        assert scores["trained"][metric] >= 0.85
        assert scores["trained"][metric] >= scores["untrained"][metric] + 0.1


def test_elsewhere_there_is_one_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        demo.main([])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "configs/demo.yaml is not in" in message
    assert "root of a checkout" in message
