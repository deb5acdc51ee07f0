"""A checkpoint is enough: on the command line, in another folder, a model of any arguments scores as it did.

tests/baselines/test_models.py shows it of every model.
"""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_mvfa import BMADFewShot, Mvfa, read_image, save_adapters
from anomalib_mvfa.model.build import build_mvfa
from recipe import TINY, write_clip

ARGUMENTS = {
    "backbone": "clip.json",
    "pretrained": "weights.pt",
    "adapters": "adapters.pth",
    "image_size": 56,
    "levels": [1, 3],
    "quick_gelu": True,
    "normalize": True,
    "class_name": "head",
    "templates": ["a scan of a {}."],
    "image_score": "det_mean",
    "residual_ratio": 0.3,
    "max_epochs": 1,
}
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def film(categories):
    return str(categories / "Brain" / "test" / "Ungood" / "img" / "000.png")


@pytest.fixture(scope="module")
def trained(categories, film, tmp_path_factory):
    """A checkpoint of a model trained by relative paths, what it scored, and what it was made of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("training"))
        config, weights, _ = write_clip(Path.cwd(), TINY)
        config.rename("clip.json")
        weights.rename("weights.pt")
        save_adapters(build_mvfa("clip.json", None, levels=ARGUMENTS["levels"], seed=1), "adapters.pth")
        model = Mvfa(**ARGUMENTS, visualizer=False)
        data = BMADFewShot(categories, k_shot=2, num_workers=0, train_batch_size=44)
        engine = Engine(accelerator="cpu", enable_progress_bar=False, logger=False, default_root_dir="results")
        (figures,) = engine.train(model, datamodule=data)
        (batch,) = engine.predict(model, data_path=film)
        Path("adapters.pth").unlink()  # which the checkpoint has
        return SimpleNamespace(
            path=Path(engine.best_model_path), figures=figures, score=batch.pred_score, folder=Path.cwd()
        )


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Return a function that runs a command of anomalib in another folder, and returns what the engine does."""
    monkeypatch.chdir(tmp_path)

    def run(command, *options, path=trained.path):
        start = "--model=Mvfa", f"--ckpt_path={path}", "--model.visualizer=false"
        cli = AnomalibCLI([command, *start, *QUIET, *map(str, options)], run=False)
        return getattr(cli, command)(**cli._prepare_subcommand_kwargs(command))

    return run


def test_a_checkpoint_is_enough(trained, run, film, categories):
    (batch,) = run("predict", f"--data={film}")
    torch.testing.assert_close(batch.pred_score, trained.score)
    data = "--data=BMADFewShot", f"--data.root={categories}", "--data.k_shot=2", "--data.num_workers=0"
    assert run("test", *data)[0] == pytest.approx(trained.figures, abs=1e-6)
    exported = torch.load(run("export", "--export_type=torch"), weights_only=False)["model"].eval()
    image = to_dtype(to_image(read_image(film)), torch.float32, scale=True)
    with torch.no_grad():
        torch.testing.assert_close(exported(image[None]).pred_score, trained.score)


def test_what_is_given_beside_a_checkpoint_comes_first(trained, run, film, tmp_path, caplog):
    """A weight file that has moved, for predict and export alike; in a configuration file, calibration."""
    weights = trained.folder / "weights.pt"
    moved = weights.rename(tmp_path / "moved.pt")
    try:
        with pytest.raises(ValueError, match=r"training\d*/weights\.pt' is neither a file nor a tag"):
            run("predict", f"--data={film}")
        Path("own.yaml").write_text("model: {class_path: Mvfa, init_args: {calibration: none}}")
        with caplog.at_level(logging.INFO, logger="anomalib.mvfa"):
            (batch,) = run("predict", f"--data={film}", f"--model.pretrained={moved}", "--config=own.yaml")
        assert "pretrained='/" in caplog.text
        assert "calibration='none' (checkpoint: 'support')" in caplog.text
        assert not torch.allclose(batch.pred_score, trained.score)
        assert run("export", "--export_type=torch", f"--model.pretrained={moved}").is_file()
    finally:
        moved.rename(weights)


def test_an_exported_model_decides_by_the_threshold_that_is_given(run):
    exported = torch.load(run("export", "--export_type=torch", "--model.threshold=0.999"), weights_only=False)["model"]
    assert exported.post_processor.image_threshold.item() == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (
            "predict",
            "image_size=70 quick_gelu=no",
            r"image_size=70 \(checkpoint: 56\), quick_gelu=False \(.* leave these",
        ),
        ("predict", "levels=[1,4]", r"made with levels=\[1, 3\], and levels=\[1, 4\]"),
        (
            "predict",
            "normalize=no",
            r"no support images .* with other values, normalize=False \(checkpoint: True\), and",
        ),
        ("export", "normalize=no", r"cannot be exported, .* with other values, normalize=False \(checkpoint: True\)\."),
    ],
)
def test_what_does_not_fit_is_named(run, film, command, options, message):
    given = [f"--model.{option}" for option in options.split()]
    with pytest.raises(RuntimeError, match=message):
        run(command, *given, "--export_type=torch" if command == "export" else f"--data={film}")


def test_a_model_of_other_arguments_in_python_is_told_of_them(trained, film):
    other = Mvfa(str(trained.folder / "clip.json"), None, image_size=70, visualizer=False)
    with pytest.raises(RuntimeError, match=r"image_size=70 \(checkpoint: 56\).* by Mvfa\.load_from_checkpoint"):
        Engine(accelerator="cpu", logger=False).predict(other, data_path=film, ckpt_path=trained.path)
