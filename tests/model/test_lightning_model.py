"""Mvfa inside anomalib's engine: settings, training, checkpoints, precision."""

import io
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_mvfa import BMADFewShot, BMADLeaveOneOut, Mvfa
from anomalib_mvfa.contract import DataFacts
from anomalib_mvfa.model import calibration
from anomalib_mvfa.model.backbone import ClipBackbone
from anomalib_mvfa.model.calibration import is_calibrated
from anomalib_mvfa.model.state import Settings

IMAGE_SIZE = 28
VIEWS = 2 * 2 * 11
"""Of two normal and two abnormal images."""
OF_CHEST = "Chest X-ray film"


@pytest.fixture(scope="module")
def make(tiny_config):
    """Build a small Mvfa."""

    def build(**arguments):
        defaults = {"pretrained": None, "image_size": IMAGE_SIZE, "max_epochs": 1, "visualizer": False}
        return Mvfa(backbone=str(tiny_config), **{**defaults, **arguments})

    return build


@pytest.fixture(scope="module")
def few_shot(categories):
    """Build the few-shot datamodule of a category, by default with four batches an epoch."""

    def build(category="Brain", **arguments):
        return BMADFewShot(categories, category, **{"k_shot": 2, "num_workers": 0, "train_batch_size": 11, **arguments})

    return build


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Build an engine that says little."""

    def build(**arguments):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        return Engine(default_root_dir=tmp_path_factory.mktemp("results"), **{**quiet, **arguments})

    return build


def figures_of(engine, model, datamodule):
    return engine.test(model, datamodule=datamodule, verbose=False)[0]


class Watch(Callback):
    """Keeps what happens in a fit, and a checkpoint of epoch ``save`` (from 0)."""

    def __init__(self, path: Path, save: int) -> None:
        self.path, self.save = path, save
        self.losses, self.events = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_validation_start(self, trainer, pl_module):
        self.events.append(("validate", trainer.current_epoch))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.events.append(("save", trainer.current_epoch, is_calibrated(pl_module.model)))

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.save:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def fitted(make, few_shot, engine, tmp_path_factory):
    """A few-shot fit of three epochs, of which nobody changes anything, with a checkpoint of the second."""
    seed_everything(1)
    watch = Watch(tmp_path_factory.mktemp("early") / "early.ckpt", save=1)
    model, runner = make(max_epochs=3), engine(callbacks=[watch])
    runner.fit(model, datamodule=few_shot())
    figures = figures_of(runner, model, few_shot())
    return SimpleNamespace(model=model, checkpoint=runner.best_model_path, figures=figures, watch=watch)


@pytest.fixture
def loaded(fitted):
    """The fitted model once more, to change."""
    return Mvfa.load_from_checkpoint(fitted.checkpoint, visualizer=False)


# ---------------------------------------------------------------- settings


def test_data_decide_what_arguments_leave_open(fitted, make):
    assert asdict(fitted.model.settings) == {
        "protocol": "few_shot",
        "class_name": "Brain",
        "map_branch": "seg",
        "image_score": "map_max",
        "zero_shot_weight": 0.5,
        "few_shot_weight": 0.5,
        "learning_rate": 1e-3,
        "calibration": "support",
    }
    chosen = {"class_name": "head", "image_score": "det_max", "few_shot_weight": 0.2, "learning_rate": 0.01}
    assert make(**chosen, calibration="none").asked == Settings(**chosen, calibration="none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bce": "soft"}, "logits, plain"),
        ({"residual_ratio": 0.6}, "between 0 and 0.5"),
        ({"zero_shot_weight": 0, "few_shot_weight": 0}, "one branch at least"),
        ({"templates": ["a photo"]}, "templates must be"),
    ],
)
def test_unknown_values_are_refused_before_weights_load(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mvfa(backbone="no such backbone", **arguments)


# ---------------------------------------------------------------- training


def test_training_lowers_the_loss_validates_at_its_end_and_saves_every_epoch(fitted):
    losses = fitted.watch.losses
    assert len(losses) == 3 * 4
    assert sum(losses[-4:]) < sum(losses[:4])
    saves = [("save", epoch, False) for epoch in (0, 1, 1)]  # one more of the second epoch, which is ours
    assert fitted.watch.events == [*saves, ("validate", 2), ("save", 2, True)]


def bank_is_true(engine, model, datamodule):
    """Whether the bank is the one that the adapters, as they are now, give."""
    had = model.model.bank.seg.clone()
    model._forget_calibration()
    engine.validate(model, datamodule=datamodule, verbose=False)
    return torch.allclose(had, model.model.bank.seg, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"val_check_interval": 0.5}, 4),
        ({"max_steps": 3}, 3),
        ({"max_epochs": 2}, 8),
        ({"limit_train_batches": 3}, 3),
        ({"limit_val_batches": 0}, 4),
        ({"callbacks": [EarlyStopping("train_loss", patience=0, mode="max", check_on_train_epoch_end=True)]}, 8),
        ({"gradient_clip_val": 0.1}, 4),
        ({"accumulate_grad_batches": 4}, 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_the_bank_is_the_final_adapters_however_a_fit_goes(make, few_shot, engine, options, steps):
    model, data, runner = make(max_epochs=5 if "callbacks" in options else 1), few_shot(), engine(**options)
    runner.fit(model, datamodule=data)
    assert runner.trainer.global_step == steps
    assert 0 < model.post_processor.image_threshold < 1
    saved = torch.load(runner.best_model_path, weights_only=True)
    assert torch.equal(saved["state_dict"]["model.bank.seg"], model.model.bank.seg)
    assert bank_is_true(engine(), model, data)


def test_neither_the_seed_of_the_run_nor_its_length_changes_training(fitted, make, few_shot, engine):
    """Initial weights and order are functions of the arguments, whatever the global seed."""
    seed_everything(2)
    model = make(max_epochs=2)
    engine(limit_val_batches=0).fit(model, datamodule=few_shot())
    saved = torch.load(fitted.watch.path, weights_only=True)["state_dict"]
    assert torch.equal(model.model.det_adapters[0].fc1[0].weight, saved["model.det_adapters.0.fc1.0.weight"])


@pytest.mark.parametrize("augmented", [False, True])
def test_frozen_blocks_run_once_for_images_that_come_again(make, few_shot, engine, monkeypatch, augmented):
    seen, trained, embed = [], [], ClipBackbone.embed

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.clear()

        def on_train_epoch_end(self, trainer, pl_module):
            trained.append(sum(seen))  # after the last epoch, before the bank is built

    model = make(max_epochs=2)
    monkeypatch.setattr(ClipBackbone, "embed", lambda self, image: (seen.append(len(image)), embed(self, image))[1])
    random = {"train_augmentations": RandomHorizontalFlip()} if augmented else {}
    engine(callbacks=[Count()], limit_val_batches=0).fit(model, datamodule=few_shot(**random))
    assert trained == [VIEWS, 2 * VIEWS if augmented else VIEWS]
    assert model.model.cache is None


@pytest.mark.parametrize(("warmup_epochs", "rates"), [(None, [1] * 6), (1, [0.01, 0.51, 1, 0.85, 0.5, 0.15])])
def test_the_learning_rate_rises_and_falls_where_asked(make, few_shot, engine, warmup_epochs, rates):
    found = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            found.append(trainer.optimizers[0].param_groups[1]["lr"] / 1e-3)

    data = few_shot(train_batch_size=VIEWS // 2)
    engine(callbacks=[Watch()], limit_val_batches=0).fit(
        make(max_epochs=3, warmup_epochs=warmup_epochs), datamodule=data
    )
    assert found == pytest.approx(rates, abs=0.01)


def test_normal_only_data_train_nothing(make):
    """What is built and said of them is shown in test_mistakes."""
    model = make()
    model._facts = DataFacts(normal_only=True)
    assert not model.learns
    assert model.configure_optimizers() is None


def test_gradients_of_seg_adapters_are_dropped_in_steps_without_masks(make):
    """In several processes they are 0, by which momentum would still move weights."""
    model = make()
    seg, det = ([*adapters.parameters()] for adapters in (model.model.seg_adapters, model.model.det_adapters))
    for saw_masks in (True, False):
        for parameter in (*seg, *det):
            parameter.grad = torch.zeros_like(parameter)
        model._saw_masks = saw_masks
        model.on_before_optimizer_step(None)
        assert all((parameter.grad is not None) == saw_masks for parameter in seg)
        assert all(parameter.grad is not None for parameter in det)


# ---------------------------------------------------------------- scores


def test_one_image_alone_has_the_score_it_has_among_all(loaded, few_shot, engine):
    data, runner = few_shot(), engine()
    together = {
        path: score
        for batch in runner.predict(loaded, datamodule=data)
        for path, score in zip(batch.image_path, batch.pred_score.tolist(), strict=True)
    }
    for path in list(together)[::3]:
        alone = runner.predict(loaded, data_path=path)[0].pred_score
        assert alone.item() == pytest.approx(together[path], abs=1e-2)  # read and resized as floats here
    data.eval_batch_size = 1
    singly = [batch.pred_score.item() for batch in runner.predict(loaded, datamodule=data)]
    assert singly == pytest.approx(list(together.values()), abs=1e-6)


def test_ranges_of_the_test_set(make, few_shot, engine, caplog):
    """They run the backbone once, leave nothing of a limited test, and do for no single image."""
    model, data, calls = make(calibration="test"), few_shot(), []
    embed = model.model.backbone.embed
    model.model.backbone.embed = lambda image: (calls.append(len(image)), embed(image))[1]
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        figures = figures_of(engine(), model, data)
    assert sum(calls) == 2 * 11 + 2 + len(data.test_data)  # normal views, abnormal images, test images
    assert "optimistic" in caplog.text
    with pytest.raises(ValueError, match="calibration='test' cannot predict"):
        engine().predict(model, datamodule=data)
    with pytest.raises(ValueError, match="calibration='test' cannot export"):
        model.to_torch("nowhere")

    limited = make(calibration="test")
    figures_of(engine(limit_test_batches=1), limited, few_shot(eval_batch_size=2))
    assert not limited._test_scores
    assert figures_of(engine(), limited, data) == pytest.approx(figures, abs=1e-6)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_leaves_the_backbone_out_and_gives_the_same_scores(fitted, loaded, make, few_shot, engine):
    saved = torch.load(fitted.checkpoint, weights_only=True)
    assert not [key for key in saved["state_dict"] if "backbone" in key]
    assert saved["state_dict"]["model.bank.det"].numel() == 0  # map_max reads the seg branch alone

    assert loaded.settings == fitted.model.settings
    assert figures_of(engine(), loaded, few_shot()) == pytest.approx(fitted.figures, abs=1e-6)
    by_path = engine().test(make(), datamodule=few_shot(), ckpt_path=fitted.checkpoint, verbose=False)[0]
    assert by_path == pytest.approx(fitted.figures, abs=1e-6)


def test_other_checkpoints_are_refused(fitted, tmp_path):
    """Which networks are others is shown in test_state."""
    with pytest.raises(RuntimeError, match=r"another backbone: its weights have the fingerprint .* pretrained=None"):
        Mvfa.load_from_checkpoint(fitted.checkpoint, visualizer=False, quick_gelu=True)
    saved = torch.load(fitted.checkpoint, weights_only=True)
    torch.save({name: value for name, value in saved.items() if name != "mvfa"}, tmp_path / "old.ckpt")
    with pytest.raises(RuntimeError, match=r"no checkpoint of this version's Mvfa\. Fit"):
        Mvfa.load_from_checkpoint(tmp_path / "old.ckpt", visualizer=False)


def test_a_checkpoint_moves_to_weights_elsewhere(fitted, tmp_path):
    elsewhere = str(tmp_path / "elsewhere.pt")
    torch.save(fitted.model.model.backbone.clip.state_dict(), elsewhere)
    loaded = Mvfa.load_from_checkpoint(fitted.checkpoint, pretrained=elsewhere, visualizer=False)
    assert loaded.hparams.pretrained == elsewhere


def test_a_checkpoint_from_before_the_last_epoch_builds_its_bank_anew(fitted, few_shot, engine, categories, tmp_path):
    """From support images, of which nothing is exported."""
    early = Mvfa.load_from_checkpoint(fitted.watch.path, visualizer=False)
    assert early.model.bank.seg.numel() == 0
    with pytest.raises(RuntimeError, match="memory bank or ranges are missing"):
        early.to_torch(tmp_path)
    with pytest.raises(RuntimeError, match="no support images"):
        engine().predict(early, data_path=categories / "Brain/test/good/img/000.png")
    assert 0 <= figures_of(engine(), early, few_shot())["image_AUROC"] <= 1
    assert early.model.bank.seg.numel() > 0

    path = early.to_torch(tmp_path)
    assert not torch.load(path, weights_only=False)["model"].state.support
    assert early.state.support


def test_resumed_training_ends_where_unbroken_training_does(fitted, make, few_shot, engine):
    resumed, runner = make(max_epochs=3), engine()
    runner.fit(resumed, datamodule=few_shot(), ckpt_path=fitted.watch.path)
    assert runner.trainer.current_epoch == 3
    assert figures_of(runner, resumed, few_shot()) == pytest.approx(fitted.figures, abs=1e-6)


class Killed(BaseException):
    pass


def cut_save(content, file, real=torch.save):
    """Write half of a checkpoint."""
    whole = io.BytesIO()
    real(content, whole)
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    file.write(half) if hasattr(file, "write") else file.write_bytes(half)
    raise Killed


def cut_move(source, target):
    """Move half of a checkpoint, as between file systems, where Lightning's own way to save moves the file."""
    data = Path(source).read_bytes()
    Path(target).write_bytes(data[: len(data) // 2])
    raise Killed


@pytest.mark.parametrize(("cut", "last"), [("torch.save", 0), ("shutil.move", 1), ("/dev/full", 0)])
def test_a_save_that_is_cut_off_leaves_the_last_checkpoint(make, few_shot, engine, monkeypatch, cut, last):
    class CutSecond(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and cut == "/dev/full":
                (path,) = Path(trainer.default_root_dir).rglob("*.ckpt")
                path.with_name(f".{path.name}.partial").symlink_to(cut)
            elif trainer.current_epoch == 1:
                monkeypatch.setattr(cut, {"torch.save": cut_save, "shutil.move": cut_move}[cut])

    if cut.startswith("/") and not Path(cut).exists():
        pytest.skip("Linux has a disk that is always full")
    message = r"model\.ckpt was not written \(No space left on device\), and what was"
    runner = engine(callbacks=[CutSecond()])
    with pytest.raises(OSError, match=message) if cut == "/dev/full" else suppress(Killed):
        runner.fit(make(max_epochs=2), datamodule=few_shot(train_batch_size=44))
    monkeypatch.undo()
    (path,) = (path for path in Path(runner.trainer.default_root_dir).rglob("*") if path.is_file())
    assert path.name == "model.ckpt"
    assert torch.load(path, weights_only=False)["epoch"] == last  # nothing is moved


def test_a_monitoring_checkpoint_sees_every_epoch(make, few_shot, engine, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="train_loss", save_top_k=-1)
    engine(callbacks=[keep]).fit(make(max_epochs=2), datamodule=few_shot(train_batch_size=44))
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- nothing stale


@pytest.mark.parametrize(
    "changed",
    [{"templates": ["a scan of a {}."]}, {"image_score": "det_mean"}, {"few_shot_weight": 0.1}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_checkpoint_with_other_arguments_is_as_if_built_with_them(fitted, few_shot, engine, changed):
    """Which arguments empty what is shown in test_state."""
    loaded, rebuilt = (Mvfa.load_from_checkpoint(fitted.checkpoint, visualizer=False, **changed) for _ in range(2))
    rebuilt._forget_calibration()
    with torch.no_grad():
        rebuilt.model.text_features.fill_(torch.nan)
    expected = figures_of(engine(), rebuilt, few_shot())
    assert figures_of(engine(), loaded, few_shot()) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_is_fitted_again_forgets_the_first_data(loaded, few_shot, engine):
    engine(limit_train_batches=1).fit(loaded, datamodule=few_shot("Chest"))
    settings = (loaded.settings.class_name, loaded.settings.map_branch, loaded.settings.image_score)
    assert settings == (OF_CHEST, "det", "det_mean")
    torch.testing.assert_close(loaded.model.text_features, loaded.model.encode_states(OF_CHEST))


def test_testing_without_a_fit_builds_the_bank_of_each_data_set(make, few_shot, engine):
    model = make()
    for name, branch in (("Brain", "seg"), ("Chest", "det")):
        figures_of(engine(), model, few_shot(name))
        assert model.settings.map_branch == branch
        assert getattr(model.model.bank, branch).numel()


@pytest.mark.parametrize("patches", [0, 1])
def test_a_text_branch_that_calls_everything_normal_is_reported(make, few_shot, engine, caplog, monkeypatch, patches):
    score = calibration.score_support

    def scored(*arguments):
        found = score(*arguments)
        for scores, item in found:
            scores.logits[:] = torch.tensor([3.0, 0.0])
            scores.logits[:, :, : patches * int(item.gt_label), 1] = 6.0
        return found

    monkeypatch.setattr(calibration, "score_support", scored)
    engine().fit(make(), datamodule=few_shot())
    assert caplog.text.count("calls every patch of the abnormal support images normal (at most 0.047") == (patches == 0)


def test_a_fitted_model_says_that_other_data_are_scored_by_its_own_bank(loaded, few_shot, engine, caplog):
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        figures_of(engine(), loaded, few_shot("Chest"))
    assert "fitted on Brain" in caplog.text


def test_leave_one_out(make, categories, engine, tmp_path):
    """Trained without masks after a validation; each batch has its own class name; no bank is needed to export."""
    data = BMADLeaveOneOut(categories, "Brain", ["Chest"], num_workers=0, train_batch_size=4)
    model, runner, seen = make(max_epochs=2), engine(callbacks=[Watch(tmp_path / "early.ckpt", save=0)]), []
    runner.validate(model, datamodule=data, verbose=False)
    before = {key: value.clone() for key, value in model.state_dict().items() if "adapters" in key}
    forward = model.model.forward
    model.model.forward = lambda image, text=None, with_seg=True: (
        seen.append((text, with_seg)),
        forward(image, text, with_seg),
    )[1]
    runner.fit(model, datamodule=data)
    del model.model.forward
    after = model.state_dict()
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert len(moved) == 7  # the fourth second layer gets no gradient
    assert all("det" in key for key in moved)
    of_chest = model.model.encode_states(OF_CHEST)
    trained = [text for text, with_seg in seen if not with_seg]
    assert len(trained) == runner.trainer.global_step
    assert all(torch.allclose(text, of_chest, atol=1e-5) for text in trained)

    early = Mvfa.load_from_checkpoint(tmp_path / "early.ckpt", visualizer=False)
    early.to_torch(tmp_path)
    assert early.eval()(torch.rand(1, 3, 64, 64)).pred_score.isfinite().all()

    figures_of(engine(), early, BMADLeaveOneOut(categories, "Chest", ["Brain"], num_workers=0))
    assert early.settings.class_name == OF_CHEST
    torch.testing.assert_close(early.model.text_features, of_chest)
