"""Mvfa inside anomalib's engine: settings, training, checkpoints, precision."""

import io
import logging
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_mvfa import BMADFewShot, BMADLeaveOneOut, FewShot, Mvfa
from anomalib_mvfa.model.backbone import ClipBackbone
from anomalib_mvfa.model.calibration import is_calibrated
from anomalib_mvfa.model.state import Settings

IMAGE_SIZE = 56


@pytest.fixture
def make(mini_clip):
    """Build a small Mvfa."""

    def build(**arguments):
        defaults = {"image_size": IMAGE_SIZE, "max_epochs": 1, "visualizer": False}
        return Mvfa(backbone=str(mini_clip.config), pretrained=str(mini_clip.weights), **{**defaults, **arguments})

    return build


@pytest.fixture
def few_shot(phantom_root):
    """Build the few-shot datamodule of the phantom."""

    def build(**arguments):
        return BMADFewShot(phantom_root, "Brain", **{"k_shot": 2, "num_workers": 0, **arguments})

    return build


@pytest.fixture
def engine(tmp_path):
    """Build an engine that says little."""

    def build(**arguments):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        return Engine(default_root_dir=tmp_path / "results", **{**quiet, **arguments})

    return build


def fit(engine, model, datamodule):
    engine.fit(model, datamodule=datamodule)
    return engine.best_model_path


def test_a_checkpoint_of_other_levels_is_refused(make, few_shot, engine):
    checkpoint = fit(engine(), make(levels=[1, 2]), few_shot())
    with pytest.raises(RuntimeError, match=r"made with levels=\[1, 2\], and levels=\[2, 3\] are in use\. Give"):
        engine().test(make(levels=[2, 3]), datamodule=few_shot(), ckpt_path=checkpoint)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_leaves_the_last_checkpoint(make, few_shot, engine, tmp_path):
    class FullDisk(Callback):
        """Fills the disk after an epoch."""

        def on_train_epoch_start(self, trainer, pl_module):
            del pl_module
            if trainer.current_epoch == 1:
                (checkpoint,) = (tmp_path / "results").rglob("*.ckpt")
                checkpoint.with_name(f".{checkpoint.name}.partial").symlink_to("/dev/full")

    model = make(max_epochs=2)
    with pytest.raises(OSError, match=r"model\.ckpt was not written \(No space left on device\), and what was"):
        engine(callbacks=[FullDisk()]).fit(model, datamodule=few_shot())
    (checkpoint,) = (path for path in (tmp_path / "results").rglob("*") if path.is_file())
    assert torch.load(checkpoint, weights_only=False)["epoch"] == 0
    resumed = engine()
    resumed.fit(make(max_epochs=2), datamodule=few_shot(), ckpt_path=checkpoint)
    assert resumed.trainer.current_epoch == 2


class Losses(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(float(outputs["loss"]))


# ---------------------------------------------------------------- settings


def test_data_decide_what_arguments_leave_open(make, few_shot, engine):
    model = make()
    engine().test(model, datamodule=few_shot(), verbose=False)
    assert asdict(model.settings) == {
        "protocol": "few_shot",
        "class_name": "Brain",
        "map_branch": "seg",
        "image_score": "map_max",
        "zero_shot_weight": 0.5,
        "few_shot_weight": 0.5,
        "learning_rate": 1e-3,
        "calibration": "support",
    }


def test_arguments_beat_the_data(make, few_shot, engine):
    model = make(class_name="head", image_score="det_max", few_shot_weight=0.2, learning_rate=0.01, calibration="none")
    engine().test(model, datamodule=few_shot(), verbose=False)
    chosen = {
        key: getattr(model.settings, key) for key in ("class_name", "image_score", "few_shot_weight", "learning_rate")
    }
    assert chosen == {"class_name": "head", "image_score": "det_max", "few_shot_weight": 0.2, "learning_rate": 0.01}
    assert model.model.scoring.normalised is False


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"image_score": "mean"}, "map_max, det_mean, det_max"),
        ({"calibration": "train"}, "support, none, test"),
        ({"bce": "soft"}, "logits, plain"),
        ({"residual_ratio": 0.6}, "between 0 and 0.5"),
        ({"max_epochs": 0}, "max_epochs=0 must be at least 1"),
        ({"zero_shot_weight": 0, "few_shot_weight": 0}, "one branch at least"),
        ({"templates": ["a photo"]}, "templates must be"),
        ({"normal_states": []}, "normal_states must be"),
    ],
)
def test_unknown_values_are_refused_before_weights_load(arguments, named):
    with pytest.raises(ValueError, match=named):
        Mvfa(backbone="no such backbone", **arguments)


