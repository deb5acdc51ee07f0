"""Several seeds in one run: the command itself."""

import json

import numpy as np
import pytest

from anomalib_mvfa.compare.repeat import main


def test_the_command_saves_means_and_intervals(mini_clip, phantom_root, tmp_path, capsys):
    options = {
        "--model": "Mvfa",
        "--model.backbone": mini_clip.config,
        "--model.pretrained": mini_clip.weights,
        "--model.image_size": 56,
        "--model.max_epochs": 2,
        "--model.visualizer": "false",
        "--data": "BMADFewShot",
        "--data.root": phantom_root,
        "--data.k_shot": 1,
        "--data.num_workers": 0,
        "--trainer.enable_progress_bar": "false",
        "--default_root_dir": tmp_path / "results",
    }
    output = tmp_path / "out" / "repeat.json"
    own = ["--seeds", "0,1", "--resamples", "50", "--output", str(output), "--select_epoch_on_test"]
    main([*own, *(str(part) for option in options.items() for part in option)])
    report = json.loads(output.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["calibration"] == "support"
    summary = report["last_epoch"]["image_AUROC"]
    values = [run["last_epoch"]["image_AUROC"] for run in report["runs"]]
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["interval_95"][0] <= summary["mean"] <= summary["interval_95"][1]
    assert "optimistic" in report["selected_on_test"]["note"]
    for run in report["runs"]:
        chosen, last = (run[key]["image_AUROC"] + run[key]["pixel_AUROC"] for key in ("selected_on_test", "last_epoch"))
        assert chosen >= last - 1e-6
    assert report["versions"]["anomalib"]
    assert [run["config"]["model"]["init_args"]["seed"] for run in report["runs"]] == [0, 1]
    (first, second), (tested, again) = ([run[name] for run in report["runs"]] for name in ("train_set", "test_set"))
    assert first != second  # another draw of the support
    assert tested == again
    assert "95 % interval over images" in capsys.readouterr().out
    assert not list(output.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "."], "--output . must be a file that can be written"),
        (["--output", "file/repeat.json"], "--output file/repeat.json must be a file"),
        (["--resamples", "0"], "--resamples 0 must be at least 1"),
        *((["--seeds", seeds], f"{seeds!r} must be different whole numbers") for seeds in ("0,1,0", "0;1", "a", "")),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main([*options, "--model", "Mvfa"])
    assert message in capsys.readouterr().err
