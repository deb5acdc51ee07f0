"""Every config runs on anomalib's command line: as its comments say, on small data where it looks for data."""

import inspect
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_mvfa import BMADFewShot, Mvfa
from anomalib_mvfa.arguments import storable
from anomalib_mvfa.data.bmad import CATEGORIES
from anomalib_mvfa.data.support import group_of
from anomalib_mvfa.model.build import build_mvfa
from workspace import ABNORMAL, NORMAL, PATIENTS, write_workspace

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
COMMAND = re.compile(r"anomalib (train|test) --config (configs/\w+\.yaml)([^`\n]*)")
COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}  # modules, not saved as arguments
QUICK = {
    "data.num_workers": 0,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
}


# ------------------------------------------------------------------------------------------------- What each is about


def check_demo(cli):
    assert cli.model.model.backbone.depth == 4
    assert cli.datamodule.name == "Phantom"
    assert cli.model.settings.protocol == "few_shot"
    assert support_counts(cli) == {0: 12, 1: 12}
    assert cli.model.visualizer.overlay_fields_config["anomaly_map"]["normalize"]
    assert len(list(Path("results").glob("Mvfa/Phantom/Brain/v0/images/**/*.png"))) == len(cli.datamodule.test_data)
    assert Path("datasets/Phantom").is_dir()


def check_few_shot(cli):
    assert cli.datamodule.category == "Liver"
    assert asdict(cli.model.settings) == {
        "protocol": "few_shot",
        "class_name": "Liver",
        "map_branch": "seg",
        "image_score": "map_max",
        "zero_shot_weight": 0.5,
        "few_shot_weight": 0.5,
        "learning_rate": 1e-3,
        "calibration": "support",
    }
    assert support_counts(cli) == {0: 4, 1: 4}
    assert learning_rates(cli) == {1e-3}


def check_leave_one_out(cli):
    data, settings = cli.datamodule, cli.model.settings
    assert (settings.protocol, settings.class_name) == ("leave_one_out", "Liver")
    assert (settings.few_shot_weight, settings.calibration) == (0, "none")
    assert settings.image_score == "det_mean"
    assert learning_rates(cli) == {1e-4}
    assert data.train_batch_size == 1
    assert [part.class_name for part in data.train_data.parts] == [
        category.class_name for name, category in CATEGORIES.items() if name != "Liver"
    ]
    assert not any("/Liver/" in path for part in data.train_data.parts for path in part.samples.image_path)
    assert all("/Liver/" in path for path in data.test_data.samples.image_path)
    assert not any(value.numel() for name, value in cli.model.state_dict().items() if name.startswith("model.bank."))


def check_mvfa_paper_losses(cli):
    model = cli.model.model
    assert (model.residual, model.pooling, model.upsample) == ("single", "max", "probabilities")
    assert cli.model.loss.bce == "plain"
    assert (cli.model.settings.calibration, cli.model.settings.image_score) == ("none", "det_max")
    assert (model.scoring.normalised, model.scoring.image_score) == (False, "det_max")
    assert model.ranges.isnan().all()
    assert cli.model.settings.few_shot_weight == 0.5
    assert (learning_rates(cli), cli.datamodule.train_batch_size) == ({1e-3}, 16)


def check_mvfa_paper_losses_leave_one_out(cli):
    model = cli.model.model
    assert (model.residual, model.pooling, model.upsample) == ("single", "max", "probabilities")
    assert (cli.model.loss.bce, cli.model.settings.image_score) == ("plain", "det_max")
    assert (learning_rates(cli), cli.datamodule.train_batch_size) == ({1e-3}, 16)


def check_mvtec(cli):
    data = cli.datamodule
    assert (data.name, data.category) == ("MVTecAD", "screw")
    assert cli.model.settings.class_name == "screw"
    assert support_counts(cli) == {0: 4, 1: 4}
    assert (len(data.val_data), len(data.test_data)) == (2, 10)


def check_own_data(cli):
    data = cli.datamodule
    assert cli.model.settings.class_name == "mammogram"
    assert support_counts(cli) == {0: 4, 1: 4}
    parts = [set(part.samples.image_path) for part in (data.support, data.val_data, data.test_data)]
    patients = [{group_of(path, r"/(p\d+)_") for path in part} for part in parts]
    assert all(parts)
    assert all(one.isdisjoint(other) for one, other in combinations(patients, 2))
    assert sum(map(len, patients)) < sum(map(len, parts))

    data.source._is_setup = data._is_setup = False  # by itself, the draw does not keep these patients apart
    data.group_by = None
    data.setup()
    parts = [data.support, data.val_data, data.test_data]
    patients = [{group_of(path, r"/(p\d+)_") for path in part.samples.image_path} for part in parts]
    assert any(one & other for one, other in combinations(patients, 2))


def check_scans(cli):
    data = cli.datamodule
    assert cli.model.settings.class_name == "liver"
    assert support_counts(cli) == {0: 4, 1: 4}
    parts = [data.support, data.val_data, data.test_data]
    files = [{Path(path).name.partition("_slice")[0] for path in part.samples.image_path} for part in parts]
    assert all(one.isdisjoint(other) for one, other in combinations(files, 2))
    assert set(data.test_data.samples.label_index) == {0, 1}
    assert data.test_data.task == "segmentation"
    assert data.source.window == (-150, 250)
    assert len(list(Path("datasets/scans_8bit").rglob("*slice*.png"))) == PATIENTS * (5 + 5 + 4)  # with masks