def test_environment_sets_the_defaults(mini_clip, tmp_path):
    import os
    import subprocess
    import sys

    code = "from anomalib_mvfa import Mvfa; m = Mvfa(); print(m.hparams.pretrained, m.model.backbone.width)"
    environment = {
        **os.environ,
        "ANOMALIB_MVFA_BACKBONE": str(mini_clip.config),
        "ANOMALIB_MVFA_PRETRAINED": "null",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "None"


# ---------------------------------------------------------------- training


def test_training_lowers_the_loss_and_stops_by_itself(make, few_shot, engine):
    losses = Losses()
    runner = engine(callbacks=[losses])
    runner.fit(make(max_epochs=3), datamodule=few_shot())
    steps = 2 * 2 * 11
    assert len(losses.steps) == 3 * steps
    assert sum(losses.steps[-steps:]) < sum(losses.steps[:steps])


@pytest.mark.parametrize("augmented", [False, True])
def test_frozen_blocks_run_once_for_images_that_come_again(make, few_shot, engine, monkeypatch, augmented):
    seen, embed = [], ClipBackbone.embed

    def counted(self, image):
        seen.append(len(image))
        return embed(self, image)

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.clear()

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:  # before the bank is built
                trained.append(sum(seen))

    trained, model = [], make(max_epochs=3)
    monkeypatch.setattr(ClipBackbone, "embed", counted)
    random = {"train_augmentations": RandomHorizontalFlip()} if augmented else {}
    engine(callbacks=[Watch()]).fit(model, datamodule=few_shot(**random))
    views = 2 * 2 * 11
    assert trained == [2 * views if augmented else views]
    assert model.model.cache is None


def test_an_explicit_trainer_value_wins(make, few_shot, engine):
    runner = engine(max_epochs=2)
    runner.fit(make(max_epochs=5), datamodule=few_shot())
    assert runner.trainer.current_epoch == 2


def test_validation_runs_after_the_last_epoch_only_and_every_epoch_is_saved(make, few_shot, engine, monkeypatch):
    events = []

    class Watch(Callback):
        def on_validation_start(self, trainer, pl_module):
            events.append(("validate", trainer.current_epoch))

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            events.append(("save", trainer.current_epoch, is_calibrated(pl_module.model)))

    engine(callbacks=[Watch()]).fit(make(max_epochs=3), datamodule=few_shot())
    assert events == [("save", 0, False), ("save", 1, False), ("validate", 2), ("save", 2, True)]


def test_normal_only_data_build_a_bank_and_train_nothing(make, phantom_root, engine, caplog):
    root = phantom_root / "Brain"
    data = Folder(
        name="phantom",
        root=root,
        normal_dir="train/good/img",
        abnormal_dir="test/Ungood/img",
        normal_test_dir="test/good/img",
        mask_dir="test/Ungood/label",
        num_workers=0,
    )
    model = make(bank_images=3)
    before = {key: value.clone() for key, value in model.state_dict().items() if "adapters" in key}
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        engine().fit(model, datamodule=data)
    assert "no abnormal image" in caplog.text
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert model.model.bank.seg.shape[1] == 3 * 11 * 17


def test_batches_without_masks_leave_seg_adapters_as_they_are(make, phantom_root, engine, tmp_path):
    for category in ("Brain", "Chest"):  # the same images, with masks and without
        shutil.copytree(phantom_root / "Brain", tmp_path / category)
    data = BMADLeaveOneOut(tmp_path, "Brain", ["Chest"], num_workers=0)
    model = make()
    adapters = {key: value.clone() for key, value in model.state_dict().items() if "adapters" in key}
    nouns = []
    original = model.model.forward
    model.model.forward = lambda image, text=None, with_seg=True: (
        nouns.append((text is not None and text.sum().item(), with_seg)),
        original(image, text, with_seg),
    )[1]
    engine(num_sanity_val_steps=0).fit(model, datamodule=data)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in adapters.items() if "seg" in key)
    moved = [key for key, value in adapters.items() if "det" in key and not torch.equal(value, after[key])]
    assert len(moved) == 7  # the fourth second layer gets no gradient
    of_chest = model.model.encode_states("Chest X-ray film").sum().item()
    trained = [noun for noun, with_seg in nouns if not with_seg]
    assert trained
    assert trained == pytest.approx([of_chest] * len(trained), abs=1e-5)


