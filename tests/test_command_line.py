"""A checkpoint is enough: what scores in one process scores alike on the command line, in another folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from torchvision.transforms.v2.functional import to_dtype, to_image

import anomalib_mvfa
from anomalib_mvfa import BMADFewShot, read_image, save_adapters
from anomalib_mvfa.model.build import build_mvfa
from recipe import MINI, write_clip

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": "results"}
OPTIONS = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
CLIP = {"backbone": "clip.json", "pretrained": "weights.pt", "image_size": 56, "levels": [1, 3], "normalize": True}
ARGUMENTS = {
    "Mvfa": {
        **CLIP,
        "quick_gelu": True,
        "adapters": "adapters.pth",
        "class_name": "head",
        "templates": ["a scan of a {}."],
        "image_score": "det_mean",
        "residual_ratio": 0.3,
        "max_epochs": 1,
    },
    "AprilGan": {**CLIP, "class_name": "head", "max_epochs": 1},
    "Clip": {**CLIP, "quick_gelu": True},
    "WinClipBaseline": {"backbone": "clip.json", "pretrained": "weights.pt", "class_name": "head", "scales": [2]},
    "MedClip": {"backbone": "resnet18", "pretrained": None, "image_size": 64, "levels": [2, 3]},
    "Dra": {"pre_trained": False, "image_size": 128, "top_share": 0.3, "max_epochs": 1},
    "Mkd": {"backbone": "vgg11", "pre_trained": False, "image_size": 64, "value_weight": 0.5, "max_epochs": 1},
}


def command(name, model, checkpoint, *options):
    """Return the arguments of a command."""
    return [name, "--model", model, f"--ckpt_path={checkpoint}", *OPTIONS, *options]


def run(arguments):
    """Run a command of `anomalib`, and return what its engine returns."""
    cli = AnomalibCLI(arguments, run=False)
    return getattr(cli.engine, cli.subcommand)(**cli._prepare_subcommand_kwargs(cli.subcommand))


def scores(batches):
    return torch.cat([batch.pred_score for batch in batches])


@pytest.fixture(scope="module")
def film(categories):
    return str(categories / "Brain" / "test" / "Ungood" / "img" / "000.png")


@pytest.fixture(scope="module")
def trained(categories, film, tmp_path_factory):
    """Return a function that trains a model in a folder of its own and says what it gives there."""

    def train(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(name))
            config, weights, _ = write_clip(Path.cwd(), MINI)
            config.rename("clip.json")
            weights.rename("weights.pt")
            save_adapters(build_mvfa("clip.json", None, levels=CLIP["levels"], seed=1), "adapters.pth")
            model = getattr(anomalib_mvfa, name)(**ARGUMENTS[name], visualizer=False)
            data, engine = BMADFewShot(categories, k_shot=2, num_workers=0), Engine(**QUIET)
            figures = engine.train(model, datamodule=data)[0]
            checkpoint = Path(engine.trainer.checkpoint_callback.best_model_path or engine.best_model_path)
            if not checkpoint.is_file():
                engine.trainer.save_checkpoint(checkpoint := Path("model.ckpt").absolute())
            found = scores(engine.predict(model, data_path=film))
            return SimpleNamespace(checkpoint=checkpoint, figures=figures, scores=found, folder=Path.cwd())

    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, train(name))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_checkpoint_is_enough(trained, name, film, categories, tmp_path, monkeypatch):
    before = trained(name)
    (before.folder / "adapters.pth").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    start = name, before.checkpoint, "--model.visualizer=false"
    torch.testing.assert_close(scores(run(command("predict", *start, f"--data={film}"))), before.scores)

    data = "--data=BMADFewShot", f"--data.root={categories}", "--data.k_shot=2", "--data.num_workers=0"
    assert run(command("test", *start, *data))[0] == pytest.approx(before.figures, abs=1e-5, nan_ok=True)

    exported = torch.load(run(command("export", *start, "--export_type=torch")), weights_only=False)["model"].eval()
    image = to_dtype(to_image(read_image(film)), torch.float32, scale=True)[None]
    torch.testing.assert_close(exported(image).pred_score, before.scores, atol=1e-4, rtol=1e-4)