def check_published_adapters(cli):
    saved = torch.load("checkpoints/few-shot/Brain.pth")
    for branch in ("seg_adapters", "det_adapters"):
        torch.testing.assert_close(getattr(cli.model.model, branch).state_dict(), saved[branch], atol=0, rtol=0)
    assert cli.model.settings.calibration == "test"
    assert cli.model.model.scoring.normalised
    assert cli.model.model.ranges[0].isfinite().all()
    samples = cli.datamodule.support.samples
    for label, names in enumerate((NORMAL, ABNORMAL)):
        assert {Path(path).name for path in samples.image_path[samples.label_index == label]} == set(names)
    assert cli.engine.trainer.global_step == 0
    assert list(Path("results/published_adapters").iterdir())
    assert [path.name for path in Path("results").iterdir()] == ["published_adapters"]


def support_counts(cli):
    return cli.datamodule.support.samples.label_index.value_counts().to_dict()


def learning_rates(cli):
    return {group["lr"] for optimizer in cli.engine.trainer.optimizers for group in optimizer.param_groups}


class Case(NamedTuple):
    """What replaces the arguments that are too large for a test, and what a run must then show."""

    check: Callable[[AnomalibCLI], None]
    overrides: dict[str, object]


PLAIN = {"model.visualizer": "false"}
TINY_CLIP = {
    **PLAIN,
    "model.backbone": "weights/tiny.json",
    "model.pretrained": "weights/ViT-L-14-336px.pt",
    "model.image_size": 28,
}
SHORT = {**TINY_CLIP, "model.max_epochs": 1}
CASES = {
    "demo": Case(check_demo, {"model.max_epochs": 1, "model.image_size": 56, "data.source.init_args.size": 64}),
    "few_shot": Case(check_few_shot, SHORT),
    "leave_one_out": Case(check_leave_one_out, SHORT),
    "mvfa_paper_losses": Case(check_mvfa_paper_losses, SHORT),
    "mvfa_paper_losses_leave_one_out": Case(check_mvfa_paper_losses_leave_one_out, SHORT),
    "mvtec": Case(check_mvtec, SHORT),
    "own_data": Case(check_own_data, {**SHORT, "data.group_by": r"/(p\d+)_[^/]*$"}),
    "scans": Case(check_scans, SHORT),
    "published_adapters": Case(check_published_adapters, TINY_CLIP),
}


# ------------------------------------------------------------------------------------------------------- Where they run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder that holds what configs name, where they name it."""
    root = tmp_path_factory.mktemp("workspace")
    write_workspace(root)
    return root


@pytest.fixture
def here(workspace, tmp_path, monkeypatch):
    """Stand in a checkout with the workspace's data and no results."""
    for path in workspace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------------------------- Tests


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem != "few_shot"), id=path.stem) for path in CONFIGS],
)
@pytest.mark.usefixtures("here")
def test_config_runs(path):
    command, file, extra = "train", f"configs/{path.name}", ""
    if match := COMMAND.search(path.read_text()):  # as its comments say, where they do
        command, file, extra = match.groups()
        assert file == f"configs/{path.name}"
    check, overrides = CASES[path.stem]
    options = [f"--{name}={value}" for name, value in {**QUICK, **overrides}.items()]

    cli = AnomalibCLI([command, "--config", file, *shlex.split(extra), *options])

    metrics = cli.engine.trainer.callback_metrics
    assert 0 <= metrics["image_AUROC"] <= 1
    assert 0 <= metrics["pixel_AUROC"] <= 1
    for name, value in yaml.safe_load(path.read_text())["model"].get("init_args", {}).items():
        if f"model.{name}" not in overrides and name not in COMPONENTS:
            assert cli.model.hparams[name] == storable({name: value})[name], name
    check(cli)


def test_few_shot_shows_every_argument_at_its_default():
    text = (CONFIGS[0].parent / "few_shot.yaml").read_text()
    config = yaml.safe_load(text)
    prompts = {"normal_states", "abnormal_states", "templates"}
    augmentations = {"train_augmentations", "val_augmentations", "test_augmentations", "augmentations"}

    outside = {"backbone", "pretrained"}  # environment variables set these, and a value in the file would win
    assert config["model"]["init_args"] == defaults(Mvfa, without=COMPONENTS | prompts | outside)
    for name in outside:
        assert f"# {name}: {inspect.signature(build_mvfa).parameters[name].default} " in text

    shown, expected = config["data"]["init_args"], defaults(BMADFewShot, without={"source", *augmentations})
    assert Path(shown.pop("root")) == Path(expected.pop("root"))
    assert shown == expected


def defaults(cls, without=frozenset()):
    """Defaults of the constructor, and of those of base classes to which it passes further keywords on."""
    found = {}
    for base in cls.__mro__:
        parameters = inspect.signature(base).parameters
        found = {**{name: parameter.default for name, parameter in parameters.items()}, **found}
        if not found.pop("kwargs", None):
            break
    return {name: default for name, default in found.items() if name not in without}