def test_momentum_of_masked_steps_does_not_reach_seg_adapters_later(make, engine):
    """Seg adapters that have momentum rest during steps without masks, as with two optimisers."""
    model = make()
    engine()._setup_trainer(model)
    model.state.settings = Settings(learning_rate=1e-3, class_name="Brain")
    optimizer = model.configure_optimizers()
    text = model.model.encode_states("Brain")
    image, mask, label = (
        torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE),
        torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE),
        torch.zeros(1),
    )

    def step(with_seg):
        optimizer.zero_grad()
        model.model.train()
        seg_maps, det_scores = model.model(image, text, with_seg)
        model._saw_masks |= with_seg
        model.loss(seg_maps, det_scores, mask, label).backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.model.seg_adapters.parameters()])

    start = torch.cat([p.detach().flatten() for p in model.model.seg_adapters.parameters()])
    moved = step(with_seg=True)
    assert not torch.equal(moved, start)
    assert torch.equal(step(with_seg=False), moved)


# ---------------------------------------------------------------- scores


def test_one_image_alone_has_the_score_it_has_among_all(make, few_shot, engine):
    model, data = make(), few_shot()
    runner = engine()
    runner.fit(model, datamodule=data)
    together = {
        path: score
        for batch in runner.predict(model, datamodule=data)
        for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }
    for path in list(together)[::3]:
        alone = runner.predict(model, data_path=path)[0].pred_score
        assert alone.item() == pytest.approx(together[path].item(), abs=2e-3)  # read and resized as floats here
    data.eval_batch_size = 1
    singly = [batch.pred_score.item() for batch in runner.predict(model, datamodule=data)]
    assert singly == pytest.approx([score.item() for score in together.values()], abs=1e-6)


def test_ranges_of_the_test_set_run_the_backbone_once(make, few_shot, engine, caplog):
    model, data = make(calibration="test"), few_shot()
    calls = []
    embed = model.model.backbone.embed
    model.model.backbone.embed = lambda image: (calls.append(len(image)), embed(image))[1]
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        engine().test(model, datamodule=data, verbose=False)
    assert sum(calls) == 2 * 11 + 2 + len(data.test_data)  # normal views, abnormal images, test images
    assert "optimistic" in caplog.text
    with pytest.raises(ValueError, match="calibration='test' cannot predict"):
        engine().predict(model, datamodule=data)
    with pytest.raises(ValueError, match="calibration='test' cannot export"):
        model.to_torch("nowhere")


def test_thresholds_come_from_the_support_where_validation_shows_one_kind(make, phantom_root, engine, caplog, tmp_path):
    shutil.copytree(phantom_root / "Brain", tmp_path / "Brain")
    abnormal = sorted((tmp_path / "Brain/valid/Ungood/img").iterdir())
    for image in abnormal[2:]:
        image.unlink()
        (tmp_path / "Brain/valid/Ungood/label" / image.name).unlink()
    model = make()
    with caplog.at_level(logging.INFO, logger="anomalib.mvfa"):
        engine().fit(model, datamodule=BMADFewShot(tmp_path, "Brain", k_shot=2, num_workers=0))
    assert "Thresholds come from the 4 support images" in caplog.text
    assert 0 < model.post_processor.image_threshold < 1


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_leaves_the_backbone_out_and_gives_the_same_scores(make, few_shot, engine):
    model, data = make(), few_shot()
    runner = engine()
    path = fit(runner, model, data)
    figures = runner.test(model, datamodule=data, verbose=False)[0]
    saved = torch.load(path, weights_only=True)
    assert not [key for key in saved["state_dict"] if "backbone" in key]
    assert saved["state_dict"]["model.bank.det"].numel() == 0  # map_max reads the seg branch alone

    loaded = Mvfa.load_from_checkpoint(path, visualizer=False)
    assert loaded.settings == model.settings
    again = engine().test(loaded, datamodule=few_shot(), verbose=False)[0]
    assert again == pytest.approx(figures, abs=1e-6)

    by_path = engine().test(make(), datamodule=few_shot(), ckpt_path=path, verbose=False)[0]
    assert by_path == pytest.approx(figures, abs=1e-6)


