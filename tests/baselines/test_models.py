"""What every model of ours keeps to, in anomalib's engine: fit, test, checkpoints, exports, half precision, help."""

import inspect
import json
import os
import socket
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from anomalib import LearningType
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from torchvision.models import get_model_weights

from anomalib_mvfa import (
    AprilGan,
    Bgad,
    BMADFewShot,
    BrainPhantom,
    Clip,
    Dra,
    MedClip,
    Mkd,
    Mvfa,
    MvfaPlus,
    WinClipBaseline,
)
from anomalib_mvfa.callbacks import FiniteNumbers
from anomalib_mvfa.compare.models import Origin, build_model
from recipe import TINY, WINDOWS, images, write_config

SIZE = TINY.image_size
TINY_CLIP, WINDOW_CLIP = "tiny.json", "windows.json"
RESNET = {"backbone": "test_resnet", "pre_trained": False, "max_epochs": 1}
MODELS = {
    Mvfa: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE, "max_epochs": 1},
    MvfaPlus: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE, "max_epochs": 1},
    AprilGan: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE, "max_epochs": 1},
    Clip: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE},
    MedClip: {"backbone": "test_resnet", "pretrained": None, "image_size": SIZE},
    WinClipBaseline: {"backbone": WINDOW_CLIP, "pretrained": None, "k_shot": 1},
    Mkd: {"backbone": "vgg11", "pre_trained": False, "image_size": 32, "max_epochs": 1},
    Dra: {**RESNET, "image_size": 128},
    Bgad: {**RESNET, "image_size": 64, "layers": ["layer1", "layer2"], "coupling_blocks": 1, "warmup_epochs": 0},
}
pytestmark = pytest.mark.usefixtures("small_teacher")
IMAGE_SIZES = {kind: arguments.get("image_size", 240) for kind, arguments in MODELS.items()}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Build a small model of a kind."""
    folder = tmp_path_factory.mktemp("configs")
    files = {name: str(write_config(folder / name, clip)) for name, clip in ((TINY_CLIP, TINY), (WINDOW_CLIP, WINDOWS))}

    def run(kind, **more):
        arguments = {"visualizer": False, **MODELS[kind], **more}
        return kind(**{name: files.get(str(value), value) for name, value in arguments.items()})

    return run


@pytest.fixture(scope="module", params=MODELS, ids=lambda kind: kind.__name__)
def fitted(request, build, few_shot, engine, tmp_path_factory):
    """Return an engine and a fitted model of each kind, its checkpoint and its figures."""
    runner, model = engine(), build(request.param)
    runner.fit(model, datamodule=few_shot())
    checkpoint = runner.best_model_path
    if request.param is WinClipBaseline:  # the engine only validates it
        checkpoint = str(tmp_path_factory.mktemp("winclip") / "model.ckpt")
        runner.trainer.save_checkpoint(checkpoint)
    figures = runner.test(model, datamodule=few_shot(), verbose=False)[0]
    return SimpleNamespace(engine=runner, model=model, checkpoint=checkpoint, figures=figures)


@torch.no_grad()
def scores(model, image):
    return model.eval()(image)


def test_a_checkpoint_gives_the_same_figures_and_scores(fitted, few_shot, engine):
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= set(fitted.figures)
    assert all(0 <= value <= 1 for value in fitted.figures.values())
    loaded = type(fitted.model).load_from_checkpoint(fitted.checkpoint, visualizer=False)
    assert dict(loaded.hparams) == dict(fitted.model.hparams)
    again = engine().test(loaded, datamodule=few_shot(), verbose=False)[0]
    assert again == pytest.approx(fitted.figures, abs=1e-6)
    image = images("films", 2, 80)
    torch.testing.assert_close(scores(loaded, image).anomaly_map, scores(fitted.model, image).anomaly_map)


def test_a_checkpoint_is_enough_on_the_command_line(fitted, categories, engine, tmp_path, monkeypatch):
    if type(fitted.model) is WinClipBaseline:
        pytest.skip("it is not trained, so the command line saves no checkpoint")
    monkeypatch.chdir(tmp_path)
    film = str(categories / "Brain" / "test" / "Ungood" / "img" / "000.png")
    options = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--model.visualizer=false", f"--data={film}"]
    start = ["predict", f"--model={type(fitted.model).__name__}", f"--ckpt_path={fitted.checkpoint}"]
    cli = AnomalibCLI([*start, *options], run=False)
    assert dict(cli.model.hparams) == dict(fitted.model.hparams)
    (found,) = cli.predict(**cli._prepare_subcommand_kwargs("predict"))
    loaded = type(fitted.model).load_from_checkpoint(fitted.checkpoint, visualizer=False)
    (expected,) = engine().predict(loaded, data_path=film)
    torch.testing.assert_close(found.pred_score, expected.pred_score)


def test_a_test_leaves_its_numbers(fitted):
    folder, data = Path(fitted.engine.trainer.default_root_dir), fitted.engine.trainer.datamodule
    written = json.loads((folder / "metrics.json").read_text())
    assert fitted.figures.items() <= written["metrics"].items()
    assert written["images"] == {"normal": 4, "abnormal": 4}
    table = pd.read_csv(folder / "scores.csv").set_index("image")
    assert len(table) == len(data.test_data)
    for batch in data.test_dataloader():
        image = fitted.model.pre_processor.transform(batch.image)
        rows = table.loc[batch.image_path]
        with torch.no_grad():
            own, decided = fitted.model.model.eval()(image).pred_score.flatten(), scores(fitted.model, batch.image)
        np.testing.assert_allclose(rows.score, own, rtol=1e-4)
        assert list(rows.decision == "abnormal") == decided.pred_label.flatten().tolist()
        assert list(rows.label == "abnormal") == batch.gt_label.tolist()
        assert list(rows.decision == "abnormal") == list(rows.score > rows.threshold)


def test_checkpoints_hold_plain_types_and_no_frozen_clip(fitted):
    saved = torch.load(fitted.checkpoint, weights_only=True)
    yaml.safe_dump(dict(saved["hyper_parameters"]))  # refuses all others, subclasses too
    frozen = [key for key in saved["state_dict"] if key.startswith("model.backbone.")]
    assert bool(frozen) == (type(fitted.model) in {Dra, Bgad})  # others find it where they found it before


def test_a_score_depends_on_no_other_image(fitted):
    image = images("query", 3, IMAGE_SIZES[type(fitted.model)])
    together, alone = scores(fitted.model, image), scores(fitted.model, image[1:2])
    assert together.anomaly_map.std() > 0
    torch.testing.assert_close(together.pred_score[1:2], alone.pred_score)
    torch.testing.assert_close(together.anomaly_map[1:2], alone.anomaly_map)


def test_a_torch_export_gives_the_same_scores_and_holds_no_images(fitted, few_shot, tmp_path, monkeypatch):
    runner, model = fitted.engine, fitted.model
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    image = images("films", 2, 80)
    expected = scores(model, image)

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = runner.export(model, "torch", export_root=tmp_path)
    loaded = torch.load(path, weights_only=False)["model"]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(scores(loaded, image).anomaly_map, expected.anomaly_map)
    source = few_shot()
    source.setup()
    content = path.read_bytes()
    assert len(content) < 5e6 + sum(weights.nbytes for weights in model.state_dict().values())  # metrics take 100 MB
    for row in range(len(source.support.samples)):
        view = source.support[row].image
        for pixels in (view, model.pre_processor.transform(view)):
            assert pixels.numpy().tobytes()[:400] not in content


@pytest.mark.slow
def test_an_openvino_export_gives_the_same_scores(fitted, tmp_path):
    openvino = pytest.importorskip("openvino")
    model, image = fitted.model, images("films", 2, 80)
    if type(model) in {Mvfa, AprilGan, Clip}:
        pytest.skip("test_inputs.py has Mvfa's graph; the others' are parts of it")
    expected = scores(model, image)
    # By way of ONNX. Some processors compute in bfloat16 by OpenVINO's own choice.
    path = fitted.engine.export(model, "openvino", export_root=tmp_path)
    found = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image.numpy())
    names = {name for output in found for name in output.names} & {"pred_score", "anomaly_map"}
    assert names == ({"pred_score"} if type(model) is Mkd else {"pred_score", "anomaly_map"})  # no gradient in a graph
    for name in names:
        values = getattr(expected, name).numpy()
        np.testing.assert_allclose(np.asarray(found[name]).reshape(values.shape), values, atol=1e-4)


def test_anomalib_is_told_the_same(fitted):
    kind, model = type(fitted.model), fitted.model
    if kind is WinClipBaseline:
        assert model.learning_type == LearningType.FEW_SHOT
    else:
        assert model.learning_type == LearningType.ONE_CLASS
        assert AnomalibModule in kind.__bases__  # or anomalib would not list it
        assert model.trainer_arguments["num_sanity_val_steps"] == 0
        assert ("max_epochs" in model.trainer_arguments) == (kind in {Clip, MedClip})
        assert fitted.engine.trainer.max_epochs == 1
        assert kind.configure_pre_processor((40, 40)).transform.size == [40, 40]
        default = inspect.signature(kind).parameters["image_size"].default
        assert kind.configure_pre_processor().transform.size == [default, default]
        assert model.pre_processor.transform.size == [IMAGE_SIZES[kind], IMAGE_SIZES[kind]]


def test_a_seed_decides_everything(fitted, build, few_shot, engine):
    kind = type(fitted.model)
    if not fitted.model.trainer_arguments.get("max_epochs") and "seed" in inspect.signature(kind).parameters:
        torch.manual_seed(1)  # whatever was drawn before
        same, other = build(kind), build(kind, seed=1)
        first, second = (torch.cat([p.flatten() for p in model.model.parameters()]) for model in (same, other))
        assert not torch.equal(first, second)
        engine().fit(same, datamodule=few_shot())
        assert all(map(torch.equal, same.model.parameters(), fitted.model.model.parameters()))


@pytest.mark.parametrize("kind", [Mvfa, Clip, WinClipBaseline, Mkd, Bgad], ids=lambda kind: kind.__name__)
def test_half_precision_of_data_without_masks(build, few_shot, engine, kind):
    category = "Brain" if kind is Bgad else "Chest"  # it learns from masks
    runner, model = engine(precision="bf16-mixed", limit_train_batches=1, limit_val_batches=1), build(kind)
    runner.fit(model, datamodule=few_shot(category, train_batch_size=2))
    figures = runner.test(model, datamodule=few_shot(category), verbose=False)[0]
    assert all(0 <= value <= 1 for name, value in figures.items() if category == "Brain" or "pixel" not in name)
    assert np.isnan(figures["pixel_AUROC"]) == (category == "Chest")
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in floats)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_model_refuses_numbers_that_are_not_finite_before_metrics_count_them(build, kind):
    model = build(kind)
    order = [type(callback) for callback in model.configure_callbacks()]
    assert order.index(FiniteNumbers) < order.index(type(model.evaluator))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_argument_is_documented(kind):
    undocumented = [name for name in inspect.signature(kind).parameters if f"\n    {name}: " not in kind.__doc__]
    assert undocumented == []
    assert "\n    pre_processor: Anomalib's component, or whether to use the default one.\n" in kind.__doc__


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Mvfa, {"image_score": "mean"}, "map_max, map_top, det_mean, det_max"),
        (AprilGan, {"learning_rate": -1.0}, r"learning_rate=-1\.0 must be at least 0\."),
        (Clip, {"bank_images": 0}, r"bank_images=0 must be at least 1\."),
        (MedClip, {"calibration": "train"}, "support, none, test"),
        (WinClipBaseline, {"threshold": "f1"}, r"threshold='f1' is unknown; choose best_f1"),
        (Dra, {"threshold": "sensitivity=95"}, r"threshold='sensitivity=95' is unknown"),
        (WinClipBaseline, {"k_shot": -1}, r"k_shot=-1 must be at least 0\."),
        (Mkd, {"backbone": "resnet18"}, r"backbone='resnet18' is unknown; choose one of: vgg11, vgg13, vgg16, vgg19"),
        (Mkd, {"image_size": 31}, r"image_size=31 must be at least 32"),
        (Dra, {"image_size": 96}, r"image_size=96 must be at least 128"),
        (Dra, {"top_share": 1.5}, r"top_share=1.5 must be between 0 and 1\."),
        (Bgad, {"condition_vector": 30}, r"condition_vector=30 must be a multiple of 4"),
        (Bgad, {"boundary_share": 0.6}, r"boundary_share=0.6 must be between 0 and 0.5\."),
    ],
)
def test_unknown_values_are_refused_before_weights_load(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"backbone": "no such backbone", **arguments})


def test_default_weights_are_the_authors():
    """BGAD's were those of timm's first tf_efficientnet_b6, DRA's and MKD's those of torchvision."""
    named = {kind: inspect.signature(kind).parameters["backbone"].default for kind in (Bgad, Dra, Mkd)}
    assert named == {Bgad: "tf_efficientnet_b6.aa_in1k", Dra: "resnet18.tv_in1k", Mkd: "vgg16"}
    files = [timm.get_pretrained_cfg(named[kind]).url.rpartition("/")[2] for kind in (Bgad, Dra)]
    assert files == ["tf_efficientnet_b6_aa-80ba17e4.pth", "resnet18-f37072fd.pth"]
    assert get_model_weights("vgg16").IMAGENET1K_V1.url.endswith("/vgg16-397923af.pth")  # as MKD names it


@pytest.mark.parametrize(("kind", "loader"), [(Mkd, "mkd.get_model"), (Dra, "base.TimmFeatureExtractor")])
def test_failed_downloads_say_what_to_do(kind, loader, build, monkeypatch):
    def offline(*args, **kwargs):
        msg = "cannot find the files\nin the cache"
        raise FileNotFoundError(msg)

    monkeypatch.setattr(f"anomalib_mvfa.baselines.{loader}", offline)
    message = r"The weights of \w+ could not be loaded \(FileNotFoundError: cannot find the files\).* pre_trained=false"
    with pytest.raises(RuntimeError, match=message):
        build(kind, pre_trained=True)


@pytest.mark.parametrize("kind", [Dra, Bgad], ids=lambda kind: kind.__name__)
def test_weights_of_a_comparison_reach_the_backbone(kind, tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    torch.save({name: torch.full_like(value, 0.5) for name, value in state.items()}, tmp_path / "weights.pth")
    spec = {"class_path": kind.__name__, "init_args": {**MODELS[kind], "pre_trained": True}}
    built, origin = build_model(spec, str(tmp_path / "weights.pth"), visualizer=False)
    assert origin == Origin("weights.pth")
    assert all((parameter == 0.5).all() for parameter in built.model.backbone.parameters())
    (one, origin), (other, _) = (build_model(spec, None, visualizer=False, seed=seed) for seed in (3, 4))
    assert origin.is_random
    assert all(map(torch.equal, one.model.backbone.parameters(), other.model.backbone.parameters()))
    assert not all(map(torch.equal, one.model.parameters(), other.model.parameters()))


# ---------------------------------------------------------------------- several processes


def fit_and_test(config, categories, out, processes, **environment):
    """Fit and test models in each of some processes, and save their figures and states, a file per process."""
    os.environ.update(environment)
    batches = {"num_workers": 0, "train_batch_size": 2 // processes, "eval_batch_size": 3}
    brain, chest = (BMADFewShot(categories, name, k_shot=1, **batches) for name in ("Brain", "Chest"))
    normal, once = BrainPhantom(f"{out}-phantom", size=32, num_workers=0), {"max_epochs": 1}
    brain.setup()
    odd = brain.test_data  # no two processes share these equally
    odd.samples = odd.samples.iloc[:-1]
    strategy = {"strategy": "ddp"} if processes > 1 else {}
    results = {}
    for name, (kind, data, options) in {
        "Clip": (Clip, chest, {}),
        "AprilGan": (AprilGan, chest, once),
        "Mvfa, normal images": (Mvfa, normal, once),
        "Mvfa": (Mvfa, brain, once),
        "Mvfa, ranges of the test": (Mvfa, brain, {**once, "calibration": "test"}),
    }.items():
        data._is_setup = data is brain
        model = kind(str(config), None, image_size=SIZE, visualizer=False, **options)
        runs = f"{out}-{name}-{os.environ.get('RANK')}"  # anomalib numbers these in every process, which race
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        engine = Engine(default_root_dir=runs, devices=processes, **quiet, **strategy)
        engine.fit(model, datamodule=data)
        figures = engine.test(model, datamodule=data, verbose=False)[0]
        state = {key: value for key, value in model.state_dict().items() if "backbone" not in key}
        results[name] = figures, state
    torch.save(results, f"{out}-{engine.trainer.global_rank}.pt")


def test_two_processes_equal_one(tiny_config, categories, tmp_path):
    two_processes = tmp_path / "two"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    for rank in "01":  # as torchrun starts them, but for the time to import anomalib
        arguments = (tiny_config, categories, two_processes, 2)
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(get_context("fork").Process(target=fit_and_test, args=arguments, kwargs=environment))
        processes[-1].start()
    fit_and_test(tiny_config, categories, tmp_path / "one", 1)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    one, first, second = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    for name, (figures, state) in one.items():
        assert first[name][0] == pytest.approx(figures, abs=1e-5, nan_ok=True), name
        tables = [[*Path(tmp_path, f"one-{name}-None").rglob("scores.csv")]]
        tables += [[*Path(f"{two_processes}-{name}-{rank}").rglob("scores.csv")] for rank in (0, 1)]
        (alone,), (together,), none = tables  # every image once, by the first process
        assert none == []
        tables = [pd.read_csv(table).drop(columns="image") for table in (together, alone)]
        pd.testing.assert_frame_equal(*tables, atol=1e-4)
        for key, value in state.items():
            here, there = first[name][1][key], second[name][1][key]
            assert torch.equal(here.nan_to_num(), there.nan_to_num()), (name, key)
            torch.testing.assert_close(here, value, atol=1e-4, rtol=0, equal_nan=True, msg=f"{name} {key}")