def test_another_backbone_is_refused(make, few_shot, engine):
    path = fit(engine(), make(), few_shot())
    with pytest.raises(RuntimeError, match="fingerprint"):
        Mvfa.load_from_checkpoint(path, pretrained=None, visualizer=False)


def test_a_checkpoint_moves_to_weights_elsewhere(make, few_shot, engine, mini_clip, tmp_path):
    path = fit(engine(), make(), few_shot())
    elsewhere = shutil.copy(mini_clip.weights, tmp_path / "elsewhere.pt")
    loaded = Mvfa.load_from_checkpoint(path, pretrained=str(elsewhere), visualizer=False)
    assert loaded.hparams.pretrained == str(elsewhere)


def test_a_checkpoint_from_before_the_last_epoch_builds_its_bank_anew(make, few_shot, engine, tmp_path):
    class KeepFirst(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    engine(callbacks=[KeepFirst()]).fit(make(max_epochs=2), datamodule=few_shot())
    early = Mvfa.load_from_checkpoint(tmp_path / "early.ckpt", visualizer=False)
    assert early.model.bank.seg.numel() == 0
    with pytest.raises(RuntimeError, match="no support images"):
        engine().predict(early, data_path=few_shot().source.root / "Brain/test/good/img/000.png")
    figures = engine().test(early, datamodule=few_shot(), verbose=False)[0]
    assert early.model.bank.seg.numel() > 0
    assert 0 <= figures["image_AUROC"] <= 1


def test_resumed_training_ends_where_unbroken_training_does(make, few_shot, engine, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = make(max_epochs=3)
    runner = engine(callbacks=[Stop()])
    runner.fit(whole, datamodule=few_shot())
    figures = runner.test(whole, datamodule=few_shot(), verbose=False)[0]

    resumed = make(max_epochs=3)
    runner = engine()
    runner.fit(resumed, datamodule=few_shot(), ckpt_path=tmp_path / "half.ckpt")
    assert runner.trainer.current_epoch == 3
    assert runner.test(resumed, datamodule=few_shot(), verbose=False)[0] == pytest.approx(figures, abs=1e-6)


@pytest.mark.parametrize("cut", ["torch.save", "shutil.move"])
def test_a_save_that_is_cut_off_leaves_the_last_checkpoint(make, few_shot, engine, tmp_path, monkeypatch, cut):
    class Killed(BaseException):
        pass

    class CutSecond(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                monkeypatch.setattr(cut, {"torch.save": save, "shutil.move": move}[cut])

    def save(content, file, real=torch.save):
        whole = io.BytesIO()
        real(content, whole)
        half = whole.getvalue()[: len(whole.getvalue()) // 2]
        file.write(half) if hasattr(file, "write") else file.write_bytes(half)
        raise Killed

    def move(source, target):
        """Move as between file systems, where Lightning's own way to save moves the file."""
        data = Path(source).read_bytes()
        Path(target).write_bytes(data[: len(data) // 2])
        raise Killed

    runner = engine(callbacks=[CutSecond()])
    with suppress(Killed):
        runner.fit(make(max_epochs=2), datamodule=few_shot())
    monkeypatch.undo()
    (path,) = (tmp_path / "results").rglob("model.ckpt")
    assert torch.load(path, weights_only=False)["epoch"] == (0 if cut == "torch.save" else 1)  # which moves nothing
    assert [file.name for file in path.parent.iterdir()] == ["model.ckpt"]
    resumed = make(max_epochs=2)
    runner = engine()
    runner.fit(resumed, datamodule=few_shot(), ckpt_path=path)
    assert runner.trainer.current_epoch == 2


# ---------------------------------------------------------------- nothing stale


def bank_is_true(engine, model, datamodule):
    """Whether the bank is the one that the adapters, as they are now, give."""
    had = model.model.bank.seg.clone()
    model._forget_calibration()
    engine.validate(model, datamodule=datamodule, verbose=False)
    return torch.allclose(had, model.model.bank.seg, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"val_check_interval": 0.5}, {"max_steps": 7}, {"limit_train_batches": 3}, {"limit_val_batches": 0}],
)
def test_the_bank_is_the_final_adapters_however_a_fit_goes(make, few_shot, engine, arguments):
    model, data, runner = make(), few_shot(), engine(**arguments)
    runner.fit(model, datamodule=data)
    assert 0 < model.post_processor.image_threshold < 1
    saved = torch.load(runner.best_model_path, weights_only=True)
    assert torch.equal(saved["state_dict"]["model.bank.seg"], model.model.bank.seg)
    assert bank_is_true(engine(), model, data)


def test_a_fit_that_a_callback_stops_is_finished_all_the_same(make, few_shot, engine):
    stop = EarlyStopping("train_loss", patience=0, mode="max", check_on_train_epoch_end=True)
    model, runner = make(max_epochs=10), engine(callbacks=[stop])
    runner.fit(model, datamodule=few_shot())
    assert runner.trainer.current_epoch < 10
    saved = torch.load(runner.best_model_path, weights_only=True)
    assert torch.equal(saved["state_dict"]["model.bank.seg"], model.model.bank.seg)
    assert saved["state_dict"]["model.bank.seg"].numel()


@pytest.fixture
def two_categories(phantom_root, tmp_path):
    """Return a root with the same images as Brain, with masks, and as Chest, without."""
    for category in ("Brain", "Chest"):
        shutil.copytree(phantom_root / "Brain", tmp_path / category)
    return tmp_path


def test_a_model_that_is_fitted_again_forgets_the_first_data(make, two_categories, engine):
    first, second = (BMADFewShot(two_categories, name, k_shot=2, num_workers=0) for name in ("Brain", "Chest"))
    model = make()
    engine().fit(model, datamodule=first)
    engine().fit(model, datamodule=second)
    settings = {key: getattr(model.settings, key) for key in ("class_name", "map_branch", "image_score")}
    assert settings == {"class_name": "Chest X-ray film", "map_branch": "det", "image_score": "det_mean"}
    expected = model.model.encode_states("Chest X-ray film")
    torch.testing.assert_close(model.model.text_features, expected)


def test_testing_without_a_fit_builds_the_bank_of_each_data_set(make, two_categories, engine):
    model = make()
    for name, branch in (("Brain", "seg"), ("Chest", "det")):
        data = BMADFewShot(two_categories, name, k_shot=2, num_workers=0)
        engine().test(model, datamodule=data, verbose=False)
        assert model.settings.map_branch == branch
        assert getattr(model.model.bank, branch).numel()


def test_a_fitted_model_says_that_other_data_are_scored_by_its_own_bank(make, two_categories, engine, caplog):
    model = make()
    engine().fit(model, datamodule=BMADFewShot(two_categories, "Brain", k_shot=2, num_workers=0))
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        data = BMADFewShot(two_categories, "Chest", k_shot=2, num_workers=0)
        engine().test(model, datamodule=data, verbose=False)
    assert "fitted on Brain" in caplog.text


def test_leave_one_out_prompts_with_the_noun_of_what_is_tested(make, two_categories, engine):
    model = make()
    runner = engine()
    runner.fit(model, datamodule=BMADLeaveOneOut(two_categories, "Brain", ["Chest"], num_workers=0))
    loaded = Mvfa.load_from_checkpoint(runner.best_model_path, visualizer=False)
    other = BMADLeaveOneOut(two_categories, "Chest", ["Brain"], num_workers=0)
    engine().test(loaded, datamodule=other, verbose=False)
    assert loaded.settings.class_name == "Chest X-ray film"
    torch.testing.assert_close(loaded.model.text_features, loaded.model.encode_states("Chest X-ray film"))


@pytest.mark.parametrize(
    "changed",
    [
        {"templates": ["a scan of a {}."]},
        {"normalize": True},
        {"residual_ratio": 0.3},
        {"class_name": "head"},
        {"image_score": "det_mean"},
        {"score_levels": [4]},
        {"few_shot_weight": 0.1},
    ],
)
def test_a_checkpoint_with_other_arguments_is_as_if_built_with_them(make, few_shot, engine, changed):
    path = fit(engine(), make(), few_shot())
    loaded = Mvfa.load_from_checkpoint(path, visualizer=False, **changed)
    figures = engine().test(loaded, datamodule=few_shot(), verbose=False)[0]

    rebuilt = Mvfa.load_from_checkpoint(path, visualizer=False, **changed)
    rebuilt._forget_calibration()
    with torch.no_grad():
        rebuilt.model.text_features.fill_(torch.nan)
    assert figures == pytest.approx(engine().test(rebuilt, datamodule=few_shot(), verbose=False)[0], abs=1e-6)


def test_what_cannot_score_is_not_exported(make, few_shot, engine, two_categories, tmp_path):
    with pytest.raises(RuntimeError, match="memory bank or ranges are missing"):
        make().to_torch(tmp_path)

    class KeepFirst(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    data = BMADLeaveOneOut(two_categories, "Brain", ["Chest"], num_workers=0)
    engine(callbacks=[KeepFirst()]).fit(make(max_epochs=2), datamodule=data)
    early = Mvfa.load_from_checkpoint(tmp_path / "early.ckpt", visualizer=False)
    early.to_torch(tmp_path)
    assert early.eval()(torch.rand(1, 3, 64, 64)).pred_score.isfinite().all()


def test_exported_files_hold_no_support_images(make, few_shot, engine, tmp_path):
    model, runner = make(), engine()
    runner.fit(model, datamodule=few_shot())
    assert model.state.support
    path = runner.export(model, "torch", export_root=tmp_path)
    assert not torch.load(path, weights_only=False)["model"].state.support
    assert model.state.support


def test_validation_does_not_keep_a_later_fit_from_learning(make, two_categories, engine):
    data = BMADLeaveOneOut(two_categories, "Brain", ["Chest"], num_workers=0)
    model, runner = make(), engine()
    runner.validate(model, datamodule=data, verbose=False)
    runner.fit(model, datamodule=data)


def test_a_limited_test_leaves_nothing_for_the_next(make, few_shot, engine):
    model, data = make(calibration="test"), few_shot(eval_batch_size=2)
    engine(limit_test_batches=1).test(model, datamodule=data, verbose=False)
    assert not model._test_scores
    figures = engine().test(model, datamodule=data, verbose=False)[0]
    assert figures == pytest.approx(
        engine().test(make(calibration="test"), datamodule=data, verbose=False)[0], abs=1e-6
    )


def test_a_monitoring_checkpoint_sees_every_epoch(make, few_shot, engine, tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", monitor="train_loss", save_top_k=-1)
    engine(callbacks=[keep]).fit(make(max_epochs=3), datamodule=few_shot())
    assert len(list((tmp_path / "kept").iterdir())) == 3


# ---------------------------------------------------------------- numerics


def test_half_precision_features_rank_alike(make, few_shot, engine):
    figures = []
    for precision in ("32-true", "bf16-mixed"):
        model = make(calibration="support", seed=1)
        figures.append(engine(precision=precision).test(model, datamodule=few_shot(), verbose=False)[0])
    for name in ("image_AUROC", "pixel_AUROC"):
        assert figures[1][name] == pytest.approx(figures[0][name], abs=0.07)  # 16 images: one pair is 0.016


@pytest.mark.parametrize("arguments", [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 4}])
def test_clipping_and_accumulation_train(make, few_shot, engine, arguments):
    losses = Losses()
    runner = engine(callbacks=[losses], **arguments)
    runner.fit(make(), datamodule=few_shot())
    assert runner.trainer.global_step == 44 // arguments.get("accumulate_grad_batches", 1)
    assert all(torch.isfinite(torch.tensor(losses.steps)))


def test_the_seed_of_the_run_does_not_change_training(make, few_shot, engine):
    """Initial weights and order are functions of the arguments, whatever the global seed."""
    weights = []
    for seed in (1, 2):
        seed_everything(seed)
        model = make()
        engine().fit(model, datamodule=few_shot())
        weights.append(model.model.det_adapters[0].fc1[0].weight.clone())
    assert torch.equal(*weights)


def test_few_shot_over_any_datamodule_from_a_mapping(make, phantom_root, engine):
    source = {
        "class_path": "Folder",
        "init_args": {
            "name": "own",
            "root": str(phantom_root / "Brain"),
            "normal_dir": "train/good/img",
            "abnormal_dir": "test/Ungood/img",
            "normal_test_dir": "test/good/img",
            "mask_dir": "test/Ungood/label",
        },
    }
    model = make(class_name="head")
    figures = engine().train(model, datamodule=FewShot(source, k_shot=1, num_workers=0))[0]
    assert set(figures) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Score"}
